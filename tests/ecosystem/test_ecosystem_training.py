"""Lightning and accelerate with every kind: their runs are those of a plain loop, and go on where they stopped."""

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as lightning
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import peftlib
from support.ecosystem import Column, adapter_state, base_state, every_kind, feature, network, put, same, tokens

STEPS, BATCH, PARTS = 6, 4, 2


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The libraries warn of their own affairs: workers, loggers, pinned memory."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    AcceleratorState._reset_state(reset_partial_state=True)  # one for the whole process, made by the first Accelerator


def batches() -> list[Tensor]:
    """One batch in two halves, again at each step."""
    return list(tokens(BATCH).chunk(PARTS)) * STEPS


def loader() -> Any:
    return DataLoader(TensorDataset(tokens(BATCH).repeat(STEPS, 1)), batch_size=BATCH // PARTS)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch)[:, -batch.shape[1] :]
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch.flatten())


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(peftlib.parameters(model), lr=0.02, weight_decay=0.1)


def by_hand(model: nn.Module) -> list[float]:
    """The plain loop: the gradient of a step is the mean over its two halves."""
    optimizer, losses = optimizer_of(model), []
    for at, batch in enumerate(batches(), start=1):
        loss = loss_of(model, batch)
        (loss / PARTS).backward()
        losses.append(loss.item())
        if at % PARTS == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in state.items()}


def check(model: Any, losses: list[float], column: Column) -> None:
    expected = network(column)
    assert losses == by_hand(expected)
    assert losses[-PARTS] < losses[0]
    assert same(adapter_state(model), adapter_state(expected))
    assert same(base_state(model), base_state(network()))


# Lightning


class Module(lightning.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.losses = model, []

    def training_step(self, batch: list[Tensor], at: int) -> Tensor:
        loss = loss_of(self.model, batch[0])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of(self)


def fitted(model: nn.Module, folder: Path, resume: Path | None = None, **more: Any) -> list[float]:
    module = Module(model)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        accumulate_grad_batches=PARTS, default_root_dir=folder, **{"enable_checkpointing": False, **more},
    )  # fmt: skip
    trainer.fit(module, loader(), ckpt_path=resume)
    return module.losses


@feature("Lightning: the run of a plain loop, with accumulated gradients, to the bit")
@every_kind
def test_lightning_trains_what_a_plain_loop_trains(column, tmp_path):
    model = network(column)
    check(model, fitted(model, tmp_path), column)


@feature("Lightning: a run that was stopped and resumed from its checkpoint is the same run, to the bit")
@every_kind
def test_a_run_of_lightning_is_resumed(column, tmp_path):
    """Four steps, a checkpoint, two more; every batch is the same, for Lightning begins a plain loader anew."""
    every_step = lightning.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = network(column)
    fitted(whole, tmp_path, enable_checkpointing=True, callbacks=[every_step])
    put(fresh := network(), column)
    fitted(fresh, tmp_path, resume=tmp_path / "step=4.ckpt", max_steps=STEPS)
    assert same(adapter_state(fresh), adapter_state(whole))
    assert same(base_state(fresh), base_state(whole))


@feature("Lightning: peftlib.save and peftlib.load of the module's model")
@every_kind
def test_the_adapter_of_a_lightning_module_goes_through_a_file(column, tmp_path):
    """The file of the inner model fits the plain model; that of the whole module has Lightning's prefix in it."""
    model = network(column)
    fitted(model, tmp_path)
    peftlib.save(model, tmp_path / "adapter.safetensors")
    fresh = network()
    peftlib.load(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(fresh(tokens()), model(tokens()))


# accelerate


def prepared(model: nn.Module) -> tuple[Accelerator, Any]:
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=PARTS,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    return accelerator, accelerator.prepare(model, optimizer_of(model), loader())


def accelerated(
    accelerator: Accelerator, parts: Any, first: int = 0, last: int = STEPS, save: Any = None
) -> list[float]:
    model, optimizer, given = parts
    losses: list[float] = []
    for at, (batch,) in enumerate(given):
        if at // PARTS < first:
            continue
        with accelerator.accumulate(model):
            loss = loss_of(model, batch)
            accelerator.backward(loss)
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        if save and at == save[0]:
            accelerator.save_state(save[1])
    return losses


@feature("accelerate: prepare, accumulate and backward, the run of a plain loop, to the bit")
@every_kind
def test_accelerate_trains_what_a_plain_loop_trains(column):
    accelerator, parts = prepared(network(column))
    losses = accelerated(accelerator, parts)
    check(accelerator.unwrap_model(parts[0]), losses, column)


@feature("accelerate: save_state and load_state, the resumed run to the bit")
@every_kind
def test_a_run_of_accelerate_is_resumed(column, tmp_path):
    accelerator, parts = prepared(network(column))
    accelerated(accelerator, parts, save=(4 * PARTS - 1, tmp_path / "state"))
    put(fresh := network(), column)
    other, again = prepared(fresh)
    other.load_state(tmp_path / "state")
    accelerated(other, again, first=4)
    assert same(adapter_state(fresh), adapter_state(parts[0]))
    assert same(base_state(fresh), base_state(network()))


@feature("accelerate: mixed precision in bfloat16")
@every_kind
def test_mixed_precision_follows_the_run_in_full(column):
    """bfloat16 products round by 2⁻⁹ each, some dozens of them one after another; the adapters stay float32."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=PARTS)
    model = network(column)
    losses = accelerated(accelerator, accelerator.prepare(model, optimizer_of(model), loader()))
    for found, expected in zip(losses, by_hand(network(column)), strict=True):
        assert abs(found - expected) <= 16 * 2**-9 * expected
    assert all(parameter.dtype == torch.float32 for parameter in peftlib.parameters(model))

"""Gradual unfreezing in transformers' Trainer and in Lightning: our callbacks, run with the real libraries."""

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import peftlib
from peftlib import schedules
from support.ecosystem import feature
from support.helpers import Network, bits

GROUPS = ["embedding", "layers.0", "layers.1", "head"]
STEPS = 8  # of the optimizer; a move is due at 2, 4 and 6


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.tokens = torch.randint(0, 11, (16, 5), generator=generator)
        self.labels = torch.randint(0, 3, (16, 5), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[at], "labels": self.labels[at]}


class Tagger(nn.Module):
    """Called as the Trainer calls a model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.network = Network(layers=2)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.network(input_ids)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The libraries warn of their own affairs: workers, loggers, pinned memory."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def record(log: list[Any], model: nn.Module, optimizer: Any) -> None:
    names = {p: name for name, p in model.named_parameters()}
    state = {names[p]: sorted(each) for p, each in optimizer.state.items() if each}
    log.append(({name: bits(p) for name, p in model.named_parameters()}, state))


def check(whole: list[Any], first: list[Any], rest: list[Any]) -> None:
    """The run that was stopped and resumed is the run that was not, and each group moves from its unfreeze on."""
    assert len(whole) == STEPS + 1
    assert [*first, *rest[1:]] == whole
    for step in range(STEPS):
        changed = {name for name in whole[0][0] if whole[step][0][name] != whole[step + 1][0][name]}
        unfrozen = GROUPS[max(0, 3 - step // 2) :]
        assert {name for name in whole[0][0] if any(f"{group}." in name for group in unfrozen)} == changed, step
        assert set(whole[step + 1][1]) == changed


def train_with_the_trainer(folder: Path, optimizer_name: str, resume: int = 0) -> list[Any]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model, log = Tagger(), []

    class Record(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            record(log, model, kwargs["optimizer"].optimizer)

        def on_step_end(self, args, state, control, **kwargs):
            record(log, model, kwargs["optimizer"].optimizer)

    args = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4, save_steps=1, report_to=[], seed=3,
        learning_rate=0.02, weight_decay=0.1, lr_scheduler_type="cosine", use_cpu=True,
        optim=optimizer_name, optim_args="momentum=0.9" if optimizer_name == "sgd" else None, disable_tqdm=True,
        logging_strategy="no", dataloader_num_workers=0,
    )  # fmt: skip
    unfreeze = peftlib.hf.TrainerCallback(schedules.every(2))
    trainer = Trainer(model=model, args=args, train_dataset=Rows(), callbacks=[unfreeze, Record()])
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{resume}") if resume else None)
    return log


@feature("Trainer: gradual unfreezing of any model, resumed from every step to the bit")
@pytest.mark.parametrize(
    "optimizer",
    ["adamw_torch", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamw_torch_fused", "sgd"))],
)
def test_in_the_trainer_a_resumed_run_is_the_same_to_the_bit_from_every_step(optimizer, tmp_path):
    whole = train_with_the_trainer(tmp_path, optimizer)
    for stop in range(1, STEPS):
        check(whole, whole[: stop + 1], train_with_the_trainer(tmp_path, optimizer, stop))


def train_with_lightning(folder: Path, make_optimizer: Any, resume: int = 0) -> list[Any]:
    import pytorch_lightning as lightning

    log: list[Any] = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.tagger = Tagger()

        def training_step(self, batch, at):
            """Every batch is all rows: Lightning begins a plain loader anew when it resumes within an epoch."""
            part = slice(self.global_step % 4, None, 4)
            return self.tagger(**{key: rows[part] for key, rows in batch.items()})["loss"]

        def configure_optimizers(self) -> Any:
            groups = peftlib.layer_groups(self)
            optimizer = make_optimizer(peftlib.discriminative_lr(groups, 0.05))
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    class Record(lightning.Callback):
        def on_train_start(self, trainer, pl_module):
            record(log, pl_module.tagger, trainer.optimizers[0])

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            record(log, pl_module.tagger, trainer.optimizers[0])

    every_step = lightning.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    unfreeze = peftlib.lightning.Callback(schedules.every(2))
    trainer = lightning.Trainer(
        max_steps=STEPS, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[unfreeze, Record(), every_step], default_root_dir=folder,
    )  # fmt: skip
    loader = DataLoader(Rows(), batch_size=16)
    trainer.fit(Module(), loader, ckpt_path=folder / f"step={resume}.ckpt" if resume else None)
    return log


@feature("Lightning: gradual unfreezing of any model, resumed from every step to the bit")
@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda groups: torch.optim.AdamW(groups, weight_decay=0.1),
        lambda groups: torch.optim.SGD(groups, momentum=0.9, weight_decay=0.1),
    ],
    ids=["AdamW", "SGD"],
)
def test_in_lightning_a_resumed_run_is_the_same_to_the_bit_from_every_step(make_optimizer, tmp_path):
    whole = train_with_lightning(tmp_path, make_optimizer)
    for stop in range(1, STEPS):
        check(whole, whole[: stop + 1], train_with_lightning(tmp_path, make_optimizer, stop))

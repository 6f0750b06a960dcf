"""The callbacks for transformers' Trainer and for Lightning: adapter-only checkpoints, from which a run resumes."""

import logging
import os
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as lightning
import torch
import transformers
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import peftlib
from peftlib import LoRA, schedules
from peftlib.hf import TrainerCallback
from support.ecosystem import base_state
from support.helpers import bits
from support.zoo import BY_NAME

STEPS = 4
TOKENS = torch.randint(0, 16, (8, 6), generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The libraries warn of their own affairs: workers, loggers, pinned memory."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def adapted() -> Any:
    model = BY_NAME["llama"].make(torch.float32)
    torch.manual_seed(3)
    peftlib.inject(model, ["q_proj", "v_proj"], LoRA, rank=2)
    return model


def state_of(model: torch.nn.Module) -> dict[str, Any]:
    return {name: bits(p) for name, p in model.named_parameters()}


def trainer_of(folder: Path, model: Any, callback: Any, **given: Any) -> transformers.Trainer:
    args = transformers.TrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, disable_tqdm=True, seed=3, learning_rate=0.05,
        per_device_train_batch_size=4, logging_strategy="no", **({"max_steps": STEPS, "save_steps": 1} | given),
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    return transformers.Trainer(model, args, train_dataset=rows, eval_dataset=rows, callbacks=[callback])


def test_the_trainer_resumes_from_checkpoints_of_the_adapters_alone(tmp_path, caplog):
    whole = adapted()
    trainer_of(tmp_path, whole, TrainerCallback()).train()
    for step in (1, STEPS - 1):
        model = adapted()
        trainer_of(tmp_path, model, TrainerCallback()).train(str(tmp_path / f"checkpoint-{step}"))
        assert state_of(model) == state_of(whole)
    assert "missing keys" not in caplog.text


def test_a_checkpoint_of_the_trainer_has_the_adapters_alone_and_their_own_file(tmp_path):
    model = adapted()
    trainer_of(tmp_path, model, TrainerCallback(), save_steps=STEPS).train()
    checkpoint = tmp_path / f"checkpoint-{STEPS}"
    kept = load_file(checkpoint / "model.safetensors")
    assert kept.keys() == {key for key in model.state_dict() if ".adapters." in key}
    fresh = BY_NAME["llama"].make(torch.float32)
    peftlib.load(fresh, checkpoint / "adapters" / "default.safetensors")
    assert state_of(fresh) == state_of(model)


def test_shards_become_one_file_of_the_adapters(tmp_path, monkeypatch):
    whole = type(adapted()).save_pretrained
    monkeypatch.setattr(
        type(adapted()), "save_pretrained", lambda *args, **kwargs: whole(*args, **kwargs, max_shard_size="4KB")
    )
    model = adapted()
    trainer_of(tmp_path, model, TrainerCallback(), save_steps=STEPS).train()
    written = {name for name in os.listdir(tmp_path / f"checkpoint-{STEPS}") if name.startswith("model")}
    assert written == {"model.safetensors"}


def test_a_base_that_trains_stays_in_the_checkpoint(tmp_path):
    model = BY_NAME["llama"].make(torch.float32)
    peftlib.inject(model, "q_proj", LoRA, rank=2, freeze=False)
    trainer_of(tmp_path, model, TrainerCallback(), save_steps=STEPS).train()
    kept = load_file(tmp_path / f"checkpoint-{STEPS}" / "model.safetensors")
    assert any(key.endswith("mlp.up_proj.weight") for key in kept)


def test_the_trainer_leaves_a_model_that_saves_whole_and_pickles(tmp_path):
    model = adapted()
    trainer = trainer_of(tmp_path, model, TrainerCallback(), save_steps=STEPS)
    pickle.loads(pickle.dumps(model))
    trainer.train()
    assert not model._load_state_dict_post_hooks
    model.save_pretrained(tmp_path / "whole")
    assert load_file(tmp_path / "whole" / "model.safetensors").keys() >= base_state(model).keys()


def test_a_file_of_a_base_with_one_weight_missing_is_still_told(tmp_path):
    model = adapted()
    trainer_of(tmp_path, model, TrainerCallback())
    state = model.state_dict()
    state.pop(next(key for key in state if ".adapters." not in key))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)


def test_the_trainer_unfreezes_adapters_by_a_metric(tmp_path):
    callback = TrainerCallback(schedules.plateau(1, highest=True))
    given = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no"}
    trainer_of(tmp_path, adapted(), callback, **given).train()
    assert callback.unfreezing.frozen == []
    wrong = TrainerCallback(schedules.plateau(1), metric="absent")
    with pytest.raises(peftlib.AdapterError, match="absent"):
        trainer_of(tmp_path, adapted(), wrong, **given).train()


def test_a_checkpoint_without_the_schedules_state_is_refused(tmp_path):
    trainer_of(tmp_path, adapted(), TrainerCallback()).train()
    with pytest.raises(peftlib.AdapterError, match="unfreezing"):
        trainer_of(tmp_path, adapted(), TrainerCallback(schedules.every(1))).train(str(tmp_path / "checkpoint-1"))


class Module(lightning.LightningModule):
    def __init__(self, inject: bool = True, freeze: bool = True) -> None:
        super().__init__()
        self.model = BY_NAME["llama"].make(torch.float32)
        torch.manual_seed(3)
        if inject:
            peftlib.inject(self.model, ["q_proj", "v_proj"], LoRA, rank=2, freeze=freeze)

    def training_step(self, batch: Any, at: int) -> Any:
        return self.model(batch, labels=batch).loss

    def validation_step(self, batch: Any, at: int) -> None:
        self.log("val_loss", self.model(batch, labels=batch).loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


def fit(folder: Path, module: Module, callback: Any, resume: int = 0, validate: bool = False) -> None:
    """Every batch is all rows: Lightning begins a plain loader anew when it resumes within an epoch."""
    every_step = lightning.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = lightning.Trainer(
        max_steps=STEPS, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback, every_step], default_root_dir=folder, num_sanity_val_steps=0,
    )  # fmt: skip
    loader = DataLoader(TOKENS, batch_size=8)
    path = folder / f"step={resume}.ckpt" if resume else None
    trainer.fit(module, loader, loader if validate else None, ckpt_path=path)


def test_lightning_resumes_from_checkpoints_of_the_adapters_alone(tmp_path):
    whole = Module()
    fit(tmp_path, whole, peftlib.lightning.Callback())
    kept = torch.load(tmp_path / "step=1.ckpt", weights_only=False)["state_dict"]
    assert kept.keys() == {key for key in whole.state_dict() if ".adapters." in key}
    for step in (1, STEPS - 1):
        module = Module()
        fit(tmp_path, module, peftlib.lightning.Callback(), step)
        assert state_of(module) == state_of(whole)


def test_lightning_refuses_a_checkpoint_without_the_adapters(tmp_path):
    fit(tmp_path, Module(inject=False), lightning.Callback())
    with pytest.raises(peftlib.AdapterError, match=r"q_proj\.adapters"):
        fit(tmp_path, Module(), peftlib.lightning.Callback(), 1)


def test_in_lightning_a_base_that_trains_stays_in_the_checkpoint(tmp_path):
    fit(tmp_path, Module(freeze=False), peftlib.lightning.Callback())
    kept = torch.load(tmp_path / "step=1.ckpt", weights_only=False)["state_dict"]
    assert any(key.endswith("mlp.up_proj.weight") for key in kept)


def test_lightning_unfreezes_adapters_by_a_metric(tmp_path):
    callback = peftlib.lightning.Callback(schedules.plateau(1, highest=True))
    fit(tmp_path, Module(), callback, validate=True)
    assert callback.unfreezing.frozen == []
    with pytest.raises(peftlib.AdapterError, match="absent"):
        fit(tmp_path, Module(), peftlib.lightning.Callback(schedules.plateau(1), metric="absent"), validate=True)

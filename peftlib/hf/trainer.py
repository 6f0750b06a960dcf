"""A callback for transformers' Trainer: checkpoints of the adapters alone, and gradual unfreezing."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback as _Callback

from .._core.walk import adapters
from .._errors import AdapterError
from ..files.container import listed, opened, read_tensor, replacing, write_tensors
from ..files.save_load import save
from ..training.checkpoints import forgive_frozen_keys, frozen_keys
from ..training.layer_groups import layer_groups
from ..training.schedules import Schedule
from ..training.unfreezing import GradualUnfreezing

_WEIGHTS, _FILES, _STATE = "model.safetensors", "adapters", "unfreezing.pt"


class TrainerCallback(_Callback):
    """For `transformers.Trainer`: each checkpoint holds the adapters in place of the whole model, and resumes; with a
    schedule, layer groups unfreeze, which resumes too.

    A checkpoint's `model.safetensors` keeps the adapters' tensors alone, under the names that the Trainer resumes from,
    and `adapters/default.safetensors` is the adapter's own file, for `peftlib.load`. The Trainer writes the whole
    model first, so that a disk needs room for one. Where parameters of the base train too, nothing is left out.

    Args:
        schedule: from `peftlib.schedules`, over `layer_groups(model)`; default none.
        metric: what a `plateau` schedule goes by, as `on_evaluate` names it.
        adapters_only: False leaves the checkpoints as the Trainer writes them.

    Attributes:
        unfreezing: the `GradualUnfreezing`, from the beginning of training on; None without a schedule.

    Raises:
        AdapterError: when training begins, what `GradualUnfreezing` refuses, and a checkpoint without its state; in an
            evaluation, a metric that is not there.

    Example:
        >>> import transformers
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        ...     vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
        >>> _ = peftlib.inject(model, "q_proj", peftlib.LoRA, rank=2)
        >>> row = {"input_ids": torch.arange(5), "labels": torch.arange(5)}
        >>> args = transformers.TrainingArguments("run", max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
        >>> trainer = transformers.Trainer(model, args, train_dataset=[row], callbacks=[peftlib.hf.TrainerCallback()])
    """

    def __init__(
        self, schedule: Schedule | None = None, *, metric: str = "eval_loss", adapters_only: bool = True
    ) -> None:
        self.schedule, self.metric, self.adapters_only = schedule, metric, adapters_only
        self.unfreezing: GradualUnfreezing | None = None
        self._hook: Any = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._forgive(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self._forgive(model)
        if self.schedule is None:
            return
        self.unfreezing = GradualUnfreezing(layer_groups(model), self.schedule, kwargs["optimizer"])
        if state.global_step:  # resumed
            self.unfreezing.load_state_dict(torch.load(_state_in(_folder(args, state))))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.unfreezing is not None and not self.unfreezing.schedule.goes_by_metric:
            self.unfreezing.step()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.unfreezing is None or not self.unfreezing.schedule.goes_by_metric:
            return
        metrics = kwargs["metrics"]
        if self.metric not in metrics:
            raise AdapterError(
                f"TrainerCallback: the evaluation has no {self.metric!r}, which the schedule goes by. It has "
                f"{', '.join(metrics)}. Pass metric= with one of them."
            )
        self.unfreezing.step(metrics[self.metric])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not args.should_save:
            return
        folder = _folder(args, state)
        if self.unfreezing is not None:
            torch.save(self.unfreezing.state_dict(), folder / _STATE)
        if self.adapters_only:
            _leave_out(kwargs["model"], folder)
            (folder / _FILES).mkdir(exist_ok=True)
            for name in dict.fromkeys(name for _, name, _ in adapters(kwargs["model"])):
                save(kwargs["model"], folder / _FILES / f"{name}.safetensors", name)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _forgive(self, model: nn.Module) -> None:
        """While there is a Trainer, a checkpoint of the adapters alone is no reason to warn of what it lacks."""
        if self._hook is None:
            self._hook = model.register_load_state_dict_post_hook(forgive_frozen_keys)


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _state_in(folder: Path) -> Path:
    if not (folder / _STATE).exists():
        raise AdapterError(
            f"TrainerCallback: {folder} has no {_STATE}, so the schedule cannot go on where it stopped. Resume from a "
            "checkpoint in output_dir that was saved with this callback and a schedule."
        )
    return folder / _STATE


def _leave_out(model: nn.Module, folder: Path) -> None:
    """The checkpoint's weights without the frozen base; shards become one file."""
    frozen = frozen_keys(model)
    written = sorted(folder.glob("model*.safetensors"))
    if not frozen or not written:
        return
    kept: dict[str, torch.Tensor] = {}
    for path in written:
        with opened(path) as file:
            kept |= {key: read_tensor(file, key) for key in listed(file) if key not in frozen}
    with replacing(folder / _WEIGHTS) as temporary:
        write_tensors(temporary, kept, {"format": "pt"})
    for path in {*written, folder / f"{_WEIGHTS}.index.json"} - {folder / _WEIGHTS}:
        if path.exists():
            os.unlink(path)

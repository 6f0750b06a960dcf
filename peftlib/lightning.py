"""A callback for Lightning: checkpoints of the adapters alone, and gradual unfreezing."""

import contextlib
import importlib
import sys
from typing import Any

from torch import nn

from ._errors import AdapterError
from .training.checkpoints import frozen_keys
from .training.layer_groups import layer_groups
from .training.schedules import Schedule
from .training.unfreezing import GradualUnfreezing


def _library() -> Any:
    """Lightning under the name by which the program has imported it, else the one that is installed."""
    for name in sorted(("pytorch_lightning", "lightning.pytorch"), key=lambda name: name not in sys.modules):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    raise AdapterError("peftlib.lightning: Lightning is not installed. Install it: pip install pytorch-lightning.")


class Callback(_library().Callback):
    """For `lightning.Trainer`: checkpoints hold the adapters, not the frozen base, and resume; with a schedule, layer
    groups unfreeze, which resumes too.

    The module is built as it was, base and `inject` included, and the checkpoint fills in the adapters; one that lacks
    any of their tensors is refused. Where parameters of the base train too, nothing is left out.

    Args:
        schedule: from `peftlib.schedules`, over `layer_groups(module)`; default none.
        metric: what a `plateau` schedule goes by, as the module logs it in validation.
        adapters_only: False leaves the checkpoints whole.

    Attributes:
        unfreezing: the `GradualUnfreezing`, from the beginning of training on; None without a schedule.

    Raises:
        AdapterError: a checkpoint that lacks adapters of the module; what `GradualUnfreezing` refuses; a metric that
            was not logged.

    Example:
        >>> import pytorch_lightning as lightning
        >>> callback = peftlib.lightning.Callback(peftlib.schedules.every(100))
        >>> trainer = lightning.Trainer(callbacks=[callback], logger=False, accelerator="cpu")
    """

    def __init__(
        self, schedule: Schedule | None = None, *, metric: str = "val_loss", adapters_only: bool = True
    ) -> None:
        super().__init__()
        self.schedule, self.metric, self.adapters_only = schedule, metric, adapters_only
        self.unfreezing: GradualUnfreezing | None = None
        self._saved: dict[str, Any] | None = None
        self._steps = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self.adapters_only and frozen_keys(pl_module):
            pl_module.strict_loading = False  # of the base; that no adapter is missing is checked below

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self.adapters_only:
            frozen, state = frozen_keys(pl_module), checkpoint["state_dict"]
            checkpoint["state_dict"] = {key: tensor for key, tensor in state.items() if key not in frozen}

    def on_load_checkpoint(self, trainer: Any, pl_module: nn.Module, checkpoint: dict[str, Any]) -> None:
        ours = pl_module.state_dict().keys() - frozen_keys(pl_module)
        absent = sorted(ours - checkpoint["state_dict"].keys()) if self.adapters_only else []
        if absent:
            raise AdapterError(
                f"peftlib.lightning: the checkpoint lacks {absent[0]} and {len(absent) - 1} more. Build the module "
                "with the same inject as when it was saved."
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.schedule is None:
            return
        self.unfreezing = GradualUnfreezing(layer_groups(pl_module), self.schedule, trainer.optimizers[0])
        self._steps = trainer.global_step
        if self._saved is not None:  # resumed
            self.unfreezing.load_state_dict(self._saved)

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        if self.unfreezing is None or self.unfreezing.schedule.goes_by_metric or trainer.global_step == self._steps:
            return  # while gradients accumulate, no step is made
        self._steps = trainer.global_step
        self.unfreezing.step()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self.unfreezing is None or not self.unfreezing.schedule.goes_by_metric or trainer.sanity_checking:
            return
        if self.metric not in trainer.callback_metrics:
            raise AdapterError(
                f"peftlib.lightning: validation logged no {self.metric!r}, which the schedule goes by. It logged "
                f"{', '.join(trainer.callback_metrics) or 'nothing'}. Pass metric= with one of them."
            )
        self.unfreezing.step(float(trainer.callback_metrics[self.metric]))

    def state_dict(self) -> dict[str, Any]:
        return {} if self.unfreezing is None else self.unfreezing.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict

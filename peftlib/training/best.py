"""The best metric so far, how long ago it was, and the tensors that gave it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, no_grad

from .schedules import Schedule


class Best:
    """What a `plateau` schedule goes by."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.metric: float | None = None
        self.since = 0
        self.kept: dict[str, Tensor] = {}

    def improves(self, metric: float) -> bool:
        """A metric that is not a number never does."""
        sign = -1.0 if self.schedule.highest else 1.0
        if metric == metric and (self.metric is None or sign * metric < sign * self.metric - self.schedule.threshold):
            self.metric, self.since = metric, 0
            return True
        self.since += 1
        return False

    def is_over(self) -> bool:
        return self.since >= self.schedule.patience

    def keep(self, tensors: Mapping[str, Tensor]) -> None:
        if self.schedule.restore:
            self.kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def bring_back(self, tensors: Mapping[str, Tensor]) -> None:
        with no_grad():
            for name, best in self.kept.items():
                tensors[name].copy_(best)

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "since": self.since, "kept": dict(self.kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.metric, self.since = state["metric"], state["since"]
        self.kept = {name: tensor.clone() for name, tensor in state["kept"].items()}

"""A learning rate that rises after a thaw: it acts during the optimizer's step alone, beside any scheduler."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer

from .._errors import AdapterError
from .layer_groups import LayerGroup


def around_steps(optimizer: Optimizer, before: Callable[[], None], after: Callable[[], None]) -> list[Any]:
    """Hooks on two methods, weak ones, so that an optimizer keeps no schedule alive."""
    weak_before, weak_after = weakref.WeakMethod(before), weakref.WeakMethod(after)
    return [
        optimizer.register_step_pre_hook(lambda *_: (act := weak_before()) and act()),
        optimizer.register_step_post_hook(lambda *_: (act := weak_after()) and act()),
    ]


class Warmup:
    """How many steps each group has taken since it thawed, and the rate that this gives it."""

    def __init__(self, groups: Sequence[LayerGroup], optimizer: Optimizer | None, steps: int) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise AdapterError(f"warmup={steps!r} is not a whole number of at least 0. Pass warmup=100, say.")
        if steps and optimizer is None:
            raise AdapterError(f"warmup={steps}: there is no optimizer to warm up. Pass optimizer=.")
        self.optimizer, self.steps = optimizer, steps
        self.taken: list[int] = [steps] * len(groups)
        self.group_of = _group_of(groups, optimizer) if optimizer is not None and steps else []
        self._rates: list[tuple[dict[str, Any], Any]] = []

    def begin(self, thawed: set[int]) -> None:
        for at in thawed:
            self.taken[at] = 0

    def scale(self) -> None:
        self._put_back()  # a step that failed half-way left its rates
        if self.optimizer is None:
            return
        for at, group in zip(self.group_of, self.optimizer.param_groups, strict=False):
            if at is not None and self.taken[at] < self.steps:
                self._rates.append((group, group["lr"]))
                group["lr"] = group["lr"] * ((self.taken[at] + 1) / (self.steps + 1))

    def unscale(self) -> None:
        self._put_back()
        self.taken = [min(self.steps, taken + 1) for taken in self.taken]

    def _put_back(self) -> None:
        for group, rate in self._rates:
            group["lr"] = rate
        self._rates = []


def _group_of(groups: Sequence[LayerGroup], optimizer: Optimizer) -> list[int | None]:
    """The layer group of each of the optimizer's, which has one rate."""
    owner = {id(p): at for at, group in enumerate(groups) for p in group.parameters.values()}
    found: list[int | None] = []
    for at, group in enumerate(optimizer.param_groups):
        owners = {owner.get(id(p)) for p in group["params"]}
        if len(owners) > 1:
            names = ", ".join("none" if one is None else groups[one].name for one in owners)
            raise AdapterError(
                f"warmup: the optimizer's group {at} has one learning rate for the layer groups {names}. Make a group "
                "for each: discriminative_lr(groups, lr, decay=1)."
            )
        found.append(owners.pop() if owners else None)
    return found

"""Gradual unfreezing: layer groups unfreeze one after another, from the top of a model down."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, no_grad
from torch.optim import Optimizer

from .._checks import require_whole_number
from .._core.averaged import require_averaged
from .._core.sharded import split_as, whole
from .._errors import AdapterError
from .frozen import Switch
from .layer_groups import SCHEDULED, LayerGroup, require_all, require_apart, require_groups, settle_groups
from .schedules import Schedule
from .unfreezing_plan import Plan


class GradualUnfreezing:
    r"""Trains the top layer group first, then one more at each move of a schedule (Howard and Ruder 2018).

    .. math:: \text{unfrozen after } s \text{ of } n - 1 \text{ moves} = \{ n - 1 - s, \ldots, n - 1 \}

    With `schedules.chain_thaw` the groups take turns (Felbo et al. 2017). All parameters are in the optimizer from the
    start. A frozen one has `requires_grad=False` and no gradient, so that the optimizer passes over it: no update, no
    weight decay, no momentum, no state. Call `step` after each step of the optimizer, or after each epoch: that is
    what the schedule counts. Save `state_dict()` with the model's and the optimizer's, and the run resumes to the bit.

    A second schedule over the same parameters takes the place of the first.

    Args:
        groups: from `layer_groups`, from input to output.
        schedule: from `peftlib.schedules`.
        optimizer: that trains the groups; it is then checked that it has all of their parameters. Without it, neither
            that nor a warm-up.
        warmup: for how many steps of the optimizer an unfrozen group's learning rate rises, linearly, to what it is by
            then. It acts during the step alone, so that a learning rate scheduler never sees it.
        hold_statistics: the running statistics of frozen groups (BatchNorm) stay frozen, and are what normalizes.

    Attributes:
        plan: `print(unfreezing.plan)`, or `unfreezing.plan.save("plan.svg")`.
        finished: no move is left; by a metric, it has stopped improving after the last one too.

    Raises:
        AdapterError: no group, a parameter that is in two groups, that never trains, or that the optimizer lacks, a
            schedule with more counts than moves.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        >>> groups = peftlib.layer_groups(model)
        >>> optimizer = torch.optim.AdamW(peftlib.discriminative_lr(groups, lr=1e-3))
        >>> unfreezing = peftlib.GradualUnfreezing(groups, peftlib.schedules.every(2), optimizer)
        >>> print(unfreezing.plan)
        every 2
        from  trains  parameters
        ----  ------  ----------
           0  2               20
           2  and 1           40
           4  and 0           60
        >>> for _ in range(3):
        ...     model(torch.ones(1, 4)).sum().backward()
        ...     optimizer.step()
        ...     unfreezing.step()
        >>> unfreezing.frozen, unfreezing.unfrozen
        (['0'], ['1', '2'])
    """

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        schedule: Schedule,
        optimizer: Optimizer | None = None,
        *,
        warmup: int = 0,
        hold_statistics: bool = True,
    ) -> None:
        while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
            optimizer = inner  # accelerate and Lightning hand out wrappers
        require_groups("GradualUnfreezing", groups)
        settle_groups(groups)
        require_apart(groups)
        _require_schedule(schedule)
        if optimizer is not None:
            require_all(groups, optimizer)
        self.groups, self.schedule = list(groups), schedule
        self._stages = schedule.stages(len(self.groups))
        self._counts = schedule.counts(len(self._stages) - 1)
        self.plan = Plan(schedule.text, self.groups, self._stages, self._counts)
        self._warmup, self._best = Warmup(self.groups, optimizer, warmup), Best(schedule)
        self._switches = [Switch(group, hold_statistics) for group in self.groups]
        self._count = self._stage = 0
        self._over = self._checked = self._removed = False
        _take_over(self)
        steps = self._before_optimizer_step, self._after_optimizer_step
        self._handles = [] if optimizer is None else around_steps(optimizer, *steps)
        self._freeze_and_unfreeze()

    @property
    def finished(self) -> bool:
        return self._over or (self._counts is not None and self._stage == len(self._counts))

    @property
    def frozen(self) -> list[str]:
        return [group.name for at, group in enumerate(self.groups) if at not in self._stages[self._stage]]

    @property
    def unfrozen(self) -> list[str]:
        return [group.name for at, group in enumerate(self.groups) if at in self._stages[self._stage]]

    def step(self, metric: float | None = None) -> None:
        """Counts one step or epoch, and freezes and unfreezes what is due.

        Args:
            metric: what a `plateau` schedule goes by.

        Raises:
            AdapterError: a metric for a schedule that goes by the count, none for a `plateau`, a schedule that was
                removed, a DistributedDataParallel that was made after the freezing.
        """
        if self._removed:
            raise AdapterError("step: this schedule was removed, or another took its place. Call step of that one.")
        settle_groups(self.groups)
        if not self._checked:
            scheduled = [p for group in self.groups for p in group.parameters.values()]
            advice = "Make it first, with find_unused_parameters=True, then GradualUnfreezing"
            require_averaged("GradualUnfreezing", scheduled, advice)
            self._checked = True
        if self._counts is None:
            if metric is None:
                raise AdapterError(
                    f'step: "{self.schedule.text}" goes by a metric, and none was given. Call step(metric) after each '
                    "evaluation, and not in between."
                )
            self._count += 1
            self._judge(float(metric))
            return
        if metric is not None:
            raise AdapterError(f'step: "{self.schedule.text}" goes by the count alone. Call step() without a metric.')
        self._count += 1
        while self._stage < len(self._counts) and self._count >= self._counts[self._stage]:
            self._move()

    def _judge(self, metric: float) -> None:
        if self._best.improves(metric):
            self._best.keep(self._tensors())
        elif self._best.is_over():
            self._best.since = 0
            self._best.bring_back(self._tensors())
            if self._stage + 1 == len(self._stages):
                self._over = True
                return
            self._move()
            self._best.keep(self._tensors())

    def _move(self) -> None:
        before = self._stages[self._stage]
        self._stage += 1
        self._freeze_and_unfreeze()
        self._warmup.begin(self._stages[self._stage] - before)

    def _freeze_and_unfreeze(self) -> None:
        for at, switch in enumerate(self._switches):
            switch.unfreeze() if at in self._stages[self._stage] else switch.freeze()

    def _tensors(self) -> dict[str, Tensor]:
        unfrozen = [self.groups[at] for at in self._stages[self._stage]]
        return {name: tensor for group in unfrozen for name, tensor in group.tensors().items()}

    def _before_optimizer_step(self) -> None:
        for at, switch in enumerate(self._switches):
            if at not in self._stages[self._stage]:
                switch.drop_gradients()
        self._warmup.scale()

    def _after_optimizer_step(self) -> None:
        self._warmup.unscale()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain values, and with `restore` the best weights, whole ones of a sharded model:
        then every process asks.

        Returns:
            dict[str, Any]: for `load_state_dict`.
        """
        return {
            "groups": [group.name for group in self.groups],
            "schedule": self.schedule.text,
            "count": self._count,
            "stage": self._stage,
            "over": self._over,
            "warmup": list(self._warmup.taken),
            "best": self._best.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken: freezes, unfreezes and counts as then.

        Args:
            state: from the same schedule over the same groups.

        Raises:
            AdapterError: a state of another schedule or of other groups.
        """
        for key, own in (("groups", [group.name for group in self.groups]), ("schedule", self.schedule.text)):
            found = state.get(key)
            if found != own:
                raise AdapterError(f"load_state_dict: {key}: {found!r} in the state, {own!r} here. Make them equal.")
        self._count, self._stage, self._over = state["count"], state["stage"], state["over"]
        self._warmup.taken = list(state["warmup"])
        settle_groups(self.groups)
        self._best.load_state_dict(state["best"], self._tensors())
        self._freeze_and_unfreeze()

    def remove(self) -> None:
        """Ends the schedule: every group unfreezes, and nothing of it is left on model or optimizer."""
        settle_groups(self.groups)
        for switch in self._switches:
            switch.unfreeze()
        for handle in self._handles:
            handle.remove()
        for group in self.groups:
            for p in group.parameters.values():
                SCHEDULED.pop(p, None)
        self._removed = True


def _require_schedule(schedule: Any) -> None:
    if isinstance(schedule, Schedule):
        return
    found = f"GradualUnfreezing: schedule={schedule!r} is none"
    if isinstance(schedule, int):
        raise AdapterError(f"{found}. Pass peftlib.schedules.every({schedule}) for one more group after so many steps.")
    if isinstance(schedule, (list, tuple)):
        raise AdapterError(f"{found}. Pass peftlib.schedules.milestones({list(schedule)}).")
    raise AdapterError(f"{found}. Pass one of peftlib.schedules, such as peftlib.schedules.every(100).")


def _take_over(new: GradualUnfreezing) -> None:
    parameters = [p for group in new.groups for p in group.parameters.values()]
    for old in {id(old): old for p in parameters if p in SCHEDULED and (old := SCHEDULED[p]())}.values():
        old.remove()
    for p in parameters:
        SCHEDULED[p] = weakref.ref(new)


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
        kept = {name: whole(tensor) for name, tensor in self.kept.items()}
        return {"metric": self.metric, "since": self.since, "kept": kept}

    def load_state_dict(self, state: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.metric, self.since = state["metric"], state["since"]
        self.kept = {name: split_as(tensor.clone(), tensors[name]) for name, tensor in state["kept"].items()}


def around_steps(optimizer: Optimizer, before: Callable[[], None], after: Callable[[], None]) -> list[Any]:
    """Hooks on two methods, weak ones, so that an optimizer keeps no schedule alive."""
    weak_before, weak_after = weakref.WeakMethod(before), weakref.WeakMethod(after)
    return [
        optimizer.register_step_pre_hook(lambda *_: (act := weak_before()) and act()),
        optimizer.register_step_post_hook(lambda *_: (act := weak_after()) and act()),
    ]


class Warmup:
    """How many steps each group has taken since it was unfrozen, and the rate that this gives it."""

    def __init__(self, groups: Sequence[LayerGroup], optimizer: Optimizer | None, steps: int) -> None:
        require_whole_number("warmup", steps, least=0, say=100)
        if steps and optimizer is None:
            raise AdapterError(f"warmup={steps}: there is no optimizer to warm up. Pass optimizer=.")
        self.optimizer, self.steps = optimizer, steps
        self.taken: list[int] = [steps] * len(groups)
        self.group_of = _group_of(groups, optimizer) if optimizer is not None and steps else []
        self._rates: list[tuple[dict[str, Any], Any]] = []

    def begin(self, unfrozen: set[int]) -> None:
        for at in unfrozen:
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

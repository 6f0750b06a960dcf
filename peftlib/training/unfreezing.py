"""Gradual unfreezing: layer groups thaw one after another, from the top of a model down."""

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .._errors import AdapterError
from .best import Best
from .frozen import Switch, require_reduced
from .layer_groups import SCHEDULED, LayerGroup, require_all, require_apart
from .schedules import Schedule
from .unfreezing_plan import Plan
from .warmup import Warmup, around_steps


class GradualUnfreezing:
    r"""Trains the top layer group first, then one more at each move of a schedule (Howard and Ruder 2018).

    .. math:: \text{thawed after } s \text{ of } n - 1 \text{ moves} = \{ n - 1 - s, \ldots, n - 1 \}

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
        warmup: for how many steps of the optimizer a thawed group's learning rate rises, linearly, to what it is by
            then. It acts during the step alone, so that a learning rate scheduler never sees it.
        hold_statistics: the running statistics of frozen groups (BatchNorm) stand still, and are what normalises.

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
        >>> unfreezing.frozen, unfreezing.thawed
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
        require_apart(groups)
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
        self._freeze_and_thaw()

    @property
    def finished(self) -> bool:
        return self._over or (self._counts is not None and self._stage == len(self._counts))

    @property
    def frozen(self) -> list[str]:
        return [group.name for at, group in enumerate(self.groups) if at not in self._stages[self._stage]]

    @property
    def thawed(self) -> list[str]:
        return [group.name for at, group in enumerate(self.groups) if at in self._stages[self._stage]]

    def step(self, metric: float | None = None) -> None:
        """Counts one step or epoch, and freezes and thaws what is due.

        Args:
            metric: what a `plateau` schedule goes by.

        Raises:
            AdapterError: a metric for a schedule that goes by the count, a schedule that was removed, a
                DistributedDataParallel that was made after the freezing.
        """
        if self._removed:
            raise AdapterError("step: this schedule was removed, or another took its place. Call step of that one.")
        if not self._checked:
            require_reduced(self.groups)
            self._checked = True
        if self._counts is None:
            self._count += 1
            if metric is not None:
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
        self._freeze_and_thaw()
        self._warmup.begin(self._stages[self._stage] - before)

    def _freeze_and_thaw(self) -> None:
        for at, switch in enumerate(self._switches):
            switch.thaw() if at in self._stages[self._stage] else switch.freeze()

    def _tensors(self) -> dict[str, Tensor]:
        thawed = [self.groups[at] for at in self._stages[self._stage]]
        return {name: tensor for group in thawed for name, tensor in group.tensors().items()}

    def _before_optimizer_step(self) -> None:
        for at, switch in enumerate(self._switches):
            if at not in self._stages[self._stage]:
                switch.drop_gradients()
        self._warmup.scale()

    def _after_optimizer_step(self) -> None:
        self._warmup.unscale()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain values, and with `restore` the best weights.

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
        """Goes on where `state_dict` was taken: freezes, thaws and counts as then.

        Args:
            state: from the same schedule over the same groups.

        Raises:
            AdapterError: a state of another schedule or of other groups.
        """
        for key in ("groups", "schedule"):
            own, found = self.state_dict()[key], state.get(key)
            if found != own:
                raise AdapterError(f"load_state_dict: {key}: {found!r} in the state, {own!r} here. Make them equal.")
        self._count, self._stage, self._over = state["count"], state["stage"], state["over"]
        self._warmup.taken = list(state["warmup"])
        self._best.load_state_dict(state["best"])
        self._freeze_and_thaw()

    def remove(self) -> None:
        """Ends the schedule: every group thaws, and nothing of it is left on model or optimizer."""
        for switch in self._switches:
            switch.thaw()
        for handle in self._handles:
            handle.remove()
        for group in self.groups:
            for p in group.parameters.values():
                SCHEDULED.pop(p, None)
        self._removed = True


def _take_over(new: GradualUnfreezing) -> None:
    parameters = [p for group in new.groups for p in group.parameters.values()]
    for old in {id(old): old for p in parameters if p in SCHEDULED and (old := SCHEDULED[p]())}.values():
        old.remove()
    for p in parameters:
        SCHEDULED[p] = weakref.ref(new)

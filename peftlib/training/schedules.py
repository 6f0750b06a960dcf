"""Schedules: when the next layer group unfreezes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .._checks import require_at_least, require_whole_number
from .._core.table import html_lines
from .._errors import AdapterError


@dataclass(frozen=True)
class Schedule:
    """What `GradualUnfreezing` goes by: given how many moves there are, `times` says at which count each comes.

    Without `times` the schedule goes by a metric. With `chain` the groups take turns.
    """

    text: str
    times: Callable[[int], Sequence[int]] | None = None
    patience: int = 0
    highest: bool = False
    threshold: float = 0.0
    restore: bool = False
    chain: bool = False

    def __repr__(self) -> str:
        return f"Schedule({self.text})"

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return html_lines(f"layer groups unfreeze: {self.text}")

    @property
    def goes_by_metric(self) -> bool:
        return self.times is None

    def stages(self, groups: int) -> list[set[int]]:
        """Which of so many groups train at each stage; the last group is the top."""
        if not self.chain:
            return [set(range(groups - 1 - moves, groups)) for moves in range(groups)]
        turns = [{at} for at in [groups - 1, *range(groups - 1)]]
        return turns if groups == 1 else [*turns, set(range(groups))]

    def counts(self, moves: int) -> list[int] | None:
        """At which count each move comes; None where a metric decides."""
        if self.times is None:
            return None
        counts = list(self.times(moves))
        if len(counts) > moves:
            raise AdapterError(f"{self.text}: {len(counts)} counts for {moves} moves. Give at most {moves}.")
        return counts


def every(n: int) -> Schedule:
    """One more group after every n calls of `step`: n steps, or n epochs, as you call it.

    Args:
        n: at least 1.

    Returns:
        Schedule: for `GradualUnfreezing`.

    Raises:
        AdapterError: n below 1.

    Example:
        >>> from peftlib import schedules
        >>> schedules.every(100).times(3)
        [100, 200, 300]
    """
    require_whole_number("n", n, say=100, where="every")
    return Schedule(f"every {n}", lambda moves: [n * (at + 1) for at in range(moves)])


def milestones(counts: Sequence[int]) -> Schedule:
    """One more group at each of these counts; with fewer counts than moves the lowest groups never unfreeze.

    Args:
        counts: how often `step` was called by then, rising; the same twice unfreezes two at once.

    Returns:
        Schedule: for `GradualUnfreezing`.

    Raises:
        AdapterError: counts that fall, or are below 1.

    Example:
        >>> from peftlib import schedules
        >>> schedules.milestones([50, 300]).times(2)
        [50, 300]
    """
    given = list(counts)
    for count in given:
        require_whole_number("counts", count, say="[50, 300]", where="milestones")
    if given != sorted(given):
        raise AdapterError(f"milestones: {given} does not rise. Sort it.")
    return Schedule(f"at {', '.join(map(str, given))}", lambda moves: given)


def linear(budget: int) -> Schedule:
    """The groups unfreeze evenly over a budget of calls, so that every stage is equally long.

    Args:
        budget: how often `step` is called in the whole training.

    Returns:
        Schedule: for `GradualUnfreezing`.

    Raises:
        AdapterError: a budget below 1, or, with the groups, shorter than their number.

    Example:
        >>> from peftlib import schedules
        >>> schedules.linear(400).times(3)
        [100, 200, 300]
    """
    return _over("linear", budget, lambda share: share)


def cosine(budget: int) -> Schedule:
    """The unfrozen share follows (1 - cos(π t / budget)) / 2: slowly at first, fastest in the middle.

    Args:
        budget: how often `step` is called in the whole training.

    Returns:
        Schedule: for `GradualUnfreezing`.

    Raises:
        AdapterError: a budget below 1, or, with the groups, shorter than their number.

    Example:
        >>> from peftlib import schedules
        >>> schedules.cosine(400).times(3)
        [133, 200, 267]
    """
    return _over("cosine", budget, lambda share: math.acos(1 - 2 * share) / math.pi)


def plateau(patience: int, *, highest: bool = False, threshold: float = 0.0, restore: bool = False) -> Schedule:
    """One more group whenever the metric that `step` is given has not improved for a while.

    Call `step(metric)` after each evaluation, and not in between. On several ranks, give all of them the same metric.

    Args:
        patience: how many metrics in a row without a new best.
        highest: the highest metric is the best one; default the lowest.
        threshold: by how much a new best must be better.
        restore: before each move, bring back the weights and running statistics that gave the best metric. It keeps
            one copy of what was unfrozen; the optimizer's state is not part of it.

    Returns:
        Schedule: for `GradualUnfreezing`.

    Raises:
        AdapterError: a patience below 1, a negative threshold.

    Example:
        >>> from peftlib import schedules
        >>> schedules.plateau(3, highest=True).text
        'when the metric has not risen for 3'
    """
    require_whole_number("patience", patience, say=3, where="plateau")
    require_at_least(0, "threshold", threshold, say=0.0, where="plateau")
    text = f"when the metric has not {'risen' if highest else 'fallen'} for {patience}"
    return Schedule(text, None, patience, highest, threshold, restore)


def chain_thaw(schedule: Schedule) -> Schedule:
    """The groups take turns, at the schedule's times: the top alone, each other alone from the lowest up, then all.

    Source: Felbo et al. 2017.

    Args:
        schedule: when the next turn comes.

    Returns:
        Schedule: for `GradualUnfreezing`.

    Example:
        >>> from peftlib import schedules
        >>> schedules.chain_thaw(schedules.every(100)).text
        'chain-thaw, every 100'
    """
    return replace(schedule, text=f"chain-thaw, {schedule.text}", chain=True)


def _over(name: str, budget: int, inverse: Callable[[float], float]) -> Schedule:
    require_whole_number("budget", budget, say=400, where=name)

    def times(moves: int) -> list[int]:
        if budget <= moves:
            raise AdapterError(
                f"{name}: a budget of {budget} is too short for {moves} moves. Raise it, or join groups."
            )
        return [max(1, round(budget * inverse(at / (moves + 1)))) for at in range(1, moves + 1)]

    return Schedule(f"{name} over {budget}", times)

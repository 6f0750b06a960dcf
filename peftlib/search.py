"""A search with Optuna whose trials run side by side on one base, are pruned at equal steps, and go on after a kill."""

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
import torch
from optuna.trial import TrialState

from ._checks import require_whole_number
from ._errors import AdapterError
from .training.trials import Trials

Asked = dict[str, optuna.Trial]  # by the name in `trials`
Suggest = Callable[[optuna.Trial, str], object]

_OWNER = "peftlib"  # in a trial's user attributes: the state file of the process that trains it


def run(
    study: optuna.Study,
    trials: Trials,
    suggest: Suggest,
    train: Callable[[Trials], object],
    evaluate: Callable[[Trials], Mapping[str, float]],
    *,
    count: int,
    steps: int,
    every: int,
    side_by_side: int = 8,
    path: str | os.PathLike[str] | None = None,
    finish: Callable[[Trials, str], object] | None = None,
) -> None:
    """Asks the study for trials, trains up to `side_by_side` of them at once, and tells it how each went.

    Every `every` steps all are evaluated, reported, and pruned if the study's pruner says so; a place that is free goes
    to the next trial. What stopped (see `Trials.step`) is told as failed. With `path`, the same call in another process
    goes on after a kill. Processes with a state file of their own share the trials of one study.

    Args:
        study: with a storage that lasts, such as `storage="sqlite:///search.db"` with `load_if_exists=True`.
        trials: where they are added.
        suggest: `suggest(trial, name)` asks the trial for values and adds it to `trials` under that name.
        train: takes one step of all that run; `trials[name].steps` says how many a trial took.
        evaluate: gives a value for each trial that runs; call it inside `trials.evaluate()`.
        count: of trials, those of all processes together.
        steps: that a trial takes if it is not pruned, a multiple of `every`.
        every: steps between evaluations.
        side_by_side: the most trials that run at once here.
        path: the state file of this process; default none, and nothing is resumed.
        finish: `finish(trials, name)` for a trial that took all its steps, before it is removed: save it here.

    Raises:
        AdapterError: a number that is no whole number of at least 1, or steps that are no multiple of `every`.

    Example:
        >>> import optuna, torch, peftlib
        >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
        >>> trials = peftlib.Trials(torch.nn.Sequential(torch.nn.Linear(4, 1)))
        >>> x, y = torch.randn(8, 4), torch.zeros(8, 1)
        >>> def suggest(trial, name):
        ...     rate = trial.suggest_float("rate", 1e-3, 1e-1, log=True)
        ...     part = ("0", peftlib.LoRA, {"rank": 1})
        ...     trials.add(name, part, optimizer=lambda ps: torch.optim.SGD(ps, lr=rate), seed=trial.number)
        >>> def losses(trials):
        ...     return {name: (output - y).square().mean() for name, output in trials(x).items()}
        >>> def evaluate(trials):
        ...     with trials.evaluate():
        ...         return {name: loss.item() for name, loss in losses(trials).items()}
        >>> study = optuna.create_study(pruner=peftlib.search.Halving([2]))
        >>> train = lambda trials: trials.step(losses(trials))
        >>> peftlib.search.run(study, trials, suggest, train, evaluate, count=4, steps=4, every=2)
        >>> len(study.trials)
        4
    """
    for name, value in {"count": count, "every": every, "side_by_side": side_by_side, "steps": steps}.items():
        require_whole_number(name, value, say=8, where="search.run")
    if steps % every:
        raise AdapterError(f"search.run: steps={steps} is no multiple of every={every}. Pass steps={every * 10}, say.")
    owner = "" if path is None else os.fspath(path)
    asked = _resumed(study, trials, suggest, owner)
    while _ask(study, asked, suggest, owner, side_by_side, count):
        for _ in range(every):
            if trials.running:
                train(trials)
        values = evaluate(trials) if trials.running else {}
        _report(study, asked, values, {name: trials[name].steps for name in trials})
        for name, state in _ended(asked, trials, values, steps).items():
            if state is TrialState.COMPLETE and finish is not None:
                finish(trials, name)
            study.tell(asked.pop(name), values[name] if state is TrialState.COMPLETE else None, state)
            trials.remove(name)
        if owner:  # behind what was told: after a kill in between, what the study knows already is trained once more
            torch.save(trials.state_dict(), f"{owner}.tmp")
            os.replace(f"{owner}.tmp", owner)


class Halving(optuna.pruners.BasePruner):
    """At given steps, keeps the best of all trials that have come as far, running or not: successive halving.

    Optuna's own median and percentile pruners compare with trials that are complete, of which there are none while all
    run together; its asynchronous halving keeps whichever reports first.

    Args:
        steps: at which trials are compared (Jamieson and Talwalkar 2016 double them).
        factor: one in `factor` is kept.

    Raises:
        AdapterError: a factor that is no whole number of at least 2.

    Example:
        >>> import optuna, peftlib
        >>> study = optuna.create_study(direction="maximize", pruner=peftlib.search.Halving([100, 200, 400]))
    """

    def __init__(self, steps: Sequence[int], factor: int = 2) -> None:
        require_whole_number("factor", factor, least=2, say=2, where="Halving")
        self.steps, self.factor = frozenset(steps), factor

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        """What Optuna asks of a pruner, by `trial.should_prune()`.

        Args:
            study: whose trials are compared.
            trial: that has just reported.

        Returns:
            bool: whether it should stop here.
        """
        step = trial.last_step
        if step not in self.steps:
            return False
        sign = 1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else -1
        reported = (other.intermediate_values.get(step) for other in study.get_trials(deepcopy=False))
        values = [value * sign for value in reported if value is not None and not math.isnan(value)]
        own = trial.intermediate_values[step] * sign
        return math.isnan(own) or sum(value > own for value in values) >= math.ceil(len(values) / self.factor)


def _resumed(study: optuna.Study, trials: Trials, suggest: Suggest, owner: str) -> Asked:
    """This process's trials, as far as its state file knows them; those that it does not know begin anew."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) if owner else []
    mine = [each for each in running if each.user_attrs.get(_OWNER) == owner]
    asked = {_name(each.number): optuna.Trial(study, each._trial_id) for each in mine}
    state: dict[str, Any] = {"trials": {}}
    with contextlib.suppress(FileNotFoundError):
        state = torch.load(owner) if owner else state
    state["trials"] = {name: saved for name, saved in state["trials"].items() if name in asked}
    for name in state["trials"]:
        suggest(asked[name], name)
    if state["trials"]:
        trials.load_state_dict(state)
    for name in [name for name in asked if name not in state["trials"]]:
        suggest(asked[name], name)
    return asked


def _ask(study: optuna.Study, asked: Asked, suggest: Suggest, owner: str, most: int, count: int) -> Asked:
    """Those that run, with new ones in the places that are free. Without an owner's mark a trial is nobody's: its
    process was killed while it asked."""
    while len(asked) < most and sum(_OWNER in each.user_attrs for each in study.get_trials(deepcopy=False)) < count:
        trial = study.ask()
        trial.set_user_attr(_OWNER, owner)
        suggest(trial, _name(trial.number))
        asked[_name(trial.number)] = trial
    return asked


def _report(study: optuna.Study, asked: Asked, values: Mapping[str, float], steps: Mapping[str, int]) -> None:
    known = {_name(each.number): each.intermediate_values for each in study.get_trials(deepcopy=False)}
    for name, value in values.items():
        if steps[name] not in known[name]:  # else a run that was killed has reported it
            asked[name].report(value, steps[name])


def _ended(asked: Asked, trials: Trials, values: Mapping[str, float], steps: int) -> dict[str, TrialState]:
    ended = {}
    for name, trial in asked.items():
        if name not in values or trials[name].stopped is not None:
            ended[name] = TrialState.FAIL
        elif trials[name].steps >= steps:
            ended[name] = TrialState.FAIL if math.isnan(values[name]) else TrialState.COMPLETE
        elif trial.should_prune():
            ended[name] = TrialState.PRUNED
    return ended


def _name(number: int) -> str:
    return f"trial-{number}"

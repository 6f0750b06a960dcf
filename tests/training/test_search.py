"""The search with Optuna: trials are pruned at equal steps, fill free places, and go on after a kill."""

import doctest
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState
from torch import nn

import peftlib
from peftlib import LoRA, Trials
from peftlib.search import Halving, run
from support.refusals import refused


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


class Killed(Exception):
    """What ends a run in the middle of something."""


class Task:
    """A regression whose trials differ by their rate, and a count of the steps that were taken."""

    def __init__(self, kill: tuple[str, int] = ("", 0)) -> None:
        torch.manual_seed(0)
        self.trials = Trials(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)))
        self.kill = kill
        self.calls = {"train": 0, "evaluate": 0, "suggest": 0, "finish": 0}
        self.most = 0
        self.finished: dict[str, Any] = {}

    def called(self, what: str) -> None:
        self.calls[what] += 1
        if (what, self.calls[what]) == self.kill:
            raise Killed

    def suggest(self, trial: optuna.Trial, name: str) -> None:
        rate = trial.suggest_float("rate", 1e-3, 1e-1, log=True)
        self.called("suggest")
        rank = trial.suggest_int("rank", 1, 2)
        part = ("0", LoRA, {"rank": rank})
        self.trials.add(name, part, optimizer=lambda ps: torch.optim.SGD(ps, lr=rate), seed=trial.number)

    def losses(self, seed: int | None = None) -> dict[str, torch.Tensor]:
        batches = {}
        for name in self.trials.running:
            of_step = torch.Generator().manual_seed(self.trials[name].steps if seed is None else seed)
            batches[name] = torch.randn(4, 4, generator=of_step)
        return {name: (y - 1).square().mean() for name, y in self.trials(batches).items()}

    def train(self, trials: Trials) -> None:
        self.called("train")
        self.most = max(self.most, len(trials.running))
        trials.step(self.losses())

    def evaluate(self, trials: Trials) -> dict[str, float]:
        self.called("evaluate")
        with trials.evaluate():
            return {name: loss.item() for name, loss in self.losses(99).items()}

    def finish(self, trials: Trials, name: str) -> None:
        self.called("finish")
        self.finished[name] = [p.detach().clone() for p in trials[name].parameters]

    def run(self, study: optuna.Study, **options: Any) -> None:
        given = {"count": 6, "steps": 8, "every": 2, "side_by_side": 3, "finish": self.finish, **options}
        run(study, self.trials, self.suggest, self.train, self.evaluate, **given)


def study_in(storage: Any, **options: Any) -> optuna.Study:
    sampler = optuna.samplers.RandomSampler(seed=0)
    return optuna.create_study(study_name="s", storage=storage, sampler=sampler, load_if_exists=True, **options)


def memory() -> Any:
    return optuna.storages.InMemoryStorage()


def file_in(folder: Path) -> str:
    return f"sqlite:///{folder}/study.db"


def test_all_are_trained_a_few_at_a_time_and_told():
    task, study = Task(), optuna.create_study(pruner=optuna.pruners.NopPruner())
    task.run(study)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 6
    assert all([*trial.intermediate_values] == [2, 4, 6, 8] for trial in study.trials)
    assert all(trial.value == trial.intermediate_values[8] for trial in study.trials)
    assert task.most == 3
    assert [*task.finished] == [f"trial-{number}" for number in range(6)]
    assert len(task.trials) == 0
    assert not any(True for _ in peftlib.adapters(task.trials.model))


def test_a_pruned_trial_gives_its_place_to_the_next():
    task, study = Task(), optuna.create_study(pruner=Halving([2]), sampler=optuna.samplers.RandomSampler(seed=1))
    task.run(study)
    states = [trial.state for trial in study.trials]
    assert len(states) == 6
    assert 0 < states.count(TrialState.PRUNED) <= 3
    assert all(trial.last_step == 2 for trial in study.trials if trial.state is TrialState.PRUNED)
    assert task.calls["train"] <= 16 - 2 * (states.count(TrialState.PRUNED) // 3)
    best_at_two = min(study.trials, key=lambda trial: trial.intermediate_values[2])
    assert best_at_two.state is TrialState.COMPLETE


def test_a_trial_whose_loss_is_no_number_is_told_as_failed_and_the_others_go_on():
    task, study = Task(), optuna.create_study(pruner=optuna.pruners.NopPruner())
    plain = task.losses

    def broken(seed: int | None = None) -> dict[str, torch.Tensor]:
        return {name: loss * (float("nan") if name == "trial-1" else 1.0) for name, loss in plain(seed).items()}

    task.losses = broken
    task.run(study)
    failed = [trial.number for trial in study.trials if trial.state is TrialState.FAIL]
    assert failed == [1]


@pytest.mark.parametrize("what", ["suggest", "train", "evaluate", "finish"])
@pytest.mark.parametrize("call", [1, 3, 4])
def test_a_search_that_was_killed_goes_on(tmp_path, what, call):
    whole, path, storage = Task(), tmp_path / "state", memory()
    whole.run(study_in(memory(), pruner=Halving([4])))
    first = Task((what, call))
    with pytest.raises(Killed):
        first.run(study_in(storage, pruner=Halving([4])), path=path)
    study = study_in(storage, pruner=Halving([4]))
    second = Task()
    second.run(study, path=path)
    owned = [trial for trial in study.trials if trial.params]
    assert len(owned) == 6
    assert all(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in owned)
    assert all([*trial.intermediate_values] == [2, 4, 6, 8][: len(trial.intermediate_values)] for trial in owned)
    total = first.calls["train"] + second.calls["train"]
    assert whole.calls["train"] <= total <= whole.calls["train"] + 4 * 2


def test_a_trial_that_goes_on_ends_with_the_bits_of_one_that_was_not_disturbed(tmp_path):
    whole, first, second = Task(), Task(("train", 6)), Task()
    whole.run(study_in(memory()), count=3)
    with pytest.raises(Killed):
        first.run(study_in(file_in(tmp_path)), count=3, path=tmp_path / "state")
    second.run(study_in(file_in(tmp_path)), count=3, path=tmp_path / "state")
    assert second.calls["train"] < 8
    for name, expected in whole.finished.items():
        assert all(map(torch.equal, second.finished[name], expected))


PROCESS = """
import sys
sys.path[:0] = sys.argv[3:]
from pathlib import Path
import optuna, torch
from test_search import Task, file_in, study_in
torch.set_num_threads(1)
optuna.logging.set_verbosity(optuna.logging.ERROR)
task = Task()
study = study_in(file_in(Path(sys.argv[1])), pruner=optuna.pruners.NopPruner())
task.run(study, count=40, path=sys.argv[2])
print(*(name.partition("-")[2] for name in task.finished))
"""


@pytest.mark.slow
def test_two_processes_share_the_trials_of_one_study(tmp_path):
    study_in(file_in(tmp_path))
    places = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path), str(tmp_path / f"state-{which}"), *places],
            stdout=subprocess.PIPE,
            text=True,
        )
        for which in (1, 2)
    ]
    taken = [[int(number) for number in process.communicate()[0].split()] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert all(taken), "one of them did all the work"
    numbers = sorted(taken[0] + taken[1])
    assert numbers == [*range(len(numbers))]
    assert len(numbers) in (40, 41)  # both may ask for the last one
    assert all(trial.state is TrialState.COMPLETE for trial in study_in(file_in(tmp_path)).trials)


def reported(values: list[list[float]], pruner: Any, direction: str = "minimize") -> list[bool]:
    """Trials that report these values together, and which of them the pruner would stop at their last step."""
    study = optuna.create_study(direction=direction, pruner=pruner)
    asked = [study.ask() for _ in values]
    for trial, own in zip(asked, values, strict=True):
        for step, value in enumerate(own, start=1):
            trial.report(value, step)
    return [trial.should_prune() for trial in asked]


def test_halving_keeps_the_better_half_of_those_that_run_together():
    nan = float("nan")
    assert reported([[3.0], [1.0], [2.0], [4.0]], Halving([1])) == [True, False, False, True]
    assert reported([[3.0], [1.0], [2.0], [4.0]], Halving([1]), "maximize") == [False, True, True, False]
    assert reported([[3.0], [1.0], [2.0], [4.0]], Halving([1], factor=4)) == [True, False, True, True]
    assert reported([[3.0], [1.0], [2.0]], Halving([1])) == [True, False, False]
    assert reported([[3.0], [nan], [2.0]], Halving([1])) == [True, True, False]
    assert reported([[9.0]], Halving([1])) == [False]


def test_halving_compares_only_at_its_steps_and_at_equal_ones():
    assert reported([[3.0, 1.0], [1.0, 2.0]], Halving([2])) == [False, True]
    assert reported([[3.0, 1.0], [1.0, 2.0]], Halving([3])) == [False, False]
    assert reported([[3.0, 3.0], [1.0]], Halving([2])) == [False, False]


def test_pruners_of_optuna_that_wait_for_complete_trials_never_stop_one_of_a_cohort():
    """What Halving is for; should this fail one day, Optuna's own will do."""
    values = [[3.0], [1.0], [2.0], [4.0]]
    assert not any(reported(values, optuna.pruners.MedianPruner(n_startup_trials=0)))
    keeps_the_first = reported(values, optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2))
    assert keeps_the_first != [True, False, False, True]


def test_a_study_without_trials_to_come_ends_at_once():
    task, study = Task(), optuna.create_study()
    task.run(study, count=2)
    before = dict(task.calls)
    task.run(study, count=2)
    assert task.calls == before


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"count": 0}, ("search.run", "count=0")),
        ({"side_by_side": 0}, ("search.run", "side_by_side=0")),
        ({"every": 3}, ("search.run", "every=3")),
    ],
)
def test_numbers_that_cannot_be_are_refused(options, names):
    task = Task()
    with refused(task.trials.model, *names):
        task.run(optuna.create_study(), **options)


def test_the_examples_run():
    assert doctest.testmod(peftlib.search).failed == 0


def test_a_factor_that_keeps_all_is_refused():
    with refused(None, "Halving", "factor=1"):
        Halving([1], factor=1)

"""Trials go on from their state: in another process, after a kill at any moment, to the bit of an undisturbed run."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from test_trials import LOW_RANK, SETTINGS, Setting, adam, added, base, halving, sgd, train, weights_in_bits

from peftlib import LoRA, Trials
from support.refusals import refused

KILLED = """
import os, random, signal, sys, time
import torch, peftlib
from torch import nn

torch.set_num_threads(1)
folder, kills, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
random.seed(int(sys.argv[4]))
PARTS = {
    "lora": [("fc*", peftlib.LoRA, {"rank": 2, "dropout": 0.2})],
    "dora": [("fc1", peftlib.DoRA, {"rank": 2})],
    "two": [("fc1", peftlib.IA3, {}), ("fc2", peftlib.Full, {})],
    "late": [("fc*", peftlib.LoRA, {"rank": 2, "dropout": 0.2})],
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.drop = nn.Linear(8, 8), nn.Linear(8, 4), nn.Dropout(0.1)

    def forward(self, x):
        return self.fc2(self.drop(self.fc1(x).relu()))


def add(trials, name):
    trials.add(
        name, PARTS[name], clip=0.5, seed=len(name), optimizer=lambda ps: torch.optim.AdamW(ps, lr=1e-2),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
    )


def run(path):
    trials, start = peftlib.Trials(Model().train()), 0
    saved = torch.load(path) if os.path.exists(path) else {"step": 0, "trials": {"trials": ["lora", "dora", "two"]}}
    for name in saved["trials"]["trials"]:
        add(trials, name)
    if saved["step"]:
        trials.load_state_dict(saved["trials"])
    else:
        torch.manual_seed(1)
    for step in range(saved["step"], steps):
        if step == steps // 3:
            trials.remove("dora")
            add(trials, "late")
        if step == steps // 2:
            trials.clone("lora", "late")
        data = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        losses = {name: y.square().mean() for name, y in trials(data).items()}
        if step == steps // 4:
            losses["two"] = losses["two"] * float("nan")
        if "two" in losses and "two" in trials.stopped:
            del losses["two"]
        trials.step(losses)
        torch.save({"step": step + 1, "trials": trials.state_dict()}, path + ".tmp")
        os.replace(path + ".tmp", path)


def started(path):
    child = os.fork()
    if not child:
        run(path)
        os.kill(os.getpid(), signal.SIGKILL)  # an exit would first write what coverage has measured
    return child


def bits(path):
    saved = torch.load(path)
    assert saved["step"] == steps
    trials = saved["trials"]["trials"].items()
    weights = [(name, one["host"], key, t) for name, state in trials for one in state["adapters"]
               for key, t in one["tensors"].items()]
    moments = [(name, "", f"{at} {key}", t) for name, state in trials
               for at, one in state["optimizer"]["state"].items() for key, t in one.items()]
    return {each[:3]: each[3].contiguous().view(-1).view(torch.uint8).numpy().tobytes() for each in weights + moments}


run(f"{folder}/whole")  # here, so that what torch imports at the first step is there in every child
start = time.perf_counter()
os.waitpid(started(f"{folder}/child"), 0)
whole = time.perf_counter() - start
path = f"{folder}/killed"
for _ in range(kills):
    child = started(path)
    time.sleep(random.uniform(0, 2.5 * whole / kills))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
at = torch.load(path)["step"] if os.path.exists(path) else 0
os.waitpid(started(path), 0)
one, other = bits(f"{folder}/whole"), bits(path)
assert one.keys() == other.keys()
different = [key for key in one if one[key] != other[key]]
print(len(one), len(different), at)
"""


@pytest.mark.parametrize(("kills", "seed"), [(2, 50), pytest.param(20, 2, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_as_an_undisturbed_one(tmp_path, kills, seed):
    command = [sys.executable, "-W", "error", "-c", KILLED, str(tmp_path), str(kills), str(20 * kills)]
    done = subprocess.run([*command, str(seed)], check=True, capture_output=True, text=True)
    tensors, different, last = map(int, done.stdout.split())
    assert tensors > 20
    assert different == 0
    assert last > 0, "no run came anywhere before it was killed"


def resumed(trials: Trials, settings: dict[str, Setting], **options: Any) -> Trials:
    """Trials on a new base, from what a file would hold."""
    state = copy.deepcopy(trials.state_dict())
    torch.manual_seed(77)
    other = added(base(), settings, **options)
    other.load_state_dict(state)
    return other


def test_every_type_goes_on_to_the_bit_whatever_it_was_added_after():
    trials = added(base(), SETTINGS)
    train(trials, range(4))
    trials.stop("gain", "enough")
    other = resumed(trials, {name: SETTINGS[name]._replace(seed=50) for name in reversed(SETTINGS)})
    assert [*other] == [*trials]
    assert other.stopped == trials.stopped
    assert [other[name].seed for name in other] == [trials[name].seed for name in trials]
    for each in (trials, other):
        train(each, range(4, 8))
    assert weights_in_bits(other) == weights_in_bits(trials)
    assert [other[name].steps for name in other] == [trials[name].steps for name in trials]


def test_a_loaded_state_is_not_shared():
    trials = added(base(), {"a": SETTINGS["wider"]})
    train(trials, range(2))
    state = copy.deepcopy(trials.state_dict())
    first = added(base(), {"a": SETTINGS["wider"]})
    first.load_state_dict(state)
    train(first, range(2, 5))
    second = added(base(), {"a": SETTINGS["wider"]})
    second.load_state_dict(state)
    train(second, range(2, 5))
    assert weights_in_bits(first) == weights_in_bits(second)


def test_the_dropout_of_the_base_goes_on_too():
    class Dropping(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc, self.drop = torch.nn.Linear(5, 3).double(), torch.nn.Dropout(0.5)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.drop(self.fc(tokens.double()))

    def fresh() -> Trials:
        return added(Dropping().train(), {"a": Setting(("fc", LoRA, {"rank": 1}))})

    trials = fresh()
    train(trials, range(2))
    state = copy.deepcopy(trials.state_dict())
    train(trials, range(2, 4))
    other = fresh()
    other.load_state_dict(state)
    train(other, range(2, 4))
    assert weights_in_bits(other) == weights_in_bits(trials)


@pytest.mark.parametrize(
    ("there", "names"),
    [
        ({"b": SETTINGS["wider"]}, ("Trials", "'a'", "'b'")),
        ({"a": SETTINGS["wider"], "b": SETTINGS["wider"]}, ("Trials", "'b'")),
        ({"a": Setting(LOW_RANK, scheduler=halving)}, ("'a'", "layers.0.q_proj")),
        ({"a": Setting(("q_proj", LoRA, {}))}, ("'a'",)),
        ({"a": Setting(SETTINGS["wider"].parts, adam(1e-3))}, ("'a'",)),
        (
            {"a": Setting(SETTINGS["wider"].parts, lambda ps: sgd([{"params": [p]} for p in ps]), halving)},
            ("'a'",),
        ),
    ],
    ids=["another name", "one more", "another rank", "other modules", "no scheduler", "other groups"],
)
def test_the_state_of_other_trials_is_refused_and_nothing_is_loaded(there, names):
    trials = added(base(), {"a": SETTINGS["wider"]})
    train(trials, range(2))
    other = added(base(), there)
    with refused(other.model, *names):
        other.load_state_dict(trials.state_dict())

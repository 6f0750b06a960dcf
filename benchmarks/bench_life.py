"""An adapter's life: inject, switch, merge, save and load on 882 linears, and import"""

import copy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bare import factors
from models import PROJECTIONS, blocks, with_peft, with_peftlib
from torch import nn

import peftlib

TESTS = "tests/core/test_merge.py tests/core/test_choose.py tests/files/test_files.py tests/core/test_surgery.py"
DEPTH = 126  # times seven projections: 882 linears


def _two_adapters() -> tuple[nn.Module, Any]:
    ours, theirs = with_peftlib(blocks(64, DEPTH), 8, 0.0), with_peft(blocks(64, DEPTH), 8, 0.0)
    peftlib.inject(ours, PROJECTIONS, peftlib.LoRA, rank=8, name="other")
    theirs.add_adapter("other", peft.LoraConfig(r=8, target_modules=PROJECTIONS))  # pyright: ignore
    return ours, theirs


ROUNDS = 7


def _piles(width: int, depth: int, *others: str) -> dict[str, list[nn.Module]]:
    """Construction of the model is outside the clock: each run takes a fresh one from its pile."""
    return {name: [blocks(width, depth) for _ in range(ROUNDS + 8)] for name in ("peftlib", "HF peft", *others)}


def _with_factors_alone(model: nn.Module, rank: int, _: float) -> None:
    for layer in [layer for layer in model.modules() if isinstance(layer, nn.Linear)]:
        child = nn.Module()
        child.A, child.B = factors(layer, rank)
        layer.add_module("adapters", child)


@pytest.mark.parametrize("depth", [DEPTH, 429])
def bench_inject(contest, depth) -> None:
    alone = "two parameters in a child of each layer"
    piles = _piles(64, depth, alone)
    put_in: dict[str, Any] = {"peftlib": with_peftlib, "HF peft": with_peft, alone: _with_factors_alone}
    runs = {name: lambda name=name: put_in[name](piles[name].pop(), 8, 0.0) for name in piles}
    contest(f"inject {7 * depth} linears", runs, tests=TESTS, rounds=ROUNDS)


def bench_switch(contest) -> None:
    ours, theirs = _two_adapters()

    def switch_ours() -> None:
        peftlib.activate(ours, "other")
        peftlib.activate(ours, "default")

    def switch_theirs() -> None:
        theirs.set_adapter("other")
        theirs.set_adapter("default")

    contest("switch twice, 882 linears", {"peftlib": switch_ours, "HF peft": switch_theirs}, tests=TESTS)


def bench_clone(contest) -> None:
    """Weights, AdamW's moments and the state of dropout, from one trial to another."""
    trials = peftlib.Trials(blocks(64, DEPTH))
    for name in ("source", "target"):
        part = (PROJECTIONS, peftlib.LoRA, {"rank": 8})
        trials.add(name, part, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3), seed=0)
    trials.step({name: y.square().mean() for name, y in trials(torch.randn(1, 4, 64)).items()})

    def by_state() -> None:
        trials["target"].load_state_dict(copy.deepcopy(trials["source"].state_dict()))

    runs = {"peftlib": lambda: trials.clone("source", "target"), "by way of a state": by_state}
    contest("clone a trial, 882 linears", runs, tests="tests/training/test_trials.py")


def bench_merge(contest) -> None:
    ours, theirs = with_peftlib(blocks(256, 16), 8, 0.0), with_peft(blocks(256, 16), 8, 0.0)

    def merge_ours() -> None:
        with peftlib.merged(ours):
            pass

    def merge_theirs() -> None:
        theirs.merge_adapter()  # pyright: ignore
        theirs.unmerge_adapter()  # pyright: ignore

    note = (
        "peftlib keeps a copy and restores every bit; HF peft subtracts. In memory that malloc had kept it takes 0.6 "
        "of HF peft's time, in new memory 1.3: half of that is page faults; which of them a process meets is chance"
    )
    contest(
        "merge and unmerge, 112 linears d=256", {"peftlib": merge_ours, "HF peft": merge_theirs}, tests=TESTS, note=note
    )


MEMORY = "/dev/shm"  # a folder that is no disk, so that a sync costs nothing there


@pytest.mark.parametrize("where", [None, MEMORY], ids=["on disk", "in memory"])
def bench_save(contest, where) -> None:
    if where is not None and not Path(where).is_dir():
        pytest.skip(f"no {where}")
    ours, theirs = with_peftlib(blocks(256, 16), 8, 0.0), with_peft(blocks(256, 16), 8, 0.0)
    with tempfile.TemporaryDirectory(dir=where) as folder:
        runs = {
            "peftlib": lambda: peftlib.save(ours, Path(folder) / "ours.safetensors"),
            "HF peft": lambda: theirs.save_pretrained(folder),  # pyright: ignore
        }
        note = "peftlib syncs to disk before it renames; HF peft does not"
        if where is not None:
            note = "no disk, so no sync: the other row less this one is what it costs; peftlib sums and fingerprints"
        contest(f"save 112 linears d=256{', in memory' if where else ''}", runs, tests=TESTS, note=note)


@pytest.mark.parametrize(("width", "depth"), [(256, 16), (64, DEPTH)])
def bench_load(contest, width, depth) -> None:
    _contest_load(contest, f"load {7 * depth} linears d={width}", width, depth, peftlib.load, "ours.safetensors")


def bench_load_of_the_same(contest) -> None:
    """The directory that HF peft wrote, read by both."""
    _contest_load(contest, f"load {7 * DEPTH} linears d=64, HF peft's files", 64, DEPTH, peftlib.hf.load, "theirs")


def _contest_load(contest, row: str, width: int, depth: int, load: Callable[..., Any], file: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        peftlib.save(with_peftlib(blocks(width, depth), 8, 0.0), Path(folder) / "ours.safetensors")
        theirs = str(Path(folder) / "theirs")
        with_peft(blocks(width, depth), 8, 0.0).save_pretrained(theirs)  # pyright: ignore
        piles = _piles(width, depth)
        runs = {
            "peftlib": lambda: load(piles["peftlib"].pop(), Path(folder) / file),
            "HF peft": lambda: peft.PeftModel.from_pretrained(piles["HF peft"].pop(), theirs),  # pyright: ignore
        }
        contest(row, runs, tests=TESTS, rounds=ROUNDS)


def bench_drift(record) -> None:
    """100 merges and unmerges of a moving adapter into bfloat16, as relative change of the base weight."""
    record("base drift after 100 merges, bf16", {"peftlib": _drift_ours(), "HF peft": _drift_peft()}, unit="% of ‖W‖")


def _drift_ours() -> float:
    model: Any = with_peftlib(blocks(64, 1).bfloat16(), 8, 0.0)
    weight = model[0].q.weight
    before = weight.clone()
    for _ in range(100):
        for parameter in peftlib.parameters(model):
            nn.init.normal_(parameter, std=0.1)
        peftlib.merge(model)
        peftlib.unmerge(model)
    return _change(before, weight)


def _drift_peft() -> float:
    model: Any = with_peft(blocks(64, 1).bfloat16(), 8, 0.0)
    weight = model.base_model.model[0].q.base_layer.weight
    before = weight.detach().clone()
    for _ in range(100):
        for parameter in (p for p in model.parameters() if p.requires_grad):
            nn.init.normal_(parameter, std=0.1)
        model.merge_adapter()
        model.unmerge_adapter()
    return _change(before, weight)


def _change(before: torch.Tensor, after: torch.Tensor) -> float:
    return 100 * ((after.float() - before.float()).norm() / before.float().norm()).item()


def bench_import(record) -> None:
    """Seconds beyond `import torch`, the best of five fresh processes each."""
    seconds = {name: min(_import_seconds(module) for _ in range(5)) for name, module in _IMPORTS.items()}
    note = "two modules that hold layers, where peftlib also merges, checks and writes files"
    record("import, beyond torch", seconds, unit="s", note=note)


_IMPORTS = {"peftlib": "peftlib", "HF peft": "peft", "LyCORIS": "lycoris", "loralib": "loralib"}


def _import_seconds(module: str) -> float:
    code = f"import time, torch; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    shown = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    return float(shown.split()[-1])

"""DoRA: one linear of 4096 by 4096, forward and backward"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_memory import saved_megabytes
from bench_step import step
from torch import nn
from torch.profiler import profile

import peftlib


def _linear() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("q", nn.Linear(4096, 4096))
    return model.requires_grad_(False)


def _with_peftlib(dropout: float) -> nn.Module:
    model = _linear()
    peftlib.inject(model, "q", peftlib.DoRA, rank=8, alpha=8, dropout=dropout)
    return model.train()


def _with_peft(dropout: float) -> nn.Module:
    import peft

    options: Any = {"r": 8, "lora_alpha": 8, "lora_dropout": dropout, "use_dora": True, "target_modules": ["q"]}
    return peft.get_peft_model(_linear(), peft.LoraConfig(**options)).train()


def peak_megabytes(run: Callable[[], Any]) -> float:
    """The largest sum of what torch's allocator gave and took in a run, temporaries inside operators included."""
    with profile(profile_memory=True) as profiled:
        run()
    found: Any = profiled.profiler
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    total = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return highest / 1e6


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("tokens", [64, 512])
def bench_dora_memory(record, tokens: int, dropout: float) -> None:
    x = torch.randn(tokens, 4096, requires_grad=True)
    models = {"peftlib": _with_peftlib(dropout), "HF peft": _with_peft(dropout)}
    found = {name: peak_megabytes(lambda model=model: model(x).sum().backward()) for name, model in models.items()}
    record(f"allocated at most in a step, tokens={tokens} p={dropout}", found, unit="MB", note="the weight is 67 MB")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("tokens", [64, 512, 4096])
def bench_dora_saved(record, tokens: int, dropout: float) -> None:
    x = torch.randn(tokens, 4096, requires_grad=True)
    models = {"peftlib": _with_peftlib(dropout), "HF peft": _with_peft(dropout)}
    size = x.numel() * x.element_size() / 1e6
    found = {name: saved_megabytes(model, x) / size for name, model in models.items()}
    record(f"saved for backward, tokens={tokens} p={dropout}", found, unit="× x")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def bench_dora_step(contest, dropout: float) -> None:
    x = torch.randn(512, 4096, requires_grad=True)
    models = {"base": _linear(), "peftlib": _with_peftlib(dropout), "HF peft": _with_peft(dropout)}
    runs = {name: step(model, x) for name, model in models.items()}
    contest(f"a step, tokens=512 p={dropout}", runs, tests="tests/kinds/test_dora.py", rounds=5)

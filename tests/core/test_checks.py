"""Arguments are checked in one place: the same kinds of wrong value are refused in the same way everywhere."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import peftlib
from peftlib import AdapterError, schedules


def put(kind: type[peftlib.Adapter], **config: Any) -> Any:
    return peftlib.inject(nn.Sequential(nn.Linear(16, 16)), "0", kind, **config)


def groups() -> Any:
    return peftlib.layer_groups(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)


WHOLE: dict[str, Callable[[Any], Any]] = {
    "rank": lambda n: put(peftlib.LoRA, rank=n),
    "width": lambda n: put(peftlib.Bottleneck, width=n),
    "dim": lambda n: put(peftlib.Bottleneck, dim=n),
    "n": schedules.every,
    "counts": lambda n: schedules.milestones([n]),
    "budget": schedules.linear,
    "patience": schedules.plateau,
    "warmup": lambda n: peftlib.GradualUnfreezing(groups(), schedules.every(1), warmup=n),
}
POSITIVE: dict[str, Callable[[Any], Any]] = {
    "alpha": lambda x: put(peftlib.LoRA, alpha=x),
    "scale": lambda x: put(peftlib.Bottleneck, scale=x),
    "lr": lambda x: peftlib.discriminative_lr(groups(), x),
    "decay": lambda x: peftlib.discriminative_lr(groups(), 1e-3, x),
    "temperature": lambda x: peftlib.distill(nn.Linear(2, 2), torch.ones(1, 2), temperature=x),
}
AT_LEAST: dict[str, Callable[[Any], Any]] = {
    "reduction": lambda x: put(peftlib.Bottleneck, reduction=x),
    "beta": lambda x: peftlib.L2SP(nn.Linear(2, 2), beta=x),
    "threshold": lambda x: schedules.plateau(1, threshold=x),
    "ratio": lambda x: peftlib.SlantedTriangular(optimizer(), 100, ratio=x),
}
DROPOUT: dict[str, Callable[[Any], Any]] = {
    "dropout of LoRA": lambda p: put(peftlib.LoRA, dropout=p),
    "dropout of Bottleneck": lambda p: put(peftlib.Bottleneck, dropout=p),
}
NO_NUMBER = (True, "1", [1], float("nan"), float("inf"), 1j)


@pytest.mark.parametrize("value", [*NO_NUMBER, 1.5, -1], ids=repr)
@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_number_is_asked_for(name, value):
    with pytest.raises(AdapterError, match=f"{name}="):
        WHOLE[name](value)


@pytest.mark.parametrize("value", [*NO_NUMBER, None, -0.5, 0], ids=repr)
@pytest.mark.parametrize("name", POSITIVE)
def test_a_positive_number_is_asked_for(name, value):
    with pytest.raises(AdapterError, match=f"{name}="):
        POSITIVE[name](value)


@pytest.mark.parametrize("value", [*NO_NUMBER, None, -0.5], ids=repr)
@pytest.mark.parametrize("name", AT_LEAST)
def test_a_number_with_a_lower_bound_is_asked_for(name, value):
    with pytest.raises(AdapterError, match=f"{name}="):
        AT_LEAST[name](value)


@pytest.mark.parametrize("value", [*NO_NUMBER, None, -0.5, 1.0], ids=repr)
@pytest.mark.parametrize("name", DROPOUT)
def test_a_probability_below_one_is_asked_for(name, value):
    with pytest.raises(AdapterError, match="dropout="):
        DROPOUT[name](value)


@pytest.mark.parametrize("value", ["other", None, 3, ["relu"]], ids=repr)
@pytest.mark.parametrize("key", ["activation", "position", "norm"])
def test_one_of_a_few_words_is_asked_for(key, value):
    with pytest.raises(AdapterError, match=f"{key}="):
        put(peftlib.Bottleneck, **{key: value})


def test_integers_of_numpy_are_whole_numbers():
    three: Any = np.int64(3)
    assert schedules.milestones([three, 5]).stages(2) == schedules.milestones([3, 5]).stages(2)

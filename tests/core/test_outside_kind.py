"""An adapter type is one file: written by a user, outside of the package, it has all that ours have."""

import copy
import doctest
import importlib
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftlib

FILE = '''
"""Scaling: one trainable factor for each row of a weight."""

import torch
from torch import nn

import peftlib


class RowScaling(peftlib.Adapter):
    """One factor for each row.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
    >>> peftlib.inject(model, "0", RowScaling, start=2.0)
    ['0']
    """

    def __init__(self, host, *, start=1.0):
        super().__init__()
        self.factor = nn.Parameter(torch.full_like(host.weight[:, :1], start))

    def fold(self, host):
        return {"weight": host.weight * self.factor}
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "row_scaling.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("row_scaling")
    del sys.modules["row_scaling"]


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def test_a_type_from_outside_is_planned_trained_verified_merged_saved_copied_and_ejected(module, tmp_path):
    model, plain, x = base(), base(), torch.randn(3, 4)
    assert peftlib.plan(model, nn.Linear, module.RowScaling).parameters == 6
    assert peftlib.inject(model, nn.Linear, module.RowScaling) == ["0", "2"]
    assert torch.equal(model(x), plain(x))
    assert peftlib.verify(model, x)
    optimizer = torch.optim.SGD(peftlib.parameters(model), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    expected = model(x)
    factors = [adapter.factor for _, _, adapter in peftlib.adapters(model)]
    by_hand = plain
    with torch.no_grad():
        for layer, factor in zip((by_hand[0], by_hand[2]), factors, strict=True):
            layer.weight.mul_(factor)
    assert torch.equal(by_hand(x), expected)
    with peftlib.merged(model):
        assert torch.equal(model(x), expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
    peftlib.save(model, tmp_path / "adapter.safetensors")
    fresh = base()
    peftlib.load(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(fresh(x), expected)
    peftlib.eject(model)
    assert torch.equal(model(x), base()(x))
    assert type(model[0]) is nn.Linear


def test_its_documentation_runs(module):
    assert doctest.testmod(module) == doctest.TestResults(failed=0, attempted=2)

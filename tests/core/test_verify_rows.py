"""Verifying rows: what mixes them is named, and what does not passes, without a trace."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlib
from peftlib import AdapterError, Full, LoRA
from support.helpers import changes, moved, network, snapshot, tokens

ROWS: Any = ["a", "b", None, "a", "b"]


def batch() -> Tensor:
    return torch.cat([tokens(), tokens() % 7, tokens()[:1] % 5])


def two(model: Any, targets: Any = nn.Linear) -> Any:
    for name, rank in (("a", 2), ("b", 3)):
        peftlib.inject(model, targets, LoRA, rank=rank, name=name)
    return moved(model)


class MixesForward(nn.Module):
    """Each row is less the mean of all."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class MixesBackward(nn.Module):
    """Forward each row is itself; backward it gets a part of its neighbour's gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x.roll(1, 0) - x.detach().roll(1, 0))


class First(nn.Module):
    """The model, and a loss over all rows beside its rows."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        y = self.model(x) * scale
        return y.mean(), y


def test_rows_that_do_not_mix_pass_without_a_trace():
    model = two(network())
    peftlib.inject(model, "layers.1", Full, name="b")
    before = snapshot(model)
    found = peftlib.verify(model, batch(), rows=ROWS)
    assert found, str(found)
    assert found.difference is not None
    assert found.difference < 1e-5
    assert "alone" in str(found)
    assert changes(before, model) == []


def test_a_mapping_of_rows_and_an_output_beside_the_rows_pass_too():
    assert peftlib.verify(First(two(network())), batch(), scale=2.0, rows={"a": 2, None: 1, "b": 2})


@pytest.mark.parametrize("rows", [ROWS, ["a", None, None, None, None]])
def test_the_first_module_that_mixes_rows_forward_is_named(rows):
    model = two(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), MixesForward(), nn.Linear(4, 4)))
    found = peftlib.verify(model, torch.randn(5, 4), rows=rows)
    assert not found
    assert all(problem.startswith(("2 ", '"')) for problem in found.problems)
    assert found.problems[0].startswith("2 ")


def test_what_mixes_only_gradients_is_found_by_the_adapters_in_front_of_it():
    model = two(nn.Sequential(nn.Linear(4, 4), MixesBackward(), nn.Linear(4, 4)))
    found = peftlib.verify(model, torch.randn(5, 4), rows=ROWS)
    assert found.problems
    assert all("on 0: " in problem for problem in found.problems)


def test_a_norm_in_training_and_a_batch_of_another_size_are_problems_by_name():
    model = two(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), "0")
    found = peftlib.verify(model, torch.randn(5, 4), rows=ROWS)
    assert "1 (BatchNorm1d)" in found.problems[0]
    assert peftlib.verify(model.eval(), torch.randn(5, 4), rows=ROWS)
    assert "0 (Linear)" in peftlib.verify(model, torch.randn(4, 4), rows=ROWS).problems[0]


def test_an_absent_name_and_a_routed_model_are_refused():
    model = two(network())
    with pytest.raises(AdapterError, match="'z'"):
        peftlib.verify(model, batch(), rows=["z"] * 5)
    with peftlib.route(model, ROWS), pytest.raises(AdapterError, match="rout"):
        peftlib.verify(model, batch())

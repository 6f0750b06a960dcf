"""Rows with bottlenecks of their own: those of one shape share one pass, and each row is what it is alone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import peftlib
from peftlib import Bottleneck
from support.rows import nan_stays_in_its_rows

pytestmark = pytest.mark.mutants

NAMES = ("a", "b", "c")
ROWS: dict[str, list[Any]] = {
    "in turn": ["a", "a", "b", "b", "c", "c"],
    "in any order": ["c", "a", "b", "a", "c", "b"],
    "unequal": ["b", "a", None, "c", "a", "b", "b"],
    "sums": ["b", ("a", "b"), "c", "a"],
}


class Pair(nn.Module):
    """Gives hidden states, and something beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return torch.tanh(self.inner(x)), "beside"


class First(nn.Module):
    def forward(self, pair: tuple[Tensor, str]) -> Tensor:
        return pair[0]


# How the host is made; the configuration of each adapter; whether as many rows for each share one pass.
CASES: dict[str, tuple[Any, Any, bool]] = {
    "after": (lambda: nn.Linear(5, 4), lambda name: {}, True),
    "parallel": (lambda: nn.Linear(5, 4), lambda name: {"position": "parallel", "activation": "silu"}, True),
    "in place of": (lambda: nn.Linear(5, 4), lambda name: {"residual": False}, True),
    "of other scales": (lambda: nn.Linear(5, 4), lambda name: {"scale": {"a": 1.0, "b": 0.5, "c": 3.0}[name]}, True),
    "behind a pair": (lambda: nn.Sequential(Pair(), First()), lambda name: {}, True),
    "of other widths": (lambda: nn.Linear(5, 4), lambda name: {"width": 1 + ord(name) % 3}, False),
    "of other activations": (
        lambda: nn.Linear(5, 4), lambda name: {"activation": "tanh" if name == "a" else "gelu"}, False
    ),
    "with a scale that learns": (lambda: nn.Linear(5, 4), lambda name: {"scale": "learned"}, False),
    "with a norm": (lambda: nn.Linear(5, 4), lambda name: {"norm": "before"}, False),
}  # fmt: skip
cases = pytest.mark.parametrize("case", CASES)


def model_of(case: str, dtype: torch.dtype = torch.float64) -> Any:
    make, config, _ = CASES[case]
    torch.manual_seed(0)
    model = nn.Sequential(make()).to(dtype)
    target = "0.0" if case == "behind a pair" else "0"
    for name in NAMES:
        peftlib.inject(model, target, Bottleneck, name=name, **{"width": 3, **config(name)})
    for parameter in peftlib.parameters(model):
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
        parameter.requires_grad_()
    return model


def inputs(rows: list[Any], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(len(rows), 3, 5, dtype=dtype)


def alone(model: Any, x: Tensor, rows: list[Any]) -> Tensor:
    parts: list[Any] = []
    for row, choice in enumerate(rows):
        with peftlib.activate(model, *((choice,) if isinstance(choice, str) else choice or ())):
            parts.append(model(x[row : row + 1]))
    return torch.cat(parts)


class Calls(TorchFunctionMode):
    """How often an activation ran."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in ("gelu", "silu", "relu")
        return func(*args, **(kwargs or {}))


@cases
@pytest.mark.parametrize("order", ROWS)
def test_outputs_and_gradients_are_those_of_each_row_alone(case, order):
    model, rows = model_of(case), ROWS[order]
    x = inputs(rows).requires_grad_()
    operands = [x, *peftlib.parameters(model)]
    expected = alone(model, x, rows)
    with peftlib.route(model, rows):
        found = model(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    given = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, operands, given), torch.autograd.grad(expected, operands, given), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@cases
def test_those_of_one_shape_share_one_pass(case):
    model = model_of(case)
    with torch.no_grad(), peftlib.route(model, ROWS["in any order"]), Calls() as calls:
        model(inputs(ROWS["in any order"]))
    assert (calls.count == 1) == CASES[case][2]


@cases
def test_beams_of_one_row_lie_together_and_what_follows_may_work_in_place(case):
    model, rows = model_of(case), ROWS["in any order"]
    x = inputs(2 * rows)
    with peftlib.route(model, rows):
        found = model(x)
    expected = alone(model, x, [choice for choice in rows for _ in range(2)])
    torch.testing.assert_close(found.mul_(2), expected * 2, rtol=0, atol=1e-12)


@cases
@pytest.mark.parametrize("order", ["in turn", "in any order"])
def test_what_is_not_finite_in_one_adapter_changes_no_bit_of_another_s_rows(case, order):
    model, rows = model_of(case), ROWS[order]
    x = inputs(rows)
    nan_stays_in_its_rows(model, rows, lambda: model(x), "b")


def test_in_half_precision_nothing_is_rounded_once_more_than_alone():
    rows = ROWS["in turn"]
    model, x = model_of("after", torch.bfloat16), inputs(rows, torch.bfloat16)
    with torch.no_grad():
        with peftlib.route(model, rows):
            found = model(x)
        assert torch.equal(found, alone(model, x, rows))


def test_an_adapter_without_rows_gets_no_gradient():
    model = model_of("after")
    with peftlib.route(model, ["a", "b", "b", "a"]):
        model(inputs([0] * 4)).square().sum().backward()
    for _, name, adapter in peftlib.adapters(model):
        assert {p.grad is None for p in adapter.parameters()} == {name == "c"}


def test_dropout_that_acts_is_that_of_each_adapter():
    model = nn.Sequential(nn.Linear(5, 4)).double()
    for seed, name in enumerate(NAMES):
        peftlib.inject(model, "0", Bottleneck, width=64, dropout=0.5, residual=False, name=name, seed=seed)
    rows = ROWS["in turn"]
    x = inputs(rows)
    twin = [peftlib.view(model, name) for name in NAMES]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = torch.cat([view(part) for view, part in zip(twin, x.split(2), strict=True)])
    model.load_state_dict(state)
    with peftlib.route(model, rows):
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_compiled_without_a_break_rows_give_the_same():
    model, rows = model_of("after"), ROWS["in any order"]
    x = inputs(rows)
    with peftlib.route(model, rows):
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-12)

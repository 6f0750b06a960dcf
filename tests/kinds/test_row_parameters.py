"""Rows whose adapters differ in a vector alone: the host runs once, and each row is what it is alone."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import peftlib
from peftlib import IA3, Full
from support.rows import nan_stays_in_its_rows

pytestmark = pytest.mark.mutants

ROWS: list[Any] = ["b", "a", None, "c", "a", "b", "b"]
EVEN: list[Any] = ["c", "a", "b", "a", "c", "b"]
CASES: dict[str, tuple[Any, Any, dict[str, Any], Any]] = {
    "factor of a Linear": (lambda: nn.Linear(5, 4), IA3, {}, (3, 5)),
    "factor of a Linear, rows alone": (lambda: nn.Linear(5, 4), IA3, {}, (5,)),
    "factor of a convolution": (lambda: nn.Conv2d(3, 4, 3), IA3, {}, (3, 6, 5)),
    "factor of an Embedding": (lambda: nn.Embedding(9, 4), IA3, {}, None),
    "factor of a norm of two dimensions": (lambda: nn.LayerNorm((3, 5)), IA3, {}, (2, 3, 5)),
    "bias": (lambda: nn.Linear(5, 4), Full, {"params": "bias"}, (3, 5)),
    "LayerNorm": (lambda: nn.LayerNorm(5), Full, {}, (3, 5)),
    "bias of a LayerNorm": (lambda: nn.LayerNorm(5), Full, {"params": "bias"}, (3, 5)),
    "RMSNorm": (lambda: nn.RMSNorm(5), Full, {}, (2, 3, 5)),
}
cases = pytest.mark.parametrize("case", CASES)


def model_of(case: str, dtype: torch.dtype = torch.float64) -> Any:
    make, kind, config, _ = CASES[case]
    torch.manual_seed(0)
    model = nn.Sequential(make()).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    for name in ("a", "b", "c"):
        peftlib.inject(model, "0", kind, name=name, **config)
        peftlib.activate(model)  # copies of one weight cannot act together
    for *_, adapter in peftlib.adapters(model):
        for parameter in adapter.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
            parameter.requires_grad_()
    return model


def input_of(case: str, rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = CASES[case][3]
    return torch.randint(0, 9, (rows, 3)) if shape is None else torch.randn(rows, *shape, dtype=dtype)


class Calls(TorchFunctionMode):
    """How many rows each call of a layer's function had."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("linear", "conv2d", "embedding", "layer_norm", "rms_norm"):
            self.rows.append(len(args[0]))
        return func(*args, **(kwargs or {}))


def alone(model: Any, x: Tensor, rows: list[Any]) -> Tensor:
    parts: list[Any] = []
    for row, choice in enumerate(rows):
        with peftlib.activate(model, *((choice,) if isinstance(choice, str) else choice or ())):
            parts.append(model(x[row : row + 1]))
    return torch.cat(parts)


@cases
@pytest.mark.parametrize("rows", [ROWS, EVEN], ids=["unequal", "even"])
def test_outputs_and_gradients_are_those_of_each_row_alone_and_the_host_runs_once(case, rows):
    model, x = model_of(case), input_of(case, len(rows))
    learned = [parameter for *_, adapter in peftlib.adapters(model) for parameter in adapter.parameters()]
    operands = [*([x.requires_grad_()] if x.is_floating_point() else []), *learned]
    expected = alone(model, x, rows)
    with peftlib.route(model, rows), Calls() as calls:
        found = model(x)
    assert calls.rows == [len(rows)]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    given = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, operands, given), torch.autograd.grad(expected, operands, given), strict=True
    ):
        assert other.any()
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_factors_of_one_row_nest_and_gradients_have_gradients():
    model, rows = model_of("factor of a Linear"), ["b", ("a", "b"), None, ("a", "b", "c")]
    x = input_of("factor of a Linear", 4).requires_grad_()
    learned = list(peftlib.parameters(model))
    expected = alone(model, x, rows)
    with peftlib.route(model, rows), Calls() as calls:
        found = model(x)
    assert calls.rows == [4]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    second = []
    for y in (found, expected):
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), learned))
    for one, other in zip(*second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@cases
def test_beams_of_one_row_lie_together(case):
    model, x = model_of(case), input_of(case, 2 * len(ROWS))
    with peftlib.route(model, ROWS):
        found = model(x)
    expected = alone(model, x, [choice for choice in ROWS for _ in range(2)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@cases
def test_what_is_not_finite_in_one_adapter_changes_no_bit_of_another_s_rows(case):
    model, x = model_of(case), input_of(case, len(ROWS))
    nan_stays_in_its_rows(model, ROWS, lambda: model(x), "b")


@pytest.mark.parametrize("case", ["bias", "LayerNorm", "factor of a Linear"])
def test_in_half_precision_nothing_is_rounded_once_more_than_alone(case):
    model, x = model_of(case, torch.bfloat16), input_of(case, len(ROWS), torch.bfloat16)
    with torch.no_grad():
        with peftlib.route(model, ROWS):
            found = model(x)
        assert torch.equal(found, alone(model, x, ROWS))


def test_an_adapter_without_rows_gets_no_gradient():
    for case in CASES:
        model, x = model_of(case), input_of(case, 3)
        with peftlib.route(model, ["a", None, "b"]):
            model(x).square().sum().backward()
        for _, name, adapter in peftlib.adapters(model):
            assert {p.grad is None for p in adapter.parameters()} == {name == "c"}


def test_one_sample_without_a_batch_and_other_counts_of_rows_are_refused():
    model = model_of("factor of a convolution")
    with peftlib.route(model, ["a", "b", "c"]), pytest.raises(peftlib.AdapterError, match="0"):
        model(torch.randn(3, 6, 5, dtype=torch.float64))
    with peftlib.route(model, ["a", "b"]), pytest.raises(peftlib.AdapterError, match="0"):
        model(input_of("factor of a convolution", 3))


@pytest.mark.parametrize("case", ["factor of a Linear", "bias", "RMSNorm"])
def test_compiled_without_a_break_rows_give_the_same(case):
    model, x = model_of(case), input_of(case, len(ROWS))
    with peftlib.route(model, ROWS):
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-12)

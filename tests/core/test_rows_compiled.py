"""Routed rows under torch.compile: another assignment of rows is the same graph, and no row reads another's adapter."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import peftlib
from peftlib import IA3, AdapterError, Bottleneck, DoRA, LoRA
from support.helpers import linears, moved

pytestmark = pytest.mark.mutants

Row = str | tuple[str, ...] | None


def three(**config: Any) -> Any:
    """Adapters a, b and c of ranks 1, 2 and 3 and scales of their own on every layer."""
    torch.manual_seed(0)
    model = linears(2, 6).double()
    for at, name in enumerate("abc"):
        peftlib.inject(model, nn.Linear, LoRA, rank=at + 1, alpha=3.0 - at, name=name, **config)
    torch.manual_seed(1)
    return moved(model)


def x(rows: int = 6) -> Tensor:
    return torch.linspace(-1, 1, rows * 4 * 6, dtype=torch.float64).view(rows, 4, 6)


def counted(model: Any) -> tuple[Any, CompileCounter]:
    torch.compiler.reset()
    counter = CompileCounter()
    return torch.compile(model, fullgraph=True, backend=counter), counter


def gradients(model: Any, y: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(y.square().sum(), list(peftlib.parameters(model)), allow_unused=True))


def check(compiled: Any, model: Any, rows: list[Row], x: Tensor) -> None:
    """Outputs and gradients are those of each row by itself; without rows an adapter has no gradient."""
    with peftlib.route(model, rows):
        y = compiled(x)
        found = gradients(model, y)
    parts = []
    for at, row in enumerate(rows):
        with peftlib.activate(model, *((row,) if isinstance(row, str) else row or ())):
            parts.append(model(x[at : at + 1]))
    expected = torch.cat(parts)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    for one, other in zip(found, gradients(model, expected), strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=0, atol=1e-10)


ASSIGNMENTS: list[list[Row]] = [
    ["a", "b", None, "c", "a", None],
    ["a", None, "b", "c", "c", "c"],
    [None, None, None, "c", "b", "a"],
    ["c", "b", "a", None, "a", "a"],
]


def test_in_training_another_assignment_of_rows_compiles_nothing():
    model = three()
    compiled, counter = counted(model)
    for rows in ASSIGNMENTS:
        check(compiled, model, rows, x())
    assert counter.frame_count == 1


def test_without_gradients_other_adapters_compile_nothing_either():
    model = three()
    compiled, counter = counted(model)
    with torch.no_grad():
        for rows in [*ASSIGNMENTS, ["b"] * 6, [None] * 6, ["a", "c"] * 3]:
            with peftlib.route(model, rows):
                torch.testing.assert_close(compiled(x()), model(x()), rtol=0, atol=1e-12)
    assert counter.frame_count == 1


def test_a_switch_back_and_a_swap_compile_nothing_once_warm(tmp_path):
    model, other = three(), three()
    moved(other)
    peftlib.save(other, tmp_path / "b.safetensors", "b")
    compiled, counter = counted(model)
    compiled(x())
    check(compiled, model, ASSIGNMENTS[0], x())
    warm = counter.frame_count
    with peftlib.route(model, ASSIGNMENTS[1]):
        peftlib.load(model, tmp_path / "b.safetensors", into="b")
        torch.testing.assert_close(compiled(x()), model(x()), rtol=0, atol=1e-12)
    peftlib.activate(model, "a", "b", "c")
    torch.testing.assert_close(compiled(x()), model(x()), rtol=0, atol=1e-12)
    assert counter.frame_count == warm


def test_sums_of_adapters_and_rows_with_a_share_each_are_right():
    model = three()
    compiled, counter = counted(model)
    for rows in ([("a", "b"), None, "c"], [None, "c", ("a", "b")]):
        check(compiled, model, rows, x(3))
        with peftlib.route(model, rows):  # two of each row together, as beams are
            torch.testing.assert_close(compiled(x(6)), model(x(6)), rtol=0, atol=1e-12)
    assert counter.frame_count == 2


@pytest.mark.parametrize("shape", [(6, 6), (6, 2, 3, 6)], ids=str)
def test_inputs_of_any_number_of_dimensions(shape):
    model = three()
    compiled, _ = counted(model)
    check(compiled, model, ASSIGNMENTS[0], torch.randn(shape, dtype=torch.float64))


def test_what_is_not_finite_in_one_row_or_one_adapter_reaches_no_other():
    model = three()
    compiled, counter = counted(model)
    rows = ASSIGNMENTS[0]
    with peftlib.route(model, rows):
        y = compiled(x())
    clean = dict(zip(peftlib.parameters(model), gradients(model, y), strict=True))
    bad = x()
    bad[3] = torch.nan  # of c
    with torch.no_grad():
        model[0].adapters["b"].lora_A.fill_(torch.inf)
    with peftlib.route(model, rows):
        found = compiled(bad)
    seen = [0, 2, 4, 5]
    assert torch.equal(found[seen], y[seen])
    assert not found[[1, 3]].isfinite().any()
    loss = torch.where(found.isfinite(), found, 0.0).square().sum()
    after = torch.autograd.grad(loss, list(peftlib.parameters(model)))
    own = {id(p) for p in peftlib.parameters(model, "a")}
    for (parameter, before), now in zip(clean.items(), after, strict=True):
        assert id(parameter) not in own or torch.allclose(now, before, rtol=0, atol=1e-12)
    assert counter.frame_count == 1


def test_a_row_of_the_base_is_the_base_s_also_where_it_is_infinite():
    model = three()[0]
    compiled, _ = counted(model)
    bad = x()
    bad[2, 0, 1] = torch.inf
    with peftlib.route(model, ASSIGNMENTS[0]):
        found = compiled(bad)
    with peftlib.activate(model):
        expected = model(bad[2:3])
    assert expected.isinf().any()
    assert not expected.isnan().any()
    torch.testing.assert_close(found[2:3], expected, rtol=0, atol=1e-12)


def test_dropout_of_one_probability_acts_on_the_adapters_rows_alone():
    model = three(dropout=0.5).train()
    compiled, _ = counted(model)
    with peftlib.route(model, ["a", None, "b", None, "a", "b"]):
        one, other = compiled(x()), compiled(x())
    assert torch.equal(one[[1, 3]], other[[1, 3]])
    assert not any(torch.equal(one[row], other[row]) for row in (0, 2, 4, 5))
    model.eval()
    check(torch.compile(model, fullgraph=True, backend="eager"), model, ASSIGNMENTS[0], x())


def test_a_seeded_mask_stays_refused():
    model = three(dropout=0.5, seed=1).train()
    compiled, _ = counted(model)
    with peftlib.route(model, ["a", "b", None]), pytest.raises((AdapterError, torch._dynamo.exc.Unsupported)):
        compiled(x(3))


def test_autocast_and_half_precision_are_those_of_eager():
    model = three().float()
    compiled, _ = counted(model)
    with peftlib.route(model, ASSIGNMENTS[0]), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x().float()), model(x().float()), rtol=2e-2, atol=2e-2)
    narrow = three().bfloat16()
    compiled, _ = counted(narrow)
    with peftlib.route(narrow, ASSIGNMENTS[0]):
        found = compiled(x().bfloat16())
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, narrow(x().bfloat16()), rtol=2e-2, atol=2e-2)


KINDS: dict[str, Any] = {"ia3": (IA3, {}), "bottleneck": (Bottleneck, {"width": 2}), "dora": (DoRA, {"rank": 2})}


@pytest.mark.parametrize("name", KINDS)
def test_any_other_type_compiles_nothing_for_as_many_rows_in_another_order(name):
    kind, config = KINDS[name]
    torch.manual_seed(0)
    model = linears(1, 6).double()
    for adapter in "abc":
        peftlib.inject(model, nn.Linear, kind, name=adapter, **config)
        peftlib.activate(model)
    moved(model)
    compiled, counter = counted(model)
    for rows in (["a", "b", "a", None, "c"], ["b", "a", None, "c", "a"], ["c", "a", "b", "a", None]):
        check(compiled, model, rows, x(5))
    assert counter.frame_count == 1

"""Rows through pairs of their own on one linear layer: equal to each row by itself, output and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from peftlib.kernels import Segments, lora_linear_rows, serves_rows
from support.rows import batched_as_one_by_one, first_and_second, same_with_gradients

pytestmark = pytest.mark.mutants

# Rows and ranks of each segment, in the batch's order when sorted; rank 0 is a segment without a pair.
SHAPES = {
    "alike": [(2, 3), (2, 3), (2, 3)],
    "alike, other ranks": [(2, 1), (2, 4), (2, 2)],
    "one row each": [(1, 2), (1, 2), (1, 2), (1, 2)],
    "unlike": [(1, 2), (3, 4), (2, 1)],
    "the base too": [(2, 0), (2, 3), (2, 0), (2, 1)],
    "the base alone": [(2, 0), (3, 0)],
    "one": [(4, 2)],
}
IN, OUT = 5, 6


class Case:
    """Operands that all require a gradient, and the rows in a shuffled order or none."""

    def __init__(
        self,
        shape: list[tuple[int, int]],
        shuffled: bool,
        share: tuple[int, ...] = (3,),
        scale: float | None = None,
        dropped: bool = False,
        dtype: torch.dtype = torch.float64,
    ):
        rows = sum(count for count, _ in shape)
        self.x = torch.randn(rows, *share, IN, dtype=dtype, requires_grad=True)
        self.weight = torch.randn(OUT, IN, dtype=dtype, requires_grad=True)
        self.bias = torch.randn(OUT, dtype=dtype, requires_grad=True)
        self.factors = [
            torch.randn(size, dtype=dtype, requires_grad=True)
            for _, rank in shape if rank for size in ((rank, IN), (OUT, rank))
        ]  # fmt: skip
        scales = tuple((scale or 0.3 + i) if rank else None for i, (_, rank) in enumerate(shape))
        order = torch.randperm(rows) if shuffled else None
        self.segments = Segments(
            tuple(count for count, _ in shape), scales, order, None if order is None else order.argsort()
        )
        self.shape = shape
        of_row = torch.randn(rows, *share, IN, dtype=dtype) * (torch.rand(rows, *share, IN) > 0.3)
        self.multiplier = of_row if dropped else torch.ones_like(of_row)
        in_order = self.multiplier if order is None else self.multiplier[order]
        self.keep = in_order.reshape(-1, IN) if dropped else None

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.factors[::2], self.factors[1::2], strict=True))

    @property
    def operands(self) -> list[Tensor]:
        return [self.x, self.weight, self.bias, *self.factors]

    def run(self) -> Tensor:
        return lora_linear_rows(self.x, self.weight, self.bias, self.pairs, self.segments, keep=self.keep)

    def by_row(self) -> Tensor:
        """Row after row: W x + b, and s B A x where the row has a pair, x there as it was dropped from."""
        order = range(len(self.x)) if self.segments.order is None else self.segments.order.tolist()
        y: list[Any] = [None] * len(self.x)
        pairs, at = iter(self.pairs), iter(order)
        for (count, rank), scale in zip(self.shape, self.segments.scales, strict=True):
            A, B = next(pairs) if rank else (None, None)
            for _ in range(count):
                row = next(at)
                y[row] = self.x[row] @ self.weight.T + self.bias
                if A is not None and B is not None and scale is not None:
                    y[row] = y[row] + scale * (self.x[row] * self.multiplier[row] @ A.T @ B.T)
        return torch.stack(y)


cases = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
orders = pytest.mark.parametrize("shuffled", [False, True], ids=["sorted", "shuffled"])
dropping = pytest.mark.parametrize("dropped", [False, True], ids=["all", "dropped"])


class Marked(Tensor):
    """A subclass, as libraries make them for tensors that are more than their values."""


def test_it_serves_dense_tensors_of_one_dtype_outside_of_what_gives_operations_another_meaning():
    case = Case(SHAPES["unlike"], shuffled=False, dtype=torch.float32)
    x, weight, factors = case.x, case.weight, case.factors
    assert serves_rows(x, weight, factors)
    assert serves_rows(x, weight, [])
    assert serves_rows(x, weight, [torch.nn.Parameter(factor) for factor in factors])
    assert not serves_rows(x, weight, factors, dropping=True)
    assert not serves_rows(x.double(), weight, factors)
    assert not serves_rows(x.double(), weight.double(), factors)
    assert not serves_rows(x, weight, [*factors[:-1], factors[-1].half()])
    assert not serves_rows(x.transpose(0, 1), weight, factors)
    assert not serves_rows(x, weight, [*factors[:-1], factors[-1].detach().as_subclass(Marked)])
    with torch.autocast("cpu", torch.bfloat16):
        assert not serves_rows(x, weight, factors)
    asked = []
    torch.func.vmap(lambda x: asked.append(serves_rows(x, weight.detach(), [])) or x)(x.detach())
    torch.func.vmap(lambda y: asked.append(serves_rows(x, weight, factors)) or y)(x.detach())
    assert asked == [False, False]


@cases
@orders
@dropping
@pytest.mark.parametrize("share", [(), (3,), (2, 2)], ids=str)
def test_each_row_gives_what_its_own_pair_gives(shape, shuffled, share, dropped):
    case = Case(shape, shuffled, share, dropped=dropped)
    same_with_gradients(case.run, case.by_row(), case.operands)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("name", ["alike", "unlike"])
def test_one_scale_for_all(name, scale):
    case = Case(SHAPES[name], shuffled=True, scale=scale)
    same_with_gradients(case.run, case.by_row(), case.operands)


@cases
@dropping
def test_only_what_needs_a_gradient_gets_one(shape, dropped):
    for needed in range(3 + 2 * sum(rank > 0 for _, rank in shape)):
        case = Case(shape, shuffled=True, dropped=dropped)
        expected = torch.autograd.grad(case.by_row().square().sum(), case.operands)[needed]
        for at, operand in enumerate(case.operands):
            operand.requires_grad_(at == needed)
        case.run().square().sum().backward()
        assert [at for at, operand in enumerate(case.operands) if operand.grad is not None] == [needed]
        torch.testing.assert_close(case.operands[needed].grad, expected, rtol=0, atol=1e-11)


class Products(TorchDispatchMode):
    """The shapes of the products of matrices that were computed."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        self.shapes += [tuple(result.shape)] if "mm" in func.name() else []
        return result


@pytest.mark.parametrize("name", ["alike", "unlike"])
def test_what_is_frozen_has_no_gradient_computed(name):
    for frozen, shape in ((0, (6 * 7, IN)), (1, (OUT, IN))):
        case = Case(SHAPES[name], shuffled=False, share=(7,))
        for needed in (True, False):
            case.operands[frozen].requires_grad_(needed)
            y = case.run()
            with Products() as products:
                y.sum().backward()
            assert (shape in products.shapes) == needed


@cases
@orders
@dropping
def test_gradients_of_gradients(shape, shuffled, dropped):
    case = Case(shape, shuffled, (2,), dropped=dropped)
    found, expected = (first_and_second(y, case.operands) for y in (case.run(), case.by_row()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["alike, other ranks", "the base too", "the base alone"])
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (1, 2), (3,), (1, 4), (3, 6)], ids=str)
def test_gradients_of_gradients_where_only_some_learn(name, needed):
    case = Case(SHAPES[name], shuffled=True, share=(2,))
    for at, operand in enumerate(case.operands):
        operand.requires_grad_(at in needed)
    learned = [operand for operand in case.operands if operand.requires_grad]
    if not learned:
        return
    found, expected = (first_and_second(y, learned) for y in (case.run(), case.by_row()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["alike, other ranks", "the base too"])
def test_gradients_of_several_outputs_at_once_are_those_of_each(name):
    case = Case(SHAPES[name], shuffled=True)
    batched_as_one_by_one(case.run(), case.operands)


@pytest.mark.parametrize("needed", [(4,), (6,), (0, 4)], ids=["B", "another B", "x and B"])
def test_gradients_of_gradients_of_B_alone_are_refused(needed):
    case = Case(SHAPES["alike"], shuffled=True)
    for at, operand in enumerate(case.operands):
        operand.requires_grad_(at in needed)
    with pytest.raises(RuntimeError, match="lora_A"):
        torch.autograd.grad(case.run().sum(), case.operands[needed[-1]], create_graph=True)


@cases
@orders
def test_without_a_pair_that_acts_rows_have_the_bits_of_the_layer(shape, shuffled):
    case = Case(shape, shuffled)
    with torch.no_grad():
        for B in case.factors[1::2]:
            B.zero_()
        x = case.x if case.segments.order is None else case.x[case.segments.order]
        y = F.linear(x, case.weight, case.bias)
        assert torch.equal(case.run(), y if case.segments.back is None else y[case.segments.back])


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "the base alone"])
def test_a_pair_that_is_not_finite_changes_no_bit_elsewhere(name):
    case = Case(SHAPES[name], shuffled=True)
    y = case.run()
    first = next(i for i, (_, rank) in enumerate(case.shape) if rank)
    at, count = sum(case.segments.counts[:first]), case.segments.counts[first]
    own = case.segments.order[at : at + count]
    others = torch.tensor([row for row in range(len(case.x)) if row not in own.tolist()], dtype=torch.long)
    loss = lambda y: y[others].square().sum()  # noqa: E731
    kept = [case.x, *case.factors[2:]]
    before = torch.autograd.grad(loss(y), kept, allow_unused=True) if len(others) else ()
    with torch.no_grad():
        for factor in case.factors[:2]:
            factor.fill_(float("nan"))
    later = case.run()
    assert torch.equal(later[others], y[others])
    assert later[own].isnan().all()
    after = torch.autograd.grad(loss(later), kept, allow_unused=True) if len(others) else ()
    for at, (one, other) in enumerate(zip(before, after, strict=True)):
        if at == 0:
            one, other = one[others], other[others]
        assert torch.equal(one, other)


@cases
@orders
def test_backward_under_autocast_and_of_a_gradient_that_lies_apart_is_the_same(shape, shuffled):
    case = Case(shape, shuffled, dtype=torch.float32)
    found = case.run()
    given = torch.randn(OUT, *found.shape[:-1]).movedim(0, -1)
    assert not given.is_contiguous()
    plain = torch.autograd.grad(found, case.operands, given.contiguous(), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        again = torch.autograd.grad(found, case.operands, given)
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("counts", [(3, 3), (2, 4)], ids=["alike", "unlike"])
def test_a_scale_is_not_rounded_to_the_dtype_of_the_rows(counts):
    """10/3 in bfloat16 is 0.16 % less, and training and serving would disagree."""
    one, scales = torch.ones(1, 1, dtype=torch.bfloat16), (10 / 3, 0.7)
    x = torch.randn(6, 200, 1, dtype=torch.bfloat16)
    y = lora_linear_rows(x, one * 0, None, [(one, one)] * 2, Segments(counts, scales))
    expected = [part * scale for part, scale in zip(x.split(counts), scales, strict=True)]
    assert torch.equal(y, torch.cat(expected))


@pytest.mark.parametrize("name", ["alike", "alike, other ranks"])
def test_gradients_are_laid_out_as_what_they_are_added_to(name):
    """Else autograd copies each of them."""
    case = Case(SHAPES[name], shuffled=True)
    gradients = torch.autograd.grad(case.run().sum(), case.factors)
    assert [gradient.stride() for gradient in gradients] == [factor.stride() for factor in case.factors]


def test_x_is_kept_itself_and_beside_it_products_of_the_rank_and_the_stacked_factors():
    case = Case([(4, 2), (4, 2)], shuffled=True, share=(50,))
    case.weight.requires_grad_(False)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        case.run()
    known = {operand.data_ptr() for operand in case.operands}
    extra = [tensor for tensor in kept if tensor.data_ptr() not in known]
    assert case.x.data_ptr() in {tensor.data_ptr() for tensor in kept}
    assert sum(tensor.numel() for tensor in extra) == 8 * 50 * 2 + sum(factor.numel() for factor in case.factors)


def test_orders_are_copied_to_a_device_once_and_not_at_all_where_nothing_needs_it():
    order, meta = torch.tensor([2, 0, 1]), torch.device("meta")
    shuffled, in_order = Segments((1, 2), (2.0, None), order, order.argsort()), Segments((1, 2), (2.0, None))
    there = shuffled.to(meta)
    assert there is shuffled.to(meta)
    assert there.order is not None
    assert there.back is not None
    assert (there.order.device, there.back.device) == (meta, meta)
    assert (there.counts, there.scales) == (shuffled.counts, shuffled.scales)
    assert shuffled.to(order.device) is shuffled
    assert in_order.to(meta) is in_order
    alike = Segments((1, 1), (2.0, 0.5))
    assert alike.paired_scales(meta).device == meta
    assert alike.scale_column(torch.empty(1, device=meta)).device == meta


@pytest.mark.parametrize("name", ["alike", "unlike"])
def test_on_the_meta_device_results_have_their_shapes(name):
    case = Case(SHAPES[name], shuffled=True)
    weight, x = (operand.detach().to("meta") for operand in (case.weight, case.x))
    factors = [factor.detach().to("meta").requires_grad_() for factor in case.factors]
    pairs = list(zip(factors[::2], factors[1::2], strict=True))
    y = lora_linear_rows(x, weight, None, pairs, case.segments)
    y.sum().backward()
    assert (y.device.type, y.shape) == ("meta", (*x.shape[:-1], OUT))
    assert [factor.grad.shape for factor in factors] == [factor.shape for factor in factors]


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (1.0, None, None)])
def test_another_number_of_pairs_than_of_segments_with_one_is_refused(scales):
    x, pair = torch.randn(3, 4), (torch.randn(2, 4), torch.randn(5, 2))
    with pytest.raises(ValueError, match="2 pairs"):
        lora_linear_rows(x, torch.randn(5, 4), None, [pair, pair], Segments((1, 1, 1), scales))


def test_another_number_of_scales_than_of_counts_is_refused():
    with pytest.raises(ValueError, match=r"2.*1"):
        Segments((3, 3), (1.0,))


def test_tables_are_made_once_and_have_a_place_for_each_pair():
    segments, cpu = Segments((3, 4, 5), (1.0, None, 2.0)), torch.device("cpu")
    blocks = segments.blocks(2, 16, 4, cpu)
    assert segments.blocks(2, 16, 4, cpu) is blocks
    assert len(blocks.parts) == 2
    assert [(adapter, last - first) for adapter, first, last, _ in blocks.table.tolist()] == [(0, 6), (1, 10), (-1, 8)]

"""Bottlenecks of their own for blocks of rows: equal to each block by itself, output and gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor

from peftlib.kernels import bottleneck, bottleneck_rows
from support.rows import batched_as_one_by_one, first_and_second, same_with_gradients

pytestmark = pytest.mark.mutants

BLOCKS, ROWS, IN, WIDTH, OUT = 3, 4, 5, 2, 5
ACTIVATIONS = ["relu", "gelu", "gelu_tanh", "silu", "tanh", "identity"]
SCALES = {"one": (1.0, 1.0, 1.0), "two": (2.0, 2.0, 2.0), "others": (0.3, 1.0, 2.7)}


class Case:
    """Operands that all require a gradient. `onto` is what the result is added to: x itself, another, or nothing."""

    def __init__(
        self, onto: str, scales: str = "others", activation: str = "gelu", dtype: torch.dtype = torch.float64
    ) -> None:
        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=dtype, requires_grad=True)

        self.x, self.scales, self.activation = drawn(BLOCKS, ROWS, IN), SCALES[scales], activation
        self.residual = {"x": self.x, "another": drawn(BLOCKS, ROWS, OUT), "nothing": None}[onto]
        self.own = [
            [drawn(WIDTH, IN), drawn(WIDTH), drawn(OUT, WIDTH), drawn(OUT)] for _ in range(BLOCKS)
        ]  # fmt: skip
        self.weights = [weight for own in self.own for weight in own]
        self.operands = [self.x, *([self.residual] if onto == "another" else []), *self.weights]

    def run(self) -> Tensor:
        return bottleneck_rows(
            self.x, self.weights, residual=self.residual, activation=self.activation, scales=self.scales
        )

    def by_block(self) -> Tensor:
        found = []
        for at, (own, scale) in enumerate(zip(self.own, self.scales, strict=True)):
            residual = None if self.residual is None else self.residual[at]
            found.append(bottleneck(self.x[at], *own, residual=residual, activation=self.activation, scale=scale))
        return torch.stack(found)


ontos = pytest.mark.parametrize("onto", ["x", "another", "nothing"])


@ontos
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_block_gives_what_its_own_bottleneck_gives(onto, scales, activation):
    case = Case(onto, scales, activation)
    same_with_gradients(case.run, case.by_block(), case.operands)


@ontos
def test_only_what_needs_a_gradient_gets_one(onto):
    for needed in range(len(Case(onto).operands)):
        case = Case(onto)
        expected = torch.autograd.grad(case.by_block().square().sum(), case.operands)[needed]
        for at, operand in enumerate(case.operands):
            operand.requires_grad_(at == needed)
        case.run().square().sum().backward()
        assert [at for at, operand in enumerate(case.operands) if operand.grad is not None] == [needed]
        torch.testing.assert_close(case.operands[needed].grad, expected, rtol=0, atol=1e-11)


@ontos
@pytest.mark.parametrize("needed", [range(14), (0,), (1,), (2, 4), (-1,)], ids=str)
def test_gradients_of_gradients(onto, needed):
    case = Case(onto, activation="tanh")
    learned = [case.operands[at] for at in needed if at < len(case.operands)]
    expected = first_and_second(case.by_block(), learned)
    for operand in case.operands:
        operand.requires_grad_(any(operand is each for each in learned))
    for one, other in zip(first_and_second(case.run(), learned), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@ontos
def test_gradients_of_several_outputs_at_once_are_those_of_each(onto):
    case = Case(onto)
    batched_as_one_by_one(case.run(), case.operands)


@ontos
def test_what_is_not_finite_in_one_block_changes_no_bit_of_another(onto):
    case = Case(onto)

    def run() -> tuple[Any, ...]:
        y = case.run()
        gradients = torch.autograd.grad(y[1:].square().sum(), case.operands, allow_unused=True)
        x, *rest = gradients
        return y, x[1:], *rest[-4 * (BLOCKS - 1) :]

    before = run()
    with torch.no_grad():
        for weight in case.own[0]:
            weight.fill_(float("nan"))
        case.x[0, 0] = float("inf")
    after = run()
    assert after[0][0].isnan().all()
    for one, other in zip((before[0][1:], *before[1:]), (after[0][1:], *after[1:]), strict=True):
        assert torch.equal(one, other)


@ontos
def test_backward_under_autocast_and_of_a_gradient_that_lies_apart_is_the_same(onto):
    case = Case(onto, dtype=torch.float32)
    found = case.run()
    given = torch.randn(OUT, BLOCKS, ROWS).movedim(0, -1)
    assert not given.is_contiguous()
    plain = torch.autograd.grad(found, case.operands, given.contiguous(), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        again = torch.autograd.grad(found, case.operands, given)
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


@ontos
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_no_more_than_each_step_does(onto, dtype):
    """Among positive numbers nothing cancels, and four roundings to the dtype lie between: up·s, the product with down,
    that with up, and the sum with what it is added to."""
    case, exact = Case(onto, activation="relu", dtype=dtype), Case(onto, activation="relu")
    for operand, own in zip(exact.operands, case.operands, strict=True):
        own.data = own.data.abs()
        operand.data = own.data.double()
    found, expected = case.run(), exact.by_block()
    given = torch.rand_like(found)
    gradients = torch.autograd.grad(found, case.operands, given)
    wanted = torch.autograd.grad(expected, exact.operands, given.double())
    assert {found.dtype, *(gradient.dtype for gradient in gradients)} == {dtype}
    for one, other in zip((found, *gradients), (expected, *wanted), strict=True):
        assert ((one - other).abs() <= 4 * torch.finfo(dtype).eps / 2 * other).all()


def test_gradients_are_laid_out_as_what_they_are_added_to():
    """Else autograd copies each of them."""
    case = Case("x")
    gradients = torch.autograd.grad(case.run().sum(), case.operands)
    assert [gradient.stride() for gradient in gradients] == [operand.stride() for operand in case.operands]


def test_x_is_kept_itself_and_beside_it_only_what_is_as_wide_as_the_bottleneck():
    case = Case("another")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        case.run()
    known = {operand.data_ptr() for operand in case.operands}
    extra = [tensor for tensor in kept if tensor.data_ptr() not in known]
    assert case.x.data_ptr() in {tensor.data_ptr() for tensor in kept}
    assert sum(tensor.numel() for tensor in extra) == BLOCKS * ROWS * WIDTH + BLOCKS


def test_on_the_meta_device_results_have_their_shapes():
    case = Case("x")
    weights = [weight.detach().to("meta").requires_grad_() for weight in case.weights]
    x = case.x.detach().to("meta")
    y = bottleneck_rows(x, weights, residual=x, scales=case.scales)
    y.sum().backward()
    assert (y.device.type, y.shape) == ("meta", x.shape)
    assert [weight.grad.shape for weight in weights] == [weight.shape for weight in weights]

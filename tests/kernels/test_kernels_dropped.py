"""A function of a dropped input: one mask forward and back, and nothing kept but the input and the seed."""

import doctest
import sys

import pytest
import torch
from torch.nn import functional as F

from peftlib.kernels import dropped

pytestmark = pytest.mark.mutants


def convolve(x, weight):
    return F.conv2d(x, weight, padding=1)


def mask_of(shape, p, seed):
    """The mask that `dropped` draws after this seed, scaled, as it comes out when the function is the identity."""
    torch.manual_seed(seed)
    return dropped(lambda x: x * 1, torch.ones(shape, dtype=torch.float64), dropout=p)


def tensors(shape=(2, 3, 5, 6), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, (4, 3, 3, 3))
    return [torch.randn(size, generator=generator, dtype=dtype, requires_grad=True) for size in sizes]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_mask_keeps_its_share_and_scales_the_rest(p):
    mask = mask_of((4, 16, 60, 60), p, 1)
    assert set(mask.unique().tolist()) == {0.0, 1 / (1 - p)}
    deviation = (p / (1 - p) / mask.numel()) ** 0.5  # of the mean of independent elements
    assert abs(mask.mean().item() - 1) < 4 * deviation


@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (3, 5, 6)])
def test_output_and_gradients_are_those_of_the_mask_that_ran(shape):
    x, weight = tensors(shape)
    torch.manual_seed(7)
    y = dropped(convolve, x, weight, dropout=0.3)
    expected = convolve(x * mask_of(shape, 0.3, 7), weight)
    gradient = torch.randn_like(y)
    assert torch.equal(y, expected)
    for found, right in zip(
        torch.autograd.grad(y, [x, weight], gradient), torch.autograd.grad(expected, [x, weight], gradient), strict=True
    ):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


def test_inside_a_functional_transform_a_mask_is_drawn_too():
    x, weight = (tensor.detach() for tensor in tensors())
    dx = torch.func.grad(lambda x: dropped(lambda a, b: a * b.sum(), x, weight, dropout=0.5).sum())(x)
    kept = dx != 0
    assert 0 < kept.count_nonzero() < kept.numel()
    assert torch.equal(dx, kept.double() * 2 * weight.sum()), "what is kept counts 1/(1 - p) times"


def test_two_draws_differ_and_a_seed_repeats_one():
    assert not torch.equal(mask_of((3, 64), 0.5, 1), mask_of((3, 64), 0.5, 2))
    assert torch.equal(mask_of((3, 64), 0.5, 1), mask_of((3, 64), 0.5, 1))


def test_gradients_of_both_orders_pass_gradcheck():
    def seeded(x, weight):
        torch.manual_seed(3)
        return dropped(lambda a, b: convolve(a, b).tanh(), x, weight, dropout=0.4)

    x, weight = tensors((1, 3, 3, 3))
    assert torch.autograd.gradcheck(seeded, (x, weight))
    assert torch.autograd.gradgradcheck(seeded, (x, weight))


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_needs_no_gradient_gets_none(frozen):
    inputs = tensors()
    inputs[frozen].requires_grad_(False)
    dropped(convolve, *inputs, dropout=0.3).sum().backward()
    assert inputs[frozen].grad is None
    other = inputs[1 - frozen].grad
    assert other is not None
    assert other.abs().sum() > 0


def test_only_the_input_and_the_seed_are_kept():
    x, weight = tensors((4, 3, 32, 32), torch.float32)
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = dropped(convolve, x, weight, dropout=0.3)
    assert y.requires_grad
    keys = 4 * (4 * 3 + 32 * 32 // 4)  # bytes: one int32 a plane, one for four pixels
    assert sum(kept.values()) == x.nbytes + weight.nbytes + keys


def test_under_autocast_forward_and_backward_compute_alike():
    x, weight = tensors(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(5)
        y = dropped(convolve, x, weight, dropout=0.3)
        expected = convolve(x * mask_of(x.shape, 0.3, 5).float(), weight)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    for found, right in zip(
        torch.autograd.grad(y.float().sum(), [x, weight]),
        torch.autograd.grad(expected.float().sum(), [x, weight]),
        strict=True,
    ):
        assert torch.equal(found, right)


def test_compiled_it_is_one_graph():
    x, weight = tensors(dtype=torch.float32)
    compiled = torch.compile(lambda a, b: dropped(convolve, a, b, dropout=0.3), fullgraph=True, backend="aot_eager")
    assert compiled(x, weight).shape == (2, 4, 5, 6)
    torch._dynamo.reset()


def test_the_example_runs():
    names = {"torch": torch, "dropped": dropped}
    assert doctest.testmod(sys.modules[dropped.__module__], extraglobs=names).failed == 0


def test_without_dropout_it_is_the_function_itself():
    x, weight = tensors()
    assert torch.equal(dropped(convolve, x, weight, dropout=0.0), convolve(x, weight))

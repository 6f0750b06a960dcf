"""LoRA on a convolution: right in every geometry, with one mask forward and back, and little kept."""

import doctest
import itertools
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from peftlib.kernels import dropped, lora_convolution

pytestmark = pytest.mark.mutants

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SCALE = 1.5
# size, kernel, stride, padding, dilation
GEOMETRIES = [
    ((11,), (3,), (1,), (1,), (1,)),
    ((12,), (4,), (3,), (0,), (2,)),
    ((7, 6), (3, 3), (1, 1), (1, 1), (1, 1)),
    ((7, 6), (1, 1), (1, 1), (0, 0), (1, 1)),
    ((7, 6), (1, 1), (1, 1), (2, 1), (1, 1)),  # more padding than the kernel reaches
    ((9, 10), (3, 2), (2, 1), (0, 1), (1, 2)),
    ((9, 10), (2, 3), (1, 1), (1, 4), (3, 2)),
    ((4, 5, 6), (3, 1, 2), (1, 1, 1), (1, 0, 0), (1, 1, 1)),
]
geometries = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)


def problem(geometry=GEOMETRIES[2], dtype=torch.float64, channels=3, out=5, rank=2, batch=2):
    size, kernel, stride, padding, dilation = geometry
    generator = torch.Generator().manual_seed(0)
    x, A, B, weight = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in (
            (batch, channels, *size),
            (rank, channels, *kernel),
            (out, rank, *[1] * len(kernel)),
            (out, channels, *kernel),
        )
    )
    y = CONVOLVE[len(size)](x, weight, None, stride, padding, dilation)
    return [tensor.requires_grad_() for tensor in (y, x, A, B)], (stride, padding, dilation)


def right(y, x, A, B, geometry, keep=1.0, scale=SCALE):
    convolve = CONVOLVE[x.dim() - 2]
    return y + scale * convolve(convolve(x * keep, A, None, *geometry), B)


def mask_of(x: Tensor, p: float, seed: int) -> Tensor:
    """The mask that a seed gives, scaled: `dropped` draws the same one."""
    torch.manual_seed(seed)
    return dropped(lambda ones: ones * 1, torch.ones_like(x), dropout=p)


def assert_equal_within_rounding(found, inputs, geometry, gradient, keep):
    """Each element within the roundings of the sums that it is of, by the same sums over absolute values."""
    wide, size = ([tensor.detach().double() for tensor in inputs] for _ in range(2))
    size = [tensor.abs() for tensor in size]
    results = []
    for leaves, seen in ((wide, gradient.double()), (size, gradient.double().abs())):
        leaves = [leaf.requires_grad_() for leaf in leaves]
        y = right(*leaves, geometry, keep)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, seen)])
    summed = inputs[0].numel() + inputs[2].numel()
    for value, exact, magnitude in zip(found, *results, strict=True):
        assert value.shape == exact.shape
        bound = summed * torch.finfo(value.dtype).eps * magnitude + torch.finfo(value.dtype).tiny
        assert ((value.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@geometries
def test_output_and_gradients_are_those_of_two_convolutions(geometry, dtype, p):
    inputs, geometry = problem(geometry, dtype)
    torch.manual_seed(7)
    y = lora_convolution(*inputs, SCALE, *geometry, dropout=p, training=True)
    assert y.dtype == dtype
    gradient = torch.randn_like(y)
    keep = mask_of(inputs[1].detach().double(), p, 7) if p else 1.0
    found = [y.detach(), *torch.autograd.grad(y, inputs, gradient)]
    assert_equal_within_rounding(found, inputs, geometry, gradient, keep)


@geometries
def test_where_B_is_zero_not_a_bit_changes(geometry):
    (y, x, A, B), geometry = problem(geometry, torch.float32)
    for p, channels_last in itertools.product((0.0, 0.4), (False, True)):
        if channels_last and x.dim() != 4:
            continue
        given = x.to(memory_format=torch.channels_last) if channels_last else x
        assert torch.equal(lora_convolution(y, given, A, torch.zeros_like(B), SCALE, *geometry, p, True), y)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("geometry", [GEOMETRIES[0], GEOMETRIES[5]], ids=str)
def test_gradients_of_both_orders_pass_gradcheck(geometry, p):
    inputs, geometry = problem(geometry, channels=2, out=2, rank=1, batch=1)

    def seeded(*inputs):
        torch.manual_seed(3)
        return lora_convolution(*inputs, SCALE, *geometry, p, True).tanh()

    assert torch.autograd.gradcheck(seeded, inputs)
    assert torch.autograd.gradgradcheck(seeded, inputs)


@pytest.mark.parametrize("learning", list(itertools.product([False, True], repeat=4))[1:], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_what_needs_no_gradient_gets_none_and_the_others_are_as_before(learning, p):
    inputs, geometry = problem()
    torch.manual_seed(5)
    expected = torch.autograd.grad(lora_convolution(*inputs, SCALE, *geometry, p, True).sum(), inputs)
    some = [tensor.detach().requires_grad_(learns) for tensor, learns in zip(inputs, learning, strict=True)]
    torch.manual_seed(5)
    lora_convolution(*some, SCALE, *geometry, p, True).sum().backward()
    for tensor, gradient, learns in zip(some, expected, learning, strict=True):
        assert torch.equal(tensor.grad, gradient) if learns else tensor.grad is None


def test_only_x_the_rank_r_product_and_the_seed_are_kept():
    (y, x, A, B), geometry = problem(((32, 32), *GEOMETRIES[2][1:]), torch.float32, channels=4, rank=2, batch=3)
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = lora_convolution(y, x, A, B, SCALE, *geometry, 0.3, True)
    assert out.requires_grad
    keys = 4 * (3 * 4 + 32 * 32 // 4)  # bytes: one int32 a plane, one for four pixels
    product = 4 * 3 * 2 * 32 * 32
    assert sum(kept.values()) == x.nbytes + A.nbytes + B.nbytes + product + keys


def test_without_gradients_and_under_checkpointing_the_mask_is_the_same():
    inputs, geometry = problem()

    def layer(*inputs):
        return lora_convolution(*inputs, SCALE, *geometry, 0.4, True)

    def seeded(call):
        torch.manual_seed(9)
        return call()

    with torch.no_grad():
        quiet = seeded(lambda: layer(*inputs))
    y = seeded(lambda: layer(*inputs))
    again = seeded(lambda: checkpoint(layer, *inputs, use_reentrant=False))
    assert torch.equal(quiet, y)
    assert torch.equal(again, y)
    for one, other in zip(
        torch.autograd.grad(y.square().sum(), inputs), torch.autograd.grad(again.square().sum(), inputs), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, at its first forward-mode AD
def test_functional_transforms_and_forward_mode_see_the_plain_form():
    inputs, geometry = problem()
    constant = [tensor.detach() for tensor in inputs]

    def loss(A, B):
        return lora_convolution(*constant[:2], A, B, SCALE, *geometry).square().sum()

    expected = torch.autograd.grad(right(*constant[:2], *inputs[2:], geometry).square().sum(), inputs[2:])
    for found, exact in zip(torch.func.grad(loss, argnums=(0, 1))(*constant[2:]), expected, strict=True):
        torch.testing.assert_close(found, exact)
    tangent = torch.func.jvp(loss, tuple(constant[2:]), tuple(torch.ones_like(one) for one in constant[2:]))[1]
    torch.testing.assert_close(tangent, torch.stack([gradient.sum() for gradient in expected]).sum())
    stacked = [torch.stack([one, 2 * one]) for one in constant[2:]]
    mapped = torch.func.vmap(loss)(*stacked)
    torch.testing.assert_close(mapped, torch.stack([loss(*constant[2:]), loss(*(2 * one for one in constant[2:]))]))


def test_mapped_gradients_are_those_of_each_row():
    inputs, geometry = problem()
    y = lora_convolution(*inputs, SCALE, *geometry)
    rows = torch.randn(3, *y.shape, dtype=y.dtype)
    mapped = torch.autograd.grad(y, inputs, rows, is_grads_batched=True, retain_graph=True)
    for number, row in enumerate(rows):
        for found, exact in zip(mapped, torch.autograd.grad(y, inputs, row, retain_graph=True), strict=True):
            torch.testing.assert_close(found[number], exact)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_compiled_it_is_one_graph(p):
    inputs, geometry = problem(dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(lora_convolution, fullgraph=True, backend="aot_eager")
    y = compiled(*inputs, SCALE, *geometry, p, True)
    assert all(gradient.any() for gradient in torch.autograd.grad(y.sum(), inputs))
    if not p:
        torch.testing.assert_close(y, right(*inputs, geometry), rtol=1e-4, atol=1e-4)


def test_under_autocast_it_rounds_as_the_convolution_does():
    (y, x, A, B), geometry = problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = lora_convolution(y.bfloat16(), x, A, B, SCALE, *geometry, 0.4, True)
    assert found.dtype == torch.bfloat16
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(found.float().sum(), [x, A, B]))


def test_an_operation_in_place_may_follow():
    inputs, geometry = problem()
    expected = torch.autograd.grad(lora_convolution(*inputs, SCALE, *geometry).relu().sum(), inputs)
    found = torch.autograd.grad(lora_convolution(*inputs, SCALE, *geometry).relu_().sum(), inputs)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_dropout_of_everything_leaves_the_base():
    inputs, geometry = problem()
    y = lora_convolution(*inputs, SCALE, *geometry, 1.0, True)
    assert torch.equal(y, inputs[0])
    assert not any(gradient.any() for gradient in torch.autograd.grad(y.sum(), inputs[1:]))


def test_the_example_runs():
    names = {"torch": torch, "lora_convolution": lora_convolution}
    assert doctest.testmod(sys.modules[lora_convolution.__module__], extraglobs=names).failed == 0

"""LoRA's hot path against the dense float64 reference: values, gradients, what is kept, and how it is called.

Tolerance: every output and every gradient is a sum of products of the inputs. The same sum over the absolute values,
its magnitude, bounds the rounding error: n additions in an accumulator of epsilon e err by at most n·e·magnitude, and
each of up to 8 roundings to the dtype (factor casts, h, g, y, the gradients) by one epsilon of that dtype.
"""

import doctest
import itertools
import sys
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import peftlib
from peftlib.kernels import dispatch, join_pairs, lora_add, lora_embedding, lora_linear
from peftlib.kernels.dropout import KeepMask, draw_seed, draw_small
from peftlib.kernels.lora import aten, linear, reference, small

pytestmark = pytest.mark.mutants

SCALE = 1.5
ROUNDINGS = 8
ALL = ("x", "weight", "bias", "lora_A", "lora_B")
# (leading shape, in, out, rank): the first four run as plain ops where no dropout is asked for, the others do not.
SHAPES = [
    ((), 17, 5, 3),
    ((1,), 33, 17, 4),
    ((2, 3), 16, 24, 8),
    ((31,), 65, 33, 2),
    ((383,), 129, 131, 8),
    ((3, 79), 260, 193, 16),
    ((5, 1, 200), 64, 128, 1),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def problem(leading=(3, 79), features=260, out=193, rank=8, dtype=torch.float32, bias=True, factor_dtype=None):
    generator = torch.Generator().manual_seed(features)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    factor_dtype = factor_dtype or dtype
    tensors = {
        "x": draw(*leading, features).to(dtype),
        "weight": (draw(out, features) * features**-0.5).to(dtype),
        "bias": draw(out).to(dtype) if bias else None,
        "lora_A": (draw(rank, features) * features**-0.5).to(factor_dtype),
        "lora_B": draw(out, rank).to(factor_dtype),
    }
    return tensors, draw(*leading, out).to(dtype)


def place(tensor):
    return tensor.untyped_storage().data_ptr()


def run(function, tensors, gradient, wanted=ALL):
    """Gives [y, gradients of `wanted`...] of function(**tensors)."""
    leaves = {name: tensor if tensor is None else tensor.detach() for name, tensor in tensors.items()}
    leaves = {name: leaf.requires_grad_(name in wanted) if leaf is not None else leaf for name, leaf in leaves.items()}
    y = function(**leaves)
    inputs = [leaf for name in wanted if (leaf := leaves[name]) is not None]
    return [y.detach(), *torch.autograd.grad(y, inputs, gradient)]


def assert_close_to_dense(got, tensors, gradient, keep=None, dropout=0.0, wanted=ALL, scale=SCALE):
    wide = {name: tensor if tensor is None else tensor.double() for name, tensor in tensors.items()}
    size = {name: tensor if tensor is None else tensor.abs() for name, tensor in wide.items()}
    keep = None if keep is None else keep.double()
    dense = partial(reference.lora_linear, scale=scale, dropout=dropout, keep=keep)
    expected = run(dense, wide, gradient.double(), wanted)
    magnitude = run(dense, size, gradient.double().abs(), wanted)
    dtype = tensors["x"].dtype
    additions = sum(tensors["weight"].shape) + gradient.numel() // gradient.shape[-1] + 64
    accumulator = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    tolerance = additions * accumulator + ROUNDINGS * torch.finfo(dtype).eps
    # Numbers below the smallest normal one of the dtype round by an absolute amount.
    floor = torch.finfo(dtype).tiny
    for name, value, right, bound in zip(("y", *wanted), got, expected, magnitude, strict=False):
        assert value.shape == right.shape, name
        excess = (value.double() - right).abs() - tolerance * bound - floor
        assert (excess <= 0).all(), f"{name}: {excess.max():.3g} over the bound"


@pytest.fixture(params=["dense", "steps", "steps in blocks"])
def route(request, monkeypatch):
    """Runs a test on each: which of them a call takes depends on its size, its dtype and the processor."""
    if request.param != "dense":
        monkeypatch.setattr(dispatch, "is_dense", lambda *_: False)
        monkeypatch.setattr(dispatch, "is_small", lambda *_: False)
    if request.param == "steps in blocks":
        monkeypatch.setattr(aten, "_block_rows", lambda *_: 4)
    return request.param


def mask_of(tensors, dropout):
    """The mask that the next call on `tensors` will draw; leaves the generator as it was."""
    state = torch.get_rng_state()
    rows = tensors["x"].reshape(-1, tensors["x"].shape[-1])
    if dispatch.is_dense(tensors["x"], tensors["weight"], dropout):
        keep = draw_small(rows, dropout)
    else:
        keep = aten.keep_mask(rows, dropout, draw_seed(rows))
    torch.set_rng_state(state)
    return keep.reshape(tensors["x"].shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_equal_the_dense_form(shape, dropout, dtype, route):
    for bias in (True, False):
        tensors, gradient = problem(*shape, dtype=dtype, bias=bias)
        wanted = ALL if bias else ("x", "weight", "lora_A", "lora_B")
        keep = mask_of(tensors, dropout) if dropout else None
        got = run(partial(lora_linear, scale=SCALE, dropout=dropout, training=True), tensors, gradient, wanted)
        assert_close_to_dense(got, tensors, gradient, keep, dropout, wanted)


def added_to_linear(x, weight, bias, lora_A, lora_B, scale=SCALE, **options):
    return lora_add(F.linear(x, weight, bias), x, lora_A, lora_B, scale, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES)
def test_added_term_equals_the_dense_form(shape, dropout, dtype, route):
    tensors, gradient = problem(*shape, dtype=dtype)
    keep = mask_of(tensors, dropout) if dropout else None
    got = run(partial(added_to_linear, dropout=dropout, training=True), tensors, gradient)
    assert_close_to_dense(got, tensors, gradient, keep, dropout)


@pytest.mark.parametrize("call", [partial(lora_linear, scale=SCALE), added_to_linear], ids=["whole", "added"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES)
def test_without_gradients_the_value_is_the_same_and_so_is_the_mask(shape, dropout, call):
    tensors, gradient = problem(*shape)
    keep = mask_of(tensors, dropout) if dropout else None
    with torch.no_grad():
        y = call(**tensors, dropout=dropout, training=True)
    assert_close_to_dense([y], tensors, gradient, keep, dropout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_adapters_on_one_host_add_up(dtype):
    tensors, gradient = problem(rank=8, dtype=dtype)

    def twice(x, weight, bias, lora_A, lora_B):
        y = lora_linear(x, weight, bias, lora_A[:3], lora_B[:, :3], SCALE)
        return lora_add(y, x, lora_A[3:], lora_B[:, 3:], SCALE)

    def joined(x, weight, bias, lora_A, lora_B):
        pairs = [(lora_A[:3], lora_B[:, :3], SCALE), (lora_A[3:], lora_B[:, 3:], SCALE)]
        return lora_linear(x, weight, bias, *join_pairs(pairs), 1.0)

    for function in (twice, joined):
        assert_close_to_dense(run(function, tensors, gradient), tensors, gradient)


def test_a_build_that_does_not_know_has_no_native_half_precision(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    assert not aten._has_native.__wrapped__(torch.bfloat16)


@pytest.mark.parametrize("wanted", [("x",), ("lora_A",), ("lora_B",)])
def test_float32_route_gives_the_gradients_that_are_asked_for(wanted, monkeypatch):
    monkeypatch.setattr(aten, "_has_native", lambda dtype: False)
    tensors, gradient = problem(leading=(300,), features=520, dtype=torch.bfloat16)
    got = run(partial(lora_linear, scale=SCALE), tensors, gradient, wanted)
    assert_close_to_dense(got, tensors, gradient, wanted=wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_float32_route_of_processors_without_half_precision_is_right(dtype, dropout, monkeypatch):
    monkeypatch.setattr(aten, "_has_native", lambda dtype: False)
    tensors, gradient = problem(leading=(300,), features=520, dtype=dtype, factor_dtype=torch.float32)
    keep = mask_of(tensors, dropout) if dropout else None
    got = run(partial(lora_linear, scale=SCALE, dropout=dropout, training=True), tensors, gradient)
    assert_close_to_dense(got, tensors, gradient, keep, dropout)
    saved = kept(tensors, dropout=dropout, ignore=("lora_A", "lora_B"))
    assert not any(tensor.dtype == torch.float32 for tensor in saved)


LAYOUTS = {
    "transposed x": lambda t, g: ({**t, "x": t["x"].mT.contiguous().mT}, g),
    "every second column of x": lambda t, g: ({**t, "x": t["x"].repeat_interleave(2, -1)[..., ::2]}, g),
    "expanded x": lambda t, g: ({**t, "x": t["x"][:1, :1].expand_as(t["x"])}, g),
    "expanded gradient": lambda t, g: (t, g[:1, :1, :1].expand_as(g)),
    "transposed gradient": lambda t, g: (t, g.mT.contiguous().mT),
    "transposed weight": lambda t, g: ({**t, "weight": t["weight"].t().contiguous().t()}, g),
    "transposed factors": lambda t, g: ({**t, **{k: t[k].t().contiguous().t() for k in ("lora_A", "lora_B")}}, g),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("leading", [(2, 3), (3, 167)])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_memory_layout_does_not_matter(layout, leading, dropout, route):
    tensors, gradient = LAYOUTS[layout](*problem(leading=leading))
    keep = mask_of(tensors, dropout) if dropout else None
    got = run(partial(lora_linear, scale=SCALE, dropout=dropout, training=True), tensors, gradient)
    assert_close_to_dense(got, tensors, gradient, keep, dropout)

    def added(x, weight, bias, lora_A, lora_B):
        return lora_add(F.linear(x, weight, bias).mT.contiguous().mT, x, lora_A, lora_B, SCALE)

    assert_close_to_dense(run(added, tensors, gradient), tensors, gradient)


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)])
def test_empty_input_gives_empty_output_and_zero_gradients(leading, route):
    tensors, gradient = problem(leading=leading)
    call = partial(lora_linear, scale=SCALE, dropout=0.1, training=True)
    y, dx, *gradients = run(call, tensors, gradient)
    assert [y.shape, dx.shape] == [(*leading, 193), tensors["x"].shape]
    assert not any(value.any() for value in gradients)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_zero_lora_B_gives_the_bits_of_the_base(dtype, dropout):
    for tokens, features, out in itertools.product((1, 2, 7, 64, 129, 500), (1, 8, 100, 511), (1, 16, 77, 512)):
        for leading, bias in itertools.product(((tokens,), (1, tokens), ()), (True, False)):
            tensors, _ = problem(leading, features, out, 4, dtype, bias)
            tensors["lora_B"].zero_()
            assert_bits_of_base(tensors, dropout)


@pytest.mark.parametrize("layout", ["transposed x", "every second column of x", "expanded x", "transposed weight"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_lora_B_gives_the_bits_of_the_base_in_any_layout(layout, dtype, route):
    for leading, bias in itertools.product(((2, 3), (3, 167)), (True, False)):
        tensors, gradient = problem(leading, dtype=dtype, bias=bias)
        tensors["lora_B"].zero_()
        assert_bits_of_base(LAYOUTS[layout](tensors, gradient)[0], 0.1)


# Inputs as models hand them on, from a new tensor by batch b, tokens t and features k.
INPUTS = {
    "some tokens": lambda new, b, t, k: new(b, t + 3, k)[:, 1 : t + 1],
    "every second token": lambda new, b, t, k: new(b, 2 * t, k)[:, ::2],
    "some features": lambda new, b, t, k: new(b, t, k + 5)[..., 2 : k + 2],
    "every second feature": lambda new, b, t, k: new(b, t, 2 * k)[..., ::2],
    "tokens first": lambda new, b, t, k: new(t, b, k).transpose(0, 1),
    "features before tokens": lambda new, b, t, k: new(b, k, t).mT,
    "features first": lambda new, b, t, k: new(k, t, b).permute(2, 1, 0),
    "one batch for all": lambda new, b, t, k: new(1, t, k).expand(b, t, k),
    "an image": lambda new, b, t, k: new(b, k, 2, t).permute(0, 2, 3, 1),
    "heads before tokens": lambda new, b, t, k: new(b, t, 2, k).transpose(1, 2),
    "a transposed matrix": lambda new, b, t, k: new(k, b * t).t(),
    "a column": lambda new, b, t, k: new(k, 2)[:, 0],
}


@pytest.mark.parametrize("layout", INPUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_lora_B_gives_the_bits_of_the_base_on_any_slice(layout, dtype):
    torch.manual_seed(0)
    sizes = [(2, 5, 8, 6), (1, 7, 33, 17), (2, 3, 100, 130), (1, 1, 64, 64), (2, 64, 256, 512)]
    for (batch, tokens, features, out), bias in itertools.product(sizes, (True, False)):
        tensors, _ = problem((), features, out, 4, dtype, bias)
        tensors["lora_B"].zero_()
        x = INPUTS[layout](lambda *shape: torch.randn(shape).to(dtype), batch, tokens, features)
        for dropout in (0.0, 0.1):
            assert_bits_of_base({**tensors, "x": x}, dropout)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_token_with_zero_lora_B_gives_the_bits_of_the_base_at_every_size(dtype, bias):
    """Products with a vector serve where they sum as F.linear does; with a single input column they may not."""
    sizes = [1, 2, 3, 8, 17, 33, 64, 100, 128, 257, 512]
    for out, features in itertools.product(sizes, sizes):
        for leading in ((), (1,), (1, 1)):
            tensors, _ = problem(leading, features, out, 1, dtype, bias)
            tensors["lora_B"].zero_()
            assert_bits_of_base(tensors, 0.0)
            assert_bits_of_base({**tensors, "x": tensors["x"].repeat_interleave(2, -1)[..., ::2]}, 0.0)
    asked = [
        alike for (_, kind, without_bias, _), alike in small._ALIKE.items() if (kind, without_bias) == (dtype, not bias)
    ]
    assert asked, "no product with a vector was asked for, so this shows nothing"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(), (1,), (1, 1), (1, 1, 1)])
def test_one_token_equals_the_dense_form(leading, dtype, transposed):
    """As products with a vector where they serve, and where they do not."""
    tensors, gradient = problem(leading, dtype=dtype)
    if transposed:
        tensors["weight"] = tensors["weight"].t().contiguous().t()
    with torch.no_grad():
        y = lora_linear(**tensors, scale=SCALE)
    assert_close_to_dense([y], tensors, gradient)


def test_asking_the_machine_how_it_multiplies_draws_nothing_from_torchs_generator(monkeypatch):
    monkeypatch.setattr(small, "_ALIKE", {})
    before = torch.get_rng_state()
    tensors, _ = problem((1,))
    lora_linear(**tensors, scale=SCALE)
    assert small._ALIKE
    assert torch.equal(torch.get_rng_state(), before)


def assert_bits_of_base(tensors, dropout):
    base = F.linear(tensors["x"], tensors["weight"], tensors["bias"])
    for requires_grad in (True, False):
        tensors["lora_B"].requires_grad_(requires_grad)
        assert torch.equal(lora_linear(**tensors, scale=SCALE, dropout=dropout, training=True), base)
        assert torch.equal(lora_add(base, tensors["x"], tensors["lora_A"], tensors["lora_B"], SCALE), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("leading", [(2, 3), (300,)])
def test_float32_factors_on_a_half_precision_base_get_float32_gradients(dtype, leading, route):
    tensors, gradient = problem(leading, dtype=dtype, factor_dtype=torch.float32)
    got = run(partial(lora_linear, scale=SCALE), tensors, gradient)
    assert [value.dtype for value in got] == [dtype, dtype, dtype, dtype, torch.float32, torch.float32]
    assert_close_to_dense(got, tensors, gradient)


def kept(tensors, dropout=0.0, wanted=("x", "lora_A", "lora_B"), ignore=()):
    """The tensors that one call keeps for backward, one for each storage, without the inputs named in `ignore`."""
    storages = {}
    leaves = {name: tensor if tensor is None else tensor.detach() for name, tensor in tensors.items()}
    ignored = {place(leaf) for name in ignore if (leaf := leaves[name]) is not None}
    leaves = {name: leaf if leaf is None else leaf.requires_grad_(name in wanted) for name, leaf in leaves.items()}

    def pack(tensor):
        storages[place(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = lora_linear(**leaves, scale=SCALE, dropout=dropout, training=True)
    assert y.requires_grad
    return [tensor for pointer, tensor in storages.items() if pointer not in ignored]


def size_of(tensors):
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


PARAMETERS = ("weight", "bias", "lora_A", "lora_B")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_x_and_the_low_rank_activations_are_kept(dtype):
    tensors, _ = problem((4, 128), 512, 384, 8, dtype, factor_dtype=torch.float32)
    saved = kept(tensors, ignore=PARAMETERS)
    assert size_of(saved) == (tensors["x"].numel() + 512 * 8) * dtype.itemsize


def test_dropout_keeps_a_key_a_row_and_one_for_four_columns_more():
    tensors, _ = problem((4, 128), 512, 384, 8)
    assert size_of(kept(tensors, 0.1, ignore=(*PARAMETERS, "x"))) == 512 * 8 * 4 + (512 + 512 // 4) * 4


def test_x_is_not_kept_where_lora_A_is_frozen():
    tensors, _ = problem((4, 128), 512, 384, 8)
    for dropout in (0.0, 0.1):
        saved = kept(tensors, dropout, wanted=("x", "lora_B"), ignore=PARAMETERS)
        assert max(tensor.numel() for tensor in saved) <= 512 * 8


def test_low_rank_activations_are_not_kept_where_lora_B_is_frozen():
    tensors, _ = problem((4, 128), 512, 384, 8)
    assert kept(tensors, wanted=("x", "lora_A"), ignore=(*PARAMETERS, "x")) == []


SUBSETS = [c for n in (1, 2, 3) for c in itertools.combinations(("x", "lora_A", "lora_B"), n)]


@pytest.mark.parametrize("wanted", [*SUBSETS, ("weight",), ("bias",)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_any_subset_of_gradients_is_right(wanted, dropout, route):
    tensors, gradient = problem((300,))
    keep = mask_of(tensors, dropout) if dropout else None
    got = run(partial(lora_linear, scale=SCALE, dropout=dropout, training=True), tensors, gradient, wanted)
    assert_close_to_dense(got, tensors, gradient, keep, dropout, wanted)


class LargeTensors(TorchDispatchMode):
    """Counts the storages of at least `elements` elements that ops make, beside those of `known`."""

    def __init__(self, elements, *known):
        super().__init__()
        self.elements, self.known, self.held = elements, known, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # Held, so that no two have the same address.
        self.held += [out] if isinstance(out, Tensor) and out.numel() >= self.elements else []
        return out

    def count(self):
        pointers = [{place(tensor) for tensor in tensors} for tensors in (self.held, self.known)]
        return len(pointers[0] - pointers[1])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_large_tensor_is_made_but_the_output_and_the_gradient_of_x(dropout):
    tensors, gradient = problem((1024,), 512, 512, 8)
    inputs = [tensors[name].requires_grad_() for name in ("x", "lora_A", "lora_B")]
    with LargeTensors(1024 * 512, tensors["x"]) as forward:
        y = lora_linear(**tensors, scale=SCALE, dropout=dropout, training=True)
    assert forward.count() == 1
    with LargeTensors(1024 * 512, tensors["x"], gradient) as backward:
        torch.autograd.grad(y, inputs, gradient)
    assert backward.count() == 1


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("added", [False, True])
def test_first_and_second_derivatives_pass_gradcheck(dropout, added, route):
    tensors, _ = problem((2, 3), 5, 4, 2, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]

    def called(x, weight, bias, lora_A, lora_B):
        torch.manual_seed(3)
        if added:
            return lora_add(F.linear(x, weight, bias), x, lora_A, lora_B, SCALE, dropout, True)
        return lora_linear(x, weight, bias, lora_A, lora_B, SCALE, dropout, True)

    assert torch.autograd.gradcheck(called, leaves)
    assert torch.autograd.gradgradcheck(called, leaves)


def test_second_derivative_without_x_is_refused(route):
    tensors, _ = problem((300,))
    tensors["lora_B"].requires_grad_()
    y = lora_linear(**tensors, scale=SCALE)
    with pytest.raises(RuntimeError, match="needs x, which was not kept because lora_A needs no gradient"):
        torch.autograd.grad(y.sum(), tensors["lora_B"], create_graph=True)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_batch_of_gradients_equals_one_after_the_other(dropout, route):
    tensors, gradient = problem((300,))
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    y = lora_linear(*leaves, scale=SCALE, dropout=dropout, training=True)
    batch = torch.stack([gradient, -2 * gradient])
    got = torch.autograd.grad(y, leaves, batch, is_grads_batched=True, retain_graph=True)
    keep = y.grad_fn.steps.keep_mask(tensors["x"], dropout, y.grad_fn.saved_tensors[-1]) if dropout else None
    for index in range(2):
        values = [y.detach(), *(value[index] for value in got)]
        assert_close_to_dense(values, tensors, batch[index], keep, dropout)


@pytest.mark.parametrize("leading", [(2, 3), (300,)])
def test_second_derivative_under_autocast_runs(leading):
    tensors, gradient = problem(leading)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(*leaves, scale=SCALE, dropout=0.3, training=True)
    (dx,) = torch.autograd.grad(y, leaves[:1], gradient.bfloat16(), create_graph=True)
    assert all(value.any() for value in torch.autograd.grad(dx.sum(), leaves[3:]))


@pytest.mark.parametrize("leading", [(2, 3), (300,)])
def test_use_twice_and_backward_twice_accumulate(leading):
    tensors, gradient = problem(leading)
    lora_A, lora_B = tensors["lora_A"].requires_grad_(), tensors["lora_B"].requires_grad_()
    lora_linear(**tensors, scale=SCALE).backward(gradient)
    once = lora_A.grad.clone(), lora_B.grad.clone()
    lora_A.grad = lora_B.grad = None
    y = lora_linear(**tensors, scale=SCALE) + lora_linear(**tensors, scale=SCALE)
    y.backward(gradient, retain_graph=True)
    y.backward(gradient)
    torch.testing.assert_close((lora_A.grad, lora_B.grad), (4 * once[0], 4 * once[1]))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("leading", [(2, 3), (300,)])
def test_checkpointing_redraws_the_same_mask(leading, reentrant):
    tensors, gradient = problem(leading)
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]

    def call(*tensors):
        return lora_linear(*tensors, scale=SCALE, dropout=0.3, training=True)

    torch.manual_seed(11)
    expected = call(*leaves)
    expected.backward(gradient)
    gradients = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    torch.manual_seed(11)
    y = checkpoint(call, *leaves, use_reentrant=reentrant)
    y.backward(gradient)
    assert torch.equal(y, expected)
    assert all(torch.equal(leaf.grad, right) for leaf, right in zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("call", [partial(lora_linear, scale=SCALE), added_to_linear], ids=["whole", "added"])
@pytest.mark.parametrize("leading", [(2, 3), (300,)])
def test_dropout_acts_only_in_training(leading, call):
    tensors, _ = problem(leading)
    assert torch.equal(call(**tensors, dropout=0.5), call(**tensors, training=True))


def compiled(call):
    return torch.compile(call, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("call", [partial(lora_linear, scale=SCALE), added_to_linear], ids=["whole", "added"])
@pytest.mark.parametrize("how", [lambda call: call, compiled], ids=["eager", "compiled"])
@pytest.mark.parametrize("leading", [(2, 3), (300,)])
def test_dropout_of_everything_leaves_the_base(leading, how, call):
    tensors, gradient = problem(leading)
    base = F.linear(tensors["x"], tensors["weight"], tensors["bias"])
    y, *gradients = run(how(partial(call, dropout=1.0, training=True)), tensors, gradient)
    assert torch.equal(y, base)
    assert not gradients[3].any()
    assert not gradients[4].any()


@pytest.mark.parametrize("dropout", [-0.1, 1.5])
def test_dropout_that_is_no_probability_is_refused(dropout):
    tensors, _ = problem((2, 3))
    with pytest.raises(ValueError, match=f"dropout is {dropout}, which is no probability"):
        lora_linear(**tensors, scale=SCALE, dropout=dropout, training=True)


@pytest.mark.parametrize("dropout", [0.004, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("shape", [(512, 515), (4096, 64)])
def test_mask_drops_at_its_rate_in_every_lane(dropout, shape):
    x = torch.empty(shape)
    keep = aten.keep_mask(x, dropout, draw_seed(x))

    def bound(count):
        # Bernstein's: each of the 5,000 means below is outside with a probability of 2·exp(-32). A row's own rate is
        # within 2⁻⁸ of the one that was asked for.
        third = 32 / (3 * count)
        return third + (third**2 + 2 * 32 * dropout * (1 - dropout) / count) ** 0.5 + 2**-8

    for lane in range(4):
        part = keep[:, lane::4]
        assert abs(part.mean() - (1 - dropout)) < bound(part.numel()) - 2**-8 + 2**-16
    assert (keep.mean(1) - (1 - dropout)).abs().max() < bound(shape[1])
    assert (keep.mean(0) - (1 - dropout)).abs().max() < bound(shape[0])


def test_rows_and_columns_of_a_mask_overlap_as_independent_ones_do():
    x, dropout = torch.empty(256, 1024), 0.1
    keep = aten.keep_mask(x, dropout, draw_seed(x)).double() - (1 - dropout)
    for part in (keep, keep.t()):
        overlap = part @ part.t() / (dropout * (1 - dropout) * part.shape[1] ** 0.5)
        pairs = overlap[torch.ones_like(overlap).triu(1).bool()]
        assert abs(pairs.var() - 1) < 0.05
        assert pairs.abs().max() < 20


def test_mask_is_the_same_in_blocks_and_follows_the_generator():
    x = torch.empty(100, 70)
    torch.manual_seed(5)
    seed = draw_seed(x)
    whole = aten.keep_mask(x, 0.3, seed)
    mask = KeepMask(seed, (100, 70), 0.3, 33)
    blocks = [mask.rows(slice(start, start + 33)).clone() for start in range(0, 100, 33)]
    assert torch.equal(torch.cat(blocks).to(x.dtype), whole)
    assert not torch.equal(aten.keep_mask(x, 0.3, draw_seed(x)), whole)
    torch.manual_seed(5)
    assert torch.equal(aten.keep_mask(x, 0.3, draw_seed(x)), whole)


@pytest.mark.parametrize("leading", [(2, 3), (300,)])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_autocast_gives_the_dtype_and_at_init_the_bits_of_the_base(leading, dropout):
    tensors, gradient = problem(leading)
    call = partial(lora_linear, scale=SCALE, dropout=dropout, training=True)
    with torch.autocast("cpu", torch.bfloat16):
        keep = mask_of(tensors, dropout) if dropout else None
        got = run(call, tensors, gradient.bfloat16())
        assert [value.dtype for value in got] == [torch.bfloat16] + [torch.float32] * 5
        base = F.linear(tensors["x"], tensors["weight"], tensors["bias"])
        assert torch.equal(call(**{**tensors, "lora_B": torch.zeros_like(tensors["lora_B"])}), base)
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    # The factors are rounded once more than in a bfloat16 problem, by the cast of float32 inputs.
    assert_close_to_dense(got, half, gradient.bfloat16(), keep, dropout)


def test_one_token_under_autocast_has_the_dtype_of_the_base():
    tensors, gradient = problem((1, 1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(**tensors, scale=SCALE)
    assert y.dtype == torch.bfloat16
    assert_close_to_dense([y], {name: tensor.bfloat16() for name, tensor in tensors.items()}, gradient.bfloat16())


class Made(TorchDispatchMode):
    """Notes the shapes of all tensors that operations make, views left out."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = {place(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        new = (each for each in tree_leaves(made) if isinstance(each, Tensor) and place(each) not in given)
        self.shapes |= {tuple(each.shape) for each in new}
        return made


@pytest.mark.parametrize("wanted", [some for count in (1, 2, 3) for some in itertools.combinations(ALL, count)])
def test_no_gradient_is_made_that_nobody_asked_for(wanted, route):
    tensors, gradient = problem((6,), features=5, out=7, rank=2)
    leaves = {name: tensor.requires_grad_(name in wanted) for name, tensor in tensors.items()}
    y = lora_linear(**leaves, scale=SCALE)
    with Made() as made:
        y.backward(gradient)
    shapes = {"x": (6, 5), "weight": (7, 5), "bias": (7,), "lora_A": (2, 5), "lora_B": (7, 2)}
    if route != "dense":
        del shapes["lora_B"]  # they make it transposed, of the shape of s·Bᵀ, which they make too
    assert {name for name, shape in shapes.items() if shape in made.shapes} == set(wanted) & set(shapes)


@pytest.mark.parametrize(("features", "out"), [(2000, 24), (24, 2000)])
def test_more_rows_than_one_skinny_product_takes_are_all_multiplied(features, out):
    tensors, gradient = problem((300,), features, out, rank=3)
    assert_close_to_dense(run(partial(lora_linear, scale=SCALE), tensors, gradient), tensors, gradient)


def test_autocast_keeps_x_itself_and_no_cast_copy():
    tensors, _ = problem((300,))
    with torch.autocast("cpu", torch.bfloat16):
        saved = kept(tensors, ignore=PARAMETERS)
    assert any(place(tensor) == place(tensors["x"]) for tensor in saved)
    assert size_of(saved) == tensors["x"].numel() * 4 + 300 * 8 * 2


def test_backward_inside_autocast_of_a_forward_outside_it_keeps_its_dtype():
    tensors, gradient = problem((300,))
    expected = run(partial(lora_linear, scale=SCALE), tensors, gradient)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors.values()]
    y = lora_linear(*leaves, scale=SCALE)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y, leaves, gradient)
    for value, right in zip(got, expected[1:], strict=True):
        assert torch.equal(value, right)


@pytest.mark.parametrize("leading", [(1, 1, 1), (1, 1), (1,), (2, 3), (300,), ()])
def test_inference_equals_the_dense_form(leading):
    tensors, gradient = problem(leading)
    with torch.inference_mode():
        y = lora_linear(**tensors, scale=SCALE, dropout=0.1, training=False)
    assert_close_to_dense([y], tensors, gradient)
    assert y.is_inference()


@pytest.mark.parametrize("wide", ["lora_A", "lora_B"])
@pytest.mark.parametrize("leading", [(1,), (2, 3), (300,)])
def test_each_factor_may_have_a_dtype_of_its_own(wide, leading):
    tensors, gradient = problem(leading, dtype=torch.bfloat16)
    tensors[wide] = tensors[wide].float()
    for call in (partial(lora_linear, scale=SCALE), added_to_linear):
        got = run(call, tensors, gradient)
        assert [value.dtype for value in got[1:]] == [tensor.dtype for tensor in tensors.values()]
        assert_close_to_dense(got, tensors, gradient)
        with torch.inference_mode():
            y = call(**tensors)
        assert_close_to_dense([y], tensors, gradient)


@pytest.mark.parametrize("how", [lambda call: call, torch.func.vmap], ids=["as it is", "mapped"])
@pytest.mark.parametrize("leading", [(2, 3), (300,)])
def test_the_term_is_computed_in_the_dtype_of_what_it_is_added_to(leading, how):
    """As a host gives it that computes in half precision; the values of x are of that precision, and so exact."""
    tensors, gradient = problem(leading, dtype=torch.bfloat16)
    y = F.linear(tensors["x"], tensors["weight"], tensors["bias"])
    call = how(lambda y, x: lora_add(y, x, tensors["lora_A"], tensors["lora_B"], SCALE))
    got = call(y, tensors["x"].float())
    assert got.dtype == torch.bfloat16
    assert_close_to_dense([got], tensors, gradient)


@pytest.mark.parametrize("where", ["x", "weight"])
@pytest.mark.parametrize("leading", [(2, 3), (300,)])
def test_a_tensor_that_is_two_stays_two(where, leading):
    """A wrapper around tensors, as quantisation and sharding have them, knows torch's own operations alone."""
    tensors, gradient = problem(leading)
    plain = tensors[where]
    tensors[where] = TwoTensor(plain, 2 * plain)
    for call in (partial(lora_linear, scale=SCALE), added_to_linear):
        y = call(**tensors)
        assert type(y) is TwoTensor
        for part, each in ((y.a, plain), (y.b, 2 * plain)):
            assert_close_to_dense([part], {**tensors, where: each}, gradient)


class Noted(Tensor):
    """Writes down what is asked of it."""

    asked: ClassVar[set[str]] = set()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.asked.add(getattr(func, "__name__", ""))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("where", ["x", "weight"])
@pytest.mark.parametrize("leading", [(1,), (2, 3), (300,)])
def test_of_a_subclass_no_more_is_asked_than_a_linear_layer_and_sums(where, leading):
    """Which is what those know that pack their numbers: no product of matrices by another name, and none in place."""
    tensors, gradient = problem(leading)
    tensors[where] = tensors[where].as_subclass(Noted)
    Noted.asked.clear()
    y = lora_linear(**tensors, scale=SCALE)
    assert "linear" in Noted.asked
    assert not Noted.asked & {"mm", "addmm", "addmm_", "addmv_", "mv", "view", "matmul"}
    assert_close_to_dense([y.as_subclass(Tensor)], {k: t.as_subclass(Tensor) for k, t in tensors.items()}, gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_token_meets_factors_of_another_dtype(dtype):
    tensors, gradient = problem((1,), dtype=dtype, factor_dtype=torch.float32)
    with torch.inference_mode():
        y = lora_linear(**tensors, scale=SCALE)
    assert y.dtype == dtype
    assert_close_to_dense([y], tensors, gradient)


@pytest.mark.parametrize("call", [partial(lora_linear, scale=SCALE), added_to_linear], ids=["whole", "added"])
@pytest.mark.parametrize("leading", [(2, 3), (300,)])
def test_vmap_over_adapters_and_functional_grad_are_right(leading, call):
    tensors, gradient = problem(leading)
    stacked_A = torch.stack([tensors["lora_A"], 2 * tensors["lora_A"]])
    stacked_B = torch.stack([tensors["lora_B"], -tensors["lora_B"]])

    def loss(lora_A, lora_B):
        return (call(tensors["x"], tensors["weight"], tensors["bias"], lora_A, lora_B) * gradient).sum()

    gradients = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(stacked_A, stacked_B)
    y = torch.func.vmap(partial(call, *[tensors[name] for name in ALL[:3]]))(stacked_A, stacked_B)
    for index in range(2):
        one = {**tensors, "lora_A": stacked_A[index], "lora_B": stacked_B[index]}
        got = [y[index], gradients[0][index], gradients[1][index]]
        assert_close_to_dense(got, one, gradient, wanted=("lora_A", "lora_B"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, SCALE])
@pytest.mark.parametrize(("leading", "features", "out", "rank"), SHAPES)
def test_compiled_it_is_right_at_every_shape(leading, features, out, rank, scale, dtype):
    torch.compiler.reset()
    tensors, gradient = problem(
        leading, features, out, rank, dtype, factor_dtype=torch.promote_types(dtype, torch.float32)
    )
    got = run(compiled(partial(lora_linear, scale=scale)), tensors, gradient)
    assert_close_to_dense(got, tensors, gradient, scale=scale)


def test_compiled_no_product_is_the_slow_way_round():
    """A rank-r GEMM takes up to four times as long where the rank is the number of its columns."""
    products: list[torch.Size] = []

    def noted(graph, _):
        products.extend(
            node.meta["val"].shape for node in graph.graph.nodes if node.target is torch.ops.aten.mm.default
        )
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    tensors, gradient = problem((2, 30), features=40, out=50, rank=7, bias=False)
    backend = aot_autograd(fw_compiler=noted, bw_compiler=noted)
    run(torch.compile(partial(lora_linear, scale=SCALE), fullgraph=True, backend=backend), tensors, gradient)
    base, low_rank = [(60, 50), (60, 40), (50, 40)], [(7, 60), (60, 50), (7, 60), (7, 50), (7, 40), (60, 40)]
    assert sorted(products) == sorted(base + low_rank)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("leading", [(2, 3), (300,)])
def test_compiled_whole_it_equals_the_dense_form(leading, training):
    tensors, gradient = problem(leading)
    call = partial(lora_linear, scale=SCALE, dropout=0.0 if training else 0.2, training=training)
    added = partial(lora_add, scale=SCALE, training=training)

    def both(x, weight, bias, lora_A, lora_B):
        return added(call(x, weight, bias, lora_A, lora_B), x, lora_A, lora_B)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert_close_to_dense(run(compiled, tensors, gradient), tensors, gradient, scale=2 * SCALE)


def test_compiled_whole_with_dropout_is_one_graph():
    tensors, gradient = problem((300,))
    compiled = torch.compile(
        partial(lora_linear, scale=SCALE, dropout=0.2, training=True), fullgraph=True, backend="aot_eager"
    )
    y, *gradients = run(compiled, tensors, gradient)
    assert y.isfinite().all()
    assert all(value.any() for value in gradients)


MUTATIONS = {
    "scale dropped": lambda shrink: lambda x, lora_A, scale, *rest: shrink(x, lora_A, 1.0, *rest),
    "output zeroed": lambda shrink: lambda *inputs: shrink(*inputs) * 0,
    "mask dropped": lambda shrink: lambda x, lora_A, scale, dropout, seed: shrink(x, lora_A, scale, dropout, None),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_forward_step_is_noticed(mutation, monkeypatch):
    monkeypatch.setattr(aten, "shrink", MUTATIONS[mutation](aten.shrink))
    monkeypatch.setattr(dispatch, "is_dense", lambda *_: False)
    assert_noticed()


DENSE_MUTATIONS = {
    "scale dropped": lambda dense: lambda *inputs: dense(*inputs[:5], 1.0, inputs[6]),
    "term zeroed": lambda dense: lambda *inputs: dense(*inputs[:5], 0.0, inputs[6]),
    "mask dropped": lambda dense: lambda *inputs: (*dense(*inputs[:6], 0.0)[:2], dense(*inputs)[2]),
}


@pytest.mark.parametrize("mutation", DENSE_MUTATIONS)
def test_a_broken_dense_forward_is_noticed(mutation, monkeypatch):
    monkeypatch.setattr(small, "dense_forward", DENSE_MUTATIONS[mutation](small.dense_forward))
    assert_noticed()


def assert_noticed():
    tensors, gradient = problem((300,))
    keep = mask_of(tensors, 0.1)
    got = run(partial(lora_linear, scale=SCALE, dropout=0.1, training=True), tensors, gradient)
    with pytest.raises(AssertionError, match=r"y: .* over the bound"):
        assert_close_to_dense(got, tensors, gradient, keep, 0.1)


@pytest.mark.parametrize("position", range(1, 6))
def test_a_zeroed_gradient_is_noticed(position, route):
    tensors, gradient = problem((300,))
    got = run(partial(lora_linear, scale=SCALE), tensors, gradient)
    got[position] = torch.zeros_like(got[position])
    with pytest.raises(AssertionError, match="over the bound"):
        assert_close_to_dense(got, tensors, gradient)


def test_swapped_factors_are_noticed(route):
    tensors, gradient = problem((300,), 96, 96)
    swapped = {**tensors, "lora_A": tensors["lora_B"].t(), "lora_B": tensors["lora_A"].t()}
    got = run(partial(lora_linear, scale=SCALE), swapped, gradient)
    with pytest.raises(AssertionError, match=r"y: .* over the bound"):
        assert_close_to_dense(got, tensors, gradient)


def test_the_examples_run():
    names = {"torch": torch, "peftlib": peftlib, "join_pairs": join_pairs}
    names |= {"lora_linear": lora_linear, "lora_add": lora_add}
    assert doctest.testmod(linear, extraglobs=names).failed == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5,), (2, 7), (3, 0), ()])
@pytest.mark.parametrize("padding_idx", [None, 0])
def test_embedding_term_equals_the_dense_table(shape, dtype, padding_idx):
    entries, dim, rank = 23, 19, 4
    ids = torch.arange(torch.Size(shape).numel()).reshape(shape) % 5
    generator = torch.Generator().manual_seed(1)
    table, lora_A, lora_B, gradient = (
        torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
        for size in ((entries, dim), (rank, entries), (dim, rank), (*shape, dim))
    )

    def dense(lora_A, lora_B, table):
        return F.embedding(ids, table + SCALE * (lora_B @ lora_A).t(), padding_idx)

    def looked_up(lora_A, lora_B, table):
        return lora_embedding(F.embedding(ids, table), ids, lora_A, lora_B, SCALE, padding_idx)

    tensors = {"lora_A": lora_A, "lora_B": lora_B, "table": table}
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    size = {name: tensor.abs() for name, tensor in wide.items()}
    got = run(looked_up, tensors, gradient, ("lora_A", "lora_B"))
    expected = run(dense, wide, gradient.double(), ("lora_A", "lora_B"))
    magnitude = run(dense, size, gradient.double().abs(), ("lora_A", "lora_B"))
    # Up to three tokens add to one column of A's gradient, in A's dtype.
    accumulator = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    tolerance = (ROUNDINGS + 3) * torch.finfo(dtype).eps + 64 * accumulator
    for value, right, bound in zip(got, expected, magnitude, strict=True):
        assert ((value.double() - right).abs() <= tolerance * bound).all()


def test_embedding_example_runs():
    names = {"torch": torch, "lora_embedding": lora_embedding}
    assert doctest.testmod(sys.modules["peftlib.kernels.lora.embedding"], extraglobs=names).failed == 0

"""The bottleneck's op: equal to the equation in float64, light in what it keeps, right on every path, and in Triton."""

import functools
import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from peftlib.kernels import bottleneck, dispatch
from peftlib.kernels.bottleneck import reference as plain
from support import reference as by_hand

M, IN, OUT, WIDTH = 6, 5, 7, 3
NAMES = ("down_weight", "down_bias", "up_weight", "up_bias", "norm_weight", "norm_bias")
CASES = [
    {"activation": activation, "norm": norm, "position": position, "scale": scale}
    for activation, norm, position, scale in itertools.product(
        ("gelu", "relu", "silu", "tanh"), ("none", "before", "after"), ("after", "parallel"), (1.0, "learned", 0.5)
    )
]


def tensors(case: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """x, y and the parameters by name, all leaves that need gradients."""
    out = IN if case["position"] == "after" else OUT
    shapes: dict[str, tuple[int, ...]] = {
        "x": (2, M, IN), "y": (2, M, out), "down_weight": (WIDTH, IN), "down_bias": (WIDTH,),
        "up_weight": (out, WIDTH), "up_bias": (out,),
    }  # fmt: skip
    if case["norm"] != "none":
        size = IN if case["norm"] == "before" else out
        shapes |= {"norm_weight": (size,), "norm_bias": (size,)}
    if case["scale"] == "learned":
        shapes["scale"] = (1,)
    return {name: torch.randn(shape).to(dtype).requires_grad_() for name, shape in shapes.items()}


def run(case: dict[str, Any], given: dict[str, Tensor], function: Any = bottleneck, **more: Any) -> Tensor:
    x, own = given["x"], [given.get(name) for name in NAMES]
    residual = x if case["position"] == "after" else given["y"]
    scale = given.get("scale", case["scale"])
    settings = {"activation": case["activation"], "norm": case["norm"]}
    return function(x, *own, residual=residual, scale=scale, **settings, **more)


def expected(case: dict[str, Any], given: dict[str, Tensor]) -> Tensor:
    y = given["x"] if case["position"] == "after" else given["y"]
    return by_hand.bottleneck(case, given, y, given["x"], -1)


def used(case: dict[str, Any], given: dict[str, Tensor]) -> list[Tensor]:
    return [tensor for name, tensor in given.items() if name != "y" or case["position"] == "parallel"]


def case_id(case: dict[str, Any]) -> str:
    return "-".join(map(str, case.values()))


def some(*activations: str) -> Any:
    chosen = [case for case in CASES if case["activation"] in activations]
    return pytest.mark.parametrize("case", chosen, ids=map(case_id, chosen))


@some("gelu", "relu", "silu", "tanh")
def test_outputs_and_gradients_equal_the_equation_in_float64(case):
    given = tensors(case)
    cotangent = torch.randn_like(found := run(case, given))
    exact = expected(case, given)
    assert (found - exact).abs().max() <= 1e-12
    inputs = used(case, given)
    for one, other in zip(*(torch.autograd.grad(y, inputs, cotangent) for y in (found, exact)), strict=True):
        assert (one - other).abs().max() <= 1e-11 * max(1.0, other.abs().max())


@some("gelu", "relu", "silu", "tanh")
def test_the_plain_form_equals_the_equation(case):
    given = tensors(case)
    assert (run(case, given, plain.bottleneck) - expected(case, given)).abs().max() <= 1e-12


@pytest.mark.parametrize("activation", ["gelu_tanh", "identity"])
def test_the_other_activations_equal_the_plain_form(activation):
    case = {"activation": activation, "norm": "none", "position": "parallel", "scale": 1.0}
    given = tensors(case)
    found, exact = run(case, given), run(case, given, plain.bottleneck)
    assert torch.allclose(found, exact, rtol=0, atol=1e-12)
    for one, other in zip(*(torch.autograd.grad(y.sum(), used(case, given)) for y in (found, exact)), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


@some("silu")
def test_first_and_second_derivatives_are_right(case):
    given = tensors(case)
    names = [name for name in given if name != "y" or case["position"] == "parallel"]

    def function(*values: Tensor) -> Tensor:
        return run(case, {**given, **dict(zip(names, values, strict=True))})

    values = tuple(given[name] for name in names)
    assert gradcheck(function, values)
    assert gradcheck(function, values, check_batched_grad=True)
    assert gradgradcheck(function, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@some("gelu")
def test_in_less_precision_it_is_as_near_to_float64_as_the_plain_form_is(case, dtype):
    """Each is off by the roundings on its way, and by torch's own gelu, 1.2e-6 in float32. The plain form rounds after
    each of its steps, so live may be off by no more, but for chance: four times its error, and twice eps of the largest
    value where that error is zero by chance."""
    given = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors(case).items()}
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in given.items()}
    cotangent = torch.randn(run(case, given).shape).to(dtype)
    results = []
    rounding = functools.partial(run, function=plain.bottleneck)
    for function, values in ((run, given), (rounding, given), (expected, wide)):
        y = function(case, values)
        results.append([y, *torch.autograd.grad(y, used(case, values), cotangent.to(y.dtype))])
    for number, (found, rounded, exact) in enumerate(zip(*results, strict=True)):
        assert found.dtype == dtype
        error, size = (rounded.double() - exact).abs().max(), exact.abs().max()
        if found.numel() > 1:  # one element is off by zero too often to say how far it could be
            assert (found.double() - exact).abs().max() <= 4 * error + 2 * torch.finfo(dtype).eps * size, number


@pytest.mark.parametrize("needed", ["x", *NAMES[:4], "y", "scale"])
@pytest.mark.parametrize("norm", ["none", "before", "after"])
def test_whatever_needs_a_gradient_gets_the_same(needed, norm):
    case = {"activation": "gelu", "norm": norm, "position": "parallel", "scale": "learned"}
    given = tensors(case)
    (exact,) = torch.autograd.grad(expected(case, given).sin().sum(), [given[needed]])
    frozen = {name: tensor.detach().requires_grad_(name == needed) for name, tensor in given.items()}
    (found,) = torch.autograd.grad(run(case, frozen).sin().sum(), [frozen[needed]])
    assert (found - exact).abs().max() <= 1e-11 * max(1.0, exact.abs().max())


# What is kept


def kept_bytes(function: Any, known: list[Tensor]) -> int:
    """Of tensors that backward keeps, without those that live anyway."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in known}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    assert output.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("norm", ["none", "before", "after"])
def test_it_keeps_its_input_and_the_bottleneck_activations_alone(norm, dropout, dtype):
    rows, size, width = 512, 128, 8
    x = torch.randn(rows, size, dtype=dtype, requires_grad=True)
    own = [torch.randn(s, requires_grad=True) for s in ((width, size), (width,), (size, width), (size,))]
    own += [torch.randn(size, requires_grad=True) for _ in range(2)] if norm != "none" else [None, None]
    known = [x, *(tensor for tensor in own if tensor is not None)]

    def op(function: Any, **more: Any) -> int:
        return kept_bytes(lambda: function(x, *own, residual=x, norm=norm, dropout=dropout, **more), known)

    keys = 4 * (rows + width + 8) if dropout else 0  # of the mask, in int32
    assert op(bottleneck, training=True) <= rows * width * dtype.itemsize + keys
    assert op(plain.bottleneck) >= 2 * rows * width * dtype.itemsize  # the plain form keeps more, so this can fail


def test_under_autocast_no_cast_copy_of_the_input_is_kept():
    x, own = torch.randn(512, 128, requires_grad=True), [torch.randn(s) for s in ((8, 128), (8,), (128, 8), (128,))]
    own = [tensor.requires_grad_() for tensor in own]
    with torch.autocast("cpu", torch.bfloat16):
        assert kept_bytes(lambda: bottleneck(x, *own, residual=x), [x, *own]) <= 512 * 8 * 2


# Paths


def test_where_up_is_zero_not_one_bit_of_the_residual_changes():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(3, 4, IN).to(dtype)
        own = torch.randn(WIDTH, IN), torch.randn(WIDTH), torch.zeros(IN, WIDTH), torch.zeros(IN)
        for needs in (False, True):
            found = bottleneck(x.requires_grad_(needs), *own, residual=x)
            assert torch.equal(found, x)
            assert found.dtype == dtype


@some("gelu")
def test_every_path_gives_the_same(case):
    given = tensors(case)
    exact = expected(case, given)
    with torch.no_grad():
        assert torch.allclose(run(case, given), exact, rtol=0, atol=1e-12)
    with torch.inference_mode():
        assert torch.allclose(run(case, given), exact, rtol=0, atol=1e-12)
    mapped = torch.vmap(lambda x, y: run(case, {**given, "x": x, "y": y}))(given["x"], given["y"])
    assert torch.allclose(mapped, exact, rtol=0, atol=1e-12)
    recomputed = checkpoint(lambda x: run(case, {**given, "x": x}), given["x"], use_reentrant=False)
    expected_gradients = torch.autograd.grad(exact.sum(), used(case, given), retain_graph=True)
    for one, other in zip(torch.autograd.grad(recomputed.sum(), used(case, given)), expected_gradients, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(case, given)
    for one, other in zip(torch.autograd.grad(compiled.sum(), used(case, given)), expected_gradients, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)
    torch._dynamo.reset()


@pytest.mark.parametrize("shape", [(IN,), (0, IN), (1, 1, 1, IN)])
def test_any_number_of_dimensions(shape):
    case = {"activation": "gelu", "norm": "before", "position": "after", "scale": 1.0}
    given = tensors(case) | {"x": torch.randn(shape, dtype=torch.float64, requires_grad=True)}
    found, exact = run(case, given), expected(case, given)
    assert found.shape == exact.shape
    assert torch.allclose(found, exact, rtol=0, atol=1e-12)
    one, other = (torch.autograd.grad(y.sum(), given["x"])[0] for y in (found, exact))
    assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_inputs_that_are_not_contiguous():
    case = {"activation": "gelu", "norm": "none", "position": "after", "scale": 1.0}
    given = tensors(case)
    apart = torch.randn(IN, M, 2, dtype=torch.float64, requires_grad=True)
    given["x"] = apart.movedim(0, -1)
    found, exact = run(case, given), expected(case, given)
    assert torch.allclose(found, exact, rtol=0, atol=1e-12)
    one, other = (torch.autograd.grad(y.square().sum(), apart, retain_graph=True)[0] for y in (found, exact))
    assert torch.allclose(one, other, rtol=0, atol=1e-11)


# Dropout


def dropping(rows: int, dropout: float) -> tuple[Tensor, dict[str, Tensor]]:
    """x of ones, projections of one: the output is the mask itself, over 1 - p."""
    x = torch.ones(rows, 1, requires_grad=True)
    own = {"down": torch.ones(4, 1), "down_bias": torch.zeros(4), "up": torch.ones(1, 4), "up_bias": torch.zeros(1)}
    own = {name: tensor.requires_grad_() for name, tensor in own.items()}
    return bottleneck(x, **own, activation="identity", dropout=dropout, training=True), {"x": x, **own}


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_its_mean(dropout):
    """The mean of n activations deviates by sqrt(p/(1-p)/n): allow six of them, and the mask's own 2⁻¹⁶."""
    rows = 20_000
    found, _ = dropping(rows, dropout)
    share = dropout / (1 - dropout)
    assert abs(found.mean().item() - 4) <= 4 * (6 * (share / (4 * rows)) ** 0.5 + 2**-16)
    counts = (found * (1 - dropout)).round(decimals=3).unique()
    assert set(counts.tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0}


def test_backward_has_the_mask_that_forward_had():
    found, given = dropping(50, 0.5)
    dX, d_up = torch.autograd.grad(found, [given["x"], given["up"]], weights := torch.arange(50.0)[:, None])
    assert torch.equal(dX, found.detach() * weights)
    assert torch.allclose(d_up.sum(), (found.detach() * weights).sum())
    again, given = dropping(50, 0.5)
    (first,) = torch.autograd.grad(again, given["x"], torch.ones_like(again), create_graph=True)
    assert torch.equal(first, again.detach())


def test_dropout_rests_in_eval():
    x, own = torch.randn(4, IN), [torch.randn(s) for s in ((WIDTH, IN), (WIDTH,), (OUT, WIDTH), (OUT,))]
    assert torch.equal(bottleneck(x, *own, dropout=0.5), bottleneck(x, *own))


# Refusals


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"activation": "softplus"}, r"activation='softplus' is none of 'relu', .*\. Give one of them\."),
        ({"norm": "around"}, r"norm='around' is none of 'none', 'before', 'after'\. Give one of them\."),
        ({"dropout": 1.5}, r"dropout is 1\.5, which is no probability\. Give one in \[0, 1\]\."),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    own = [torch.randn(s) for s in ((WIDTH, IN), (WIDTH,), (OUT, WIDTH), (OUT,))]
    with pytest.raises(ValueError, match=message):
        bottleneck(torch.randn(2, IN), *own, **wrong)


def test_a_second_derivative_without_its_input_is_refused():
    case = {"activation": "gelu", "norm": "none", "position": "parallel", "scale": 1.0}
    given = tensors(case)
    given["down_weight"].requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"a second derivative needs x, .* Give down requires_grad=True, or .*\."):
        torch.autograd.grad(run(case, given).sum(), given["up_bias"], create_graph=True)


# Triton

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton here")
SHAPES = [(1, 64, 48, 4), (5, 130, 70, 3), (70, 96, 96, 16), (33, 65, 129, 40), (130, 64, 64, 1)]
ACTIVATIONS = list(plain.ACTIVATIONS)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def interpreted(monkeypatch) -> Iterator[None]:
    """On the CPU in the interpreter; outputs start as NaN, so that what is not written is seen."""
    monkeypatch.setattr(dispatch, "MODE", "1" if DEVICE == "cuda" else "interpret")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(rows: int, size: int, out: int, width: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Tensor]:
    x, onto = torch.randn(rows, size).to(DEVICE, dtype), torch.randn(rows, out).to(DEVICE, dtype)
    own = [torch.randn(s).to(DEVICE, dtype) for s in ((width, size), (width,), (out, width), (out,))]
    return x, [own[0] / size**0.5, own[1], own[2] / width**0.5, own[3]], onto


def assert_kernel_right(forward: Any, shape: tuple[int, ...], dtype: torch.dtype, activation: str, adds: bool) -> None:
    """Float64 from the very inputs, z as it was stored. z: a sum of K + 1 terms, each addition off by 2⁻²⁴ of the sum
    of their sizes, rounded once. Output: the activation's own error in float32 (8 units; of 1 for tanh, which is a
    difference from 1), its rounding to the dtype, carried by |up|; then width + 2 terms, and one rounding."""
    x, own, onto = problem(*shape, dtype)
    got, z = forward(x, *own, onto if adds else None, activation)
    down, down_bias, up, up_bias = (tensor.double() for tensor in own)
    exact = x.double() @ down.T + down_bias
    unit, fine, tiny = torch.finfo(dtype).eps / 2, 2.0**-24, torch.finfo(dtype).tiny
    size = x.double().abs() @ down.abs().T + down_bias.abs()
    assert ((z.double() - exact).abs() <= unit * exact.abs() + (x.shape[1] + 2) * fine * size + tiny).all()
    h = plain.ACTIVATIONS[activation](z.double())
    rest = onto.double() if adds else torch.zeros_like(onto).double()
    exact, size = h @ up.T + up_bias + rest, h.abs() @ up.abs().T + up_bias.abs() + rest.abs()
    own_size = torch.ones_like(h) if activation == "tanh" else z.double().abs()
    carried = (unit * h.abs() + 8 * fine * (h.abs() + own_size) + tiny) @ up.abs().T
    bound = unit * exact.abs() + carried + (up.shape[1] + 3) * fine * size + tiny
    assert ((got.double() - exact).abs() <= bound).all()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_equals_float64(interpreted, shape, dtype):
    from peftlib.kernels.bottleneck import triton as triton_bottleneck

    for activation, adds in zip(ACTIVATIONS, itertools.cycle((True, False)), strict=False):
        assert_kernel_right(triton_bottleneck.forward, shape, dtype, activation, adds)


@needs_triton
def test_the_op_runs_the_kernel_and_its_gradients_fit(interpreted, monkeypatch):
    from peftlib.kernels.bottleneck import triton as triton_bottleneck

    calls = []
    forward = triton_bottleneck.forward
    monkeypatch.setattr(triton_bottleneck, "forward", lambda *a: calls.append(1) or forward(*a))
    monkeypatch.setattr(dispatch, "_trusted", {})
    x, own, _ = problem(20, 64, 64, 8, torch.float32)
    given = [tensor.requires_grad_() for tensor in (x, *own)]
    found, exact = bottleneck(x, *own, residual=x), plain.bottleneck(x, *own, residual=x)
    assert len(calls) == 2  # the trial and the call
    for one, other in zip(*(torch.autograd.grad(y.sin().sum(), given) for y in (found, exact)), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@needs_triton
def test_a_kernel_that_is_wrong_is_not_used(interpreted, monkeypatch):
    from peftlib.kernels.bottleneck import triton as triton_bottleneck

    forward = triton_bottleneck.forward
    monkeypatch.setattr(dispatch, "_trusted", {})
    monkeypatch.setattr(triton_bottleneck, "forward", lambda *a: tuple(2 * tensor for tensor in forward(*a)))
    x, own, _ = problem(20, 64, 64, 8, torch.float32)
    with pytest.warns(UserWarning, match="the Triton kernel bottleneck .* differs from PyTorch"):
        found = bottleneck(x, *own, residual=x)
    assert torch.allclose(found, plain.bottleneck(x, *own, residual=x), rtol=1e-5, atol=1e-5)


@needs_triton
def test_a_kernel_that_fails_is_tried_once_and_not_used(interpreted, monkeypatch):
    from peftlib.kernels.bottleneck import triton as triton_bottleneck

    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(dispatch, "_trusted", {})
    monkeypatch.setattr(triton_bottleneck, "forward", fail)
    x, own, _ = problem(20, 64, 64, 8, torch.float32)
    with pytest.warns(UserWarning, match="bottleneck .* failed: out of resource: shared memory; PyTorch is used"):
        first = bottleneck(x, *own, residual=x)
    assert torch.equal(bottleneck(x, *own, residual=x), first)
    assert len(calls) == 1


@needs_triton
def test_a_dtype_that_the_kernel_does_not_take_runs_in_pytorch(interpreted, monkeypatch):
    from peftlib.kernels.bottleneck import triton as triton_bottleneck

    monkeypatch.setattr(triton_bottleneck, "forward", None)
    x, own, _ = problem(20, 64, 64, 8, torch.float64)
    found, exact = bottleneck(x, *own, residual=x), plain.bottleneck(x, *own, residual=x)
    assert torch.allclose(found, exact, rtol=1e-12, atol=1e-12)


@needs_triton
@pytest.mark.skipif(DEVICE != "cpu", reason="looks into the interpreter")
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_no_program_strays_or_races_and_x_is_read_once(interpreted, shape):
    from peftlib.kernels.bottleneck import triton as triton_bottleneck
    from tools.triton.traffic import counted

    x, own, onto = problem(*shape, torch.float32)
    with counted() as traffic:
        out, z = triton_bottleneck.forward(x, *own, onto, "gelu")
    for wide in (x, onto):
        assert traffic.of(wide).loaded == wide.numel() * 4
    for stored in (out, z):
        assert traffic.of(stored).stored == stored.numel() * 4


@needs_triton
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("total += tl.load(down_bias", "total -= tl.load(down_bias"),
        ("result += tl.load(onto", "result -= tl.load(onto"),
        ("result += tl.load(up_bias", "result -= tl.load(up_bias"),
        ("0.7071067811865476", "0.75"),
        ("total += tl.dot(", "total = tl.dot("),
    ],
)
def test_a_wrong_kernel_is_found(interpreted, old, new, tmp_path):
    from peftlib.kernels.bottleneck import triton as triton_bottleneck
    from tools.triton.mutants import mutant

    changed = mutant(triton_bottleneck, old, new, tmp_path)
    with pytest.raises(AssertionError):
        assert_kernel_right(changed.forward, (70, 130, 96, 16), torch.float32, "gelu", True)


@needs_triton
@pytest.mark.parametrize("width", [8, 16, 64])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_the_kernel_compiles_and_fits(target, width):
    from peftlib.kernels.bottleneck import triton as triton_bottleneck
    from peftlib.kernels.triton_interpret import replaced
    from tools.triton.aot import CAPABILITY, SHARED_LIMIT, compile_for

    found = []

    def record(kernel: Any, grid: Any, *arguments: Any, tile: Any, **constants: Any) -> None:
        options = {**constants, "num_warps": tile.warps, "num_stages": tile.stages}
        found.append(compile_for(kernel, target, arguments, options))

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    own = meta(width, 4096), meta(width), meta(4096, width), meta(4096)
    with replaced(triton_bottleneck, launch=record, capability=lambda x: CAPABILITY[target]):
        triton_bottleneck.forward(meta(8192, 4096), *own, meta(8192, 4096), "gelu")
    (kernel,) = found
    print(target, width, kernel)
    assert kernel.spilled == 0
    assert kernel.shared <= SHARED_LIMIT[target]
    assert kernel.matrix > 0

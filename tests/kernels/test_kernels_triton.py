"""The Triton kernels: right at odd shapes, in bounds, without races, with few bytes, and as PyTorch operators.

Without a GPU they run in the interpreter; `make gpu-check` runs this file compiled.
"""

import dataclasses
import importlib
import importlib.util
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

if importlib.util.find_spec("triton") is None:
    pytest.skip("there is no Triton here", allow_module_level=True)

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms refuse cuBLAS without it

from peftlib.kernels import (
    dispatch,
    lora_add,
    lora_linear,
    philox,
    tiles,
    triton_operators,
    triton_runtime,
)
from peftlib.kernels.lora import aten, linear, reference
from peftlib.kernels.lora import triton as kernels
from tools.triton.mutants import mutant
from tools.triton.traffic import counted

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_CPU = pytest.mark.skipif(DEVICE != "cpu", reason="looks into the interpreter")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = ("shrink", "backward_x", "backward_x_only", "backward_y", "expand")
GROUPED = ("grouped_shrink", "grouped_expand_", "grouped_backward_y", "grouped_backward_x")
# M, K, N, rank, p: under one tile, over several, nothing a power of two, a rank of 1, one that must be padded
SHAPES = (
    (1, 64, 48, 4, 0.0),
    (5, 300, 130, 3, 0.5),
    (70, 520, 260, 8, 0.1),
    (33, 257, 129, 40, 0.0),
    (130, 96, 300, 1, 0.9),
)


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch):
    """On the CPU in the interpreter; outputs start as NaN, so that what is not written is seen."""
    monkeypatch.setattr(dispatch, "MODE", "1" if DEVICE == "cuda" else "interpret")
    monkeypatch.setattr(triton_runtime, "has_tiles", lambda device, dtype: True)  # float32 too, on any GPU
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def arguments(op: str, M: int, K: int, N: int, rank: int, p: float, dtype=torch.float32, factor_dtype=None) -> tuple:
    def normal(*shape: int, dtype=dtype) -> Tensor:
        return torch.randn(shape).to(DEVICE, dtype)

    factor_dtype = factor_dtype or dtype
    seed = torch.tensor([0x123456789ABCDEF], device=DEVICE) if p else None
    A, B, thin = normal(rank, K, dtype=factor_dtype), normal(N, rank, dtype=factor_dtype), normal(M, rank)
    return {
        "shrink": lambda: (normal(M, K), A, 0.5, p, seed),
        "backward_x": lambda: (normal(M, K), thin, A, p, seed),
        "backward_x_only": lambda: (thin, A, p, seed),
        "backward_y": lambda: (normal(M, N), B, thin, 0.5),
        "expand": lambda: (normal(M, N), thin, B, 0.5, normal(N)),
    }[op]()


def expected(op: str, *args) -> list[tuple[Tensor, Tensor, int]]:
    """Each output in float64 from the very inputs, the sum of its terms' sizes, and how many terms there are."""
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]

    def product(a: Tensor, b: Tensor, factor: float, *extra: Tensor):
        size = a.abs() @ b.abs() * abs(factor) + sum(map(abs, extra))
        return a @ b * factor + sum(extra), size, a.shape[1] + 2

    def factor_of(i: int) -> Tensor:  # kernels compute in the dtype of x
        return args[i].to(args[0].dtype).double()

    if op == "shrink":
        x, _, scale, p, seed = wide
        keep = mask(x, p, seed)
        return [product(x * keep, factor_of(1).t(), scale * philox.kept_scale(p))]
    if op == "backward_x":
        x, g, _, p, seed = wide
        keep = mask(x, p, seed)
        dX, size, terms = product(g, factor_of(2), philox.kept_scale(p))
        return [(dX * keep, size * keep, terms), product(g.t(), x * keep, philox.kept_scale(p))]
    if op == "backward_x_only":
        g, _, p, seed = wide
        dX, size, terms = product(g, factor_of(1), philox.kept_scale(p))
        keep = mask(dX, p, seed)
        return [(dX * keep, size * keep, terms)]
    if op == "backward_y":
        dY, _, h, scale = wide
        return [product(dY, factor_of(1), scale), product(dY.t(), h, 1.0)]
    y, h, _, scale, bias = wide
    return [product(h, factor_of(2).t(), scale, y, *(() if bias is None else (bias,)))]


def mask(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    keep = keep_mask_numpy(*x.shape, p, int(seed)) if p else np.ones(x.shape)
    return torch.from_numpy(keep).to(x)


def keep_mask_numpy(rows: int, columns: int, p: float, seed: int) -> np.ndarray:
    """Which elements of a [rows, columns] input are kept; bool."""
    blocks = -(-columns // philox.SUPER_BLOCK)
    counter = np.arange(rows * blocks * philox.CALLS, dtype=np.int64).reshape(rows, blocks, 1, philox.CALLS)
    lanes = np.concatenate(
        [half for word in philox.philox(counter, seed) for half in (word & 0xFFFF, word >> 16)], axis=2
    )
    return (lanes >= philox.threshold(p)).reshape(rows, blocks * philox.SUPER_BLOCK)[:, :columns]


def assert_right(op: str, got: tuple[Tensor, ...] | Tensor, args: tuple) -> None:
    """Every element within the error that its own sum must have: float32 gives each term and each addition a relative
    2^-24, so n terms at most n · 2^-24 of the sum of their sizes, and the result is rounded once to its dtype."""
    got = got if isinstance(got, tuple) else (got,)
    for output, (exact, size, terms) in zip(got, expected(op, *args), strict=True):
        bound = torch.finfo(output.dtype).eps / 2 * exact.abs() + terms * 2.0**-24 * size
        bound += torch.finfo(output.dtype).tiny  # float16 underflows gradually
        error = (output.double() - exact).abs()
        assert bool((error <= bound).all()), f"{op}: off by {(error / bound).nan_to_num(math.inf).max():.1f} bounds"


def run(op: str, args: tuple):
    return getattr(kernels, op)(*args)


# ------------------------------------------------------------------ the mask


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers that come with Random123
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    for array in (lambda value: np.array([value], dtype=np.int64), lambda value: torch.tensor([value])):
        got = philox.philox_rounds(tuple(map(array, counter)), key)
        assert tuple(int(word[0]) for word in got) == words


@pytest.mark.parametrize(("rows", "columns", "p"), [(3, 256, 0.5), (40, 700, 0.1), (2, 33, 0.9), (1, 1, 0.3)])
def test_the_mask_is_the_same_in_numpy_torch_and_triton(rows, columns, p):
    seed = torch.tensor([0x7FEDCBA987654321], device=DEVICE)
    ones = torch.ones(rows, 1, device=DEVICE), torch.ones(1, columns, device=DEVICE)
    dX = kernels.backward_x_only(*ones, p, seed)
    keep = keep_mask_numpy(rows, columns, p, int(seed))
    np.testing.assert_array_equal(philox.keep_mask(rows, columns, p, seed).cpu().numpy(), keep)
    np.testing.assert_array_equal(dX.cpu().numpy(), keep * np.float32(philox.kept_scale(p)))


def test_the_mask_keeps_what_it_promises():
    for p in (0.05, 0.5, 0.9):
        keep = keep_mask_numpy(512, 1024, p, seed=7)
        sigma = math.sqrt(p * (1 - p) / keep.size)
        assert abs(keep.mean() - (1 - p)) < 4 * sigma + 2**-17
        lanes = keep.reshape(512, 4, 8, 32).mean(axis=(0, 1, 3))
        assert np.abs(lanes - (1 - p)).max() < 4 * sigma * math.sqrt(8) + 2**-17
        neighbours = (keep[:, 1:] & keep[:, :-1]).mean()
        assert abs(neighbours - (1 - p) ** 2) < 6 * sigma


def test_another_seed_or_row_gives_another_mask():
    keep = keep_mask_numpy(2, 4096, 0.5, seed=1)
    assert 0.4 < (keep[0] == keep[1]).mean() < 0.6
    for other in (2, 1 + 2**32):  # the upper half of the seed counts too
        assert 0.4 < (keep == keep_mask_numpy(2, 4096, 0.5, other)).mean() < 0.6


def test_counters_go_on_past_32_bits():
    low, high = (philox.philox(np.array([value]), 0)[0] for value in (5, 5 + 2**32))
    assert low != high


def test_dropout_of_everything_gives_zeros():
    args = arguments("shrink", 20, 64, 0, 4, 0.5)
    assert not run("shrink", (*args[:3], 1.0, args[4])).any()
    assert philox.kept_scale(1.0) == 0.0


def test_a_probability_outside_0_and_1_is_refused():
    with pytest.raises(ValueError, match=r"between 0 and 1, not 1\.5"):
        philox.threshold(1.5)


def test_seeds_come_from_torchs_generator():
    first = philox.new_seed(torch.device(DEVICE))
    torch.manual_seed(0)
    again = philox.new_seed(torch.device(DEVICE))
    assert torch.equal(first, again)
    assert not torch.equal(again, philox.new_seed(torch.device(DEVICE)))


# ------------------------------------------------------------------ each op against float64 and its twin


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_ops_and_their_reference_equal_float64(op, shape, dtype):
    args = arguments(op, *shape, dtype=dtype)
    assert_right(op, run(op, args), args)
    assert_right(op, getattr(reference, op)(*args), args)


@pytest.mark.parametrize("op", OPS)
def test_factors_in_float32_get_gradients_in_float32(op):
    args = arguments(op, 40, 300, 200, 8, 0.1, dtype=torch.bfloat16, factor_dtype=torch.float32)
    got = run(op, args)
    assert_right(op, got, args)
    outputs = got if isinstance(got, tuple) else (got,)
    assert [output.dtype for output in outputs] == {
        "backward_x": [torch.bfloat16, torch.float32],
        "backward_y": [torch.bfloat16, torch.float32],
    }.get(op, [torch.bfloat16])


@pytest.mark.parametrize("view", ["rows apart", "columns apart", "one row"])
@pytest.mark.parametrize("op", OPS)
def test_ops_take_any_strides(op, view):
    def viewed(tensor: Tensor) -> Tensor:
        if view == "rows apart":
            return torch.cat([tensor, tensor * math.nan], dim=1)[:, : tensor.shape[1]]
        if view == "columns apart":
            return tensor.t().contiguous().t()
        return tensor[:1].expand_as(tensor)

    args = arguments(op, 21, 70, 50, 5, 0.25)
    args = tuple(viewed(a) if isinstance(a, Tensor) and a.dim() == 2 else a for a in args)
    assert_right(op, run(op, args), args)


@pytest.mark.parametrize("op", ["shrink", "backward_x", "backward_y"])
def test_partial_sums_repeat_to_the_bit(op):
    args = arguments(op, 16, 1100, 600, 4, 0.0)
    first, again = run(op, args), run(op, args)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [2, 8, 16, 31, 64])
@pytest.mark.parametrize("op", OPS)
def test_ops_equal_float64_at_many_shapes(op, rank, dtype):
    for M in (15, 16, 17, 64, 65, 200):
        for width in (16, 255, 256, 513):
            for p in (0.0, 0.3):
                args = arguments(op, M, width, width, rank, p, dtype=dtype)
                assert_right(op, run(op, args), args)


# ------------------------------------------------------------------ strays, races, bytes


@ON_CPU
@pytest.mark.parametrize("shape", [(21, 300, 130, 5, 0.1), (70, 256, 300, 16, 0.0)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_no_program_strays_or_races(op, shape):
    args = arguments(op, *shape)
    with counted():
        run(op, args)


def _moved(op: str, M: int, K: int, N: int, rank: int) -> int:
    """Bytes to and from memory in bfloat16 on an H100: x, dY, y and partial sums as often as they pass, the factors
    once, for they stay in the cache (0.3 MB at rank 16 of 50)."""
    thin = 2 * M * rank

    def parts(count: int, elements: int) -> int:  # written, read and added to a result; or the result alone
        return 2 * elements if count == 1 else (8 * count + 2) * elements

    if op == "shrink":
        tile = tiles.shrink(M, K, rank, False, (9, 0))
        return 2 * M * K + 2 * rank * K + parts(tile.splits, M * rank)
    if op == "backward_x":
        tile = tiles.backward_x(M, K, rank, False, (9, 0))
        return 4 * M * K + 2 * rank * K + thin + parts(tile.splits, rank * K)
    if op == "backward_y":
        tile = tiles.backward_y(M, N, rank, (9, 0))
        return 2 * M * N + 2 * rank * N + thin + parts(-(-N // tile.columns), M * rank) + parts(tile.splits, rank * N)
    return 4 * M * N + 2 * rank * N + thin


@ON_CPU
@pytest.mark.parametrize("shape", [(96, 1024, 1024, 16), (128, 4096, 1024, 16), (40, 520, 264, 8)], ids=str)
@pytest.mark.parametrize("op", ["shrink", "backward_x", "backward_y", "expand"])
def test_the_bytes_moved_are_those_of_the_formula(op, shape):
    M, K, N, rank = shape
    args = arguments(op, M, K, N, rank, 0.0, dtype=torch.bfloat16)
    args = (*args[:4], None) if op == "expand" else args
    with counted() as traffic:
        run(op, args)
    wide = [a for a in args[:1] if op != "expand"] + list(args[:1] if op == "expand" else [])
    for tensor in wide:
        assert traffic.of(tensor).loaded == traffic.of(tensor).distinct == 2 * tensor.numel(), "read more than once"
    small = {a.data_ptr() for a in args[1:] if isinstance(a, Tensor)}
    read = sum(r.distinct if r.start in small else r.loaded for r in traffic.regions.values())
    assert read + traffic.stored == _moved(op, M, K, N, rank)


LLAMA_3_8B = ((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096))


def test_a_layer_of_llama_moves_the_bytes_that_were_planned():
    """3·X + 3.3·Y: shrink X, backward_x 2·X, y read and written once more 2·Y, for the base's own GEMM runs first on a
    GPU, backward_y 1.3·Y; rank 16, M = 8192, dropout or not."""
    M, rank = 8192, 16
    planned = sum(2 * M * (3 * K + 3.3 * N) for K, N in LLAMA_3_8B)
    ours = sum(
        2 * 2 * M * N + sum(_moved(op, M, K, N, rank) for op in ("shrink", "backward_x", "backward_y"))
        for K, N in LLAMA_3_8B
    )
    assert ours < 1.05 * planned


def test_the_second_read_of_dY_is_saved_where_it_pays():
    for rank in (4, 8, 16, 32):
        assert tiles.backward_y_pays(rank)
        two_reads = 2 * (2 * 8192 * 4096 + 2 * rank * (8192 + 4096))
        assert _moved("backward_y", 8192, 4096, 4096, rank) < two_reads
    assert not tiles.backward_y_pays(64)


# ------------------------------------------------------------------ a wrong kernel is found

MUTATIONS = [
    (kernels, "(total * scale).to(out", "total.to(out", "shrink"),
    (kernels, "threshold).to(tile.dtype)", "threshold).to(tile.dtype) * 0", "shrink"),
    (kernels, "share, steps)):\n        columns", "share, steps) + 1):\n        step += 1\n        columns", "shrink"),
    (triton_runtime, "tl.join(low, high)", "tl.join(high, low)", "shrink"),
    (triton_runtime, "(0, 4, 3, 2, 1)", "(0, 3, 4, 2, 1)", "backward_x"),
    (triton_runtime, ">= threshold\n    high", "> threshold + 99\n    high", "shrink"),
    (kernels, "* kept_scale).to(factor", ").to(factor", "backward_x"),
    (kernels, "(total * kept_scale)", "total", "backward_x"),
    (kernels, "tl.join(tile, spread)", "tl.join(spread, tile)", "backward_x"),
    (kernels, "tl.zeros((RANK_BLOCK, 256), ", "tl.full((RANK_BLOCK, 256), 1.0, ", "backward_x"),
    (kernels, 'tl.dot(tile, factor, input_precision="ieee") * scale', "tl.dot(tile, factor)", "backward_y"),
    (kernels, "total.to(dB", "(total * 0).to(dB", "backward_y"),
    (triton_runtime, "range(count)", "range(1, count)", "backward_y"),
    (kernels, 'tl.dot(hidden, factor, input_precision="ieee") * scale', "tl.dot(hidden, factor)", "expand"),
    (kernels, "total += tl.load(bias", "total -= tl.load(bias", "expand"),
]  # fmt: skip


def install(monkeypatch, changed, module) -> None:
    for name in ("keep_super_block", *(n for n in vars(module) if n.endswith("_kernel"))):
        if hasattr(changed, name):
            for owner in (kernels, triton_runtime):
                if hasattr(owner, name):
                    monkeypatch.setattr(owner, name, getattr(changed, name))


@ON_CPU
@pytest.mark.parametrize(("module", "old", "new", "op"), MUTATIONS, ids=lambda value: getattr(value, "__name__", None))
def test_a_mutated_kernel_fails(module, old, new, op, monkeypatch, tmp_path):
    args = arguments(op, 40, 520, 300, 8, 0.3)
    assert_right(op, run(op, args), args)
    install(monkeypatch, mutant(module, old, new, tmp_path), module)
    with pytest.raises(AssertionError, match="off by"):
        assert_right(op, run(op, args), args)


@ON_CPU
@pytest.mark.parametrize(
    ("module", "old", "new", "op", "found"),
    [
        (kernels, "(rows < M)[:, None] & (ranks", "(rows >= 0)[:, None] & (ranks", "shrink", "race|stray"),
        (kernels, "mask=columns < N, other", "mask=columns < N + 1, other", "expand", "stray"),
        (kernels, "dB + tl.program_id(1)", "dB + 0 * tl.program_id(1)", "backward_y", "race"),
    ],
)
def test_a_stray_and_a_race_are_found(module, old, new, op, found, monkeypatch, tmp_path):
    args = arguments(op, 40, 520, 300, 8, 0.0)
    install(monkeypatch, mutant(module, old, new, tmp_path), module)
    with counted(), pytest.raises(Exception, match=found):
        run(op, args)


def test_a_wrong_kernel_is_replaced_by_pytorch_with_a_warning(monkeypatch, tmp_path):
    monkeypatch.setattr(dispatch, "_trusted", {})
    install(monkeypatch, mutant(kernels, "(total * scale).to(out", "total.to(out", tmp_path), kernels)
    args = arguments("shrink", 20, 300, 0, 4, 0.1)
    with pytest.warns(UserWarning, match=r"kernel shrink for torch.float32 at rank 4 on .* differs from PyTorch"):
        first = triton_operators.shrink(*args)
    assert torch.equal(first, reference.shrink(*args))
    assert torch.equal(triton_operators.shrink(*args), first)  # and the user is told once


def test_a_kernel_that_does_not_compile_is_replaced_by_pytorch(monkeypatch):
    monkeypatch.setattr(dispatch, "_trusted", {})
    monkeypatch.setattr(kernels, "launch", lambda *a, **k: 1 / 0)
    args = arguments("shrink", 20, 30, 0, 4, 0.0)
    with pytest.warns(UserWarning, match="failed: division by zero; PyTorch is used"):
        assert torch.equal(triton_operators.shrink(*args), reference.shrink(*args))


@pytest.mark.parametrize("broken", ["shrink", "backward_x"])
def test_dropout_without_a_trusted_kernel_is_what_aten_gives(broken, monkeypatch):
    """To the bit, with the mask that ATen draws: one wrong kernel of the two that share a mask takes both away."""
    monkeypatch.setattr(dispatch, "_trusted", {})
    right = getattr(kernels, broken)

    def wrong(*args, **options):
        result = right(*args, **options)
        return result * 1.5 if isinstance(result, Tensor) else (result[0], result[1] * 1.5)

    monkeypatch.setattr(kernels, broken, wrong)
    factors = (torch.randn(4, 300, device=DEVICE), torch.randn(350, 4, device=DEVICE))
    x, weight, dY = (torch.randn(size, device=DEVICE) for size in ((20, 300), (350, 300), (20, 350)))
    leaves = [tensor.requires_grad_() for tensor in (x, *factors)]
    with pytest.warns(UserWarning, match=rf"kernel {broken} for torch.float32 at rank 4 .*; PyTorch is used"):
        found = lora_step(x, weight, leaves[1], leaves[2], dY, 0.25)
    monkeypatch.setattr(dispatch, "is_trusted", lambda op, *args, **options: op == "backward_y")
    for one, other in zip(found, lora_step(x, weight, leaves[1], leaves[2], dY, 0.25), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("broken", ["expand", "backward_y"])
def test_a_step_without_a_trusted_kernel_is_what_aten_gives(broken, monkeypatch):
    monkeypatch.setattr(dispatch, "_trusted", {})
    monkeypatch.setattr(kernels, broken, lambda *args, **options: 1 / 0)
    x, A, like = (torch.randn(size, device=DEVICE) for size in ((20, 300), (4, 300), (20, 350)))
    B, h = torch.randn(350, 4, device=DEVICE), torch.randn(20, 4, device=DEVICE)
    steps, *_ = dispatch.lora_steps(x, A, B, 0.0)
    arguments = (like, h, B) if broken == "expand" else (like, B, h, 0.5, torch.float32)
    with pytest.warns(UserWarning, match=rf"kernel {broken} .* failed: division by zero; PyTorch is used"):
        found = getattr(steps, broken)(*arguments)
    expected = getattr(aten, broken)(*arguments)
    for one, other in zip(*((each if isinstance(each, tuple) else (each,)) for each in (found, expected)), strict=True):
        assert torch.equal(one, other)


def trusts(op: str, dtype: torch.dtype) -> bool:
    return dispatch.is_trusted(
        op, torch.device(DEVICE), dtype, torch.float32, 100, 64, 8, dropout=op in ("shrink", "backward_x")
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["shrink", "backward_x", "backward_y", "expand"])
def test_one_typical_element_that_is_wrong_by_two_percent_is_seen(op, dtype, monkeypatch):
    """The least of the middle half of the elements: beside the largest such an error would pass for rounding."""
    right = getattr(kernels, op)

    def slightly_wrong(*args, **options):
        result = right(*args, **options)
        output = result if isinstance(result, Tensor) else result[-1]
        flat = output.view(-1)
        at = flat.abs().argsort()[len(flat) // 2]
        flat[at] *= 1.02
        return result

    monkeypatch.setattr(dispatch, "_trusted", {})
    assert trusts(op, dtype)
    monkeypatch.setattr(dispatch, "_trusted", {})
    monkeypatch.setattr(kernels, op, slightly_wrong)
    with pytest.warns(UserWarning, match=f"{op} .* differs from PyTorch"):
        assert not trusts(op, dtype)


def test_the_check_compares_with_products_in_float64(monkeypatch):
    """Whatever a GPU does with float32, as TF32 does, is no part of what is right."""
    seen, product = set(), torch.Tensor.__matmul__

    def noted(left: Tensor, right: Tensor) -> Tensor:
        seen.update((left.dtype, right.dtype))
        return product(left, right)

    monkeypatch.setattr(dispatch, "_trusted", {})
    monkeypatch.setattr(torch.Tensor, "__matmul__", noted)
    for op in ("shrink", "backward_x", "backward_y", "expand"):
        assert trusts(op, torch.float32)
    assert seen == {torch.float64}


@ON_CPU
def test_the_check_runs_the_binary_that_the_step_will_run(monkeypatch):
    """The tile, and a sum that is split or not, are those of the problem, not of the sample."""
    launched: list[tuple] = []
    launch = kernels.launch

    def noted(kernel, grid, *args, tile, **constants) -> None:
        launched.append(
            (kernel.fn.__name__, grid[1] > 1, dataclasses.replace(tile, splits=1), tuple(constants.items()))
        )
        launch(kernel, grid, *args, tile=tile, **constants)

    monkeypatch.setattr(kernels, "launch", noted)
    for M in (4, 100, 20_000):
        for op in ("shrink", "backward_x", "backward_y"):
            monkeypatch.setattr(dispatch, "_trusted", {})
            tile = tiles.tile_of(op, M, 64, 8, True, (9, 0))
            launched.clear()
            assert dispatch.is_trusted(op, torch.device("cpu"), torch.float32, torch.float32, M, 64, 8, dropout=True)
            ((_, split, tried, _),) = launched
            assert tried == dataclasses.replace(tile, splits=1)
            assert split == (tile.splits > 1) or op == "backward_y"  # whose grid is columns by splits


class Casts(TorchDispatchMode):
    """The shapes that were cast to another dtype."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **kwargs or {})

    def __enter__(self):
        self.shapes: list[tuple[int, ...]] = []
        return super().__enter__()


def test_a_step_casts_each_factor_once():
    """Forward and backward together: on a GPU each cast is a launch."""
    x, weight = (torch.randn(size, device=DEVICE).bfloat16() for size in ((40, 300), (350, 300)))
    A, B = (torch.randn(size, device=DEVICE, requires_grad=True) for size in ((4, 300), (350, 4)))
    dY = torch.randn(40, 350, device=DEVICE).bfloat16()
    lora_step(x.requires_grad_(), weight, A, B, dY, 0.25)  # what is tried first casts too
    with Casts() as casts:
        _, _, dA, dB = lora_step(x, weight, A, B, dY, 0.25)
    assert [casts.shapes.count(shape) for shape in ((4, 300), (350, 4))] == [1, 1]
    assert dA.dtype == dB.dtype == torch.float32


def test_nothing_is_compared_while_a_graph_is_captured(monkeypatch):
    """Nor remembered: the first call outside of a capture compares."""
    known: dict = {}
    monkeypatch.setattr(dispatch, "_trusted", known)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(dispatch.check, "agrees", lambda *_: pytest.fail("compared inside a capture"))
    assert dispatch.is_trusted("shrink", torch.device("cuda"), torch.float32, torch.float32, 9, 64, 8)
    assert known == {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [*OPS, *GROUPED])
def test_right_kernels_are_trusted(op, dtype, monkeypatch):
    monkeypatch.setattr(dispatch, "_trusted", {})
    state = torch.get_rng_state()
    for M, width in ((3, 64), (100, 64), (100, 65)):
        factor_dtype, rows = (dtype, 16) if op.startswith("grouped") else (torch.float32, 0)
        assert dispatch.is_trusted(op, torch.device(DEVICE), dtype, factor_dtype, M, width, 8, dropout=True, rows=rows)
    assert torch.equal(state, torch.get_rng_state()), "the check drew from the user's generator"


# ------------------------------------------------------------------ as operators


def with_gradients(args) -> tuple:
    return tuple(a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


@pytest.mark.parametrize("op", ["shrink", "backward_x"])
def test_opcheck(op):
    args = arguments(op, 6, 40, 24, 4, 0.25)
    if op == "shrink":  # the one with a gradient
        args = with_gradients(args)
    torch.use_deterministic_algorithms(False)  # opcheck compares what a mode of its own would fill with NaN
    torch.library.opcheck(getattr(triton_operators, op), args)


def test_the_gradients_of_the_registered_op_equal_those_of_pytorch():
    op = "shrink"
    args = with_gradients(arguments(op, 9, 70, 50, 4, 0.25))
    exact_args = with_gradients([a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args])
    out = getattr(triton_operators, op)(*args)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    expected(op, *exact_args)[0][0].backward(gradient.double())
    for got, exact in zip(args, exact_args, strict=True):
        if isinstance(got, Tensor) and got.is_floating_point():
            torch.testing.assert_close(got.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


def test_a_second_derivative_is_refused():
    args = arguments("shrink", 9, 70, 0, 4, 0.0)
    x = args[0].requires_grad_()
    (gradient,) = torch.autograd.grad(triton_operators.shrink(x, *args[1:]).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="backward_x"):
        gradient.sum().backward()


def test_the_hot_path_traces_on_a_cuda_that_is_not_there(monkeypatch):
    monkeypatch.setattr(dispatch, "MODE", "1")

    def step(x: Tensor, A: Tensor, B: Tensor, dY: Tensor) -> tuple[Tensor, ...]:
        seed = philox.new_seed(x.device)
        hs = triton_operators.shrink(x, A, 0.5, 0.1, seed)
        return hs @ B.t(), dY.t() @ hs, *triton_operators.backward_x(x, dY @ B, A, 0.1, seed)

    with FakeTensorMode(allow_non_fake_inputs=False):
        sizes = ((32, 64), (8, 64), (48, 8), (32, 48))
        args = [torch.empty(size, device="cuda", dtype=torch.bfloat16) for size in sizes]
        assert dispatch.takes_kernels(args[0], args[1], args[2])
        graph = make_fx(step)(*args)
        outputs = graph(*args)
    assert [tuple(output.shape) for output in outputs] == [(32, 48), (48, 8), (32, 64), (8, 64)]
    assert {output.device.type for output in outputs} == {"cuda"}
    called = [node.target.name() for node in graph.graph.nodes if "peftlib" in str(node.target)]
    assert called == ["peftlib::shrink", "peftlib::backward_x"]


@ON_CPU
def test_what_is_supported(monkeypatch):
    x, A, B = torch.zeros(4, 32), torch.zeros(4, 32), torch.zeros(16, 4)
    assert dispatch.takes_kernels(x, A, B)
    assert dispatch.takes_kernels(x.bfloat16(), A, B)
    assert not dispatch.takes_kernels(x, A.bfloat16(), B)
    assert not dispatch.takes_kernels(x.double(), A.double(), B.double())
    assert not dispatch.takes_kernels(x[:0], A, B)
    assert not dispatch.takes_kernels(x, torch.zeros(65, 32), torch.zeros(16, 65))
    for forced in ("0", "1"):
        monkeypatch.setattr(dispatch, "MODE", forced)
        assert not dispatch.takes_kernels(x, A, B)


@pytest.mark.parametrize("op", ["shrink", "backward_x"])
def test_empty_inputs_give_empty_or_zero_outputs(op):
    args = arguments(op, 0, 16, 24, 4, 0.0)
    got = getattr(triton_operators, op)(*args)
    for output in got if isinstance(got, tuple) else (got,):
        assert output is None or not output.any()


# ------------------------------------------------------------------ as LoRA's path


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_linear_runs_on_the_kernels(dtype, p, monkeypatch):
    launched, launch = [], kernels.launch

    def noted(kernel, *args, **options) -> None:
        launched.append(kernel.fn.__name__)
        launch(kernel, *args, **options)

    monkeypatch.setattr(kernels, "launch", noted)
    x, weight = torch.randn(3, 64, 300), torch.randn(350, 300)
    A, B, dY = torch.randn(8, 300), torch.randn(350, 8), torch.randn(3, 64, 350)
    x, weight, dY = (tensor.to(DEVICE, dtype) for tensor in (x, weight, dY))
    x, A, B = (tensor.to(DEVICE).requires_grad_() for tensor in (x, A, B))
    got, exact = lora_step(x, weight, A, B, dY, p), exact_lora_step(x, weight, A, B, dY, p)
    for output, right in zip(got, exact, strict=True):
        # five roundings to the dtype lie between input and gradient, each relative to values of this size
        assert (output - right).abs().max() <= 5 * torch.finfo(dtype).eps * right.abs().max()
    assert set(launched) == (
        {"shrink_kernel", "backward_y_kernel", "backward_x_kernel"} if p else {"backward_y_kernel"}
    )


def lora_step(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, dY: Tensor, p: float) -> tuple[Tensor, ...]:
    torch.manual_seed(5)
    y = lora_linear(x, weight, None, A, B, 0.5, p, training=True)
    return y, *torch.autograd.grad(y, (x, A, B), dY)


def exact_lora_step(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, dY: Tensor, p: float) -> tuple[Tensor, ...]:
    torch.manual_seed(5)
    x2 = x.flatten(0, 1)
    keep = (mask(x2, p, philox.new_seed(x.device)) * philox.kept_scale(p)) if p else torch.ones_like(x2)
    x, weight, A, B, dY = (tensor.detach().double().requires_grad_() for tensor in (x, weight, A, B, dY))
    hidden = (x * keep.view(x.shape).double()) @ A.t() * 0.5
    y = x @ weight.t() + hidden @ B.t()
    return y, *torch.autograd.grad(y, (x, A, B), dY)


LARGE = (160, 300)  # with 350 outputs 104,000 elements; below 98,304 plain ops run, and no kernel


@pytest.mark.parametrize("frozen", ["A", "B", "x"])
def test_lora_linear_gives_the_gradients_that_are_asked_for(frozen):
    x, weight = torch.randn(*LARGE, device=DEVICE), torch.randn(350, 300, device=DEVICE)
    A, B = torch.randn(4, 300, device=DEVICE), torch.randn(350, 4, device=DEVICE)
    dY = torch.randn(LARGE[0], 350, device=DEVICE)
    everything = {"x": x, "A": A, "B": B}
    for tensor in everything.values():
        tensor.requires_grad_()
    whole = dict(zip(("y", "x", "A", "B"), lora_step(x, weight, A, B, dY, 0.25), strict=True))
    everything.pop(frozen).requires_grad_(False)
    torch.manual_seed(5)
    y = lora_linear(x, weight, None, A, B, 0.5, 0.25, training=True)
    assert torch.equal(y, whole["y"])
    for name, gradient in zip(everything, torch.autograd.grad(y, list(everything.values()), dY), strict=True):
        # one path sums in ATen, the other in a kernel
        assert (gradient - whole[name]).abs().max() <= 5 * torch.finfo(x.dtype).eps * whole[name].abs().max()


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_lora_add_runs_on_the_kernels(p):
    x, y = torch.randn(*LARGE, device=DEVICE), torch.randn(LARGE[0], 350, device=DEVICE)
    A, B = torch.randn(4, 300, device=DEVICE), torch.randn(350, 4, device=DEVICE)
    torch.manual_seed(5)
    got = lora_add(y, x, A, B, 0.5, p, training=True)
    torch.manual_seed(5)
    keep = mask(x, p, philox.new_seed(x.device)) * philox.kept_scale(p) if p else torch.ones_like(x)
    expected = y.double() + 0.5 * (x * keep).double() @ A.double().t() @ B.double().t()
    # two roundings of 300 + 4 sums, relative to values of this size
    assert (got - expected).abs().max() <= 304 * torch.finfo(x.dtype).eps * expected.abs().max()


def test_checkpointing_draws_the_same_mask_again():
    x, weight = torch.randn(*LARGE, device=DEVICE, requires_grad=True), torch.randn(350, 300, device=DEVICE)
    A, B = (torch.randn(size, device=DEVICE, requires_grad=True) for size in ((4, 300), (350, 4)))

    def gradients(through) -> tuple[Tensor, ...]:
        torch.manual_seed(9)
        return torch.autograd.grad(through(x).square().sum(), (x, A, B))

    def layer(x: Tensor) -> Tensor:
        return lora_linear(x, weight, None, A, B, 0.5, 0.25, training=True)

    plain = gradients(layer)
    again = gradients(lambda x: checkpoint(layer, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_traced_with_dropout_is_the_term_of_the_mask_that_was_drawn(dtype, monkeypatch):
    """As a compiler traces it, but step by step: on the kernels where they take the dtype, else in plain ops."""
    monkeypatch.setattr(dispatch, "is_compiling", lambda: True)
    x, A, B = (torch.randn(size, device=DEVICE, dtype=dtype) for size in ((2, 9, 64), (4, 64), (48, 4)))
    torch.manual_seed(5)
    got = linear.traced_term(x, A, B, 0.5, 0.25)
    torch.manual_seed(5)
    if dtype == torch.float64:
        keep = F.dropout(torch.ones_like(x), 0.25) * 0.75
    else:
        keep = philox.keep_mask_of(x.flatten(0, 1), 0.25, philox.new_seed(x.device)).view_as(x)
    assert 0 < keep.count_nonzero() < keep.numel()
    expected = reference.lora_term(*(t.double() for t in (x, A, B)), 0.5, 0.25, keep)
    # sums of 64 and of 4 products, relative to values of this size
    assert (got - expected).abs().max() <= 68 * torch.finfo(dtype).eps * expected.abs().max()


@ON_CPU
def test_a_dtype_that_no_kernel_takes_runs_in_aten():
    x, A, B = torch.zeros(4, 32), torch.zeros(4, 32), torch.zeros(16, 4)
    assert dispatch.lora_steps(x, A, B, 0.0)[0] is not aten
    assert dispatch.lora_steps(x.double(), A.double(), B.double(), 0.0)[0] is aten


@pytest.mark.parametrize(("name", "known"), [("gfx942:sramecc+:xnack-", True), ("gfx90a", False), ("gfx1100", False)])
def test_of_amd_devices_only_those_with_tiles_of_their_own_run_kernels(name, known, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(gcnArchName=name))
    assert tiles.fit(torch.device("cuda"), torch.float32) == known


def test_an_nvidia_device_without_bfloat16_units_runs_no_kernels(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, known in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert tiles.fit(torch.device("cuda"), torch.bfloat16) == known
        assert not tiles.fit(torch.device("cuda"), torch.float32), "it would spill"


def test_an_mi300x_has_its_own_tiles(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert tiles.capability(torch.device("cpu")) == tiles.MI300X


def test_dropout_without_a_seed_is_refused():
    with pytest.raises(ValueError, match=r"dropout of 0\.5 needs a seed: philox\.new_seed\(x\.device\) draws one"):
        reference.shrink(torch.zeros(2, 4), torch.zeros(1, 4), 1.0, 0.5, None)


def test_compiled_lora_linear_is_one_graph_that_keeps_x_and_a_seed():
    x, weight = torch.randn(9, 64, device=DEVICE, requires_grad=True), torch.randn(48, 64, device=DEVICE)
    A, B = (torch.randn(size, device=DEVICE, requires_grad=True) for size in ((8, 64), (48, 8)))
    torch._dynamo.reset()
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        torch.manual_seed(5)
        y = compiled(x, weight, None, A, B, 0.5, 0.25, training=True)
    got = (y, *torch.autograd.grad(y, (x, A, B), torch.ones_like(y)))
    exact = exact_lora_step(x[None], weight, A, B, torch.ones_like(y)[None], 0.25)
    for output, right in zip(got, exact, strict=True):
        torch.testing.assert_close(output.double(), right.view(output.shape), rtol=1e-5, atol=1e-4)
    assert not [t for t in kept if t.shape == x.shape and t.data_ptr() != x.data_ptr()], "a dropped x or its mask"


# ------------------------------------------------------------------ gpu_check


@pytest.fixture
def gpu_check(monkeypatch):
    """The program of `make gpu-check`, which is no part of the package."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("gpu_check")
    sys.modules.pop("gpu_check")


@ON_CPU
def test_gpu_check_prints_its_table_from_the_interpreter(capsys, gpu_check):
    small = ["--tokens=20", "--in=64", "--out=48", "--rank=4", "--repeats=1"]
    assert gpu_check.main(["--interpret", *small]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "these times mean nothing" in lines[0]
    questions = [line for line in lines if line.endswith("?")]
    names = {line[:22].strip() for line in lines[3:] if line and line not in questions}
    assert len(questions) == len({*questions}) == 7
    assert {
        "GEMM, beta 1", "shrink, p = 0", "shrink, p = 0.1", "backward_x, p = 0.1", "backward_y, rank 64", "expand",
        "one shrink, p = 0.1", "8 adapters, step", "8 adapters, use", "bottleneck", "step of 20, p = 0.1",
    } <= names  # fmt: skip


@ON_CPU
def test_gpu_check_ends_in_the_time_that_it_was_given(capsys, monkeypatch, gpu_check):
    """Each round takes a second of a clock that nothing else moves."""
    now = [0.0]

    def passes(function, device):
        now[0] += 0.5
        return 1.0

    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(gpu_check, "_time", passes)
    assert gpu_check.main(["--interpret", "--minutes=5", "--repeats=1000", "--tokens=8", "--in=16", "--out=16"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:] if line and not line.endswith("?")]
    assert 300 <= now[0] <= 300 + len(rows)  # a round that has begun is finished
    assert all(1 <= int(row[-1]) < 1000 for row in rows)


@ON_CPU
def test_gpu_check_times_nothing_while_the_tests_have_not_ended(capsys, monkeypatch, gpu_check):
    def hangs(command, *, check, timeout):
        raise gpu_check.subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpu_check, "_refusal", lambda interpret: None)
    monkeypatch.setattr(gpu_check.subprocess, "run", hangs)
    assert gpu_check.main(["--minutes=4"]) == 1
    assert "did not end in 120 s" in capsys.readouterr().err


@ON_CPU
def test_gpu_check_refuses_without_a_gpu(capsys, gpu_check):
    assert gpu_check.main([]) == 2
    assert "finds no CUDA or ROCm GPU. Run it on a machine with one" in capsys.readouterr().err


@ON_CPU
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"find_spec": lambda name: None}, "Triton is not installed, .* Install"),
        ({"TESTS": Path("nowhere")}, "nowhere is not there. Run it from a check"),
    ],
    ids=["no Triton", "no tests"],
)
def test_gpu_check_refuses_where_it_could_check_nothing(spoil, message, capsys, monkeypatch, gpu_check):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in spoil.items():
        monkeypatch.setattr(gpu_check, name, value)
    assert gpu_check.main([]) == 2
    assert re.search(message, capsys.readouterr().err)


@ON_CPU
def test_gpu_check_goes_on_where_there_is_a_gpu_and_the_tests(monkeypatch, gpu_check):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu_check._refusal(interpret=False) is None


@ON_CPU
def test_gpu_check_times_nothing_while_a_test_fails(capsys, monkeypatch, gpu_check):
    monkeypatch.setattr(gpu_check, "_refusal", lambda interpret: None)
    monkeypatch.setattr(gpu_check.subprocess, "run", lambda *a, **k: type("Failed", (), {"returncode": 1}))
    assert gpu_check.main([]) == 1
    assert "nothing is timed" in capsys.readouterr().err

"""The grouped kernels: each row through the pair of its adapter, right in all dtypes, in bounds, without races, with as
few bytes as one adapter would move and the other adapters' factors.

Without a GPU they run in the interpreter; `make gpu-check` runs this file compiled.
"""

import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

if importlib.util.find_spec("triton") is None:
    pytest.skip("there is no Triton here", allow_module_level=True)

import peftlib
from peftlib.kernels import Segments, dispatch, lora_linear, lora_linear_rows, philox, serves_rows, triton_runtime
from peftlib.kernels.grouped import reference
from peftlib.kernels.grouped import triton as kernels
from peftlib.kernels.grouped.blocks import blocks_of
from peftlib.kernels.grouped.reference import Masks
from peftlib.kernels.lora import rows as lora_rows
from peftlib.kernels.tiles import Tile
from support.rows import first_and_second
from tools.triton.mutants import mutant
from tools.triton.traffic import counted

pytestmark = pytest.mark.mutants

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_CPU = pytest.mark.skipif(DEVICE.type != "cpu", reason="looks into the interpreter")
DTYPES = (torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow))
OPS = ("grouped_shrink", "grouped_expand_", "grouped_backward_y", "grouped_backward_x")
# Adapter and rows: one in several runs of several blocks, one without rows, one of a row, rows of none.
RUNS = [(0, 20), (3, 3), (-1, 5), (1, 1), (0, 40), (-1, 1), (3, 18)]
ADAPTERS, K, N, RANK = 4, 257, 150, 5  # one column more than the block that a mask is drawn for
DROPPED = (0.0, 0.25, 0.5, 0.1)  # of four pairs
SCALES, DROPOUTS = (0.5, 2.0, 1.0, -1.0), (0.1, 0.0, 0.5, 0.75)


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch):
    """On the CPU in the interpreter; outputs start as NaN, so that what is not written is seen."""
    monkeypatch.setattr(dispatch, "MODE", "1" if DEVICE.type == "cuda" else "interpret")
    monkeypatch.setattr(triton_runtime, "has_tiles", lambda device, dtype: True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def of_rows(runs: list[tuple[int, int]]) -> list[int]:
    return [adapter for adapter, count in runs for _ in range(count)]


def arguments(op: str, dtype: torch.dtype, dropout: bool = False, runs: Any = RUNS, items: int = 6) -> tuple:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape).to(DEVICE, dtype)

    M = len(of_rows(runs))
    blocks = blocks_of(runs, ADAPTERS, 16, items, DEVICE)
    scales = torch.tensor(SCALES, device=DEVICE)
    masks = Masks.of(DROPOUTS, torch.tensor([3, 5, 7, 2**62 + 9], device=DEVICE)) if dropout else None
    A, B, thin = normal(ADAPTERS, RANK, K), normal(ADAPTERS, N, RANK), normal(M, RANK)
    return {
        "grouped_shrink": (normal(M, K), A, scales, blocks, masks),
        "grouped_expand_": (normal(M, N), thin, B, blocks),
        "grouped_backward_y": (normal(M, N), B, thin, scales, blocks),
        "grouped_backward_x": (normal(M, K), thin, A, blocks, masks),
    }[op]


def kept(masks: Masks | None, runs: Any) -> Tensor:
    """[M, K]: what each element of x is multiplied by, the mask of an adapter being drawn for its own rows alone."""
    of = torch.tensor(of_rows(runs))
    found = torch.ones(len(of), K, dtype=torch.float64)
    if masks is not None:
        for adapter, p in enumerate(DROPOUTS):
            own = of == adapter
            keep = philox.keep_mask(int(own.sum()), K, p, masks.seeds[adapter : adapter + 1].cpu())
            found[own] = keep.double() * philox.kept_scale(p)
    return found.to(DEVICE)


def expected(op: str, args: tuple, runs: Any = RUNS) -> list[tuple[Tensor, Tensor, int]]:
    """Row by row in float64 from the very inputs: each output, the sum of its terms' sizes, and how many there are."""
    of = of_rows(runs)

    def stacked(rows: list[Tensor]) -> Tensor:
        return torch.stack(rows)

    def by_adapter(left: Tensor, right: Tensor) -> Tensor:
        zero = left.new_zeros(left.shape[1], right.shape[1])
        own = [[at for at, adapter in enumerate(of) if adapter == wanted] for wanted in range(ADAPTERS)]
        return torch.stack([left[rows].t() @ right[rows] if rows else zero for rows in own])

    wide = [a.double() if isinstance(a, Tensor) else a for a in args]
    pair = [wide, [a.abs() if isinstance(a, Tensor) else a for a in wide]]
    found: list[list[Tensor]] = []
    terms: list[int] = []
    for one in pair:
        if op == "grouped_expand_":
            y, h, B, _ = one
            found.append([stacked([y[i] if a < 0 else y[i] + B[a] @ h[i] for i, a in enumerate(of)])])
            terms = [RANK + 1]
        elif op == "grouped_shrink":
            x, A, scales, _, masks = one
            x = x * kept(masks, runs)
            zero = x.new_zeros(RANK)
            found.append([stacked([zero if a < 0 else scales[a] * (A[a] @ x[i]) for i, a in enumerate(of)])])
            terms = [K + 2]
        elif op == "grouped_backward_y":
            dY, B, h, scales, _ = one
            zero = dY.new_zeros(RANK)
            g = stacked([zero if a < 0 else scales[a] * (dY[i] @ B[a]) for i, a in enumerate(of)])
            found.append([g, by_adapter(dY, h)])
            terms = [N + 2, len(of)]
        else:
            x, g, A, _, masks = one
            zero, factor = x.new_zeros(K), kept(masks, runs)
            dX = stacked([zero if a < 0 else g[i] @ A[a] for i, a in enumerate(of)]) * factor
            found.append([dX, by_adapter(g, x * factor)])
            terms = [RANK + 2, len(of) + 2]
    exact, size = found
    return list(zip(exact, size, terms, strict=True))


def assert_right(op: str, got: Any, args: tuple, runs: Any = RUNS) -> None:
    """Each element within what its own sum in float32 may be off by, and one rounding to its dtype."""
    outputs = got if isinstance(got, tuple) else (got,)
    for output, (exact, size, terms) in zip(outputs, expected(op, args, runs), strict=True):
        precision = torch.finfo(output.dtype)
        bound = precision.eps / 2 * exact.abs() + (terms + 2) * 2.0**-24 * size + precision.tiny
        error = (output.double() - exact).abs()
        assert bool((error <= bound).all()), f"{op}: off by {(error / bound).nan_to_num(math.inf).max():.1f} bounds"


def run(module: Any, op: str, args: tuple) -> Any:
    """What is written to is a copy."""
    return getattr(module, op)(args[0].clone() if op.endswith("_") else args[0], *args[1:])


dropping = pytest.mark.parametrize("dropout", [False, True], ids=["all", "dropout"])


def test_the_tables_cover_each_row_once_and_count_an_adapter_s_own_rows():
    blocks = blocks_of(RUNS, ADAPTERS, 16, 6, DEVICE)
    of, own = of_rows(RUNS), dict.fromkeys(range(-1, ADAPTERS), 0)
    places = {}
    for row, adapter in enumerate(of):
        places[row] = own[adapter]
        own[adapter] += 1
    covered = []
    for adapter, first, last, before in blocks.table.tolist():
        assert 0 < last - first <= 16
        assert {of[row] for row in range(first, last)} == {adapter}
        assert places[first] == before
        covered += range(first, last)
    assert sorted(covered) == list(range(len(of)))
    items = blocks.items.tolist()
    assert [first for _, first, _ in items[1:]] == [last for *_, last in items[:-1]]
    assert (items[0][1], items[-1][2]) == (0, len(blocks.table))
    for adapter, first, last in items:
        assert {block[0] for block in blocks.table[first:last].tolist()} == {adapter}
    assert {adapter for adapter, *_ in items[: blocks.adapted]} == {0, 1, 3}
    assert {adapter for adapter, *_ in items[blocks.adapted :]} == {-1}
    for adapter, (first, last) in enumerate(blocks.parts.tolist()):
        assert {items[at][0] for at in range(first, last)} <= {adapter}
    assert sum(last - first for first, last in blocks.parts.tolist()) == blocks.adapted


def test_sums_are_dealt_out_by_how_many_blocks_an_adapter_has():
    blocks = blocks_of([(0, 96), (1, 32), (-1, 64)], 2, 16, 6, DEVICE)
    assert blocks.items.tolist() == [[0, 0, 2], [0, 2, 4], [0, 4, 6], [1, 6, 8], [-1, 8, 10], [-1, 10, 12]]
    assert blocks.parts.tolist() == [[0, 3], [3, 4]]
    assert (blocks.adapted, blocks.rows) == (4, 16)
    assert {blocks.table.dtype, blocks.items.dtype, blocks.parts.dtype} == {torch.int32}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@dropping
@pytest.mark.parametrize("op", OPS)
def test_ops_and_their_reference_equal_float64(op, dropout, dtype):
    args = arguments(op, dtype, dropout)
    assert_right(op, run(kernels, op, args), args)
    if dtype == torch.float32:
        assert_right(op, run(reference, op, args), args)


@pytest.mark.parametrize("module", [kernels, reference], ids=["kernels", "reference"])
@pytest.mark.parametrize("op", ["grouped_backward_y", "grouped_backward_x"])
def test_gradients_of_factors_are_rounded_to_the_dtype_asked_for_alone(op, module):
    args = arguments(op, torch.bfloat16)
    found = getattr(module, op)(*args, dtype=torch.float32)
    assert [each.dtype for each in found] == [torch.bfloat16, torch.float32]
    assert_right(op, found, args)


@pytest.mark.parametrize("op", OPS)
def test_a_batch_of_one_adapter_and_sums_of_one_part(op):
    runs = [(2, 16)]
    args = arguments(op, torch.float32, runs=runs, items=1)
    assert_right(op, run(kernels, op, args), args, runs)


@pytest.mark.parametrize(("columns", "dropout"), [(128, False), (256, True)])
def test_sums_over_columns_may_be_split(columns, dropout):
    args, launched, launch = arguments("grouped_shrink", torch.bfloat16, dropout), [], kernels.launch
    tile = Tile(16, columns, 4, 1, splits=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "launch", lambda *a, **o: launched.append((a[1], o["tile"])) or launch(*a, **o))
        found = kernels.grouped_shrink(*args, tile=tile)
    assert launched == [((len(args[3].table), 2), tile)]
    assert_right("grouped_shrink", found, args)


@pytest.mark.parametrize("op", OPS)
def test_a_tile_that_is_given_is_the_one_that_runs(op, monkeypatch):
    args, launched, launch = arguments(op, torch.float32), [], kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda *a, **o: launched.append(o["tile"]) or launch(*a, **o))
    tile = Tile(16, 256, 8, 1)
    assert_right(op, getattr(kernels, op)(args[0].clone(), *args[1:], tile=tile), args)
    assert launched[0] == tile


def test_rows_of_no_adapter_keep_their_bits():
    args = arguments("grouped_expand_", torch.bfloat16)
    bare = torch.tensor(of_rows(RUNS), device=DEVICE) < 0
    args[1][bare] = math.nan
    assert torch.equal(run(kernels, "grouped_expand_", args)[bare], args[0][bare])


@pytest.mark.parametrize("op", ["grouped_backward_y", "grouped_backward_x"])
def test_sums_over_rows_repeat_to_the_bit(op):
    args = arguments(op, torch.bfloat16, dropout=True)
    first, again = run(kernels, op, args), run(kernels, op, args)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_what_is_not_finite_in_one_adapter_reaches_no_other(op):
    args = arguments(op, torch.float32, dropout=True)
    before = run(kernels, op, args)
    spoiled = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
    of = torch.tensor(of_rows(RUNS), device=DEVICE)
    for tensor in spoiled:
        if isinstance(tensor, Tensor) and tensor.dim() > 1:
            tensor[0 if tensor.dim() == 3 else of == 0] = math.nan
    after = run(kernels, op, spoiled)
    for one, other in zip(*((r if isinstance(r, tuple) else (r,)) for r in (before, after)), strict=True):
        others = torch.arange(ADAPTERS, device=DEVICE) > 0 if one.dim() == 3 else of != 0
        assert torch.equal(one[others], other[others])
        assert other[~others].isnan().any()


# ------------------------------------------------------------------ strays, races, bytes, wrong kernels


@ON_CPU
@dropping
@pytest.mark.parametrize("op", OPS)
def test_no_program_strays_or_races(op, dropout):
    args = arguments(op, torch.float32, dropout)
    with counted():
        run(kernels, op, args)


@ON_CPU
@dropping
@pytest.mark.parametrize("op", OPS)
def test_rows_of_no_adapter_read_neither_rows_nor_factors(op, dropout):
    loaded = []
    for runs in ([(2, 16)], [(2, 16), (-1, 20)]):
        args = arguments(op, torch.float32, dropout, runs)
        with counted() as traffic:
            getattr(kernels, op)(*args)
        wide = [arg for arg in args if isinstance(arg, Tensor) and arg.dim() > 1]
        loaded.append([traffic.of(tensor).loaded for tensor in wide])
    assert loaded[0] == loaded[1]


def pass_over(adapters: int) -> tuple[int, int, int]:
    """Bytes read of the factors, bytes written of their gradients, and multiplications, of a forward and backward pass
    of 128 tokens in bfloat16."""
    rows = 128 // adapters
    blocks = blocks_of([(adapter, rows) for adapter in range(adapters)], adapters, 16, 4, DEVICE)
    scales = torch.ones(adapters)
    A, B = (torch.randn(size).bfloat16() for size in ((adapters, 16, 512), (adapters, 256, 16)))
    x, y, dY = (torch.randn(size).bfloat16() for size in ((128, 512), (128, 256), (128, 256)))
    with counted() as traffic:
        h = kernels.grouped_shrink(x, A, scales, blocks)
        kernels.grouped_expand_(y, h, B, blocks)
        g, dB = kernels.grouped_backward_y(dY, B, h, scales, blocks)
        dX, dA = kernels.grouped_backward_x(x, g, A, blocks)
    assert dA is not None
    for wide, times in ((x, 2), (dY, 1), (y, 1)):
        assert traffic.of(wide).loaded == times * 2 * wide.numel(), "read more often than once a pass"
    assert traffic.of(dX).stored == 2 * dX.numel()
    assert traffic.of(y).stored == 2 * y.numel()
    read, written = ((A, B), (dA, dB))
    return sum(traffic.of(t).distinct for t in read), sum(traffic.of(t).stored for t in written), traffic.flops


@ON_CPU
def test_more_adapters_cost_their_factors_and_nothing_else():
    """2(T-1)·rank·(in + out) bytes of factors more to read, as many of gradients to write, and not a multiplication."""
    one, four = pass_over(1), pass_over(4)
    extra = 2 * 3 * 16 * (512 + 256)
    assert four[0] - one[0] == four[1] - one[1] == extra
    assert four[2] == one[2] > 0


MUTATIONS = [
    ("scale *= tl.load(kept + known)", "scale *= 1.0", "grouped_shrink"),
    ("(total * scale).to(out", "total.to(out", "grouped_shrink"),
    ("own = tl.load(entry + 3) + places", "own = rows", "grouped_shrink"),
    ("total = base + tl.dot", "total = base - tl.dot", "grouped_expand_"),
    (
        'down = tl.dot(tile, factor, input_precision="ieee") * scale',
        "down = tl.dot(tile, factor)",
        "grouped_backward_y",
    ),
    ("tl.store(dB + at, total,", "tl.store(dB + at, total * 0,", "grouped_backward_y"),
    ("tl.load(entry + 3) + places, tl.cdiv(K, 256)", "rows, tl.cdiv(K, 256)", "grouped_backward_x"),
    ("total * kept_scale, mask", "total, mask", "grouped_backward_x"),
    ("tl.join(tile, spread)", "tl.join(spread, tile)", "grouped_backward_x"),
    ("adapter * 2 + 1)):", "adapter * 2) + 1):", "grouped_backward_x"),
]


@ON_CPU
@pytest.mark.parametrize(("old", "new", "op"), MUTATIONS, ids=[f"{op}-{old[:24]}" for old, _, op in MUTATIONS])
def test_a_mutated_kernel_fails(old, new, op, monkeypatch, tmp_path):
    args = arguments(op, torch.float32, dropout=True)
    changed = mutant(kernels, old, new, tmp_path)
    with pytest.raises(AssertionError, match="off by"):
        assert_right(op, run(changed, op, args), args)


# ------------------------------------------------------------------ as the path of routed rows


class Routed:
    """Rows of four pairs of unequal ranks and of none, in any order, on tensors that all learn."""

    def __init__(self, dtype: torch.dtype = torch.float32, factor_dtype: torch.dtype | None = None) -> None:
        counts, ranks, self.scales = (3, 1, 2, 2, 1), (4, 0, 3, 8, 1), (0.5, None, 2.0, 1.0, -1.0)
        of = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))[torch.randperm(sum(counts))]
        order = of.argsort(stable=True)
        self.own = list(order.split(counts))
        self.segments = Segments(counts, self.scales, order, order.argsort())

        def learned(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, dtype=dtype).to(DEVICE).requires_grad_()

        self.x, self.weight, self.bias = learned(9, 7, 70), learned(50, 70), learned(50)
        wanted = factor_dtype or dtype
        self.pairs = [(learned(r, 70, dtype=wanted), learned(50, r, dtype=wanted)) for r in ranks if r]
        self.seeds = torch.tensor([5, 6, 7, 8], device=DEVICE)

    @property
    def operands(self) -> list[Tensor]:
        return [self.x, self.weight, self.bias, *(factor for pair in self.pairs for factor in pair)]

    def run(self, dropouts: tuple[float, ...] | None = None) -> Tensor:
        seeds = None if dropouts is None else self.seeds
        return lora_linear_rows(self.x, self.weight, self.bias, self.pairs, self.segments, dropouts, seeds)

    def exact(self, dropouts: tuple[float, ...] | None) -> tuple[Tensor, list[Tensor]]:
        """In float64, and the operands in it."""
        operands = [operand.detach().double().requires_grad_() for operand in self.operands]
        x, weight, bias, *factors = operands
        y, pair = [torch.empty(0)] * len(x), 0
        for rows, scale in zip(self.own, self.scales, strict=True):
            own = x[rows.to(DEVICE)]
            out = own @ weight.t() + bias
            if scale is not None:
                A, B, dropped = factors[2 * pair], factors[2 * pair + 1], own
                if dropouts:
                    p = dropouts[pair]
                    keep = philox.keep_mask(own[..., 0].numel(), own.shape[-1], p, self.seeds[pair : pair + 1])
                    dropped = own * keep.view(own.shape) * philox.kept_scale(p)
                out, pair = out + scale * (dropped @ A.t() @ B.t()), pair + 1
            for at, row in enumerate(rows.tolist()):
                y[row] = out[at]
        return torch.stack(y), operands


@pytest.mark.parametrize(
    ("dropouts", "dtypes"),
    [
        (None, (torch.float32, torch.float32)),
        (DROPPED, (torch.bfloat16, torch.float32)),
        pytest.param(DROPPED, (torch.float32, torch.float32), marks=pytest.mark.slow),
        pytest.param(None, (torch.bfloat16, torch.bfloat16), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_rows_of_many_pairs_run_on_the_kernels(dropouts, dtypes, monkeypatch):
    launched, launch = set(), kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda k, *a, **o: (launched.add(k.fn.__name__), launch(k, *a, **o)))
    case = Routed(*dtypes)
    found, (exact, operands) = case.run(dropouts), case.exact(dropouts)
    given = torch.randn_like(found)
    gradients = torch.autograd.grad(found, case.operands, given)
    expected = torch.autograd.grad(exact, operands, given.double())
    for one, other in zip((found, *gradients), (exact, *expected), strict=True):
        # five roundings to the dtype of x lie between, each relative to values of this size
        assert (one - other).abs().max() <= 5 * max(torch.finfo(dtypes[0]).eps, 2e-6) * other.abs().max()
    assert {f"{op.rstrip('_')}_kernel" for op in OPS} <= launched
    assert [gradient.dtype for gradient in gradients[3:]] == [dtypes[1]] * 8
    assert [gradient.stride() for gradient in gradients] == [operand.stride() for operand in case.operands]
    if dtypes[0] != dtypes[1]:
        assert all((gradient != gradient.to(dtypes[0])).any() for gradient in gradients[3:]), "rounded as x is"
    with torch.no_grad():
        assert torch.equal(case.run(dropouts), found)


@pytest.mark.parametrize("dropouts", [pytest.param(None, marks=pytest.mark.slow), DROPPED], ids=["all", "dropout"])
@pytest.mark.parametrize("needed", [0, 1, 2, 5, 6], ids=["x", "weight", "bias", "an A", "a B"])
def test_only_what_needs_a_gradient_gets_one(needed, dropouts):
    case = Routed()
    exact, operands = case.exact(dropouts)
    for at, operand in enumerate(case.operands):
        operand.requires_grad_(at == needed)
    case.run(dropouts).square().sum().backward()
    assert [at for at, operand in enumerate(case.operands) if operand.grad is not None] == [needed]
    (right,) = torch.autograd.grad(exact.square().sum(), operands[needed])
    assert (case.operands[needed].grad - right).abs().max() <= 1e-5 * right.abs().max()


@pytest.mark.parametrize(
    ("needed", "dropouts"),
    [(range(11), DROPPED), ((0,), None), ((1,), DROPPED), ((2,), None), ((3, 4), DROPPED)],
    ids=["all", "x", "weight", "bias", "one pair"],
)
def test_a_second_derivative_is_right_whatever_learns(needed, dropouts):
    case = Routed()
    exact, operands = case.exact(dropouts)
    for at, operand in enumerate(case.operands):
        operand.requires_grad_(at in needed)
    found = first_and_second(case.run(dropouts), [case.operands[at] for at in needed])
    expected = first_and_second(exact, [operands[at] for at in needed])
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()


def test_a_second_derivative_of_B_alone_is_refused():
    case = Routed()
    for at, operand in enumerate(case.operands):
        operand.requires_grad_(at == 4)
    with pytest.raises(RuntimeError, match="lora_A"):
        torch.autograd.grad(case.run().sum(), case.operands[4], create_graph=True)


def model_with(dropout: float) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40)).to(DEVICE)
    for at, name in enumerate(("a", "b", "c")):
        peftlib.inject(model, "0", peftlib.LoRA, rank=2 + at, alpha=4.0, dropout=dropout, name=name, seed=at + 1)
    for *_, adapter in peftlib.adapters(model):
        nn.init.normal_(adapter.get_parameter("lora_B"))
    return model


def test_each_adapter_drops_in_a_batch_what_it_drops_alone(monkeypatch):
    """The same elements to the bit: the gradient of x without the base's weight is zero where they were dropped."""
    monkeypatch.setattr(dispatch, "is_small", lambda *_: False)
    monkeypatch.setattr(dispatch, "is_dense", lambda *_: False)
    rows = ["b", "a", None, "c", "a", "b", "b"]
    x = torch.randn(len(rows), 5, 40, device=DEVICE)

    def dropped(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            model[0].weight.zero_()
        x = x.clone().requires_grad_()
        y = model(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        return y.detach(), gradient

    model = model_with(0.5)
    peftlib.route(model, rows)
    y, gradient = dropped(model, x)
    assert 0.3 < (gradient[3] == 0).double().mean() < 0.7
    for name in ("a", "b", "c"):
        own = [at for at, other in enumerate(rows) if other == name]
        alone = model_with(0.5)
        peftlib.activate(alone, name)
        y_alone, gradient_alone = dropped(alone, x[own])
        assert torch.equal(gradient[own] == 0, gradient_alone == 0)
        torch.testing.assert_close(y[own], y_alone)
        torch.testing.assert_close(gradient[own], gradient_alone)


class Seen(TorchDispatchMode):
    """What was called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **kwargs or {})


def test_a_step_waits_for_nothing_and_casts_all_factors_in_one_pass():
    case = Routed(torch.bfloat16, torch.float32)
    case.weight.requires_grad_(False)

    def step() -> None:
        y = case.run()
        torch.autograd.grad(y, case.operands[3:], torch.ones_like(y))

    step()
    with Seen() as seen:
        step()
    assert "aten::_local_scalar_dense" not in seen.names
    assert seen.names.count("aten::_foreach_copy_") == 1
    assert "aten::index_select" not in seen.names, "rows stay where they are"
    assert "aten::mm" not in seen.names, "a frozen layer has no gradient computed"


def test_a_wrong_kernel_is_replaced_by_pytorch_with_a_warning(monkeypatch):
    monkeypatch.setattr(dispatch, "_trusted", {})
    right = kernels.grouped_backward_x
    monkeypatch.setattr(kernels, "grouped_backward_x", lambda *a, **o: tuple(r * 1.01 for r in right(*a, **o)))
    monkeypatch.setattr(lora_rows, "lora_linear_grouped", lambda *_: pytest.fail("it ran all the same"))
    case = Routed()
    with pytest.warns(UserWarning, match="grouped_backward_x for torch.float32 .* PyTorch is used in its place"):
        found = case.run()
    exact, _ = case.exact(None)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


def test_a_kernel_that_is_wrong_with_dropout_alone_serves_without(monkeypatch):
    monkeypatch.setattr(dispatch, "_trusted", {})
    ran, grouped, right = [], lora_rows.lora_linear_grouped, kernels.grouped_shrink

    def wrong(x: Tensor, A: Tensor, scales: Tensor, blocks: Any, masks: Masks | None = None, **more: Any) -> Tensor:
        return right(x, A, scales, blocks, masks, **more) * (1.0 if masks is None else 1.01)

    monkeypatch.setattr(kernels, "grouped_shrink", wrong)
    monkeypatch.setattr(lora_rows, "lora_linear_grouped", lambda *given: ran.append(given) or grouped(*given))
    case = Routed()
    with pytest.warns(UserWarning, match="grouped_shrink"):
        assert not serves_rows(case.x, case.weight, case.operands[3:], dropping=True)
    case.run()
    assert len(ran) == 1


def test_where_kernels_run_dropout_acts_and_factors_may_be_in_float32():
    x, weight = torch.randn(4, 64, device=DEVICE).bfloat16(), torch.randn(48, 64, device=DEVICE).bfloat16()
    pair, too_high = ([torch.randn(r, 64, device=DEVICE), torch.randn(48, r, device=DEVICE)] for r in (2, 65))
    assert serves_rows(x, weight, pair)
    assert serves_rows(x, weight, pair, dropping=True)
    assert not serves_rows(x, weight.float(), pair)
    assert not serves_rows(x, weight, [*pair, *too_high])
    assert serves_rows(x, weight, [])
    assert not serves_rows(x, weight, [], dropping=True)


def test_rows_of_no_adapter_alone_are_the_layer_s():
    x, weight = torch.randn(3, 20, 64, device=DEVICE, requires_grad=True), torch.randn(48, 64, device=DEVICE)
    found = lora_linear_rows(x, weight, None, [], Segments((3,), (None,)))
    assert torch.equal(found, nn.functional.linear(x, weight))
    found.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x))


def test_ranks_of_two_sizes_are_filled_with_zeros():
    x, weight = torch.randn(20, 64, device=DEVICE), torch.randn(48, 64, device=DEVICE)
    pairs = [(torch.randn(r, 64, device=DEVICE), torch.randn(48, r, device=DEVICE)) for r in (3, 8)]
    found = lora_linear_rows(x, weight, None, pairs, Segments((12, 8), (0.5, 2.0)))
    exact = x.double() @ weight.double().t()
    for rows, (A, B), scale in ((slice(0, 12), pairs[0], 0.5), (slice(12, 20), pairs[1], 2.0)):
        exact[rows] += scale * (x[rows].double() @ A.double().t() @ B.double().t())
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_one_adapter_s_rows_are_what_lora_linear_gives():
    x, weight = torch.randn(20, 64, device=DEVICE), torch.randn(48, 64, device=DEVICE)
    A, B = torch.randn(8, 64, device=DEVICE, requires_grad=True), torch.randn(48, 8, device=DEVICE)
    found = lora_linear_rows(x, weight, None, [(A, B)], Segments((20,), (0.5,)))
    expected = lora_linear(x, weight, None, A, B, 0.5)
    torch.testing.assert_close(found, expected)
    one, other = (torch.autograd.grad(y.sum(), A)[0] for y in (found, expected))
    assert (one - other).abs().max() <= 1e-5 * other.abs().max()

"""LoRA's kernels in Triton: of each the device code, and then its launch, by the names and meaning of `reference.py`.

A launch checks no argument: it chooses the tile, unless one is given, allocates the outputs and adds the partial sums.
All sums are float32, all row offsets int64. Rank and tile are compile-time constants; M, p and the scale are not, so
that another batch or another scale needs no other binary.

Factors in float32 are cast before a launch, not in it: every program reads its factor again, at half the bytes so, and
at rank 32 the wider tiles spilled on sm_100. A gradient of a factor comes in the dtype that is asked for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..philox import draw_seed as draw_seed
from ..philox import keep_mask_of as keep_mask_of
from ..philox import kept_scale, threshold
from ..tiles import Tile, block_rank, blocks, capability, least_width
from ..triton_runtime import added, keep_super_block, launch, partial_sums, rows_of


@triton.jit(do_not_specialize=["M", "threshold"])
def shrink_kernel(
    x,  # [M, K], any row stride
    A,  # [RANK, K], any row stride
    out,  # [splits, M, RANK], contiguous; float32 if several
    seed,  # [1] int64
    M,
    K,
    x_stride,
    A_stride,
    scale,
    threshold,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    ranks = tl.arange(0, RANK_BLOCK)
    steps = tl.cdiv(K, COLUMNS)  # program (i, j) adds up the j-th share of the steps along K
    share = tl.cdiv(steps, tl.num_programs(1))
    first = tl.program_id(1) * share
    key = tl.load(seed) if DROPOUT else 0
    x_rows = x + rows.to(tl.int64)[:, None] * x_stride
    A_rows = A + ranks.to(tl.int64)[None, :] * A_stride
    total = tl.zeros((ROWS, RANK_BLOCK), tl.float32)
    for step in range(first, tl.minimum(first + share, steps)):
        columns = step * COLUMNS + tl.arange(0, COLUMNS)
        tile = tl.load(x_rows + columns[None, :], mask=(rows < M)[:, None] & (columns < K)[None, :], other=0.0)
        factor = tl.load(A_rows + columns[:, None], mask=(ranks < RANK)[None, :] & (columns < K)[:, None], other=0.0)
        if DROPOUT:  # a product: with `tl.where` the dot failed to compile for sm_90
            tile = tile * keep_super_block(key, rows, steps, step, threshold).to(tile.dtype)
        total = tl.dot(tile, factor, total, input_precision="ieee")
    at = (tl.program_id(1).to(tl.int64) * M + rows)[:, None] * RANK + ranks[None, :]
    tl.store(out + at, (total * scale).to(out.dtype.element_ty), mask=(rows < M)[:, None] & (ranks < RANK)[None, :])


def shrink(x: Tensor, A: Tensor, scale: float, p: float, seed: Tensor | None, tile: Tile | None = None) -> Tensor:
    """See `reference.shrink`."""
    (M, K), rank = x.shape, A.shape[0]
    device = capability(x.device)
    tile = tile or tiles.shrink(M, K, rank, p > 0, device)
    x, A = rows_of(x), rows_of(A.to(x.dtype))
    parts = partial_sums(tile.splits, x.new_empty(M, rank))
    launch(
        shrink_kernel, (blocks(M, tile.rows), tile.splits),
        x, A, parts, seed if p else x, M, K, x.stride(0), A.stride(0), scale * kept_scale(p), threshold(p),
        RANK=rank, RANK_BLOCK=block_rank(rank, least_width(device)), ROWS=tile.rows, COLUMNS=tile.columns,
        DROPOUT=p > 0, tile=tile,
    )  # fmt: skip
    return added(parts, x.dtype)


@triton.jit(do_not_specialize=["M", "threshold"])
def backward_x_kernel(
    x,  # [M, K], any row stride
    g,  # [M, RANK], contiguous
    A,  # [RANK, K], any row stride
    dX,  # [M, K], contiguous
    dA,  # [splits, RANK, K], contiguous; float32 if several. x and dA are not touched unless NEEDS_A
    seed,  # [1] int64
    M,
    K,
    x_stride,
    A_stride,
    kept_scale,
    threshold,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEEDS_A: tl.constexpr,
):
    block = tl.program_id(0)
    columns = block * 256 + tl.arange(0, 256)
    ranks = tl.arange(0, RANK_BLOCK)
    wide_ranks = ranks.to(tl.int64)[:, None]
    factor_mask = (ranks < RANK)[:, None] & (columns < K)[None, :]
    factor = tl.load(A + wide_ranks * A_stride + columns[None, :], mask=factor_mask, other=0.0)
    steps = tl.cdiv(M, ROWS)  # program (i, j) adds up the j-th share of the rows of dA, and writes its rows of dX
    share = tl.cdiv(steps, tl.num_programs(1))
    first = tl.program_id(1) * share
    key = tl.load(seed) if DROPOUT else 0
    total = tl.zeros((RANK_BLOCK, 256), tl.float32)
    for step in range(first, tl.minimum(first + share, steps)):
        rows = step * ROWS + tl.arange(0, ROWS)
        wide = rows.to(tl.int64)[:, None]
        live = (rows < M)[:, None]
        inside = live & (columns < K)[None, :]
        hidden = tl.load(g + wide * RANK + ranks[None, :], mask=live & (ranks < RANK)[None, :], other=0.0)
        spread = (tl.dot(hidden, factor, input_precision="ieee") * kept_scale).to(factor.dtype)
        tile = tl.load(x + wide * x_stride + columns[None, :], mask=inside, other=0.0) if NEEDS_A else spread
        if DROPOUT:
            # Joined, the two have one layout and the mask is drawn once; apart, the compiler draws it again for the
            # second layout: 31 instructions an element become 42 on sm_90.
            keep = keep_super_block(key, rows, tl.cdiv(K, 256), block, threshold)
            tile, spread = tl.split(tl.join(tile, spread) * keep.to(tile.dtype)[:, :, None])
        tl.store(dX + wide * K + columns[None, :], spread, mask=inside)
        if NEEDS_A:
            total = tl.dot(tl.trans(hidden), tile, total, input_precision="ieee")
    if not NEEDS_A:
        return
    at = tl.program_id(1).to(tl.int64) * RANK * K + wide_ranks * K + columns[None, :]
    tl.store(dA + at, (total * kept_scale).to(dA.dtype.element_ty), mask=factor_mask)


def backward_x(
    x: Tensor,
    g: Tensor,
    A: Tensor,
    p: float,
    seed: Tensor | None,
    dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.backward_x`; dA in `dtype`, by default that of A."""
    x = rows_of(x)
    tile = tile or tiles.backward_x(x.shape[0], x.shape[1], A.shape[0], p > 0, capability(x.device))
    dX, parts = x.new_empty(x.shape), partial_sums(tile.splits, A.new_empty(A.shape, dtype=dtype))
    _launch_backward_x(x, g, A, p, seed, dX, parts, tile, needs_A=True)
    return dX, added(parts, dtype or A.dtype)


def backward_x_only(g: Tensor, A: Tensor, p: float, seed: Tensor | None, tile: Tile | None = None) -> Tensor:
    """See `reference.backward_x_only`."""
    (M, rank), K = g.shape, A.shape[1]
    tile = tile or tiles.backward_x_only(M, K, rank, capability(g.device))
    dX = g.new_empty(M, K)
    _launch_backward_x(dX, g, A, p, seed, dX, dX, tile, needs_A=False)
    return dX


def _launch_backward_x(
    x: Tensor, g: Tensor, A: Tensor, p: float, seed: Tensor | None, dX: Tensor, dA: Tensor, tile: Tile, needs_A: bool
) -> None:
    (M, K), rank = dX.shape, A.shape[0]
    g, A = g.to(dX.dtype).contiguous(), rows_of(A.to(dX.dtype))
    launch(
        backward_x_kernel, (blocks(K, tile.columns), tile.splits),
        x, g, A, dX, dA, seed if p else x, M, K, x.stride(0), A.stride(0), kept_scale(p), threshold(p),
        RANK=rank, RANK_BLOCK=block_rank(rank, 16), ROWS=tile.rows, DROPOUT=p > 0, NEEDS_A=needs_A, tile=tile,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def backward_y_kernel(
    dY,  # [M, N], any row stride
    B,  # [N, RANK], contiguous
    h,  # [M, RANK], contiguous
    g,  # [column blocks, M, RANK], contiguous; float32 if several
    dB,  # [splits, N, RANK], contiguous; float32 if several
    M,
    N,
    dY_stride,
    scale,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANK_BLOCK)
    steps = tl.cdiv(M, ROWS)
    share = tl.cdiv(steps, tl.num_programs(1))
    first = tl.program_id(1) * share
    in_rank = (ranks < RANK)[None, :]
    factor_mask = (columns < N)[:, None] & in_rank
    factor_at = B + columns.to(tl.int64)[:, None] * RANK + ranks[None, :]
    factor = tl.load(factor_at, mask=factor_mask, other=0.0)
    # g sums over columns and dB over rows: a program has all rows of its share of dB, but one block of g's columns
    g_part = g + tl.program_id(0).to(tl.int64) * M * RANK
    total = tl.zeros((COLUMNS, RANK_BLOCK), tl.float32)
    for step in range(first, tl.minimum(first + share, steps)):
        rows = step * ROWS + tl.arange(0, ROWS)
        wide = rows.to(tl.int64)[:, None]
        live = (rows < M)[:, None]
        tile = tl.load(dY + wide * dY_stride + columns[None, :], mask=live & (columns < N)[None, :], other=0.0)
        hidden = tl.load(h + wide * RANK + ranks[None, :], mask=live & in_rank, other=0.0)
        down = tl.dot(tile, factor, input_precision="ieee") * scale
        tl.store(g_part + wide * RANK + ranks[None, :], down.to(g.dtype.element_ty), mask=live & in_rank)
        total = tl.dot(tl.trans(tile), hidden, total, input_precision="ieee")
    dB_part = dB + tl.program_id(1).to(tl.int64) * N * RANK
    at = columns.to(tl.int64)[:, None] * RANK + ranks[None, :]
    tl.store(dB_part + at, total.to(dB.dtype.element_ty), mask=factor_mask)


def backward_y(
    dY: Tensor, B: Tensor, h: Tensor, scale: float, dtype: torch.dtype | None = None, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """See `reference.backward_y`; dB in `dtype`, by default that of B."""
    (M, N), rank = dY.shape, B.shape[1]
    device = capability(dY.device)
    tile = tile or tiles.backward_y(M, N, rank, device)
    dY = rows_of(dY)
    across = blocks(N, tile.columns)
    factor, hidden = B.to(dY.dtype).contiguous(), h.to(dY.dtype).contiguous()
    g_parts = partial_sums(across, dY.new_empty(M, rank))
    dB_parts = partial_sums(tile.splits, B.new_empty(N, rank, dtype=dtype))
    launch(
        backward_y_kernel, (across, tile.splits),
        dY, factor, hidden, g_parts, dB_parts, M, N, dY.stride(0), scale,
        RANK=rank, RANK_BLOCK=block_rank(rank, least_width(device)), ROWS=tile.rows, COLUMNS=tile.columns, tile=tile,
    )  # fmt: skip
    return added(g_parts, dY.dtype), added(dB_parts, dtype or B.dtype)


@triton.jit(do_not_specialize=["M"])
def expand_kernel(
    y,  # [M, N], any row stride
    h,  # [M, RANK], contiguous
    B,  # [N, RANK], contiguous
    bias,  # [N]
    out,  # [M, N], any row stride
    M,
    N,
    y_stride,
    out_stride,
    scale,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANK_BLOCK)
    wide = rows.to(tl.int64)[:, None]
    live = (rows < M)[:, None]
    inside = live & (columns < N)[None, :]
    base = tl.load(y + wide * y_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    hidden = tl.load(h + wide * RANK + ranks[None, :], mask=live & (ranks < RANK)[None, :], other=0.0)
    factor_at = B + columns.to(tl.int64)[None, :] * RANK + ranks[:, None]
    factor = tl.load(factor_at, mask=(columns < N)[None, :] & (ranks < RANK)[:, None], other=0.0)
    total = base + tl.dot(hidden, factor, input_precision="ieee") * scale
    if BIAS:
        total += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out + wide * out_stride + columns[None, :], total.to(out.dtype.element_ty), mask=inside)


def expand(
    y: Tensor, h: Tensor, B: Tensor, scale: float = 1.0, bias: Tensor | None = None, tile: Tile | None = None
) -> Tensor:
    """See `reference.expand`."""
    (M, N), rank, y = y.shape, B.shape[1], rows_of(y)
    tile = tile or tiles.expand()
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    launch(
        expand_kernel, (blocks(M, tile.rows), blocks(N, tile.columns)),
        y, h.contiguous(), B.to(h.dtype).contiguous(), y if bias is None else bias, out,
        M, N, y.stride(0), out.stride(0), scale,
        RANK=rank, RANK_BLOCK=block_rank(rank, 16), ROWS=tile.rows, COLUMNS=tile.columns, BIAS=bias is not None,
        tile=tile,
    )  # fmt: skip
    return out

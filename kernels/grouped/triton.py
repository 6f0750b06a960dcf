"""The kernels of a batch whose rows belong to different adapters: as LoRA's, with the adapter read from a table.

Factors lie in stacks [adapters, ...] of the dtype of x, lower ranks filled with zeros. Blocks of no adapter (-1) read
neither rows nor factors. A block's mask is that of the rows which its adapter would have alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..tiles import Tile, block_rank, capability, least_width
from ..tiles import blocks as count_blocks
from ..triton_runtime import added, keep_super_block, launch, partial_sums, rows_of
from .blocks import Blocks
from .reference import Masks


@triton.jit(do_not_specialize=["M"])
def grouped_shrink_kernel(
    x,  # [M, K], any row stride
    A,  # [adapters, RANK, K], contiguous
    scales,  # [adapters] float32
    seeds,  # [adapters] int64; these three are not read without DROPOUT
    thresholds,  # [adapters] int32
    kept,  # [adapters] float32
    table,  # [blocks, 4] int32
    out,  # [splits, M, RANK], contiguous; float32 if several
    M,
    K,
    x_stride,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    entry = table + tl.program_id(0) * 4
    adapter = tl.load(entry)
    known = tl.maximum(adapter, 0)
    places = tl.arange(0, ROWS)
    rows = tl.load(entry + 1) + places
    live = (rows < tl.load(entry + 2))[:, None]
    ranks = tl.arange(0, RANK_BLOCK)
    in_rank = (ranks < RANK)[None, :]
    steps = tl.cdiv(K, COLUMNS)
    share = tl.cdiv(steps, tl.num_programs(1))
    first = tl.program_id(1) * share
    last = tl.where(adapter < 0, first, tl.minimum(first + share, steps))  # rows of no adapter are not read
    scale = tl.load(scales + known)
    key = tl.load(seeds + known) if DROPOUT else 0
    threshold = tl.load(thresholds + known) if DROPOUT else 0
    own = tl.load(entry + 3) + places
    if DROPOUT:
        scale *= tl.load(kept + known)
    x_rows = x + rows.to(tl.int64)[:, None] * x_stride
    A_rows = A + (known.to(tl.int64) * RANK + ranks)[None, :] * K
    total = tl.zeros((ROWS, RANK_BLOCK), tl.float32)
    for step in range(first, last):
        columns = step * COLUMNS + tl.arange(0, COLUMNS)
        tile = tl.load(x_rows + columns[None, :], mask=live & (columns < K)[None, :], other=0.0)
        factor = tl.load(A_rows + columns[:, None], mask=in_rank & (columns < K)[:, None], other=0.0)
        if DROPOUT:
            tile = tile * keep_super_block(key, own, steps, step, threshold).to(tile.dtype)
        total = tl.dot(tile, factor, total, input_precision="ieee")
    at = (tl.program_id(1).to(tl.int64) * M + rows)[:, None] * RANK + ranks[None, :]
    tl.store(out + at, (total * scale).to(out.dtype.element_ty), mask=live & in_rank)


def grouped_shrink(
    x: Tensor, A: Tensor, scales: Tensor, blocks: Blocks, masks: Masks | None = None, tile: Tile | None = None
) -> Tensor:
    """See the reference."""
    (M, K), rank, count = x.shape, A.shape[1], blocks.table.shape[0]
    device = capability(x.device)
    tile = tile or tiles.grouped_shrink(count, K, rank, blocks.rows, masks is not None, device)
    x = rows_of(x)
    parts = partial_sums(tile.splits, x.new_empty(M, rank))
    seeds, thresholds, kept, _ = masks or (scales, scales, scales, ())
    launch(
        grouped_shrink_kernel, (count, tile.splits),
        x, A, scales, seeds, thresholds, kept, blocks.table, parts, M, K, x.stride(0),
        RANK=rank, RANK_BLOCK=block_rank(rank, least_width(device)), ROWS=tile.rows, COLUMNS=tile.columns,
        DROPOUT=masks is not None, tile=tile,
    )  # fmt: skip
    return added(parts, x.dtype)


@triton.jit
def grouped_expand_kernel(
    y,  # [M, N], any row stride; read and written
    h,  # [M, RANK], contiguous
    B,  # [adapters, N, RANK], contiguous
    table,  # [blocks, 4] int32
    N,
    y_stride,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    entry = table + tl.program_id(0) * 4
    adapter = tl.load(entry)
    adapted = tl.full((1, 1), adapter, tl.int32) >= 0  # a mask by itself: 3.9's interpreter widens a scalar one
    rows = tl.load(entry + 1) + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANK_BLOCK)
    wide = rows.to(tl.int64)[:, None]
    live = (rows < tl.load(entry + 2))[:, None] & adapted
    inside = live & (columns < N)[None, :]
    base = tl.load(y + wide * y_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    hidden = tl.load(h + wide * RANK + ranks[None, :], mask=live & (ranks < RANK)[None, :], other=0.0)
    factor_at = B + (tl.maximum(adapter, 0).to(tl.int64) * N + columns)[None, :] * RANK + ranks[:, None]
    factor = tl.load(factor_at, mask=(columns < N)[None, :] & (ranks < RANK)[:, None] & adapted, other=0.0)
    total = base + tl.dot(hidden, factor, input_precision="ieee")
    tl.store(y + wide * y_stride + columns[None, :], total.to(y.dtype.element_ty), mask=inside)


def grouped_expand_(y: Tensor, h: Tensor, B: Tensor, blocks: Blocks, tile: Tile | None = None) -> Tensor:
    """See the reference; y, whose columns lie side by side, is written to, which autograd does not see."""
    N, rank, tile = y.shape[1], B.shape[2], tile or tiles.grouped_expand(blocks.rows)
    launch(
        grouped_expand_kernel, (blocks.table.shape[0], count_blocks(N, tile.columns)),
        y, h, B, blocks.table, N, y.stride(0),
        RANK=rank, RANK_BLOCK=block_rank(rank, 16), ROWS=tile.rows, COLUMNS=tile.columns, tile=tile,
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["M"])
def grouped_backward_y_kernel(
    dY,  # [M, N], any row stride
    B,  # [adapters, N, RANK], contiguous
    h,  # [M, RANK], contiguous
    scales,  # [adapters] float32
    table,  # [blocks, 4] int32
    items,  # [items, 3] int32
    g,  # [column blocks, M, RANK], contiguous; float32 if several
    dB,  # [items of adapters, N, RANK] float32, contiguous
    M,
    N,
    dY_stride,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    item = items + tl.program_id(1) * 3
    adapter = tl.load(item)
    adapted = tl.full((1, 1), adapter, tl.int32) >= 0  # of the others g is zero, and nothing else
    known = tl.maximum(adapter, 0)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANK_BLOCK)
    in_rank = (ranks < RANK)[None, :]
    factor_mask = (columns < N)[:, None] & in_rank & adapted
    factor_at = B + (known.to(tl.int64) * N + columns)[:, None] * RANK + ranks[None, :]
    factor = tl.load(factor_at, mask=factor_mask, other=0.0)
    scale = tl.load(scales + known)
    g_part = g + tl.program_id(0).to(tl.int64) * M * RANK
    total = tl.zeros((COLUMNS, RANK_BLOCK), tl.float32)
    for block in range(tl.load(item + 1), tl.load(item + 2)):
        rows = tl.load(table + block * 4 + 1) + tl.arange(0, ROWS)
        live = (rows < tl.load(table + block * 4 + 2))[:, None]
        wide = rows.to(tl.int64)[:, None]
        inside = live & (columns < N)[None, :] & adapted
        tile = tl.load(dY + wide * dY_stride + columns[None, :], mask=inside, other=0.0)
        hidden = tl.load(h + wide * RANK + ranks[None, :], mask=live & in_rank & adapted, other=0.0)
        down = tl.dot(tile, factor, input_precision="ieee") * scale
        tl.store(g_part + wide * RANK + ranks[None, :], down.to(g.dtype.element_ty), mask=live & in_rank)
        total = tl.dot(tl.trans(tile), hidden, total, input_precision="ieee")
    at = (tl.program_id(1).to(tl.int64) * N + columns)[:, None] * RANK + ranks[None, :]
    tl.store(dB + at, total, mask=factor_mask)


def grouped_backward_y(
    dY: Tensor,
    B: Tensor,
    h: Tensor,
    scales: Tensor,
    blocks: Blocks,
    dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """See the reference; dB in `dtype`, by default that of B."""
    (M, N), rank = dY.shape, B.shape[2]
    device = capability(dY.device)
    tile = tile or tiles.grouped_backward_y(rank, blocks.rows, device)
    dY, across = rows_of(dY), count_blocks(N, tile.columns)
    g_parts = partial_sums(across, dY.new_empty(M, rank))
    dB_parts = B.new_empty(blocks.adapted, N, rank, dtype=torch.float32)
    launch(
        grouped_backward_y_kernel, (across, blocks.items.shape[0]),
        dY, B, h, scales, blocks.table, blocks.items, g_parts, dB_parts, M, N, dY.stride(0),
        RANK=rank, RANK_BLOCK=block_rank(rank, least_width(device)), ROWS=tile.rows, COLUMNS=tile.columns, tile=tile,
    )  # fmt: skip
    return added(g_parts, dY.dtype), _added_by_adapter(dB_parts, B.new_empty(B.shape, dtype=dtype), blocks)


@triton.jit(do_not_specialize=["M"])
def grouped_backward_x_kernel(
    x,  # [M, K], any row stride
    g,  # [M, RANK], contiguous
    A,  # [adapters, RANK, K], contiguous
    seeds,  # [adapters] int64; these three are not read without DROPOUT
    thresholds,  # [adapters] int32
    kept,  # [adapters] float32
    table,  # [blocks, 4] int32
    items,  # [items, 3] int32
    dX,  # [M, K], contiguous
    dA,  # [items of adapters, RANK, K] float32, contiguous. x and dA are not touched unless NEEDS_A
    K,
    x_stride,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEEDS_A: tl.constexpr,
):
    item = items + tl.program_id(1) * 3
    adapter = tl.load(item)
    adapted = tl.full((1, 1), adapter, tl.int32) >= 0
    known = tl.maximum(adapter, 0)
    block_of_columns = tl.program_id(0)
    columns = block_of_columns * 256 + tl.arange(0, 256)
    ranks = tl.arange(0, RANK_BLOCK)
    factor_mask = (ranks < RANK)[:, None] & (columns < K)[None, :] & adapted
    factor_at = A + (known.to(tl.int64) * RANK + ranks)[:, None] * K + columns[None, :]
    factor = tl.load(factor_at, mask=factor_mask, other=0.0)
    key = tl.load(seeds + known) if DROPOUT else 0
    threshold = tl.load(thresholds + known) if DROPOUT else 0
    kept_scale = tl.load(kept + known) if DROPOUT else 1.0
    total = tl.zeros((RANK_BLOCK, 256), tl.float32)
    for block in range(tl.load(item + 1), tl.load(item + 2)):
        entry = table + block * 4
        places = tl.arange(0, ROWS)
        rows = tl.load(entry + 1) + places
        wide = rows.to(tl.int64)[:, None]
        live = (rows < tl.load(entry + 2))[:, None]
        inside = live & (columns < K)[None, :]
        hidden = tl.load(g + wide * RANK + ranks[None, :], mask=live & (ranks < RANK)[None, :] & adapted, other=0.0)
        spread = (tl.dot(hidden, factor, input_precision="ieee") * kept_scale).to(factor.dtype)
        x_at = x + wide * x_stride + columns[None, :]
        tile = tl.load(x_at, mask=inside & adapted, other=0.0) if NEEDS_A else spread
        if DROPOUT:  # joined as in `lora/triton.py`, so that each number is drawn once
            keep = keep_super_block(key, tl.load(entry + 3) + places, tl.cdiv(K, 256), block_of_columns, threshold)
            tile, spread = tl.split(tl.join(tile, spread) * keep.to(tile.dtype)[:, :, None])
        tl.store(dX + wide * K + columns[None, :], spread, mask=inside)
        if NEEDS_A:
            total = tl.dot(tl.trans(hidden), tile, total, input_precision="ieee")
    if not NEEDS_A:
        return
    at = (tl.program_id(1).to(tl.int64) * RANK + ranks)[:, None] * K + columns[None, :]
    tl.store(dA + at, total * kept_scale, mask=factor_mask)


def grouped_backward_x(
    x: Tensor | None,
    g: Tensor,
    A: Tensor,
    blocks: Blocks,
    masks: Masks | None = None,
    dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See the reference; dA in `dtype`, by default that of A."""
    M, (_, rank, K) = g.shape[0], A.shape
    tile = tile or tiles.grouped_backward_x(rank, blocks.rows, masks is not None, capability(g.device))
    dX = g.new_empty(M, K)
    rows = dX if x is None else rows_of(x)
    parts = dX if x is None else A.new_empty(blocks.adapted, rank, K, dtype=torch.float32)
    seeds, thresholds, kept, _ = masks or (g, g, g, ())
    launch(
        grouped_backward_x_kernel, (count_blocks(K, tile.columns), blocks.items.shape[0]),
        rows, g, A, seeds, thresholds, kept, blocks.table, blocks.items, dX, parts, K, rows.stride(0),
        RANK=rank, RANK_BLOCK=block_rank(rank, 16), ROWS=tile.rows, DROPOUT=masks is not None,
        NEEDS_A=x is not None, tile=tile,
    )  # fmt: skip
    return dX, None if x is None else _added_by_adapter(parts, A.new_empty(A.shape, dtype=dtype), blocks)


@triton.jit
def grouped_sum_kernel(parts, bounds, out, length, BLOCK: tl.constexpr):
    """out[a] = the sum of parts[first item of a : item past its last], in the order of their numbers."""
    adapter = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(tl.load(bounds + adapter * 2), tl.load(bounds + adapter * 2 + 1)):
        total += tl.load(parts + tl.cast(part, tl.int64) * length + at, mask=inside, other=0.0)
    tl.store(out + tl.cast(adapter, tl.int64) * length + at, total.to(out.dtype.element_ty), mask=inside)


def _added_by_adapter(parts: Tensor, out: Tensor, blocks: Blocks) -> Tensor:
    length, tile = out[0].numel(), Tile(1, 1024, 4, 1)
    grid = (count_blocks(length, tile.columns), out.shape[0])
    launch(grouped_sum_kernel, grid, parts, blocks.parts, out, length, BLOCK=tile.columns, tile=tile)
    return out

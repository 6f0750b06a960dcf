"""The kernels of a batch whose rows belong to different adapters: as LoRA's, with the adapter read from a table.

A program owns a block of rows that share an adapter. Blocks of no adapter (-1) read neither x nor a factor.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..tiles import Tile, block_rank, blocks, capability, least_width
from ..triton_runtime import launch, rows_of


@triton.jit
def grouped_shrink_kernel(
    x,  # [M, K], any row stride
    A,  # [adapters, RANK, K], contiguous
    scales,  # [adapters] float32
    table,  # [blocks, 3] int32: adapter or -1, first row, row past the last
    out,  # [M, RANK], contiguous
    K,
    x_stride,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    entry = table + tl.program_id(0) * 3
    adapter = tl.load(entry)
    rows = tl.load(entry + 1) + tl.arange(0, ROWS)
    live = (rows < tl.load(entry + 2))[:, None]
    ranks = tl.arange(0, RANK_BLOCK)
    in_rank = (ranks < RANK)[None, :]
    x_rows = x + rows.to(tl.int64)[:, None] * x_stride
    A_rows = A + (adapter.to(tl.int64) * RANK + ranks)[None, :] * K
    total = tl.zeros((ROWS, RANK_BLOCK), tl.float32)
    for start in range(0, tl.where(adapter < 0, 0, K), COLUMNS):  # rows of no adapter are not read
        columns = start + tl.arange(0, COLUMNS)
        tile = tl.load(x_rows + columns[None, :], mask=live & (columns < K)[None, :], other=0.0)
        factor = tl.load(A_rows + columns[:, None], mask=in_rank & (columns < K)[:, None], other=0.0)
        total = tl.dot(tile, factor, total, input_precision="ieee")
    scale = tl.load(scales + adapter, mask=adapter >= 0, other=0.0)
    at = rows.to(tl.int64)[:, None] * RANK + ranks[None, :]
    tl.store(out + at, (total * scale).to(out.dtype.element_ty), mask=live & in_rank)


def grouped_shrink(x: Tensor, A: Tensor, scales: Tensor, table: Tensor, rows: int, tile: Tile | None = None) -> Tensor:
    """See the reference in `grouped`."""
    (M, K), rank = x.shape, A.shape[1]
    device, tile = capability(x.device), tile or tiles.grouped(rows)
    x = rows_of(x)
    out = x.new_empty(M, rank)
    launch(
        grouped_shrink_kernel, (table.shape[0],),
        x, A.to(x.dtype).contiguous(), scales, table, out, K, x.stride(0),
        RANK=rank, RANK_BLOCK=block_rank(rank, least_width(device)), ROWS=tile.rows, COLUMNS=tile.columns, tile=tile,
    )  # fmt: skip
    return out


@triton.jit
def grouped_expand_kernel(
    y,  # [M, N], any row stride
    h,  # [M, RANK], contiguous
    B,  # [adapters, N, RANK], contiguous
    table,  # [blocks, 3] int32: adapter or -1, first row, row past the last
    out,  # [M, N], any row stride; may be y
    N,
    y_stride,
    out_stride,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    entry = table + tl.program_id(0) * 3
    adapter = tl.load(entry)
    rows = tl.load(entry + 1) + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, RANK_BLOCK)
    wide = rows.to(tl.int64)[:, None]
    live = (rows < tl.load(entry + 2))[:, None]
    inside = live & (columns < N)[None, :]
    base = tl.load(y + wide * y_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    adapted = adapter >= 0
    hidden = tl.load(h + wide * RANK + ranks[None, :], mask=live & (ranks < RANK)[None, :] & adapted, other=0.0)
    factor_at = B + (adapter.to(tl.int64) * N + columns)[None, :] * RANK + ranks[:, None]
    factor = tl.load(factor_at, mask=(columns < N)[None, :] & (ranks < RANK)[:, None] & adapted, other=0.0)
    total = base + tl.dot(hidden, factor, input_precision="ieee")
    tl.store(out + wide * out_stride + columns[None, :], total.to(out.dtype.element_ty), mask=inside)


def grouped_expand(y: Tensor, h: Tensor, B: Tensor, table: Tensor, rows: int, tile: Tile | None = None) -> Tensor:
    """See the reference in `grouped`."""
    N, rank, tile = y.shape[1], B.shape[2], tile or tiles.grouped(rows)
    y = rows_of(y)
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    launch(
        grouped_expand_kernel, (table.shape[0], blocks(N, tile.columns)),
        y, h.contiguous(), B.to(h.dtype).contiguous(), table, out, N, y.stride(0), out.stride(0),
        RANK=rank, RANK_BLOCK=block_rank(rank, 16), ROWS=tile.rows, COLUMNS=tile.columns, tile=tile,
    )  # fmt: skip
    return out

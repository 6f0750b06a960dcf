"""Each op as a launch: checks no argument, chooses the tile, allocates the outputs, adds the planes.

Factors in float32 are cast before a launch, not in it: every program reads its factor again, at half the bytes so, and
at rank 32 the wider tiles spilled on sm_100.
"""

import torch
from torch import Tensor

from .. import tiles
from ..grouped.triton import grouped_expand_kernel, grouped_shrink_kernel
from ..philox import kept_scale, threshold
from ..tiles import Tile, block_rank, blocks, least_width
from ..triton_backward_x import backward_x_kernel
from ..triton_backward_y import backward_y_kernel
from ..triton_expand import expand_kernel
from ..triton_planes import sum_planes_kernel
from ..triton_runtime import capability, launch
from ..triton_shrink import shrink_kernel


def shrink(x: Tensor, A: Tensor, scale: float, p: float, seed: Tensor | None) -> Tensor:
    """See `twins.shrink`."""
    (M, K), rank = x.shape, A.shape[0]
    device = capability(x)
    tile = tiles.shrink(M, K, rank, p > 0, device)
    x, A = rows_of(x), rows_of(A.to(x.dtype))
    planes = _planes(tile.splits, x.new_empty(M, rank))
    launch(
        shrink_kernel, (blocks(M, tile.rows), tile.splits),
        x, A, planes, seed if p else x, M, K, x.stride(0), A.stride(0), scale * kept_scale(p), threshold(p),
        RANK=rank, RANK_BLOCK=block_rank(rank, least_width(device)), ROWS=tile.rows, COLUMNS=tile.columns,
        DROPOUT=p > 0, tile=tile,
    )  # fmt: skip
    return _sum(planes, x.dtype)


def backward_x(x: Tensor, g: Tensor, A: Tensor, p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `twins.backward_x`."""
    x = rows_of(x)
    tile = tiles.backward_x(x.shape[0], x.shape[1], A.shape[0], p > 0, capability(x))
    dX, planes = x.new_empty(x.shape), _planes(tile.splits, A.new_empty(A.shape))
    _backward_x(x, g, A, p, seed, dX, planes, tile, needs_A=True)
    return dX, _sum(planes, A.dtype)


def backward_x_only(g: Tensor, A: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """See `twins.backward_x_only`."""
    (M, rank), K = g.shape, A.shape[1]
    dX, tile = g.new_empty(M, K), tiles.backward_x_only(M, K, rank, capability(g))
    _backward_x(dX, g, A, p, seed, dX, dX, tile, needs_A=False)
    return dX


def _backward_x(
    x: Tensor, g: Tensor, A: Tensor, p: float, seed: Tensor | None, dX: Tensor, dA: Tensor, tile: Tile, needs_A: bool
) -> None:
    (M, K), rank = dX.shape, A.shape[0]
    g, A = g.to(dX.dtype).contiguous(), rows_of(A.to(dX.dtype))
    launch(
        backward_x_kernel, (blocks(K, tile.columns), tile.splits),
        x, g, A, dX, dA, seed if p else x, M, K, x.stride(0), A.stride(0), kept_scale(p), threshold(p),
        RANK=rank, RANK_BLOCK=block_rank(rank, 16), ROWS=tile.rows, DROPOUT=p > 0, NEEDS_A=needs_A, tile=tile,
    )  # fmt: skip


def backward_y(dY: Tensor, B: Tensor, h: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See `twins.backward_y`."""
    (M, N), rank = dY.shape, B.shape[1]
    device = capability(dY)
    tile = tiles.backward_y(M, N, rank, device)
    dY = rows_of(dY)
    across = blocks(N, tile.columns)
    factor, hidden = B.to(dY.dtype).contiguous(), h.to(dY.dtype).contiguous()
    g_planes = _planes(across, dY.new_empty(M, rank))
    dB_planes = _planes(tile.splits, B.new_empty(N, rank))
    launch(
        backward_y_kernel, (across, tile.splits),
        dY, factor, hidden, g_planes, dB_planes, M, N, dY.stride(0), scale,
        RANK=rank, RANK_BLOCK=block_rank(rank, least_width(device)), ROWS=tile.rows, COLUMNS=tile.columns, tile=tile,
    )  # fmt: skip
    return _sum(g_planes, dY.dtype), _sum(dB_planes, B.dtype)


def expand_into(out: Tensor, y: Tensor, h: Tensor, B: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """See `twins.expand`; `out` may be y, for each element is read and written by one program."""
    (M, N), rank = y.shape, B.shape[1]
    tile = tiles.expand()
    launch(
        expand_kernel, (blocks(M, tile.rows), blocks(N, tile.columns)),
        y, h.contiguous(), B.to(h.dtype).contiguous(), y if bias is None else bias, out,
        M, N, y.stride(0), out.stride(0), scale,
        RANK=rank, RANK_BLOCK=block_rank(rank, 16), ROWS=tile.rows, COLUMNS=tile.columns, BIAS=bias is not None,
        tile=tile,
    )  # fmt: skip
    return out


def expand(y: Tensor, h: Tensor, B: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """See `twins.expand`."""
    y = rows_of(y)
    return expand_into(torch.empty_like(y, memory_format=torch.contiguous_format), y, h, B, scale, bias)


def grouped_shrink(x: Tensor, A: Tensor, scales: Tensor, table: Tensor, rows: int) -> Tensor:
    """See `twins.grouped_shrink`."""
    (M, K), rank = x.shape, A.shape[1]
    device, tile = capability(x), tiles.grouped(rows)
    x = rows_of(x)
    out = x.new_empty(M, rank)
    launch(
        grouped_shrink_kernel, (table.shape[0],),
        x, A.to(x.dtype).contiguous(), scales, table, out, K, x.stride(0),
        RANK=rank, RANK_BLOCK=block_rank(rank, least_width(device)), ROWS=tile.rows, COLUMNS=tile.columns, tile=tile,
    )  # fmt: skip
    return out


def grouped_expand(y: Tensor, h: Tensor, B: Tensor, table: Tensor, rows: int) -> Tensor:
    """See `twins.grouped_expand`."""
    N, rank, tile = y.shape[1], B.shape[2], tiles.grouped(rows)
    y = rows_of(y)
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    launch(
        grouped_expand_kernel, (table.shape[0], blocks(N, tile.columns)),
        y, h.contiguous(), B.to(h.dtype).contiguous(), table, out, N, y.stride(0), out.stride(0),
        RANK=rank, RANK_BLOCK=block_rank(rank, 16), ROWS=tile.rows, COLUMNS=tile.columns, tile=tile,
    )  # fmt: skip
    return out


def rows_of(matrix: Tensor) -> Tensor:
    """With columns side by side, as 16-byte loads need; rows may lie anywhere, all on one place too."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _planes(count: int, result: Tensor) -> Tensor:
    """Room for `count` float32 parts of `result`; for one part, the result itself, which then needs no adding."""
    return result[None] if count == 1 else result.new_empty(count, *result.shape, dtype=torch.float32)


def _sum(planes: Tensor, dtype: torch.dtype) -> Tensor:
    if planes.shape[0] == 1:
        return planes[0]
    result = torch.empty_like(planes[0], dtype=dtype)
    tile = Tile(1, 1024, 4, 1)
    grid = (blocks(result.numel(), tile.columns),)
    launch(sum_planes_kernel, grid, planes, result, result.numel(), planes.shape[0], BLOCK=tile.columns, tile=tile)
    return result

"""Device code of `backward_y`: one read of dY gives g = scale · dY B and dB = dYᵀ h."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M"])
def backward_y_kernel(
    dY,  # [M, N], any row stride
    B,  # [N, RANK], contiguous
    h,  # [M, RANK], contiguous
    g,  # [column blocks, M, RANK], contiguous float32 if several
    dB,  # [splits, N, RANK], contiguous float32 if several
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
    thin = (ranks < RANK)[None, :]
    factor_mask = (columns < N)[:, None] & thin
    factor_at = B + columns.to(tl.int64)[:, None] * RANK + ranks[None, :]
    factor = tl.load(factor_at, mask=factor_mask, other=0.0)
    g_plane = g + tl.program_id(0).to(tl.int64) * M * RANK
    total = tl.zeros((COLUMNS, RANK_BLOCK), tl.float32)
    for step in range(first, tl.minimum(first + share, steps)):
        rows = step * ROWS + tl.arange(0, ROWS)
        wide = rows.to(tl.int64)[:, None]
        live = (rows < M)[:, None]
        tile = tl.load(dY + wide * dY_stride + columns[None, :], mask=live & (columns < N)[None, :], other=0.0)
        hidden = tl.load(h + wide * RANK + ranks[None, :], mask=live & thin, other=0.0)
        down = tl.dot(tile, factor, input_precision="ieee") * scale
        tl.store(g_plane + wide * RANK + ranks[None, :], down.to(g.dtype.element_ty), mask=live & thin)
        total = tl.dot(tl.trans(tile), hidden, total, input_precision="ieee")
    dB_plane = dB + tl.program_id(1).to(tl.int64) * N * RANK
    at = columns.to(tl.int64)[:, None] * RANK + ranks[None, :]
    tl.store(dB_plane + at, total.to(dB.dtype.element_ty), mask=factor_mask)

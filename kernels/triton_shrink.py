"""Device code of `shrink`: scale · dropout(x) Aᵀ, with the dropout mask drawn in registers."""

import triton
import triton.language as tl

from .triton_mask import keep_super_block


@triton.jit(do_not_specialize=["M", "threshold"])
def shrink_kernel(
    x,  # [M, K], any row stride
    A,  # [RANK, K], any row stride
    out,  # [splits, M, RANK], contiguous
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
    steps = tl.cdiv(K, COLUMNS)
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
        if DROPOUT:
            tile = tile * keep_super_block(key, rows, steps, step, threshold).to(tile.dtype)
        total = tl.dot(tile, factor, total, input_precision="ieee")
    at = (tl.program_id(1).to(tl.int64) * M + rows)[:, None] * RANK + ranks[None, :]
    tl.store(out + at, (total * scale).to(out.dtype.element_ty), mask=(rows < M)[:, None] & (ranks < RANK)[None, :])

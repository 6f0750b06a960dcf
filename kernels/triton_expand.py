"""Device code of `expand`: y + scale · h Bᵀ + bias in one read and one write of y."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M"])
def expand_kernel(
    y,  # [M, N], any row stride
    h,  # [M, RANK], contiguous
    B,  # [N, RANK], contiguous
    bias,  # [N]
    out,  # [M, N], any row stride; may be y
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
    thin = tl.load(h + wide * RANK + ranks[None, :], mask=live & (ranks < RANK)[None, :], other=0.0)
    factor_at = B + columns.to(tl.int64)[None, :] * RANK + ranks[:, None]
    factor = tl.load(factor_at, mask=(columns < N)[None, :] & (ranks < RANK)[:, None], other=0.0)
    total = base + tl.dot(thin, factor, input_precision="ieee") * scale
    if BIAS:
        total += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out + wide * out_stride + columns[None, :], total.to(out.dtype.element_ty), mask=inside)

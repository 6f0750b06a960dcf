"""Device code of `backward_x`: one read of x and one draw of its mask give the gradients of x and of A."""

import triton
import triton.language as tl

from .triton_mask import keep_super_block


@triton.jit(do_not_specialize=["M", "threshold"])
def backward_x_kernel(
    x,  # [M, K], any row stride
    g,  # [M, RANK], contiguous
    A,  # [RANK, K], any row stride
    dX,  # [M, K], contiguous
    dA,  # [splits, RANK, K], contiguous; x and dA are not touched unless NEEDS_A
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
    steps = tl.cdiv(M, ROWS)
    share = tl.cdiv(steps, tl.num_programs(1))
    first = tl.program_id(1) * share
    key = tl.load(seed) if DROPOUT else 0
    total = tl.zeros((RANK_BLOCK, 256), tl.float32)
    for step in range(first, tl.minimum(first + share, steps)):
        rows = step * ROWS + tl.arange(0, ROWS)
        wide = rows.to(tl.int64)[:, None]
        live = (rows < M)[:, None]
        inside = live & (columns < K)[None, :]
        thin = tl.load(g + wide * RANK + ranks[None, :], mask=live & (ranks < RANK)[None, :], other=0.0)
        spread = (tl.dot(thin, factor, input_precision="ieee") * kept_scale).to(factor.dtype)
        tile = tl.load(x + wide * x_stride + columns[None, :], mask=inside, other=0.0) if NEEDS_A else spread
        if DROPOUT:
            # Joined, the two have one layout and the mask is drawn once; apart, the compiler draws it again for the
            # second layout: 31 instructions an element become 42 on sm_90.
            keep = keep_super_block(key, rows, tl.cdiv(K, 256), block, threshold)
            tile, spread = tl.split(tl.join(tile, spread) * keep.to(tile.dtype)[:, :, None])
        tl.store(dX + wide * K + columns[None, :], spread, mask=inside)
        if NEEDS_A:
            total = tl.dot(tl.trans(thin), tile, total, input_precision="ieee")
    if not NEEDS_A:
        return
    at = tl.program_id(1).to(tl.int64) * RANK * K + wide_ranks * K + columns[None, :]
    tl.store(dA + at, (total * kept_scale).to(dA.dtype.element_ty), mask=factor_mask)

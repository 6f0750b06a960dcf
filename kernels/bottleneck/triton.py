"""The forward of a bottleneck in one launch: down, activation, up, bias and residual, with one read of x."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import block_rank, blocks, bottleneck, capability
from ..triton_runtime import launch, rows_of


@triton.jit(do_not_specialize=["M"])
def bottleneck_kernel(
    x,  # [M, K], any row stride
    down,  # [WIDTH, K], contiguous
    down_bias,  # [WIDTH]
    up,  # [N, WIDTH], contiguous
    up_bias,  # [N]
    onto,  # [M, N], any row stride; may be x
    out,  # [M, N], contiguous
    z,  # [M, WIDTH], contiguous: down(x), for backward
    M,
    K,
    N,
    x_stride,
    onto_stride,
    WIDTH: tl.constexpr,
    WIDTH_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADDS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    units = tl.arange(0, WIDTH_BLOCK)
    wide, live = rows.to(tl.int64)[:, None], (rows < M)[:, None]
    narrow = units < WIDTH
    total = tl.zeros((ROWS, WIDTH_BLOCK), dtype=tl.float32)
    for first in range(0, K, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = (columns < K)[None, :]
        tile = tl.load(x + wide * x_stride + columns[None, :], mask=live & inside, other=0.0)
        factor = tl.load(down + units[:, None] * K + columns[None, :], mask=narrow[:, None] & inside, other=0.0)
        total += tl.dot(tile, factor.trans(1, 0), input_precision="ieee")
    total += tl.load(down_bias + units, mask=narrow, other=0.0).to(tl.float32)[None, :]
    before = total.to(z.dtype.element_ty)
    tl.store(z + wide * WIDTH + units[None, :], before, mask=live & narrow[None, :])
    hidden = activated(before.to(tl.float32), ACTIVATION).to(z.dtype.element_ty)
    for first in range(0, N, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = columns < N
        factor_at = up + columns[None, :] * WIDTH + units[:, None]
        factor = tl.load(factor_at, mask=inside[None, :] & narrow[:, None], other=0.0)
        result = tl.dot(hidden, factor, input_precision="ieee")
        result += tl.load(up_bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        at, mask = wide * N + columns[None, :], live & inside[None, :]
        if ADDS:
            added = wide * onto_stride + columns[None, :]
            result += tl.load(onto + added, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        return tl.maximum(z, 0.0)
    if ACTIVATION == "gelu":
        return z * 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":  # (1 + tanh u) / 2 is the sigmoid of 2 u
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    if ACTIVATION == "silu":
        return z * tl.sigmoid(z)
    if ACTIVATION == "tanh":
        return 2.0 * tl.sigmoid(2.0 * z) - 1.0
    return z


def forward(
    x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, onto: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """onto + up(act(down(x))) [M, N] in the dtype of onto, or of x, and down(x) [M, width]; all weights as x is."""
    (M, K), (N, width) = x.shape, up.shape
    x, tile = rows_of(x), bottleneck(width, x.element_size(), capability(x.device))
    out = torch.empty(M, N, dtype=x.dtype if onto is None else onto.dtype, device=x.device)
    z = x.new_empty(M, width)
    onto = None if onto is None else rows_of(onto)
    launch(
        bottleneck_kernel, (blocks(M, tile.rows),),
        x, down.contiguous(), down_bias.contiguous(), up.contiguous(), up_bias.contiguous(),
        x if onto is None else onto, out, z, M, K, N, x.stride(0), 0 if onto is None else onto.stride(0),
        WIDTH=width, WIDTH_BLOCK=block_rank(width, 16), ROWS=tile.rows, COLUMNS=tile.columns,
        ACTIVATION=activation, ADDS=onto is not None, tile=tile,
    )  # fmt: skip
    return out, z

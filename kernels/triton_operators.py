# ruff: noqa: ARG001  (a fake form takes the arguments of what it stands for)
"""The kernels as registered PyTorch operators, for graphs: they trace with fake tensors, and have gradients.

Outside of a graph the launches are called as they are: an operator costs 20 µs and more a call. Inside, the body
decides when it runs: the kernel where its tensors can be launched and its first use was right, else the reference,
which draws the same mask from the same seed.

`torch.library.custom_op`, not `triton_op`: the tile table reads M, which inside a traced body would be a guard, and so
a recompile for every new batch size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import grouped, philox
from .dispatch import is_trusted, launches
from .grouped import triton as grouped_kernels
from .lora import reference
from .lora import triton as kernels


def _form(op: str, like: Tensor, factor: Tensor, dropout: bool = False, rows: int = 0) -> Any:
    """The module that has `op`: the kernels, or their reference."""
    launched, referred = (grouped_kernels, grouped) if rows else (kernels, reference)
    if not launches(like) or like.numel() == 0:
        return referred
    first, last = factor.shape[-2:]
    rank, width = (last, first) if op in ("backward_y", "expand", "grouped_expand") else (first, last)
    M = like.shape[0]
    trusted = is_trusted(op, like.device, like.dtype, factor.dtype, M, width, rank, dropout, rows)
    return launched if trusted else referred


@torch.library.custom_op("peftlib::shrink", mutates_args=())
def shrink(x: Tensor, A: Tensor, scale: float, p: float, seed: Tensor | None) -> Tensor:
    """scale · dropout(x) Aᵀ.

    Args:
        x: [M, K], any row stride.
        A: [rank, K], in the dtype of x or float32.
        scale: alpha / rank.
        p: the probability of a zero; the mask is that of `philox.keep_mask`.
        seed: [1] int64 on the device of x; may be None where p is 0.

    Returns:
        [M, rank] in the dtype of x.
    """
    return _form("shrink", x, A, p > 0).shrink(x, A, scale, p, seed)


@shrink.register_fake
def _(x: Tensor, A: Tensor, scale: float, p: float, seed: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], A.shape[0])


@torch.library.custom_op("peftlib::backward_x", mutates_args=())
def backward_x(x: Tensor, g: Tensor, A: Tensor, p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of `shrink` for g = scale · (the gradient of its output) [M, rank].

    Returns:
        dX = mask ⊙ (g A) / (1 - p), [M, K] in the dtype of x, and dA = gᵀ dropout(x), [rank, K] in A's.
    """
    return _form("backward_x", x, A, p > 0).backward_x(x, g, A, p, seed)


@backward_x.register_fake
def _(x: Tensor, g: Tensor, A: Tensor, p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), A.new_empty(A.shape)


@torch.library.custom_op("peftlib::backward_x_only", mutates_args=())
def backward_x_only(g: Tensor, A: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """The dX of `backward_x`, for an A that learns nothing: x is not needed, so it need not be saved."""
    return _form("backward_x_only", g, A, p > 0).backward_x_only(g, A, p, seed)


@backward_x_only.register_fake
def _(g: Tensor, A: Tensor, p: float, seed: Tensor | None) -> Tensor:
    return g.new_empty(g.shape[0], A.shape[1])


@torch.library.custom_op("peftlib::backward_y", mutates_args=())
def backward_y(dY: Tensor, B: Tensor, h: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The gradients of h Bᵀ for dY [M, N], B [N, rank] and h [M, rank].

    Returns:
        g = scale · dY B, [M, rank] in the dtype of dY, and dB = dYᵀ h, [N, rank] in B's.
    """
    return _form("backward_y", dY, B).backward_y(dY, B, h, scale)


@backward_y.register_fake
def _(dY: Tensor, B: Tensor, h: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return dY.new_empty(dY.shape[0], B.shape[1]), B.new_empty(B.shape)


@torch.library.custom_op("peftlib::expand", mutates_args=())
def expand(y: Tensor, h: Tensor, B: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """y + scale · h Bᵀ + bias for y [M, N], h [M, rank], B [N, rank] and bias [N], rounded once to the dtype of y."""
    return _form("expand", y, B).expand(y, h, B, scale, bias)


@expand.register_fake
def _(y: Tensor, h: Tensor, B: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    return y.new_empty(y.shape)


@torch.library.custom_op("peftlib::expand_", mutates_args=("y",))
def expand_(y: Tensor, h: Tensor, B: Tensor, scale: float, bias: Tensor | None) -> None:
    """`expand` in place, for a y that nobody else holds: no second [M, N] tensor. Autograd sees y change."""
    if _form("expand", y, B) is kernels and y.stride(1) == 1:
        kernels.expand_into(y, y, h, B, scale, bias)
        return
    y.copy_(expand(y, h, B, scale, bias))


@torch.library.custom_op("peftlib::grouped_shrink", mutates_args=())
def grouped_shrink(x: Tensor, A: Tensor, scales: Tensor, table: Tensor, rows: int) -> Tensor:
    """`shrink` for rows of different adapters.

    Args:
        x: [M, K].
        A: [adapters, rank, K]; lower ranks are filled with zero rows.
        scales: [adapters] float32.
        table: [blocks, 3] of `grouped.block_table(adapter_of_row, rows)`.
        rows: of a block at most, a power of two from 16 on; `tiles.grouped_rows(M)` gives one.

    Returns:
        [M, rank]; rows of no adapter are zero.
    """
    return _form("grouped_shrink", x, A, rows=rows).grouped_shrink(x, A, scales, table, rows)


@grouped_shrink.register_fake
def _(x: Tensor, A: Tensor, scales: Tensor, table: Tensor, rows: int) -> Tensor:
    return x.new_empty(x.shape[0], A.shape[1])


@torch.library.custom_op("peftlib::grouped_expand", mutates_args=())
def grouped_expand(y: Tensor, h: Tensor, B: Tensor, table: Tensor, rows: int) -> Tensor:
    """y + h Bᵀ with each row block's own B of [adapters, N, rank]; rows of no adapter are y's."""
    return _form("grouped_expand", y, B, rows=rows).grouped_expand(y, h, B, table, rows)


@grouped_expand.register_fake
def _(y: Tensor, h: Tensor, B: Tensor, table: Tensor, rows: int) -> Tensor:
    return y.new_empty(y.shape)


def _shrink_saves(ctx, inputs: tuple, output: Tensor) -> None:
    x, A, ctx.scale, ctx.p, seed = inputs
    ctx.save_for_backward(x, A, seed)


def _shrink_backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, A, seed = ctx.saved_tensors
    dX, dA = backward_x(x, gradient * ctx.scale, A, ctx.p, seed)
    return dX, dA, None, None, None


def _expand_saves(ctx, inputs: tuple, output: Tensor) -> None:
    _, h, B, ctx.scale, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(h, B)


def _expand_backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    h, B = ctx.saved_tensors
    g, dB = backward_y(gradient, B, h, ctx.scale)
    bias = None if ctx.bias_dtype is None else gradient.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return gradient, g.to(h.dtype), dB * ctx.scale, None, bias


shrink.register_autograd(_shrink_backward, setup_context=_shrink_saves)
expand.register_autograd(_expand_backward, setup_context=_expand_saves)


def lora_term(x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float) -> Tensor:
    """s·drop(x) Aᵀ Bᵀ in operators whose gradients are registered, for a graph that is traced."""
    x2 = x.reshape(-1, x.shape[-1])
    hs = shrink(x2, lora_A, scale, dropout, philox.new_seed(x.device))
    return F.linear(hs, lora_B.to(x.dtype)).view(*x.shape[:-1], lora_B.shape[0])

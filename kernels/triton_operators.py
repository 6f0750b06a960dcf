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

from . import philox
from .dispatch import is_trusted, launches
from .lora import reference
from .lora import triton as kernels


def _form(op: str, like: Tensor, factor: Tensor, dropout: bool) -> Any:
    """The module that has `op`: the kernels, or their reference."""
    if not launches(like) or like.numel() == 0:
        return reference
    (rank, width), M = factor.shape, like.shape[0]
    trusted = is_trusted(op, like.device, like.dtype, factor.dtype, M, width, rank, dropout)
    return kernels if trusted else reference


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


def _shrink_saves(ctx, inputs: tuple, output: Tensor) -> None:
    x, A, ctx.scale, ctx.p, seed = inputs
    ctx.save_for_backward(x, A, seed)


def _shrink_backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, A, seed = ctx.saved_tensors
    dX, dA = backward_x(x, gradient * ctx.scale, A, ctx.p, seed)
    return dX, dA, None, None, None


shrink.register_autograd(_shrink_backward, setup_context=_shrink_saves)


def lora_term(x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float) -> Tensor:
    """s·drop(x) Aᵀ Bᵀ in operators whose gradients are registered, for a graph that is traced."""
    x2 = x.reshape(-1, x.shape[-1])
    hs = shrink(x2, lora_A, scale, dropout, philox.new_seed(x.device))
    return F.linear(hs, lora_B.to(x.dtype)).view(*x.shape[:-1], lora_B.shape[0])

"""LoRA on a linear layer in the fewest calls: plain tensors on a CPU, where it is the calls that cost."""

from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled
from torch.autograd import Function
from torch.nn import functional as F

from ..dropout import draw_small
from ..reference import survivors_scale
from .autograd import Gradients, differentiable_linear, keep_for_backward, wants_plain_ops, without_autocast


class DenseLoRA(Function):
    """x Wᵀ + b + s·drop(x) Aᵀ Bᵀ; keeps x, h [tokens, rank], the parameters and, with dropout, the mask in 16 bits.

    A step of one layer with 16 tokens, 128 to 128, takes 103 µs; as plain ops with their C++ backward 133, through
    `LoRALinear` 168. At 512 tokens, 512 to 512, 4471, 4652 and 4691; the frozen base takes 3850. Every scale is the
    alpha or beta of a product: a call of its own would take 5 µs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scale: float,
        dropout: float,
    ) -> Tensor:
        y, h, keep = dense_forward(x, weight, bias, lora_A, lora_B, scale, dropout)
        keep_for_backward(ctx, x, weight, lora_A, lora_B, h, keep, scale, dropout, _Kept)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Gradients:
        (dY,) = grad_outputs
        if wants_plain_ops(dY):
            return differentiable_linear(ctx, dY)
        dY = _flat(dY.contiguous())
        if not _is_any_autocast_enabled():
            return _backward(ctx, dY)
        with without_autocast(dY):
            return _backward(ctx, dY)


class _Kept:
    """Stands where the steps do that make a mask again from its seed: here the mask itself was kept."""

    @staticmethod
    def keep_mask(x: Tensor, _: float, keep: Tensor) -> Tensor:
        return keep.to(x.dtype)


def dense_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, h = drop(x) Aᵀ unscaled [tokens, rank], and the mask; x is contiguous, and of the dtype of W."""
    x2, keep = _flat(x), None
    y = F.linear(x, weight, bias)  # not of x2: a result that is a view costs autograd 10 µs more
    if dropout:
        keep, scale = draw_small(x2, dropout), scale * survivors_scale(dropout)
        x2 = x2 * keep
    h = F.linear(x2, _as(x, lora_A))
    _flat(y).addmm_(h, _as(x, lora_B).t(), alpha=scale)
    return y, h, keep


def _backward(ctx: Any, dY: Tensor) -> Gradients:
    needs_x, needs_weight, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:5]
    x, weight, lora_A, lora_B, h, keep = ctx.saved_tensors
    scale = ctx.scale
    if keep is not None:  # cast once: a product of two dtypes would cast it each time
        keep, scale = keep.to(dY.dtype), scale * survivors_scale(ctx.dropout)
    lora_A, lora_B, x2 = _as(dY, lora_A), _as(dY, lora_B), None if x is None else _flat(x)
    dX = dW = dA = dB = None
    g = torch.mm(dY, lora_B) if needs_x or needs_A else dY
    if needs_x:
        if keep is None:  # the thin product on top: 512×2048 that way round take 6.6 ms, the other 6.8
            dX = torch.mm(dY, weight).addmm_(g, lora_A, alpha=scale)
        else:
            dX = torch.mm(g, lora_A).mul_(keep).addmm_(dY, weight, beta=scale)
        dX = dX if len(ctx.x_shape) == 2 else dX.view(ctx.x_shape)
    if needs_A and x2 is not None:
        dA = torch.addmm(lora_A, g.t(), x2 if keep is None else x2 * keep, beta=0, alpha=scale)
    if needs_B:
        # As hᵀ dY 29 µs, as dYᵀ h 77 (512 tokens, 512 outputs, rank 8).
        dB = torch.addmm(lora_B.t(), h.t(), dY, beta=0, alpha=scale).t()
    if needs_weight and x2 is not None:
        dW = torch.mm(dY.t(), x2)
    return dX, dW, dY.sum(0) if needs_bias else None, dA, dB, None, None


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.view(-1, x.shape[-1])


def _as(x: Tensor, factor: Tensor) -> Tensor:
    return factor if factor.dtype == x.dtype else factor.to(x.dtype)

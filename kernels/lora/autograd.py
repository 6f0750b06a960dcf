"""The autograd functions behind LoRA: what the forward pass keeps, and the backward pass that is made from it.

Kept: x itself (only where A or W learns), hs = s·drop(x) Aᵀ [tokens, rank] (only where B learns), W, the factors, what
of them was cast for the step, and the seed. Not kept: the mask, the dropped x, any cast of x. Backward draws the mask
again from the seed.

Order. Forward: hs, then y. Backward: g = s·dY B and dB = dYᵀ hs from one read of dY; then drop'(g A) and dA =
gᵀ drop(x) from one read of x and one draw of the mask; last the GEMM with W adds onto dX, for it is bound by arithmetic
and has the time to read what it adds onto.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from ..dispatch import as_own_tensor, has_autocast, is_differentiated, lora_steps, without_autocast
from . import reference
from .aten import gemm_dtype

Gradients = tuple[Tensor | None, ...]

_HAS_MKL = torch.backends.mkl.is_available()


class Kept(NamedTuple):
    """What backward is made from beside the arguments; A and B are the factors as the steps took them, cast or not, and
    `steps` what makes the mask again from `seed`."""

    hs: Tensor
    seed: Tensor | None
    A: Tensor
    B: Tensor
    steps: Any


class LoRALinear(Function):
    """x Wᵀ + b + s·drop(x) Aᵀ Bᵀ; keeps x, hs [tokens, rank], the parameters and the seed of the mask."""

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
        y, kept = linear_forward(x, weight, bias, lora_A, lora_B, scale, dropout)
        keep_for_backward(ctx, x, weight, lora_A, lora_B, scale, dropout, kept)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Gradients:
        (dY,) = grad_outputs
        if is_differentiated(dY):
            return differentiable_linear(ctx, dY)
        needs_x, needs_weight, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:5]
        with without_autocast(dY):
            dX, dW, dA, dB = _backward(ctx, rows(dY), (needs_x, needs_weight, needs_A, needs_B))
        return dX, dW, rows(dY).sum(0) if needs_bias else None, dA, dB, None, None


class LoRAAdd(Function):
    """y + s·drop(x) Aᵀ Bᵀ; keeps what `LoRALinear` keeps, without the weight."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float) -> Tensor:
        out, kept = add_forward(y, x, lora_A, lora_B, scale, dropout)
        keep_for_backward(ctx, x, None, lora_A, lora_B, scale, dropout, kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Gradients:
        (dY,) = grad_outputs
        _, needs_x, needs_A, needs_B = ctx.needs_input_grad[:4]
        if is_differentiated(dY):
            dX, _, dA, dB = _differentiable(ctx, dY, (needs_x, False, needs_A, needs_B))
        else:
            with without_autocast(dY):
                dX, _, dA, dB = _backward(ctx, rows(dY), (needs_x, False, needs_A, needs_B))
        return dY, dX, dA, dB, None, None


def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Kept]:
    x_cast, weight, bias = as_autocast(x, weight, bias)
    with without_autocast(x):
        x2 = rows(x_cast)
        kept = _shrunk(x2, lora_A, lora_B, scale, dropout)
        if _accumulates_alike(x, weight):
            # The wide GEMM is bound by arithmetic and reads y for nothing, the skinny one by memory: 1444 µs in this
            # order, 1513 in the other, 1319 for the base (512×512, caches cold). In bfloat16 y is rounded once less.
            skinny = kept.B.to(x2.dtype).t()
            y = torch.mm(kept.hs, skinny) if bias is None else torch.addmm(bias, kept.hs, skinny)
            y = as_own_tensor(y.addmm_(x2, weight.t()), (*x.shape[:-1], weight.shape[0]))
        else:
            y = F.linear(x_cast, weight, bias).contiguous()
            kept.steps.expand_(y.view(-1, y.shape[-1]), kept.hs, kept.B)
            y = as_own_tensor(y, y.shape)
    return y, kept


def add_forward(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float
) -> tuple[Tensor, Kept]:
    with without_autocast(x):
        kept = _shrunk(rows(x.to(y.dtype)), lora_A, lora_B, scale, dropout)
        # The host's output is the host's: its own graph may have kept it, so it is never written to.
        out = kept.steps.expand(rows(y), kept.hs, kept.B)
    return as_own_tensor(out, y.shape), kept


def _shrunk(x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float) -> Kept:
    steps, A, B = lora_steps(x, lora_A, lora_B, dropout)
    # Drawn here and kept: a checkpoint that restores torch's generator draws it again, and so the same mask.
    seed = steps.draw_seed(x) if dropout else None
    return Kept(steps.shrink(x, A, scale, dropout, seed), seed, A, B, steps)


def _accumulates_alike(x: Tensor, weight: Tensor) -> bool:
    # Whether a GEMM that adds onto zeros has the bits of F.linear, which B = 0 must give. MKL and oneDNN: in all of
    # 16,000 shapes and dtypes. Elsewhere, and where F.linear would take another road, the base's own call comes first.
    if not (_HAS_MKL and x.device.type == "cpu" and x.dim() > 1 and x.is_contiguous() and weight.is_contiguous()):
        return False
    return gemm_dtype(weight) == weight.dtype


def as_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gives the operands of F.linear as autocast would cast them."""
    if not has_autocast(x) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def keep_for_backward(
    ctx: Any,
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    dropout: float,
    kept: Kept,
) -> None:
    """Saves each tensor only where a gradient that is asked for needs it; without a weight, for LoRAAdd."""
    needs_x, needs_weight = ctx.needs_input_grad[:2] if weight is not None else (ctx.needs_input_grad[1], False)
    needs_A, needs_B = ctx.needs_input_grad[3:5] if weight is not None else ctx.needs_input_grad[2:4]
    ctx.save_for_backward(
        x if needs_A or needs_weight else None,
        weight if needs_x or needs_weight else None,
        lora_A,
        lora_B,
        kept.hs if needs_B else None,
        None if kept.A is lora_A else kept.A,
        None if kept.B is lora_B else kept.B,
        kept.seed,
    )
    ctx.scale, ctx.dropout, ctx.steps, ctx.x_shape, ctx.x_dtype = scale, dropout, kept.steps, x.shape, x.dtype


def _backward(ctx: Any, dY: Tensor, needs: tuple[bool, bool, bool, bool]) -> Gradients:
    needs_x, needs_weight, needs_A, needs_B = needs
    x, weight, lora_A, lora_B, hs, A, B, seed = ctx.saved_tensors
    A, B = lora_A if A is None else A, lora_B if B is None else B
    x2 = None if x is None else rows(x.to(dY.dtype))
    dY = dY if dY.stride() == (dY.shape[1], 1) else dY.contiguous()
    dX = dA = dB = None
    if needs_x or needs_A or needs_B:
        # hs has the scale in it, so dB needs none; without a B that learns hs is None, and dB is left out
        g, dB = ctx.steps.backward_y(dY, B, hs, ctx.scale, lora_B.dtype)
        x_of_A = x2 if needs_A else None
        if seed is not None:
            dX, dA = ctx.steps.backward_x(x_of_A, g, A, ctx.dropout, seed, lora_A.dtype)
        else:
            dX = torch.mm(g, A.to(g.dtype)) if needs_x else None
            dA = None if x_of_A is None else ctx.steps.backward_A(x_of_A, g, lora_A.dtype)
        if dX is not None and needs_x and weight is not None:
            dX.addmm_(dY.to(dX.dtype), weight.to(dX.dtype))
    dW = torch.mm(dY.t(), x2) if x2 is not None and needs_weight else None
    return (
        dX.to(ctx.x_dtype).view(ctx.x_shape) if dX is not None and needs_x else None,
        dW if dW is None or weight is None else dW.to(weight.dtype),
        dA,
        dB,
    )


def differentiable_linear(ctx: Any, dY: Tensor) -> Gradients:
    needs_x, needs_weight, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:5]
    dX, dW, dA, dB = _differentiable(ctx, dY, (needs_x, needs_weight, needs_A, needs_B))
    return dX, dW, rows(dY).sum(0) if needs_bias else None, dA, dB, None, None


def _differentiable(ctx: Any, dY: Tensor, needs: tuple[bool, bool, bool, bool]) -> Gradients:
    """The backward pass through the plain form, whose own backward torch knows."""
    x, weight, lora_A, lora_B, hs, *_, seed = ctx.saved_tensors
    if x is None and hs is not None:
        raise RuntimeError(
            "lora_linear: a second derivative needs x, which was not kept because lora_A needs no gradient. "
            "Give lora_A requires_grad=True, or do without create_graph and is_grads_batched."
        )
    x = torch.zeros(ctx.x_shape, dtype=ctx.x_dtype, device=dY.device, requires_grad=True) if x is None else x
    keep = None if seed is None else ctx.steps.keep_mask(rows(x), ctx.dropout, seed).view(x.shape)
    inputs = (x, weight, lora_A, lora_B)
    with torch.enable_grad(), without_autocast(dY):
        x_cast = x.to(dY.dtype)
        y = reference.lora_term(x_cast, lora_A, lora_B, ctx.scale, ctx.dropout, keep)
        if weight is not None:
            y = y + F.linear(x_cast, weight.to(dY.dtype))
        wanted = [tensor for tensor, need in zip(inputs, needs, strict=True) if need]
        gradients = iter(torch.autograd.grad(y, wanted, dY, create_graph=True))
    return tuple(next(gradients) if need else None for need in needs)


def rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])

"""The autograd functions behind LoRA: what the forward pass keeps, and the backward pass that is made from it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import Function
from torch.nn import functional as F

from .. import reference
from ..dispatch import Steps, steps_for
from .aten import gemm_dtype

Gradients = tuple[Tensor | None, ...]

_HAS_MKL = torch.backends.mkl.is_available()


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
        y, hs, seed, steps = linear_forward(x, weight, bias, lora_A, lora_B, scale, dropout)
        keep_for_backward(ctx, x, weight, lora_A, lora_B, hs, seed, scale, dropout, steps)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Gradients:
        (dY,) = grad_outputs
        if wants_plain_ops(dY):
            return differentiable_linear(ctx, dY)
        needs_x, needs_weight, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:5]
        with without_autocast(dY):
            dX, dW, dA, dB = _backward(ctx, rows(dY), (needs_x, needs_weight, needs_A, needs_B))
        return dX, dW, rows(dY).sum(0) if needs_bias else None, dA, dB, None, None


def keep_for_backward(
    ctx: Any,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    h: Tensor,
    seed: Tensor | None,
    scale: float,
    dropout: float,
    steps: Any,
) -> None:
    needs_x, needs_weight, _, needs_A, needs_B = ctx.needs_input_grad[:5]
    ctx.save_for_backward(
        x if needs_A or needs_weight else None,
        weight if needs_x or needs_weight else None,
        lora_A,
        lora_B,
        h if needs_B else None,
        seed,
    )
    ctx.scale, ctx.dropout, ctx.steps, ctx.x_shape, ctx.x_dtype = scale, dropout, steps, x.shape, x.dtype


class LoRAAdd(Function):
    """y + s·drop(x) Aᵀ Bᵀ; keeps what `LoRALinear` keeps, without the weight."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float) -> Tensor:
        needs_A, needs_B = ctx.needs_input_grad[2:4]
        out, hs, seed, steps = add_forward(y, x, lora_A, lora_B, scale, dropout)
        ctx.save_for_backward(x if needs_A else None, None, lora_A, lora_B, hs if needs_B else None, seed)
        ctx.scale, ctx.dropout, ctx.steps, ctx.x_shape, ctx.x_dtype = scale, dropout, steps, x.shape, x.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Gradients:
        (dY,) = grad_outputs
        _, needs_x, needs_A, needs_B = ctx.needs_input_grad[:4]
        if wants_plain_ops(dY):
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
) -> tuple[Tensor, Tensor, Tensor | None, Steps]:
    x_cast, weight, bias = as_autocast(x, weight, bias)
    with without_autocast(x):
        x2 = rows(x_cast)
        steps = steps_for(x2, lora_A, lora_B)
        seed = steps.draw_seed(x2) if dropout else None
        hs = steps.shrink(x2, lora_A, scale, dropout, seed)
        if _accumulates_alike(x, weight):
            # The wide GEMM is bound by arithmetic and reads y for nothing, the thin one by memory: 1444 µs in this
            # order, 1513 in the other, 1319 for the base (512×512, caches cold). In bfloat16 y is rounded once less.
            thin = lora_B.to(x2.dtype).t()
            y = torch.mm(hs, thin) if bias is None else torch.addmm(bias, hs, thin)
            y = y.addmm_(x2, weight.t()).view(*x.shape[:-1], weight.shape[0])
        else:
            y = F.linear(x_cast, weight, bias).contiguous()
            steps.expand_(y.view(-1, y.shape[-1]), hs, lora_B)
    return y, hs, seed, steps


def _accumulates_alike(x: Tensor, weight: Tensor) -> bool:
    # Whether a GEMM that adds onto zeros has the bits of F.linear, which B = 0 must give. MKL and oneDNN: in all of
    # 16,000 shapes and dtypes. Elsewhere, and where F.linear would take another road, the base's own call comes first.
    if not (_HAS_MKL and x.device.type == "cpu" and x.dim() > 1 and x.is_contiguous() and weight.is_contiguous()):
        return False
    return gemm_dtype(weight) == weight.dtype


def add_forward(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float
) -> tuple[Tensor, Tensor, Tensor | None, Steps]:
    with without_autocast(x):
        x2 = rows(x.to(y.dtype))
        steps = steps_for(x2, lora_A, lora_B)
        seed = steps.draw_seed(x2) if dropout else None
        hs = steps.shrink(x2, lora_A, scale, dropout, seed)
        # The host's output is the host's: its own graph may have kept it, so it is never written to.
        out = steps.expand(rows(y), hs, lora_B)
    return out.view(y.shape), hs, seed, steps


def as_autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gives the operands of F.linear as autocast would cast them."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def wants_plain_ops(dY: Tensor) -> bool:
    # Under create_graph the backward pass is differentiated, and under is_grads_batched it is mapped.
    return torch.is_grad_enabled() or is_legacy_batchedtensor(dY) or _are_functorch_transforms_active()


def _backward(ctx: Any, dY: Tensor, needs: tuple[bool, bool, bool, bool]) -> Gradients:
    needs_x, needs_weight, needs_A, needs_B = needs
    x, weight, lora_A, lora_B, hs, seed = ctx.saved_tensors
    x2 = None if x is None else rows(x.to(dY.dtype))
    dY = dY if dY.stride() == (dY.shape[1], 1) else dY.contiguous()
    dX = dA = dB = None
    if needs_x or needs_A or needs_B:
        g, dB = ctx.steps.backward_y(dY, lora_B, hs, ctx.scale)
        dX, dA = _through_shrink(ctx, dY, g, x2 if needs_A else None, lora_A, weight, seed, needs_x)
    dW = torch.mm(dY.t(), x2) if x2 is not None and needs_weight else None
    return (
        None if dX is None else dX.to(ctx.x_dtype).view(ctx.x_shape),
        dW if dW is None else dW.to(weight.dtype),
        None if dA is None else dA.to(lora_A.dtype),
        None if dB is None else dB.to(lora_B.dtype),
    )


def _through_shrink(
    ctx: Any,
    dY: Tensor,
    g: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    needs_x: bool,
) -> tuple[Tensor | None, Tensor | None]:
    if seed is not None:
        dX, dA = ctx.steps.backward_x(x, g, lora_A, ctx.dropout, seed, (dY.shape[0], ctx.x_shape[-1]))
    else:
        dX, dA = torch.mm(g, lora_A.to(g.dtype)) if needs_x else None, None if x is None else ctx.steps.backward_A(x, g)
    if dX is not None and needs_x and weight is not None:
        dX.addmm_(dY.to(dX.dtype), weight.to(dX.dtype))
    return dX if needs_x else None, dA


def differentiable_linear(ctx: Any, dY: Tensor) -> Gradients:
    needs_x, needs_weight, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:5]
    dX, dW, dA, dB = _differentiable(ctx, dY, (needs_x, needs_weight, needs_A, needs_B))
    return dX, dW, rows(dY).sum(0) if needs_bias else None, dA, dB, None, None


def _differentiable(ctx: Any, dY: Tensor, needs: tuple[bool, bool, bool, bool]) -> Gradients:
    """The backward pass through the plain form, whose own backward torch knows."""
    x, weight, lora_A, lora_B, hs, seed = ctx.saved_tensors
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

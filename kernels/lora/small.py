"""LoRA on a linear layer in the fewest calls: for plain tensors on a CPU, where dispatch overhead bounds the time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled
from torch.autograd import Function
from torch.nn import functional as F

from ..dispatch import as_own_tensor, is_differentiated, without_autocast
from ..dropout import draw_small, survivors_scale
from . import reference
from .aten import project
from .autograd import Gradients, differentiable_linear

# Of x or dY. Below, each call costs more than the better orientation of a product gains.
_FEW_ELEMENTS = 1 << 13


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
        needs_x, needs_weight, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if needs_A or needs_weight else None,
            weight if needs_x or needs_weight else None,
            lora_A,
            lora_B,
            h if needs_B else None,
            keep,
        )
        ctx.scale, ctx.dropout, ctx.steps, ctx.x_shape, ctx.x_dtype = scale, dropout, _KeptMask, x.shape, x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Gradients:
        (dY,) = grad_outputs
        if is_differentiated(dY):
            return differentiable_linear(ctx, dY)
        dY = _flat(dY.contiguous())
        if not _is_any_autocast_enabled():
            return _backward(ctx, dY)
        with without_autocast(dY):
            return _backward(ctx, dY)


class _KeptMask:
    """Stands where the steps do that make a mask again from its seed: here the mask itself was kept."""

    @staticmethod
    def keep_mask(x: Tensor, _: float, keep: Tensor) -> Tensor:
        return keep.to(x.dtype)


def dense_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, h = drop(x) Aᵀ unscaled [tokens, rank], and the mask; x is contiguous, and of the dtype of W."""
    x2, keep = _flat(x), None
    y = F.linear(x, weight, bias)  # not of x2: of four dimensions it has other bits
    if dropout:
        keep, scale = draw_small(x2, dropout), scale * survivors_scale(dropout)
        x2 = x2 * keep
    lora_A = _as(x, lora_A)
    h = F.linear(x2, lora_A) if x2.numel() < _FEW_ELEMENTS else project(x2, lora_A)
    _flat(y).addmm_(h, _as(x, lora_B).t(), alpha=scale)
    return as_own_tensor(y, y.shape) if y._is_view() else y, h, keep


def _backward(ctx: Any, dY: Tensor) -> Gradients:
    needs_x, needs_weight, needs_bias, needs_A, needs_B, *_ = ctx.needs_input_grad
    x, weight, lora_A, lora_B, h, keep = ctx.saved_tensors
    scale, is_few = ctx.scale, dY.numel() < _FEW_ELEMENTS
    if keep is not None:  # cast once: a product of two dtypes would cast it each time
        keep, scale = keep.to(dY.dtype), scale * survivors_scale(ctx.dropout)
    lora_A, lora_B, x2 = _as(dY, lora_A), _as(dY, lora_B), None if x is None else _flat(x)
    dX = dW = dA = dB = None
    g = dY
    if needs_x or needs_A:
        g = torch.mm(dY, lora_B) if is_few else project(dY, lora_B.t())
    if needs_x:
        if keep is None:  # the skinny GEMM on top: 512×2048 that way round take 6.6 ms, the other 6.8
            dX = torch.mm(dY, weight).addmm_(g, lora_A, alpha=scale)
        else:
            dX = torch.mm(g, lora_A).mul_(keep).addmm_(dY, weight, beta=scale)
        dX = dX if len(ctx.x_shape) == 2 else dX.view(ctx.x_shape)
    if needs_A and x2 is not None:
        dA = torch.addmm(lora_A, g.t(), x2 if keep is None else x2 * keep, beta=0, alpha=scale)
    if needs_B:
        if is_few:  # contiguous, so that the parameter takes it as it is
            dB = torch.addmm(lora_B, dY.t(), h, beta=0, alpha=scale)
        else:  # 29 µs, the other way round 77 (512 tokens, 512 outputs, rank 8)
            dB = torch.addmm(lora_B.t(), h.t(), dY, beta=0, alpha=scale).t()
    if needs_weight and x2 is not None:
        dW = torch.mm(dY.t(), x2)
    return dX, dW, dY.sum(0) if needs_bias else None, dA, dB, None, None


def add_small(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float) -> Tensor:
    """`lora_add` in plain ops, whose own backward is C++, with a mask that is kept."""
    x2 = x.view(-1, x.shape[-1])  # [tokens, in]
    if dropout:
        x2, scale = x2 * draw_small(x2, dropout), scale * survivors_scale(dropout)
    if lora_A.dtype != x.dtype or lora_B.dtype != x.dtype:
        lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    return torch.addmm(y.view(-1, y.shape[-1]), torch.mm(x2, lora_A.t()), lora_B.t(), alpha=scale).view(y.shape)


def linear_of_one_token(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scale: float
) -> Tensor:
    """One token without gradients or dropout: products with a vector, where they have the bits of F.linear."""
    dtype = weight.dtype
    alike = x.dtype is dtype and lora_A.dtype is dtype and lora_B.dtype is dtype and x.is_contiguous()
    if not alike or _is_any_autocast_enabled():
        return reference.lora_add(F.linear(x, weight, bias), x, lora_A, lora_B, scale)
    row = x.flatten()
    if x.is_cpu and _multiplies_alike(weight, bias):
        # 128 to 128: three products with a vector take 6.1 µs, with F.linear for the first of them 7.8.
        y = weight.mv(row) if bias is None else torch.addmv(bias, weight, row)
        y.addmv_(lora_B, lora_A.mv(row), alpha=scale)
        return y.view(1, 1, -1) if x.dim() == 3 else y.view(*x.shape[:-1], -1)
    y = F.linear(x, weight, bias)
    y.view(-1).addmv_(lora_B, lora_A.mv(row), alpha=scale)
    return y


_ALIKE: dict[tuple[torch.Size, torch.dtype, bool, int], bool] = {}
# Above this size reading W takes the time, whoever multiplies.
_LARGEST_ASKED = 1 << 18


def _multiplies_alike(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether W times a vector has the bits of F.linear, which B = 0 must give: this machine is asked once a shape.

    Half precision would round most of the differences away, and show one later."""
    alike = _ALIKE.get(key := (weight.shape, weight.dtype, bias is None, torch.get_num_threads()))
    if alike is None:
        asked = weight.numel() <= _LARGEST_ASKED and weight.element_size() >= 4
        alike = _ALIKE[key] = asked and all(_rows_agree(weight.detach().contiguous(), bias))
    return alike and weight.is_contiguous()


def _rows_agree(weight: Tensor, bias: Tensor | None) -> Iterator[bool]:
    generator = torch.Generator().manual_seed(0)
    for row in torch.randn(32, weight.shape[1], generator=generator, dtype=weight.dtype):
        y = weight.mv(row) if bias is None else torch.addmv(bias, weight, row)
        yield torch.equal(y, F.linear(row, weight, bias)) and torch.equal(y[None], F.linear(row[None], weight, bias))


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.view(-1, x.shape[-1])


def _as(x: Tensor, factor: Tensor) -> Tensor:
    return factor if factor.dtype == x.dtype else factor.to(x.dtype)

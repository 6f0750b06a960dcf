"""LoRA on a linear layer whose rows go through pairs of their own, on a GPU: each step one launch for all pairs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from .. import tiles
from ..dispatch import apply, as_own_tensor, is_differentiated, without_autocast
from ..lora.segments import Segments, plain_gradients
from ..philox import keep_mask_of
from .blocks import Blocks
from .reference import Masks


def lora_linear_grouped(
    kernels: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    segments: Segments,
    masks: Masks | None,
    factors: Sequence[Tensor],
) -> Tensor:
    """The rows stay where they are: a copy of x and one of y, there and back, would cost more than blocks that are not
    full."""
    trained = [x, weight, *factors] if bias is None else [x, weight, bias, *factors]
    if torch.is_grad_enabled() and any(each.requires_grad for each in trained):
        return apply(_GroupedLoRA, x, weight, bias, kernels, segments, masks, *factors)
    y, *_ = _forward(kernels, x, weight, bias, segments, masks, factors)
    return y.view(*x.shape[:-1], y.shape[-1])


class _GroupedLoRA(Function):
    """Keeps x, h [tokens, rank], the pairs and the stack that was made of them in the dtype of x, and the seeds."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kernels: Any,
        segments: Segments,
        masks: Masks | None,
        *factors: Tensor,
    ) -> Tensor:
        y, h, A, B = _forward(kernels, x, weight, bias, segments, masks, factors)
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        needs_A = any(ctx.needs_input_grad[6::2])
        ctx.save_for_backward(
            x if needs_A or needs_weight else None, weight if needs_x else None, h, A, B, *factors
        )  # fmt: skip
        ctx.kernels, ctx.segments, ctx.masks, ctx.x_shape = kernels, segments, masks, x.shape
        return as_own_tensor(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        (dY,) = grad_outputs
        with without_autocast(dY):
            return _differentiable(ctx, dY) if is_differentiated(dY) else _backward(ctx, dY)


def _forward(
    kernels: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    segments: Segments,
    masks: Masks | None,
    factors: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x2 = x.view(-1, x.shape[-1])
    A, B = _gathered(factors, x.dtype)
    blocks = _blocks(segments, x2, x2.shape[1], 2)
    h = kernels.grouped_shrink(x2, A, segments.paired_scales(x.device), blocks, masks)
    y = F.linear(x2, weight, bias)
    return kernels.grouped_expand_(y, h, B, blocks), h, A, B


def _backward(ctx: Any, dY: Tensor) -> tuple[Any, ...]:
    kernels, segments, (x, weight, h, A, B, *factors) = ctx.kernels, ctx.segments, ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _, _, _, *needs = ctx.needs_input_grad
    dY2 = dY.reshape(-1, dY.shape[-1])
    x2 = None if x is None else x.view(-1, x.shape[-1])
    dtype = torch.float32 if any(factor.dtype == torch.float32 for factor in factors) else A.dtype
    scales, width = segments.paired_scales(dY.device), A.shape[2]
    dX = None
    gradients: list[Tensor | None] = [None] * len(factors)
    if needs_x or any(needs):
        g, dB = kernels.grouped_backward_y(dY2, B, h, scales, _blocks(segments, dY2, dY2.shape[1], 1), dtype)
        blocks = _blocks(segments, dY2, width, 2)
        dX, dA = kernels.grouped_backward_x(x2 if any(needs[::2]) else None, g, A, blocks, ctx.masks, dtype)
        gradients = [
            _own(stack[at // 2], factor) if need and stack is not None else None
            for at, (stack, factor, need) in enumerate(zip([dA, dB] * (len(factors) // 2), factors, needs, strict=True))
        ]
    if weight is not None and dX is not None:
        dX = dX.addmm_(dY2, weight).view(ctx.x_shape)
    dW = torch.mm(dY2.t(), x2) if needs_weight and x2 is not None else None
    return dX if needs_x else None, dW, dY2.sum(0) if needs_bias else None, None, None, None, *gradients


def _blocks(segments: Segments, rows: Tensor, width: int, waves: int) -> Blocks:
    tokens, device = rows.shape[0], rows.device
    height = tiles.grouped_rows(tokens)
    items = tiles.grouped_items(width, tiles.blocks(tokens, height), waves, tiles.capability(device))
    return segments.blocks(tokens // segments.size, height, items, device)


def _gathered(factors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [pairs, rank, in] and B [pairs, out, rank] of the pairs with rows here, to the highest rank with zeros: stacked
    and cast in one pass."""
    ranks = [factor.shape[0] for factor in factors[::2]]
    make = torch.empty if len({*ranks}) == 1 else torch.zeros
    options: Any = {"dtype": dtype, "device": factors[0].device}
    A = make(len(ranks), max(ranks), factors[0].shape[1], **options)
    B = make(len(ranks), factors[1].shape[0], max(ranks), **options)
    places = [place for at, rank in enumerate(ranks) for place in (A[at, :rank], B[at, :, :rank])]
    with torch.no_grad():
        torch.ops.aten._foreach_copy_(places, [factor.detach() for factor in factors])
    return A, B


def _own(gradient: Tensor, factor: Tensor) -> Tensor:
    return gradient[: factor.shape[0], : factor.shape[1]].to(factor.dtype).contiguous()


def _differentiable(ctx: Any, dY: Tensor) -> tuple[Any, ...]:
    """The backward pass through plain operations, whose own backward torch knows."""
    masks, (x, weight, _, _, _, *factors) = ctx.masks, ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _, _, _, *needs = ctx.needs_input_grad

    def keep(pair: int, rows: Tensor) -> Tensor:
        return keep_mask_of(rows, masks.dropouts[pair], masks.seeds[pair : pair + 1])

    dropped = (None, None) if masks is None else (masks.dropouts, keep)
    segments, wanted = ctx.segments.to(dY.device), [needs_x, needs_weight, needs_bias, *needs]
    dX, dW, db, *rest = plain_gradients(dY, x, weight, segments, factors, ctx.x_shape, wanted, *dropped)
    return dX, dW, db, None, None, None, *rest

"""LoRA on a linear layer whose rows go through pairs of their own: the layer once, and each pair on its rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled
from torch.autograd import Function
from torch.nn import Parameter
from torch.nn import functional as F

from ..dispatch import (
    apply,
    as_own_tensor,
    grouped_kernels,
    is_differentiated,
    is_transformed,
    launches,
    without_autocast,
)
from ..grouped.lora import lora_linear_grouped
from ..grouped.reference import Masks
from .segments import Segments, plain_gradients

_DENSE = frozenset((Tensor, Parameter))
Pair = tuple[Tensor, Tensor]


def lora_linear_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pairs: Sequence[Pair],
    segments: Segments,
    dropouts: tuple[float, ...] | None = None,
    seeds: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """Applies a linear layer to all rows at once, and to each row's result adds the low-rank term of its own pair.

    yᵢ = W xᵢ + b + s Bₖ Aₖ drop(xᵢ), with k = k(i)

    For backward it keeps x itself and the rank-r product of each row. Nothing is masked by multiplying: what is not
    finite in one pair or row stays there. Pairs with as many rows each are one batched product of their factors in two
    stacks, which backward keeps, those of lower rank padded with zeros in A and B (a zero in B alone would still give
    its column a gradient).

    8 pairs of rank 8, 16 tokens each, 128 to 128, forward and backward in µs of one CPU: batched 370, pair by pair 649,
    eight calls of `lora_linear` 992, the frozen layer on all rows 157. One token each without gradients: 32, eight
    calls 94, the layer 8.

    Example:
        >>> x, weight = torch.randn(4, 7, 32), torch.randn(48, 32)
        >>> pairs = [(torch.randn(2, 32), torch.randn(48, 2)), (torch.randn(8, 32), torch.randn(48, 8))]
        >>> segments = peftlib.kernels.Segments((1, 3), (1.0, 0.5))
        >>> peftlib.kernels.lora_linear_rows(x, weight, None, pairs, segments).shape
        torch.Size([4, 7, 48])

    Args:
        x: [rows, ..., in], contiguous, in the dtype of W; or [k·rows, ..., in], the k of each row together.
        weight: [out, in].
        bias: [out] or None.
        pairs: lora_A [rank, in] and lora_B [out, rank] of each segment that has one.
        segments: which rows go through which.
        dropouts: the probability of each pair, where `serves_rows(..., dropping=True)`.
        seeds: [pairs] int64, that of each pair's mask, on the device of x.
        keep: [tokens, in], sorted by segment: what each element of x is multiplied by on its way to A, where masks were
            drawn already.

    Returns:
        [rows, ..., out].

    Raises:
        ValueError: another number of pairs than of segments that have one.
        RuntimeError: shapes that do not fit, or a second derivative for which x was not kept.

    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021; Chen et al., Punica: Multi-Tenant LoRA
    Serving, 2023.
    """
    if len(pairs) != segments.pairs:
        raise ValueError(
            f"lora_linear_rows: {len(pairs)} pairs for {segments.pairs} segments with a scale. Give one each."
        )
    factors = [factor for pair in pairs for factor in pair]
    kernels = grouped_kernels(x, factors, dropouts is not None) if factors and launches(x) else None
    if kernels is not None:
        masks = None if dropouts is None or seeds is None else Masks.of(dropouts, seeds)
        return lora_linear_grouped(kernels, x, weight, bias, segments, masks, factors)
    segments = segments.to(x.device)
    if segments.are_alike:
        factors = _stacked(factors)
    trained = [x, weight, *factors] if bias is None else [x, weight, bias, *factors]
    if torch.is_grad_enabled() and any(each.requires_grad for each in trained):
        return apply(_LoRARows, x, weight, bias, segments, keep, *factors)
    return _forward(x, weight, bias, segments, keep, factors)[0]


def serves_rows(x: Tensor, weight: Tensor, factors: Sequence[Tensor], dropping: bool = False) -> bool:
    """Whether `lora_linear_rows` takes these tensors: dense ones of one dtype, outside torch.compile, torch.func and
    autocast. Where it runs the grouped kernels, factors may be in float32, and dropout acts.

    Example:
        >>> peftlib.kernels.serves_rows(torch.randn(4, 32), torch.randn(48, 32), [torch.randn(2, 32).half()])
        False

    Args:
        x: what the layer is called with.
        weight: its weight.
        factors: those of all pairs.
        dropping: whether dropout acts.

    Returns:
        bool: where it is false, call each pair's rows by themselves.
    """
    if is_transformed() or _is_any_autocast_enabled():
        return False
    tensors = (x, weight, *factors)
    if not ({*map(type, tensors)} <= _DENSE and x.is_contiguous() and x.dtype == weight.dtype):
        return False
    if factors and launches(x) and grouped_kernels(x, factors, dropping) is not None:
        return True
    return not dropping and len({tensor.dtype for tensor in tensors}) == 1


class _LoRARows(Function):
    """Of the factors of each pair, or, where `segments.are_alike`, of all in two stacks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        segments: Segments,
        keep: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        y, h = _forward(x, weight, bias, segments, keep, factors)
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        needs_A, needs_B = any(ctx.needs_input_grad[5::2]), any(ctx.needs_input_grad[6::2])
        ctx.save_for_backward(
            x if needs_A or needs_weight else None,
            weight if needs_x else None,
            keep,
            *(h if needs_B else [None] * len(h)),
            *factors,
        )
        ctx.segments, ctx.x_shape, ctx.products = segments, x.shape, len(h)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        (dY,) = grad_outputs
        if is_differentiated(dY):
            return _differentiable(ctx, dY)
        if not _is_any_autocast_enabled():
            return _backward(ctx, dY)
        with without_autocast(dY):
            return _backward(ctx, dY)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    segments: Segments,
    keep: Tensor | None,
    factors: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """y [..., out], and the products s·x Aᵀ: one for each pair, or one of all, [pairs, rank, tokens of each]."""
    rows = _sorted(x, segments, factors)
    y = F.linear(rows, weight, bias)
    rows = rows if keep is None else rows * keep.view(rows.shape)
    if segments.are_alike:
        A, B = factors
        # The ranks in front: 16 tokens each, 128 inputs 7 µs, 128 tokens, 512 inputs 143; the other way 11 and 244.
        products = [_scaled(torch.bmm(A, rows.transpose(1, 2)), segments)]
        y.baddbmm_(products[0].transpose(1, 2), B.transpose(1, 2))
    else:
        products = []
        for scale, own, lora_A, lora_B in _each(len(rows), segments, factors):
            products.append(torch.mm(rows[own], lora_A.t()).mul_(scale))
            y[own].addmm_(products[-1], lora_B.t())
    if segments.back is not None:
        y = y.view(segments.size, -1).index_select(0, segments.back)
    return _in_shape(y, (*x.shape[:-1], weight.shape[0])), products


def _in_shape(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    return y if y.shape == shape and not y._is_view() else as_own_tensor(y, shape)


def _backward(ctx: Any, dY: Tensor) -> tuple[Any, ...]:
    segments, (x, weight, keep, *saved) = ctx.segments, ctx.saved_tensors
    products, factors = saved[: ctx.products], saved[ctx.products :]
    needs_x, needs_weight, needs_bias, _, _, *needs = ctx.needs_input_grad
    dY = _sorted(dY.contiguous(), segments, factors)
    rows = None if x is None else _sorted(x, segments, factors)
    keep = None if keep is None else keep.view(*dY.shape[:-1], -1)
    dX = torch.matmul(dY, weight) if needs_x else None
    through = _backward_stacked if segments.are_alike else _backward_each
    dropped = rows if rows is None or keep is None else rows * keep
    gradients = through(dY, dropped, dX, keep, segments, products, factors, needs)
    if dX is not None and segments.back is not None:
        dX = dX.view(segments.size, -1).index_select(0, segments.back)
    dW = torch.mm(_flat(dY).t(), _flat(rows)) if needs_weight and rows is not None else None
    dX = None if dX is None else dX.view(ctx.x_shape)
    return dX, dW, _flat(dY).sum(0) if needs_bias else None, None, None, *gradients


def _backward_stacked(
    dY: Tensor,
    x: Any,
    dX: Tensor | None,
    keep: Tensor | None,
    segments: Segments,
    products: Any,
    factors: Any,
    needs: list[bool],
) -> list[Tensor | None]:
    (A, B), (needs_A, needs_B), dA, dB = factors, needs, None, None
    if needs_B:
        # 16 tokens each, 512 outputs: as h dY 20 µs, as dYᵀ h 83. Laid out as B, or autograd copies each of the stack.
        dB = torch.bmm(products[0], dY).transpose(1, 2).contiguous()
    if dX is not None or needs_A:
        g = _scaled(torch.bmm(B.transpose(1, 2), dY.transpose(1, 2)), segments)  # [pairs, rank, tokens]: 23 µs, not 76
        if dX is not None:
            _add_term(dX, g.transpose(1, 2), A, keep)
        if needs_A:
            dA = torch.bmm(g, x)
    return [dA, dB]


def _backward_each(
    dY: Tensor,
    x: Any,
    dX: Tensor | None,
    keep: Tensor | None,
    segments: Segments,
    products: Any,
    factors: Any,
    needs: list[bool],
) -> list[Tensor | None]:
    gradients: list[Tensor | None] = []
    own = zip(_each(dY.shape[0], segments, factors), products, needs[::2], needs[1::2], strict=True)
    for (scale, rows, lora_A, lora_B), h, needs_A, needs_B in own:
        thin = lora_B.t().contiguous()
        g = torch.mm(dY[rows], thin.t()).mul_(scale) if needs_A or dX is not None else None
        gradients.append(torch.mm(g.t(), x[rows]) if g is not None and needs_A else None)
        gradients.append(torch.mm(h.t(), dY[rows]).t() if needs_B else None)
        if g is not None and dX is not None:
            _add_term(dX[rows], g, lora_A, None if keep is None else keep[rows])
    return gradients


def _add_term(dX: Tensor, g: Tensor, A: Tensor, keep: Tensor | None) -> None:
    """dX += (g A) ⊙ keep, of one pair or of a stack of them."""
    if keep is not None:
        dX.addcmul_(g @ A, keep)
    elif g.dim() == 3:
        dX.baddbmm_(g, A)
    else:
        dX.addmm_(g, A)


def _differentiable(ctx: Any, dY: Tensor) -> tuple[Any, ...]:
    """The backward pass through plain operations, whose own backward torch knows."""
    segments, (x, weight, keep, *saved) = ctx.segments, ctx.saved_tensors
    factors = saved[ctx.products :]
    needs_x, needs_weight, needs_bias, _, _, *needs = ctx.needs_input_grad
    if segments.are_alike:
        with torch.enable_grad():
            factors = [factor for pair in zip(*(stack.unbind() for stack in factors), strict=True) for factor in pair]
        needs = needs * (len(factors) // 2)
    places = [rows for _, rows, *_ in _each(dY.numel() // dY.shape[-1], segments, factors)]
    kept = None if keep is None else lambda pair, _: keep[places[pair]]
    wanted = [needs_x, needs_weight, needs_bias, *needs]
    dX, dW, db, *rest = plain_gradients(dY, x, weight, segments, factors, ctx.x_shape, wanted, keep=kept)
    if segments.are_alike:
        of_A, of_B = [[one for one in own if one is not None] for own in (rest[::2], rest[1::2])]
        rest = [torch.stack(own) if own else None for own in (of_A, of_B)]
    return dX, dW, db, None, None, *rest


def _sorted(tensor: Tensor, segments: Segments, factors: Sequence[Tensor]) -> Tensor:
    """A token a row, the batch's rows by pair: [tokens, columns], or [pairs, tokens of each, columns]."""
    shape = (factors[0].shape[0], -1) if segments.are_alike else (-1,)
    columns = tensor.shape[-1]
    if segments.order is not None:
        tensor = tensor.view(segments.size, -1).index_select(0, segments.order)
    return tensor.view(*shape, columns)


def _flat(rows: Tensor) -> Tensor:
    return rows.flatten(0, -2)


def _each(tokens: int, segments: Segments, factors: Sequence[Tensor]) -> Any:
    """The scale, the tokens and the factors of each pair."""
    share, start, pairs = tokens // segments.size, 0, iter(zip(factors[::2], factors[1::2], strict=True))
    for count, scale in zip(segments.counts, segments.scales, strict=True):
        end = start + count * share
        if scale is not None:
            yield scale, slice(start, end), *next(pairs)
        start = end


def _scaled(h: Tensor, segments: Segments) -> Tensor:
    """In place, [pairs, rank, tokens]."""
    scale = segments.scale
    if scale is not None:
        return h if scale == 1.0 else h.mul_(scale)
    return h.mul_(segments.scale_column(h))


def _stacked(factors: list[Tensor]) -> Pair:
    """A [pairs, rank, in] and B [pairs, out, rank], to the highest rank with zeros."""
    A, B = factors[::2], factors[1::2]
    ranks = [each.shape[0] for each in A]  # len of a tensor takes three times as long
    if len({*ranks}) > 1:
        rank = max(ranks)
        A = [F.pad(each, (0, 0, 0, rank - own)) for each, own in zip(A, ranks, strict=True)]
        B = [F.pad(each, (0, rank - own)) for each, own in zip(B, ranks, strict=True)]
    return torch.stack(A), torch.stack(B)

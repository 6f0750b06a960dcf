"""LoRA on a convolution: A convolves to rank channels, B is a skinny GEMM on each pixel of them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled
from torch.autograd import Function

from ..dispatch import apply, as_own_tensor, is_differentiated, is_traced, without_autocast
from ..dropout import draw_seed, survivors_scale
from ..dropped import dropped, planes_of
from . import reference
from .aten import keep_mask
from .reference import convolve

Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # stride, padding, dilation


def lora_convolution(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    r"""Adds the low-rank branch to the output of a convolution of one group whose padding is zeros.

    y + s·B ∗ (A ∗ drop(x))

    For backward it keeps x itself, A ∗ drop(x) [batch, rank, \*out] and the seed of the mask: no mask, no dropped x.

    Example:
        >>> host, x = torch.nn.Conv2d(3, 16, 3, padding=1), torch.randn(2, 3, 8, 8)
        >>> lora_A, lora_B = torch.randn(4, 3, 3, 3), torch.zeros(16, 4, 1, 1)
        >>> torch.equal(lora_convolution(host(x), x, lora_A, lora_B, 2.0, (1, 1), (1, 1), (1, 1)), host(x))
        True

    Args:
        y: [batch, out, \*out size], what the convolution gave for x.
        x: [batch, in, \*size], of 1 to 3 spatial dimensions.
        lora_A: [rank, in, \*kernel], in any floating dtype.
        lora_B: [out, rank, 1, ...].
        scale: s, alpha / rank.
        stride: of the convolution, a number a spatial dimension.
        padding: zeros on either side, a number a spatial dimension.
        dilation: of the kernel, a number a spatial dimension.
        dropout: the probability that an element of x is left out of the low-rank branch, in [0, 1].
        training: whether dropout acts.

    Returns:
        [batch, out, \*out size], in the dtype of y.

    Raises:
        RuntimeError: shapes that do not fit.

    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021.
    """
    p, geometry = dropout if training else 0.0, (tuple(stride), tuple(padding), tuple(dilation))
    if not _is_dense(y, x):
        term = partial(reference.convolution_term, geometry=geometry)
        return torch.add(y, dropped(term, x, lora_A, lora_B, dropout=p).to(y.dtype), alpha=scale)
    if torch.is_grad_enabled() and any(each.requires_grad for each in (y, x, lora_A, lora_B)):
        return apply(_LoRAConvolution, y, x, lora_A, lora_B, scale, geometry, p)
    return _forward(y, x, lora_A, lora_B, scale, geometry, p)[0]


class _LoRAConvolution(Function):
    """y + s·B ∗ (A ∗ drop(x)); 64 channels, 3×3, rank 8, 8 images of 28×28.

    A step takes 1.51 times the frozen convolution's, with dropout 1.61; its products alone, called by hand, 1.45 and
    1.56. As plain ops it took 1.54, and with dropout, both convolutions computed again for backward, 2.04.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scale: float,
        geometry: Geometry,
        dropout: float,
    ) -> Tensor:
        out, h, seed = _forward(y, x, lora_A, lora_B, scale, geometry, dropout)
        ctx.save_for_backward(x, lora_A, lora_B, h if ctx.needs_input_grad[3] else None, seed)
        ctx.scale, ctx.geometry, ctx.dropout = scale * survivors_scale(dropout), geometry, dropout
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dY,) = grad_outputs
        with without_autocast(dY):
            gradients = (_differentiable if is_differentiated(dY) else _backward)(ctx, dY)
        return dY, *gradients, None, None, None


def _forward(
    y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, geometry: Geometry, dropout: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The result, h = A ∗ drop(x) unscaled [batch, rank, *out], and the seed of the mask."""
    seed = draw_seed(planes_of(x)) if dropout else None
    kept = x if seed is None else x * _mask(x, dropout, seed)
    h = convolve(kept, lora_A.to(x.dtype), geometry)
    skinny = lora_B.to(x.dtype).view(1, *lora_B.shape[:2]).expand(len(x), -1, -1)
    out = torch.baddbmm(_pixels(y), skinny, _pixels(h), alpha=scale * survivors_scale(dropout))
    return as_own_tensor(out, y.shape), h, seed


def _backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
    x, lora_A, lora_B, h, seed = ctx.saved_tensors
    _, needs_x, needs_A, needs_B, *_ = ctx.needs_input_grad
    A, B, dY = lora_A.to(x.dtype), lora_B.to(x.dtype).flatten(1), dY.contiguous()
    dx = dA = dB = None
    if needs_B:  # in µs: 113 this way round, 186 the other, 192 as the gradient of a convolution
        dB = torch.bmm(_pixels(h), _pixels(dY).transpose(1, 2)).sum(0).mul_(ctx.scale).t().reshape(lora_B.shape)
    if needs_x or needs_A:
        mask = None if seed is None else _mask(x, ctx.dropout, seed)
        dh = torch.matmul(B.t() * ctx.scale, _pixels(dY)).view(len(dY), -1, *dY.shape[2:])
        if needs_A:
            kept = x if mask is None else x * mask
            dA = _convolution_backward(dh, kept, A, ctx.geometry, [False, True, False])[1].to(lora_A.dtype)
        if needs_x:
            dx = _gradient_of_input(dh, x, A, ctx.geometry)
            dx = dx if mask is None else dx.mul_(mask)
    return dx, dA, dB if dB is None else dB.to(lora_B.dtype)


def _gradient_of_input(dh: Tensor, x: Tensor, A: Tensor, geometry: Geometry) -> Tensor:
    """Without a stride it is a convolution with the kernel turned round: 601 µs, where the library's own takes 1222."""
    stride, padding, dilation = geometry
    reach = [step * (size - 1) for step, size in zip(dilation, A.shape[2:], strict=True)]
    rest = tuple(most - zeros for most, zeros in zip(reach, padding, strict=True))
    if any(step != 1 for step in stride) or min(rest) < 0:
        return _convolution_backward(dh, x, A, geometry, [True, False, False])[0]
    turned = A.flip(tuple(range(2, A.dim()))).transpose(0, 1)
    return convolve(dh, turned, (stride, rest, dilation))


def _convolution_backward(dh: Tensor, x: Tensor, A: Tensor, geometry: Geometry, wanted: list[bool]) -> Any:
    stride, padding, dilation = geometry
    return torch.ops.aten.convolution_backward(
        dh, x, A, None, stride, padding, dilation, False, [0] * len(stride), 1, wanted
    )


def _differentiable(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
    """The backward pass through the plain form, whose own backward torch knows."""
    *inputs, _, seed = ctx.saved_tensors
    x, lora_A, lora_B = inputs
    needed = ctx.needs_input_grad[1:4]
    with torch.enable_grad():
        kept = x if seed is None else x * _mask(x, ctx.dropout, seed)
        term = reference.convolution_term(kept, lora_A, lora_B, ctx.geometry) * ctx.scale
        wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(term, wanted, dY, create_graph=True) if wanted else ())
    return tuple(next(found) if need else None for need in needed)


def _is_dense(y: Tensor, x: Tensor) -> bool:
    """On the meta device too, where a forward is run to learn what it keeps."""
    if is_traced(x, y) or _is_any_autocast_enabled() or not (x.is_cpu or x.is_meta) or not x.numel():
        return False
    if x.dtype != y.dtype or x.dim() != y.dim() or x.dim() < 3 or not x.is_floating_point() or x.element_size() < 4:
        return False
    return x.is_contiguous() and y.is_contiguous()


def _mask(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    return keep_mask(planes_of(x), dropout, seed).view(x.shape)


def _pixels(image: Tensor) -> Tensor:
    return image.flatten(2)  # [batch, channels, pixels]

"""A bottleneck on rows that go through bottlenecks of their own: each step one batched product for all of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..dispatch import apply, is_differentiated, without_autocast
from .autograd import ACTIVATION_BACKWARD
from .reference import ACTIVATIONS


def bottleneck_rows(
    x: Tensor,
    weights: Sequence[Tensor],
    *,
    residual: Tensor | None = None,
    activation: str = "gelu",
    scales: Sequence[float],
) -> Tensor:
    """Applies to each block of rows a bottleneck of its own, all of one width, and adds what it gives to `residual`.

    residualₖ + sₖ·upₖ(act(downₖ(xₖ)))

    For backward it keeps x itself and downₖ(xₖ) [blocks, rows, width]. Nothing is masked by multiplying: what is not
    finite in one bottleneck or row stays there.

    Example:
        >>> x, down, up = torch.randn(2, 7, 32), torch.randn(4, 32), torch.zeros(32, 4)
        >>> own = [down, torch.zeros(4), up, torch.zeros(32)]
        >>> y = peftlib.kernels.bottleneck_rows(x, own * 2, residual=x, scales=(1.0, 0.5))
        >>> torch.equal(y, x)
        True

    Args:
        x: [blocks, rows, in].
        weights: down [width, in], down_bias [width], up [out, width] and up_bias [out] of the first block, then of the
            next; in the dtype of x.
        residual: [blocks, rows, out] or None; may be x itself.
        activation: "relu", "gelu", "gelu_tanh", "silu", "tanh" or "identity".
        scales: s of each block.

    Returns:
        [blocks, rows, out].

    Source: Houlsby et al., Parameter-Efficient Transfer Learning for NLP, 2019.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = None if {*scales} == {1.0} else torch.tensor(scales, dtype=wide, device=x.device).view(-1, 1, 1)
    given = None if residual is x else residual
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, given, *weights)):
        return apply(_BottleneckRows, x, given, scale, activation, residual is x, *weights)
    return _forward(x, x if residual is x else given, scale, activation, weights)[0]


class _BottleneckRows(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        scale: Tensor | None,
        activation: str,
        adds: bool,
        *weights: Tensor,
    ) -> Tensor:
        out, z = _forward(x, x if adds else residual, scale, activation, weights)
        ctx.save_for_backward(x, z, scale, *weights)
        ctx.activation, ctx.adds = activation, adds
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        (dY,) = grad_outputs
        x, z, scale, *weights = ctx.saved_tensors
        gradients = _differentiable if is_differentiated(dY) else _gradients
        with without_autocast(dY):
            dX, *own = gradients(ctx, dY.contiguous(), x, z, scale, weights)
        if dX is not None and ctx.adds:
            dX = dX + dY if torch.is_grad_enabled() else dX.add_(dY)
        return dX, dY if ctx.needs_input_grad[1] else None, None, None, None, *own


def _forward(
    x: Tensor, onto: Tensor | None, scale: Tensor | None, activation: str, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    down, down_bias, up, up_bias = _stacked(weights, scale)
    z = torch.baddbmm(down_bias, x, down.transpose(1, 2))
    out = torch.baddbmm(up_bias, ACTIVATIONS[activation](z), up.transpose(1, 2))
    return out if onto is None else out.add_(onto), z


def _gradients(
    ctx: Any, dY: Tensor, x: Tensor, z: Tensor, scale: Tensor | None, weights: Sequence[Tensor]
) -> list[Tensor | None]:
    down, _, up, _ = _stacked(weights, scale)
    needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[5:]
    dz = ACTIVATION_BACKWARD[ctx.activation](torch.bmm(dY, up), z)
    found: list[Tensor] = [torch.bmm(dz.transpose(1, 2), x), dz.sum(1)]
    # 8 blocks of 16 rows, 512 outputs: as hᵀ dY, and then laid out as `up` is, or autograd would copy each.
    d_up = torch.bmm(ACTIVATIONS[ctx.activation](z).transpose(1, 2), dY).transpose(1, 2).contiguous()
    d_up_bias = dY.sum(1)
    found += [d_up, d_up_bias] if scale is None else [d_up.mul_(scale), d_up_bias.mul_(scale[..., 0])]
    by_block = zip(*(each.unbind() for each in found), strict=True)
    own = [each for block in by_block for each in block]
    return [
        torch.bmm(dz, down) if needs_x else None,
        *(each if need else None for each, need in zip(own, needs, strict=True)),
    ]


def _differentiable(
    ctx: Any, dY: Tensor, x: Tensor, _: Tensor, scale: Tensor | None, weights: Sequence[Tensor]
) -> list[Tensor | None]:
    """The same through plain operations, whose own backward torch knows."""
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]]
    with torch.enable_grad():
        y, _ = _forward(x, None, scale, ctx.activation, weights)
        wanted = [tensor for tensor, need in zip((x, *weights), needs, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, dY, create_graph=True) if wanted else ())
    return [next(found) if need else None for need in needs]


def _stacked(weights: Sequence[Tensor], scale: Tensor | None) -> tuple[Tensor, ...]:
    """down [blocks, width, in], its bias [blocks, 1, width], and both of up times s."""
    down, down_bias, up, up_bias = (torch.stack([*weights[at::4]]) for at in range(4))
    if scale is not None:
        up, up_bias = (up * scale).to(up.dtype), (up_bias * scale[..., 0]).to(up.dtype)
    return down, down_bias.unsqueeze(1), up, up_bias.unsqueeze(1)

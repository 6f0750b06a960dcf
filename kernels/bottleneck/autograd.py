"""The autograd function behind a bottleneck: what the forward pass keeps, and the backward pass made from it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from .. import dispatch
from ..dispatch import as_own_tensor, has_autocast, is_differentiated, without_autocast
from ..dropout import KeepMask, draw_seed, survivors_scale
from ..lora.aten import gemm_dtype
from . import reference

_aten: Any = torch.ops.aten

# The gradient of each of `reference.ACTIVATIONS`, from the one that arrives and from what the activation was given.
ACTIVATION_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda g, z: _aten.threshold_backward(g, z, 0),
    "gelu": _aten.gelu_backward,
    "gelu_tanh": partial(_aten.gelu_backward, approximate="tanh"),
    "silu": _aten.silu_backward,
    "tanh": lambda g, z: _aten.tanh_backward(g, torch.tanh(z)),
    "identity": lambda g, z: g,
}


class Settings(NamedTuple):
    """What of a bottleneck is no tensor; `adds_input`: the result is added to x itself."""

    activation: str
    norm: str
    dropout: float
    eps: float
    adds_input: bool


class Weights(NamedTuple):
    """The parameters, as they are kept or as they are cast for a step."""

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None

    def cast(self, dtype: torch.dtype) -> "Weights":
        down, down_bias, up, up_bias, *norm = self
        cast = (each if each is None else each.to(dtype) for each in norm)
        return Weights(down.to(dtype), down_bias.to(dtype), up.to(dtype), up_bias.to(dtype), *cast)


class Bottleneck(Function):
    """residual + f(x); keeps x, z = down(x) [tokens, width], the parameters and the seed of the mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, *rest: Any) -> Tensor:
        weights, settings = Weights(*rest[:-1]), rest[-1]
        out, z, seed = bottleneck_forward(x, residual, weights, settings)
        needs_x = ctx.needs_input_grad[2] or settings.norm == "before"
        ctx.save_for_backward(x if needs_x else None, z, seed, *weights)
        ctx.settings, ctx.x_shape, ctx.x_dtype = settings, x.shape, x.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dY,) = grad_outputs
        gradients = _differentiable if is_differentiated(dY) else _gradients
        x, z, seed, *weights = ctx.saved_tensors  # read once: checkpointing computes them again for it
        with without_autocast(dY):
            dX, *own = gradients(ctx, dY, x, z, seed, Weights(*weights))
        if dX is not None and ctx.settings.adds_input:
            dX = dX + dY if torch.is_grad_enabled() else dX.add_(dY)
        return dX, dY.to(ctx.residual_dtype) if ctx.needs_input_grad[1] else None, *own, None


def bottleneck_forward(
    x: Tensor, residual: Tensor | None, weights: Weights, settings: Settings
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The result, z and the seed of the mask."""
    dtype = _compute_dtype(x)
    wide = gemm_dtype(x.new_empty(0, dtype=dtype))
    with without_autocast(x):
        x2, own = _rows(x).to(wide), weights.cast(wide)
        onto = _rows(x) if settings.adds_input else None if residual is None else _rows(residual)
        if settings.norm == "none" and not settings.dropout:
            kernel = dispatch.bottleneck_kernel(x2, own.down, own.up, settings.activation)
            if kernel is not None:
                out, z = kernel(x2, own.down, own.down_bias, own.up, own.up_bias, onto, settings.activation)
                return as_own_tensor(out, (*x.shape[:-1], out.shape[1])), z, None
        z = F.linear(_normed(x2, own, settings) if settings.norm == "before" else x2, own.down, own.down_bias)
        seed = draw_seed(z) if settings.dropout else None
        out = F.linear(_hidden(z, _kept(z, seed, settings.dropout), settings), own.up, own.up_bias)
        out = _normed(out, own, settings) if settings.norm == "after" else out
        if onto is not None:
            out = out.add_(onto) if torch.promote_types(out.dtype, onto.dtype) == out.dtype else onto + out
    z = z.to(dtype)
    out = out.to(x.dtype if onto is None else onto.dtype)
    return as_own_tensor(out, (*x.shape[:-1], out.shape[1])), z, seed


def _hidden(z: Tensor, kept: Tensor | None, settings: Settings) -> Tensor:
    h = reference.ACTIVATIONS[settings.activation](z)
    return h if kept is None else h * kept


def _kept(z: Tensor, seed: Tensor | None, dropout: float) -> Tensor | None:
    """The mask over 1 - p, [tokens, width]; without dropout none."""
    return None if seed is None else _mask(z, seed, dropout).to(z.dtype) * survivors_scale(dropout)


def _mask(z: Tensor, seed: Tensor, dropout: float) -> Tensor:
    return KeepMask(seed, (z.shape[0], z.shape[1]), dropout, z.shape[0]).rows(slice(0, z.shape[0]))


def _normed(u: Tensor, own: Weights, settings: Settings) -> Tensor:
    return F.layer_norm(u, u.shape[-1:], own.norm_weight, own.norm_bias, settings.eps)


def _gradients(
    ctx: Any, dY: Tensor, x: Tensor | None, z: Tensor, seed: Tensor | None, weights: Weights
) -> list[Tensor | None]:
    """Of x and of each of `weights`. The activations, and what a norm was given, are computed again."""
    z = z.to(gemm_dtype(z))
    settings, own, dY = ctx.settings, weights.cast(z.dtype), _rows(dY).to(z.dtype)
    kept = _kept(z, seed, settings.dropout)
    h, d_norm = _hidden(z, kept, settings), [None, None]
    if settings.norm == "after":
        dY, *d_norm = _norm_backward(dY, F.linear(h, own.up, own.up_bias), own, settings)
    g = dY @ own.up  # [tokens, width]
    dz, d_down = ACTIVATION_BACKWARD[settings.activation](g if kept is None else g * kept, z), None
    dX = dz @ own.down if ctx.needs_input_grad[0] or settings.norm == "before" else None
    if x is not None:
        x2 = inner = _rows(x).to(z.dtype)
        if dX is not None and settings.norm == "before":
            inner = _normed(x2, own, settings)
            dX, *d_norm = _norm_backward(dX, x2, own, settings)
        d_down = dz.t() @ inner if ctx.needs_input_grad[2] else None
    found = [d_down, dz.sum(0), dY.t() @ h if ctx.needs_input_grad[4] else None, dY.sum(0), *d_norm]
    in_own_dtype = [d if d is None or p is None else d.to(p.dtype) for d, p in zip(found, weights, strict=True)]
    return [None if dX is None else dX.to(ctx.x_dtype).view(ctx.x_shape), *in_own_dtype]


def _norm_backward(g: Tensor, u: Tensor, own: Weights, settings: Settings) -> list[Any]:
    """Of u, of the weight and of the bias. In half precision torch's CPU kernel adds those up over the tokens in half
    precision: 4,000 numbers around 1 came out as 1,072 in bfloat16."""
    dtype = torch.promote_types(g.dtype, torch.float32) if g.device.type == "cpu" else g.dtype
    shape, wide, own = [u.shape[-1]], u.to(dtype), own.cast(dtype)
    _, mean, deviation = torch.native_layer_norm(wide, shape, own.norm_weight, own.norm_bias, settings.eps)
    d_u, *d_affine = _aten.native_layer_norm_backward(
        g.to(dtype), wide, shape, mean, deviation, own.norm_weight, own.norm_bias, [True] * 3
    )
    return [d_u.to(u.dtype), *d_affine]


def _differentiable(
    ctx: Any, dY: Tensor, x: Tensor | None, z: Tensor, seed: Tensor | None, weights: Weights
) -> list[Tensor | None]:
    """The same through the plain form, whose own backward torch knows."""
    if x is None:
        raise RuntimeError(
            "bottleneck: a second derivative needs x, which was not kept because down needs no gradient. "
            "Give down requires_grad=True, or do without create_graph and is_grads_batched."
        )
    keep = None if seed is None else _mask(z, seed, ctx.settings.dropout)
    with torch.enable_grad():
        y = plain_form(_rows(x).to(z.dtype), weights, None, ctx.settings, keep)
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:-1]]
        wanted = [t for t, need in zip((x, *weights), needs, strict=True) if need and t is not None]
        found = iter(torch.autograd.grad(y, wanted, _rows(dY).to(y.dtype), create_graph=True))
    return [next(found) if need else None for need in needs]


def plain_form(
    x: Tensor, weights: Weights, residual: Tensor | None, settings: Settings, keep: Tensor | None = None
) -> Tensor:
    out = reference.bottleneck(
        x.to(_compute_dtype(x)), *weights, activation=settings.activation, norm=settings.norm,
        dropout=settings.dropout, keep=keep, eps=settings.eps,
    )  # fmt: skip
    return out.to(x.dtype) if residual is None else residual + out.to(residual.dtype)


def _compute_dtype(x: Tensor) -> torch.dtype:
    casts = has_autocast(x) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if casts else x.dtype


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])

"""A bottleneck beside a frozen module, as a function on tensors."""

import torch
from torch import Tensor

from ..dispatch import apply, is_traced
from .autograd import Bottleneck, Settings, Weights, bottleneck_forward, plain_form
from .reference import ACTIVATIONS


def bottleneck(
    x: Tensor,
    down: Tensor,
    down_bias: Tensor,
    up: Tensor,
    up_bias: Tensor,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str = "gelu",
    norm: str = "none",
    scale: Tensor | float = 1.0,
    dropout: float = 0.0,
    training: bool = False,
    eps: float = 1e-5,
) -> Tensor:
    """Applies a bottleneck to the last dimension and adds what it gives to `residual`.

    residual + s·f(x), where f(x) = up(drop(act(down(x)))), with a LayerNorm of x before it, or of what it gives

    For backward it keeps x itself and down(x) [tokens, width]: no activation, no mask, no normalised or cast copy of x.
    Where `up` is zero and there is no norm after it, the result equals `residual` to the bit. Gradients of any order
    are right; a second one needs an x that was kept, so a `down` that requires a gradient.

    Example:
        >>> x, down, up = torch.randn(2, 7, 32), torch.randn(4, 32), torch.zeros(32, 4)
        >>> y = peftlib.kernels.bottleneck(x, down, torch.zeros(4), up, torch.zeros(32), residual=x)
        >>> torch.equal(y, x)
        True

    Args:
        x: [..., in].
        down: [width, in], in any floating dtype; computing is in the dtype of x, or of autocast.
        down_bias: [width].
        up: [out, width].
        up_bias: [out].
        norm_weight: of the LayerNorm, [in] before and [out] after.
        norm_bias: as `norm_weight`.
        residual: [..., out] or None; may be x itself.
        activation: "relu", "gelu", "gelu_tanh", "silu", "tanh" or "identity".
        norm: "none", "before" (of x) or "after" (of what `up` gives).
        scale: s, a number, or a tensor of one element that learns.
        dropout: the probability that an activation is left out, in [0, 1].
        training: whether dropout acts.
        eps: of the LayerNorm.

    Returns:
        [..., out], in the dtype of residual; without one, in that of x.

    Raises:
        ValueError: dropout outside [0, 1], an unknown activation or norm.
        RuntimeError: shapes that do not fit, or a second derivative for which x was not kept.

    Source: Houlsby et al., Parameter-Efficient Transfer Learning for NLP, 2019.
    """
    _require(activation, norm, dropout)
    settings = Settings(activation, norm, dropout if training else 0.0, eps, residual is x)
    weights = _scaled(Weights(down, down_bias, up, up_bias, norm_weight, norm_bias), norm, scale)
    if is_traced(x, x if residual is None else residual):
        return plain_form(x, weights, residual, settings)
    given = None if settings.adds_input else residual
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, given, *weights)):
        return apply(Bottleneck, x, given, *weights, settings)
    return bottleneck_forward(x, given, weights, settings)[0]


def _scaled(weights: Weights, norm: str, scale: Tensor | float) -> Weights:
    """With s multiplied into the last affine map: small, in the parameters' own dtype, and torch knows its gradient."""
    if isinstance(scale, float) and scale == 1.0:
        return weights
    if norm == "after" and weights.norm_weight is not None and weights.norm_bias is not None:
        return weights._replace(norm_weight=weights.norm_weight * scale, norm_bias=weights.norm_bias * scale)
    return weights._replace(up=weights.up * scale, up_bias=weights.up_bias * scale)


def _require(activation: str, norm: str, dropout: float) -> None:
    for name, value, known in (
        ("activation", activation, ACTIVATIONS),
        ("norm", norm, ("none", "before", "after")),
    ):
        if value not in known:
            raise ValueError(
                f"bottleneck: {name}={value!r} is none of {', '.join(map(repr, known))}. Give one of them."
            )
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"bottleneck: dropout is {dropout}, which is no probability. Give one in [0, 1].")

"""The reference implementation of the bottleneck in plain PyTorch, and the activations that it knows."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dropout import drop

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda z: z,
}


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
    keep: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """residual + s·up(drop(act(down(x)))), with a LayerNorm of x or of what `up` gives, in the dtype of x."""

    def own(parameter: Tensor | None) -> Tensor | None:
        return None if parameter is None else parameter.to(x.dtype)

    def normed(u: Tensor) -> Tensor:
        return F.layer_norm(u, u.shape[-1:], own(norm_weight), own(norm_bias), eps)

    z = F.linear(normed(x) if norm == "before" else x, down.to(x.dtype), own(down_bias))  # [..., width]
    u = F.linear(drop(ACTIVATIONS[activation](z), dropout, keep), up.to(x.dtype), own(up_bias))
    term = (normed(u) if norm == "after" else u) * (scale.to(x.dtype) if isinstance(scale, Tensor) else scale)
    return term if residual is None else residual + term.to(residual.dtype)

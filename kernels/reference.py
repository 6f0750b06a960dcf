"""The plain PyTorch form of every op: the oracle of the tests, and what is traced, mapped and differentiated twice."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F


def drop(x: Tensor, dropout: float, keep: Tensor | None = None) -> Tensor:
    """drop(x): `keep` is a mask already drawn; without one, torch draws it."""
    if keep is None:
        return F.dropout(x, dropout) if dropout else x
    return x * keep.to(x.dtype) * survivors_scale(dropout)


def survivors_scale(dropout: float) -> float:
    """1/(1-p), and 0 where nothing survives."""
    return 1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0


def lora_term(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float = 0.0, keep: Tensor | None = None
) -> Tensor:
    """s·drop(x) Aᵀ Bᵀ in the dtype of x."""
    h = F.linear(drop(x, dropout, keep), lora_A.to(x.dtype))  # [..., rank]
    return F.linear(h * scale, lora_B.to(x.dtype))


def lora_add(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    dropout: float = 0.0,
    keep: Tensor | None = None,
) -> Tensor:
    """y + s·drop(x) Aᵀ Bᵀ in the dtype of y."""
    return y + lora_term(x.to(y.dtype), lora_A, lora_B, scale, dropout, keep).to(y.dtype)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    dropout: float = 0.0,
    keep: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + b + s·drop(x) Aᵀ Bᵀ."""
    return lora_add(F.linear(x, weight, bias), x, lora_A, lora_B, scale, dropout, keep)


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


def dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """‖W + s B A‖, row by row, of the whole matrix."""
    return torch.linalg.vector_norm(weight + scale * lora_B @ lora_A, dim=-1)

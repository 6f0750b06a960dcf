"""The plain PyTorch form of every op: the oracle of the tests, and what is traced, mapped and differentiated twice."""

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

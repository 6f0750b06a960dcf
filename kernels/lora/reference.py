"""The reference implementation of LoRA in plain PyTorch: of the layer, and of each kernel by that kernel's arguments.

The layer's plain form is what the tests hold the other paths against, and what is traced, mapped and differentiated
twice. A kernel's reference takes the same arguments, draws the same mask and rounds in the same places; it multiplies
in float32, or in float64 where it is given that, which is how `check.py` knows the exact result. It is for comparing,
and for tensors that no kernel can run on: on a GPU it would take many times what ATen takes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dropout import drop
from ..philox import keep_mask, kept_scale


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


def convolution_term(x: Tensor, lora_A: Tensor, lora_B: Tensor, geometry: tuple[Any, Any, Any]) -> Tensor:
    """B ∗ (A ∗ x) in the dtype of x, unscaled."""
    return convolve(convolve(x, lora_A.to(x.dtype), geometry), lora_B.to(x.dtype))


def convolve(x: Tensor, weight: Tensor, geometry: tuple[Any, Any, Any] = (1, 0, 1)) -> Tensor:
    """x ∗ weight of as many dimensions as the weight has; the geometry is stride, padding and dilation."""
    return {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.dim()](x, weight, None, *geometry)


def shrink(x: Tensor, A: Tensor, scale: float, p: float, seed: Tensor | None) -> Tensor:
    """scale · dropout(x) Aᵀ, [M, rank] in the dtype of x."""
    h = _dropped(x, p, seed) @ _wide(A, x).t()
    return (h * (scale * kept_scale(p))).to(x.dtype)


def backward_x(x: Tensor, g: Tensor, A: Tensor, p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:
    """dX = dropout'(g A), [M, K] in the dtype of x, and dA = gᵀ dropout(x), [rank, K] in A's."""
    dA = _wide(g, x).t() @ _dropped(x, p, seed) * kept_scale(p)
    return backward_x_only(g, A, p, seed), dA.to(A.dtype)


def backward_x_only(g: Tensor, A: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """The dX of `backward_x`, for an A that learns nothing: x is not needed."""
    dX = (_wide(g, g) @ _wide(A, g) * kept_scale(p)).to(g.dtype)
    return dX * _keep(dX, p, seed).to(g.dtype) if p else dX


def backward_y(dY: Tensor, B: Tensor, h: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """g = scale · dY B, [M, rank] in the dtype of dY, and dB = dYᵀ h, [N, rank] in B's."""
    wide = _wide(dY, dY)
    return (wide @ _wide(B, dY) * scale).to(dY.dtype), (wide.t() @ _wide(h, dY)).to(B.dtype)


def expand(y: Tensor, h: Tensor, B: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """y + scale · h Bᵀ + bias, [M, N] in the dtype of y, rounded once."""
    total = _wide(y, y) + _wide(h, h) @ _wide(B, h).t() * scale
    return (total if bias is None else total + _wide(bias, bias)).to(y.dtype)


def _wide(tensor: Tensor, like: Tensor) -> Tensor:
    """Rounded to the dtype of `like`, as a kernel rounds a factor, then as wide as its sums are."""
    return tensor.to(like.dtype).to(torch.promote_types(like.dtype, torch.float32))


def _dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    return _wide(x, x) * _keep(x, p, seed) if p else _wide(x, x)


def _keep(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    if seed is None:
        raise ValueError(f"dropout of {p} needs a seed: philox.new_seed(x.device) draws one")
    return keep_mask(x.shape[0], x.shape[1], p, seed)

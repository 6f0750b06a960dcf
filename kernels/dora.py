"""The row norms that DoRA divides by, from products no larger than the rank: the matrix itself is never made."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .dispatch import is_transformed, without_autocast


@torch.no_grad()
def dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    """Gives the norm of each row of W + s B A without forming it, as a constant: no gradient flows through it.

    √(‖W‖² + 2s·rowsum((W Aᵀ) ⊙ B) + s²·rowsum((B (A Aᵀ)) ⊙ B))

    Where B is zero it is the row norm of W, to the bit what the same call gave before. It reads W anew each time, so it
    cannot be out of date: of a step on 512 tokens, 4096 to 4096, ‖W‖² is 3.7 ms of 244, and W Aᵀ, which changes with A
    and reads W too, 7.3. In float32 its error is that of ‖W‖², so rows in which s B A cancels W to a thousandth of its
    size keep four digits.

    Example:
        >>> weight, lora_A, lora_B = torch.randn(48, 32), torch.randn(8, 32), torch.randn(48, 8)
        >>> norm = peftlib.kernels.dora_norm(weight, lora_A, lora_B, scale=0.5)
        >>> torch.allclose(norm, (weight + 0.5 * lora_B @ lora_A).norm(dim=1))
        True

    Args:
        weight: [..., out, in], in any floating dtype and layout.
        lora_A: [..., rank, in].
        lora_B: [..., out, rank].
        scale: s, alpha / rank.

    Returns:
        [..., out], in float32 or wider.

    Source: Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, 2024; the norm as a constant, section 4.3.
    """
    wide = torch.promote_types(torch.promote_types(weight.dtype, lora_A.dtype), torch.float32)
    if is_transformed():  # no_grad lets tangents of forward mode through
        weight, lora_A, lora_B = weight.detach(), lora_A.detach(), lora_B.detach()
    lora_A, lora_B = lora_A.to(wide), lora_B.to(wide)
    with without_autocast(weight):
        squares, projected = _passes_over(weight, lora_A)  # [..., out], [..., out, rank]
        cross = (projected * lora_B).sum(-1)
        own = (lora_B @ (lora_A @ lora_A.transpose(-2, -1)) * lora_B).sum(-1)
        return (squares + 2 * scale * cross + scale**2 * own).clamp_min(0).sqrt()


def _passes_over(weight: Tensor, lora_A: Tensor) -> tuple[Tensor, Tensor]:
    """rowsum(W ⊙ W) and W Aᵀ, in the dtype of A."""
    if weight.dtype == lora_A.dtype or is_transformed():
        weight = weight.to(lora_A.dtype)
        return torch.linalg.vector_norm(weight, dim=-1).square(), weight @ lora_A.transpose(-2, -1)
    weight, lora_A = weight.detach(), lora_A.detach()  # indexing a parameter can deadlock beside other threads
    # Cast whole, a half-precision W would be a matrix of twice its size; in blocks a part of it is, for a moment.
    squares = weight.new_zeros(weight.shape[:-1], dtype=lora_A.dtype)
    projected = weight.new_zeros((*weight.shape[:-1], lora_A.shape[-2]), dtype=lora_A.dtype)
    for rows, columns in _blocks(weight):
        block = weight[..., rows, columns].to(lora_A.dtype)
        squares[..., rows] += block.square().sum(-1)
        projected[..., rows, :] += block @ lora_A[..., columns].transpose(-2, -1)
    return squares, projected


def _blocks(weight: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows, or columns of a transposed view such as an embedding's, so that each block lies in one piece."""
    by_rows = weight.stride(-2) >= weight.stride(-1)
    length = weight.shape[-2 if by_rows else -1]
    # 2¹⁶ elements stay in a CPU's cache; a GPU pays by the launch.
    step = max(1, (1 << (16 if weight.device.type == "cpu" else 22)) * length // max(1, weight.numel()))
    for start in range(0, length, step):
        part, whole = slice(start, start + step), slice(None)
        yield (part, whole) if by_rows else (whole, part)

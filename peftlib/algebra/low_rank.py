"""The nearest product of a rank to a matrix, by its singular vectors, and how far from it that is."""

import torch
from torch import Tensor

from .changes import Pair


def nearest(pair: Pair | None, matrix: Tensor | None, rank: int) -> tuple[Pair, float]:
    """A and B of at most this rank, √S in each, and ‖M − B A‖/‖M‖ in the Frobenius norm (Eckart and Young 1936).

    A product of factors is decomposed through their triangular factors, so that no matrix of the weight's size is made.
    """
    U, S, Vh = _of_pair(pair) if pair is not None else torch.linalg.svd(matrix, full_matrices=False)
    kept = min(rank, S.shape[-1])
    norm = torch.linalg.vector_norm(S).item()
    error = torch.linalg.vector_norm(S[..., kept:]).item() / norm if norm else 0.0
    root = S[..., :kept].sqrt()
    # Where there is nothing A keeps its direction, so that B, which is zero, can learn.
    empty = S[..., :kept] <= S.amax(-1, keepdim=True) * torch.finfo(S.dtype).eps * max(U.shape[-2], Vh.shape[-1])
    A = torch.where(empty, torch.ones_like(root), root).unsqueeze(-1) * Vh[..., :kept, :]
    B = U[..., :kept] * torch.where(empty, torch.zeros_like(root), root).unsqueeze(-2)
    return (A, B), error


def _of_pair(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    A, B = pair
    left, left_core = torch.linalg.qr(B)
    right, right_core = torch.linalg.qr(_adjoint(A))
    U, S, Vh = torch.linalg.svd(left_core @ _adjoint(right_core), full_matrices=False)
    return left @ U, S, Vh @ _adjoint(right)


def _adjoint(matrix: Tensor) -> Tensor:
    return matrix.transpose(-2, -1).conj()

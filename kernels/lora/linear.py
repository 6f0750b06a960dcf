"""LoRA on a linear layer, as functions on tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import dispatch
from ..dispatch import apply
from ..dropout import drop
from . import reference
from .autograd import LoRAAdd, LoRALinear, add_forward, linear_forward
from .small import DenseLoRA, add_small, dense_forward, linear_of_one_token


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Applies a linear layer with a low-rank adapter, in the passes over memory that the layer itself needs.

    y = x Wᵀ + b + s·drop(x) Aᵀ Bᵀ

    For backward it keeps x itself, drop(x) Aᵀ and the seed of the mask: no mask, no dropped or cast copy of x (where
    x and y together have up to 262,144 elements on a CPU, a mask of 16 bits an element in place of the seed, which is
    the faster there). x is not kept where neither A nor W needs a gradient. Where B is zero, y equals
    `F.linear(x, weight, bias)` to the bit. Gradients of any order are right; a second one needs an A that requires a
    gradient.

    Example:
        >>> x, weight = torch.randn(2, 7, 32), torch.randn(48, 32)
        >>> lora_A, lora_B = torch.randn(8, 32, requires_grad=True), torch.zeros(48, 8, requires_grad=True)
        >>> y = lora_linear(x, weight, None, lora_A, lora_B, scale=2.0)
        >>> torch.equal(y, torch.nn.functional.linear(x, weight))
        True

    Args:
        x: [..., in].
        weight: [out, in], usually frozen; gets its gradient if it requires one.
        bias: [out] or None.
        lora_A: [rank, in], in any floating dtype; computing is in the dtype of x, or of autocast.
        lora_B: [out, rank].
        scale: s, alpha / rank.
        dropout: the probability that an element of x is left out of the low-rank branch, in [0, 1].
        training: whether dropout acts.

    Returns:
        [..., out], in the dtype that `F.linear(x, weight, bias)` gives.

    Raises:
        ValueError: dropout outside [0, 1].
        RuntimeError: shapes that do not fit, or a second derivative for which x was not kept.

    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021.
    """
    p = _probability(dropout) if training else 0.0
    if dispatch.is_traced(x, weight):
        y = F.linear(x, weight, bias)
        return y + traced_term(x.to(y.dtype), lora_A, lora_B, scale, p)
    flows = torch.is_grad_enabled() and _needs_gradient(x, weight, bias, lora_A, lora_B)
    if not flows and not p and x.numel() == x.shape[-1] > 0:
        return linear_of_one_token(x, weight, bias, lora_A, lora_B, scale)
    # The mask must not depend on whether gradients flow: checkpointing runs a step once without them and once with.
    is_dense = dispatch.is_dense(x, weight, p)
    if flows:
        return apply(DenseLoRA if is_dense else LoRALinear, x, weight, bias, lora_A, lora_B, scale, p)
    return (dense_forward if is_dense else linear_forward)(x, weight, bias, lora_A, lora_B, scale, p)[0]


def lora_add(
    y: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: float,
    dropout: float = 0.0,
    training: bool = False,
) -> Tensor:
    """Adds the low-rank branch to the output of a layer that runs by itself: a quantized one, or one adapted already.

    y + s·drop(x) Aᵀ Bᵀ

    Keeps for backward what `lora_linear` keeps, and leaves y as it is.

    Example:
        >>> host, x = torch.nn.Linear(32, 48), torch.randn(7, 32)
        >>> lora_A, lora_B = torch.randn(8, 32), torch.zeros(48, 8)
        >>> torch.equal(lora_add(host(x), x, lora_A, lora_B, scale=2.0), host(x))
        True

    Args:
        y: [..., out], what the layer gave for x; the branch is computed in its dtype.
        x: [..., in].
        lora_A: [rank, in], in any floating dtype.
        lora_B: [out, rank].
        scale: s, alpha / rank.
        dropout: the probability that an element of x is left out, in [0, 1].
        training: whether dropout acts.

    Returns:
        [..., out], in the dtype of y.

    Raises:
        ValueError: dropout outside [0, 1].
        RuntimeError: shapes that do not fit, or a second derivative for which x was not kept.

    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021.
    """
    p = _probability(dropout) if training else 0.0
    if dispatch.is_traced(x, y):
        return y + traced_term(x.to(y.dtype), lora_A, lora_B, scale, p)
    if dispatch.is_small(x, y.shape[-1], p) and x.dtype == y.dtype and y.is_contiguous():
        return add_small(y, x, lora_A, lora_B, scale, p)
    if torch.is_grad_enabled() and _needs_gradient(y, x, None, lora_A, lora_B):
        return apply(LoRAAdd, y, x, lora_A, lora_B, scale, p)
    return add_forward(y, x, lora_A, lora_B, scale, p)[0]


def join_pairs(pairs: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """Makes one pair of factors of several on the same layer, for `lora_linear` with scale 1 and without dropout.

    Σ sᵢ Bᵢ Aᵢ = [s₁B₁ s₂B₂ …] [A₁; A₂; …]

    Two adapters of rank 8 on 512×512 and 512 tokens, a step in µs: joined 3584, `lora_linear` and then `lora_add` 4345,
    one adapter 3315. Projections that share an input are not worth joining: one shrink of rank 24 takes 94 µs, three of
    rank 8 take 102, of the 9,000 that q, k and v take.

    Example:
        >>> pairs = [(torch.randn(8, 32), torch.randn(48, 8), 2.0), (torch.randn(4, 32), torch.randn(48, 4), 0.5)]
        >>> lora_A, lora_B = join_pairs(pairs)
        >>> peftlib.kernels.lora_linear(torch.randn(7, 32), torch.randn(48, 32), None, lora_A, lora_B, scale=1.0).shape
        torch.Size([7, 48])

    Args:
        pairs: (lora_A [rank, in], lora_B [out, rank], scale) of each; ranks may differ.

    Returns:
        A [sum of ranks, in] and B [out, sum of ranks], differentiable in the factors.
    """
    return torch.cat([lora_A for lora_A, _, _ in pairs]), torch.cat([lora_B * scale for _, lora_B, scale in pairs], 1)


def traced_term(x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float) -> Tensor:
    """s·drop(x) Aᵀ Bᵀ for torch.compile: with dropout on a GPU the operator, which keeps x and a seed for backward,
    where a compiled plain form keeps the dropped x and its mask. Without dropout the plain form keeps no more."""
    if dropout and dispatch.draws_in_graph(x, lora_A, lora_B):
        from .. import triton_operators

        return triton_operators.lora_term(x, lora_A, lora_B, scale, dropout)
    if dispatch.is_compiled_on_cpu(x):
        return _compiled_term(x, lora_A, lora_B, scale, dropout)
    return reference.lora_term(x, lora_A, lora_B, scale, dropout)


def _compiled_term(x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float) -> Tensor:
    """The plain form with h and Bᵀ laid out so that autograd multiplies the fast way round, as `aten.py` does.

    The gradient of a column-major operand is computed transposed, so h is one, which makes Bᵀ dYᵀ of dY B (512 tokens,
    512 outputs, rank 8, in µs: 75 in place of 298), and Bᵀ is not, which makes (h dY)ᵀ of dYᵀ hᵀ (78, 331). The copy of
    Bᵀ is where s goes in; a kernel of its own would take 2 µs in each pass.
    """
    x2 = drop(x, dropout).reshape(-1, x.shape[-1])
    h = torch.mm(lora_A.to(x.dtype), x2.t())  # [rank, tokens]
    scaled = lora_B if scale == 1.0 else lora_B * scale
    return torch.mm(h.t(), scaled.to(x.dtype).t().contiguous()).view(*x.shape[:-1], lora_B.shape[0])


def _needs_gradient(x: Tensor, other: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> bool:
    if lora_A.requires_grad or lora_B.requires_grad or x.requires_grad or other.requires_grad:
        return True
    return bias is not None and bias.requires_grad


def _probability(dropout: float) -> float:
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"lora_linear: dropout is {dropout}, which is no probability. Give one in [0, 1].")
    return dropout

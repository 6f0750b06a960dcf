"""LoRA on a linear layer: which path runs, by what is asked of it and by size."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_any_autocast_enabled
from torch.compiler import is_compiling
from torch.nn import Parameter
from torch.nn import functional as F

from ..apply import apply
from ..dispatch import traced_term
from ..dropout import draw_small
from ..mode import interprets
from ..reference import lora_add as plain_add
from ..reference import survivors_scale
from .aten import gemm_dtype
from .autograd import LoRAAdd, LoRALinear, add_forward, linear_forward
from .small import DenseLoRA, dense_forward

_DENSE = frozenset((Tensor, Parameter))
# Up to so many elements of x and y it is calls that cost, not memory: with dropout a step of 256 tokens, 256 to 256,
# takes 1046 µs with its mask drawn in one piece and kept, 1359 with a mask that is made again from its seed.
_SMALL_WITH_DROPOUT = 1 << 18
_SMALL = 1 << 16


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
        dropout: the probability that an element of x is left out of the low-rank term, in [0, 1].
        training: whether dropout acts.

    Returns:
        [..., out], in the dtype that `F.linear(x, weight, bias)` gives.

    Raises:
        ValueError: dropout outside [0, 1].
        RuntimeError: shapes that do not fit, or a second derivative for which x was not kept.

    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021.
    """
    p = _probability(dropout) if training else 0.0
    if _is_traced(x, weight):
        y = F.linear(x, weight, bias)
        return y + traced_term(x.to(y.dtype), lora_A, lora_B, scale, p)
    flows = torch.is_grad_enabled() and _needs_gradient(x, weight, bias, lora_A, lora_B)
    if not flows and not p and x.numel() == x.shape[-1] > 0:
        return _one_token(x, weight, bias, lora_A, lora_B, scale)
    # The mask must not depend on whether gradients flow: checkpointing runs a step once without them and once with.
    is_dense = _is_dense(x, weight, p)
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
    """Adds a low-rank term to the output of a host that runs by itself: a quantised one, or one adapted already.

    y + s·drop(x) Aᵀ Bᵀ

    Keeps for backward what `lora_linear` keeps, and leaves y as it is.

    Example:
        >>> host, x = torch.nn.Linear(32, 48), torch.randn(7, 32)
        >>> lora_A, lora_B = torch.randn(8, 32), torch.zeros(48, 8)
        >>> torch.equal(lora_add(host(x), x, lora_A, lora_B, scale=2.0), host(x))
        True

    Args:
        y: [..., out], what the host gave for x; the term is computed in its dtype.
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
    if _is_traced(x, y):
        return y + traced_term(x.to(y.dtype), lora_A, lora_B, scale, p)
    if _is_small(x, y.shape[-1], p) and x.dtype == y.dtype and y.is_contiguous():
        return _small(y, x, lora_A, lora_B, scale, p)
    if torch.is_grad_enabled() and _needs_gradient(y, x, None, lora_A, lora_B):
        return apply(LoRAAdd, y, x, lora_A, lora_B, scale, p)
    return add_forward(y, x, lora_A, lora_B, scale, p)[0]


def join_pairs(pairs: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """Makes one pair of several on the same host, for `lora_linear` with scale 1 and without dropout.

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


def _one_token(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
    if not x.dtype == weight.dtype == lora_A.dtype == lora_B.dtype or _is_any_autocast_enabled():
        return plain_add(F.linear(x, weight, bias), x, lora_A, lora_B, scale)
    row = x.flatten()
    if x.is_cpu and _multiplies_alike(weight, bias):
        # 128 to 128: three products with a vector take 6.1 µs, with F.linear for the first of them 7.8.
        y = weight.mv(row) if bias is None else torch.addmv(bias, weight, row)
        y.addmv_(lora_B, lora_A.mv(row), alpha=scale)
        return y.view(1, 1, -1) if x.dim() == 3 else y.view(*x.shape[:-1], -1)
    y = F.linear(x, weight, bias)
    y.view(-1).addmv_(lora_B, lora_A.mv(row), alpha=scale)
    return y


_ALIKE: dict[tuple[torch.Size, torch.dtype, bool, int], bool] = {}
# Above this size reading W takes the time, whoever multiplies.
_LARGEST_ASKED = 1 << 18


def _multiplies_alike(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether W times a vector has the bits of F.linear, which B = 0 must give: this machine is asked once a shape.

    Half precision would round most of the differences away, and show one later."""
    key = weight.shape, weight.dtype, bias is None, torch.get_num_threads()
    if key not in _ALIKE:
        asked = weight.numel() <= _LARGEST_ASKED and weight.element_size() >= 4
        _ALIKE[key] = asked and all(_rows_agree(weight.detach().contiguous(), bias))
    return _ALIKE[key] and weight.is_contiguous()


def _rows_agree(weight: Tensor, bias: Tensor | None) -> Iterator[bool]:
    generator = torch.Generator().manual_seed(0)
    for row in torch.randn(32, weight.shape[1], generator=generator, dtype=weight.dtype):
        y = weight.mv(row) if bias is None else torch.addmv(bias, weight, row)
        yield torch.equal(y, F.linear(row, weight, bias)) and torch.equal(y[None], F.linear(row[None], weight, bias))


def _is_dense(x: Tensor, weight: Tensor, dropout: float) -> bool:
    if x.dim() < 2 or not x.is_cpu or x.dtype != weight.dtype or not x.is_contiguous() or _is_any_autocast_enabled():
        return False
    if x.element_size() >= 4 and not dropout:
        return not interprets()
    return _is_small(x, weight.shape[0], dropout)


def _is_small(x: Tensor, out: int, dropout: float) -> bool:
    if x.dim() < 2 or x.is_cuda or not x.is_contiguous() or gemm_dtype(x) != x.dtype or interprets():
        return False
    elements = x.numel() // x.shape[-1] * (x.shape[-1] + out)
    return elements <= (_SMALL_WITH_DROPOUT if dropout else _SMALL)


def _small(y: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float) -> Tensor:
    x2 = x.view(-1, x.shape[-1])  # [tokens, in]
    if dropout:
        x2, scale = x2 * draw_small(x2, dropout), scale * survivors_scale(dropout)
    if lora_A.dtype != x.dtype or lora_B.dtype != x.dtype:
        lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    return torch.addmm(y.view(-1, y.shape[-1]), torch.mm(x2, lora_A.t()), lora_B.t(), alpha=scale).view(y.shape)


def _is_traced(x: Tensor, other: Tensor) -> bool:
    """Whether only plain ops serve: under torch.compile, inside torch.func, and for tensor subclasses."""
    if is_compiling() or _are_functorch_transforms_active():
        return True
    return type(x) not in _DENSE or type(other) not in _DENSE


def _needs_gradient(x: Tensor, other: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor) -> bool:
    if lora_A.requires_grad or lora_B.requires_grad or x.requires_grad or other.requires_grad:
        return True
    return bias is not None and bias.requires_grad


def _probability(dropout: float) -> float:
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"lora_linear: dropout is {dropout}, which is no probability. Give one in [0, 1].")
    return dropout

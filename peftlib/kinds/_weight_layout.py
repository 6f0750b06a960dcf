"""How the weight of each host is a matrix `[out, in]`, and how a low-rank pair acts without forming that matrix."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core.adapter import weight_of
from .._core.host import base_type
from .._core.quantized import wraps_others
from .._errors import AdapterError

Shape = tuple[int, ...]
Term = Callable[..., Tensor]


class Form:
    """One layout of a weight. Its functions: the shapes of A and B for a weight's shape and a rank; the weight read as
    a matrix [..., out, in]; such a matrix laid out as the weight; A and B as [..., rank, in] and [..., out, rank]."""

    shapes: Callable[[Shape, int], tuple[Shape, Shape]]
    matrix: Callable[[Tensor], Tensor]
    weight: Callable[[Tensor, Shape], Tensor]
    pair: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    looks_up = False


class Rows(Form):
    """[out, in], and [out, in/groups, *kernel]: Linear, ConvNd, and most others."""

    shapes = staticmethod(lambda shape, r: ((r, *shape[1:]), (shape[0], r, *[1] * (len(shape) - 2))))
    matrix = staticmethod(lambda weight: weight.flatten(1))
    weight = staticmethod(lambda matrix, shape: matrix.reshape(shape))
    pair = staticmethod(lambda A, B: (A.flatten(1), B.flatten(1)))


class Columns(Form):
    """[in, out]: HF Conv1D."""

    shapes = staticmethod(lambda shape, r: ((r, shape[0]), (shape[1], r)))
    matrix = staticmethod(lambda weight: weight.t())
    weight = staticmethod(lambda matrix, shape: matrix.t())
    pair = staticmethod(lambda A, B: (A, B))


class Lookup(Columns):
    """[entries, dim]: an embedding is a linear map of one-hot vectors."""

    looks_up = True


class TransposedKernel(Form):
    """[in, out/groups, *kernel]: ConvTransposeNd."""

    shapes = staticmethod(lambda shape, r: ((r, shape[0], *[1] * (len(shape) - 2)), (r, *shape[1:])))
    matrix = staticmethod(lambda weight: weight.flatten(1).t())
    weight = staticmethod(lambda matrix, shape: matrix.t().reshape(shape))
    pair = staticmethod(lambda A, B: (A.flatten(1), B.flatten(1).t()))


class Stack(Form):
    """[experts, out, in]: one pair for each expert."""

    shapes = staticmethod(lambda shape, r: ((shape[0], r, shape[2]), (shape[0], shape[1], r)))
    matrix = staticmethod(lambda weight: weight)
    weight = staticmethod(lambda matrix, shape: matrix)
    pair = staticmethod(lambda A, B: (A, B))


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BY_ROWS = (nn.Linear, *_CONVS, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


def form_of(host: nn.Module, path: str, shape: Shape) -> type[Form]:
    if path == "weight" and isinstance(host, _TRANSPOSED):
        return TransposedKernel
    if path == "weight" and isinstance(host, (nn.Embedding, nn.EmbeddingBag)):
        return Lookup
    if path == "weight" and is_transposed_linear(host):
        return Columns
    if len(shape) == 3 and not isinstance(host, _BY_ROWS):
        return Stack
    return Rows


def is_transposed_linear(host: nn.Module) -> bool:
    """HF's `Conv1D`, known by name: peftlib imports no model library."""
    return any(
        base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils" for base in type(host).__mro__
    )


def _own_forward(host: nn.Module) -> Any:
    cls: Any = base_type(type(host))
    return cls.forward


def is_plain_linear(host: nn.Module) -> bool:
    """A stock Linear over an ordinary tensor: no quantised subclass that must run through its own forward."""
    if not isinstance(host, nn.Linear) or _own_forward(host) is not nn.Linear.forward:
        return False
    return type(host.weight) in (Tensor, nn.Parameter) and host.weight.is_floating_point()


def matrices_of(host: nn.Module) -> list[str]:
    """The weights that a low-rank pair adapts on a host when none is named."""
    if isinstance(host, nn.MultiheadAttention):
        packed = host.in_proj_weight is not None
        return ["in_proj_weight"] if packed else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    if isinstance(host, (nn.RNNBase, nn.RNNCellBase)):
        return [name for name, _ in host.named_parameters(recurse=False) if name.startswith("weight")]
    weight = getattr(host, "weight", None)
    if isinstance(weight, Tensor) and (weight.dim() >= 2 or not weight.is_floating_point()):
        return ["weight"]
    own = {name: tuple(p.shape) for name, p in host.named_parameters(recurse=False)}
    wide = [name for name, shape in own.items() if len(shape) >= 2]
    advice = f"Pass param={wide[0]!r}" if wide else "Use Full for vectors, or target a module that has a matrix"
    raise AdapterError(f"{type(host).__name__} has no `weight` matrix (its parameters: {own or 'none'}). {advice}.")


def term_of(host: nn.Module, path: str) -> Term | None:
    """The low-rank call on this host; None where only the weight form is exact.

    A subclass with a forward of its own may do more than the stock layer, so there the weights speak."""
    if path != "weight":
        return None
    if is_transposed_linear(host) or (isinstance(host, nn.Linear) and packed_as(host, path)):
        return linear_term
    forward = _own_forward(host)
    for stock, term in _TERMS:
        if isinstance(host, stock) and forward is stock.forward:
            return None if _bends_lookup(host) else term
    return None


def _bends_lookup(host: nn.Module) -> bool:
    """Embeddings whose result is not linear in the weight, or whose gradient is rescaled."""
    lookup = isinstance(host, (nn.Embedding, nn.EmbeddingBag))
    return lookup and (host.max_norm is not None or host.scale_grad_by_freq or getattr(host, "mode", "sum") == "max")


def linear_term(_: nn.Module, A: Tensor, B: Tensor, input: Tensor) -> Tensor:
    return F.linear(F.linear(input, A), B)


def _conv_term(host: Any, A: Tensor, B: Tensor, input: Tensor) -> Tensor:
    shared_A = A.repeat(host.groups, *[1] * (A.dim() - 1))  # [groups * rank, in/groups, *kernel]
    return _convolve(host._conv_forward(input, shared_A, None), B, host.groups)


def _transposed_term(host: Any, A: Tensor, B: Tensor, input: Tensor, output_size: list[int] | None = None) -> Tensor:
    groups, kernel = host.groups, [1] * (A.dim() - 2)
    by_group = A.view(A.shape[0], groups, -1).transpose(0, 1).reshape(groups * A.shape[0], -1, *kernel)
    h = _convolve(input, by_group, groups)
    transpose = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}[A.dim()]
    padding = host._output_padding(
        input, output_size, host.stride, host.padding, host.kernel_size, len(kernel), host.dilation
    )
    return transpose(h, B.repeat(groups, 1, *kernel), None, host.stride, host.padding, padding, groups, host.dilation)


def _convolve(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.dim()]
    return convolve(x, weight, groups=groups)


def embedding_term(host: Any, A: Tensor, B: Tensor, input: Tensor) -> Tensor:
    term = F.linear(F.embedding(input, A.t(), host.padding_idx), B)
    if host.padding_idx is None:
        return term
    return torch.where((input == host.padding_idx).unsqueeze(-1), term.detach(), term)  # as W's row, it does not learn


def _bag_term(
    host: Any, A: Tensor, B: Tensor, input: Tensor, offsets: Any = None, per_sample_weights: Any = None
) -> Tensor:
    if per_sample_weights is not None:
        per_sample_weights = per_sample_weights.to(A.dtype)
    h = F.embedding_bag(
        input, A.t().contiguous(), offsets, mode=host.mode, per_sample_weights=per_sample_weights,
        include_last_offset=host.include_last_offset, padding_idx=host.padding_idx,
    )  # fmt: skip
    return F.linear(h, B)


_TERMS: tuple[tuple[type[nn.Module], Term], ...] = (
    (nn.Linear, linear_term),
    *((conv, _conv_term) for conv in _CONVS),
    *((conv, _transposed_term) for conv in _TRANSPOSED),
    (nn.Embedding, embedding_term),
    (nn.EmbeddingBag, _bag_term),
)


def weight_shape(host: nn.Module, path: str) -> Shape:
    """The shape that the weight stands for: a packed quantised weight has another one of its own."""
    weight: Tensor = weight_of(host, path)
    if isinstance(host, nn.Linear) and path == "weight":
        return (host.out_features, host.in_features)
    return tuple(weight.shape)


def packed_as(host: nn.Module, path: str) -> str | None:
    """How a weight is quantised, in words: a tensor around others, whole numbers, or another shape than it stands for.
    None where it is plain, or shards of what is plain."""
    weight = weight_of(host, path)
    if wraps_others(weight):
        return f"{type(weight).__name__} of {weight.dtype}"
    if not weight.is_floating_point() and not weight.is_complex():
        return str(weight.dtype)
    return None if tuple(weight.shape) == weight_shape(host, path) else f"{list(weight.shape)} of {weight.dtype}"


def unreal_as(host: nn.Module, path: str) -> str | None:
    """What a weight is, in words, that has no real numbers of its own to copy or to measure: packed, or complex."""
    weight = weight_of(host, path)
    return str(weight.dtype) if weight.is_complex() else packed_as(host, path)


def require_shadow(host: nn.Module, path: str) -> None:
    """Only the weight form is left on this host, so it must read a floating-point tensor that can be shadowed."""
    weight = weight_of(host, path)
    if not weight.is_floating_point():
        raise AdapterError(
            f"{type(host).__name__}.{path} is {weight.dtype}, not floating point, and only a Linear can be adapted "
            "around a packed weight. Exclude it, or dequantise it."
        )


def principal_pair(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(√S Vᵀ, U √S) of the `rank` largest singular values: the A and B of PiSSA (Meng et al. 2024)."""
    U, S, Vh = torch.linalg.svd(matrix.float() if matrix.dtype != torch.float64 else matrix, full_matrices=False)
    root = S[..., :rank].sqrt()
    return root[..., :, None] * Vh[..., :rank, :], U[..., :, :rank] * root[..., None, :]

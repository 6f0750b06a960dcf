"""How the weight of each layer type is a matrix `[out, in]`, and how low-rank factors are laid out beside it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._core.override import owner_of
from .._core.quantized import Shape
from .._errors import AdapterError


class Form:
    """One layout of a weight. Its functions: the shapes of A and B for a weight's shape and a rank; the weight read as
    a matrix [..., out, in]; such a matrix laid out as the weight; A and B as [..., rank, in] and [..., out, rank]; and
    the two factors whose product over the rank is laid out as the weight, the left one a matrix."""

    shapes: Callable[[Shape, int], tuple[Shape, Shape]]
    matrix: Callable[[Tensor], Tensor]
    weight: Callable[[Tensor, Shape], Tensor]
    pair: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    factors: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    looks_up = False


class Rows(Form):
    """[out, in], and [out, in/groups, *kernel]: Linear, ConvNd, and most others."""

    shapes = staticmethod(lambda shape, r: ((r, *shape[1:]), (shape[0], r, *[1] * (len(shape) - 2))))
    matrix = staticmethod(lambda weight: weight.flatten(1))
    weight = staticmethod(lambda matrix, shape: matrix.reshape(shape))
    pair = staticmethod(lambda A, B: (A.flatten(1), B.flatten(1)))
    factors = staticmethod(lambda A, B: (B.flatten(1), A.view_as(A)))


class Columns(Form):
    """[in, out]: HF Conv1D."""

    shapes = staticmethod(lambda shape, r: ((r, shape[0]), (shape[1], r)))
    matrix = staticmethod(lambda weight: weight.t())
    weight = staticmethod(lambda matrix, shape: matrix.t())
    pair = staticmethod(lambda A, B: (A, B))
    factors = staticmethod(lambda A, B: (A.t(), B.t()))


class Lookup(Columns):
    """[entries, dim]: an embedding is a linear map of one-hot vectors."""

    looks_up = True


class TransposedKernel(Form):
    """[in, out/groups, *kernel]: ConvTransposeNd."""

    shapes = staticmethod(lambda shape, r: ((r, shape[0], *[1] * (len(shape) - 2)), (r, *shape[1:])))
    matrix = staticmethod(lambda weight: weight.flatten(1).t())
    weight = staticmethod(lambda matrix, shape: matrix.t().reshape(shape))
    pair = staticmethod(lambda A, B: (A.flatten(1), B.flatten(1).t()))
    factors = staticmethod(lambda A, B: (A.flatten(1).t(), B.view_as(B)))


class Stack(Form):
    """[experts, out, in]: one pair for each expert."""

    shapes = staticmethod(lambda shape, r: ((shape[0], r, shape[2]), (shape[0], shape[1], r)))
    matrix = staticmethod(lambda weight: weight)
    weight = staticmethod(lambda matrix, shape: matrix)
    pair = staticmethod(lambda A, B: (A, B))
    factors = staticmethod(lambda A, B: (B.view_as(B), A.view_as(A)))


LAYOUTS = (Rows, Columns, Lookup, TransposedKernel, Stack)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BY_ROWS = (nn.Linear, *_CONVS, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


def form_of(host: nn.Module, path: str, shape: Shape) -> type[Form]:
    owner, leaf = owner_of(host, path)
    if leaf == "weight" and isinstance(owner, _TRANSPOSED):
        return TransposedKernel
    if leaf == "weight" and isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
        return Lookup
    if leaf == "weight" and is_transposed_linear(owner):
        return Columns
    if len(shape) == 3 and not isinstance(owner, _BY_ROWS):
        return Stack
    return Rows


def is_transposed_linear(host: nn.Module) -> bool:
    """HF's `Conv1D`, known by name: peftlib imports no model library."""
    return any(
        base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils" for base in type(host).__mro__
    )


def matrices_of(host: nn.Module) -> list[str]:
    """The weights that low-rank factors adapt on a host when none is named."""
    if isinstance(host, nn.MultiheadAttention):
        packed = host.in_proj_weight is not None
        return ["in_proj_weight"] if packed else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    if isinstance(host, (nn.RNNBase, nn.RNNCellBase)):
        return [name for name, _ in host.named_parameters(recurse=False) if name.startswith("weight")]
    weight = getattr(host, "weight", None)
    if isinstance(weight, Tensor) and (weight.dim() >= 2 or not weight.is_floating_point()):
        return ["weight"]
    computed = getattr(host, "parametrizations", {})  # as bitsandbytes leaves a stack that it has quantized
    names = [*(name for name, _ in host.named_parameters(recurse=False)), *computed]
    own = {name: tuple(getattr(host, name).shape) for name in names}
    stacks = [name for name, shape in own.items() if len(shape) == 3]
    if stacks:  # a mixture's experts
        return stacks
    wide = [name for name, shape in own.items() if len(shape) >= 2]
    advice = f"Pass param={wide[0]!r}" if wide else _inside(host)
    raise AdapterError(f"{type(host).__name__} has no `weight` matrix (its parameters: {own or 'none'}). {advice}.")


def _inside(host: nn.Module) -> str:
    weights = ((type(module).__name__, getattr(module, "weight", None)) for module in host.modules())
    found = sorted({name for name, weight in weights if isinstance(weight, Tensor) and weight.dim() >= 2})
    if found:
        return f"Target modules inside it, by name or type: it has {', '.join(found)}"
    return "Use Full for vectors, or target a module that has a matrix"


def principal_pair(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(√S Vᵀ, U √S) of the `rank` largest singular values: the A and B of PiSSA (Meng et al. 2024)."""
    U, S, Vh = torch.linalg.svd(matrix.float() if matrix.dtype != torch.float64 else matrix, full_matrices=False)
    root = S[..., :rank].sqrt()
    return root[..., :, None] * Vh[..., :rank, :], U[..., :, :rank] * root[..., None, :]

"""The oracle: dense float64 weights written by hand, W + s·B·A for each layout; nothing here calls peftlib."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Layout = Callable[[Tensor, Tensor, Tensor], Tensor]


def rows(A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    """W [out, ...], A [rank, ...], B [out, rank, 1...]: Linear, ConvNd, attention, recurrent weights."""
    return (B.flatten(1) @ A.flatten(1)).view_as(weight)


def columns(A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    """W [in, out], A [rank, in], B [out, rank]: Embedding and HF Conv1D."""
    return (B @ A).T


def transposed_kernel(A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    """W [in, out/groups, *kernel], A [rank, in, 1...], B [rank, out/groups, *kernel]."""
    return (A.flatten(1).T @ B.flatten(1)).view_as(weight)


def stack(A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    """W [n, out, in], A [n, rank, in], B [n, out, rank]."""
    return torch.bmm(B, A)


def replace(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """Registers a new leaf in the place of a weight, in its dtype; other modules that shared it keep theirs."""
    *parents, leaf = name.split(".")
    owner = model.get_submodule(".".join(parents))
    old = getattr(owner, leaf)
    if leaf in owner._buffers:
        owner._buffers[leaf] = value.detach().to(old.dtype)
        return getattr(owner, leaf)
    setattr(owner, leaf, nn.Parameter(value.detach().to(old.dtype)))  # RNNs refresh their flat list in __setattr__
    return getattr(owner, leaf)


def old_weight_norm(module: nn.Module) -> nn.Module:
    """The hook style, which torch has deprecated and old checkpoints still use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(module)


def row_norms(layout: Layout, weight: Tensor, groups: int = 1) -> Tensor:
    """The norm of what feeds each output, laid out to divide the weight."""
    norm = torch.linalg.vector_norm
    if layout is columns:
        return norm(weight, dim=0)
    if layout is stack:
        return norm(weight, dim=2, keepdim=True)
    if layout is rows:
        return norm(weight, dim=tuple(range(1, weight.dim())), keepdim=True)
    by_group = weight.chunk(groups)  # each [in/groups, out/groups, *kernel]
    return torch.cat([norm(part, dim=(0, *range(2, part.dim())), keepdim=True).expand_as(part) for part in by_group])


def scaled(layout: str, factor: Tensor, weight: Tensor, on: str, groups: int = 1) -> Tensor:
    """IA3: the weight with each element times the factor of its output, or of its input, one index at a time.

    Layouts: "rows" [out, in/groups, ...], "columns" [in, out], "transposed" [in, out/groups, ...], "vector" [out]."""
    first, second = weight.shape[0], weight.shape[1] if weight.dim() > 1 else 1
    index = torch.empty(first, second, dtype=torch.long)
    for i in range(first):
        for j in range(second):
            group = i // (first // groups)
            behind_group = group * second + j  # the features of a group lie behind those of the groups before it
            own = {"rows": i, "columns": j, "transposed": behind_group, "vector": i}[layout]
            other = {"rows": behind_group, "columns": i, "transposed": i, "vector": i}[layout]
            index[i, j] = own if on == "output" else other
    return weight * factor.flatten()[index].view(*weight.shape[:2], *[1] * (weight.dim() - 2))


def bottleneck(config: dict[str, Any], own: dict[str, Tensor], y: Tensor, x: Tensor, axis: int) -> Tensor:
    """y + s·f(y), or y + s·f(x) in parallel, by the equation: no fused op, the features brought to the end by hand."""
    u = (y if config["position"] == "after" else x).movedim(axis, -1)
    if config["norm"] == "before":
        u = _normalised(u, own)
    z = u @ own["down_weight"].T + own["down_bias"]
    t = _ACTIVATIONS[config["activation"]](z) @ own["up_weight"].T + own["up_bias"]
    if config["norm"] == "after":
        t = _normalised(t, own)
    scale = own["scale"] if config["scale"] == "learned" else config["scale"]
    return y + (scale * t).movedim(-1, axis).to(y.dtype)


def _normalised(u: Tensor, own: dict[str, Tensor]) -> Tensor:
    centred = u - u.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * own["norm_weight"] + own["norm_bias"]


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda z: z / 2 * (1 + torch.erf(z / 2**0.5)),
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "relu": lambda z: z * (z > 0),
    "tanh": lambda z: 1 - 2 / (torch.exp(2 * z) + 1),
}

"""The oracle: dense float64 weights written by hand, W + s·B·A for each layout; nothing here calls peftlib."""

import warnings
from collections.abc import Callable

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

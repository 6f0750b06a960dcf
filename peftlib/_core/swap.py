"""A weight trades values with another tensor: their storages where nobody could tell, else by copies, in place."""

from typing import Any

import torch
from torch import Tensor, nn

_use_count: Any = getattr(torch._C, "_storage_Use_Count", None)  # private, so copies where there is none
_ITS_OWN = 2  # the tensor, and the object by which the storage is asked


def trade(weight: Tensor, other: Tensor, keep_on: torch.device | str) -> Tensor:
    """Gives the weight the values of `other`, and returns what holds those that it had; a failure changes neither.
    Without gradient mode.

    Whoever reads a weight by its address would go on reading the old storage: a captured CUDA graph, another process,
    a view, an array of numpy. So storages are swapped only on a CPU, where the weight alone uses an unshared one. The
    version goes up either way: a graph that saved the weight raises in its backward, and computes nothing wrong."""
    held, by_swap = hold(weight, other, keep_on)
    try:
        give(weight, other, by_swap)
    except BaseException:
        give(weight, held, by_swap)
        raise
    return held


def hold(weight: Tensor, other: Tensor, keep_on: torch.device | str) -> tuple[Tensor, bool]:
    """What holds the weight's values when it is given those of `other`, and whether it is to be given the storage."""
    if can_swap(weight, other):
        return weight.data, True
    return weight.to(keep_on, copy=True), False


def give(weight: Tensor, other: Tensor, by_swap: bool) -> None:
    if by_swap:
        weight.data = other
        torch.autograd.graph.increment_version(weight)
    else:
        weight.copy_(other)


def brought_along(tensor: Tensor, found: Tensor) -> Tensor:
    """A tensor for the place where this one is found: the model may have moved, and have another precision by now."""
    both_real = tensor.is_floating_point() and found.is_floating_point()
    return tensor.to(found.device, found.dtype if both_real else tensor.dtype)


def can_swap(weight: Tensor, other: Tensor) -> bool:
    return is_lone(weight, other) and _is_ordinary(other) and not other.untyped_storage().is_shared()


def is_lone(tensor: Tensor, like: Tensor) -> bool:
    """Whether its storage is one of this process, in which nothing else lies that torch knows, and is laid out like
    this one. What `from_numpy` and others made of memory that is not torch's cannot be resized."""
    if not (_is_ordinary(tensor) and _are_laid_out_alike(tensor, like)):
        return False
    storage = tensor.untyped_storage()
    alone = _use_count is not None and _use_count(storage._cdata) == _ITS_OWN
    return alone and storage.resizable() and storage.nbytes() == tensor.nbytes and not storage.is_shared()


def _is_ordinary(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return plain and tensor.is_cpu and not tensor.is_inference()


def _are_laid_out_alike(one: Tensor, other: Tensor) -> bool:
    same = one.dtype == other.dtype and one.shape == other.shape and one.stride() == other.stride()
    return same and one.is_conj() == other.is_conj() and one.is_neg() == other.is_neg()

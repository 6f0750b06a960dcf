"""Quantized weights: how one is known, what shape it stands for, and what stands for it on the meta device."""

import functools

import torch
from torch import Tensor, nn

from .override import owner_of, weight_of


def wraps_others(tensor: Tensor) -> bool:
    """Whether it holds quantized values and scales, say, of which it makes its own. Shards do not count."""
    return hasattr(tensor, "__tensor_flatten__") and not hasattr(tensor, "device_mesh")


def meta_stand_in(tensor: Tensor) -> Tensor:
    """On the meta device, where few such classes go: a tensor that is known as one."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta").as_subclass(_named_as(type(tensor)))


@functools.cache
def _named_as(cls: type) -> type[Tensor]:
    return type(cls.__name__, (Tensor,), {"__tensor_flatten__": None})


Shape = tuple[int, ...]


def weight_shape(host: nn.Module, path: str) -> Shape:
    """The shape that the weight stands for: a packed quantized weight has another one of its own."""
    owner, leaf = owner_of(host, path)
    if isinstance(owner, nn.Linear) and leaf == "weight":
        return (owner.out_features, owner.in_features)
    weight: Tensor = getattr(owner, leaf)
    return tuple(weight.shape)


def quantized_as(host: nn.Module, path: str) -> str | None:
    """How a weight is quantized, in words: a tensor around others, whole numbers, or another shape than it stands for.
    None where it is plain, or shards of what is plain."""
    weight = weight_of(host, path)
    if type(weight) not in (Tensor, nn.Parameter) and wraps_others(weight):
        return f"{type(weight).__name__} of {weight.dtype}"
    if not weight.is_floating_point() and not weight.is_complex():
        return str(weight.dtype)
    return None if tuple(weight.shape) == weight_shape(host, path) else f"{list(weight.shape)} of {weight.dtype}"


def not_real_as(host: nn.Module, path: str) -> str | None:
    """What a weight is, in words, that has no real numbers of its own to copy or to measure: packed, or complex."""
    weight = weight_of(host, path)
    return str(weight.dtype) if weight.is_complex() else quantized_as(host, path)

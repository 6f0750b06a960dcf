"""Tensors around others, as quantisation libraries make them: how one is known, and what stands for it on meta."""

import functools

import torch
from torch import Tensor


def wraps_others(tensor: Tensor) -> bool:
    """Whether it holds codes and scales, say, of which it makes values when it is used. Shards do not count."""
    return hasattr(tensor, "__tensor_flatten__") and not hasattr(tensor, "device_mesh")


def meta_stand_in(tensor: Tensor) -> Tensor:
    """On the meta device, where few such classes go: a tensor that is known as one."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta").as_subclass(_named_as(type(tensor)))


@functools.cache
def _named_as(cls: type) -> type[Tensor]:
    return type(cls.__name__, (Tensor,), {"__tensor_flatten__": None})

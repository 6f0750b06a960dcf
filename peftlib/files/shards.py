"""Tensors that lie in shards over several processes: gathered, and written by one of them."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """Every process of the mesh must ask, and each gets all of it."""
    gather: Any = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def writes_here(tensors: Iterable[Any]) -> bool:
    """Whether this process is the first of those that hold these tensors; of whole ones each holds its own."""
    meshes: list[Any] = [tensor.device_mesh for tensor in tensors if hasattr(tensor, "full_tensor")]
    return all(mesh.get_rank() == int(mesh.mesh.min()) for mesh in meshes)

"""Copies on the CPU of what a file is to hold: values that can be loaded again, and change no more."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from .._core.finite import SUMMED, is_finite
from .._errors import AdapterError


@torch.no_grad()
def copied(tensors: Iterable[tuple[str, Any]]) -> dict[str, Tensor]:
    """By key. What could not be loaded again must not take the place of a file that can: that is refused.

    Those of one dtype are copied and asked for their values in one piece. (224 of LoRA: 0.6 ms, one by one 2.8.)"""
    alike: dict[torch.dtype, dict[str, Tensor]] = {}
    copies: dict[str, Tensor] = {}
    for key, tensor in tensors:
        _require_values(tensor, key)
        if type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in SUMMED:
            alike.setdefault(tensor.dtype, {})[key] = tensor.cpu()
        else:
            _require_finite(tensor, key)
            copies[key] = tensor.cpu().clone(memory_format=torch.contiguous_format)
    for each in alike.values():
        copies |= _in_one_piece(each)
    return copies


def _in_one_piece(alike: dict[str, Tensor]) -> dict[str, Tensor]:
    own = [*alike.values()]
    together = _flatten_dense_tensors(own) if len(own) > 1 else own[0].reshape(-1).clone()  # of one it is no copy
    for key, tensor in () if is_finite(together) else alike.items():
        _require_finite(tensor, key)
    return dict(zip(alike, _unflatten_dense_tensors(together, own), strict=True))


def _require_values(tensor: Any, where: str) -> None:
    if not isinstance(tensor, Tensor):
        raise AdapterError(f"{where}: {type(tensor).__name__} is no tensor. Keep it among the kind's keywords.")
    if tensor.is_meta or hasattr(tensor, "device_mesh"):
        found = "on the meta device" if tensor.is_meta else "a shard"
        raise AdapterError(f"{where}: {found}, so its values are not here. Materialize or gather it, then save.")
    if not tensor.numel():
        raise AdapterError(
            f"{where}: shape {list(tensor.shape)} is empty. Gather it if it is sharded, or leave it out."
        )


def _require_finite(tensor: Tensor, where: str) -> None:
    if not is_finite(tensor):
        raise AdapterError(f"{where}: it holds NaN or infinity, so it would be refused at load. Save a finite adapter.")

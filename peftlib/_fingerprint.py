"""A fingerprint of the base under an adapter: shapes, dtypes, and a hash over a fixed sample of each weight."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from ._merge import base_weight
from ._walk import candidates

_SAMPLES = 64
_NARROW = (torch.bfloat16, torch.float16)

Fingerprint = dict[str, Any]


def fingerprint(host: nn.Module, replaced: set[str]) -> Fingerprint:
    """`weights`: dtype and shape of each. `hash`: over the sample as it is, and as it would be after `.bfloat16()` and
    `.half()`, so that the same weights are known in a narrower dtype; without it where there are no values to read.

    What an adapter replaces outright may differ from base to base: of such a weight only the shape is taken."""
    weights = _weights(host)
    sampled = {name: tensor for name, tensor in weights.items() if name not in replaced}
    found: Fingerprint = {"weights": {name: [_name(tensor.dtype), *tensor.shape] for name, tensor in weights.items()}}
    if sampled and all(_readable(tensor) for tensor in sampled.values()):
        samples = {name: _sample(tensor) for name, tensor in sampled.items()}
        found["hash"] = {"own": _hash(samples, None), **{_name(dtype): _hash(samples, dtype) for dtype in _NARROW}}
    return found


def differs(saved: Fingerprint, found: Fingerprint) -> str | None:
    """In words, or None where the base is the same as far as can be known."""
    shapes_saved, shapes_found = ({k: v[1:] for k, v in one["weights"].items()} for one in (saved, found))
    for name in sorted({*shapes_saved, *shapes_found}):
        if shapes_saved.get(name) != shapes_found.get(name):
            return f"has {name} {shapes_found.get(name, 'absent')}, in the file {shapes_saved.get(name, 'absent')}"
    if "hash" not in saved or "hash" not in found:
        return None
    same_dtypes = saved["weights"] == found["weights"]
    compared = ["own"] if same_dtypes else [_name(dtype) for dtype in _NARROW]
    if any(saved["hash"].get(key) == found["hash"][key] for key in compared):
        return None
    return "has weights of other values"


def _weights(host: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{leaf}".lstrip("."): base_weight(module, leaf)
        for path, module in candidates(host)
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    }


def _readable(tensor: Tensor) -> bool:
    return not tensor.is_meta and type(tensor) in (Tensor, nn.Parameter)


def _sample(tensor: Tensor) -> Tensor:
    count = min(_SAMPLES, tensor.numel())
    index = torch.arange(count, device=tensor.device) * tensor.numel() // max(1, count)
    return tensor.detach()[torch.unravel_index(index, tensor.shape)].reshape(-1).cpu()


def _hash(samples: dict[str, Tensor], dtype: torch.dtype | None) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, sample in sorted(samples.items()):
        values = sample.to(dtype) if dtype is not None and sample.is_floating_point() else sample
        digest.update(name.encode() + values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

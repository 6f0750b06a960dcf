"""A fingerprint of the base under an adapter: shapes, dtypes, and a hash over a fixed sample of each weight."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from .._core.foreign import keeps_statistics
from .._core.freeze import persistent_buffers
from .._core.merge import base_weight
from .._core.quantized import weight_shape
from .._core.sharded import is_sharded, whole
from .._core.walk import candidates

_SAMPLES = 64
_NARROW = (torch.bfloat16, torch.float16)
_PLAIN = {"float64", "float32", "bfloat16", "float16"}

Fingerprint = dict[str, Any]


def fingerprint(host: nn.Module, replaced: set[str], *, gather: bool) -> Fingerprint:
    """`weights`: dtype and shape of each, a packed weight's as it was before. `hash`: over the sample as it is, and as
    it would be after `.bfloat16()` and `.half()`, so that the same weights are known in a narrower dtype; without it
    where there are no values to read: on the meta device, in a tensor subclass, sharded. With `gather`, which all
    processes of the mesh must ask for together, those of shards are read too.

    `buffers`: the same of persistent buffers, and in `hash`, under "statistics", the values of running statistics,
    which are a part of the function that the adapter was trained on.

    What an adapter replaces outright may differ from base to base: of such a weight only the shape is taken."""
    weights, (buffers, statistics) = _weights(host), _buffers(host, replaced)
    described = {name: [_name(tensor.dtype), *shape] for name, (tensor, shape) in weights.items()}
    sampled = {name: tensor for name, (tensor, _) in weights.items() if name not in replaced}
    read = _readable_or_sharded if gather else _readable
    found: Fingerprint = {"weights": described}
    if buffers:
        found["buffers"] = {name: [_name(tensor.dtype), *tensor.shape] for name, tensor in buffers.items()}
    if sampled and all(read(tensor) for tensor in (*sampled.values(), *statistics.values())):
        samples = {name: _sample(whole(tensor.detach())) for name, tensor in sampled.items()}
        found["hash"] = {"own": _hash(samples, None), **{_name(dtype): _hash(samples, dtype) for dtype in _NARROW}}
        if statistics:
            moving = {name: _sample(tensor) for name, tensor in statistics.items()}
            found["hash"]["statistics"] = _hash(moving, None)
    return found


def differs(saved: Fingerprint, found: Fingerprint) -> str | None:
    """In words, or None where the base is the same as far as can be known: of a weight that is packed in one of the
    two only the shape is compared, and what the packing adds beside it not at all."""
    theirs, ours = saved["weights"], found["weights"]
    packed = any(_is_packed_apart(theirs[name][0], ours[name][0]) for name in theirs.keys() & ours.keys())
    for name in sorted(theirs.keys() & ours.keys() if packed else theirs.keys() | ours.keys()):
        if _shape(theirs, name) != _shape(ours, name):
            return f"has {name} {_shape(ours, name)}, in the file {_shape(theirs, name)}"
    if packed:
        return None
    other = _other_buffers(saved, found)
    if other or "hash" not in saved or "hash" not in found:
        return other
    compared = ["own"] if theirs == ours else [_name(dtype) for dtype in _NARROW]
    if any(saved["hash"].get(key) == found["hash"][key] for key in compared):
        return None
    return "has weights of other values"


def _other_buffers(saved: Fingerprint, found: Fingerprint) -> str | None:
    """Files of before 0.2 say nothing of buffers. In another dtype the statistics have been rounded."""
    if "buffers" not in saved:
        return None
    theirs, ours = saved["buffers"], found.get("buffers", {})
    for name in sorted(theirs.keys() | ours.keys()):
        if _shape(theirs, name) != _shape(ours, name):
            return f"has buffer {name} {_shape(ours, name)}, in the file {_shape(theirs, name)}"
    hashes = [each.get("hash", {}).get("statistics") for each in (saved, found)]
    if theirs == ours and None not in hashes and hashes[0] != hashes[1]:
        return "has running statistics of other values"
    return None


def _is_packed_apart(one: str, other: str) -> bool:
    return one != other and not {one, other} <= _PLAIN


def _shape(weights: dict[str, list[Any]], name: str) -> object:
    return weights[name][1:] if name in weights else "absent"


def _weights(host: nn.Module) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """Each parameter, and the shape that it stands for."""
    return {
        f"{path}.{leaf}".lstrip("."): (base_weight(module, leaf), weight_shape(module, leaf))
        for path, module in candidates(host)
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    }


def _buffers(host: nn.Module, replaced: set[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Each persistent buffer by its dotted name, and those that are running statistics of the base."""
    buffers: dict[str, Tensor] = {}
    statistics: dict[str, Tensor] = {}
    for path, module in candidates(host):
        for leaf, _ in persistent_buffers(module):
            name, buffer = f"{path}.{leaf}".lstrip("."), base_weight(module, leaf)
            buffers[name] = buffer
            if keeps_statistics(module) and buffer.is_floating_point() and name not in replaced:
                statistics[name] = buffer
    return buffers, statistics


def _readable(tensor: Tensor) -> bool:
    return not tensor.is_meta and type(tensor) in (Tensor, nn.Parameter)


def _readable_or_sharded(tensor: Tensor) -> bool:
    return _readable(tensor) or (is_sharded(tensor) and not tensor.is_meta)


def _sample(tensor: Tensor) -> Tensor:
    count = min(_SAMPLES, tensor.numel())
    position = torch.arange(count, device=tensor.device) * tensor.numel() // max(1, count)
    index = []
    for size in reversed(tensor.shape):
        index.insert(0, position % size)
        position = position // size
    return tensor.detach()[tuple(index)].reshape(-1).cpu()


def _hash(samples: dict[str, Tensor], dtype: torch.dtype | None) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, sample in sorted(samples.items()):
        values = sample.to(dtype) if dtype is not None and sample.is_floating_point() else sample
        digest.update(name.encode() + values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

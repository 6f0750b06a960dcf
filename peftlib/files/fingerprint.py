"""A fingerprint of the base under an adapter: shapes, dtypes, and a hash over a fixed sample of each weight."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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
_HASHES = {"own": None, "bfloat16": torch.bfloat16, "float16": torch.float16}  # over the sample as it is, and narrowed
_PLAIN = {"float64", "float32", "bfloat16", "float16"}

Fingerprint = dict[str, Any]
Samples = dict[str, Tensor]


class Asked(NamedTuple):
    """A module whose base is to be known again, and the names of the weights that its adapters replace outright. With
    `gather`, which all processes of the mesh must ask for together, the values of shards are read too."""

    host: nn.Module
    replaced: set[str]
    gather: bool


def fingerprints(asked: Sequence[Asked]) -> list[Fingerprint]:
    """`weights`: dtype and shape of each, a packed weight's as it was before. `hash`: over the sample as it is, and as
    it would be after `.bfloat16()` and `.half()`, so that the same weights are known in a narrower dtype; without it
    where there are no values to read: on the meta device, in a tensor subclass, sharded.

    `buffers`: the same of persistent buffers, and in `hash`, under "statistics", the values of running statistics,
    which are a part of the function that the adapter was trained on.

    What an adapter replaces outright may differ from base to base: of such a weight only the shape is taken.

    The samples of all modules are read together: one by one, most of the time went to calls of torch."""
    found = [_sampled(*each) for each in asked]
    values = _values([sample for _, own, statistics in found for sample in (*own.values(), *statistics.values())])
    for described, own, statistics in found:
        if own:
            described["hash"] = dict(zip(_HASHES, _hashes(own, values), strict=True))
        if statistics:
            described["hash"]["statistics"], *_ = _hashes(statistics, values)
    return [described for described, _, _ in found]


def _sampled(host: nn.Module, replaced: set[str], gather: bool) -> tuple[Fingerprint, Samples, Samples]:
    """What needs no values, and samples of the weights and of the statistics; none unless all can be read."""
    inside = candidates(host)
    weights, (buffers, statistics) = _weights(inside), _buffers(inside, replaced)
    found: Fingerprint = {"weights": {name: [_name(tensor.dtype), *shape] for name, (tensor, shape) in weights.items()}}
    if buffers:
        found["buffers"] = {name: [_name(tensor.dtype), *tensor.shape] for name, tensor in buffers.items()}
    sampled = {name: tensor for name, (tensor, _) in weights.items() if name not in replaced}
    read = _readable_or_sharded if gather else _readable
    if not sampled or not all(read(tensor) for tensor in (*sampled.values(), *statistics.values())):
        return found, {}, {}
    samples = {name: _sample(whole(tensor.detach())) for name, tensor in sampled.items()}
    return found, samples, {name: _sample(tensor) for name, tensor in statistics.items()}


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


def _weights(inside: list[tuple[str, nn.Module]]) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """Each parameter, and the shape that it stands for."""
    return {
        f"{path}.{leaf}" if path else leaf: (base_weight(module, leaf), weight_shape(module, leaf))
        for path, module in inside
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    }


def _buffers(inside: list[tuple[str, nn.Module]], replaced: set[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Each persistent buffer by its dotted name, and those that are running statistics of the base."""
    buffers: dict[str, Tensor] = {}
    statistics: dict[str, Tensor] = {}
    for path, module in inside:
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
    """Values that are as far apart as can be; where they are equally far, without a copy (1 µs, else 5)."""
    step, rest = divmod(tensor.numel(), _SAMPLES)
    if step and not rest and tensor.is_contiguous():
        return tensor.detach().as_strided((_SAMPLES,), (step,))
    return tensor.detach()[_places(tensor.shape, tensor.device)].reshape(-1)


@functools.lru_cache(256)  # the weights of a model have a few shapes, and this takes ten operations
def _places(shape: torch.Size, device: torch.device) -> tuple[Tensor, ...]:
    """For each dimension where the samples lie along it."""
    count = min(_SAMPLES, shape.numel())
    position = torch.arange(count, device=device) * shape.numel() // max(1, count)
    index = []
    for size in reversed(shape):
        index.insert(0, position % size)
        position = position // size
    return tuple(index)


def _values(samples: list[Tensor]) -> dict[int, tuple[memoryview, ...]]:
    """The bytes of each sample, by its id, in each of the dtypes."""
    found: dict[int, tuple[memoryview, ...]] = {}
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for sample in samples:
        alike.setdefault((sample.dtype, sample.device), []).append(sample)
    for each in alike.values():
        together, end = torch.cat(each).cpu(), 0
        real = together.is_floating_point()
        cast = [together.to(dtype) if dtype is not None and real else together for dtype in _HASHES.values()]
        data = [(values.view(torch.uint8).numpy().data, values.itemsize) for values in cast]
        for sample in each:
            start, end = end, end + sample.numel()
            found[id(sample)] = tuple(view[start * size : end * size] for view, size in data)
    return found


def _hashes(samples: Samples, values: Mapping[int, tuple[memoryview, ...]]) -> list[str]:
    named = [(name.encode(), values[id(sample)]) for name, sample in sorted(samples.items())]
    parts = [[part for name, data in named for part in (name, data[at])] for at in range(len(_HASHES))]
    return [hashlib.blake2b(b"".join(each), digest_size=16).hexdigest() for each in parts]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Saving one adapter and loading it, validated whole before the model is touched."""

import json
import os
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from .._core.freeze import moved_buffers
from .._core.inject import Placed, install, placed_in, require_changeable, require_free, require_name
from .._core.lost import require_all_there
from .._core.refill import refill, require_refillable
from .._core.sharded import any_sharded, every_module, is_sharded, leave_units, settle, shard_as_hosts, whole
from .._core.walk import candidates, require
from .._errors import AdapterError
from .container import Path, header_of, opened, read_tensor, require_unchanged, write
from .copies import copied
from .fingerprint import Asked, differs, fingerprints
from .header import Header, some
from .rebuild import entries, fill, rebuilt, require_implied_shapes, require_keys


def save(model: nn.Module, path: Path, name: str = "default", *, metadata: dict[str, Any] | None = None) -> None:
    """Writes one adapter, all its parts, as one safetensors file; the base is not in it.

    The write is atomic: a temporary file beside the target is synced and renamed over it. Where the adapter lies in
    shards (FSDP2, tensor parallel), every process calls this; the tensors are gathered, one after the other, and the
    first process writes them whole.

    Args:
        model: a model with adapters.
        path: the file; by custom it ends in ".safetensors".
        name: the adapter.
        metadata: JSON-able values of your own, given back by `read_header`.

    Raises:
        AdapterError: an absent name, tensors without values (meta device), or of other shapes than the configuration
            has (a flattened shard), NaN or infinity, metadata that JSON cannot hold, a path that is a device or a pipe.
        OSError: the file cannot be written (a full disk, a folder, no permission); an old one at `path` is left whole.

    Example:
        >>> import torch, peftlib, tempfile, os
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2)
        >>> peftlib.save(model, os.path.join(tempfile.mkdtemp(), "adapter.safetensors"))
    """
    require_whole(model, "save")
    require(model, (name,))
    metadata = {} if metadata is None else metadata
    _require_json(metadata)
    placed = [*placed_in(model, name)]
    header: Header = {**described(placed, name), "metadata": metadata}
    here = _writes_here(placed)
    tensors = _tensors(placed, keep=here)  # all gathered before anything can fail here alone
    if here:
        write(path, tensors, header)


def require_whole(model: nn.Module, doing: str) -> None:
    """A file, of whichever format, holds the adapter alone: it must all be there, and the base as it was."""
    settle(model)
    require_all_there(model, doing)
    if dist.is_available() and dist.is_initialized():
        require_implied_shapes(model, doing)
    moved = moved_buffers(model)
    if moved:
        raise AdapterError(
            f"{doing}: {some(moved)} of the base moved since the adapter was put in, and would not be in the file. Put "
            "Full on its module, which then is saved with the adapter, or train with that module in eval mode; or, if "
            "it is the state of one episode alone, set it back first."
        )


def _require_json(metadata: Any) -> None:
    try:
        same = isinstance(metadata, dict) and json.loads(json.dumps(metadata, allow_nan=False)) == metadata
    except (TypeError, ValueError):
        same = False
    if not same:
        raise AdapterError(
            f"metadata: {metadata!r} would not come back from JSON as it is. Use a dict with string keys, of numbers, "
            "strings, booleans, None, and lists or dicts of them."
        )


def _tensors(placed: Iterable[Placed], *, keep: bool) -> dict[str, Tensor]:
    """Copies on the CPU. What lies in shards every process asks for, one after the other, and keeps or lets go."""
    there = [(where, state) for item in placed for where, _, state in entries(item)]
    copies = copied(each for each in there if not is_sharded(each[1]))
    for where, state in (each for each in there if is_sharded(each[1])):
        gathered = copied([(where, whole(state))])
        if keep:
            copies |= gathered
    return copies


def described(there: Iterable[Placed], name: str) -> Header:
    """The header of a file of these adapters, but for the user's metadata."""
    configs: list[dict[str, Any]] = []
    positions: dict[str, list[int]] = {}
    asked: dict[str, Asked] = {}
    for host_name, items in _by_host(there).items():
        for item in items:
            config = {"kind": type(item.adapter).__name__, "config": item.adapter.config}
            if config not in configs:
                configs.append(config)
            positions.setdefault(host_name, []).append(configs.index(config))
        together = any(_is_sharded(item) for item in items)
        asked[host_name] = Asked(items[0].host, _replaced(items), together)
    base = dict(zip(asked, fingerprints([*asked.values()]), strict=True))
    return {"name": name, "configs": configs, "hosts": positions, "base": base}


def _by_host(there: Iterable[Placed]) -> dict[str, list[Placed]]:
    by_host: dict[str, list[Placed]] = {}
    for item in there:
        by_host.setdefault(item.host_name, []).append(item)
    return by_host


def _replaced(items: list[Placed]) -> set[str]:
    return {weight for item in items for weight in item.adapter.replaces}


def load(
    model: nn.Module, path: Path, name: str | None = None, *, strict: bool = True, into: str | None = None
) -> list[str]:
    """Puts a saved adapter into a model and makes it active; the base is frozen, as by `inject`.

    The whole file is checked before the model is touched: header, hosts, kinds, configurations, keys, shapes, values,
    and that the base is the one that the adapter was made on.

    With `into` the file's values take the place of those of an adapter that is there: the same modules, types and
    configurations, of LoRA and DoRA also a lower rank (zeros behind in both factors) and another alpha. Parameters stay
    the same objects, what is active or routed stays so, and under `torch.compile` nothing compiles again but once for a
    scale α/r that was not there before. Gradients are dropped; the moments of an optimizer are of the old values, so
    reset them before training on.

    Args:
        model: any module that has the hosts which the file names.
        path: a file that `save` wrote.
        name: what to call the adapter here; default its name in the file.
        strict: False accepts a base whose fingerprint differs.
        into: an adapter of the model that gets the values; default none.

    Returns:
        list[str]: the qualified names of the hosts, in the file's order.

    Raises:
        AdapterError: a damaged file, an unknown kind, an absent host, unexpected or missing keys, other shapes, NaN or
            infinity, another base, and what `inject` refuses; with `into` a file that does not fit there, a view.
        OSError: the file cannot be read.

    Example:
        >>> import torch, peftlib, tempfile, os
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> path = os.path.join(tempfile.mkdtemp(), "adapter.safetensors")
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2)
        >>> peftlib.save(model, path)
        >>> peftlib.eject(model)
        >>> peftlib.load(model, path)
        ['0']
        >>> peftlib.load(model, path, into="default")
        ['0']
    """
    if into is not None and name is not None:
        raise AdapterError(f'load: name={name!r} and into={into!r}: "into" keeps its name. Pass one of them.')
    with opened(path) as file:
        header = header_of(file, path)
        placed = _made(model, header, name, into, path)
        require_keys(placed, header["tensors"], os.fspath(path))
        if strict:
            _require_base(placed, header, os.fspath(path))
        tensors = {key: read_tensor(file, key) for key in header["tensors"]}
        fill(placed, tensors.__getitem__, os.fspath(path))
        require_unchanged(file, tensors, path)
    if into is None:
        _install(model, placed)
    else:
        refill(model, into, placed, os.fspath(path))
    return list(header["hosts"])


def _install(model: nn.Module, placed: list[Placed]) -> None:
    """Units that gather shards know the newcomers before they are in, and forget them if they do not come."""
    shard_as_hosts(model, placed)
    try:
        install(model, placed, freeze=True)
    except BaseException:
        leave_units(model)
        raise


def _made(model: nn.Module, header: Header, name: str | None, into: str | None, path: Path) -> list[Placed]:
    """On the meta device, and without their values."""
    if into is not None:
        require_refillable(model, into, "load")
        return list(rebuilt(model, header, into, path))
    called: str = header["name"] if name is None else name
    require_name(called)
    require_changeable(model, "load")
    placed = list(rebuilt(model, header, called, path))
    require_free(candidates(model), placed)
    return placed


def _require_base(placed: list[Placed], header: Header, path: str) -> None:
    asked = {at: Asked(items[0].host, _replaced(items), True) for at, items in _by_host(placed).items()}
    found = dict(zip(asked, fingerprints([*asked.values()]), strict=True))
    other = {host_name: differs(header["base"][host_name], own) for host_name, own in found.items()}
    wrong = [f"{host_name or 'the root'} {how}" for host_name, how in other.items() if how]
    if wrong:
        raise AdapterError(
            f"{path}: made on another base: {some(wrong)}. Load it onto its own base, or pass strict=False."
        )


def _is_sharded(item: Placed) -> bool:
    return any_sharded(every_module(item.adapter))


def _writes_here(placed: list[Placed]) -> bool:
    """Whether this process is the first of those that hold these adapters; of whole ones each holds its own."""
    own = (p for item in placed if _is_sharded(item) for p in item.adapter.parameters())
    shards: list[Any] = [*filter(is_sharded, own)]
    meshes = [shard.device_mesh for shard in shards]
    return all(mesh.get_rank() == int(mesh.mesh.min()) for mesh in meshes)

"""Saving one adapter and loading it, validated whole before the model is touched."""

import json
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ._adapter import KINDS, Adapter
from ._errors import AdapterError
from ._file import Header, Path, header_of, opened, write
from ._fingerprint import differs, fingerprint
from ._host import parts
from ._model import install, require_changeable
from ._place import Place, Placed, build, require_adaptable, require_free, require_name
from ._walk import adapters, candidates, hosts, require


def save(model: nn.Module, path: Path, name: str = "default", *, metadata: dict[str, Any] | None = None) -> None:
    """Writes one adapter, all its parts, as one safetensors file; the base is not in it.

    The write is atomic: a temporary file beside the target is synced and renamed over it.

    Args:
        model: a model with adapters.
        path: the file; by custom it ends in ".safetensors".
        name: the adapter.
        metadata: JSON-able values of your own, given back by `read_header`.

    Raises:
        AdapterError: an absent name, tensors without values (meta device) or only a shard of them, metadata that JSON
            cannot hold.
        OSError: the file cannot be written; an old one at `path` is left whole.

    Example:
        >>> import torch, peftlib, tempfile, os
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2)
        >>> peftlib.save(model, os.path.join(tempfile.mkdtemp(), "adapter.safetensors"))
    """
    require(model, (name,))
    metadata = {} if metadata is None else metadata
    _require_json(metadata)
    write(path, dict(_tensors(model, name)), {**_described(model, name), "metadata": metadata})


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


def _tensors(model: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    for host_name, _, adapter in adapters(model, name):
        state = adapter.state_dict()
        for key, inner in adapter.file_keys().items():
            tensor, where = state[inner], f"{host_name}.{key}".lstrip(".")
            if tensor.is_meta or hasattr(tensor, "device_mesh"):
                found = "on the meta device" if tensor.is_meta else "a shard"
                raise AdapterError(
                    f"{where}: {found}, so its values are not here. Materialise or gather it, then save."
                )
            yield where, tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _described(model: nn.Module, name: str) -> Header:
    configs: list[dict[str, Any]] = []
    positions: dict[str, list[int]] = {}
    base: dict[str, Any] = {}
    for host_name, host in hosts(model):
        for adapter in parts(host, (name,)):
            config = {"kind": type(adapter).__name__, "config": adapter.config}
            if config not in configs:
                configs.append(config)
            positions.setdefault(host_name, []).append(configs.index(config))
            base[host_name] = fingerprint(host, _replaced(parts(host, (name,))))
    return {"name": name, "configs": configs, "hosts": positions, "base": base}


def _replaced(there: list[Adapter]) -> set[str]:
    return {weight for adapter in there for weight in adapter.replaces}


def load(model: nn.Module, path: Path, name: str | None = None, *, strict: bool = True) -> list[str]:
    """Puts a saved adapter into a model and makes it active; the base is frozen, as by `inject`.

    The whole file is checked before the model is touched: header, hosts, kinds, configurations, keys, shapes, values,
    and that the base is the one that the adapter was made on.

    Args:
        model: any module that has the hosts which the file names.
        path: a file that `save` wrote.
        name: what to call the adapter here; default its name in the file.
        strict: False accepts a base whose fingerprint differs.

    Returns:
        list[str]: the qualified names of the hosts, in the file's order.

    Raises:
        AdapterError: a damaged file, an unknown kind, an absent host, unexpected or missing keys, other shapes, NaN or
            infinity, another base, and what `inject` refuses.
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
    """
    with opened(path) as file:
        header = header_of(file, path)
        called: str = header["name"] if name is None else name
        require_name(called)
        require_changeable(model, "load")
        placed = list(_rebuilt(model, header, called, os.fspath(path)))
        require_free(model, placed)
        _require_keys(placed, header, os.fspath(path))
        if strict:
            _require_base(placed, header, os.fspath(path))
        _fill(placed, file, os.fspath(path))
    install(model, placed, freeze=True)
    return list(header["hosts"])


def _rebuilt(model: nn.Module, header: Header, name: str, path: str) -> Iterator[Placed]:
    by_name = dict(candidates(model))
    absent = [host_name for host_name in header["hosts"] if host_name not in by_name]
    if absent:
        raise AdapterError(
            f"{path}: made for another model: {_some(absent)} not in {type(model).__name__}. Load it onto its own base."
        )
    for host_name, positions in header["hosts"].items():
        require_adaptable(host_name, by_name[host_name])
        for one in (header["configs"][at] for at in positions):
            kind = KINDS.get(one["kind"])
            if kind is None:
                raise AdapterError(
                    f"{path}: kind {one['kind']!r} is unknown here. Import the module that defines it first."
                )
            try:
                yield build(Place(host_name, by_name[host_name], one["config"]), kind, name, on_meta=True)
            except (AdapterError, TypeError, ValueError, RuntimeError) as error:
                reason = str(error).partition("\n")[0]
                raise AdapterError(
                    f"{path}: {host_name or 'the root'}: {one['kind']} refuses its configuration ({reason}). "
                    "Save it again from its model."
                ) from None


def _require_keys(placed: list[Placed], header: Header, path: str) -> None:
    expected = {key: state.shape for item in placed for key, _, state in _entries(item)}
    found = header["tensors"]
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unexpected:
        raise AdapterError(
            f"{path}: missing {_some(missing)}; unexpected {_some(unexpected)}. Save it again from its model."
        )
    for key, shape in expected.items():
        if found[key]["shape"] != list(shape):
            raise AdapterError(
                f"{path}: {key} has shape {found[key]['shape']}, this model needs {list(shape)}. "
                "Load it onto its own base."
            )


def _entries(item: Placed) -> Iterator[tuple[str, str, Tensor]]:
    """For each tensor: its key in the file, its key in the adapter, and the tensor."""
    state = item.adapter.state_dict()
    for key, inner in item.adapter.file_keys().items():
        yield f"{item.host_name}.{key}".lstrip("."), inner, state[inner]


def _require_base(placed: list[Placed], header: Header, path: str) -> None:
    by_host: dict[str, list[Placed]] = {}
    for item in placed:
        by_host.setdefault(item.host_name, []).append(item)
    other = {}
    for host_name, items in by_host.items():
        found = fingerprint(items[0].host, _replaced([item.adapter for item in items]))
        other[host_name] = differs(header["base"][host_name], found)
    wrong = [f"{host_name or 'the root'} {how}" for host_name, how in other.items() if how]
    if wrong:
        raise AdapterError(
            f"{path}: made on another base: {_some(wrong)}. Load it onto its own base, or pass strict=False."
        )


def _fill(placed: list[Placed], file: Any, path: str) -> None:
    for item in placed:
        device = next((p.device for p in item.host.parameters()), torch.device("cpu"))
        state = {inner: _checked(file.get_tensor(key), expected, key, path) for key, inner, expected in _entries(item)}
        if device.type != "meta":
            state = {inner: tensor.to(device) for inner, tensor in state.items()}
        item.adapter.load_state_dict(state, assign=True)
        if device.type != "meta":
            _complete(item)


def _complete(item: Placed) -> None:
    """Tensors that are not in the file, non-persistent buffers, are those of an adapter made on the real host."""
    made: Adapter | None = None
    for path, module in item.adapter.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                made = (
                    made or build(Place(item.host_name, item.host, item.adapter.config), type(item.adapter), "").adapter
                )
                module._buffers[leaf] = made.get_submodule(path)._buffers[leaf]


def _checked(tensor: Tensor, expected: Tensor, key: str, path: str) -> Tensor:
    if tensor.is_floating_point() != expected.is_floating_point():
        raise AdapterError(f"{path}: {key} is {tensor.dtype}, expected {expected.dtype}. Save it again from its model.")
    if not tensor.isfinite().all():
        raise AdapterError(f"{path}: {key} holds NaN or infinity. Train again from a sound checkpoint.")
    return tensor


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:4])} and {len(names) - 4} more" if len(names) > 4 else ", ".join(names) or "nothing"

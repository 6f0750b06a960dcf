"""Which adapter goes on which host: everything that a call decides before it touches the model."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from .._errors import AdapterError
from .accelerate import present
from .adapter import Adapter, full_config
from .clone import face
from .foreign import reader_of
from .host import Adapters, is_host
from .targets import Targets, select
from .walk import adapters, candidates


class Place(NamedTuple):
    """One adapter to be: where, and with which keywords."""

    host_name: str
    host: nn.Module
    config: dict[str, Any]


class Placed(NamedTuple):
    """One adapter that is ready for its host."""

    host_name: str
    host: nn.Module
    adapter: Adapter


def places(
    model: nn.Module, targets: Targets, kind: type[Adapter], exclude: Targets, config: dict[str, Any]
) -> list[Place]:
    require_kind(kind)
    hits = {id(module): module for _, module in select(candidates(model, aliases=True), targets, exclude)}
    first_named = [(name, module) for name, module in candidates(model) if id(module) in hits]
    return list(_places(model, first_named, kind, config))


def _places(model: nn.Module, hits: list[tuple[str, nn.Module]], kind: type[Adapter], config: Any) -> Iterator[Place]:
    for name, module in hits:
        host_name, host, inner = reader_of(model, name, module)
        require_adaptable(host_name, host)
        try:
            kind.require_place(model, host_name, host)
            configs = kind.split(host, inner, config)
        except AdapterError as error:
            raise AdapterError(f"cannot put {kind.__name__} into {name or 'the root'}: {error}") from None
        yield from (Place(host_name, host, one) for one in configs)


def build(place: Place, kind: type[Adapter], name: str, on_meta: bool = False) -> Placed:
    """Constructs the adapter; on the meta device it costs nothing and draws nothing."""
    try:
        adapter = _on_meta(place, kind) if on_meta else _on_host(place, kind)
        adapter.config = full_config(kind, place.config)
    except AdapterError as error:
        raise AdapterError(f"cannot put {kind.__name__} into {place.host_name or 'the root'}: {error}") from None
    adapter.name = name
    adapter.train(place.host.training)
    return Placed(place.host_name, place.host, adapter)


def _on_host(place: Place, kind: type[Adapter]) -> Adapter:
    with present(kind.reads(place.host)):
        return kind(place.host, **place.config)


def _on_meta(place: Place, kind: type[Adapter]) -> Adapter:
    try:
        return kind(face(place.host, meta=True), **place.config)
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
        return _on_host(place, kind)  # this kind reads its host's values


def require_kind(kind: Any) -> None:
    if not (isinstance(kind, type) and issubclass(kind, Adapter)):
        raise TypeError(f"kind: expected a subclass of peftlib.Adapter such as peftlib.LoRA, found {kind!r}")


def require_name(name: str) -> None:
    if not isinstance(name, str) or not name or "." in name or ":" in name:
        raise AdapterError(f"name={name!r}: a name is a string without '.' and ':'. Rename the adapter.")
    if not name.isprintable() or "/" in name or "\\" in name:
        raise AdapterError(f"name={name!r}: a name is printable and no path. Rename the adapter.")
    if name == "selection" or hasattr(Adapters(), name):
        raise AdapterError(f"name={name!r}: torch's ModuleDict has an attribute of that name. Rename the adapter.")


def require_adaptable(name: str, host: nn.Module) -> None:
    where, found = name or "the root", type(host).__name__
    if isinstance(host, torch.jit.ScriptModule):
        raise AdapterError(
            f"{where}: {found} is scripted, and its forward cannot change. Adapt the model, then script it."
        )
    own = (*host._parameters.values(), *host._buffers.values())
    if any(isinstance(tensor, (UninitializedParameter, UninitializedBuffer)) for tensor in own):
        raise AdapterError(f"{where}: {found} is lazy and has no shapes yet. Run one batch through the model first.")
    if any(type(p).__name__ == "DTensor" or hasattr(p, "device_mesh") for p in host.parameters(recurse=False)):
        raise AdapterError(f"{where}: its parameters are sharded already. Inject first, then fully_shard.")
    if not is_host(host) and hasattr(host, "adapters"):
        raise AdapterError(f"{where}: {found} has an attribute `adapters` of its own, which peftlib needs. Rename it.")
    if type(host).forward is nn.Module.forward and "forward" not in host.__dict__:
        raise AdapterError(f"{where}: {found} has no forward and is never called. Target the modules inside it.")


def require_free(model: nn.Module, placed: list[Placed]) -> None:
    """The tensors of one name have distinct keys in its file: what is there twice would be saved once."""
    taken: dict[tuple[str, str], str] = {}
    for host_name, name, adapter in adapters(model):
        taken.update({(name, key): type(adapter).__name__ for key in _keys(host_name, adapter)})
    for host_name, _, adapter in placed:
        own = {(adapter.name, key): type(adapter).__name__ for key in _keys(host_name, adapter)}
        for name, key in sorted(own.keys() & taken.keys()):
            raise AdapterError(
                f'{host_name or "the root"}: "{name}" has a {taken[name, key]} with {key!r} already. '
                "Eject it, or inject under another name."
            )
        taken |= own


def _keys(host_name: str, adapter: Adapter) -> list[str]:
    return [f"{host_name}.{key}".lstrip(".") for key in adapter.file_keys()]

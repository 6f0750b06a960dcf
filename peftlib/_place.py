"""Which adapter goes on which host: everything that a call decides before it touches the model."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ._adapter import Adapter, full_config
from ._errors import AdapterError
from ._host import Adapters, face, is_host, parts
from ._readers import reader_of
from ._select import Targets, select
from ._walk import candidates


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
    return list(_places(model, select(candidates(model), targets, exclude), kind, config))


def _places(model: nn.Module, hits: list[tuple[str, nn.Module]], kind: type[Adapter], config: Any) -> Iterator[Place]:
    for name, module in hits:
        host_name, host, inner = reader_of(model, name, module)
        require_adaptable(host_name, host)
        try:
            configs = kind.split(host, inner, config)
        except AdapterError as error:
            raise AdapterError(f"cannot put {kind.__name__} into {name or 'the root'}: {error}") from None
        yield from (Place(host_name, host, one) for one in configs)


def build(place: Place, kind: type[Adapter], name: str, on_meta: bool = False) -> Placed:
    """Constructs the adapter; on the meta device it costs nothing and draws nothing."""
    host = face(place.host, meta=True) if on_meta else place.host
    try:
        adapter = kind(host, **place.config)
        adapter.config = full_config(kind, place.config)
    except AdapterError as error:
        raise AdapterError(f"cannot put {kind.__name__} into {place.host_name or 'the root'}: {error}") from None
    adapter.name = name
    adapter.train(place.host.training)
    return Placed(place.host_name, place.host, adapter)


def require_kind(kind: Any) -> None:
    if not (isinstance(kind, type) and issubclass(kind, Adapter)):
        raise TypeError(f"kind: expected a subclass of peftlib.Adapter such as peftlib.LoRA, found {kind!r}")


def require_name(name: str) -> None:
    if not isinstance(name, str) or not name or "." in name or ":" in name:
        raise AdapterError(f"name={name!r}: a name is a string without '.' and ':'. Rename the adapter.")
    if hasattr(Adapters, name) or name in Adapters()._modules:
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


def require_free(placed: list[Placed]) -> None:
    """On one host, the tensors of one name have distinct keys: what is there twice would be saved once."""
    taken: dict[tuple[int, str, str], str] = {}
    for _, host, _ in placed:
        for adapter in parts(host) if is_host(host) else ():
            taken.update({(id(host), adapter.name, key): type(adapter).__name__ for key in adapter.file_keys()})
    for host_name, host, adapter in placed:
        for key in adapter.file_keys():
            there = taken.setdefault((id(host), adapter.name, key), "")
            if there:
                raise AdapterError(
                    f'{host_name or "the root"}: "{adapter.name}" has a {there} with {key!r} there already. '
                    "Eject it, or inject under another name."
                )
        taken.update({(id(host), adapter.name, key): type(adapter).__name__ for key in adapter.file_keys()})

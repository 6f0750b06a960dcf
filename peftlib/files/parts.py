"""Adapters in the making: host, kind, keywords and tensors, put into a model all or nothing."""

from collections.abc import Iterable

from torch import nn

from .._core.adapter import Adapter
from .._core.foreign import require_steady
from .._core.inject import (
    Part,
    Placed,
    build,
    install,
    require_adaptable,
    require_changeable,
    require_free,
    require_name,
)
from .._core.override import owner_of
from .._core.walk import candidates
from .._errors import AdapterError
from .rebuild import entries, fill, require_keys


def install_parts(
    model: nn.Module,
    parts: list[Part],
    name: str,
    where: str,
    order: Iterable[nn.Module],
    *,
    shared: Iterable[tuple[Part, Part]] = (),
    freeze: bool = True,
    active: bool = True,
) -> list[str]:
    """Puts all parts in under one name, or none; returns the hosts in the order of these modules. Of two parts that
    are shared the second gets the parameters of the first."""
    require_name(name)
    base = candidates(model)
    require_changeable(model, "load", base)
    require_steady(base, [part.host_name for part in parts])
    placed = [_placed(part, name, where) for part in parts]
    require_free(base, placed)
    for part, item in zip(parts, placed, strict=True):
        if part.tensors is not None:
            _fill(part, item, where)
    of_part = {id(part): item.adapter for part, item in zip(parts, placed, strict=True)}
    for one, other in shared:
        _share(of_part[id(one)], of_part[id(other)])
    hosts = {id(part.host): part.host_name for part in parts}
    found = [hosts[id(module)] for module in order if id(module) in hosts]
    install(model, placed, freeze=freeze, active=active, base=base)
    return found


def _share(one: Adapter, other: Adapter) -> None:
    for path, parameter in one.named_parameters():
        owner, leaf = owner_of(other, path)
        owner.register_parameter(leaf, parameter)


def _placed(part: Part, name: str, where: str) -> Placed:
    require_adaptable(part.host_name, part.host)
    try:
        return build(part, name, on_meta=part.tensors is not None)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise AdapterError(
            f"{where}: {part.host_name or 'the root'}: {part.kind.__name__} refuses its configuration ({reason}). "
            "Correct the configuration."
        ) from None


def _fill(part: Part, item: Placed, where: str) -> None:
    """In the dtype of a fresh adapter: float32 beside a half-precision base, whatever the file has."""
    named = {f"{part.host_name}.{key}".lstrip("."): tensor for key, tensor in (part.tensors or {}).items()}
    require_keys([item], {key: {"shape": list(tensor.shape)} for key, tensor in named.items()}, where)
    dtypes = {key: state.dtype for key, _, state in entries(item)}
    float_to = {key: dtypes[key] if t.is_floating_point() else t.dtype for key, t in named.items()}
    fill([item], lambda key: named[key].to(float_to[key], copy=True), where)

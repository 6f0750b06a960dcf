"""What each base weight becomes when adapters are folded in: float32 or wider until the one rounding."""

import contextlib
import sys
from collections.abc import Container, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._errors import AdapterError
from .adapter import Adapter, fold_all, state_of
from .clone import without_overrides
from .finite import first_not_finite, is_finite
from .foreign import is_offloading
from .host import Adapters, Selection, adapters_of, is_host, parts
from .override import compute_from_attributes, overridden, owner_of
from .quantized import quantized_as
from .sharded import any_sharded, every_module, is_sharded, split_as, whole
from .swap import is_lone
from .walk import Base, base_modules, candidates
from .weights import Weights


@dataclass
class Folded:
    """One weight of the base, by owner and attribute, and the value that it takes, not yet rounded."""

    name: str
    owner: nn.Module
    leaf: str
    base: Tensor
    value: Tensor

    def rounded(self) -> Tensor:
        """In the base's dtype and layout, in memory of its own: an adapter may give what it goes on to hold."""
        nobody_holds_it = self._references() == _ITS_OWN and is_lone(self.value, self.base)
        rounded = self.value if nobody_holds_it else _like(self.base, self.value)
        if not (self.base.is_meta or is_finite(rounded)) and is_finite(whole(self.base)):
            raise AdapterError(
                f"cannot merge into {self.name}: the result has NaN or infinity in {self.base.dtype}. "
                "Leave the adapter unmerged, or widen the weight first."
            )
        return split_as(rounded, self.base)

    def _references(self) -> int:
        return sys.getrefcount(self.value)


_ITS_OWN = Folded("", nn.Module(), "", torch.empty(0), torch.empty(0))._references()


def _like(base: Tensor, value: Tensor) -> Tensor:
    if type(base) not in (Tensor, nn.Parameter):
        return value.to(base.dtype)
    with torch.inference_mode(base.is_inference()), torch.no_grad():  # what a weight takes over is as the weight is
        return torch.empty_like(base, requires_grad=False).copy_(value)


def folded_by_host(
    model: nn.Module, names: Container[str], weights: Weights | None = None, skipped: Container[int] = ()
) -> Iterator[tuple[nn.Module, list[Folded]]]:
    """Host after host, outer before inner; a weight that an inner host changes again comes with that host. What is
    skipped, by id, is neither around nor inside another."""
    base = candidates(model)
    owners, sharded, selection = _owners(base), any_sharded(every_module(model)), Selection()
    selection.weights = weights or {}
    folding = [(name, host) for name, host in base if is_host(host) and id(host) not in skipped and parts(host, names)]
    if not sharded:  # else when they are gathered
        _require_finite((host_name, part) for host_name, host in folding for part in parts(host, names))
    pending: list[Folded] = []
    for host_name, host in folding:
        modules = base_modules(host)
        inside = set(map(id, modules))
        start = [item for item in pending if id(item.owner) in inside]
        items = _fold(host_name, modules, names, start, selection, sharded)
        _refuse_shared(items, owners, host)
        again = _changed_inside(modules, names)
        pending = [item for item in pending if id(item.owner) not in inside]
        pending += [item for item in items if id(item.owner) in again]
        yield host, _unique(item for item in items if id(item.owner) not in again)


def _fold(
    host_name: str,
    modules: list[nn.Module],
    names: Container[str],
    start: list[Folded],
    selection: Selection,
    sharded: bool,
) -> list[Folded]:
    """Each fold reads what the one before it gave, on a stand-in for the host, which is the first of these modules."""
    host = modules[0]
    if any(map(is_offloading, modules)):
        raise AdapterError(
            f"cannot merge into {host_name or 'the root'}: accelerate keeps its weights in memory or on disk between "
            "calls. Merge before the model is offloaded, or take the hooks off first (remove_hook_from_module)."
        )
    scratch = _stand_in(_with_adapters(modules) if sharded else modules, selection)
    paths = {id(module): path for path, module in host.named_modules()} if start else {}
    values = {f"{paths[id(item.owner)]}.{item.leaf}".lstrip("."): item.value for item in start}
    folding = parts(scratch, names)
    if sharded:
        _require_finite((host_name, adapter) for adapter in folding)
    try:
        with overridden(scratch, values), full_precision(modules):
            values |= fold_all(scratch, folding)
    except (RuntimeError, TypeError):  # a quantized weight does arithmetic in ways of its own, or not at all
        for leaf, _ in scratch.named_parameters(recurse=False):
            _require_plain(f"{host_name}.{leaf}".lstrip("."), scratch, leaf)
        raise
    return [_item(host_name, host, path, value) for path, value in values.items()]


def _stand_in(modules: list[nn.Module], selection: Selection) -> nn.Module:
    """Other module objects that share all that these have, adapters too: weights are overridden there, where no call
    in another thread reads them, and what such a call overrides meanwhile is left out. The adapters have the weights of
    this selection in it, whatever theirs are in the model."""
    made: dict[int, Any] = {}
    gathered: dict[int, Any] = {}
    for module in modules:
        other = made[id(module)] = object.__new__(type(module))
        other.__dict__.update(without_overrides(module, vars(module)))
        for tensors in ("_parameters", "_buffers"):
            _gather(other.__dict__, tensors, gathered)
        if isinstance(other, nn.RNNBase):
            compute_from_attributes(other)
    for other in made.values():
        children = other._modules.items()
        other.__dict__["_modules"] = {name: made.get(id(child), child) for name, child in children}
    host: Any = made[id(modules[0])]
    host._modules["adapters"] = _following(adapters_of(host), selection)
    return host


def _following(children: Adapters, selection: Selection) -> Adapters:
    other: Any = object.__new__(Adapters)
    other.__dict__.update(vars(children), selection=selection)
    return other


def _with_adapters(modules: list[nn.Module]) -> list[nn.Module]:
    return modules + [inner for host in modules if is_host(host) for inner in adapters_of(host).modules()]


def _gather(state: dict[str, Any], tensors: str, gathered: dict[int, Any]) -> None:
    """In the place of each shard, all of it, once: folds then are those of one process, and so are their refusals."""
    if not any(map(is_sharded, state[tensors].values())):
        return
    state[tensors] = dict(state[tensors])
    for leaf, tensor in state[tensors].items():
        if is_sharded(tensor):
            if id(tensor) not in gathered:
                gathered[id(tensor)] = nn.Parameter(whole(tensor.detach()), tensor.requires_grad)
            state[tensors][leaf] = gathered[id(tensor)]


def full_precision(modules: list[nn.Module]) -> AbstractContextManager[object]:
    """Autocast would take the products in half precision."""
    kinds = {own.device.type for module in modules for own in module._parameters.values() if own is not None}
    on = [kind for kind in kinds - {"meta"} if torch.is_autocast_enabled(kind)]
    return _autocast_off(on) if on else contextlib.nullcontext()


@contextlib.contextmanager
def _autocast_off(kinds: list[str]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _item(host_name: str, host: nn.Module, path: str, value: Tensor) -> Folded:
    owner, leaf = owner_of(host, path)
    name = f"{host_name}.{path}".lstrip(".")
    own = owner._parameters.get(leaf, owner._buffers.get(leaf))
    if isinstance(own, nn.Parameter):
        _require_plain(name, owner, leaf)
    if own is None:
        raise AdapterError(
            f"cannot merge into {name}: it is computed from other parameters. Make it a plain weight first "
            "(torch.nn.utils.parametrize.remove_parametrizations), or leave the adapter unmerged."
        )
    if own.is_meta or value.is_meta or own.shape != value.shape:
        found = (
            "on the meta device"
            if own.is_meta or value.is_meta
            else f"{list(own.shape)} and its merged form {list(value.shape)}"
        )
        raise AdapterError(
            f"cannot merge into {name}: it is {found}. Materialize the model, or fix the fold of this adapter type."
        )
    return Folded(name, owner, leaf, own, value)


def _require_plain(name: str, owner: nn.Module, leaf: str) -> None:
    packed = quantized_as(owner, leaf)
    if packed:
        raise AdapterError(
            f"cannot merge into {name}: it is quantized ({packed}), and a quantized weight cannot hold the result. "
            "Leave the adapter unmerged, make the layer a float32 one with eject(model, merge=True, dequantize=True), "
            "or load the adapter onto the base in full precision and merge there."
        )


def _require_finite(placed: Iterable[tuple[str, Adapter]]) -> None:
    tensors = [
        ((where, adapter, key), tensor) for where, adapter in placed for key, tensor in state_of(adapter).items()
    ]
    found = first_not_finite((name, tensor) for name, tensor in tensors if not tensor.is_meta)
    if found is not None:
        host_name, adapter, key = found
        raise AdapterError(
            f'cannot merge "{adapter.name}" into {host_name or "the root"}: {key} holds NaN or infinity. '
            "Load a finite adapter, or eject this one."
        )


class _Owner(NamedTuple):
    """A place where a tensor is registered."""

    module: int
    leaf: str
    name: str
    tensor: Tensor


def _owners(base: Base) -> dict[object, list[_Owner]]:
    """Every registered tensor, by the memory that it lies in."""
    owners: dict[object, list[_Owner]] = {}
    for name, module in base:
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                owner = _Owner(id(module), leaf, f"{name}.{leaf}".lstrip("."), tensor)
                owners.setdefault(_memory(tensor), []).append(owner)
    return owners


def _memory(tensor: Tensor) -> object:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.numel() and not tensor.is_meta
    return (tensor.device, tensor.untyped_storage().data_ptr()) if plain else id(tensor)


def _overlap(one: Tensor, other: Tensor) -> bool:
    (start, end), (other_start, other_end) = _span(one), _span(other)
    return one is other or (start < other_end and other_start < end)


def _span(tensor: Tensor) -> tuple[int, int]:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _refuse_shared(items: list[Folded], owners: dict[object, list[_Owner]], host: nn.Module) -> None:
    """A tensor may have several owners only if one fold gives all of them the same value."""
    by_place = {(id(item.owner), item.leaf): item for item in items}
    for item in items:
        for owner, leaf, name, tensor in owners[_memory(item.base)]:
            same = by_place.get((owner, leaf))
            if (same is None or same.value is not item.value) and _overlap(item.base, tensor):
                names = ", ".join(dict.fromkeys(f'"{part.name}"' for part in parts(host)))
                raise AdapterError(
                    f"cannot merge {names} into {item.name}: it is also {name}, which would change too. "
                    "Untie them first."
                )


def _changed_inside(modules: list[nn.Module], names: Container[str]) -> set[int]:
    inner = [module for module in modules[1:] if is_host(module) and parts(module, names)]
    return {id(module) for other in inner for module in base_modules(other)}


def _unique(items: Iterator[Folded]) -> list[Folded]:
    return list({id(item.base): item for item in items}.values())

"""A copy of a model's module objects that shares its tensors, made also while the model runs in another thread."""

import copy
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .foreign import hook_of
from .override import ASIDE, compute_from_attributes
from .quantized import meta_stand_in, wraps_others
from .sharded import every_module, is_sharded, units

_BOUND = (types.MethodType, functools.partial)


def clone(model: nn.Module, meta: bool = False) -> Any:
    """A copy of the module objects that shares every tensor with the original, or has them all on the meta device."""
    shared: dict[int, Any] = {}
    for module in model.modules():
        shared.update({id(item): _on_meta(item) if meta else _shared(item) for item in _tensors(module)})
        shared[id(hook_of(module))] = hook_of(module)  # one that offloads holds all weights of the model
    _copy_units(model, shared)
    other = copy.deepcopy(model, shared)
    for module in other.modules():
        _lift_overrides(module)
    return other


def without_values(host: nn.Module) -> Any:
    """Modules like these, for a constructor to read: every tensor of their own is on the meta device, and every other
    attribute is the host's. (A linear: 11 µs; `clone` takes 90, which were a third of a load.)"""
    modules, tensors = every_module(host), dict[int, Any]()
    if any(isinstance(item, _BOUND) for module in modules for item in vars(module).values()):
        return clone(host, meta=True)  # what is bound must be bound to the copy
    made: dict[int, Any] = {id(module): object.__new__(type(module)) for module in modules}

    def instead(items: Mapping[str, Any]) -> dict[str, Any]:
        for item in items.values():
            if isinstance(item, Tensor) and id(item) not in tensors:
                tensors[id(item)] = _on_meta(item)
        return {name: tensors.get(id(item), item) for name, item in items.items()}

    for module in modules:
        state, other = instead(without_overrides(module, vars(module))), made[id(module)]
        own = {"_parameters": instead(state["_parameters"]), "_buffers": instead(state["_buffers"])}
        children = {name: made.get(id(child)) for name, child in module._modules.items()}
        other.__dict__.update(state, **own, _modules=children)
        if isinstance(other, nn.RNNBase):
            compute_from_attributes(other)
    return made[id(host)]


def _copy_units(model: nn.Module, shared: dict[int, Any]) -> None:
    """FSDP2 forbids to copy its units, for what gathers them stays with the first: a copy that is only read may have
    the same."""
    made = [(unit, object.__new__(type(unit))) for unit in units(model)]
    shared.update({id(unit): other for unit, other in made})
    for unit, other in made:
        own = {key: copy.deepcopy(unit.__dict__[key], shared) for key in ("_parameters", "_buffers", "_modules")}
        other.__dict__.update({**unit.__dict__, **own})


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """The module's own, and those that an attribute holds in the memory of one of its parameters."""
    own = [*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()]
    yield from (item for item in own if isinstance(item, Tensor))
    memory = {p.data_ptr() for p in module._parameters.values() if p is not None and _keeps_state(p)}
    for state in (vars(item) for item in module.__dict__.values() if memory and hasattr(item, "__dict__")):
        yield from (item for item in state.values() if isinstance(item, Tensor) and item.data_ptr() in memory)


def _keeps_state(parameter: Tensor) -> bool:
    """A frozen parameter of a class of its own, with attributes: what is quantized."""
    return nn.Parameter in type(parameter).__mro__[1:] and not parameter.requires_grad and bool(vars(parameter))


def _shared(tensor: Tensor) -> Tensor:
    """The tensor itself; of a quantized parameter that carries others a second object over the same data, for its
    module may take them from it. (bitsandbytes' 8-bit layer does at its first call.)"""
    if not _keeps_state(tensor) or not any(isinstance(item, Tensor) for item in vars(tensor).values()):
        return tensor
    other: Any = torch.Tensor._make_subclass(type(tensor), tensor.data, False)
    other.__dict__.update(vars(tensor))
    return other


def _lift_overrides(module: Any) -> None:
    overrides = _overrides_in(module, module.__dict__)
    for name in overrides:
        del module.__dict__[name]
    module._buffers.update(module.__dict__.pop(ASIDE, {}))
    if overrides and isinstance(module, nn.RNNBase):
        compute_from_attributes(module)


def without_overrides(module: Any, state: Any) -> Any:
    """A module's state without what stands before its own tensors only while a call lasts, in another thread maybe."""
    if not isinstance(state, dict):
        return state
    state = dict(state)  # at once: the call may end in the middle of a copy
    for name in _overrides_in(module, state):
        del state[name]
    if ASIDE in state:
        state["_buffers"] = {**state["_buffers"], **state.pop(ASIDE)}
    return state


def _overrides_in(module: Any, state: dict[str, Any]) -> list[str]:
    return [name for name, value in state.items() if isinstance(value, Tensor) and _is_read_elsewhere(module, name)]


def _is_read_elsewhere(module: Any, name: str) -> bool:
    """A registered tensor or a computed one is never in `__dict__` of its own accord."""
    computed = isinstance(getattr(type(module), name, None), property)
    return computed or name in module._parameters or name in module._buffers


def _on_meta(tensor: Tensor) -> Tensor:
    if is_sharded(tensor):  # its shape is that of the whole
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    else:
        empty = meta_stand_in(tensor) if wraps_others(tensor) else torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

"""An adapter given the values of another of its configuration, in place: all of them, or none."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import AdapterError
from .adapter import Adapter
from .host import parts
from .inject import Placed, require_uncompiled
from .lost import require_all_there
from .sharded import settle
from .walk import hosts, require, require_no_views, require_unmerged


def require_refillable(model: nn.Module, name: str, doing: str) -> None:
    """A view has modules of its own, and would keep the scale that was."""
    require_uncompiled(model, doing)
    require_all_there(model, doing)
    selection = require(model, (name,))
    require_no_views(selection, doing)
    require_unmerged(selection, doing)


@torch.no_grad()
def refill(model: nn.Module, name: str, made: Sequence[Placed], where: str) -> None:
    """Each part of the adapter gets what makes it do what its like among these does; parameters stay the same objects,
    so that graphs and optimizers that hold them go on."""
    settle(model)
    found = [_given(host_name, own, other) for host_name, own, other in _matched(model, name, made, where)]
    values = [pair for tensors, _, _ in found for pair in tensors]
    before = [(own, own.clone()) for own, _ in values], [(part, dict(part.__dict__)) for _, part, _ in found]
    try:
        for own, value in values:
            own.copy_(value)
        for _, part, attributes in found:
            part.__dict__.update(attributes)
        _forget_plans(model)
    except BaseException:
        for own, value in before[0]:
            own.copy_(value)
        for part, attributes in before[1]:
            part.__dict__.update(attributes)
        raise
    for own, _ in values:
        own.grad = None  # of what was there before


def _matched(model: nn.Module, name: str, made: Sequence[Placed], where: str) -> list[tuple[str, Adapter, Adapter]]:
    """The parts of the adapter, each with the one that has its place and its keys in a file."""
    own = {_key(at, part): part for at, host in hosts(model) for part in parts(host, (name,))}
    new = {_key(item.host_name, item.adapter): item.adapter for item in made}
    for at, *_ in sorted(own.keys() ^ new.keys()):
        there, here = (
            _said([type(part).__name__ for key, part in each.items() if key[0] == at]) for each in (new, own)
        )
        raise AdapterError(
            f'{where}: it has {there} on {at or "the root"}, and "{name}" has {here}. Load it under a name of its own.'
        )
    return [(key[0], part, new[key]) for key, part in own.items()]


def _key(host_name: str, part: Adapter) -> tuple[str, ...]:
    return host_name, *sorted(part.file_keys())


def _said(kinds: list[str]) -> str:
    return ", ".join(kinds) or "nothing"


def _given(host_name: str, own: Adapter, other: Adapter) -> tuple[list[tuple[Tensor, Tensor]], Adapter, dict[str, Any]]:
    try:
        if type(own) is not type(other):
            raise AdapterError(f"it is a {type(other).__name__}. Load it under a name of its own.")
        tensors, attributes = own.values_of(other)
        state = own.state_dict(keep_vars=True)
        for key, value in tensors.items():
            _require_room(key, state[key], value)
    except AdapterError as error:
        where = host_name or "the root"
        raise AdapterError(
            f'{where}: "{own.name}" there is a {type(own).__name__}, and cannot be refilled: {error}'
        ) from None
    return [(state[key], value) for key, value in tensors.items()], own, attributes


def _require_room(key: str, own: Tensor, value: Tensor) -> None:
    if own.is_meta or hasattr(own, "device_mesh"):
        raise AdapterError(f"{key} is {'on the meta device' if own.is_meta else 'a shard'}. Load under another name.")
    if own.shape != value.shape:
        raise AdapterError(
            f"{key} has shape {list(value.shape)}, and there is room for {list(own.shape)}. Load it under another name."
        )
    if torch.promote_types(own.dtype, value.dtype) != own.dtype:
        raise AdapterError(f"{key} is {value.dtype}, and {own.dtype} would round it. Load it under another name.")


def _forget_plans(model: nn.Module) -> None:
    """Rows that are routed now have worked out what each host's adapters are."""
    rows = require(model).rows
    if rows is not None:
        rows.plans.clear()

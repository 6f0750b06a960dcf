"""Hosts that were replaced, with their adapters, by something that knows nothing of these: noticed at the next call.

Beside each module around a host stands, by weak references, which child led to the host. A child is lost where now
another one stands that holds a state and leads to no host, while the first is nowhere in the model. What is gone, or
moved, or has something wrapped around it, is not: layers may be deleted, inserted and wrapped on purpose.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .._errors import AdapterError
from .adapter import Adapter
from .host import Adapters, Selection, adapters_of, is_host, parts
from .sharded import every_module


class _Child(NamedTuple):
    """What stood at one place on the way to hosts, and the names of the adapters there."""

    module: "weakref.ref[nn.Module]"
    names: set[str]


_children: weakref.WeakKeyDictionary[nn.Module, dict[str, _Child]] = weakref.WeakKeyDictionary()
_entries: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()  # an adapter's, of its table


def remember(model: nn.Module, placed: Sequence[tuple[str, nn.Module, Adapter]], holding: Iterable[str] = ()) -> None:
    """Notes the way to each host of these adapters, and to those that hold statistics for them; all of it, or none."""
    places = [(adapter.name, host_name) for host_name, _, adapter in placed]
    places += [(placed[0][2].name, host_name) for host_name in holding if placed]
    ways = [(name, step) for name, host_name in places for step in _way(model, host_name)]
    for name, (around, leaf, child) in ways:
        known = _children.setdefault(around, {})
        if leaf not in known or known[leaf].module() is not child:
            known[leaf] = _Child(weakref.ref(child), set())
        known[leaf].names.add(name)
    _entries.update((part, host.num_embeddings) for _, host, part in placed if isinstance(host, nn.Embedding))


def _way(model: Any, host_name: str) -> list[tuple[nn.Module, str, nn.Module]]:
    """From the model to the host: each module around it, the child's name there, and the child."""
    steps, around = [], model
    for leaf in host_name.split(".") if host_name else ():
        steps.append((around, leaf, around._modules[leaf]))
        around = steps[-1][2]
    return steps


def lost(model: nn.Module) -> Iterator[str]:
    """What was replaced, and what no longer fits, a sentence each."""
    modules = every_module(model)
    replaced, resized = _replaced(modules), _resized(modules)
    paths = _paths(model) if replaced or resized else {}
    for outer, leaf in replaced:
        where, now = f"{paths[id(outer)]}.{leaf}".lstrip("."), type(outer._modules[leaf]).__name__
        names = ", ".join(f'"{name}"' for name in sorted(_children[outer][leaf].names))
        yield f"{where} was replaced by another {now}, and {names} went with the first"
    for host, adapter in resized:
        where, now, then = paths[id(host)] or "the root", len(host.weight), _entries[adapter]
        yield f'{where} has {now} entries now, and "{adapter.name}" there was made for {then}'


def require_all_there(model: nn.Module, doing: str) -> None:
    for sentence in lost(model):
        raise AdapterError(
            f"{doing}: {sentence}. Inject there again, or eject, which forgets what is gone; to keep what was learned, "
            "merge and eject before such a change."
        )


def forget_lost(model: nn.Module, name: str | None = None) -> bool:
    """Gives up the adapter of this name, or all, wherever it was lost, and counts anew what is there."""
    gone = _replaced(every_module(model))
    for outer, leaf in gone:
        names = _children[outer][leaf].names
        names.difference_update([*names] if name is None else [name])
        if not names:
            del _children[outer][leaf]
            _drop_remains(outer.get_submodule(leaf))
    _recount(model)
    return bool(gone)


def note_renamed(model: nn.Module, old: str, new: str) -> None:
    for module in model.modules():
        for child in _children.get(module, {}).values():
            if old in child.names:
                child.names.symmetric_difference_update((old, new))


def _drop_remains(module: nn.Module) -> None:
    """torch's conversion to SyncBatchNorm takes over all children of the module that it replaces."""
    for inner in [*module.modules()]:
        if not is_host(inner) and isinstance(inner._modules.get("adapters"), Adapters):
            del inner._modules["adapters"]


def _recount(model: nn.Module) -> None:
    found: dict[Selection, dict[str, int]] = {}
    for host in model.modules():
        if is_host(host):
            count = found.setdefault(adapters_of(host).selection, {})
            for adapter in parts(host):
                count[adapter.name] = count.get(adapter.name, 0) + 1
    for selection, count in found.items():
        selection.count = {name: count[name] for name in selection.count if name in count}
        selection.active = tuple(name for name in selection.active if name in count)
        selection.weights = {name: weight for name, weight in selection.weights.items() if name in count}


def _paths(model: nn.Module) -> dict[int, str]:
    """The first name of each module, the adapters' too. It is asked where something is to be said: without names a walk
    takes half the time, and it is made at each call."""
    found, paths = [model], {id(model): ""}
    for module in found:
        for leaf, child in module._modules.items():
            if child is not None and id(child) not in paths:
                paths[id(child)] = f"{paths[id(module)]}.{leaf}".lstrip(".")
                found.append(child)
    return paths


def _replaced(modules: list[nn.Module]) -> list[tuple[nn.Module, str]]:
    """Places whose child was replaced: the module around, and the child's name there."""
    there = {id(module) for module in modules}
    return [
        (outer, leaf)
        for outer in modules
        if outer._modules
        for leaf, child in _children.get(outer, {}).items()
        if child.names and _stands_for(outer._modules.get(leaf), child.module(), there)
    ]


def _resized(modules: list[nn.Module]) -> list[tuple[nn.Embedding, Adapter]]:
    tables = [module for module in modules if isinstance(module, nn.Embedding) and is_host(module)]
    return [
        (host, adapter)
        for host in tables
        if _is_plain_table(host.weight)
        for adapter in parts(host)
        if _entries.get(adapter, len(host.weight)) != len(host.weight)
    ]


def _stands_for(now: nn.Module | None, before: nn.Module | None, there: set[int]) -> bool:
    if now is None or now is before or (before is not None and id(before) in there):
        return False
    return bool(now.state_dict()) and not any(map(is_host, now.modules()))


def _is_plain_table(table: Tensor) -> bool:
    return type(table) is nn.Parameter and table.dim() == 2

"""Merging: weight forms folded into the base, in float32 with one rounding, and every bit brought back."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import AdapterError
from .adapter import can_be_merged
from .host import Adapters, Selection, parts
from .lost import require_all_there
from .merged_weights import Folded, folded_by_host
from .progress import Progress, reported
from .sharded import settle
from .swap import brought_along, can_swap, give, hold, trade
from .walk import (
    adapters,
    all_hosts,
    base_modules,
    hosts,
    require,
    require_no_views,
    require_one_copy,
    require_scalable,
    require_unmerged,
    require_unrouted,
)
from .weights import Choice, Weights, chosen

_BACKUP = "_peftlib_backup"
_MERGED = "_peftlib_merged"  # of a buffer: the tensor that was merged into, and what takes its place at unmerge


def merge(model: nn.Module, *names: Choice, backup: str = "device", progress: Progress | None = None) -> None:
    r"""Folds adapters into the base weights, so that the model runs as fast as the base.

    .. math:: W \leftarrow \mathrm{round}(\mathrm{fold}(W)), \text{ computed in float32 or wider and rounded once}

    The model then is the base with exactly these adapters; what else was active is off until `unmerge`.
    All or nothing: a refusal or a failure leaves every weight as it was.

    Args:
        model: any module with adapters.
        *names: adapters to fold, in their nesting order, or mappings of them to weights, as in `activate`; default the
            active ones. A name alone has the weight with which it is active.
        backup: where the copies for `unmerge` are kept: "device" beside the weights, or "cpu".
        progress: called with how many modules are done, and how many there are; default a bar by tqdm, if it is
            installed, in a terminal and from the second second on.

    Raises:
        AdapterError: an absent name, a type that cannot be merged, a weight that another module shares, a parametrized
            weight, NaN or infinity, a model that is merged already, a live view.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2)
        >>> peftlib.merge(model)
        >>> peftlib.unmerge(model)
    """
    if backup not in ("device", "cpu"):
        raise ValueError(f'backup={backup!r}: expected "device" or "cpu"')
    selection, folded, weights = _ready_to_fold(model, names, "merge")
    written: list[tuple[nn.Module, str, Tensor]] = []
    try:
        with torch.no_grad():
            for _, items in _folded(model, folded, weights, "merge", progress):
                for item in items:
                    rounded = item.rounded()
                    kept, by_swap = hold(item.base, rounded, item.base.device if backup == "device" else "cpu")
                    written.append((item.owner, item.leaf, kept))
                    give(item.base, rounded, by_swap)
    except BaseException:
        _restore(written)
        raise
    for owner, leaf, kept in written:
        owner.__dict__.setdefault(_BACKUP, {})[leaf] = kept
        if leaf in owner._buffers:
            owner.__dict__.setdefault(_MERGED, {})[leaf] = (owner._buffers[leaf],) * 2
    selection.active_before_merge, selection.weights_before_merge = selection.active, selection.weights
    selection.merged, selection.weights, selection.active = folded, weights, ()


def _folded(
    model: nn.Module, names: tuple[str, ...], weights: Weights, doing: str, progress: Progress | None
) -> Iterator[tuple[nn.Module, list[Folded]]]:
    total = sum(bool(parts(host, names)) for host in all_hosts(model))
    return reported(folded_by_host(model, names, weights), total, doing, progress)


def unmerge(model: nn.Module) -> None:
    """Brings every bit of the base weights back from the copies that `merge` kept, and the selection as it was.

    Args:
        model: a model that is merged.

    Raises:
        AdapterError: the model is not merged, or it is a view or has live ones.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2)
        >>> peftlib.merge(model)
        >>> peftlib.unmerge(model)
    """
    settle(model)
    selection = require(model)
    require_no_views(selection, "unmerge")
    if not selection.merged:
        raise AdapterError(f"unmerge: {type(model).__name__} is not merged. Call merge first.")
    copies = [(o, leaf, id(kept)) for o in base_modules(model) for leaf, kept in o.__dict__.get(_BACKUP, {}).items()]
    try:
        for owner, leaf, _ in copies:
            _exchange(owner, leaf)
        forget_backups(model)
    except BaseException:
        for owner, leaf, kept in copies:
            if id(owner.__dict__[_BACKUP][leaf]) != kept:
                _exchange(owner, leaf)
        raise
    selection.merged, selection.active = (), selection.active_before_merge
    selection.weights, selection.weights_before_merge = selection.weights_before_merge, {}


@torch.no_grad()
def _exchange(owner: nn.Module, leaf: str) -> None:
    """A weight and its copy trade values, so that a failure further on can trade back.

    A model may have assigned another tensor to a buffer meanwhile, its input for one, which is the caller's: that is
    let go, and the one that was merged into takes its place again."""
    kept = owner.__dict__[_BACKUP]
    if leaf not in owner._buffers:
        kept[leaf] = trade(getattr(owner, leaf), kept[leaf], kept[leaf].device)
        return
    merged, next_there = owner.__dict__[_MERGED][leaf]
    found: Any = owner._buffers[leaf]
    if found is not None and found is not merged and next_there is merged:
        merged = next_there = brought_along(merged, found)
    kept[leaf] = trade(merged, kept[leaf], kept[leaf].device)
    owner.__dict__[_MERGED][leaf] = merged, found
    owner._buffers[leaf] = next_there


def base_weight(owner: nn.Module, leaf: str) -> Tensor:
    """A weight of the base, as it is without what may be merged into it."""
    kept = owner.__dict__.get(_BACKUP, ())
    return kept[leaf] if leaf in kept else getattr(owner, leaf)


def forget_backups(model: nn.Module) -> None:
    """Makes a merge final. The walk is over before the first copy goes: all of them go, or none."""
    for owner in base_modules(model):
        owner.__dict__.pop(_BACKUP, None)
        owner.__dict__.pop(_MERGED, None)


@contextlib.contextmanager
def merged(model: nn.Module, *names: Choice, backup: str = "device") -> Iterator[nn.Module]:
    """`merge` for the length of a `with` block; `unmerge` follows, after an exception too.

    Args:
        model: any module with adapters.
        *names: adapters to fold, as in `merge`; default the active ones.
        backup: "device" or "cpu", as in `merge`.

    Yields:
        nn.Module: the model itself, merged.

    Raises:
        AdapterError: as `merge`.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2)
        >>> with peftlib.merged(model):
        ...     output = model(torch.ones(1, 4))
    """
    merge(model, *names, backup=backup)
    try:
        yield model
    finally:
        unmerge(model)


def merged_state_dict(
    model: nn.Module, *names: Choice, progress: Progress | None = None
) -> Iterator[tuple[str, Tensor]]:
    """The base's state dict with adapters folded in, one tensor at a time, under the base's own keys.

    The model is not touched, and beyond it no more than one host's weights are held at once.

    Args:
        model: any module with adapters.
        *names: adapters to fold, as in `merge`; default the active ones, or the merged ones of a merged model.
        progress: as in `merge`.

    Returns:
        Iterator of (key, tensor), in the order of `state_dict()`.

    Raises:
        AdapterError: as `merge`; a model that is merged with other names.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2)
        >>> [key for key, tensor in peftlib.merged_state_dict(model)]
        ['0.weight', '0.bias']
    """
    settle(model)
    choice = chosen(names, "merged_state_dict")
    selection = require(model, choice.named)
    is_there = set(choice.names or selection.merged) == set(selection.merged)
    if selection.merged and is_there and choice.weights in (None, selection.weights):
        return _stream(model, iter(()))
    _, folded, weights = _ready_to_fold(model, names, "merged_state_dict", views_matter=False)
    return _stream(model, _folded(model, folded, weights, "merged_state_dict", progress))


@torch.no_grad()
def _stream(model: nn.Module, folded: Iterator[tuple[nn.Module, list[Folded]]]) -> Iterator[tuple[str, Tensor]]:
    ours = {name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, Adapters)}
    by_name = dict(hosts(model))
    state: dict[str, Tensor] = {
        k: v for k, v in model.state_dict(keep_vars=True).items() if not any(p in ours for p in _prefixes(k))
    }
    waiting = Counter(id(tensor) for tensor in state.values())
    done: set[int] = set()
    ready: dict[int, Tensor] = {}
    for key, tensor in state.items():
        for host in (by_name[prefix] for prefix in _prefixes(key) if prefix in by_name):
            while id(host) not in done and (step := next(folded, None)):
                done.add(id(step[0]))
                ready.update({id(item.base): item.rounded() for item in step[1]})
        waiting[id(tensor)] -= 1
        yield key, ready.get(id(tensor), tensor).detach()
        if not waiting[id(tensor)]:
            ready.pop(id(tensor), None)
    ready.update({id(item.base): item.base for _, items in folded for item in items})
    if ready:
        raise AdapterError(
            f"merged_state_dict: {len(ready)} merged weight(s) are not in state_dict(), so they would be lost. "
            "Merge in place instead, or make them persistent."
        )


def _prefixes(key: str) -> list[str]:
    """The modules around a key, outermost first: "a.b.weight" gives "", "a", "a.b"."""
    names = key.split(".")
    return [".".join(names[:i]) for i in range(len(names))]


def _ready_to_fold(
    model: nn.Module, choices: tuple[Choice, ...], doing: str, views_matter: bool = True
) -> tuple[Selection, tuple[str, ...], Weights]:
    settle(model)
    require_all_there(model, doing)
    choice = chosen(choices, doing)
    selection = require(model, choice.named)
    if views_matter:
        require_no_views(selection, doing)
    require_unmerged(selection, doing)
    require_unrouted(selection, doing)
    names = choice.names or (() if choice.named else selection.active)
    known = selection.weights if choice.weights is None else choice.weights
    require_one_copy(model, names, doing)
    require_scalable(model, choice.weights or (), doing)
    if not names:
        raise AdapterError(f"{doing}: no adapter is active. Name one of {', '.join(map(repr, selection.count))}.")
    found = next((part for host in all_hosts(model) for part in parts(host, names) if not can_be_merged(part)), None)
    if found is not None:
        host_name = next(host_name for host_name, _, adapter in adapters(model) if adapter is found)
        raise AdapterError(
            f'{doing}: "{found.name}" holds a {type(found).__name__} on {host_name or "the root"}, which cannot be '
            "merged. Leave it unmerged, or merge another name."
        )
    return selection, names, {name: known[name] for name in names if name in known}


def _restore(written: list[tuple[nn.Module, str, Tensor]]) -> None:
    with torch.no_grad():
        for owner, leaf, kept in reversed(written):
            weight = getattr(owner, leaf)
            give(weight, kept, can_swap(weight, kept))

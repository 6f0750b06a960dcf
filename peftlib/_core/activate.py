"""Choosing which adapters act and which train; each choice can be undone by leaving a `with` block."""

from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, TypeVar

from torch import nn

from .adapter import Adapter
from .clone import clone
from .host import Selection
from .merge import merge, unmerge
from .row_groups import Rows
from .table import html_table, table
from .walk import adapters, remember_view, require, require_one_copy, require_unmerged, share_selection

M = TypeVar("M", bound=nn.Module)


class Undo(Generic[M]):
    """What a choice returns: the choice stands; leaving a `with` block takes it back. It shows what acts by now."""

    def __init__(self, model: M, undo: Callable[[], object]) -> None:
        self._model, self._undo = model, undo

    def __repr__(self) -> str:
        said = [f"{name} {state} ({kinds})" for name, state, kinds, *_ in _what_acts(self._model)]
        return f"{type(self._model).__name__}: {', '.join(said)}"

    def __str__(self) -> str:
        return table(_ACTING, _what_acts(self._model))

    def _repr_html_(self) -> str:
        return html_table(_ACTING, _what_acts(self._model))

    def __enter__(self) -> M:
        return self._model

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._undo()


_ACTING = ("adapter", "state", "kinds", "parameters", "trainable")


def _what_acts(model: nn.Module) -> list[tuple[Any, ...]]:
    """Of each adapter, in the order in which they came in: its state, the types of its parts, and what trains."""
    found: dict[str, list[Adapter]] = {}
    for _, name, adapter in adapters(model):
        found.setdefault(name, []).append(adapter)
    selection = share_selection(model)
    return [(name, _state(selection, name), _kinds(parts), *_sizes(parts)) for name, parts in found.items()]


def _state(selection: Selection, name: str) -> str:
    acts = "active" if selection.rows is None else "routed"
    return "merged" if name in selection.merged else acts if name in selection.active else "off"


def _kinds(parts: list[Adapter]) -> str:
    return ", ".join(f"{kind} ×{count}" for kind, count in Counter(type(part).__name__ for part in parts).items())


def _sizes(parts: list[Adapter]) -> tuple[int, int]:
    own = {id(p): p for part in parts for p in part.parameters()}.values()
    return sum(p.numel() for p in own), sum(p.numel() for p in own if p.requires_grad)


def activate(model: M, *names: str) -> Undo[M]:
    """Makes exactly these adapters act, their effects summed; with no name, the base alone.

    Costs one bare walk over the modules, and moves no `requires_grad` (`train_only` does); a `view` needs no walk. A
    merged model is unmerged for it, and merged again when a `with` block is left.

    Args:
        model: a model with adapters.
        *names: adapters; default none.

    Returns:
        A context manager whose exit brings the previous choice back; using it is optional.

    Raises:
        AdapterError: an absent name, two adapters that each have a copy (`Full`) of one weight, a merged model that has
            a live view.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2)
        >>> with peftlib.activate(model):
        ...     base_output = model(torch.ones(1, 4))
    """
    selection = require(model, names)
    require_one_copy(model, names, "activate")
    return choose(model, selection, tuple(dict.fromkeys(names)), None)


def choose(model: M, selection: Selection, names: tuple[str, ...], rows: Rows | None) -> Undo[M]:
    merged = selection.merged
    if merged:
        unmerge(model)
    before = selection.active, selection.rows
    selection.active, selection.rows = names, rows
    return Undo(model, lambda: _choose_again(model, selection, *before, merged))


def _choose_again(
    model: nn.Module, selection: Selection, names: tuple[str, ...], rows: Rows | None, merged: tuple[str, ...]
) -> None:
    """A model that was merged inside the block goes back to the choice when it is unmerged."""
    known, folded = (tuple(name for name in each if name in selection.count) for each in (names, merged))
    if selection.merged:
        selection.active_before_merge = known
        return
    selection.active, selection.rows = known, rows if known == names else None
    if folded:
        merge(model, *folded)


def train_only(model: M, *names: str) -> Undo[M]:
    """Sets `requires_grad` on exactly the parameters of these adapters, and off on those of all others.

    Args:
        model: a model with adapters.
        *names: adapters; default none.

    Returns:
        A context manager whose exit brings the previous flags back; using it is optional.

    Raises:
        AdapterError: an absent name.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2, name="first")
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2, name="second")
        >>> _ = peftlib.train_only(model, "second")
    """
    require(model, names)
    before = [(p, p.requires_grad) for _, _, adapter in adapters(model) for p in adapter.parameters()]
    for _, name, adapter in adapters(model):
        adapter.requires_grad_(name in names)
    return Undo(model, lambda: [p.requires_grad_(on) for p, on in before])


def view(model: M, *names: str) -> M:
    """A view of the model: the same parameters and buffers, with a selection of its own.

    Threads, or compiled graphs, can so hold different adapters of one base at the same time. While a view is alive,
    inject, load, merge, unmerge and eject are refused on the model, and always through the view itself.

    Args:
        model: a model with adapters; it must survive `copy.deepcopy`.
        *names: adapters that act in the view; default none, the base alone.

    Returns:
        A module of the same class. It ends when nothing refers to it any more.

    Raises:
        AdapterError: an absent name, a merged model.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2)
        >>> base = peftlib.view(model)
        >>> base[0].weight is model[0].weight
        True
    """
    original = require(model, names)
    require_unmerged(original, "view")
    require_one_copy(model, names, "view")
    other: Any = clone(model)
    selection = require(other)
    selection.active, selection.rows = tuple(dict.fromkeys(names)), None
    remember_view(original, selection)
    return other

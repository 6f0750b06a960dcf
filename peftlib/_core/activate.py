"""Choosing which adapters act and which train; each choice can be undone by leaving a `with` block."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, TypeVar

from torch import nn

from .clone import clone
from .host import Selection
from .merge import merge, unmerge
from .row_groups import Rows
from .walk import adapters, remember_view, require, require_one_copy, require_unmerged

M = TypeVar("M", bound=nn.Module)


class Undo(Generic[M]):
    """What a choice returns: the choice stands; leaving a `with` block takes it back."""

    def __init__(self, model: M, undo: Callable[[], object]) -> None:
        self._model, self._undo = model, undo

    def __enter__(self) -> M:
        return self._model

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._undo()


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

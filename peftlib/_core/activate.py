"""Choosing which adapters act and which train; each choice can be undone by leaving a `with` block."""

from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, TypeVar

from torch import nn

from .adapter import Adapter
from .averaged import require_averaged
from .clone import clone
from .host import Selection
from .merge import merge, unmerge
from .row_groups import Rows
from .sharded import require_no_units, settle
from .table import html_table, table
from .walk import (
    adapters,
    all_hosts,
    one_selection,
    remember_view,
    require,
    require_one_copy,
    require_scalable,
    require_unmerged,
)
from .weights import Choice, Chosen, Weights, chosen, with_weight

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
    selection = one_selection(all_hosts(model))
    return [(name, _state(selection, name), _kinds(parts), *_sizes(parts)) for name, parts in found.items()]


def _state(selection: Selection, name: str) -> str:
    acts = "active" if selection.rows is None else "routed"
    state = "merged" if name in selection.merged else acts if name in selection.active else "off"
    return with_weight(state, selection.weights.get(name, 1.0))


def _kinds(parts: list[Adapter]) -> str:
    return ", ".join(f"{kind} ×{count}" for kind, count in Counter(type(part).__name__ for part in parts).items())


def _sizes(parts: list[Adapter]) -> tuple[int, int]:
    own = {id(p): p for part in parts for p in part.parameters()}.values()
    return sum(p.numel() for p in own), sum(p.numel() for p in own if p.requires_grad)


def activate(model: M, *names: Choice) -> Undo[M]:
    r"""Makes exactly these adapters act, their effects summed; with no name, the base alone.

    .. math:: y = \mathrm{model}_{W + \sum_i w_i \Delta W_i}(x), \qquad w_i = 1 \text{ unless it is said}

    A mapping gives adapters a weight, on top of their own scale: of an adapter with a merged weight it multiplies the
    change of the weight, of a `Bottleneck` and a gated `Prefix` what they add. Nothing is copied, and under
    `torch.compile` another value is no other graph. A weight of 1 is none, and 0 switches an adapter off.

    Costs one bare walk over the modules, and moves no `requires_grad` (`train_only` does); a `view` needs no walk. A
    merged model is unmerged for it, and merged again when a `with` block is left.

    Args:
        model: a model with adapters.
        *names: adapters, or mappings of adapters to their weights; default none.

    Returns:
        A context manager whose exit brings the previous choice back; using it is optional.

    Raises:
        AdapterError: an absent name, two adapters that each have a copy (`Full`) of one weight, a merged model that has
            a live view; a weight that is no finite number, or of an adapter that cannot be scaled (`Prompt`, a `Prefix`
            without gate, `Full` on running statistics).

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2)
        >>> with peftlib.activate(model):
        ...     base_output = model(torch.ones(1, 4))
        >>> with peftlib.activate(model, {"default": 0.7}):
        ...     weaker = model(torch.ones(1, 4))
    """
    selection, choice = _known(model, names, "activate")
    return choose(model, selection, choice.names, choice.weights or {}, None)


def _known(model: nn.Module, names: tuple[Choice, ...], doing: str) -> tuple[Selection, Chosen]:
    choice = chosen(names, doing)
    selection = require(model, choice.named)
    require_one_copy(model, choice.names, doing)
    require_scalable(model, choice.weights or (), doing)
    return selection, choice


def choose(model: M, selection: Selection, names: tuple[str, ...], weights: Weights, rows: Rows | None) -> Undo[M]:
    merged = (selection.merged, selection.weights) if selection.merged else None
    if merged:
        unmerge(model)
    before, count = (selection.active, selection.weights, selection.rows), dict(selection.count)
    selection.active, selection.weights, selection.rows = names, weights, rows

    def undo() -> None:
        if before[-1] is None and selection.count != count:  # what came in since may be a copy of what one of these has
            require_one_copy(model, before[0], "the end of activate")
        _choose_again(model, selection, *before, merged)

    return Undo(model, undo)


def _choose_again(
    model: nn.Module,
    selection: Selection,
    names: tuple[str, ...],
    weights: Weights,
    rows: Rows | None,
    merged: tuple[tuple[str, ...], Weights] | None,
) -> None:
    """A model that was merged inside the block goes back to the choice when it is unmerged."""
    known = tuple(name for name in names if name in selection.count)
    weights = {name: weights[name] for name in known if name in weights}
    if selection.merged:
        selection.active_before_merge, selection.weights_before_merge = known, weights
        return
    selection.active, selection.weights, selection.rows = known, weights, rows if known == names else None
    if merged:
        folded, own = merged
        numbers = {name: own[name].item() if name in own else 1.0 for name in folded if name in selection.count}
        merge(model, *([numbers] if numbers else []))


def train_only(model: M, *names: str) -> Undo[M]:
    """Sets `requires_grad` on exactly the parameters of these adapters, and off on those of all others.

    Args:
        model: a model with adapters.
        *names: adapters; default none.

    Returns:
        A context manager whose exit brings the previous flags back; using it is optional.

    Raises:
        AdapterError: an absent name, an adapter that did not train when a DistributedDataParallel was made around it.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2, name="first")
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2, name="second")
        >>> _ = peftlib.train_only(model, "second")
    """
    require(model, names)
    settle(model)
    wanted = [p for _, name, adapter in adapters(model) if name in names for p in adapter.parameters()]
    require_averaged("train_only", wanted, "Choose before DistributedDataParallel, or make a new one")
    before = [(p, p.requires_grad) for _, _, adapter in adapters(model) for p in adapter.parameters()]
    for _, name, adapter in adapters(model):
        adapter.requires_grad_(name in names)
    return Undo(model, lambda: _flag_again(model, before))


def _flag_again(model: nn.Module, flags: list[tuple[nn.Parameter, bool]]) -> None:
    settle(model)
    for parameter, on in flags:
        parameter.requires_grad_(on)


def view(model: M, *names: Choice) -> M:
    """A view of the model: the same parameters and buffers, with a selection of its own.

    Threads, or compiled graphs, can so hold different adapters of one base at the same time. While a view is alive,
    inject, load, merge, unmerge and eject are refused on the model, and always through the view itself.

    Args:
        model: a model with adapters; it must survive `copy.deepcopy`.
        *names: adapters that act in the view, as in `activate`; default none, the base alone.

    Returns:
        A module of the same class. It ends when nothing refers to it any more.

    Raises:
        AdapterError: a merged model, one that `fully_shard` gathers call by call, and what `activate` refuses.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2)
        >>> base = peftlib.view(model)
        >>> base[0].weight is model[0].weight
        True
    """
    original, choice = _known(model, names, "view")
    require_unmerged(original, "view")
    require_no_units(model, "view", "Switch with activate, or route the rows of one batch")
    other: Any = clone(model)
    selection = require(other)
    selection.active, selection.weights, selection.rows = choice.names, choice.weights or {}, None
    remember_view(original, selection)
    return other

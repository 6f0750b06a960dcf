"""An adapter under another name: renamed where it is, or copied beside itself."""

from copy import deepcopy
from typing import Any

from torch import nn

from .._errors import AdapterError
from .host import Selection, adapters_of, all_or_nothing
from .inject import install, placed_in, require_changeable, require_name
from .lost import note_renamed
from .walk import all_hosts, require


def rename(model: nn.Module, old: str, new: str) -> None:
    """Gives an adapter another name: its parameters, its place and whether it is active stay as they are.

    Args:
        model: a model with adapters.
        old: the adapter.
        new: its name from now on; keys of the model's state dict that hold the old one hold this.

    Raises:
        AdapterError: an absent name, a name that is taken or cannot be one, a merged or routed model, a live view.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2)
        >>> peftlib.rename(model, "default", "reviews")
        >>> [name for _, name, _ in peftlib.adapters(model)]
        ['reviews']
    """
    selection = require_new(model, new, (old,), "rename")
    with all_or_nothing(model):
        for host in all_hosts(model):
            _rename_on(host, old, new)
        _rename_in(selection, old, new)
        note_renamed(model, old, new)


def copy(model: nn.Module, old: str, new: str) -> None:
    """Puts a copy of an adapter beside it, with parameters of its own, of the same values and flags.

    The copy is off until it is activated, for with both the effect would be twice as large.

    Args:
        model: a model with adapters.
        old: the adapter.
        new: the name of the copy.

    Raises:
        AdapterError: an absent name, a name that is taken or cannot be one, a merged or routed model, a live view.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2)
        >>> peftlib.copy(model, "default", "before")
        >>> _ = peftlib.activate(model, "before")
    """
    require_new(model, new, (old,), "copy")
    shared: dict[int, object] = {}  # what two parts of the adapter share, two parts of the copy share
    placed = [item._replace(adapter=deepcopy(item.adapter, shared)) for item in placed_in(model, old)]
    for item in placed:
        item.adapter.name = new
    install(model, placed, freeze=False, active=False)


def require_new(model: nn.Module, new: str, old: tuple[str, ...], doing: str) -> Selection:
    """That a new adapter may come under this name, beside these."""
    require_name(new)
    require_changeable(model, doing)
    selection = require(model, old)
    if new in selection.count:
        raise AdapterError(
            f"{doing}: {type(model).__name__} has an adapter named {new!r} already. Eject it, or choose another name."
        )
    return selection


def _rename_on(host: nn.Module, old: str, new: str) -> None:
    children: Any = adapters_of(host)._modules
    before = [*children.items()]
    children.clear()
    for key, adapter in before:
        name, colon, number = key.partition(":")
        children[new + colon + number if name == old else key] = adapter
        if name == old:
            adapter.name = new


def _rename_in(selection: Selection, old: str, new: str) -> None:
    def called(name: str) -> str:
        return new if name == old else name

    selection.active = tuple(map(called, selection.active))
    selection.weights = {called(name): weight for name, weight in selection.weights.items()}
    selection.count = {called(name): count for name, count in selection.count.items()}

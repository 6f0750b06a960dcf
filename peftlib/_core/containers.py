"""An adapted Sequential, ModuleList or ModuleDict keeps its own length, items and slices: the adapters are no item."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

CHILD = "adapters"  # the name under which a host holds its adapters

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NOT_OF_ITEMS = {"__init__", "__repr__", "__dir__", "forward"}


def methods_of_items(cls: type) -> dict[str, Callable[..., Any]]:
    """What an adapted class of containers has in place of the container's methods."""
    bases = [base for base in _CONTAINERS if issubclass(cls, base)]
    names = {name for base in bases for name, item in vars(base).items() if callable(item)} - _NOT_OF_ITEMS
    methods = {name: _on_items_alone(cls, name) for name in names}
    own_iter: Any = getattr(cls, "__iter__", None)
    if own_iter in [base.__iter__ for base in bases]:  # in plain steps, which torch.compile can trace
        methods |= {"__iter__": _iterate_names if issubclass(cls, nn.ModuleDict) else _iterate, "__len__": _length}
    return methods


def _items(host: Any) -> dict[str, Any]:
    return {name: module for name, module in host._modules.items() if name != CHILD}


def _iterate(self: Any) -> Iterator[nn.Module]:
    return iter(list(_items(self).values()))


def _iterate_names(self: Any) -> Iterator[str]:
    return iter(list(_items(self)))


def _length(self: Any) -> int:
    return len(self._modules) - 1


def _on_items_alone(cls: Any, name: str) -> Callable[..., Any]:
    """The container's own method, run on a stand-in that has the items and no adapters; what it changes is then taken
    over. Other threads see the host whole at any time."""
    method = getattr(cls, name)

    @functools.wraps(method)
    def on_items(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = _items(self)
        stand_in = object.__new__(cls)
        stand_in.__dict__.update(self.__dict__, _modules=dict(before))
        result = method(stand_in, *args, **kwargs)
        after = stand_in._modules
        if list(after.items()) != list(before.items()):
            _take_over(self._modules, after)
        return self if result is stand_in else result

    return on_items


def _take_over(modules: dict[str, Any], items: dict[str, Any]) -> None:
    """The adapters stay last, behind what was appended."""
    adapters = modules[CHILD]
    modules.clear()
    modules.update(items)
    modules[CHILD] = adapters

"""What a file asks for before it is trusted: its keywords are checked, and what they may allocate is bounded."""

import collections.abc
import inspect
import types
import typing
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .._core.adapter import Adapter
from .._errors import AdapterError

_LISTS = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_DICTS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


def require_keywords(kind: type[Adapter], config: dict[str, Any]) -> None:
    """Names by the signature, values by its annotations; what is not annotated is the constructor's own to check."""
    _, *keywords = inspect.signature(kind).parameters.values()
    known = {one.name: one for one in keywords if one.kind is not inspect.Parameter.VAR_KEYWORD}
    hints = _hints(kind)
    for key, value in config.items():
        if key not in known and len(known) == len(keywords):
            raise AdapterError(f"unexpected keyword {key!r}: {kind.__name__} takes {', '.join(known) or 'none'}")
        if key in known and not _fits(value, hints.get(key, Any)):
            expected = inspect.formatannotation(hints[key])
            raise AdapterError(f"{key}={value!r}, where {kind.__name__} takes {expected}")


def _hints(kind: type[Adapter]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind.__init__)
    except (NameError, TypeError):  # an annotation for the checker alone
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value that JSON can hold is of the type."""
    origin, inside = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inside)
    if origin is typing.Literal:
        return any(type(value) is type(one) and value == one for one in inside)
    if origin in _LISTS:
        one = inside[0] if inside else Any
        return isinstance(value, list) and all(_fits(item, one) for item in value)
    if origin in _DICTS:
        one = inside[-1] if inside else Any
        return isinstance(value, dict) and all(_fits(item, one) for item in value.values())
    taken = {
        float: (int, float),
        torch.dtype: (str,),
        int: (int,),
        bool: (bool,),
        str: (str,),
        type(None): (type(None),),
    }
    return origin not in taken or type(value) in taken[origin]


class Bounded(TorchDispatchMode):
    """Inside, each operation is asked on the meta device for the size of its result before it runs."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nobody traces a load; torch would import its compiler, in 1.3 s, to be left alone by it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        size = 0 if _is_on_meta(args, kwargs) else _size_of_result(func, args, kwargs)
        if size > self.limit:
            raise AdapterError(f"{func} would take {size:,} bytes, and {self.limit:,} are what this file may ask for")
        return func(*args, **kwargs)


def _is_on_meta(args: Any, kwargs: Any) -> bool:
    device = kwargs.get("device")
    if device is None and args and isinstance(args[0], Tensor):
        device = args[0].device
    return device is not None and torch.device(device).type == "meta"


def _size_of_result(func: Any, args: Any, kwargs: Any) -> int:
    made = any(argument.name == "device" for argument in func._schema.arguments)
    kwargs = {**kwargs, "device": torch.device("meta")} if made else kwargs
    try:
        result = func(*tree_map(_shape_only, args), **tree_map(_shape_only, kwargs))
    except (NotImplementedError, RuntimeError):  # it depends on values: `item`, `nonzero`, and others as small
        return 0
    return sum(leaf.untyped_storage().nbytes() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))


def _shape_only(item: Any) -> Any:
    return torch.empty_like(item, device="meta") if isinstance(item, Tensor) else item

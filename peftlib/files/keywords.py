"""Keywords that come from a file, checked against what the kind's constructor says that it takes."""

import collections.abc
import inspect
import types
import typing
from typing import Any

import torch

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

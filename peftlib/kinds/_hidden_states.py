"""The hidden states in what a module is given and in what it returns."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .._errors import AdapterError

# In a dict, or a transformers ModelOutput: the first of these that is there, else the first tensor.
_KEYS = ("last_hidden_state", "hidden_states", "logits")


def with_hidden_states(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`output` with its hidden states changed and all else passed on: a tensor itself, the first item of a tuple or a
    list, one entry of a dict; the same inside such an item."""
    if isinstance(output, Tensor) and output.is_floating_point():
        return change(output)
    if isinstance(output, (tuple, list)) and output:
        items = [with_hidden_states(output[0], change), *output[1:]]
        make: Callable[[Any], Any] = getattr(output, "_make", type(output))
        return make(items)
    if isinstance(output, dict):
        key = _key_of(output)
        return _with_entry(output, key, with_hidden_states(output[key], change))
    found = str(output.dtype) if isinstance(output, Tensor) else type(output).__name__
    raise AdapterError(
        f"the host returned {found}, in which there are no hidden states: they are a floating-point tensor, the first "
        "item of a tuple or a list, or an entry of a dict. Adapt a module inside it."
    )


def _key_of(output: Mapping[str, Any]) -> str:
    tensors = [key for key, value in output.items() if isinstance(value, Tensor) and value.is_floating_point()]
    for key in (*(key for key in _KEYS if key in tensors), *tensors):
        return key
    raise AdapterError(
        f"the host returned {type(output).__name__} with {', '.join(map(str, output)) or 'nothing'}, and none of these "
        "is a floating-point tensor. Adapt a module inside it."
    )


def _with_entry(output: Any, key: str, value: Any) -> Any:
    if dataclasses.is_dataclass(output):
        return dataclasses.replace(output, **{key: value})  # pyright: ignore[reportArgumentType]
    copy = output.copy()
    copy[key] = value
    return copy


def input_of(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What the host was called with first, by position or under the name that its forward gives it."""
    x = args[0] if args else kwargs.get(name)
    if isinstance(x, Tensor) and x.is_floating_point():
        return x
    found = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
    raise AdapterError(
        f"the host was called with {found} for {name!r}, its first argument, and a floating-point tensor is needed "
        'there. Use position="after", or adapt another module.'
    )

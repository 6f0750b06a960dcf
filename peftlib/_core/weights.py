"""The weights of a choice of adapters: each adapter's effect times a number, on top of its own scale."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from .._errors import AdapterError

Weights = dict[str, Tensor]  # [], float64; without those that are 1
Choice = str | Mapping[str, float]


class Chosen(NamedTuple):
    """All that were named, those of them that act, and their weights; None where no weight was said."""

    named: tuple[str, ...]
    names: tuple[str, ...]
    weights: Weights | None


def chosen(choices: tuple[Choice, ...], doing: str) -> Chosen:
    """What was asked for by names and mappings of names to weights. With a weight of 0 an adapter is off, and not
    multiplied by zero: what is not finite in it reaches nothing."""
    numbers: dict[str, float] = {}
    for choice in choices:
        if not isinstance(choice, (str, Mapping)):
            return Chosen((choice,), (), None)  # `require` refuses it, and knows the names that there are
        numbers |= _checked(choice, doing) if isinstance(choice, Mapping) else {choice: 1.0}
    weights = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items() if value not in (0, 1)}
    said = any(isinstance(choice, Mapping) for choice in choices)
    return Chosen(tuple(numbers), tuple(name for name in numbers if numbers[name]), weights if said else None)


def _checked(choice: Mapping[str, float], doing: str) -> dict[str, float]:
    for name, value in choice.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise AdapterError(
                f"{doing}: the weight of {name!r} is {value!r}, which is no finite number. Pass {{{name!r}: 0.5}}, say."
            )
    return {name: float(value) for name, value in choice.items()}


def blended(own: Tensor, value: Tensor, weight: float | Tensor) -> Tensor:
    """own + w (value − own), in float32 or wider."""
    wide = torch.promote_types(torch.promote_types(own.dtype, value.dtype), torch.float32)
    own = own.to(wide)
    return own + weight * (value.to(wide) - own)


def with_weight(state: str, weight: float | Tensor) -> str:
    """For people: "active", or "active ×0.7"."""
    return state if weight == 1 else f"{state} ×{float(weight):g}"

"""A lazy weight whose rows have a gain: what multiplies with it does so without, and the gain goes to the thin side."""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core.lazy_weight import SCALED, LazyWeight
from ._lazy_products import is_right_of

_MATRIX_TRANSPOSE, _TRANSPOSE = (getattr(Tensor, name).__get__ for name in ("mT", "T"))


def _scaled(*functions: Any) -> Callable[[Any], Any]:
    def register(rule: Any) -> Any:
        SCALED.update(dict.fromkeys(functions, rule))
        return rule

    return register


def _times(x: Tensor, gain: Tensor) -> Tensor:
    return (x * gain).to(x.dtype)


@_scaled(F.linear)
def _linear(linear: Any, input: Any, weight: Any, bias: Any = None) -> Any:
    if not is_right_of(input, weight):
        return NotImplemented
    if weight.across:
        return linear(_times(input, weight.gain), weight.plain, bias)
    y = _times(linear(input, weight.plain), weight.gain)
    return y if bias is None else y + bias


@_scaled(torch.matmul, Tensor.matmul, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm)
def _matmul(product: Any, input: Any, other: Any) -> Any:
    if is_right_of(input, other):
        if input.dim() == 1:
            return NotImplemented
        gain = other.gain.unsqueeze(-2)
        if other.across:
            return _times(product(input, other.plain), gain)
        return product(_times(input, gain), other.plain)
    if not is_right_of(other, input) or other.dim() == 1:
        return NotImplemented
    gain = input.gain.unsqueeze(-1)
    if input.across:
        return product(input.plain, _times(other, gain))
    return _times(product(input.plain, other), gain)


@_scaled(vars(torch)["_grouped_mm"], "transformers::grouped_mm_fallback")
def _grouped(product: Any, mat_a: Any, mat_b: Any, offs: Any = None, **options: Any) -> Any:
    if not is_right_of(mat_a, mat_b) or offs is None or options.get("bias") is not None:
        return NotImplemented
    tokens = torch.arange(len(mat_a), dtype=offs.dtype, device=offs.device)
    experts = torch.searchsorted(offs, tokens, right=True).clamp(max=len(mat_b.gain) - 1)
    gain = mat_b.gain[experts]
    if mat_b.across:
        return _times(product(mat_a, mat_b.plain, offs=offs, **options), gain)
    return product(_times(mat_a, gain), mat_b.plain, offs=offs, **options)


@_scaled(Tensor.__getitem__)
def _getitem(get: Any, weight: Any, index: Any) -> Any:
    """Of the first dimension of a stack alone: what a tuple picks has rows of its own."""
    if weight.stack != 1 or not isinstance(index, (int, slice, list, Tensor)):
        return NotImplemented
    part, at = get(weight.plain, index), cast(Any, index)
    is_one = isinstance(part, LazyWeight) and not part.stack
    return _with_gain(weight, part, lambda: _gains(weight)[int(at)] if is_one else weight.gain[index])


@_scaled(torch.unbind, Tensor.unbind)
def _unbind(_: Any, weight: LazyWeight, dim: int = 0) -> Any:
    if dim % weight.base.dim() or weight.stack != 1:
        return NotImplemented
    return tuple(_getitem(Tensor.__getitem__, weight, index) for index in range(len(weight.base)))


def _gains(weight: Any) -> Any:
    """Taken apart once, as the factors are."""
    if weight.experts is None:
        weight.experts = weight.gain.unbind(0)
    return weight.experts


@_scaled(_MATRIX_TRANSPOSE, _TRANSPOSE, torch.transpose, Tensor.transpose, Tensor.t, torch.t)
def _turned(turn: Any, weight: LazyWeight, *dims: int) -> Any:
    last, of_all = weight.base.dim(), not dims and turn != _MATRIX_TRANSPOSE
    if {dim % last for dim in dims or (-1, -2)} != {last - 1, last - 2} or (of_all and weight.stack):
        return NotImplemented
    turned = _with_gain(weight, turn(weight.plain, *dims), lambda: weight.gain)
    turned.across = not weight.across
    return turned


@_scaled(Tensor.to, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.contiguous)
def _cast(to: Any, weight: LazyWeight, *args: Any, **options: Any) -> Any:
    plain = to(weight.plain, *args, **options)
    return weight if plain is weight.plain else _with_gain(weight, plain, lambda: weight.gain)


def _with_gain(weight: LazyWeight, plain: Any, gain: Callable[[], Any]) -> Any:
    if not isinstance(plain, LazyWeight):
        return NotImplemented
    return plain.like(plain.base, plain.changes).scaled(gain().to(plain.base.device), plain, weight.across)

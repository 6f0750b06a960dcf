"""Views of a lazy weight: what picks experts, rows or columns, or turns the matrix, gives a lazy weight again."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._core.lazy_weight import RULES, LazyWeight, LowRank

Change = Callable[[Tensor], Tensor]
_ALL = slice(None)
_MATRIX_TRANSPOSE, _TRANSPOSE = (getattr(Tensor, name).__get__ for name in ("mT", "T"))


def _rule_for(*functions: Any) -> Callable[[Any], Any]:
    """Registers a rule that is asked only where the first argument is the lazy weight."""

    def register(rule: Any) -> Any:
        def where_lazy(function: Any, weight: Any, *args: Any, **options: Any) -> Any:
            return rule(function, weight, *args, **options) if isinstance(weight, LazyWeight) else NotImplemented

        RULES.update(dict.fromkeys(functions, where_lazy))
        return rule

    return register


def _mapped(weight: LazyWeight, base: Change, left: Change, right: Change) -> LazyWeight:
    return weight.like(base(weight.base), tuple(change.mapped(left, right) for change in weight.changes))


def _alike(weight: LazyWeight, change: Change) -> LazyWeight:
    return _mapped(weight, change, change, change)


@_rule_for(Tensor.__getitem__)
def _getitem(_: Any, weight: LazyWeight, index: Any) -> Any:
    if weight.stack == 1 and _is_one(index):
        return _expert(weight, int(index))
    if not weight.stack and weight.is_matrix and _are_numbers(index):
        return _rows(weight, index)
    picked = _split_index(weight, index if isinstance(index, tuple) else (index,))
    if picked is None:
        return NotImplemented
    lead, row, rest = picked
    return _mapped(
        weight, lambda W: W[(*lead, row, *rest)], lambda L: L[(*lead, row)], lambda R: R[(*lead, _ALL, *rest)]
    )


def _is_one(index: Any) -> bool:
    return type(index) is int or (_are_numbers(index) and index.dim() == 0)


def _are_numbers(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)


def _rows(weight: LazyWeight, index: Tensor) -> Any:
    """Rows of one matrix, as an embedding looks them up."""
    if any(change.dropout for change in weight.changes):
        return NotImplemented
    y = weight.base[index]
    for change in weight.changes:
        y = torch.add(y, change.picked(_picker(index)).to(y.dtype))
    return y


def _picker(index: Tensor) -> Change:
    return lambda left: left[index]


def _expert(weight: LazyWeight, index: int) -> LazyWeight:
    """One matrix of the stack. The factors' stacks are taken apart once, for all that are picked: the gradient of an
    index would be a stack of zeros for each one, over a loop of 32 experts twice the bytes of W."""
    if weight.experts is None:
        weight.experts = [_apart(change) for change in weight.changes]
    changes = tuple(
        LowRank(pairs[index], change.scale, change.dropout, change.adapter)  # a third of what `_replace` takes
        for change, pairs in zip(weight.changes, weight.experts, strict=True)
    )
    return weight.like(weight.base[index], changes)


def _apart(change: LowRank) -> list[Any]:
    """The pairs of each expert."""
    return list(zip(*(zip(L.unbind(0), R.unbind(0), strict=True) for L, R in change.pairs), strict=True))


def _split_index(weight: LazyWeight, index: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any, tuple[Any, ...]] | None:
    """What of an index falls on the stack, on the rows and on the rest; None unless it keeps rows and rest by slices.

    Nothing of the index is then behind an index by tensor, so each part picks alike from W, L and R."""
    full = _without_ellipsis(weight.base.dim(), index)
    if full is None:
        return None
    lead, (row, *rest) = full[: weight.stack], full[weight.stack :]
    if not all(isinstance(each, slice) for each in (row, *rest)) or any(_changes_dimensions(each) for each in lead):
        return None
    return lead, row, tuple(rest)


def _changes_dimensions(index: Any) -> bool:
    is_mask = isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
    return index is None or isinstance(index, bool) or (is_mask and index.dim() != 1)


def _without_ellipsis(dim: int, index: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """One entry for each dimension."""
    dots = [place for place, each in enumerate(index) if each is Ellipsis]
    missing = dim - (len(index) - len(dots))
    if len(dots) > 1 or missing < 0:
        return None
    place = dots[0] if dots else len(index)
    return (*index[:place], *[_ALL] * missing, *index[place + len(dots) :])


@_rule_for(Tensor.unbind, torch.unbind)
def _unbind(_: Any, weight: LazyWeight, dim: int = 0) -> Any:
    if dim % weight.base.dim() or weight.stack != 1:
        return NotImplemented
    return tuple(_expert(weight, index) for index in range(len(weight.base)))


@_rule_for(Tensor.select, torch.select)
def _select(_: Any, weight: LazyWeight, dim: int, index: int) -> Any:
    place = dim % weight.base.dim()
    return _getitem(_, weight, (*[_ALL] * place, index) if place else index)


@_rule_for(Tensor.narrow, torch.narrow)
def _narrow(_: Any, weight: LazyWeight, dim: int, start: int, length: int) -> Any:
    return _getitem(_, weight, (*[_ALL] * (dim % weight.base.dim()), slice(start, start + length)))


@_rule_for(Tensor.index_select, torch.index_select)
def _index_select(_: Any, weight: LazyWeight, dim: int, index: Tensor) -> Any:
    if dim % weight.base.dim() >= weight.stack:
        return NotImplemented
    return _alike(weight, lambda each: each.index_select(dim % weight.base.dim(), index))


@_rule_for(Tensor.chunk, torch.chunk, Tensor.split, torch.split, Tensor.tensor_split, torch.tensor_split)
def _split(function: Any, weight: LazyWeight, parts: Any, dim: int = 0) -> Any:
    dim %= weight.base.dim()
    sizes = [part.shape[dim] for part in function(weight.base, parts, dim)]
    ends = itertools.accumulate(sizes)
    return tuple(_narrow(function, weight, dim, end - size, size) for end, size in zip(ends, sizes, strict=True))


@_rule_for(Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes, Tensor.swapdims, torch.swapdims)
def _transpose(_: Any, weight: LazyWeight, dim0: int, dim1: int) -> Any:
    order = list(range(weight.base.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(_, weight, order)


@_rule_for(Tensor.permute, torch.permute)
def _permute(_: Any, weight: LazyWeight, *dims: Any) -> Any:
    """Where matrices stay matrices: the dimensions of the stack among themselves, and the last two."""
    order, stack = [dim % weight.base.dim() for dim in _flat(dims)], weight.stack
    if not weight.is_matrix or set(order[stack:]) != {stack, stack + 1}:
        return NotImplemented
    kept = _alike(weight, lambda each: each.permute(*order[:stack], stack, stack + 1))
    if order[stack] == stack:
        return kept
    return kept.like(kept.base.transpose(-2, -1), tuple(change.transposed() for change in kept.changes))


@_rule_for(_MATRIX_TRANSPOSE)
def _matrix_transpose(_: Any, weight: LazyWeight) -> Any:
    return _transpose(_, weight, -2, -1)


@_rule_for(Tensor.t, torch.t, _TRANSPOSE)
def _turn(_: Any, weight: LazyWeight) -> Any:
    return _transpose(_, weight, 0, 1) if weight.base.dim() == 2 else NotImplemented


@_rule_for(Tensor.view, Tensor.reshape, torch.reshape)
def _reshape(function: Any, weight: LazyWeight, *shape: Any) -> Any:
    """Where the matrix is kept: only the dimensions of the stack are shaped anew."""
    if not weight.is_matrix or isinstance(shape[0], torch.dtype):
        return NotImplemented
    base = function(weight.base, _flat(shape))
    if base.shape[-2:] != weight.base.shape[-2:]:
        return NotImplemented

    def factor(each: Tensor) -> Tensor:
        return each.reshape(*base.shape[:-2], *each.shape[-2:])

    return _mapped(weight, lambda _: base, factor, factor)


def _flat(sizes: Sequence[Any]) -> Sequence[int]:
    return sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes


@_rule_for(
    Tensor.to, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.cpu, Tensor.cuda
)
def _cast(function: Any, weight: LazyWeight, *args: Any, **options: Any) -> Any:
    """The factors keep their own dtype, as they do beside any weight, and follow to another device."""
    base = function(weight.base, *args, **options)
    if base is weight.base:
        return weight
    if not base.is_floating_point():
        return NotImplemented
    return _mapped(weight, lambda _: base, lambda L: L.to(base.device), lambda R: R.to(base.device))


@_rule_for(Tensor.contiguous)
def _contiguous(_: Any, weight: LazyWeight) -> Any:
    return weight if weight.base.is_contiguous() else _mapped(weight, Tensor.contiguous, _same, _same)


def _same(factor: Tensor) -> Tensor:
    return factor


@_rule_for(Tensor.detach, torch.detach)
def _detach(_: Any, weight: LazyWeight) -> Any:
    detached = _alike(weight, Tensor.detach)
    detached.tracks = False
    return detached

"""One call of a host for rows whose adapters differ in a vector alone: a factor on what it gives, a bias, a norm's own.

8 adapters, 16 tokens each, 128 features, forward and backward in µs of one CPU, in brackets group by group: IA3 on a
Linear 385 (536), on an Embedding 236 (365), biases of their own 468 (807), LayerNorms of their own 603 (695); eight
calls 983, 584, 1151, 999.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _is_any_autocast_enabled
from torch.autograd import Function
from torch.nn import functional as F

from .._core.host import base_type, runs_bare
from .._core.row_groups import Groups
from ..kernels.dispatch import apply, is_transformed
from ._low_rank import is_plain_linear

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.LayerNorm, nn.RMSNorm)
# Above it the passes over memory decide, and weight and bias by themselves are two more: 524,288 elements of a
# LayerNorm take 2825 µs so, and 1753 group by group; 65,536 take 679 and 766.
_LARGEST_NORM = 1 << 17


class FactorRows:
    """IA3 on the output: y times the factor of each row's own adapters, as they nest."""

    def __init__(self, groups: Groups, adapters: Sequence[Sequence[Any]]) -> None:
        self.groups, self.adapters = groups, adapters
        self.depth = max(map(len, adapters))
        first = next(own[0] for own in adapters if own)
        self.axis = first.axis

    def __call__(self, host: Any, call: Any, *args: Any, **kwargs: Any) -> Any:
        x = _rows_of(host, self.groups, call, args, kwargs)
        if x is None:
            return NotImplemented
        y = call(*args, **kwargs)
        for depth in range(self.depth):
            own = [each[depth].factor if depth < len(each) else None for each in self.adapters]
            y = self._scaled(y, next(factor for factor in own if factor is not None), own)
        return y

    def _scaled(self, y: Tensor, like: Tensor, own: list[Tensor | None]) -> Tensor:
        ones = torch.ones_like(like, requires_grad=False)
        factor = spread(self.groups, [ones if each is None else each for each in own])  # [rows, features]
        behind = -1 - self.axis if self.axis < 0 else y.dim() - 1 - self.axis
        between = y.dim() - factor.dim() - behind
        factor = factor.view(len(factor), 1, *[1] * between, *factor.shape[1:], *[1] * behind)
        return (y.view(len(factor), -1, *y.shape[1:]) * factor).to(y.dtype).flatten(0, 1)


class BiasRows:
    """Full on the bias of a Linear: the product once, and each row's own bias, or the host's."""

    def __init__(self, groups: Groups, adapters: Sequence[Sequence[Any]]) -> None:
        self.groups, self.adapters = groups, adapters

    def __call__(self, host: Any, call: Any, *args: Any, **kwargs: Any) -> Any:
        x = _rows_of(host, self.groups, call, args, kwargs)
        biases = _own(host, "bias", self.adapters)
        if x is None or not _are_alike(x, host.weight, *biases):
            return NotImplemented
        return _by_row(torch.add, F.linear(x, host.weight), spread(self.groups, biases))


class NormRows:
    """Full on a LayerNorm or RMSNorm: normalised once, then each row's own weight and bias."""

    def __init__(self, groups: Groups, adapters: Sequence[Sequence[Any]]) -> None:
        self.groups, self.adapters = groups, adapters

    def __call__(self, host: Any, call: Any, *args: Any, **kwargs: Any) -> Any:
        x = _rows_of(host, self.groups, call, args, kwargs)
        weights = _own(host, "weight", self.adapters)
        biases = [] if getattr(host, "bias", None) is None else _own(host, "bias", self.adapters)
        if x is None or x.numel() > _LARGEST_NORM or not _are_alike(x, *weights, *biases):
            return NotImplemented
        if isinstance(host, nn.LayerNorm):
            y = F.layer_norm(x, host.normalized_shape, eps=host.eps)
        else:
            y = F.rms_norm(x, host.normalized_shape, eps=host.eps)
        y = _by_row(torch.mul, y, spread(self.groups, weights))
        return _by_row(torch.add, y, spread(self.groups, biases)) if biases else y


def full_rows(host: Any, groups: Groups, adapters: Sequence[Sequence[Any]]) -> Any:
    """What serves copies of these weights, or None where group by group is the way."""
    copied = {path for own in adapters for adapter in own for path in adapter.aliases}
    whole = all(adapter.rows is None for own in adapters for adapter in own)
    if not whole or max(map(len, adapters)) > 1:
        return None
    if copied == {"bias"} and is_plain_linear(host):
        return BiasRows(groups, adapters)
    forward: Any = base_type(type(host)).forward  # pyright: ignore[reportAttributeAccessIssue]
    stock = isinstance(host, _NORMS) and any(forward is norm.forward for norm in _NORMS)
    return NormRows(groups, adapters) if stock and copied <= {"weight", "bias"} else None


def spread(groups: Groups, parameters: Sequence[Tensor]) -> Tensor:
    """[rows, ...]: of each row the parameter of its group."""
    return apply(_Spread, groups, *parameters) if torch.is_grad_enabled() else _spread(groups, parameters)


class _Spread(Function):
    """A gradient is the sum over a group's own rows, in their order: an index that is added to would come in any."""

    @staticmethod
    def forward(ctx: Any, groups: Groups, *parameters: Tensor) -> Tensor:
        ctx.groups = groups
        return _spread(groups, parameters)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        parts = ctx.groups.split(grad_outputs[0], 0)
        needs = ctx.needs_input_grad[1:]
        return None, *(part.sum(0) if need else None for part, need in zip(parts, needs, strict=True))


def _spread(groups: Groups, parameters: Sequence[Tensor]) -> Tensor:
    return groups.join([p.detach().expand(n, *p.shape) for p, n in zip(parameters, groups.counts, strict=True)], 0)


def _rows_of(host: Any, groups: Groups, call: Any, args: Any, kwargs: Any) -> Tensor | None:
    """The one tensor that a stock layer is called with, where it has rows in front; None for anything else."""
    if is_transformed() or not runs_bare(host, call) or len(args) + len(kwargs) != 1:
        return None
    (x,) = args or kwargs.values()
    if type(x) is not Tensor or not x.numel() or x.shape[0] % groups.size:
        return None
    if isinstance(host, _CONVS):
        return x if x.dim() == len(host.kernel_size) + 2 else None
    if isinstance(host, _NORMS):
        return x if x.dim() > len(host.normalized_shape) else None
    if isinstance(host, nn.Embedding):
        return x
    return x if isinstance(host, nn.Linear) and x.dim() > 1 else None


def _are_alike(*tensors: Tensor) -> bool:
    """Half precision would be rounded once more than in the host's own call."""
    wide = tensors[0].element_size() >= 4 and not _is_any_autocast_enabled()
    return wide and len({tensor.dtype for tensor in tensors}) == 1


def _own(host: Any, path: str, adapters: Sequence[Sequence[Any]]) -> list[Tensor]:
    copies = [own[0].fold(host) if own else {} for own in adapters]
    return [copy.get(path, getattr(host, path)) for copy in copies]


def _by_row(combine: Any, y: Tensor, own: Tensor) -> Tensor:
    """y [k·rows, ..., features] with own [rows, features]."""
    between = [1] * (y.dim() - own.dim())
    rows = combine(y.view(len(own), -1, *y.shape[1:]), own.view(len(own), 1, *between, *own.shape[1:]))
    return rows.flatten(0, 1)

"""Bottlenecks of one shape on what one call of a host gave, each on rows of its own.

8 adapters of width 8, 16 tokens each, 128 features, forward and backward in µs of one CPU: 614, group by group 1495,
eight calls 1988; 128 tokens each, 512 features: 16071, 17952, 20324.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch._C import _is_any_autocast_enabled

from .._core.row_groups import Groups
from .._core.row_layout import BATCH_FIRST
from ..kernels import bottleneck_rows
from ..kernels.dispatch import as_own_tensor, is_transformed
from ._hidden_states import input_of, with_hidden_states


class BottleneckRows:
    """Serves as many rows for each adapter; given anything else, it says NotImplemented."""

    def __init__(self, groups: Groups, adapters: Sequence[Any]) -> None:
        self.groups, self.adapters, self.first = groups, adapters, adapters[0]

    def __call__(self, output: Any, *args: Any, **kwargs: Any) -> Any:
        y = output[0] if isinstance(output, (tuple, list)) and output else output
        drops = any(adapter.dropout and adapter.training for adapter in self.adapters)
        if drops or type(y) is not Tensor or is_transformed() or _is_any_autocast_enabled():
            return NotImplemented
        u = y if self.first.position == "after" else input_of(self.first.input_name, args, kwargs)
        weights = [w for a in self.adapters for w in (a.down_weight, a.down_bias, a.up_weight, a.up_bias)]
        if not self._fits(y, u, weights):
            return NotImplemented
        return with_hidden_states(output, lambda y: self._adapted(y, u, weights))

    def _fits(self, y: Tensor, u: Tensor, weights: Sequence[Tensor]) -> bool:
        """Half precision would be rounded once more than alone."""
        inputs, outputs, axis, _ = self.first.features
        return (
            y.dim() > 1
            and axis in (-1, y.dim() - 1)
            and y.shape == (*u.shape[:-1], outputs)
            and u.shape[-1] == inputs
            and y.shape[0] % self.groups.size == 0
            and y.numel() > 0
            and y.element_size() >= 4
            and {y.dtype, u.dtype} == {weight.dtype for weight in weights}
        )

    def _adapted(self, y: Tensor, u: Tensor, weights: Sequence[Tensor]) -> Tensor:
        by_adapter = self._by_adapter(y)
        out = bottleneck_rows(
            by_adapter if u is y else self._by_adapter(u),
            weights,
            residual=by_adapter if self.first.residual else None,
            activation=self.first.activation,
            scales=[adapter.scale for adapter in self.adapters],
        )
        return self.groups.unsorted(as_own_tensor(out, y.shape), 0)

    def _by_adapter(self, tensor: Tensor) -> Tensor:
        """[adapters, tokens of each, features]."""
        return self.groups.sorted(tensor, 0).reshape(len(self.adapters), -1, tensor.shape[-1])


def bottleneck_rows_of(host: nn.Module, groups: Groups, adapters: Sequence[Sequence[Any]]) -> BottleneckRows | None:
    """What serves these, or None where group by group is the way."""
    own = [adapter for each in adapters for adapter in each]
    one_each = {len(each) for each in adapters} == {1} and len({*groups.counts}) == 1
    if not one_each or groups.dim != 0 or isinstance(host, BATCH_FIRST):
        return None
    alike = {(a.activation, a.position, a.norm, a.residual, a.features, len(a.down_bias)) for a in own}
    plain = own[0].norm == "none" and all(isinstance(adapter.scale, float) for adapter in own)
    return BottleneckRows(groups, own) if plain and len(alike) == 1 else None

"""One call of a transformers attention for rows with prefixes of their own, of whatever lengths.

8 prefixes of 4, 10 and 20, 16 tokens each, two layers of a Llama with 128 features, forward and backward in µs of one
CPU: 7414, group by group 11855, eight calls 24066; without gradients 3585, 6242, 11509.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._core.foreign import attention_of
from ..._core.host import base_type
from ..._core.row_groups import Groups
from ...kernels.dispatch import is_transformed
from .._row_parameters import spread
from ._context import OtherLayoutError, RowsFront
from ._torch_attention import InFront
from ._transformers import has_registry, registered, uses_registry


class PrefixRows:
    """The keys and values are known to be [batch, heads, tokens, dim], so each row gets those of its own prefix."""

    def __init__(self, groups: Groups, adapters: Sequence[Sequence[Any]]) -> None:
        self.groups, self.adapters = groups, adapters
        counted = zip(adapters, groups.counts, strict=True)
        lengths = [own[0].length if own else 0 for own, count in counted for _ in range(count)]
        self.lengths = lengths if groups.back is None else [lengths[at] for at in groups.back.tolist()]
        self.seen: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, host: nn.Module, call: Any, *args: Any, **kwargs: Any) -> Any:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        known = attention_of(host) in ("sdpa", "eager") and not is_transformed()
        if not known or x is None or x.dim() != 3 or len(x) % self.groups.size:
            return NotImplemented
        share = len(x) // self.groups.size
        keys, values = ([*each] for each in zip(*map(self._keys_and_values, self.adapters), strict=True))
        own = [spread(self.groups, self._filled_up(each)).repeat_interleave(share, 0) for each in (keys, values)]
        front = RowsFront(base_type(type(host)).__name__, own[0], own[1], self._seen_by_row(share, x.device))
        try:
            with registered(host, front) if uses_registry(host) else InFront(front):
                result = call(*args, **kwargs)
        except OtherLayoutError:  # raised before the attention: each group by itself asks for no layout
            return NotImplemented
        front.require_seen()
        return result

    def _keys_and_values(self, own: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Of rows with none, of no length."""
        if own:
            return own[0].keys_and_values()
        key, value = next(each[0] for each in self.adapters if each).keys_and_values()
        return key[:, :0].detach(), value[:, :0].detach()

    def _seen_by_row(self, share: int, device: torch.device) -> Tensor | None:
        """[rows, length]; None where each row sees all. Made once, and copied to a device once."""
        if len({*self.lengths}) == 1:
            return None
        if (share, device) not in self.seen:
            lengths = torch.tensor(self.lengths).repeat_interleave(share)
            self.seen[share, device] = (torch.arange(max(self.lengths)) < lengths[:, None]).to(device)
        return self.seen[share, device]

    def _filled_up(self, tensors: list[Tensor]) -> list[Tensor]:
        """[heads, length, dim] to the greatest length, with zeros."""
        return [F.pad(each, (0, 0, 0, max(self.lengths) - each.shape[1])) for each in tensors]


def prefix_rows_of(host: nn.Module, groups: Groups, adapters: Sequence[Sequence[Any]]) -> PrefixRows | None:
    """What serves these, or None where group by group is the way."""
    own = [adapter for each in adapters for adapter in each]
    alike = {(one.heads, one.head_dim, one.value_dim) for one in own}
    plain = all(one.gate is None for one in own) and max(map(len, adapters)) == 1
    return PrefixRows(groups, adapters) if plain and len(alike) == 1 and has_registry(host) else None

"""One call of a Linear for rows with LoRA of their own, compiled: which row is whose is data, not structure."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._core.host import runs_bare
from .._core.row_groups import RowTable
from ..kernels import join_pairs


class TracedRows:
    """Each row takes its own pair out of a stack of all, so that a row reads no other pair, and none reads its row."""

    def __init__(self, host: nn.Module, table: RowTable, adapters: Sequence[Sequence[Any]]) -> None:
        self.host, self.table, self.adapters = host, table, adapters

    def __call__(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        (x,) = args or kwargs.values()
        acting = [adapter for own in self.adapters for adapter in own]
        dropouts = {adapter.dropout if adapter.training else 0.0 for adapter in acting}
        seeded = any("masks" in adapter._modules for adapter in acting) and dropouts != {0.0}
        fits = x.dim() > 1 and x.shape[0] % self.table.size == 0
        if not fits or seeded or len(dropouts) > 1 or not runs_bare(self.host, call):
            return NotImplemented
        y = call(*args, **kwargs)
        dropped = F.dropout(x, dropouts.pop()) if dropouts != {0.0} else x
        return self._with_terms(y, dropped.to(y.dtype))

    def _with_terms(self, y: Tensor, x: Tensor) -> Tensor:
        index = self.table.index.to(x.device).repeat_interleave(x.shape[0] // self.table.size)
        A, B = self._stacked(x)
        flat = x.reshape(x.shape[0], -1, x.shape[-1])  # [rows, tokens, in]
        h = torch.bmm(flat, A.index_select(0, index).transpose(1, 2))
        term = torch.bmm(h, B.index_select(0, index).transpose(1, 2)).reshape(y.shape)
        if () not in self.table.choices:
            return y + term
        of_base = (index == self.table.choices.index(())).view(-1, *[1] * (y.dim() - 1))
        return torch.where(of_base, y, y + term)

    def _stacked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A [choices, rank, in] and B [choices, out, rank], the scales in B, to the highest rank with zeros in both."""
        pairs = [
            join_pairs([(one.lora_A, one.lora_B, one.scale) for one in own]) if own else None for own in self.adapters
        ]
        rank = max(A.shape[0] for A, _ in filter(None, pairs))
        host: Any = self.host
        none = x.new_zeros(0, host.in_features), x.new_zeros(host.out_features, 0)
        filled = [pair or none for pair in pairs]
        A = torch.stack([F.pad(A.to(x.dtype), (0, 0, 0, rank - A.shape[0])) for A, _ in filled])
        return A, torch.stack([F.pad(B.to(x.dtype), (0, rank - B.shape[1])) for _, B in filled])

"""LoRA for a batch whose rows belong to different adapters: the table of its blocks, and the reference."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..lora import reference


def block_table(adapter_of_row: Tensor, rows: int) -> Tensor:
    """Cuts a batch into blocks of at most `rows` neighbouring rows that share an adapter.

    Args:
        adapter_of_row: [M] int, the adapter of each row, -1 for none. Sorted batches need the fewest blocks.
        rows: the rows a block may hold.

    Returns:
        [blocks, 3] int32: adapter, first row, row past the last.
    """
    adapters, lengths = torch.unique_consecutive(adapter_of_row, return_counts=True)
    ends = lengths.cumsum(0)
    blocks = (lengths + rows - 1) // rows
    segment = torch.repeat_interleave(torch.arange(len(adapters), device=adapters.device), blocks)
    within = torch.arange(len(segment), device=adapters.device) - (blocks.cumsum(0) - blocks)[segment]
    first = (ends - lengths)[segment] + within * rows
    last = torch.minimum(first + rows, ends[segment])
    return torch.stack([adapters[segment], first, last], dim=1).to(torch.int32)


def grouped_shrink(x: Tensor, A: Tensor, scales: Tensor, table: Tensor, rows: int) -> Tensor:
    """Block by block of `table`, of at most `rows` rows, scales[a] · x A[a]ᵀ; zero for rows of no adapter."""
    h = x.new_zeros(x.shape[0], A.shape[1])
    for adapter, first, last in _adapted(table, rows):
        h[first:last] = reference.shrink(x[first:last], A[adapter], scales[adapter].item(), 0.0, None)
    return h


def grouped_expand(y: Tensor, h: Tensor, B: Tensor, table: Tensor, rows: int) -> Tensor:
    """Block by block of `table`, of at most `rows` rows, y + h B[a]ᵀ; y itself for rows of no adapter."""
    out = y.clone()
    for adapter, first, last in _adapted(table, rows):
        out[first:last] = reference.expand(y[first:last], h[first:last], B[adapter], 1.0, None)
    return out


def _adapted(table: Tensor, rows: int) -> Iterator[tuple[int, int, int]]:
    for adapter, first, last in table.tolist():
        if adapter >= 0:
            yield adapter, first, min(last, first + rows)

"""The block → adapter table of the grouped kernels."""

import torch
from torch import Tensor


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

"""Which rows of a batch belong to which adapter, as tables that the grouped kernels read: made on the host."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Run = tuple[int, int]  # an adapter, -1 for none, and how many neighbouring rows are its


class Blocks(NamedTuple):
    """A program of a forward kernel owns a block of rows. One of a backward kernel adds up an item, some blocks of one
    adapter in turn; what the items of an adapter gave is then added in the order of their numbers.

    table [blocks, 4] int32, sorted by adapter: adapter or -1; first row; row past the last; how many rows of its
        adapter stand before, for a mask is drawn for the rows that an adapter would have alone.
    items [items, 3] int32: adapter or -1; first block; block past the last.
    parts [adapters, 2] int32: first item; item past the last.
    adapted: how many items are of an adapter; those of none stand behind.
    rows: of a block at most.
    """

    table: Tensor
    items: Tensor
    parts: Tensor
    adapted: int
    rows: int


def blocks_of(runs: Sequence[Run], adapters: int, rows: int, items: int, device: torch.device) -> Blocks:
    """Cuts runs, in the batch's order, into blocks of at most `rows` rows, and deals these out to about `items`."""
    by_adapter = _blocks_by_adapter(runs, adapters, rows)
    table = [block for blocks in by_adapter for block in blocks]
    dealt, parts, at = [], [], 0
    for adapter, blocks in enumerate(by_adapter):
        named = adapter if adapter < adapters else -1
        count = max(1, min(len(blocks), round(items * len(blocks) / len(table)))) if blocks else 0
        parts.append((len(dealt), len(dealt) + count))
        dealt += [
            (named, at + len(blocks) * i // count, at + len(blocks) * (i + 1) // count) for i in range(count)
        ]  # fmt: skip
        at += len(blocks)
    *parts, (adapted, _) = parts
    on_device = _on(device, table, dealt, parts)
    return Blocks(on_device[0], on_device[1], on_device[2], adapted, rows)


def _blocks_by_adapter(runs: Sequence[Run], adapters: int, rows: int) -> list[list[tuple[int, int, int, int]]]:
    """Those of no adapter last."""
    found: list[list[tuple[int, int, int, int]]] = [[] for _ in range(adapters + 1)]
    own, first = [0] * (adapters + 1), 0
    for adapter, length in runs:
        for start in range(0, length, rows):
            count = min(rows, length - start)
            found[adapter].append((adapter, first + start, first + start + count, own[adapter] + start))
        own[adapter] += length
        first += length
    return found


def _on(device: torch.device, *tables: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """In one copy, which nothing waits for."""
    flat = torch.tensor([number for table in tables for row in table for number in row], dtype=torch.int32)
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    widths = (4, 3, 2)
    ends = [0, *itertools.accumulate(len(table) * width for table, width in zip(tables, widths, strict=True))]
    return [flat[ends[i] : ends[i + 1]].view(-1, width) for i, width in enumerate(widths)]

"""Keys in front of those that a flex_attention call sees: its block mask and its score function, moved along."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_NO_BLOCKS = 1 << 30  # torch's block size where there is no mask: one block holds everything

Modifier = Callable[..., Tensor]


def flex_in_front(
    length: int, score_mod: Modifier, block_mask: tuple[Any, ...]
) -> tuple[Modifier, tuple[Any, ...], int]:
    """The score function and the flat block mask for `length` keys in front, and how many masked keys follow those.

    The score function is the host's and knows nothing of them: their scores stay as they are."""
    if block_mask[-2] == _NO_BLOCKS:
        return _scores_behind(length, score_mod), block_mask, 0
    moved, padding = blocks_in_front(length, _unflattened(block_mask))
    return _scores_behind(length + padding, score_mod), moved.as_tuple(), padding


def blocks_in_front(length: int, mask: Any) -> tuple[Any, int]:
    """A block mask with `length` visible keys in front, filled up with masked ones to whole blocks: the blocks there
    were stay as they are."""
    size = mask.BLOCK_SIZE
    blocks = -(-length // size[1])
    start = blocks * size[1]
    full = mask.full_kv_num_blocks is not None
    moved = type(mask).from_kv_blocks(
        mask.kv_num_blocks + blocks,
        torch.cat([_first(blocks, mask.kv_indices), mask.kv_indices + blocks], -1).contiguous(),
        mask.full_kv_num_blocks,
        F.pad(mask.full_kv_indices + blocks, (0, blocks)).contiguous() if full else None,
        size,
        _mask_behind(length, start, mask.mask_mod),
        (mask.seq_lengths[0], mask.seq_lengths[1] + start),
        mask.q_indices is not None,
    )
    return moved, start - length


def _first(blocks: int, indices: Tensor) -> Tensor:
    return torch.arange(blocks, dtype=indices.dtype, device=indices.device).expand(*indices.shape[:-1], -1)


def _mask_behind(length: int, start: int, mask_mod: Modifier) -> Modifier:
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor, *others: Tensor) -> Tensor:
        own = mask_mod(batch, head, query, (key - start).clamp(min=0), *others)
        return (key < length) | ((key >= start) & own)

    return visible


def _scores_behind(start: int, score_mod: Modifier) -> Modifier:
    def scores(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor, *others: Tensor) -> Tensor:
        own = score_mod(score, batch, head, query, (key - start).clamp(min=0), *others)
        return torch.where(key < start, score, own)

    return scores


def _unflattened(flat: tuple[Any, ...]) -> Any:
    """The parts in the order of `BlockMask.as_tuple`. Whoever calls flex_attention has imported it."""
    flex: Any = torch.nn.attention
    queries, keys, kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, q_num_blocks, *_ = flat
    return flex.flex_attention.BlockMask.from_kv_blocks(
        kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, (flat[-3], flat[-2]), flat[-1],
        (queries, keys), q_num_blocks is not None,
    )  # fmt: skip

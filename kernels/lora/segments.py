"""The rows of a batch by the pair of factors that they go through, and LoRA on them in plain operations."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..grouped.blocks import Blocks, blocks_of
from .reference import lora_term


class Segments:
    """The rows of a batch sorted by pair.

    Args:
        counts: how many rows each pair has.
        scales: the scale of each pair, None where its rows have none.
        order: [rows], what sorts the batch, a pair's rows in the batch's order; default it is sorted.
        back: [rows], what undoes that.

    Example:
        >>> order = torch.tensor([2, 0, 1])
        >>> segments = peftlib.kernels.Segments((1, 2), (2.0, None), order, order.argsort())

    Raises:
        ValueError: if there are not as many scales as counts.
    """

    def __init__(
        self,
        counts: tuple[int, ...],
        scales: tuple[float | None, ...],
        order: Tensor | None = None,
        back: Tensor | None = None,
    ) -> None:
        if len(counts) != len(scales):
            raise ValueError(
                f"Segments: {len(counts)} counts and {len(scales)} scales. Give each count a scale or None."
            )
        self.counts, self.scales, self.order, self.back = counts, scales, order, back
        self.size, self.pairs = sum(counts), len(scales) - scales.count(None)
        # One batched product then serves all: as many rows for each pair, and none without one.
        self.are_alike = len({*counts}) == 1 and None not in scales
        self.scale = scales[0] if len({*scales}) == 1 else None
        self._columns: dict[Any, Tensor] = {}
        self._scales: dict[torch.device, Tensor] = {}
        self._elsewhere: dict[torch.device, Segments] = {}
        self._blocks: dict[tuple[int, int, int, torch.device], Blocks] = {}

    def to(self, device: torch.device) -> "Segments":
        """The same with the orders on a device, copied there once."""
        if self.order is None or self.back is None or self.order.device == device:
            return self
        if device not in self._elsewhere:
            order, back = self.order.to(device), self.back.to(device)
            self._elsewhere[device] = Segments(self.counts, self.scales, order, back)
        return self._elsewhere[device]

    def blocks(self, share: int, rows: int, items: int, device: torch.device) -> Blocks:
        """The tables of the grouped kernels for `share` tokens a row, made once."""
        key = share, rows, items, device
        if key not in self._blocks:
            self._blocks[key] = blocks_of(self._runs(share), self.pairs, rows, items, device)
        return self._blocks[key]

    def _runs(self, share: int) -> list[tuple[int, int]]:
        """In the batch's order: which pair, -1 for none, and how many tokens."""
        numbers = itertools.count()
        pairs = [-1 if scale is None else next(numbers) for scale in self.scales]
        of = [pair for pair, count in zip(pairs, self.counts, strict=True) for _ in range(count)]
        if self.back is not None:
            of = [of[at] for at in self.back.tolist()]
        return [(pair, share * len([*rows])) for pair, rows in itertools.groupby(of)]

    def paired_scales(self, device: torch.device) -> Tensor:
        """[pairs] float32 on a device, copied there once."""
        if device not in self._scales:
            scales = torch.tensor([scale for scale in self.scales if scale is not None])
            self._scales[device] = scales.to(device)
        return self._scales[device]

    def scale_column(self, like: Tensor) -> Tensor:
        """The scales [pairs, 1, 1] on the device of `like`, copied there once. In float32 at least: 10/3 in bfloat16 is
        another scale."""
        key = like.dtype, like.device
        if key not in self._columns:
            wide = torch.promote_types(like.dtype, torch.float32)
            self._columns[key] = torch.tensor(self.scales, dtype=wide).to(like.device).view(-1, 1, 1)
        return self._columns[key]


def plain_gradients(
    dY: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    segments: Segments,
    factors: Sequence[Tensor],
    shape: Sequence[int],
    needs: Sequence[bool],
    dropouts: Sequence[float] | None = None,
    keep: Callable[[int, Tensor], Tensor] | None = None,
) -> list[Tensor | None]:
    """Those of x [shape], W, b and the factors that `needs` names, by operations whose own backward torch knows.

    Where x or W was not kept, no gradient that is asked for depends on it, and zeros stand in its place."""
    needs_x, needs_weight, needs_bias, *needs_factors = needs
    asked = [needs_x, needs_weight, *needs_factors]
    if x is None and any(needs_factors[1::2]):
        raise RuntimeError(
            "lora_linear_rows: a second derivative needs x, which was not kept because no lora_A needs a gradient. "
            "Give one of them requires_grad=True, or do without create_graph."
        )
    zeros = functools.partial(torch.zeros, dtype=dY.dtype, device=dY.device)
    x = zeros(shape, requires_grad=needs_x) if x is None else x
    weight = zeros((dY.shape[-1], shape[-1]), requires_grad=needs_weight) if weight is None else weight
    with torch.enable_grad():
        y = plain_rows(x, weight, segments, factors, dropouts, keep)
        wanted = [tensor for tensor, need in zip([x, weight, *factors], asked, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, dY, create_graph=True) if wanted else ())
    dX, dW, *rest = [next(found) if need else None for need in asked]
    return [dX, dW, dY.reshape(-1, dY.shape[-1]).sum(0) if needs_bias else None, *rest]


def plain_rows(
    x: Tensor,
    weight: Tensor,
    segments: Segments,
    factors: Sequence[Tensor],
    dropouts: Sequence[float] | None = None,
    keep: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """x Wᵀ and each row's own term, pair by pair; `keep` gives the mask of a pair's rows [tokens, in] by its number."""
    shape, x = x.shape, x.reshape(segments.size, -1, x.shape[-1])
    x = x if segments.order is None else x[segments.order]
    pairs, parts = itertools.count(), []
    for part, scale in zip(x.split(segments.counts), segments.scales, strict=True):
        y = F.linear(part, weight)
        if scale is None:
            parts.append(y)
            continue
        pair = next(pairs)
        p = 0.0 if dropouts is None else dropouts[pair]
        mask = None if keep is None else keep(pair, part.flatten(0, 1)).view(part.shape)
        parts.append(y + lora_term(part, factors[2 * pair], factors[2 * pair + 1], scale, p, mask))
    y = torch.cat(parts)
    return (y if segments.back is None else y[segments.back]).reshape(*shape[:-1], -1)

"""The reference implementation of the grouped kernels: each adapter's rows through the kernel's reference of one."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..lora import reference
from ..philox import keep_mask, kept_scale, threshold
from .blocks import Blocks


class Masks(NamedTuple):
    """The dropout of each adapter, on the device: seeds [adapters] int64, thresholds [adapters] int32 and what a kept
    element is multiplied by, [adapters] float32. Probabilities as they were given stay on the host."""

    seeds: Tensor
    thresholds: Tensor
    kept: Tensor
    dropouts: tuple[float, ...]

    @classmethod
    def of(cls, dropouts: tuple[float, ...], seeds: Tensor) -> "Masks":
        device = seeds.device
        thresholds = torch.tensor([threshold(p) for p in dropouts], dtype=torch.int32)
        kept = torch.tensor([kept_scale(p) for p in dropouts])
        return cls(seeds, _moved(thresholds, device), _moved(kept, device), dropouts)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def grouped_shrink(x: Tensor, A: Tensor, scales: Tensor, blocks: Blocks, masks: Masks | None = None) -> Tensor:
    """scale · dropout(x) Aᵀ of each row's own adapter, [M, rank] in the dtype of x; zero for rows of none."""
    h = x.new_zeros(x.shape[0], A.shape[1])
    for adapter, rows in _adapted(blocks):
        dropped, factor = _dropped(x[rows], adapter, masks)
        h[rows] = reference.shrink(dropped, A[adapter], scales[adapter].item() * factor, 0.0, None).to(x.dtype)
    return h


def grouped_expand_(y: Tensor, h: Tensor, B: Tensor, blocks: Blocks) -> Tensor:
    """y += h Bᵀ with each row's own B, in place; rows of no adapter stay."""
    for adapter, rows in _adapted(blocks):
        y[rows] = reference.expand(y[rows], h[rows], B[adapter], 1.0, None)
    return y


def grouped_backward_y(
    dY: Tensor, B: Tensor, h: Tensor, scales: Tensor, blocks: Blocks, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """g = scale · dY B, [M, rank] in the dtype of dY, and of each adapter dB = dYᵀ h, [adapters, N, rank]."""
    g, dB = dY.new_zeros(dY.shape[0], B.shape[2]), torch.zeros_like(B, dtype=dtype)
    for adapter, rows in _adapted(blocks):
        g[rows], own = reference.backward_y(dY[rows], B[adapter].to(dB.dtype), h[rows], scales[adapter].item())
        dB[adapter] = own.to(dB.dtype)
    return g, dB


def grouped_backward_x(
    x: Tensor | None, g: Tensor, A: Tensor, blocks: Blocks, masks: Masks | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """dX = dropout'(g A), [M, K], zero for rows of no adapter; and of each adapter dA = gᵀ dropout(x), left out
    without x."""
    dX = g.new_zeros(g.shape[0], A.shape[2])
    dA = None if x is None else torch.zeros_like(A, dtype=dtype)
    for adapter, rows in _adapted(blocks):
        own = reference.backward_x_only(g[rows], A[adapter], 0.0, None)
        dX[rows], factor = _dropped(own, adapter, masks)
        dX[rows] *= factor
        if x is not None and dA is not None:
            dropped, factor = _dropped(x[rows], adapter, masks)
            _, total = reference.backward_x(dropped, g[rows], A[adapter].to(dA.dtype), 0.0, None)
            dA[adapter] = (total * factor).to(dA.dtype)
    return dX, dA


def _dropped(x: Tensor, adapter: int, masks: Masks | None) -> tuple[Tensor, float]:
    """The rows that survive, and what they are to be multiplied by."""
    if masks is None:
        return x, 1.0
    p = masks.dropouts[adapter]
    return x * keep_mask(x.shape[0], x.shape[1], p, masks.seeds[adapter : adapter + 1]).to(x.dtype), kept_scale(p)


def _adapted(blocks: Blocks) -> Iterator[tuple[int, Tensor]]:
    """Each adapter and its rows, in the batch's order."""
    rows: dict[int, list[int]] = {}
    for adapter, first, last, _ in blocks.table.tolist():
        rows.setdefault(adapter, []).extend(range(first, last))
    for adapter, own in rows.items():
        if adapter >= 0:
            yield adapter, torch.tensor(own, device=blocks.table.device)

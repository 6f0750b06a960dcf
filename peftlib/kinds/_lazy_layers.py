"""Convolutions and lookups of a lazy weight: two thin layers beside the base's."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._lazy_products import added, is_right_of, rule_for


@rule_for("conv1d", "conv2d", "conv3d")
def _conv(conv: Any, input: Any, weight: Any, bias: Any = None, *settings: Any, **named: Any) -> Any:
    """R [rank, in/groups, *kernel], shared by the groups, then L [out, rank] as a kernel of one tap."""
    if not is_right_of(input, weight) or weight.stack:
        return NotImplemented
    groups = named.get("groups", settings[3] if len(settings) > 3 else 1)
    taps = [1] * (weight.base.dim() - 2)
    return added(
        conv(input, weight.base, bias, *settings, **named), weight, input,
        lambda x, L, R: conv(x, R.repeat(groups, 1, *taps), None, *settings, **named),
        lambda h, L, R: conv(h, L.view(*L.shape, *taps), groups=groups),
    )  # fmt: skip


@rule_for("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transposed(conv: Any, input: Any, weight: Any, bias: Any = None, *settings: Any, **named: Any) -> Any:
    """L [in, rank] as a kernel of one tap in each group, then R [rank, out/groups, *kernel], shared by the groups."""
    if not is_right_of(input, weight) or weight.stack:
        return NotImplemented
    groups = named.get("groups", settings[3] if len(settings) > 3 else 1)
    taps = [1] * (weight.base.dim() - 2)
    return added(
        conv(input, weight.base, bias, *settings, **named), weight, input,
        lambda x, L, R: _CONVS[len(taps)](x, _of_groups(L, groups).view(-1, len(L) // groups, *taps), groups=groups),
        lambda h, L, R: conv(h, R.repeat(groups, 1, *taps), None, *settings, **named),
    )  # fmt: skip


def _of_groups(L: Tensor, groups: int) -> Tensor:
    """[groups, rank, in/groups]"""
    return L.reshape(groups, -1, L.shape[1]).transpose(1, 2).contiguous()


_CONVS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@rule_for("embedding")
def _embedding(
    embedding: Any, input: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *rest: Any, **named: Any
) -> Any:
    """A row of W and its row of L, times R. The row at `padding_idx` does not learn, nor R through it."""
    rescales = any(rest[1:]) or named.get("scale_grad_by_freq") or named.get("sparse")
    if not _is_lookup(input, weight) or max_norm is not None or rescales:
        return NotImplemented
    y = embedding(input, weight.base, padding_idx)
    for change in weight.changes:
        term = change.picked(lambda L: embedding(input, L, padding_idx))
        if padding_idx is not None:
            term = torch.where((input == padding_idx).unsqueeze(-1), term.detach(), term)
        y = torch.add(y, term.to(y.dtype))
    return y


def _is_lookup(input: Any, weight: Any) -> bool:
    lookup = is_right_of(input, weight) and weight.is_matrix and not weight.stack
    return lookup and not any(change.dropout for change in weight.changes)

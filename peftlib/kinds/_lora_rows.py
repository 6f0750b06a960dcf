"""One call of a Linear for rows that go through LoRA adapters of their own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._core.host import runs_bare
from .._core.override import tensors_of
from .._core.row_groups import Groups
from ..kernels import Segments, join_pairs, lora_linear_rows, serves_rows
from ..kernels.dispatch import is_small, launches
from ..kernels.dropout import draw_small, survivors_scale
from ..kernels.philox import draw_seed


class LoRARows:
    """Serves a host whose rows lie in front; called with anything else, it says NotImplemented."""

    def __init__(self, groups: Groups, adapters: Sequence[Sequence[Any]]) -> None:
        self.groups, self.adapters = groups, adapters
        scales = tuple(None if not own else own[0].scale if len(own) == 1 else 1.0 for own in adapters)
        self.dropping = [adapter for own in adapters for adapter in own if adapter.dropout]
        self.segments = Segments(tuple(groups.counts), scales, groups.order, groups.back)
        self.own = [own for own in adapters if own]
        # What a module's own look-up passes by; None where a pair is joined of several in each call.
        alone = all(len(own) == 1 for own in self.own)
        self.places = [(own[0].__dict__, own[0]._parameters) for own in self.own] if alone else None

    def __call__(self, host: nn.Module, call: Any, *args: Any, **kwargs: Any) -> Any:
        (x,) = args or kwargs.values()
        dropouts = self._dropouts() if self.dropping else None
        if (
            (dropouts is not None and self.places is None)
            or not runs_bare(host, call)
            or x.dim() < 2
            or x.shape[0] % self.groups.size
        ):
            return NotImplemented
        weight, bias = tensors_of(host, "weight", "bias")
        pairs = self._pairs()
        factors = [factor for pair in pairs for factor in pair]
        by_kernels = dropouts is not None and launches(x)
        if not x.numel() or not serves_rows(x, weight, factors, by_kernels):
            return NotImplemented
        if dropouts is None:
            return lora_linear_rows(x, weight, bias, pairs, self.segments)
        if by_kernels:
            return lora_linear_rows(x, weight, bias, pairs, self.segments, dropouts, self._seeds(x))
        tokens = x.view(-1, x.shape[-1])
        parts = tokens.split([len(tokens) // self.groups.size * count for count in self.groups.counts])
        if not all(is_small(part, len(weight), 1.0) for part in parts):
            return NotImplemented  # alone too, each would draw another mask than in one piece
        return lora_linear_rows(x, weight, bias, pairs, self.segments, keep=self._keep(x, parts))

    def _keep(self, x: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """[tokens, in], by group: of each adapter the mask that it would draw alone, on survivors 1/(1-p)."""
        kept = []
        for own, part in zip(self.adapters, parts, strict=True):
            if own and own[0].dropout and own[0].training:
                mask = own[0].with_own_masks(draw_small, part, own[0].dropout)
                kept.append(mask.to(x.dtype).mul_(survivors_scale(own[0].dropout)))
            else:
                kept.append(torch.ones_like(part))
        return torch.cat(kept)

    def _dropouts(self) -> tuple[float, ...] | None:
        """That of each pair; None where none acts."""
        if not any(adapter.training for adapter in self.dropping):
            return None
        return tuple(own[0].dropout if own[0].training else 0.0 for own in self.own)

    def _seeds(self, x: Tensor) -> Tensor:
        """[pairs]: of each adapter the one that it would draw alone."""
        one = x.new_zeros(1, dtype=torch.int64)
        return torch.cat(
            [own[0].with_own_masks(draw_seed, x) if own[0].dropout and own[0].training else one for own in self.own]
        )

    def _pairs(self) -> list[Any]:
        """Of 16 adapters 4 µs, where one look-up after another takes 11."""
        if self.places is not None and not any("lora_A" in own or "lora_B" in own for own, _ in self.places):
            try:
                return [(parameters["lora_A"], parameters["lora_B"]) for _, parameters in self.places]
            except KeyError:  # computed, as parametrized ones are
                pass
        return [_pair(own) for own in self.own]


def _pair(own: Sequence[Any]) -> Any:
    if len(own) == 1:
        return tensors_of(own[0], "lora_A", "lora_B")
    return join_pairs([(adapter.lora_A, adapter.lora_B, adapter.scale) for adapter in own])

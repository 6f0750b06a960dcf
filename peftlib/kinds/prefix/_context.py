"""What stands in front in one attention call: learned keys and values, fitted to the tensors of that call."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._errors import AdapterError


class Front:
    """What stands in front in one call of a host: keys and values [heads, length, dim], and maybe a gate [heads, 1, 1].

    Without a gate they join the host's own in one softmax. With one they have a softmax of their own, and tanh(gate)
    times its result is added. It lives for one call and counts the attention calls that it sees."""

    is_filled_up = False  # whether some rows do not see all that is in front, so that each call needs a mask

    def __init__(
        self, host: str, key: Tensor, value: Tensor, gate: Tensor | None = None, weight: float | Tensor = 1.0
    ) -> None:
        self.host, self.key, self.value, self.gate, self.weight = host, key, value, gate, weight
        self.length = key.shape[-2]
        self.seen, self.traced = 0, 0
        self.tracks = torch.is_grad_enabled() and key.requires_grad

    def meet(self) -> None:
        """Counts one attention call."""
        if torch.compiler.is_compiling():
            self.traced += 1
        else:
            self.seen += 1
        if self.seen > 1 or self.traced > 1:
            raise AdapterError(
                f"Prefix around {self.host}: it makes more than one attention call, and one prefix is for one of them. "
                "Target the attention modules inside it."
            )
        if self.tracks and not torch.is_grad_enabled():
            raise AdapterError(
                f"Prefix around {self.host}: its attention runs without gradients (under no_grad, or a reentrant "
                "checkpoint inside it), so the prefix would not learn. Target the module that the checkpoint runs."
            )

    def require_seen(self) -> None:
        """Exactly once: a function that is compiled inside the host may be met when traced, and again when it runs."""
        if self.seen and self.traced:
            raise AdapterError(
                f"Prefix around {self.host}: its attention was met in the compiled function inside it, and again when "
                "that ran. Compile the whole model, or use another backend there."
            )
        if not self.seen and not self.traced:
            raise AdapterError(
                f"Prefix around {self.host}: no attention call was seen. It must call scaled_dot_product_attention, "
                "flex_attention or MultiheadAttention, or take its attention from the registry of transformers. Target "
                'the module that does, or call set_attn_implementation("sdpa") on a transformers model.'
            )

    def beside(self, key: Tensor, value: Tensor, padding: int = 0) -> tuple[Tensor, Tensor]:
        """The host's keys and values with these in front, and `padding` rows of zeros in between."""
        own = [self._fit(self.key, key), self._fit(self.value, value)]
        own = [F.pad(tensor, (0, 0, 0, padding)) for tensor in own] if padding else own
        return torch.cat([own[0], key], -2), torch.cat([own[1], value], -2)

    def visible(self, mask: Tensor, keys: int) -> Tensor:
        """A mask [..., keys], boolean (True is seen) or additive, with the keys in front, which every query sees."""
        mask = mask.expand(*mask.shape[:-1], keys) if mask.shape[-1] == 1 else mask
        return F.pad(mask, (self.length, 0), value=mask.dtype == torch.bool)

    def term(self, query: Tensor, scale: float | None) -> Tensor:
        """w · tanh(gate) · softmax(scale · Q Kᵀ) V over the prefix alone, [..., queries, value_dim]."""
        assert self.gate is not None
        scaled = query * (query.shape[-1] ** -0.5 if scale is None else scale)
        key, value = self._fit(self.key, query), self._fit(self.value, query, last=False)
        attention_weights = (scaled @ key.transpose(-2, -1)).softmax(-1)  # [..., queries, length]
        strength = self.gate.tanh() * self.weight
        return (attention_weights @ value).to(query.dtype) * self._fit(strength, query, last=False)

    def _fit(self, own: Tensor, tensor: Tensor, last: bool = True) -> Tensor:
        """[heads, length, dim] as the leading dimensions of [batch, n·heads, tokens, dim] or [batch·heads, ...]."""
        heads, found = own.shape[0], tensor.shape[-3] if tensor.dim() > 2 else 1
        if found % heads or (last and own.shape[-1] != tensor.shape[-1]):
            raise AdapterError(
                f"Prefix around {self.host}: its attention has tensors {tuple(tensor.shape)}, which do not fit "
                f"{heads} key and value heads of {own.shape[-1]}. Pass heads=, head_dim= and value_dim=."
            )
        own = own.to(tensor.dtype)
        if tensor.dim() <= 3:  # batch and heads are one dimension, the batch outside
            return own.repeat(found // heads, 1, 1) if tensor.dim() == 3 else own[0]
        own = own.repeat_interleave(found // heads, 0) if found > heads else own
        return own.expand(*tensor.shape[:-3], -1, -1, -1)


class RowsFront(Front):
    """The same with keys and values of each row's own, [rows, heads, length, dim]. `seen` [rows, length] is where they
    are, and not zeros that fill up a shorter prefix; None where all is seen."""

    def __init__(self, host: str, key: Tensor, value: Tensor, seen: Tensor | None) -> None:
        super().__init__(host, key, value)
        self.seen_by_row, self.is_filled_up = seen, seen is not None

    def visible(self, mask: Tensor, keys: int) -> Tensor:
        if self.seen_by_row is None:
            return super().visible(mask, keys)
        mask = mask.expand(*mask.shape[:-1], keys) if mask.shape[-1] == 1 else mask
        seen = self.seen_by_row[:, None, None]
        if mask.dtype != torch.bool:
            seen = torch.zeros_like(seen, dtype=mask.dtype).masked_fill(~seen, -torch.inf)
        shape = torch.broadcast_shapes(mask.shape[:-1], seen.shape[:-1])
        return torch.cat([seen.expand(*shape, -1), mask.expand(*shape, -1)], -1)

    def _fit(self, own: Tensor, tensor: Tensor, last: bool = True) -> Tensor:
        heads = own.shape[1]
        known = tensor.dim() == 4 and len(tensor) == len(own) and tensor.shape[1] % heads == 0
        if not known or tensor.shape[-1] != own.shape[-1]:
            raise OtherLayoutError
        return own.to(tensor.dtype).repeat_interleave(tensor.shape[1] // heads, 1)


class OtherLayoutError(Exception):
    """An attention call whose rows are not those of its host, or not where they are known to be."""

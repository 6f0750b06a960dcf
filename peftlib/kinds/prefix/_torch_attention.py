"""Attention calls that torch offers, met wherever a host makes them: by a mode that sees torch's functions."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ._context import Front
from ._flex import flex_in_front
from ._multihead import multi_head_in_front

Call = Callable[..., Any]


class InFront(TorchFunctionMode):
    """Active in one call of a host: puts a `Front` into the attention call that the host makes, on this thread."""

    def __init__(self, front: Front) -> None:
        super().__init__()
        self.front = front

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.front.meet()
            return _scaled_dot_product(self.front, func, *args, **named)
        if func is F.multi_head_attention_forward:
            self.front.meet()
            return multi_head_in_front(self.front, func, *args, **named)
        if getattr(func, "__name__", "") == "flex_attention" and not isinstance(args[3], torch.fx.GraphModule):
            self.front.meet()  # a GraphModule scores for a call that was met when it was traced
            return _flex(self.front, func, *args, **named)
        if func is Tensor.unflatten:
            func = torch.unflatten  # the method calls super(), which torch.compile cannot trace from here
        return func(*args, **named)


def _scaled_dot_product(
    front: Front,
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **rest: Any,
) -> Tensor:
    if front.gate is not None:
        y = call(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **rest)
        return y + front.term(query, scale)
    if attn_mask is None and front.is_filled_up:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=key.device)
        attn_mask, is_causal = attn_mask.tril() if is_causal else attn_mask, False
    if attn_mask is not None:
        attn_mask = front.visible(attn_mask, key.shape[-2])
    key, value = front.beside(key, value)
    if not is_causal:
        return call(query, key, value, attn_mask, dropout_p, scale=scale, **rest)
    # Query i sees the keys up to i: with as many queries in front, the fused causal kernels stay and need no mask.
    query = F.pad(query, (0, 0, front.length, 0))
    y = call(query, key, value, attn_mask, dropout_p, is_causal=True, scale=scale, **rest)
    return y[..., front.length :, :]


def _flex(
    front: Front,
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Call,
    block_mask: tuple[Any, ...],
    scale: float,
    *rest: Any,
    **named: Any,
) -> Any:
    if front.gate is not None:
        y, *statistics = call(query, key, value, score_mod, block_mask, scale, *rest, **named)
        return y + front.term(query, scale), *statistics
    score_mod, block_mask, padding = flex_in_front(front.length, score_mod, block_mask)
    key, value = front.beside(key, value, padding)
    return call(query, key, value, score_mod, block_mask, scale, *rest, **named)

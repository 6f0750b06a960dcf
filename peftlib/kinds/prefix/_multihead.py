"""Keys and values in front inside torch's multi-head attention."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._context import Front

Call = Callable[..., Any]


def multi_head_in_front(
    front: Front,
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """torch's function again, with keys and values that are projected here: `static_k` and `static_v`."""
    separate: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
    weights: Any = separate if in_proj_weight is None or use_separate_proj_weight else in_proj_weight.chunk(3)
    biases: Any = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
    if front.gate is not None:
        y, attention_weights = call(
            query, key, value, width, heads, in_proj_weight, in_proj_bias, bias_k, bias_v, add_zero_attn, dropout_p,
            out_proj_weight, out_proj_bias, key_padding_mask=key_padding_mask, attn_mask=attn_mask,
            is_causal=is_causal, use_separate_proj_weight=use_separate_proj_weight, q_proj_weight=q_proj_weight,
            k_proj_weight=k_proj_weight, v_proj_weight=v_proj_weight, static_k=static_k, static_v=static_v, **rest,
        )  # fmt: skip
        own = front.term(_by_heads(F.linear(query, weights[0], biases[0]), heads), None)
        return y + F.linear(_by_tokens(own, query), out_proj_weight), attention_weights
    k = _projected(static_k, key, weights[1], biases[1], bias_k, heads)
    v = _projected(static_v, value, weights[2], biases[2], bias_v, heads)
    after = int(bias_k is not None and static_k is None)
    masks = [m if m is None else F.pad(m, (front.length, after)) for m in (attn_mask, key_padding_mask)]
    k, v = front.beside(k, v)
    blank = k.new_zeros(k.shape[-2], *query.shape[1:-1], 1)  # in place of the inputs: torch asks them for their length
    y, attention_weights = call(
        query, blank, blank, width, heads, None, in_proj_bias, None, None, add_zero_attn, dropout_p, out_proj_weight,
        out_proj_bias, attn_mask=masks[0], key_padding_mask=masks[1], use_separate_proj_weight=True,
        q_proj_weight=weights[0], k_proj_weight=k.new_zeros(width, 1), v_proj_weight=k.new_zeros(width, 1),
        static_k=k, static_v=v, **rest,
    )  # fmt: skip
    return y, None if attention_weights is None else attention_weights[..., front.length :]


def _projected(given: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, last: Any, heads: int) -> Tensor:
    """Keys or values [batch·heads, tokens, dim]; `last` is the one that torch's `bias_k` appends."""
    if given is not None:
        return given
    projected = F.linear(x, weight, bias)  # [tokens, batch, width]
    if last is not None:
        last = last.to(projected.dtype).expand(1, *projected.shape[1:]) if x.dim() > 2 else last[0]
        projected = torch.cat([projected, last])
    return _by_heads(projected, heads)


def _by_heads(x: Tensor, heads: int) -> Tensor:
    """[tokens, batch, width] as [batch·heads, tokens, dim]."""
    return x.reshape(x.shape[0], -1, x.shape[-1] // heads).transpose(0, 1)


def _by_tokens(x: Tensor, like: Tensor) -> Tensor:
    return x.transpose(0, 1).reshape(*like.shape[:-1], -1)

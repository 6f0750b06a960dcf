"""Attention with a prefix written by hand, and where transformers and flash attention can be made to run it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers.integrations.flex_attention as hf_flex
import transformers.masking_utils as hf_masks
import transformers.modeling_flash_attention_utils as hf_flash
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface, AttentionMaskInterface


@dataclass
class Own:
    """A prefix: keys and values [heads, length, dim], a gate [heads, 1, 1] or none."""

    key: Tensor
    value: Tensor
    gate: Tensor | None = None


def dense(
    query: Tensor, key: Tensor, value: Tensor, own: Own | None, mask: Tensor | None = None, scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[batch, heads, tokens, dim]: each key head serves as many query heads as there are for one; `mask` is added."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    heads = query.shape[1]
    scores = _capped(scale * query @ _every(key, heads).mT, softcap)
    scores = scores if mask is None else scores + mask
    if own is None:
        shares = scores.softmax(-1)
        return shares @ _every(value, heads), shares
    own_key, own_value = (_every(t.expand(len(query), -1, -1, -1), heads) for t in (own.key, own.value))
    if own.gate is not None:
        shares = scores.softmax(-1)
        extra = (scale * query @ own_key.mT).softmax(-1) @ own_value
        gate = own.gate.tanh().repeat_interleave(heads // len(own.gate), 0)
        return shares @ _every(value, heads) + gate * extra, shares
    own_scores = _capped(scale * query @ own_key.mT, softcap)
    shares = torch.cat([own_scores, scores], -1).softmax(-1)
    return shares @ torch.cat([own_value, _every(value, heads)], 2), shares[..., own.key.shape[1] :]


def _every(tensor: Tensor, heads: int) -> Tensor:
    return tensor.repeat_interleave(heads // tensor.shape[1], 1)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


# In transformers: an implementation of its own, for which the model makes the masks of its eager attention.

_owned: dict[int, Own] = {}


def _registered(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **keywords: Any) -> Any:
    bias = keywords.get("position_bias")
    together = bias if mask is None else mask if bias is None else mask + bias
    y, shares = dense(
        query, key, value, _owned.get(id(module)), together, keywords.get("scaling"), keywords.get("softcap")
    )
    return y.transpose(1, 2), shares


AttentionInterface.register("dense_by_hand", _registered)
AttentionMaskInterface.register("dense_by_hand", hf_masks.eager_mask)


def use(model: Any, implementation: str) -> None:
    """Without the checks of transformers, which ask for packages and devices."""
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            module.config._attn_implementation = implementation


@contextlib.contextmanager
def by_hand(model: Any, owned: dict[str, Own]) -> Iterator[Any]:
    """The base of transformers with a prefix in the attention modules of these names."""
    use(model, "dense_by_hand")
    _owned.update({id(model.get_submodule(name)): own for name, own in owned.items()})
    try:
        yield model
    finally:
        _owned.clear()


# Flash attention as its documentation defines it: [batch, tokens, heads, dim], causal masks aligned at the last key.


def _flash(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
           causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
           deterministic: bool = False) -> Tensor:  # fmt: skip
    assert dropout_p == 0
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    ahead = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None] - (k.shape[2] - q.shape[2])
    hidden = (ahead > 0) & causal
    if window_size[0] >= 0:
        hidden = hidden | (ahead < -window_size[0])
    if window_size[1] >= 0 and not causal:
        hidden = hidden | (ahead > window_size[1])
    mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill(hidden, -torch.inf)
    y, _ = dense(q, k, v, None, mask, softmax_scale, softcap or None)
    return y.transpose(1, 2)


def _flash_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
                  max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
                  window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
                  deterministic: bool = False) -> Tensor:  # fmt: skip
    rows = zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:], strict=True)
    return torch.cat([
        _flash(q[a:b][None], k[c:d][None], v[c:d][None], 0.0, softmax_scale, causal, window_size, softcap)[0]
        for a, b, c, d in rows
    ])  # fmt: skip


@contextlib.contextmanager
def flash_by_hand(monkeypatch: Any) -> Iterator[None]:
    def imports(*_: Any, **__: Any) -> Any:
        return _flash, _flash_varlen, None, hf_flash._pad_input, hf_flash._unpad_input

    with monkeypatch.context() as patch:
        patch.setattr(hf_flash, "_lazy_imports", imports)
        patch.setattr(hf_flash, "_loaded_implementation", None)
        yield


@contextlib.contextmanager
def flex_uncompiled(monkeypatch: Any) -> Iterator[None]:
    """On a CPU transformers compiles flex_attention, which then has no backward there."""

    def plain(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **keywords: Any) -> Any:
        return flex_attention(query, key, value, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(hf_flex, "compile_friendly_flex_attention", plain)
        yield


def as_heads(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> Tensor:
    """A projection of [tokens, batch, in] as [batch, heads, tokens, dim]."""
    projected = nn.functional.linear(x, weight, bias)
    return projected.view(len(x), x.shape[1], heads, -1).permute(1, 2, 0, 3)

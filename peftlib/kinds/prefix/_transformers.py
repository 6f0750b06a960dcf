"""Keys and values in front inside an attention that a transformers model takes from its registry of functions."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..._core.foreign import ATTENTION, attention_of, attention_registry
from ..._core.host import base_type
from ..._core.override import overridden
from ..._errors import AdapterError
from ._context import Front
from ._flex import blocks_in_front

# Tensors of a call that say nothing of the keys, so that keys may come in front of them.
_KNOWN = ("position_bias", "position_ids", "cache_position", "s_aux")


class _Name(str):
    """An implementation's name, equal to it, yet another key: the modelling code compares names, the registry hashes
    them."""

    def __hash__(self) -> int:
        return 0


class _Config:
    """The host's config for one call: all as it was, but the registry finds `_attend` under the name."""

    def __init__(self, config: Any, front: Front) -> None:
        self.given, self.front = config, front
        setattr(self, ATTENTION, _Name(getattr(config, ATTENTION)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.given, name)


def uses_registry(host: nn.Module) -> bool:
    """Whether the host's attention can only be met in the registry: what calls torch's own function is met there."""
    name = attention_of(host) or ""
    meant = name in ("eager", "flex_attention") or "flash" in name
    return meant and has_registry(host)


def has_registry(host: nn.Module) -> bool:
    return _registry_of(host)[0] is not None


def _registry_of(host: nn.Module) -> tuple[Any, Any]:
    return attention_registry(base_type(type(host)))


@contextlib.contextmanager
def registered(host: Any, front: Front) -> Iterator[None]:
    registry, _ = _registry_of(host)
    config: Any = _Config(host.config, front)
    name = getattr(config, ATTENTION)
    if name not in registry:
        registry.register(name, _attend)
    with overridden(host, {"config": config}):
        yield


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """What stands in the registry: queries, keys and values are [batch, heads, tokens, dim], the result
    [batch, tokens, heads, dim]."""
    config = module.config
    front: Front = config.front
    front.meet()
    with overridden(module, {"config": config.given}):
        registry, eager = _registry_of(module)
        name = attention_of(module) or ""
        function = registry.get_interface(name, eager)
        if front.gate is not None:
            y, attention_weights = function(module, query, key, value, attention_mask, *args, **kwargs)
            scale = kwargs.get("scaling", getattr(module, "scaling", None))
            return y + front.term(query, scale).transpose(1, 2), attention_weights
        _require_understood(front, kwargs)
        if "flash" in name:
            kwargs = _flash_keywords(front, function, query, key, attention_mask, kwargs)
        attention_mask, padding = _mask_in_front(front, attention_mask, key)
        if kwargs.get("position_bias") is not None:
            bias = kwargs["position_bias"]
            kwargs = {**kwargs, "position_bias": F.pad(bias, (front.length + padding, 0))}
        key, value = front.beside(key, value, padding)
        y, attention_weights = function(module, query, key, value, attention_mask, *args, **kwargs)
    return y, attention_weights[..., front.length :] if isinstance(
        attention_weights, Tensor
    ) and attention_weights.dim() == 4 else attention_weights


def _mask_in_front(front: Front, mask: Any, key: Tensor) -> tuple[Any, int]:
    """The mask is None, [batch, keys] of ones and zeros, [batch, heads, queries, keys], or in blocks, where keys are to
    be filled up."""
    if mask is None:
        return (front.visible(key.new_zeros(1, key.shape[-2]), key.shape[-2]) if front.is_filled_up else None), 0
    if not isinstance(mask, Tensor):
        return blocks_in_front(front.length, mask)
    if mask.dim() == 2:
        return F.pad(mask, (front.length, 0), value=1), 0
    return front.visible(mask, key.shape[-2]), 0


def _require_understood(front: Front, kwargs: dict[str, Any]) -> None:
    for name, item in kwargs.items():
        unknown = item is not None if name == "cache" else isinstance(item, Tensor) and name not in _KNOWN
        if unknown:
            raise AdapterError(
                f"Prefix around {front.host}: its attention takes {name!r}, which may count keys, and a prefix would "
                "shift them. Use gate=True, or another attention implementation."
            )


def _flash_keywords(
    front: Front, function: Any, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Flash attention aligns a causal mask at the last key, so all that is in front is seen: but not past a window,
    and not by each of several sequences packed into one row."""
    window, positions = kwargs.get("sliding_window"), kwargs.get("position_ids")
    packed = mask is None and positions is not None and len(query) == 1 and bool((positions.diff(dim=-1) != 1).any())
    reasons = {
        f"a window of {window} over {key.shape[-2]} keys": window is not None and key.shape[-2] > window,
        "sequences packed into one row": packed,
        "causal masks aligned at the first key": function.__globals__.get("_use_top_left_mask", False),
    }
    for reason, found in reasons.items():
        if found:
            raise AdapterError(
                f"Prefix around {front.host}: flash attention with {reason} would hide the prefix. "
                "Use gate=True, or another attention implementation."
            )
    return {**kwargs, "sliding_window": None, "position_ids": None}

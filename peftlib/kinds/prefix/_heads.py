"""How many key and value heads an attention has, and their width: read from the host or its config."""

from typing import Any

from torch import nn

from ..._core.adapter import Adapter
from ..._core.host import Adapters
from ..._errors import AdapterError

# What attention modules call these numbers, the most telling first.
_HEADS = (
    "num_key_value_heads", "num_kv_heads", "n_kv_heads",
    "num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads",
)  # fmt: skip
_HEAD_DIMS = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size", "dim_head", "d_head", "d_kv")
_WIDTHS = ("embed_dim", "hidden_size", "d_model", "n_embd", "dim")
_QUERY_HEADS = _HEADS[3:]
_KEY_LAYERS = ("k_proj", "key", "k", "to_k", "wk", "key_proj")


def heads_of(host: nn.Module, heads: int | None, head_dim: int | None) -> tuple[int, int]:
    """As given, else what the host says, else what the attention modules inside it say where they agree."""
    if heads is not None and head_dim is not None:
        return heads, head_dim
    found = _said_by(host, heads, head_dim)
    if found is None:
        inside = {
            _said_by(module, heads, head_dim)
            for module in host.modules()
            if not isinstance(module, (Adapter, Adapters))
        }
        inside.discard(None)
        found = inside.pop() if len(inside) == 1 else None
    if found is None:
        raise AdapterError(
            f"{type(host).__name__} does not say how many key and value heads its attention has, or of what width. "
            "Pass heads= and head_dim=."
        )
    return found


def _said_by(module: nn.Module, heads: int | None, head_dim: int | None) -> tuple[int, int] | None:
    sources = [module, getattr(module, "config", None)]
    head_dim = head_dim or _first(sources, _HEAD_DIMS) or _divided(sources)
    out = _first([getattr(module, name, None) for name in _KEY_LAYERS], ("out_features",))
    if heads is None and head_dim and out and not out % head_dim:
        heads = out // head_dim
    heads = heads or _first(sources, _HEADS)
    if not head_dim and heads and out and not out % heads:
        head_dim = out // heads
    return (heads, head_dim) if heads and head_dim else None


def _divided(sources: list[Any]) -> int | None:
    width, queries = _first(sources, _WIDTHS), _first(sources, _QUERY_HEADS)
    return width // queries if width and queries else None


def _first(sources: list[Any], names: tuple[str, ...]) -> int | None:
    found = (getattr(source, name, None) for source in sources for name in names)
    return next(
        (value for value in found if isinstance(value, int) and not isinstance(value, bool) and value > 0), None
    )

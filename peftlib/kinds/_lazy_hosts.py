"""Which hosts read a lazy weight: those that compute by torch's functions, and, compiled, those known to trace."""

from typing import Any

from torch import nn
from torch.compiler import is_compiling

from .._core.lazy_weight import note_materialized
from . import _lazy_products as _lazy_products
from . import _lazy_views as _lazy_views

_BY_TORCH = ("eager", "grouped_mm", "batched_mm")


def is_lazily_read(host: Any, adapter: nn.Module) -> bool:
    """Compiled, a host that asks what its weight is would meet an object that is no tensor, so only what is known to
    ask nothing gets one: the experts of transformers."""
    implementation = getattr(getattr(host, "config", None), "_experts_implementation", None)
    if implementation is not None and implementation not in _BY_TORCH:
        note_materialized(f"the {implementation} kernels", adapter)
        return False
    return implementation is not None or not is_compiling()

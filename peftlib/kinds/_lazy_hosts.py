"""Which hosts read a lazy weight: those that compute by torch's functions, and, compiled, those known to trace."""

from typing import Any

from torch import nn
from torch.compiler import is_compiling

from .._core.lazy_weight import note_materialized
from . import _lazy_layers as _lazy_layers
from . import _lazy_products as _lazy_products
from . import _lazy_scaled as _lazy_scaled
from . import _lazy_views as _lazy_views

_BY_TORCH = ("eager", "grouped_mm", "batched_mm")
_BY_ONE_FUNCTION = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)  # that has the input and all weights in it


def is_lazily_read(host: Any, adapter: Any) -> bool:
    """Compiled, a host that asks what its weight is would meet an object that is no tensor, so it gets one only where
    it is known to ask nothing (the experts of transformers), or where the whole would leave dropout out."""
    if isinstance(host, _BY_ONE_FUNCTION):
        note_materialized(type(host).__name__, adapter)
        return False
    implementation = getattr(getattr(host, "config", None), "_experts_implementation", None)
    if implementation is not None and implementation not in _BY_TORCH:
        note_materialized(f"the {implementation} kernels", adapter)
        return False
    return implementation is not None or not is_compiling() or bool(adapter.dropout and adapter.training)


def shows_input(host: nn.Module) -> bool:
    """Whether the functions that read this host's weights may show what is multiplied with them: one input, not two."""
    return not isinstance(host, (*_BY_ONE_FUNCTION, nn.Bilinear))

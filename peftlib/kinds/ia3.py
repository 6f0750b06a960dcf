"""IA3: a learned factor for each output, or each input, of a frozen layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require_one_of
from .._core.adapter import Adapter, state_of, trainable_dtype
from .._core.host import base_type
from .._errors import AdapterError
from ._features import features_of
from ._low_rank import low_rank_branch_of, require_overridable
from ._row_parameters import FactorRows
from ._weight_layout import is_transposed_linear

_SIDES = ("output", "input")
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LOOKUPS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class IA3(Adapter):
    r"""A learned factor for each feature, which inhibits or amplifies it (Liu et al. 2022, who put it on the outputs of
    keys and values and on the inputs of the second feed-forward layer).

    .. math:: y = l \odot (W x + b) \quad\text{or}\quad y = W (l \odot x) + b

    l is `factor` and starts at one, so inserting changes nothing. Merged, it multiplies the rows of W, and b, or
    the columns of W. Hosts are Linear, ConvNd, ConvTransposeNd, Embedding, EmbeddingBag, torch's norms, HF `Conv1D`,
    and MultiheadAttention, where the factors are those of keys and values, one after the other.

    Args:
        host: the module to adapt, from `inject`.
        on: "output" or "input": which features are scaled. Linear and the convolutions alone have inputs to scale.
        child: the dotted name of a module inside the host to scale in its place, where the host reads the child's
            weights without calling it; `inject` fills it in. Default the host itself.
        dtype: of the factor; default the host's own, or float32 beside half precision.

    Raises:
        AdapterError: an unknown `on`, a host of another type, one without weights, or one without such an input.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> peftlib.inject(model, "2", peftlib.IA3, on="input")
        ['2']
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        16
    """

    def __init__(
        self, host: nn.Module, *, on: str = "output", child: str = "", dtype: str | torch.dtype | None = None
    ) -> None:
        super().__init__()
        scaled = host.get_submodule(child)
        _check(scaled, on)
        if child:
            require_overridable(host, f"{child}.weight")
        self.on, self.child = on, child
        self.axes = {"factor": (0, None) if on == "output" else (None, 0)}
        self.axis, shape = features_of(scaled).axis, _shape(scaled, on)
        self.calls = not child and _has_call_form(host)
        like = next(scaled.parameters(recurse=False))
        self.factor = nn.Parameter(torch.ones(shape, device=like.device, dtype=trainable_dtype(dtype, like)))

    @classmethod
    def split(cls, host: nn.Module, inner: str, config: dict[str, Any]) -> list[dict[str, Any]]:
        return [{**config, "child": inner} if inner else config]

    def file_keys(self) -> dict[str, str]:
        return {f"{self.child}.{key}".lstrip("."): key for key in state_of(self)}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets the factor to one. A model on the meta device calls this once it is real."""
        self.factor.fill_(1.0)

    def forward(self, host: nn.Module, call: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.calls:
            return super().forward(host, call, *args, **kwargs)
        factor = self._factor_in(host)
        if self.on == "output":
            return self._scaled(call(*args, **kwargs), factor)
        if args:
            return call(self._scaled(args[0], factor), *args[1:], **kwargs)
        (name, x), *rest = kwargs.items()  # a stock layer's first argument is its only tensor
        return call(**{name: self._scaled(x, factor)}, **dict(rest))

    def takes_weight(self, host: nn.Module) -> bool:
        return True

    def _factor_in(self, host: nn.Module) -> Tensor:
        """l, or with a weight 1 + w (l − 1)."""
        weight = self.weight_in(host)
        if isinstance(weight, float) and weight == 1.0:
            return self.factor
        return 1 + weight * (self.factor - 1)

    def follows_call(self, host: nn.Module) -> bool:
        return self.calls and self.on == "output"

    @classmethod
    def together(cls, host: nn.Module, groups: Any, adapters: Any) -> Any:
        plain = all(type(one) is IA3 and one.follows_call(host) for own in adapters for one in own)
        return FactorRows(groups, adapters) if plain and groups.dim == 0 else None

    def _scaled(self, x: Tensor, factor: Tensor) -> Tensor:
        """In the dtype of x, rounded once. Autograd keeps x and the factor, no product."""
        behind = -1 - self.axis if self.axis < 0 else x.dim() - 1 - self.axis
        return (x * factor.view(*factor.shape, *[1] * behind)).to(x.dtype)

    def fold(self, host: nn.Module) -> dict[str, Tensor]:
        """Rows of the weight, and the bias, times the factor; or columns of the weight."""
        factor = self._factor_in(host).to(torch.promote_types(self.factor.dtype, torch.float32))
        if isinstance(host, nn.MultiheadAttention) and not self.child:
            return _fold_attention(host, factor)
        scaled: Any = host.get_submodule(self.child)
        folded = {"weight": scaled.weight * _beside(scaled, self.on, factor, scaled.weight)}
        bias: Any = getattr(scaled, "bias", None)
        if bias is not None and self.on == "output":
            folded["bias"] = bias * factor
        return {f"{self.child}.{leaf}".lstrip("."): value for leaf, value in folded.items()}


def _beside(host: Any, on: str, factor: Tensor, weight: Tensor) -> Tensor:
    """The factor in a shape that multiplies the weight."""
    behind = [1] * (weight.dim() - 2)
    if isinstance(host, _NORMS):
        return factor
    if isinstance(host, _LOOKUPS) or (is_transposed_linear(host) and on == "output"):
        return factor.unsqueeze(0)
    if isinstance(host, _TRANSPOSED) and on == "output":  # [in, out/groups, *kernel], a group's inputs together
        return _of_groups(host, factor, weight.shape[0])
    if isinstance(host, _CONVS) and on == "input":  # [out, in/groups, *kernel], a group's outputs together
        return _of_groups(host, factor, weight.shape[0])
    if isinstance(host, nn.Linear) and on == "input":
        return factor.unsqueeze(0)
    return factor.view(-1, 1, *behind)


def _of_groups(host: Any, factor: Tensor, rows: int) -> Tensor:
    """[rows, of each group, 1...] from the factors of all groups in a row."""
    by_group = factor.view(host.groups, -1).repeat_interleave(rows // host.groups, 0)
    return by_group.view(*by_group.shape, *[1] * len(host.kernel_size))


def _fold_attention(host: nn.MultiheadAttention, factor: Tensor) -> dict[str, Tensor]:
    rows = torch.cat([factor.new_ones(host.embed_dim), factor])  # of queries, keys and values
    folded: dict[str, Tensor] = {}
    if host.in_proj_weight is not None:
        folded["in_proj_weight"] = host.in_proj_weight * rows[:, None]
    else:
        keys, values = factor.view(2, -1, 1)
        folded["k_proj_weight"], folded["v_proj_weight"] = host.k_proj_weight * keys, host.v_proj_weight * values
    if host.in_proj_bias is not None:
        folded["in_proj_bias"] = host.in_proj_bias * rows
    return folded


def _shape(host: Any, on: str) -> tuple[int, ...]:
    if isinstance(host, nn.MultiheadAttention):
        return (2 * host.embed_dim,)
    if isinstance(host, _NORMS):
        return tuple(host.weight.shape)
    size = getattr(features_of(host), f"{on}s")
    return (size,)


def _has_call_form(host: Any) -> bool:
    """A subclass with a forward of its own may do more than the stock layer, so there the weights speak."""
    if isinstance(host, _NORMS):
        forward: Callable[..., Any] = base_type(type(host)).forward  # pyright: ignore[reportAttributeAccessIssue]
        return any(forward is getattr(norm, "forward", None) for norm in _NORMS)
    return not isinstance(host, nn.MultiheadAttention) and low_rank_branch_of(host, "weight") is not None


def _check(host: Any, on: str) -> None:
    require_one_of(_SIDES, "on", on)
    with_inputs = isinstance(host, (nn.Linear, *_CONVS, *_TRANSPOSED)) or is_transposed_linear(host)
    found = type(host).__name__
    if not with_inputs and not isinstance(host, (*_LOOKUPS, *_NORMS, nn.MultiheadAttention)):
        raise AdapterError(
            f"IA3 does not know which of the weights of {found} give which features. Target Linear, ConvNd, "
            "ConvTransposeNd, Embedding, EmbeddingBag, HF Conv1D, MultiheadAttention or a norm of torch."
        )
    if not with_inputs and on == "input":
        raise AdapterError(f'on="input": {found} has no input that a factor can scale alone. Use on="output".')
    if isinstance(host, _NORMS) and host.weight is None:
        raise AdapterError(
            f"{found} has no weight (it is not affine), so the factor has nothing to act on. Exclude it."
        )

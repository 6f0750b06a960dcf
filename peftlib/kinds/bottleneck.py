"""Bottleneck: a narrow trainable layer after a frozen module, or in parallel with it."""

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require_at_least, require_one_of, require_positive, require_probability, require_whole_number
from .._core.adapter import Adapter, trainable_dtype
from .._core.host import base_type
from .._errors import AdapterError
from ..kernels import bottleneck
from ..kernels.bottleneck.reference import ACTIVATIONS
from ._bottleneck_rows import bottleneck_rows_of
from ._features import features_of
from ._hidden_states import input_of, with_hidden_states

_POSITIONS, _NORMS = ("after", "parallel"), ("none", "before", "after")


class Bottleneck(Adapter):
    r"""A bottleneck adapter after any module (Houlsby et al. 2019; Pfeiffer et al. 2020), or in parallel with it from
    the module's input (He et al. 2021).

    .. math:: y + s\,f(y) \quad\text{or}\quad y + s\,f(x), \qquad
        f(u) = \mathrm{up}(\mathrm{drop}(\sigma(\mathrm{down}(u))))

    y is what the host gives for x: a tensor, or the hidden states in a tuple, a list, a dict or a transformers
    ModelOutput, of which the rest passes through. The up-projection starts at zero, so inserting changes nothing. After
    a convolution, or another module that has channels first, the projections are 1×1 convolutions. There is no weight
    form, so it cannot be merged.

    Args:
        host: the module to adapt, from `inject`.
        width: of the bottleneck; default the size of y over `reduction`.
        reduction: what y's size is divided by where no `width` is given, at least 1.
        activation: σ: "relu", "gelu", "gelu_tanh", "silu", "tanh" or "identity".
        position: "after": f reads y; "parallel": f reads x, the host's first argument.
        norm: a LayerNorm of its own: "none", "before" (of u) or "after" (of what `up` gives). After, it is the norm's
            weight that starts at zero, and `up` is drawn: a norm of zeros would turn the first step into a jump.
        scale: s, a positive number, or "learned": a parameter that starts at 1.
        dropout: probability, in [0, 1), of dropping an activation of the bottleneck, in training.
        residual: whether f's own input is added to s f(y), as in the papers. Without it s f(y) takes the place of y and
            the projections start as those of any layer do, so inserting changes the output. Parallel adds to y always.
        dim: the size of x and y; default what the host's type says, or a call of it on the meta device, or its layers.
        axis: of the features in x and y; default as for `dim`, else the last one.
        dtype: of the parameters; default the host's own, or float32 beside half precision.

    Raises:
        AdapterError: a size that cannot be found, values out of range, `residual=False` in parallel; and in the
            call, hidden states that are absent or of another size.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.TransformerEncoderLayer(16, 4, batch_first=True).eval()
        >>> x = torch.randn(2, 5, 16)
        >>> before = model(x)
        >>> peftlib.inject(model, ["self_attn", "linear2"], peftlib.Bottleneck, width=4, activation="relu")
        ['self_attn', 'linear2']
        >>> torch.allclose(model(x), before, atol=1e-6)
        True
    """

    def __init__(
        self,
        host: nn.Module,
        *,
        width: int | None = None,
        reduction: float = 16,
        activation: str = "gelu",
        position: str = "after",
        norm: str = "none",
        scale: float | str = 1.0,
        dropout: float = 0.0,
        residual: bool = True,
        dim: int | None = None,
        axis: int | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(activation, position, norm, scale, dropout, residual)
        self.activation, self.position, self.norm = activation, position, norm
        self.dropout, self.residual = float(dropout), residual
        self.features = tuple(_features(host, position, dim, axis))  # a pickle names no class of ours
        inputs, outputs, *_ = self.features
        width = _width(width, reduction, outputs)
        self.input_name = _first_argument(host)
        like = next((p for p in host.parameters() if p.is_floating_point()), torch.empty(0))
        own: Any = {"device": like.device, "dtype": trainable_dtype(dtype, like)}
        self.down_weight = nn.Parameter(torch.empty(width, inputs, **own))
        self.down_bias = nn.Parameter(torch.empty(width, **own))
        self.up_weight = nn.Parameter(torch.empty(outputs, width, **own))
        self.up_bias = nn.Parameter(torch.empty(outputs, **own))
        normed = {"none": None, "before": inputs, "after": outputs}[norm]
        self.norm_weight = None if normed is None else nn.Parameter(torch.empty(normed, **own))
        self.norm_bias = None if normed is None else nn.Parameter(torch.empty(normed, **own))
        self.scale = nn.Parameter(torch.empty(1, **own)) if isinstance(scale, str) else float(scale)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the parameters again. A model on the meta device calls this once it is real."""
        if self.down_weight.is_meta:
            return
        for parameter in self.parameters():
            parameter.zero_()
        for ones in (self.norm_weight, self.scale):
            if isinstance(ones, Tensor):
                ones.fill_(1.0)
        _draw(self.down_weight)
        silent = self.norm_weight if self.norm_weight is not None and self.norm == "after" else self.up_weight
        if silent is not self.up_weight or not self.residual:
            _draw(self.up_weight)
        if self.residual:
            silent.zero_()

    def forward(self, host: nn.Module, call: Any, *args: Any, **kwargs: Any) -> Any:
        output = call(*args, **kwargs)
        x = None if self.position == "after" else input_of(self.input_name, args, kwargs)
        weight = self.weight_in(host)
        return with_hidden_states(output, lambda y: self._adapted(y, y if x is None else x, weight))

    def takes_weight(self, host: nn.Module) -> bool:
        return True

    def follows_call(self, host: nn.Module) -> bool:
        return True

    @classmethod
    def together_behind(cls, host: nn.Module, groups: Any, adapters: Any) -> Any:
        plain = all(type(one) is Bottleneck for own in adapters for one in own)
        return bottleneck_rows_of(host, groups, adapters) if plain else None

    def _adapted(self, y: Tensor, u: Tensor, weight: float | Tensor) -> Tensor:
        axis = self._axis_in(y, u)
        is_whole = isinstance(weight, float) and weight == 1.0
        scale = self.scale if is_whole or not self.residual else self.scale * weight
        if not self.residual:
            term = self._bottleneck(u.movedim(axis, -1), None, scale).movedim(-1, axis)
            return term if is_whole else (y + weight * (term - y)).to(term.dtype)
        if axis == y.dim() - 1 and y.is_contiguous():
            return self._bottleneck(u, y, scale)
        term = self._bottleneck(u.movedim(axis, -1), None, scale).movedim(-1, axis)
        return torch.add(y, term.to(y.dtype))  # y first: the sum is laid out as y is

    def _bottleneck(self, u: Tensor, residual: Tensor | None, scale: float | Tensor) -> Tensor:
        return self.with_own_masks(
            bottleneck, u, self.down_weight, self.down_bias, self.up_weight, self.up_bias, self.norm_weight,
            self.norm_bias, residual=residual, activation=self.activation, norm=self.norm,
            scale=scale, dropout=self.dropout, training=self.training,
        )  # fmt: skip

    def _axis_in(self, y: Tensor, u: Tensor) -> int:
        inputs, outputs, axis, _ = self.features
        axis = axis + y.dim() if axis < 0 else axis
        places = [(*tensor.shape[:axis], *tensor.shape[axis + 1 :]) for tensor in (y, u)]
        fits = 0 <= axis < y.dim() == u.dim() and y.shape[axis] == outputs and u.shape[axis] == inputs
        if fits and places[0] == places[1]:
            return axis
        asked, given = f"{outputs} features", f"gave {list(y.shape)}"
        if y is not u:
            asked, given = f"{inputs} features read and {outputs} given", f"read {list(u.shape)} and {given}"
        raise AdapterError(
            f"Bottleneck is for {asked} along axis {self.features[2]}, and its module {given}. "
            + ("Pass dim= and axis=." if y is u else 'Pass dim= and axis=, or use position="after".')
        )


def _features(host: nn.Module, position: str, dim: int | None, axis: int | None) -> Any:
    found = features_of(host)
    if position == "parallel" and not found.keeps_places:
        raise AdapterError(
            f"{type(host).__name__} gives another number of places than it reads, so nothing read in parallel fits "
            'what it gives. Use position="after".'
        )
    if axis is not None:
        found = found._replace(axis=axis)
    if dim is not None:
        return found._replace(inputs=_whole("dim", dim), outputs=dim)
    reads = found.outputs if position == "after" else found.inputs
    if reads is not None and found.outputs is not None:
        return found._replace(inputs=reads)
    side = "gives" if found.outputs is None else "reads"
    advice = "Pass dim=, the size of its hidden states" if found.outputs is None else 'Use position="after"'
    raise AdapterError(f"{type(host).__name__} does not say how many features it {side}. {advice}.")


def _width(width: int | None, reduction: float, size: int) -> int:
    if width is not None:
        return _whole("width", width)
    require_at_least(1, "reduction", reduction, say=16)
    return max(1, int(size / reduction))


def _whole(name: str, value: Any) -> int:
    require_whole_number(name, value, say=64)
    return value


def _first_argument(host: nn.Module) -> str:
    forward: Any = base_type(type(host)).forward
    return next(iter([*inspect.signature(forward).parameters][1:]), "")


def _draw(weight: Tensor) -> None:
    weight.copy_(torch.empty(weight.shape).uniform_(-1, 1) / math.sqrt(weight.shape[1]))


def _check(activation: str, position: str, norm: str, scale: Any, dropout: Any, residual: Any) -> None:
    for name, value, known in (
        ("activation", activation, ACTIVATIONS), ("position", position, _POSITIONS), ("norm", norm, _NORMS)
    ):  # fmt: skip
        require_one_of(known, name, value)
    if scale != "learned":
        require_positive("scale", scale, say='1.0 or "learned"')
    require_probability("dropout", dropout)
    if not isinstance(residual, bool) or (position == "parallel" and not residual):
        raise AdapterError(
            f"residual={residual!r}: it is true or false, and in parallel the bottleneck is added to what the host "
            "gives in any case. Leave it out."
        )

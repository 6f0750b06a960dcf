"""DoRA: a low-rank change of a weight's direction beside a trainable magnitude."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .._core.adapter import fold_all, running_with, unwrapped
from .._core.lazy_weight import LazyWeight
from .._core.override import owner_of, weight_of
from .._core.quantized import not_real_as
from .._core.weights import blended
from .._errors import AdapterError
from ..kernels import dora_norm
from ._weight_layout import Stack, TransposedKernel
from .lora import LoRA


class DoRA(LoRA):
    r"""Weight-decomposed low-rank adaptation (Liu et al. 2024): LoRA turns the rows of W, and a magnitude scales them.

    .. math:: y = m \odot \frac{V x}{\lVert V \rVert} + b, \qquad V = W + s\,B A

    m is `magnitude` [out], and ‖V‖ the norm of each row, over all that feeds one output: of a Linear's row, of a
    channel's kernel, of one dimension of an embedding over all its entries, of a row of each matrix in a stack. m
    starts at ‖W‖ and B at zero, so inserting changes nothing. ‖V‖ counts as a constant in the gradient, as section 4.3
    of the paper proposes; it is computed from W, A and B at each call and kept nowhere, so whatever changes W, it is
    right. A row of zeros has no norm to divide by: there m/‖V‖ counts as 1.

    Where LoRA has a low-rank call (Linear, ConvNd, ConvTransposeNd, Embedding, EmbeddingBag), and beside stacks of
    experts, no matrix of W's size is made, in training either; every other host runs with the folded weight. Dropout
    acts on the input of A alone, as in LoRA: the paper's code drops the input of W as well, and multiplies by W twice
    for it.

    Args:
        host: the module to adapt, from `inject`; its weight is floating point.
        rank: r, at least 1.
        alpha: α; the scale s is α/rank.
        dropout: probability, in [0, 1), of dropping an element of the input on its way to A, in training.
        rank_stabilized: scale by α/√rank.
        init: how the factor that is not zero is drawn: "kaiming", "gaussian" or "orthogonal", as in `LoRA`.
        param: the weight, or a list of them, by dotted name on the host; default its own matrices.
        dtype: of the factors and m; default W's own, or float32 beside a half-precision W.

    Raises:
        AdapterError: what `LoRA` refuses, a packed weight, and init="pissa".

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> peftlib.inject(model, torch.nn.Linear, peftlib.DoRA, rank=2, alpha=4)
        ['0', '2']
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        62
    """

    magnitude: nn.Parameter
    lazy = (Stack,)
    drops_apart = False
    axes: Mapping[str, tuple[int | None, int | None]] = {**LoRA.axes, "magnitude": (0, None)}

    def __init__(
        self,
        host: nn.Module,
        *,
        rank: int = 8,
        alpha: float = 8.0,
        dropout: float = 0.0,
        rank_stabilized: bool = False,
        init: str = "kaiming",
        param: str = "weight",
        dtype: str | torch.dtype | None = None,
    ) -> None:
        _require_direction(host, param, init)
        super().__init__(
            host,
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            rank_stabilized=rank_stabilized,
            init=init,
            param=param,
            dtype=dtype,
        )

    @torch.no_grad()
    def reset_parameters(self, host: nn.Module | None = None) -> None:
        """Draws the factors again and takes m from the host's weight, which must be there."""
        if host is None:
            raise AdapterError("DoRA starts from the norms of its host's weight. Call reset_parameters(host).")
        super().reset_parameters(host)
        norm = self.row_norms(host).to(self.lora_A.dtype)
        if "magnitude" not in self._parameters:  # LoRA's constructor calls this
            self.magnitude = nn.Parameter(torch.empty_like(norm))
        self.magnitude.copy_(norm)

    def forward(self, host: nn.Module, call: Any, *args: Any, **kwargs: Any) -> Any:
        if self.term is None:
            return super().forward(host, call, *args, **kwargs)
        inside, call = unwrapped(call, lambda bare: functools.partial(self._scaled, host, bare))
        with running_with(host, fold_all(host, inside), inside):
            return call(*args, **kwargs)

    def follows_call(self, host: nn.Module) -> bool:
        return False  # it calls the host with the weights that are folded inside

    def _scaled(self, host: Any, call: Any, *args: Any, **kwargs: Any) -> Tensor:
        weight = self.weight_in(host)
        if isinstance(weight, Tensor) or weight != 1.0:
            given = call(*args, **kwargs)
            moved = self._turned(host, lambda *_, **__: given, *args, **kwargs)
            return (given + weight * (moved - given)).to(given.dtype)
        return self._turned(host, call, *args, **kwargs)

    def _scale_in(self, host: nn.Module) -> float:
        return self.scale  # of V: a weight multiplies what the whole changes

    def _turned(self, host: Any, call: Any, *args: Any, **kwargs: Any) -> Tensor:
        """m ⊙ V x/‖V‖ + b"""
        y = super().forward(host, call, *args, **kwargs)  # V x + b
        gain, bias = self._gain(host), getattr(host, "bias", None)
        scaled = self._scale(y, gain, bias)
        if not isinstance(host, nn.Embedding) or host.padding_idx is None:
            return scaled
        (tokens,) = args or kwargs.values()
        unlearned = (tokens == host.padding_idx)[..., None]  # as W's row, which does not learn from padding
        return torch.where(unlearned, self._scale(y, gain.detach(), bias), scaled)

    def _scale(self, y: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        """g ⊙ (y − b) + b, in the form that is y to the bit where g is 1."""
        kernel = [1] * (self.lora_A.dim() - 2)
        gain = gain.view(-1, *kernel)
        if bias is None:
            return (y * gain).to(y.dtype)
        return torch.addcmul((1 - gain) * bias.view(-1, *kernel), y, gain).to(y.dtype)

    def fold_for_call(self, host: nn.Module) -> dict[str, Tensor]:
        """Compiled, or around another adapter's change of the stack, with the whole: its norms need what that made. So
        is a part of its effect, which is no gain for each row."""
        of_one = self.weight_in(host)
        is_whole_effect = isinstance(of_one, float) and of_one == 1.0
        if is_whole_effect and not is_compiling() and not isinstance(weight_of(host, self.param), LazyWeight):
            return super().fold_for_call(host)
        return self.fold(host)

    def _row_gain(self, host: nn.Module) -> Tensor:
        return self._gain(host)

    def low_rank_change(self, host: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        return {}  # its change has the norms in it

    def fold(self, host: nn.Module) -> dict[str, Tensor]:
        """m ⊙ V/‖V‖, unrounded."""
        ((path, moved),) = super().fold(host).items()
        scaled = self._over_rows(host, self._gain(host)) * self.form.matrix(moved)
        whole, weight = self.form.weight(scaled, moved.shape), self.weight_in(host)
        if isinstance(weight, Tensor) or weight != 1.0:
            whole = blended(weight_of(host, path), whole, weight)
        return {path: whole}

    def _gain(self, host: nn.Module) -> Tensor:
        """m/‖V‖ [..., out]; 1 for a row of zeros, where m starts at zero too."""
        norm = self.row_norms(host).to(self.magnitude.dtype)
        empty = (norm == 0).to(norm.dtype)
        return (self.magnitude + empty) / (norm + empty)

    def row_norms(self, host: Any) -> Tensor:
        """‖V‖ [..., out]."""
        matrix, (A, B) = self.form.matrix(weight_of(host, self.param)), self.form.pair(self.lora_A, self.lora_B)
        if self.form is not TransposedKernel:
            return dora_norm(matrix, A, B, self.scale)
        owner: Any = owner_of(host, self.param)[0]
        matrix, A = (each.unflatten(1, (owner.groups, -1)).transpose(0, 1) for each in (matrix, A))
        by_tap = dora_norm(matrix, A, B, self.scale)  # [groups, out/groups * kernel]
        by_channel = by_tap.unflatten(1, (owner.out_channels // owner.groups, -1))
        return torch.linalg.vector_norm(by_channel, dim=-1).flatten()

    def _over_rows(self, host: Any, vector: Tensor) -> Tensor:
        """One value for each output, laid out to multiply the matrix."""
        if self.form is not TransposedKernel:
            return vector.unsqueeze(-1)
        owner: Any = owner_of(host, self.param)[0]
        taps, inputs = math.prod(owner.kernel_size), owner.in_channels // owner.groups
        by_group = vector.view(owner.groups, -1).t()  # [out/groups, groups]
        return by_group.repeat_interleave(taps, 0).repeat_interleave(inputs, 1)


def _require_direction(host: nn.Module, param: str, init: str) -> None:
    if init == "pissa":
        raise AdapterError(
            'init="pissa" is of LoRA: DoRA starts from W itself. Pass "kaiming", "gaussian" or "orthogonal".'
        )
    unreal = not_real_as(host, param) if isinstance(getattr(host, param, None), Tensor) else None
    if unreal:
        raise AdapterError(
            f"{type(host).__name__}.{param} is {unreal}, and DoRA needs the norms of its rows. Dequantize it, or "
            "use LoRA."
        )
    if isinstance(host.__dict__.get(param), Tensor) and f"{param}_u" in host._buffers:
        raise AdapterError(
            f"{type(host).__name__}.{param}: a hook divides it by an estimate of its largest singular value, which "
            "moves in training, and DoRA's magnitude would not follow. Use "
            "torch.nn.utils.parametrizations.spectral_norm, or LoRA."
        )

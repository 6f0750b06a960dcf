"""LoRA: trainable low-rank factors beside a frozen weight."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import require_one_of, require_positive, require_probability, require_whole_number
from .._core.adapter import Adapter, require_same_config, state_of, trainable_dtype
from .._core.host import runs_bare
from .._core.lazy_weight import LowRank, can_stand_for, lazily
from .._core.override import tensors_of, weight_of
from .._core.quantized import not_real_as, weight_shape
from .._errors import AdapterError
from ..kernels import dropped, join_pairs, lora_add, lora_convolution, lora_embedding, lora_linear
from ..kernels.dispatch import without_autocast
from ._lazy_hosts import is_lazily_read, shows_input
from ._lora_rows import LoRARows
from ._low_rank import (
    BRANCHES,
    embedding_branch,
    is_plain_convolution,
    is_plain_linear,
    linear_branch,
    low_rank_branch_of,
    require_overridable,
)
from ._traced_rows import TracedRows
from ._weight_layout import LAYOUTS, Form, Rows, form_of, matrices_of, principal_pair

_INITS = ("kaiming", "gaussian", "orthogonal", "pissa")


class LoRA(Adapter):
    r"""Low-rank adaptation of a weight matrix (Hu et al. 2021).

    .. math:: y = W x + b + s\,B A\,\mathrm{drop}(x), \qquad s = \alpha / r \quad (\alpha / \sqrt r
        \text{ if rank-stabilized, Kalajdzievski 2023})

    A is `lora_A` [rank, in], B is `lora_B` [out, rank], and B starts at zero, so inserting changes nothing. On ConvNd
    the pair is two convolutions: A [rank, in/groups, \*kernel], shared by the groups, then B [out, rank, 1, ...]; on
    ConvTransposeNd A [rank, in, 1, ...], then B [rank, out/groups, \*kernel]; on Embedding A [rank, entries] is looked
    up and B [dim, rank] applied, and there A starts at zero; a stack of matrices [n, out, in] gets n pairs. Every other
    host reads, in place of W, a tensor that stands for W + s B A: products, indexing and transposes act on W and on the
    pair apart, and only a function that needs the whole makes it (`verify` names such functions).

    Args:
        host: the module to adapt, from `inject`.
        rank: r, at least 1.
        alpha: α; the scale is α/rank.
        dropout: probability, in [0, 1), of dropping an element of the input on its way to A, in training. Only where
            the pair has an input: not in a lookup, an RNN or the in-projections of MultiheadAttention, and elsewhere
            not in a function that reads the weight by itself, at which the call raises.
        rank_stabilized: scale by α/√rank, which keeps the update's size as the rank grows.
        init: how the factor that is not zero is drawn: "kaiming" (uniform in ±1/√in), "gaussian" (standard deviation
            1/rank), "orthogonal" (orthonormal rows); or "pissa" (Meng et al. 2024): both factors from the principal
            singular vectors of W, and what trains is their change, so that W itself stays as it is.
        param: the weight, or a list of them, by dotted name on the host; default its own matrices (`weight`; the
            in-projections of MultiheadAttention; all weights of an RNN; the stacks [experts, ...] of a mixture).
        dtype: of the factors; default W's own, or float32 beside a half-precision or quantized W.

    Raises:
        AdapterError: a rank below 1, an unknown `init`, dropout where it cannot act, a host without a matrix.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> peftlib.inject(model, torch.nn.Linear, peftlib.LoRA, rank=2, alpha=4)
        ['0', '2']
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        52
    """

    initial_A: Tensor
    initial_B: Tensor
    lazy: Sequence[type[Form]] = LAYOUTS  # of the weights beside which this kind's change may stand apart
    drops_apart = True  # whether dropout may then act on whatever is multiplied with them
    axes: Mapping[str, tuple[int | None, int | None]] = {
        "lora_A": (None, 1),
        "initial_A": (None, 1),
        "lora_B": (0, None),
        "initial_B": (0, None),
    }

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
        super().__init__()
        _check(rank, alpha, dropout, init)
        weight = _matrix_named(host, param)
        shape = weight_shape(host, param)
        self.param, self.rank, self.dropout, self.init = param, rank, float(dropout), init
        self.scale = alpha / math.sqrt(rank) if rank_stabilized else alpha / rank
        self.form, self.term = form_of(host, param, shape), low_rank_branch_of(host, param)
        self.kernel = None if init == "pissa" else _kernel_of(host, self.term)
        if self.term is None:
            require_overridable(host, param)
        if dropout and (self.form.looks_up or (self.term is None and not (self.drops_apart and shows_input(host)))):
            raise AdapterError(
                f"dropout={dropout}: {type(host).__name__}.{param} has no input of its own to drop from. "
                "Use dropout=0 here."
            )
        factors: Any = {"device": weight.device, "dtype": trainable_dtype(dtype, weight)}
        shape_A, shape_B = self.form.shapes(shape, rank)
        self.lora_A = nn.Parameter(torch.empty(shape_A, **factors))
        self.lora_B = nn.Parameter(torch.empty(shape_B, **factors))
        if init == "pissa":
            _require_values(host, param)
            self.register_buffer("initial_A", torch.empty(shape_A, **factors))
            self.register_buffer("initial_B", torch.empty(shape_B, **factors))
        self.reset_parameters(host)

    @torch.no_grad()
    def reset_parameters(self, host: nn.Module | None = None) -> None:
        """Draws the factors again; "pissa" needs the host. A model on the meta device calls this once it is real."""
        flat_A, flat_B = self.form.pair(self.lora_A, self.lora_B)
        if self.init == "pissa":
            _require_singular_vectors(self.rank, flat_B.shape[-2], flat_A.shape[-1])
        if self.lora_A.is_meta:
            return
        if self.init == "pissa":
            self._start_from_principal(host, flat_A, flat_B)
            return
        drawn, zero = (flat_B.transpose(-2, -1), flat_A) if self.form.looks_up else (flat_A, flat_B)
        drawn.copy_((_draw_complex if drawn.is_complex() else _draw)(drawn.shape, self.init))
        zero.zero_()

    def _start_from_principal(self, host: nn.Module | None, flat_A: Tensor, flat_B: Tensor) -> None:
        if host is None:
            raise AdapterError('LoRA with init="pissa" starts from its host\'s weight. Call reset_parameters(host).')
        matrix = self.form.matrix(weight_of(host, self.param).detach())
        A, B = principal_pair(matrix, self.rank)
        flat_A.copy_(A / math.sqrt(self.scale))
        flat_B.copy_(B / math.sqrt(self.scale))
        self.initial_A.copy_(self.lora_A)
        self.initial_B.copy_(self.lora_B)

    @classmethod
    def split(cls, host: nn.Module, inner: str, config: dict[str, Any]) -> list[dict[str, Any]]:
        param = config.get("param") or matrices_of(host.get_submodule(inner))
        names = [param] if isinstance(param, str) else param
        configs = [{**config, "param": f"{inner}.{name}".lstrip(".")} for name in names]
        for one in configs if type(config.get("rank")) is int else ():
            _require_low_rank(host, one["param"], one["rank"])
        return configs

    def __getstate__(self) -> dict[str, Any]:
        """A pickle holds what was chosen for the host by name, so that it can be loaded after a function has moved."""
        return {**self.__dict__, **{key: getattr(self.__dict__[key], "__name__", None) for key in _CHOSEN}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, **{key: _BY_NAME.get(state[key]) for key in _CHOSEN}})

    def file_keys(self) -> dict[str, str]:
        prefix = "" if self.param == "weight" else f"{self.param}."
        return {prefix + key: key for key in state_of(self)}

    def forward(self, host: Any, call: Any, *args: Any, **kwargs: Any) -> Any:
        if self.kernel is lora_linear and runs_bare(host, call):
            (x,) = args or kwargs.values()
            return self._linear(host, x, *self._pair_in(host))
        if self.term is None:
            return super().forward(host, call, *args, **kwargs)
        joined = self._joined(host, call)
        if joined:
            (x,) = args or kwargs.values()
            return lora_linear(x, host.weight, host.bias, *joined, 1.0)
        y = call(*args, **kwargs)
        if "x" in kwargs:  # HF Conv1D's name for what torch's layers call `input`
            kwargs["input"] = kwargs.pop("x")
        return self._add(host, y, *args, **kwargs)

    def alone(self, host: nn.Module) -> Callable[[nn.Module, Any], Tensor] | None:
        if self.kernel is not lora_linear or type(self).forward is not LoRA.forward:
            return None
        above: Any = self.__dict__
        pair: Any = self._parameters

        def run(host: Any, x: Tensor) -> Tensor:
            around, own = host.__dict__, host._parameters
            if not (self.dropout or "weight" in around or "bias" in around or "lora_A" in above or "lora_B" in above):
                try:
                    weight, bias, lora_A, lora_B = own["weight"], own["bias"], pair["lora_A"], pair["lora_B"]
                except KeyError:  # computed, as parametrized ones are
                    pass
                else:
                    return lora_linear(x, weight, bias, lora_A, lora_B, self.scale)
            return self._linear(host, x, *tensors_of(self, "lora_A", "lora_B"), self.scale)

        return run

    def _linear(self, host: nn.Module, x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float) -> Tensor:
        weight, bias = tensors_of(host, "weight", "bias")
        if not self.dropout:
            return lora_linear(x, weight, bias, lora_A, lora_B, scale)
        operands = x, weight, bias, lora_A, lora_B, scale, self.dropout, self.training
        return self.with_own_masks(lora_linear, *operands)

    def takes_weight(self, host: nn.Module) -> bool:
        return True

    def _scale_in(self, host: nn.Module) -> float | Tensor:
        """s, times the weight that `activate` gives."""
        return self.scale * self.weight_in(host)

    def _pair_in(self, host: nn.Module) -> tuple[Tensor, Tensor, float]:
        """For kernels, whose scale is a number: a weight that is data goes into B."""
        lora_A, lora_B = tensors_of(self, "lora_A", "lora_B")
        scale = self._scale_in(host)
        return (lora_A, lora_B * scale, 1.0) if isinstance(scale, Tensor) else (lora_A, lora_B, scale)

    def values_of(self, other: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Of a lower rank too: A and B both have zeros behind, so that neither learns there, and s is the other's."""
        free = ("init",) if "pissa" not in (self.init, other.init) else ()
        require_same_config(self, other, "rank", "alpha", "rank_stabilized", "dtype", *free)
        if other.rank > self.rank:
            raise AdapterError(f"its rank is {other.rank}, not {self.rank} or less. Load it under a name of its own.")
        tensors = {key: _padded(value, getattr(self, key)) for key, value in other.state_dict().items()}
        alpha = _alpha_of(other.scale, math.sqrt(self.rank) if self.config["rank_stabilized"] else self.rank)
        return tensors, {"scale": other.scale, "config": {**self.config, "alpha": alpha}}

    def follows_call(self, host: nn.Module) -> bool:
        return self.term is not None

    @classmethod
    def together(cls, host: nn.Module, groups: Any, adapters: Any) -> Any:
        plain = all(type(one) is LoRA and one.kernel is lora_linear for own in adapters for one in own)
        return LoRARows(groups, adapters) if plain and groups.dim == 0 else None

    @classmethod
    def in_one_graph(cls, host: nn.Module, table: Any, adapters: Any) -> Any:
        plain = all(type(one) is LoRA and one.kernel is lora_linear for own in adapters for one in own)
        return TracedRows(host, table, adapters) if plain else None

    def _joined(self, host: nn.Module, call: Any) -> tuple[Tensor, Tensor] | None:
        """One pair for this adapter and all that it stands around, where one product serves them."""
        together: list[Any] = [self]
        while isinstance(call, functools.partial) and _joins(call.func):
            together.append(call.func)
            call = call.args[1]
        if not _joins(self) or not runs_bare(host, call):
            return None
        return join_pairs([each._pair_in(host) for each in reversed(together)])

    def _add(self, host: Any, y: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.kernel is None and self.init != "pissa" and is_plain_convolution(host):
            geometry = host.stride, host.padding, host.dilation
            operands = y, input, *self._pair_in(host), *geometry, self.dropout, self.training
            return self.with_own_masks(lora_convolution, *operands)
        if self.kernel is None:
            term, scale = self._low_rank(host, input, *args, **kwargs).to(y.dtype), self._scale_in(host)
            return y + term * scale if isinstance(scale, Tensor) else torch.add(y, term, alpha=scale)
        pair = self._pair_in(host)
        if self.kernel is lora_embedding:
            return lora_embedding(y, input, *pair, host.padding_idx)
        return self.with_own_masks(lora_add, y, input, *pair, self.dropout, self.training)

    def _low_rank(self, host: nn.Module, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dtype = input.dtype if input.is_floating_point() else self.lora_A.dtype
        term: Any = self.term

        def product(x: Tensor, *pair: Tensor) -> Tensor:
            return self._trained(lambda A, B: term(host, A.to(dtype), B.to(dtype), x, *args, **kwargs), *pair)

        dropout = self.dropout if self.training else 0.0
        return self.with_own_masks(dropped, product, input, self.lora_A, self.lora_B, dropout=dropout)

    def fold(self, host: nn.Module) -> dict[str, Tensor]:
        """The host's weight plus s B A, the product taken in float32 or wider."""
        weight, scale = weight_of(host, self.param), self._scale_in(host)
        plain = self.init != "pissa" and type(weight) in (Tensor, nn.Parameter)
        if self.form is Rows and weight.dim() == 2 and plain and not isinstance(scale, Tensor):
            return {self.param: self._in_one_product(weight, scale)}
        return {
            self.param: weight
            + scale * self.form.weight(self._trained(self._product, self.lora_A, self.lora_B), weight.shape)
        }

    def _in_one_product(self, weight: Tensor, scale: float) -> Tensor:
        """256x256 at rank 8: 18 µs, where product, scale and sum take 36 and make three matrices."""
        lora_A, lora_B = tensors_of(self, "lora_A", "lora_B")
        wide = torch.promote_types(torch.promote_types(weight.dtype, lora_A.dtype), torch.float32)
        with without_autocast(weight):
            return torch.addmm(weight.to(wide), lora_B.to(wide), lora_A.to(wide), alpha=scale)

    def fold_for_call(self, host: nn.Module) -> dict[str, Tensor]:
        """The weight and the pair apart, W + s B A never made, where the host reads an ordinary tensor."""
        weight = weight_of(host, self.param)
        if not (self.form in self.lazy and can_stand_for(weight) and is_lazily_read(host, self)):
            self._require_no_dropout(host)
            return self.fold(host)
        initial = ((self.initial_A, self.initial_B),) if self.init == "pissa" else ()
        pairs = tuple(self.form.factors(*pair) for pair in ((self.lora_A, self.lora_B), *initial))
        change = LowRank(pairs, self._scale_in(host), self.dropout if self.training else 0.0, self)
        return {self.param: lazily(weight, change, self._row_gain(host))}

    def _row_gain(self, host: nn.Module) -> Tensor | None:
        return None

    def low_rank_change(self, host: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        """s B A. With "pissa" s (B A - B' A'), as s (B - B') A + s B' (A - A'), in which nothing cancels."""
        A, B = self.form.pair(self.lora_A, self.lora_B)
        if self.init == "pissa":
            start_A, start_B = self.form.pair(self.initial_A, self.initial_B)
            A, B = torch.cat([A, A - start_A], -2), torch.cat([B - start_B, start_B], -1)
        return {self.param: (B * self.scale, A)}

    def _require_no_dropout(self, host: nn.Module) -> None:
        if self.dropout and self.training:
            raise AdapterError(
                f"dropout={self.dropout}: {type(host).__name__}.{self.param} is read whole here, by kernels of its "
                "own, so there is no input to drop from. Use dropout=0."
            )

    def _trained(self, of: Callable[[Tensor, Tensor], Tensor], lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """What the pair gives, less what it gave at the start where it did not start at zero."""
        now = of(lora_A, lora_B)
        return now - of(self.initial_A, self.initial_B) if self.init == "pissa" else now

    def _product(self, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        wide = torch.promote_types(lora_A.dtype, torch.float32)
        flat_A, flat_B = self.form.pair(lora_A.to(wide), lora_B.to(wide))
        with without_autocast(lora_A):
            return flat_B @ flat_A


def _padded(value: Tensor, like: Tensor) -> Tensor:
    missing = [there - here for here, there in zip(value.shape, like.shape, strict=True)]
    return F.pad(value, [size for least in reversed(missing) for size in (0, least)]) if any(missing) else value


def _alpha_of(scale: float, divisor: float) -> float:
    """What divided by this is the scale, to the last bit where there is such a number."""
    near = scale * divisor
    tried = (near, math.nextafter(near, 0.0), math.nextafter(near, math.inf))
    return next((alpha for alpha in tried if alpha / divisor == scale), near)


_CHOSEN = ("form", "term", "kernel")  # attributes that a LoRA takes from its host
_BY_NAME: dict[str | None, Any] = {
    item.__name__: item for item in (*LAYOUTS, *BRANCHES, lora_linear, lora_add, lora_embedding)
}


def _kernel_of(host: Any, term: Any) -> Any:
    if term is linear_branch:
        if host.weight.is_complex():
            return None  # the kernels' backward passes are those of real numbers
        return lora_linear if is_plain_linear(host) else lora_add
    return lora_embedding if term is embedding_branch else None


def _joins(adapter: Any) -> bool:
    return type(adapter) is LoRA and adapter.kernel is lora_linear and not (adapter.dropout and adapter.training)


def _draw_complex(shape: torch.Size, init: str) -> Tensor:
    """Of the variance that the real ones have; orthonormal rows stay orthonormal, each turned by a phase."""
    if init != "orthogonal":
        return torch.complex(_draw(shape, init), _draw(shape, init)) / math.sqrt(2)
    rows = _draw(shape, init)
    angle = torch.empty(*shape[:-1], 1).uniform_(-math.pi, math.pi)
    return torch.polar(torch.ones_like(angle), angle) * rows


def _draw(shape: torch.Size, init: str) -> Tensor:
    *_, rank, fan_in = shape
    if init == "kaiming":
        return torch.empty(shape).uniform_(-1, 1) / math.sqrt(fan_in)
    if init == "gaussian":
        return torch.randn(shape) / rank
    stack = torch.empty(shape).view(-1, rank, fan_in)
    for matrix in stack:
        nn.init.orthogonal_(matrix)
    return stack.view(shape)


def _check(rank: int, alpha: float, dropout: float, init: str) -> None:
    require_whole_number("rank", rank, say=8)
    require_positive("alpha", alpha, say=16)
    require_probability("dropout", dropout)
    require_one_of(_INITS, "init", init)


def _require_low_rank(host: nn.Module, param: str, rank: int) -> None:
    """Of what a user asks for; a file of another tool may hold such a pair, and a default that is too high is ours."""
    _matrix_named(host, param)
    if low_rank_branch_of(host, param) is None:
        require_overridable(host, param)
    shape = weight_shape(host, param)
    shape_A, shape_B = form_of(host, param, shape).shapes(shape, 1)
    A, B = form_of(host, param, shape).pair(torch.empty(shape_A, device="meta"), torch.empty(shape_B, device="meta"))
    inputs, out = A.shape[-1], B.shape[-2]
    if rank > min(inputs, out):
        raise AdapterError(
            f"rank={rank} is larger than min(in, out)={min(inputs, out)} of {type(host).__name__}.{param}, which is "
            f"[{out}, {inputs}] as a matrix. Use rank<={min(inputs, out)}, or exclude it: peftlib.Full there trains "
            "fewer parameters."
        )


def _require_singular_vectors(rank: int, out: int, inputs: int) -> None:
    if rank > min(out, inputs):
        raise AdapterError(
            f"rank={rank}: a [{out}, {inputs}] matrix has {min(out, inputs)} singular vectors. "
            'Lower the rank, or use another init than "pissa".'
        )


def _require_values(host: nn.Module, param: str) -> None:
    unreal = not_real_as(host, param)
    if unreal:
        raise AdapterError(
            f'{type(host).__name__}.{param} is {unreal}, and init="pissa" needs the singular vectors of its values. '
            "Dequantize it, or use another init."
        )


def _matrix_named(host: nn.Module, param: str) -> Tensor:
    """The weight under a dotted name: a parameter, or computed as parametrized weights are."""
    try:
        weight = weight_of(host, param)
    except AttributeError:
        weight = None
    if isinstance(weight, Tensor) and weight.dim() >= 2:
        return weight
    found = f"is of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else "is no tensor of it"
    wide = [name for name, p in host.named_parameters(recurse=False) if p.dim() >= 2]
    advice = (
        f"Its matrices: {', '.join(wide)}" if wide else "Use Full for vectors, or target a module that has a matrix"
    )
    raise AdapterError(f"{type(host).__name__}.{param} {found}, and LoRA needs a matrix. {advice}.")

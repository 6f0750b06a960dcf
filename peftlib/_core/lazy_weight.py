"""A weight with low-rank changes that is never made: torch's functions act on the weight and on the factors apart.

Invariant: whatever is computed from a `LazyWeight` equals what its whole, W + Σ s·L·R, would have given. A function in
`RULES` keeps that without making it. Any other gets the whole, made once for the object and kept by it, so that a
change in place lasts for the call, as it would in a folded weight; and whoever listens (`materialized`) hears which
function it was.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling
from torch.overrides import resolve_name
from torch.utils._pytree import tree_map_only

from .._errors import AdapterError
from ..kernels import dropped
from ..kernels.dispatch import apply, is_transformed
from .quantized import wraps_others

Step = Callable[..., Tensor]  # of an input, L and R


class LowRank(NamedTuple):
    """One change: s·L·R, less what a second pair gives where the first did not start at zero. L is [*stack, rows,
    rank] and R [*stack, rank, *rest], beside a weight [*stack, rows, *rest]."""

    pairs: tuple[tuple[Tensor, Tensor], ...]
    scale: float | Tensor
    dropout: float
    adapter: nn.Module

    def mapped(self, left: Callable[[Tensor], Tensor], right: Callable[[Tensor], Tensor]) -> "LowRank":
        return self._replace(pairs=tuple((left(L), right(R)) for L, R in self.pairs))

    def transposed(self) -> "LowRank":
        return self._replace(pairs=tuple((R.transpose(-2, -1), L.transpose(-2, -1)) for L, R in self.pairs))

    def of(self, x: Tensor, near: Step, far: Step, *others: Tensor) -> Tensor:
        """far(s·near(drop(x))), in the dtype of x: what lies between them is thin, and there the scale costs least.
        Whatever else has a gradient goes in by `others`, for a dropped input computes anew in backward."""

        def through(x: Tensor, L: Tensor, R: Tensor, beside: Sequence[Tensor]) -> Tensor:
            return far(near(x, L, R) * self.scale, L, R, *beside)

        def change(x: Tensor, *tensors: Tensor) -> Tensor:
            beside = tensors[len(self.factors()) :]
            L, R, *initial = (as_dtype(factor, x.dtype) for factor in tensors[: len(self.factors())])
            now = through(x, L, R, beside)
            return now - through(x, initial[0], initial[1], beside) if initial else now

        return dropped(change, x, *self.factors(), *others, dropout=self.dropout)

    def picked(self, rows: Callable[[Tensor], Tensor]) -> Tensor:
        """s·rows(L)·R, in the factors' dtype."""
        products = [(rows(L) * self.scale) @ R for L, R in self.pairs]
        return products[0] - products[1] if len(products) > 1 else products[0]

    def factors(self) -> list[Tensor]:
        return [factor for pair in self.pairs for factor in pair]

    def whole(self) -> Tensor:
        """s·(L·R), in float32 or wider."""
        products = [_product(L, R) for L, R in self.pairs]
        return self.scale * (products[0] - products[1] if len(products) > 1 else products[0])


def as_dtype(factor: Tensor, dtype: torch.dtype) -> Tensor:
    return factor if factor.dtype == dtype else factor.to(dtype)


def _product(L: Tensor, R: Tensor) -> Tensor:
    wide = torch.promote_types(L.dtype, torch.float32)
    rest = R.shape[L.dim() - 1 :]
    with contextlib.nullcontext() if L.is_meta else torch.autocast(L.device.type, enabled=False):
        flat = L.to(wide) @ R.to(wide).flatten(L.dim() - 1)
    return flat.unflatten(-1, rest)


Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}
SCALED: dict[Any, Rule] = {}  # of weights that have a gain
_METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in (
        "shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "is_cuda", "is_cpu", "is_meta",
        "is_sparse", "is_quantized", "is_mkldnn", "is_nested", "itemsize", "nbytes", "grad", "grad_fn",
        "_version",
    )
} | {
    getattr(torch.Tensor, name)
    for name in (
        "dim", "size", "stride", "numel", "nelement", "is_contiguous", "is_floating_point", "is_complex",
        "element_size", "storage_offset", "get_device", "__len__", "ndimension", "dim_order", "is_inference",
    )
} | {torch.numel, torch.is_floating_point, torch.is_complex}  # fmt: skip


class LazyWeight:
    """Stands for `base` [*stack, rows, *rest] plus its changes, each row times its gain if there is one: it is `plain`
    without it. A gain [*stack, rows], or `across` one of columns, is there beside matrices alone."""

    base: Tensor
    changes: tuple[LowRank, ...]
    tracks: bool  # whether the whole has a gradient to give to the factors
    is_part: bool = False
    made: Tensor | None = None
    experts: Any = None
    gain: Tensor | None = None
    across: bool = False
    plain: Any = None

    @property
    def stack(self) -> int:
        """How many dimensions count matrices."""
        return self.changes[0].pairs[0][0].dim() - 2

    @property
    def is_matrix(self) -> bool:
        return self.base.dim() == self.stack + 2

    def like(self, base: Tensor, changes: tuple[LowRank, ...]) -> "LazyWeight":
        """A part or a view of this one."""
        raise NotImplementedError

    def scaled(self, gain: Tensor, plain: "LazyWeight", across: bool = False) -> "LazyWeight":
        """With a gain, and what it is without."""
        self.gain, self.plain, self.across = gain, plain, across
        return self

    def _name(self) -> str:
        return getattr(self.changes[0].adapter, "param", "a weight")

    def require_gradient(self, func: Any) -> None:
        """A part knows only its factors: it has no node of its own (`_Standing` for each expert that is picked would
        take a quarter of an eager loop's time), so a Function of someone else would end the gradient here."""
        if self.is_part and self.tracks and not torch.is_grad_enabled():
            raise AdapterError(
                f"{self._name()}: a part was picked where gradients flow, and {_described(func, ())} reads it where "
                "none do, in an autograd Function or under no_grad, so its gradient would be lost. Pick the part there "
                "too, or merge the adapter to run it without training."
            )

    def whole(self, by: str) -> Tensor:
        """What it stands for, made as it would have been where this object was made."""
        if self.made is None:
            self.made = self.new_whole(by)
        return self.made

    def new_whole(self, by: str) -> Tensor:
        self._require_no_dropout(by)
        self._require_values(by)
        note_materialized(by, *(change.adapter for change in self.changes))
        with torch.set_grad_enabled(self.tracks):
            whole = _sum(self.base, self.changes)
            if self.gain is not None:
                whole = whole * self.gain.unsqueeze(-2 if self.across else -1)
            return whole.to(self.base.dtype)

    def _require_no_dropout(self, by: str) -> None:
        change = next((change for change in self.changes if change.dropout), None)
        if change is not None:
            raise AdapterError(
                f"dropout={change.dropout} on {self._name()}: {by} reads the weight "
                "without an input that is known, so there is nothing to drop from. Use dropout=0 here."
            )

    def _require_values(self, by: str) -> None:
        if wraps_others(self.base):
            raise AdapterError(
                f"{self._name()} is {type(self.base).__name__} of {self.base.dtype}, quantized, and {by} needs the "
                "whole weight with its low-rank change. Dequantize it, or exclude the module."
            )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        is_made, rules = False, RULES
        for each in (*args, *kwargs.values()):
            if isinstance(each, LazyWeight):
                each.require_gradient(func)
                is_made = is_made or each.made is not None
                rules = rules if each.gain is None else SCALED
        rule = rules.get(func) or rules.get(getattr(func, "_qualified_op_name", None))  # an operator of a library
        if rule is not None and not is_made:
            found = rule(func, *args, **kwargs)
            if found is not NotImplemented:
                return found
        return _with_wholes(func, _described(func, args), args, kwargs)


class LazyTensor(LazyWeight, Tensor):
    """A tensor to whoever asks, with no memory of its own."""

    @staticmethod
    def __new__(cls, base: Tensor, changes: tuple[LowRank, ...], tracks: bool) -> "LazyTensor":
        self = Tensor._make_wrapper_subclass(cls, base.size(), base.stride(), dtype=base.dtype, device=base.device)
        self.base, self.changes, self.tracks = base, changes, tracks
        return self

    def __init__(self, *_: Any) -> None:
        pass  # Tensor has no __init__ to call, and LazyWeight's is done in __new__

    def like(self, base: Tensor, changes: tuple[LowRank, ...]) -> LazyWeight:
        part = LazyTensor(base, changes, self.tracks and torch.is_grad_enabled())
        part.is_part = True
        return part

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Reached from C++ alone and below autograd, which `_Standing` serves: nothing made here is kept."""
        return _with_wholes(func, str(func), args, kwargs or {}, LazyWeight.new_whole)


class TracedWeight(LazyWeight):
    """The same while `torch.compile` traces, which cannot make a tensor of a type of ours, and can follow an object."""

    is_part = True  # it has no node either

    def __init__(self, base: Tensor, changes: tuple[LowRank, ...]) -> None:
        self.base, self.changes, self.tracks = base, changes, torch.is_grad_enabled()

    def like(self, base: Tensor, changes: tuple[LowRank, ...]) -> LazyWeight:
        return TracedWeight(base, changes)

    def __getitem__(self, index: Any) -> Any:
        return LazyWeight.__torch_function__(Tensor.__getitem__, (), (self, index))

    def __getattr__(self, name: str) -> Any:
        own = getattr(Tensor, name)
        if own in _METADATA or getattr(own, "__get__", None) in _METADATA:
            return getattr(self.base, name)
        if callable(own):
            return lambda *args, **kwargs: LazyWeight.__torch_function__(own, (), (self, *args), kwargs)
        return LazyWeight.__torch_function__(own.__get__, (), (self,))


def _sum(base: Tensor, changes: Iterable[LowRank]) -> Tensor:
    whole = base
    for change in changes:
        whole = whole + change.whole()
    return whole


def _with_wholes(func: Any, name: str, args: Any, kwargs: Any, whole: Any = LazyWeight.whole) -> Any:
    args, kwargs = tree_map_only(LazyWeight, lambda weight: whole(weight, name), (args, kwargs))
    return func(*args, **kwargs)


def _described(func: Any, args: Any) -> str:
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        name = (resolve_name(func) or name).removesuffix(".__get__").rpartition(".")[2]
    return f"{name} {args[0]!r}" if name == "einsum" and isinstance(args[0], str) else name


Heard = list[tuple[str, tuple[nn.Module, ...]]]
_listeners: contextvars.ContextVar[tuple[Heard, ...]] = contextvars.ContextVar("listeners", default=())


@contextlib.contextmanager
def materialized() -> Iterator[Heard]:
    """A list that fills, while the block runs, with what made a weight whole, and whose weight it was."""
    heard: Heard = []
    token = _listeners.set((*_listeners.get(), heard))
    try:
        yield heard
    finally:
        _listeners.reset(token)


def note_materialized(by: str, *adapters: nn.Module) -> None:
    if is_compiling():
        return
    for heard in _listeners.get():
        heard.append((by, adapters))


def can_stand_for(weight: Tensor) -> bool:
    """Whether a lazy weight may take this one's place."""
    return isinstance(weight, LazyWeight) or type(weight) in (Tensor, nn.Parameter) or wraps_others(weight)


def lazily(weight: Tensor, change: LowRank, gain: Tensor | None = None) -> Any:
    """The weight with one change more, and then each row times its gain."""
    if not isinstance(weight, LazyWeight):
        return _standing(weight, (change,), gain)
    if weight.gain is None:
        return _standing(weight.base, (*weight.changes, change), gain)
    return _standing(weight.whole(type(change.adapter).__name__), (change,), gain)


def _standing(base: Tensor, changes: tuple[LowRank, ...], gain: Tensor | None) -> LazyWeight:
    if is_compiling():
        return TracedWeight(base, changes)
    gains = [] if gain is None else [gain]
    factors = [factor for change in changes for factor in change.factors()]
    tracks = torch.is_grad_enabled() and any(each.requires_grad for each in (base, *gains, *factors))
    if not tracks or is_transformed():
        found = LazyTensor(base, changes, tracks)
    else:
        found = apply(_Standing, changes, len(gains), base, *gains, *factors)
    return found if gain is None else found.scaled(gain, LazyTensor(base, changes, tracks))


class _Standing(Function):
    """Gives the lazy weight a gradient of its own: what gets past torch's functions (a Function of someone else, a C++
    extension) computes with the whole, and its gradient arrives here and goes on to the factors."""

    @staticmethod
    def forward(ctx: Any, changes: tuple[LowRank, ...], gains: int, base: Tensor, *factors: Tensor) -> Tensor:
        ctx.changes, ctx.gains = changes, gains
        ctx.save_for_backward(*([base] if gains else []), *factors)
        return LazyTensor(base, changes, True)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, *grad_outputs)


@once_differentiable
def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    of_base, *needed = ctx.needs_input_grad[2:]
    base, gain, saved = None, None, ctx.saved_tensors
    if ctx.gains:
        base, gain, *saved = saved
    factors = [each.detach().requires_grad_() for each in saved]
    following = iter(factors)
    with torch.enable_grad():
        wholes = [
            change._replace(pairs=tuple((next(following), next(following)) for _ in change.pairs)).whole()
            for change in ctx.changes
        ]
    of_gain = []
    if gain is not None and base is not None:
        moved = sum((whole.detach() for whole in wholes), base)
        of_gain = [(grad_output * moved).sum(-1).to(gain.dtype) if needed[0] else None]
        grad_output, needed = grad_output * gain.unsqueeze(-1), needed[1:]
    given = [grad_output.to(whole.dtype) for whole in wholes]
    found = torch.autograd.grad(wholes, factors, given)
    of_factors = [each if need else None for each, need in zip(found, needed, strict=True)]
    return None, None, grad_output if of_base else None, *of_gain, *of_factors

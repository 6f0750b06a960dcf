"""An adapter: a child module that stands around its host's call."""

import functools
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .._errors import AdapterError
from .override import as_weights, overridden, weight_of
from .weights import blended

_COLLECTING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
KINDS: dict[str, type["Adapter"]] = {}


class Adapter(nn.Module):
    r"""The base of every kind, and of yours: subclass it, and it injects, switches, merges and saves like ours.

    A type has a forward pass, `forward`, and may have a merged weight, `fold`. Given only `fold`, `forward` follows:
    the host runs with the folded weights in place of its own, on any host that reads its own weights.

    .. math:: y = \mathrm{host}_{\mathrm{fold}(W)}(x)

    The constructor takes the host and JSON-able keywords; shapes, device and dtype come from the host, and whatever
    must survive saving is a parameter or a buffer. `inject` fills in `name` and `config`.

    Example:
        >>> import torch, peftlib
        >>> class Gain(peftlib.Adapter):
        ...     def __init__(self, host, start=1.0):
        ...         super().__init__()
        ...         self.gain = torch.nn.Parameter(torch.full_like(host.weight[0, 0], start))
        ...     def fold(self, host):
        ...         return {"weight": host.weight * self.gain}
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> peftlib.inject(model, "0", Gain, start=2.0)
        ['0']
        >>> with peftlib.merged(model):
        ...     _ = model(torch.ones(1, 4))
    """

    __signature__: inspect.Signature
    name: str
    config: dict[str, Any]
    replaces: tuple[str, ...] = ()
    covers_children = False  # whether it may change the weights of modules inside its host, not only the host's own
    # Of a parameter beside a weight [out, in]: its dimension along the outputs, and that along the inputs.
    axes: Mapping[str, tuple[int | None, int | None]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        taken = KINDS.get(cls.__name__)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise AdapterError(
                f"kind {cls.__name__!r}: {taken.__module__}.{taken.__qualname__} has this name already, and files know "
                f"kinds by name. Rename {cls.__module__}.{cls.__qualname__}."
            )
        KINDS[cls.__name__] = cls
        _, *own = inspect.signature(cls.__init__).parameters.values()
        cls.__signature__ = inspect.Signature(own)  # else that of __new__, which is the same for all

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if not args and kwargs and next(iter(signature_of(cls).parameters), None) not in kwargs:
            said = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
            raise AdapterError(
                f"{cls.__name__}({said}): an adapter is made around a module of the model, and none was given. Pass "
                f"the class: peftlib.inject(model, targets, {cls.__name__}, {said})."
            )
        return super().__new__(cls)

    def forward(self, host: nn.Module, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The forward pass; `call(*args, **kwargs)` is what the host would do by itself, with what nests inside."""
        inside, call = unwrapped(call)
        folding = [*inside, self]
        with running_with(host, fold_for_call(host, folding), folding):
            return call(*args, **kwargs)

    def alone(self, host: nn.Module) -> Callable[[nn.Module, Any], Any] | None:
        """What, called with the host and one argument, does what `forward` does around the host's own forward while no
        other adapter acts and none was given a weight; None where nothing does it with less to look up. Tensors, flags
        and modes are those that there are by then. It does not hold the host, which would then never be freed."""
        return None

    def fold_for_call(self, host: nn.Module) -> dict[str, Tensor]:
        """What the host reads during its call in place of its weights: the weight form, unless a kind has tensors that
        stand for it and cost less."""
        return self.fold(host)

    def fold(self, host: nn.Module) -> dict[str, Tensor]:
        """The merged weight: tensors, by name on the host, that would do the same.

        They are not yet rounded to the host's dtype: type promotion with a float32 adapter does the right thing, and
        the caller rounds once.

        Args:
            host: the adapted module, its weights as what nests inside leaves them.

        Returns:
            dict[str, Tensor]: the folded weights by dotted name.

        Raises:
            AdapterError: this type cannot be merged.
        """
        raise AdapterError(
            f"{type(self).__name__} has neither forward nor fold, so it does nothing. Write one of them."
        )

    def low_rank_change(self, host: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        """What this adapter adds to the host's weights, by name, as L R with L [..., out, rank] and R [..., rank, in],
        each weight read as a matrix; without what it changes in another way."""
        return {}

    def with_own_masks(self, of: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`of(*args, **kwargs)`; masks that it draws in training come from this adapter's seed, if it has one."""
        masks: Any = self._modules.get("masks")
        draws = masks is not None and self.training and getattr(self, "dropout", True)
        return of(*args, **kwargs) if masks is None or not draws else masks.around(of, *args, **kwargs)

    def weight_in(self, host: nn.Module) -> float | Tensor:
        """What `activate` multiplies this adapter's effect by, 1.0 unless it was given a weight. Compiled it is a
        tensor [], so that one graph serves every value."""
        children: Any = host._modules.get("adapters")
        weights = None if children is None else children.selection.weights
        if not weights or self.name not in weights:
            return 1.0
        return weights[self.name] if is_compiling() else weights[self.name].item()

    def takes_weight(self, host: nn.Module) -> bool:
        """Whether this adapter's effect can be scaled. A type whose forward follows from its fold needs to do nothing
        for it; any other says that it multiplies by `weight_in(host)`, in both, itself."""
        return _follows_from_fold(self)

    def values_of(self, other: "Adapter") -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What makes this adapter do what another of its type does: tensors for its state, in its shapes, and
        attributes. Raises where there is none: the configurations differ."""
        require_same_config(self, other)
        return other.state_dict(), {}

    def follows_call(self, host: nn.Module) -> bool:
        """Whether `forward` calls the host once, with what it was given itself, and only changes what comes back, each
        row by itself. One call of the host then serves the rows of many adapters."""
        return False

    @classmethod
    def together(cls, host: nn.Module, groups: Any, adapters: list[list["Adapter"]]) -> Callable[..., Any] | None:
        """What serves all rows of a host in one pass, where the rows of each group go through adapters of this type:
        called with the host and its own call, and then as the host is, it gives the result, or NotImplemented. It does
        not hold the host, which would then never be freed."""
        return None

    @classmethod
    def together_behind(
        cls, host: nn.Module, groups: Any, adapters: list[list["Adapter"]]
    ) -> Callable[..., Any] | None:
        """For adapters that only change what one call gives: called with that, and with what the host was."""
        return None

    @classmethod
    def in_one_graph(cls, host: nn.Module, table: Any, adapters: list[list["Adapter"]]) -> Callable[..., Any] | None:
        """What serves all rows of this host while torch.compile traces, for rows in front: of the table it may read the
        choices, whose adapters these are, and compute with the index of each row, so that one graph serves every
        assignment of rows. Called behind the host's own call, as the host is."""
        return None

    @classmethod
    def split(cls, host: nn.Module, inner: str, config: dict[str, Any]) -> list[dict[str, Any]]:
        """The configurations of the adapters that `config` asks for on this host: one, unless a kind says otherwise.

        `inner` names the child that was targeted when the host reads that child's weights without calling it."""
        if inner:
            raise AdapterError(
                f"{type(host).__name__} reads the weights of its child {inner!r} without calling it, and there "
                f"{cls.__name__} would not act. Target the {type(host).__name__} itself."
            )
        return [config]

    @classmethod
    def require_place(cls, model: nn.Module, name: str, host: nn.Module) -> None:
        """Raises where this kind on `host` would be wrong because of what stands around it in the model."""

    @classmethod
    def reads(cls, host: nn.Module) -> Iterable[nn.Module]:
        """The modules whose weights the constructor reads: where they are kept elsewhere between calls, they are
        brought for it."""
        return host.modules()

    def copies(self) -> Mapping[str, Tensor | None]:
        """The host's tensors that this adapter has copies of in their place, by name: of all (None), or of these rows.

        Copies of one weight have no sum, so two adapters that have them are not active together."""
        return dict.fromkeys(self.replaces)

    def assigned(self, path: str, value: Any) -> None:
        """Called after a call of the host that gave another value to a buffer for which `fold` has a tensor."""

    def file_keys(self) -> dict[str, str]:
        """The key of each tensor in a file, after the host's name, and its key in `state_dict()`."""
        return {key: key for key in state_of(self)}

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in getattr(self, "config", {}).items())


def state_of(adapter: nn.Module) -> dict[str, Any]:
    """`state_dict(keep_vars=True)`; a load asks five times for that of each adapter. Of one module that has nothing but
    tensors to say it takes 0.6 µs, there 1.6."""
    own: Any = adapter.__dict__
    if own["_modules"] or own["_state_dict_hooks"] or own["_state_dict_pre_hooks"] or _says_more(type(adapter)):
        return adapter.state_dict(keep_vars=True)
    kept = {leaf: buffer for leaf, buffer in own["_buffers"].items() if leaf not in own["_non_persistent_buffers_set"]}
    return {leaf: tensor for leaf, tensor in (own["_parameters"] | kept).items() if tensor is not None}


@functools.cache
def _says_more(cls: type[nn.Module]) -> bool:
    methods = ("state_dict", "_save_to_state_dict", "get_extra_state")
    return any(getattr(cls, name) is not getattr(nn.Module, name) for name in methods)


def require_same_config(one: Adapter, other: Adapter, *free: str) -> None:
    """That two adapters of a type have the same keywords, these apart."""
    for key in sorted((one.config.keys() | other.config.keys()) - {*free}):
        there, here = other.config.get(key), one.config.get(key)
        if there != here:
            raise AdapterError(f"it has {key}={there!r}, not {here!r}. Load it under a name of its own.")


def can_be_merged(adapter: Adapter) -> bool:
    return type(adapter).fold is not Adapter.fold


def unwrapped(
    call: Callable[..., Any], innermost: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda call: call
) -> tuple[list[Adapter], Callable[..., Any]]:
    """The adapters inside a call that can be merged, innermost first, and the call without them.

    A fold reads the weights that the ones inside it gave, so those must be folded before it, not called behind it.
    `innermost` changes the host's own call, with those that have only a call form still around it."""
    folding, calling, host = [], [], None
    while isinstance(call, functools.partial) and isinstance(call.func, Adapter):
        (folding if can_be_merged(call.func) else calling).append(call.func)
        host, call = call.args
    call = innermost(call)
    for adapter in reversed(calling):
        call = functools.partial(adapter, host, call)
    return folding[::-1], call


def running_with(host: nn.Module, folded: dict[str, Tensor], adapters: list[Adapter]) -> AbstractContextManager[None]:
    """The host with these weights, folded by these adapters, for a call of its own."""

    def assigned(path: str, value: Any) -> None:
        for adapter in adapters:
            adapter.assigned(path, value)

    return overridden(host, as_weights(host, folded), assigned)


def _follows_from_fold(adapter: Adapter) -> bool:
    return type(adapter).forward is Adapter.forward and can_be_merged(adapter)


def fold_all(host: nn.Module, adapters: list[Adapter]) -> dict[str, Tensor]:
    """What the host's weights become, each fold on what the one before it gave, unrounded."""
    return _composed(host, adapters, lambda adapter: adapter.fold(host))


def fold_for_call(host: nn.Module, adapters: list[Adapter]) -> dict[str, Tensor]:
    """The same for the time of one call."""
    return _composed(host, adapters, lambda adapter: adapter.fold_for_call(host))


def _composed(
    host: nn.Module, adapters: list[Adapter], fold: Callable[[Adapter], dict[str, Tensor]]
) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for adapter in adapters:
        with overridden(host, values):
            values = {**values, **_weighted(host, adapter, fold(adapter))}
    return values


def _weighted(host: nn.Module, adapter: Adapter, folded: dict[str, Tensor]) -> dict[str, Tensor]:
    weight = adapter.weight_in(host) if _follows_from_fold(adapter) else 1.0
    if isinstance(weight, float) and weight == 1.0:
        return folded
    return {path: blended(weight_of(host, path), value, weight) for path, value in folded.items()}


def full_config(kind: type[Adapter], config: dict[str, Any]) -> dict[str, Any]:
    """The keywords with the constructor's defaults filled in, as they are saved: later defaults change no old file."""
    full = {key: _dtype_name(value) for key, value in {**_keywords(kind), **config}.items()}
    try:
        json.dumps(full, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AdapterError(
            f"{kind.__name__}: its configuration {full!r} cannot be saved ({error}). Use numbers, strings, booleans, "
            "None, and lists or dicts of them."
        ) from None
    return full


def takes_keyword(kind: type[Adapter], name: str) -> bool:
    return name in signature_of(kind).parameters


signature_of = functools.cache(inspect.signature)  # 0.12 ms a call, and one is made for every host


@functools.cache
def _keywords(kind: type[Adapter]) -> dict[str, Any]:
    """The constructor's keywords in their order, each with its default; what it collects (`**kwargs`) follows them."""
    _, *named = signature_of(kind).parameters.values()
    return {one.name: one.default for one in named if one.kind not in _COLLECTING}


def _dtype_name(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def trainable_dtype(dtype: str | torch.dtype | None, weight: Tensor) -> torch.dtype:
    """The adapter's own dtype: as asked, else the weight's, or float32 beside one in half precision or quantized."""
    if dtype is None:
        wide = weight.dtype in (torch.float32, torch.float64) or weight.is_complex()
        return weight.dtype if wide else torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise AdapterError(
            f"dtype: {dtype!r} is no floating-point dtype. Use 'float32', 'bfloat16', 'float16' or 'float64'."
        )
    return found

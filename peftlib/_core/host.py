"""A host: a module whose class was changed, in place, so that adapters stand around its forward."""

import contextlib
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Container, Iterator
from typing import Any

from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules import module as torch_module

from .._errors import AdapterError
from .adapter import Adapter
from .clone import without_overrides
from .containers import CHILD, methods_of_items
from .foreign import FAST_PATHS, is_bound, is_symbolic, node_in_graph, place_of_forward, statistics_in
from .override import is_overridden
from .row_groups import Rows
from .rows import by_rows
from .sharded import every_module
from .weights import Weights

_INNER = "_inner_forward"
BUFFERS = "_peftlib_buffers"  # on a module of a frozen base: its buffers as they were when adapters came in
_KEPT = {
    "training", "_modules", "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
    "_is_full_backward_hook", "_non_full_backward_hook",
}  # fmt: skip


class Selection:
    """Which adapters of a model act: one object for all its hosts, plain data that `torch.compile` can guard on."""

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.weights: Weights = {}  # of those active, or merged, that have another than 1
        self.rows: Rows | None = None  # where it is not one choice for all rows; then `active` are all that it names
        self.merged: tuple[str, ...] = ()
        self.active_before_merge: tuple[str, ...] = ()
        self.weights_before_merge: Weights = {}
        self.count: dict[str, int] = {}
        self.load: tuple[list[str], list[str] | None] | None = None
        self.reloaded = False

    def not_asked_for(self, missing: list[str], given: bool, prefix: str, adapters: nn.Module) -> dict[str, Tensor]:
        """What one host's adapters take from themselves: all of it, until a key of any host's adapters is in the file.

        torch shows each module its own part of a file, and the list `missing` is one for the whole of a load."""
        _, spared = self.load if self.load and self.load[0] is missing else (missing, [])
        if given or spared is None:
            missing += spared or ()
            self.load = missing, None
            return {}
        own = adapters.state_dict(keep_vars=True)
        self.load = missing, [*spared, *(prefix + key for key in own)]
        return {prefix + key: tensor for key, tensor in own.items()}


class Decided:
    """What a host's call comes to while these adapters are active: `run(host, x)` where one adapter acts and gave it
    (`Adapter.alone`), or None. Not while that adapter has hooks, or a `forward` put on it as accelerate does: only a
    module's own call runs those.

    Kept by the host's `Adapters` until another choice, which is another tuple, or until an adapter comes or goes. It
    spares a call of one token a quarter of its time."""

    __slots__ = ("active", "hooks", "own", "run")

    def __init__(self, active: tuple[str, ...], host: nn.Module | None, acting: Adapter | None) -> None:
        self.active, self.run = active, None if acting is None or host is None else acting.alone(host)
        self.own: dict[str, Any] = {} if acting is None else acting.__dict__
        self.hooks = () if acting is None else (*(self.own[key] for key in _HOOKS), *_GLOBAL_HOOKS)

    def is_wrapped(self) -> bool:
        return "forward" in self.own or any(self.hooks)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(getattr(torch_module, f"_global{key}") for key in _HOOKS)
_UNDECIDED = Decided((), None, None)


class Adapters(nn.ModuleDict):
    """The child `host.adapters`: the adapters of one host, in the order in which they nest."""

    __slots__ = ("decided",)  # not in `__dict__`: a copy, a pickle or a comparison of modules knows nothing of it
    decided: Decided
    selection: Selection

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A checkpoint of the base alone leaves the adapters as they are; one that has some must have all."""
        _, _, missing, *_ = rest
        given = any(key.startswith(prefix) for key in state_dict)
        self.selection.reloaded = True
        state_dict.update(self.selection.not_asked_for(missing, given, prefix, self))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: Any) -> Any:
        """A Sequential runs all its children, this one too."""
        return x


class Adapted:
    """The marker base of every adapted class; the host's own class stands right behind it."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        merged = self._modules["adapters"].selection.merged  # pyright: ignore[reportAttributeAccessIssue]
        if merged:
            raise AdapterError(
                f"load_state_dict: {', '.join(merged)} is merged into {prefix[:-1] or 'the root'}, and unmerge would "
                "bring the old weights back. Call unmerge first."
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)  # pyright: ignore[reportAttributeAccessIssue]

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, state, *rest = super().__reduce_ex__(protocol)
        return rebuilt_host, (base_type(type(self)),), without_overrides(self, state), *rest


# Values are weak: an adapted class holds its base, so a strong one would keep classes that others make for an instance.
_classes: weakref.WeakValueDictionary[type, type] = weakref.WeakValueDictionary()


def _adapted(cls: type) -> type:
    """One class for all hosts of a type, under the type's own name: others look a class up by it."""
    made = _classes.get(cls)
    if made is None:
        namespace = {
            **{key: getattr(cls, key) for key in ("__module__", "__qualname__", "__doc__")},
            "forward": _forward_around(cls),
            "_argument_names": tuple(inspect.signature(cls.forward).parameters)[1:],
            **methods_of_items(cls),
            **_overrides(cls),
        }
        made = types.new_class(cls.__name__, (Adapted, cls), {}, lambda ns: ns.update(namespace))
        _classes[cls] = made
    return made


def _forward_around(cls: Any) -> Callable[..., Any]:
    statistics = statistics_in(cls)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        adapters = self._modules["adapters"]
        if is_symbolic() and (node := node_in_graph(self, cls.__name__, args, kwargs)) is not None:
            return node
        selection = adapters.selection
        if not is_compiling():
            try:
                decided = adapters.decided
            except AttributeError:
                decided = _UNDECIDED
            if decided.active is not selection.active:
                decided = adapters.decided = _decided(self, adapters, statistics)
            run = decided.run
            if run is not None and len(args) == 1 and not (kwargs or selection.weights or decided.is_wrapped()):
                return run(self, *args)
        call = self.__dict__.get(_INNER) or super(Adapted, self).forward  # pyright: ignore[reportAttributeAccessIssue]
        if statistics is not None:
            call = functools.partial(_with_statistics_held, self, statistics, call)
        if selection.rows is not None:
            return by_rows(self, selection.rows, call, args, kwargs)
        outermost, active = None, selection.active
        for adapter in adapters._modules.values():
            if adapter.name in active:
                call = call if outermost is None else functools.partial(outermost, self, call)
                outermost = adapter
        return call(*args, **kwargs) if outermost is None else outermost(self, call, *args, **kwargs)

    forward.__signature__ = inspect.signature(cls.forward)  # pyright: ignore[reportFunctionMemberAccess]
    return forward


def _decided(host: Any, adapters: Any, statistics: str | None) -> Decided:
    selection = adapters.selection
    acting = [adapter for adapter in adapters._modules.values() if adapter.name in selection.active]
    bare = statistics is None and _INNER not in host.__dict__ and selection.rows is None
    return Decided(selection.active, host, acting[0] if bare and len(acting) == 1 else None)


def _with_statistics_held(host: Any, leaf: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Running statistics are the base's and stay as they are, unless an adapter has its own in their place."""
    if not host.training or is_overridden(host, leaf) or BUFFERS not in host.__dict__:
        return call(*args, **kwargs)
    host.training = False
    try:
        return call(*args, **kwargs)
    finally:
        host.training = True


def _overrides(cls: type) -> dict[str, property]:
    """A property wins over `__dict__`, so a computed (parametrized) weight could not be overridden through it."""
    lineage = [base for base in reversed(cls.__mro__) if issubclass(base, nn.Module)]
    computed = {name: item for base in lineage for name, item in vars(base).items() if isinstance(item, property)}
    overrides = {name: _override_first(name, item) for name, item in computed.items()}
    for base, (attribute, off) in FAST_PATHS.items():
        if issubclass(cls, base):
            overrides[attribute] = _off_while_adapted(attribute, off)
    return overrides


def _override_first(name: str, computed: property) -> property:
    fget: Any = computed.fget  # not computed.__get__, which torch.compile cannot trace

    def get(self: Any) -> Any:
        return self.__dict__[name] if name in self.__dict__ else fget(self)

    return property(get, computed.fset, computed.fdel, computed.__doc__)


def _off_while_adapted(attribute: str, off: Any) -> property:
    def get(self: Any) -> Any:
        return off if self._modules["adapters"].selection.active else self.__dict__[attribute]

    return property(get, lambda self, value: self.__dict__.__setitem__(attribute, value))


def rebuilt_host(cls: type) -> Any:
    host: Any = object.__new__(cls)
    host.__class__ = _adapted(cls)
    return host


def base_type(cls: type) -> type:
    """The host's own class, whatever stands above it."""
    return next((above.__bases__[1] for above in cls.__mro__ if Adapted in above.__bases__), cls)


def runs_bare(host: nn.Module, call: Callable[..., Any]) -> bool:
    """Whether `call` is the host's own forward, with no adapter and no foreign wrapper in between."""
    inner = host.__dict__.get(_INNER)
    return not isinstance(call, functools.partial) and (inner is None or is_bound(inner, host, base_type(type(host))))


def is_host(module: nn.Module) -> bool:
    return isinstance(module, Adapted)


def adapters_of(host: Any) -> Adapters:
    return host._modules["adapters"]


def parts(host: nn.Module, names: Container[str] | None = None) -> list[Adapter]:
    """The adapters of a host, innermost first."""
    found: Any = adapters_of(host).values()
    return [adapter for adapter in found if names is None or adapter.name in names]


def attach(name: str, host: Any, selection: Selection) -> None:
    """Makes a module a host, with no adapter yet."""
    if is_host(host):
        return
    children = Adapters()
    children.__dict__.update(selection=selection, training=host.training)  # a module's setter takes 3 µs for each
    place = place_of_forward(host)
    if place is not None:
        host.__dict__[_INNER] = host.__dict__[place]
    elif "forward" in host.__dict__:
        host.__dict__[_INNER] = host.__dict__.pop("forward")
    host._modules[CHILD] = children
    try:
        host.__class__ = _adapted(type(host))
    except TypeError as error:
        raise AdapterError(
            f"{name or 'the root'}: {type(host).__name__} cannot change its class ({error}). "
            "Wrap it in a plain nn.Module and adapt that."
        ) from None
    if place is not None:
        host.__dict__[place] = types.MethodType(type(host).forward, host)


def detach(host: Any) -> None:
    """Makes an empty host the module that it was."""
    del host.adapters
    place = place_of_forward(host)
    host.__class__ = base_type(type(host))
    inner = host.__dict__.pop(_INNER, None)
    if place is not None:
        host.__dict__[place] = inner or types.MethodType(type(host).forward, host)
    elif inner is not None:
        host.__dict__["forward"] = inner


def replace_class(host: Any, other: nn.Module) -> None:
    """Makes a host a host of another type, with the other's tensors and attributes. Of its own it keeps its adapters,
    its mode, the hooks around its call, and what peftlib remembers of it."""
    kept = {key: value for key, value in vars(host).items() if key in _KEPT or key.startswith("_peftlib")}
    host.__dict__.clear()
    host.__dict__.update(vars(other) | kept)
    host.__class__ = _adapted(type(other))
    adapters_of(host).decided = _UNDECIDED


def put(host: nn.Module, adapter: Adapter) -> None:
    children = adapters_of(host)
    numbered = (adapter.name, *(f"{adapter.name}:{n}" for n in range(2, len(children) + 2)))
    children[next(key for key in numbered if key not in children)] = adapter
    children.decided = _UNDECIDED
    count = children.selection.count
    count[adapter.name] = count.get(adapter.name, 0) + 1


def take(host: nn.Module, adapter: Adapter) -> None:
    children = adapters_of(host)
    del children[next(key for key, child in children.items() if child is adapter)]
    children.decided = _UNDECIDED
    selection = children.selection
    selection.count[adapter.name] -= 1
    if not selection.count[adapter.name]:
        del selection.count[adapter.name]
        selection.active = tuple(name for name in selection.active if name != adapter.name)
        selection.weights = {name: weight for name, weight in selection.weights.items() if name != adapter.name}


def require_on_top(name: str, host: nn.Module) -> None:
    if "forward" in host.__dict__ and place_of_forward(host) is None:
        raise AdapterError(
            f"{name or 'the root'}: a forward was put on this {type(host).__name__} itself after inject. "
            "Undo that first, then eject."
        )
    if Adapted not in type(host).__bases__:
        own = base_type(type(host)).__name__
        above = [cls.__name__ for cls in type(host).__mro__[: type(host).__mro__.index(Adapted) - 1]]
        raise AdapterError(
            f"{name or 'the root'}: {', '.join(above)} was put above the adapted {own} after inject. "
            "Undo that first, then eject."
        )


def require_unwrapped(name: str, host: nn.Module) -> None:
    """No forward but that of the host's class will run, now or after eject."""
    require_on_top(name, host)
    if _INNER in host.__dict__:
        raise AdapterError(
            f"{name or 'the root'}: a forward was put on this {base_type(type(host)).__name__} itself before inject, "
            "and would go on reading the quantized weight. Save the adapter, eject, undo that, and load it again."
        )


@contextlib.contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Puts classes, children, selections and `requires_grad` back as they were if the block raises."""
    before = [(module, type(module), dict(module.__dict__), dict(module._modules)) for module in every_module(model)]
    found = {id(s): s for module, *_ in before if is_host(module) for s in [adapters_of(module).selection]}
    selections = [(selection, dict(selection.__dict__), dict(selection.count)) for selection in found.values()]
    owners = [module for module, *_ in before if module._parameters]
    trained = [(p, p.requires_grad) for module in owners for p in module._parameters.values() if p is not None]
    try:
        yield
    except BaseException:
        for module, cls, attributes, children in before:
            if type(module) is not cls:
                module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._modules.clear()
            module._modules.update(children)
        for selection, attributes, count in selections:
            selection.__dict__.update(attributes, count=count)
        for parameter, on in trained:
            parameter.requires_grad_(on)
        raise

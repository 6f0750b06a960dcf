"""A host: a module whose class was changed, in place, so that adapters stand around its forward."""

import contextlib
import copy
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ._adapter import Adapter
from ._errors import AdapterError
from ._readers import FAST_PATHS

_INNER = "_inner_forward"


class Selection:
    """Which adapters of a model act: one object for all its hosts, plain data that `torch.compile` can guard on."""

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.aside: tuple[str, ...] = ()
        self.count: dict[str, int] = {}


class Adapters(nn.ModuleDict):
    """The child `host.adapters`: the adapters of one host, in the order in which they nest."""

    selection: Selection

    def forward(self, x: Any) -> Any:
        """A Sequential runs all its children, this one too."""
        return x


class Adapted:
    """The marker base of every adapted class; the host's own class stands right behind it."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(protocol)
        return _rebuild, (base_type(type(self)),), *state


_classes: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()


def _adapted(cls: type) -> type:
    if cls not in _classes:
        namespace = {"__module__": __name__, "__doc__": cls.__doc__, "forward": _forward_around(cls), **_overrides(cls)}
        _classes[cls] = types.new_class("Adapted" + cls.__name__, (Adapted, cls), {}, lambda ns: ns.update(namespace))
    return _classes[cls]


def _forward_around(cls: Any) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        adapters = self._modules["adapters"]
        active = adapters.selection.active
        call = self.__dict__.get(_INNER) or super(Adapted, self).forward  # pyright: ignore[reportAttributeAccessIssue]
        outermost = None
        for adapter in adapters._modules.values():
            if adapter.name in active:
                call = call if outermost is None else functools.partial(outermost, self, call)
                outermost = adapter
        return call(*args, **kwargs) if outermost is None else outermost(self, call, *args, **kwargs)

    forward.__signature__ = inspect.signature(cls.forward)  # pyright: ignore[reportFunctionMemberAccess]
    return forward


def _overrides(cls: type) -> dict[str, property]:
    """A property wins over `__dict__`, so a shadowed tensor could not stand before a computed (parametrized) weight."""
    lineage = [base for base in reversed(cls.__mro__) if issubclass(base, nn.Module)]
    computed = {name: item for base in lineage for name, item in vars(base).items() if isinstance(item, property)}
    overrides = {name: _shadow_first(name, item) for name, item in computed.items()}
    for base, (attribute, off) in FAST_PATHS.items():
        if issubclass(cls, base):
            overrides[attribute] = _off_while_adapted(attribute, off)
    return overrides


def _shadow_first(name: str, computed: property) -> property:
    fget: Any = computed.fget  # not computed.__get__, which torch.compile cannot trace

    def get(self: Any) -> Any:
        return self.__dict__[name] if name in self.__dict__ else fget(self)

    return property(get, computed.fset, computed.fdel, computed.__doc__)


def _off_while_adapted(attribute: str, off: Any) -> property:
    def get(self: Any) -> Any:
        return off if self._modules["adapters"].selection.active else self.__dict__[attribute]

    return property(get, lambda self, value: self.__dict__.__setitem__(attribute, value))


def _rebuild(cls: type) -> Any:
    host: Any = object.__new__(cls)
    host.__class__ = _adapted(cls)
    return host


def base_type(cls: type) -> type:
    """The host's own class, whatever stands above it."""
    return next((above.__bases__[1] for above in cls.__mro__ if Adapted in above.__bases__), cls)


def runs_bare(host: nn.Module, call: Callable[..., Any]) -> bool:
    """Whether `call` is the host's own forward, with no adapter and no foreign wrapper in between."""
    return not isinstance(call, functools.partial) and _INNER not in host.__dict__


def is_host(module: nn.Module) -> bool:
    return isinstance(module, Adapted)


def adapters_of(host: Any) -> Adapters:
    return host._modules["adapters"]


def parts(host: nn.Module, names: Container[str] | None = None) -> list[Adapter]:
    """The adapters of a host, innermost first."""
    found: Any = adapters_of(host).values()
    return [adapter for adapter in found if names is None or adapter.name in names]


def adopt(name: str, host: Any, selection: Selection) -> None:
    """Makes a module a host, with no adapter yet."""
    if is_host(host):
        return
    children = Adapters()
    children.selection = selection
    children.train(host.training)
    if "forward" in host.__dict__:
        host.__dict__[_INNER] = host.__dict__.pop("forward")
    host.adapters = children
    try:
        host.__class__ = _adapted(type(host))
    except TypeError as error:
        raise AdapterError(
            f"{name or 'the root'}: {type(host).__name__} cannot change its class ({error}). "
            "Wrap it in a plain nn.Module and adapt that."
        ) from None


def release(host: Any) -> None:
    """Makes an empty host the module that it was."""
    del host.adapters
    host.__class__ = base_type(type(host))
    if _INNER in host.__dict__:
        host.__dict__["forward"] = host.__dict__.pop(_INNER)


def put(host: nn.Module, adapter: Adapter) -> None:
    children = adapters_of(host)
    numbered = (adapter.name, *(f"{adapter.name}:{n}" for n in range(2, len(children) + 2)))
    children[next(key for key in numbered if key not in children)] = adapter
    count = children.selection.count
    count[adapter.name] = count.get(adapter.name, 0) + 1


def take(host: nn.Module, adapter: Adapter) -> None:
    children = adapters_of(host)
    del children[next(key for key, child in children.items() if child is adapter)]
    selection = children.selection
    selection.count[adapter.name] -= 1
    if not selection.count[adapter.name]:
        del selection.count[adapter.name]
        selection.active = tuple(name for name in selection.active if name != adapter.name)


def require_on_top(name: str, host: nn.Module) -> None:
    if "forward" in host.__dict__:
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


@contextlib.contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Puts classes, children and selections back as they were if the block raises."""
    before = [(module, type(module), dict(module.__dict__), dict(module._modules)) for module in model.modules()]
    found = {id(s): s for module in model.modules() if is_host(module) for s in [adapters_of(module).selection]}
    selections = [(selection, dict(selection.__dict__), dict(selection.count)) for selection in found.values()]
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
        raise


def face(model: nn.Module, meta: bool = False) -> Any:
    """A copy of the module objects that shares every tensor with the original, or has them all on the meta device."""
    shared: dict[int, Any] = {}
    for module in model.modules():
        tensors = [*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()]
        shared.update({id(item): _on_meta(item) if meta else item for item in tensors if isinstance(item, Tensor)})
    return copy.deepcopy(model, shared)


def _on_meta(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

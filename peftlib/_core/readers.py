"""Where a child is adapted whose weights a module around it reads without calling it: from that module, by a path."""

import functools
import inspect
import types
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._errors import AdapterError
from .host import base_type
from .reads import ANY, CALL, Path, function_of, reads_of

# What a source does not show: torch's parents read their children in compiled functions, and have fast paths around
# them, which are switched off while there are adapters inside.
_READ_BY_TORCH: dict[type[nn.Module], frozenset[Path]] = {
    nn.MultiheadAttention: frozenset({("out_proj", "weight"), ("out_proj", "bias")}),
}
_IN_PLACE = {"add_", "sub_", "mul_", "div_", "copy_", "fill_", "zero_", "clamp_", "lerp_"}
_DEEPEST = 4  # methods of a child that call methods of its child, and so on


class Site(NamedTuple):
    """Where to adapt a module: the host, the module's path inside it, which is empty for the module itself, and whether
    what reads the module also calls it, in another case."""

    host_name: str
    host: nn.Module
    inner: str
    called: bool = True


class Readers:
    """Of one model the children that are read where they are not called, and the host of each.

    The host is the innermost module inside which every call and every reading of the child takes place: while it runs,
    with the child's merged weight in place, both find that weight. It is made of the model's modules under all their
    names."""

    def __init__(self, named: Sequence[tuple[str, nn.Module]]) -> None:
        self._sites: dict[int, Site] = {}
        self._sites_of_whole: dict[int, Site] = {}
        self._changed: dict[int, str] = {}
        self._users: dict[int, list[nn.Module]] = {}
        self._read: set[int] = set()
        self._called: set[int] = set()
        parents = [module for module in {id(module): module for _, module in named}.values() if module._modules]
        paths = functools.cache(_class_paths)
        for module in parents:
            self._note(module, paths(type(module)).others)
        if self._read:
            for module in parents:
                self._note(module, paths(type(module)).calls)
            by_name = dict(named)
            for name, site in _sites(named, {child: self._users[child] for child in self._read}):
                self._remember(by_name, name, site._replace(called=id(by_name[name]) in self._called))

    def _note(self, module: nn.Module, paths: frozenset[Path]) -> None:
        for child, use in _children_used(module, paths):
            self._users.setdefault(id(child), []).append(module)
            (self._called if use == CALL else self._read).add(id(child))
            if use in _IN_PLACE:
                self._changed[id(child)] = f"{base_type(type(module)).__name__} changes its weight in place ({use})"

    def _remember(self, by_name: dict[str, nn.Module], name: str, site: Site) -> None:
        self._sites[id(by_name[name])] = site
        for outer in _outward(name):
            if outer == site.host_name:
                break
            whole = self._sites_of_whole.setdefault(id(by_name[outer]), site)
            if len(site.host_name) <= len(whole.host_name):
                inner = outer.removeprefix(site.host_name).lstrip(".")
                self._sites_of_whole[id(by_name[outer])] = site._replace(inner=inner)

    def site(self, name: str, module: nn.Module, whole: bool = False) -> Site:
        """Where to adapt a module, or, for a kind that may change what is inside it too, the whole of it."""
        if id(module) in self._changed:
            raise AdapterError(
                f"{name}: {self._changed[id(module)]} while it runs, which would change that of the base or be lost. "
                "Exclude this module."
            )
        return (self._sites_of_whole if whole else self._sites).get(id(module), Site(name, module, ""))


class _Paths(NamedTuple):
    """What a class uses: its plain calls of children, which tell nothing where no child is read, and all others."""

    calls: frozenset[Path]
    others: frozenset[Path]


def _class_paths(cls: type) -> _Paths:
    own = base_type(cls)
    forward = function_of(inspect.getattr_static(own, "forward", None))
    by_torch = [paths for reader, paths in _READ_BY_TORCH.items() if issubclass(own, reader)]
    paths = frozenset().union(reads_of(own, forward) if forward else (), *by_torch)
    called = [path for path in paths if len(path) > 1 and path[-1] == CALL]
    calls = frozenset(path for path in called if len(path) == 2 or path[-2] == ANY)
    return _Paths(calls, frozenset(path for path in paths - calls if len(path) > 1))


def _children_used(module: nn.Module, paths: frozenset[Path]) -> list[tuple[nn.Module, str]]:
    """Each module inside that is called, or whose tensors are read or changed, and which of it."""
    for item in (module.__dict__.get("forward"), module.__dict__.get("_inner_forward")):
        replaced = function_of(item.__func__) if isinstance(item, types.MethodType) else None
        if replaced:  # a library puts its own forward on the module itself
            paths |= {path for path in reads_of(base_type(type(module)), replaced) if len(path) > 1}
    found = dict.fromkeys(use for path in sorted(paths) for use in _uses(module, path, _DEEPEST))
    return [(child, use) for child, use in found if child is not module]


def _uses(module: nn.Module, path: Path, depth: int) -> Iterator[tuple[nn.Module, str]]:
    """What is at the path, or what the method there uses."""
    head, *rest = path or ("",)
    if head == CALL:
        yield module, CALL
    elif _has_tensor(module, head):
        yield module, next((name for name in rest if name in _IN_PLACE), "read")
    elif head == ANY or head in module._modules:
        for child in [*module._modules.values()] if head == ANY else [module._modules[head]]:
            if child is not None:
                yield from _uses(child, tuple(rest), depth)
    elif depth and head not in ("forward", "__call__"):
        cls = base_type(type(module))
        method = function_of(inspect.getattr_static(cls, head, None)) if head else None
        for inner in reads_of(cls, method) if method else ():
            yield from _uses(module, inner, depth - 1)


def _has_tensor(module: nn.Module, name: str) -> bool:
    buffer = module._buffers.get(name)
    if buffer is not None:  # positions and masks are read as they are, whatever adapters there do
        return buffer.dtype not in (torch.int64, torch.bool)
    return name in module._parameters or name in module._buffers or is_computed(module, name)


def is_computed(module: nn.Module, name: str) -> bool:
    """Whether a parametrization or a hook makes it of other tensors, so that it cannot be overridden from outside."""
    parametrized: nn.Module | None = module._modules.get("parametrizations")
    return isinstance(module.__dict__.get(name), Tensor) or (parametrized is not None and name in parametrized._modules)


def _sites(named: Sequence[tuple[str, nn.Module]], users: dict[int, list[nn.Module]]) -> Iterator[tuple[str, Site]]:
    """The first name of each child that has users, and its site."""
    by_name = dict(named)
    names: dict[int, list[str]] = {}
    for name, module in named:
        names.setdefault(id(module), []).append(name)
    for child in users.keys() & names.keys():
        around = [_outward(name)[1:] for name in names[child]]
        around += [_outward(name) for user in users[child] for name in names[id(user)]]
        common = set.intersection(*({id(by_name[outer]) for outer in each} for each in around))
        first = names[child][0]
        possible = [outer for outer in around[0] if id(by_name[outer]) in common and _has_forward(by_name[outer])]
        host_name = next(iter(possible), "")
        yield first, Site(host_name, by_name[host_name], first.removeprefix(host_name).lstrip("."))


def _outward(name: str) -> list[str]:
    """A module's name and those of the modules around it: "a.b" gives "a.b", "a", ""."""
    parts = name.split(".") if name else []
    return [".".join(parts[:end]) for end in range(len(parts), -1, -1)]


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward or "forward" in module.__dict__

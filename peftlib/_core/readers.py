"""Where a child is adapted whose weights a module around it reads without calling it: from that module, by a path."""

import functools
import inspect
import types
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from .host import base_type
from .reads import ANY, Path, function_of, reads_of

# What a source does not show: torch's parents read their children in compiled functions, and have fast paths around
# them, which are switched off while there are adapters inside.
_READ_BY_TORCH: dict[type[nn.Module], frozenset[Path]] = {
    nn.MultiheadAttention: frozenset({("out_proj", "weight"), ("out_proj", "bias")}),
}
_DEEPEST = 4  # methods of a child that call methods of its child, and so on


class Site(NamedTuple):
    """Where to adapt a module: the host, and the module's path inside it, which is empty for the module itself."""

    host_name: str
    host: nn.Module
    inner: str


class Readers:
    """Of one model the children that are read where they are not called, and the host of each.

    The host is the innermost module inside which every call and every reading of the child takes place: while it runs,
    with the child's merged weight in place, both find that weight."""

    def __init__(self, named: Sequence[tuple[str, nn.Module]]) -> None:
        """Takes the model's modules under all their names."""
        modules = {id(module): module for _, module in named}
        reads = functools.cache(_class_reads)
        readers: dict[int, list[nn.Module]] = {}
        for module in modules.values():
            for child in _children_read(module, reads(type(module))) if module._modules else ():
                if id(child) in modules:
                    readers.setdefault(id(child), []).append(module)
        self._sites = dict(_sites(named, readers)) if readers else {}

    def site(self, name: str, module: nn.Module) -> Site:
        return self._sites.get(id(module), Site(name, module, ""))


def _class_reads(cls: type) -> frozenset[Path]:
    own = base_type(cls)
    forward = function_of(inspect.getattr_static(own, "forward", None))
    by_torch = [paths for reader, paths in _READ_BY_TORCH.items() if issubclass(own, reader)]
    return frozenset().union(reads_of(own, forward) if forward else (), *by_torch)


def _children_read(module: nn.Module, paths: frozenset[Path]) -> list[nn.Module]:
    for item in (module.__dict__.get("forward"), module.__dict__.get("_inner_forward")):
        replaced = function_of(item.__func__) if isinstance(item, types.MethodType) else None
        if replaced:  # a library puts its own forward on the module itself
            paths |= reads_of(base_type(type(module)), replaced)
    owners = [owner for path in paths if len(path) > 1 for owner in _owners(module, path, _DEEPEST)]
    return list({id(owner): owner for owner in owners if owner is not module}.values())


def _owners(module: nn.Module, path: Path, depth: int) -> Iterator[nn.Module]:
    """The modules whose own tensors are at this path, or are read by the method there."""
    if not path:
        return
    head, *rest = path
    if _has_tensor(module, head):
        yield module
    elif head == ANY or head in module._modules:
        children = [*module._modules.values()] if head == ANY else [module._modules[head]]
        for child in children:
            if child is not None:
                yield from _owners(child, tuple(rest), depth)
    elif depth and head not in ("forward", "__call__"):
        cls = base_type(type(module))
        method = function_of(inspect.getattr_static(cls, head, None))
        for inner in reads_of(cls, method) if method else ():
            yield from _owners(module, inner, depth - 1)


def _has_tensor(module: nn.Module, name: str) -> bool:
    return name in module._parameters or name in module._buffers or is_computed(module, name)


def is_computed(module: nn.Module, name: str) -> bool:
    """Whether a parametrization or a hook makes it of other tensors, so that it cannot be overridden from outside."""
    parametrized: nn.Module | None = module._modules.get("parametrizations")
    return isinstance(module.__dict__.get(name), Tensor) or (parametrized is not None and name in parametrized._modules)


def _sites(named: Sequence[tuple[str, nn.Module]], readers: dict[int, list[nn.Module]]) -> Iterator[tuple[int, Site]]:
    by_name = dict(named)
    names: dict[int, list[str]] = {}
    for name, module in named:
        names.setdefault(id(module), []).append(name)
    for child, reading in readers.items():
        around = [{id(by_name[outer]) for outer in _outward(name)} for reader in reading for name in names[id(reader)]]
        around += [{id(by_name[outer]) for outer in _outward(name)[1:]} for name in names[child]]
        name = names[child][0]
        for host_name in _outward(name)[1:]:
            host = by_name[host_name]
            if all(id(host) in each for each in around) and (not host_name or _has_forward(host)):
                yield child, Site(host_name, host, name.removeprefix(host_name).lstrip("."))
                break


def _outward(name: str) -> list[str]:
    """A module's name and those of the modules around it: "a.b" gives "a.b", "a", ""."""
    parts = name.split(".") if name else []
    return [".".join(parts[:end]) for end in range(len(parts), -1, -1)]


def _has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward or "forward" in module.__dict__

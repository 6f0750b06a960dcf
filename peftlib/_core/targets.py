"""Targets: from names, types and predicates to modules, with the nearest names when nothing matches."""

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from .._errors import AdapterError

Target = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Targets = Target | Sequence[Target]
Named = tuple[str, nn.Module]


def select(candidates: Sequence[Named], targets: Targets, exclude: Targets = ()) -> list[Named]:
    dropped = {id(module) for _, module in _matches(candidates, exclude, "exclude")}
    chosen = [named for named in _matches(candidates, targets, "targets") if id(named[1]) not in dropped]
    if not chosen:
        raise AdapterError(
            f"targets: {targets!r} matches only modules that exclude={exclude!r} takes away. Narrow `exclude`."
        )
    return chosen


def _matches(candidates: Sequence[Named], targets: Targets, where: str) -> list[Named]:
    hits: set[int] = set()
    for target in _as_list(targets, where):
        test = _test(target, where)
        found = {id(module) for name, module in candidates if test(name, module)}
        if not found:
            raise AdapterError(f"{where}: {_describe(target)}. {_advice(target, candidates)}")
        hits |= found
    return [(name, module) for name, module in candidates if id(module) in hits]


def _as_list(targets: Targets, where: str) -> list[Target]:
    if isinstance(targets, (list, tuple, set, frozenset)):
        if not targets and where == "targets":
            raise AdapterError("targets: the list is empty. Name at least one module, type or predicate.")
        return list(targets)
    return [targets]  # pyright: ignore[reportReturnType]


def _test(target: Any, where: str) -> Callable[[str, nn.Module], bool]:
    if isinstance(target, str):
        matches = _glob(target)
        return lambda name, module: matches(name) is not None
    if isinstance(target, type):
        return lambda name, module: isinstance(module, target)
    if callable(target):
        return lambda name, module: bool(target(name, module))
    raise TypeError(f"{where}: expected a glob, a module type or a predicate(name, module), found {target!r}")


def _glob(pattern: str) -> Callable[[str], re.Match[str] | None]:
    return re.compile(rf"(?s:.*\.)?{fnmatch.translate(pattern)}").match


def _describe(target: Target) -> str:
    if isinstance(target, str):
        return f"no module matches {target!r}"
    if isinstance(target, type):
        return f"no module is a {target.__name__}"
    return f"no module satisfies {getattr(target, '__name__', target)!r}"


def _advice(target: Target, candidates: Sequence[Named]) -> str:
    if isinstance(target, type):
        kinds = sorted({type(module).__name__ for _, module in candidates})
        return f"The model is made of {', '.join(kinds[:12])}."
    if not isinstance(target, str):
        return "Check the predicate: it is called with (name, module) for every module."
    near = list(_near_misses(target, [name for name, _ in candidates if name]))
    if not near:
        return "The model has no named submodules. Pass a type or a predicate."
    return f"The nearest names are {', '.join(map(repr, near))}. Correct the pattern or drop it."


def _near_misses(pattern: str, names: Sequence[str]) -> Iterator[str]:
    """Names as specific as the pattern is: 'q_porj' is compared with last parts, 'layers.0.q_porj' with last three."""
    depth = pattern.count(".") + 1
    suffixes = dict.fromkeys(".".join(name.split(".")[-depth:]) for name in names)
    close = difflib.get_close_matches(pattern, suffixes, n=4, cutoff=0.5)
    yield from close or difflib.get_close_matches(pattern, suffixes, n=4, cutoff=0.0)

"""Targets: from names, types and predicates to modules, and what was meant where nothing matches."""

import difflib
import fnmatch
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from .._errors import AdapterError

Target = str | type[nn.Module] | Callable[[str, nn.Module], bool]
Targets = Target | Sequence[Target]
Named = tuple[str, nn.Module]
_OF_EXPRESSIONS = (".*", ".+", "\\", "(", "|", "$")


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
    by_ending = _by_ending(candidates) if any(map(_is_name, _as_list(targets, where))) else {}
    for target in _as_list(targets, where):
        _require_target(target, candidates, where)
        if _is_name(target):
            found = by_ending.get(target, set[int]())
        else:
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


def _require_target(target: Any, candidates: Sequence[Named], where: str) -> None:
    """Both can be called, or stand for names elsewhere, and would fail in ways that say nothing."""
    if isinstance(target, re.Pattern):
        raise AdapterError(
            f"{where}: {target.pattern!r} is a compiled regular expression, and names here are globs. "
            f"{_as_predicate(target.pattern)}"
        )
    if isinstance(target, nn.Module):
        names = [name or "^" for name, module in candidates if module is target]
        found = f"{where}: a module itself was passed, a {type(target).__name__}"
        raise AdapterError(
            f"{found} of this model. Pass its name, {names[0]!r}."
            if names
            else f"{found} that is not in this model. Pass the name of one that is."
        )


def _test(target: Any, where: str) -> Callable[[str, nn.Module], bool]:
    if isinstance(target, str):
        matches = _glob(target)
        return lambda name, module: matches(name) is not None
    if isinstance(target, type):
        return lambda name, module: isinstance(module, target)
    if callable(target):
        return lambda name, module: bool(target(name, module))
    raise TypeError(f"{where}: expected a glob, a module type or a predicate(name, module), found {target!r}")


def _is_name(target: Any) -> bool:
    return isinstance(target, str) and not any(sign in target for sign in "^*?[")


def _by_ending(candidates: Sequence[Named]) -> dict[Any, set[int]]:
    """What each name without wildcards matches, so that a list of all names costs one walk, and not one a name."""
    found: dict[Any, set[int]] = {}
    for name, module in candidates:
        for ending in itertools.accumulate(reversed(name.split(".")), lambda ending, leaf: f"{leaf}.{ending}"):
            found.setdefault(ending, set()).add(id(module))
    return found


def _glob(pattern: str) -> Callable[[str], re.Match[str] | None]:
    """On the whole name where it begins with ^, which then is not part of the glob, else on a dotted suffix too."""
    anywhere = "" if pattern.startswith("^") else r"(?s:.*\.)?"
    return re.compile(anywhere + fnmatch.translate(pattern.removeprefix("^"))).match


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
    if target.lower().replace("_", "-") == "all-linear":
        return _instead_of_all_linear(candidates)
    names = [name for name, _ in candidates if name]
    meant = _matched_as_expression(target, names)
    if meant:
        return f"As a regular expression it would match {len(meant)}, {meant[0]!r} the first. {_as_predicate(target)}"
    near = list(_near_misses(target.removeprefix("^"), names))
    if not near:
        return "The model has no named submodules. Pass a type or a predicate."
    return f"The nearest names are {', '.join(map(repr, near))}. Correct the pattern or drop it."


def _instead_of_all_linear(candidates: Sequence[Named]) -> str:
    """HF peft leaves out the output layer, which it finds by asking a transformers model; this asks the user."""
    linears = [name for name, module in candidates if isinstance(module, nn.Linear)]
    head = f", and exclude={linears[-1]!r} if that is the output layer" if linears else ""
    return f"For every Linear pass the type, torch.nn.Linear{head}."


def _matched_as_expression(pattern: str, names: Sequence[str]) -> list[str]:
    """What HF peft would take it for: the whole of a name."""
    if not any(mark in pattern for mark in _OF_EXPRESSIONS):
        return []
    try:
        return [name for name in names if re.fullmatch(pattern, name)]
    except re.error:
        return []


def _as_predicate(pattern: str) -> str:
    return f"Pass a list of globs, or lambda name, module: re.fullmatch({pattern!r}, name)."


def _near_misses(pattern: str, names: Sequence[str]) -> Iterator[str]:
    """Names as specific as the pattern is: 'q_porj' is compared with last parts, 'layers.0.q_porj' with last three."""
    depth = pattern.count(".") + 1
    suffixes = dict.fromkeys(".".join(name.split(".")[-depth:]) for name in names)
    close = difflib.get_close_matches(pattern, suffixes, n=4, cutoff=0.5)
    yield from close or difflib.get_close_matches(pattern, suffixes, n=4, cutoff=0.0)

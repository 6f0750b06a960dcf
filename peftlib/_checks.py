"""What an argument must be, checked and said in the same words everywhere: a number, a probability, one of a few."""

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

from ._errors import AdapterError


def require_whole_number(name: str, value: Any, *, least: int = 1, say: Any, where: str = "") -> None:
    """`say` is a value that would do, for whoever reads the message; `where` is whose argument it is."""
    if not _is(Integral, value) or value < least:
        raise _refusal(name, value, f"a whole number of at least {least}", say, where)


def require_positive(name: str, value: Any, *, say: Any, where: str = "") -> None:
    if not is_number(value) or value <= 0:
        raise _refusal(name, value, "a positive number", say, where)


def require_at_least(least: float, name: str, value: Any, *, say: Any, where: str = "") -> None:
    if not is_number(value) or value < least:
        raise _refusal(name, value, f"a finite number of at least {least}", say, where)


def require_probability(name: str, value: Any, *, say: Any = 0.1, where: str = "") -> None:
    """Of dropping: with 1 nothing would be left to train on."""
    if not is_number(value) or not 0 <= value < 1:
        raise _refusal(name, value, "a probability in [0, 1)", say, where)


def require_one_of(known: Iterable[Any], name: str, value: Any, *, where: str = "") -> None:
    if not isinstance(value, str) or value not in known:
        found = f"{name}={value!r} is none of {', '.join(map(repr, known))}. Pass one of them."
        raise AdapterError(f"{where}: {found}" if where else found)


def is_number(value: Any) -> bool:
    """Finite, and no truth value, which Python counts as a number too."""
    return _is(Real, value) and math.isfinite(value)


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _refusal(name: str, value: Any, wanted: str, say: Any, where: str) -> AdapterError:
    found = f"{name}={value!r} is not {wanted}. Pass {name}={say}, say."
    return AdapterError(f"{where}: {found}" if where else found)

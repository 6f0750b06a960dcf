"""Faults that strike in the middle: at the k-th call of a public function, or at the k-th step that peftlib takes."""

import contextlib
import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import peftlib
import peftlib.kernels
from support.helpers import changes, snapshot

_SOURCES = tuple(f"{Path(module.__file__ or '').resolve().parent}/" for module in (peftlib, peftlib.kernels))
_SUSPENDS = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class Fault(Exception):
    """What an injected failure raises: nothing in peftlib catches it on purpose."""


@contextlib.contextmanager
def failing(owner: Any, attribute: str, at: int, late: bool = False) -> Iterator[list[bool]]:
    """Makes the call number `at` of `owner.attribute` raise, once; before it does anything, or after it has."""
    real, calls, struck = getattr(owner, attribute), itertools.count(), []
    was_own = attribute in vars(owner)

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        if next(calls) != at:
            return real(*args, **kwargs)
        struck.append(True)
        if late:
            real(*args, **kwargs)
        raise Fault(f"{attribute}, call {at}")

    setattr(owner, attribute, stand_in)
    try:
        yield struck
    finally:
        if was_own:
            setattr(owner, attribute, real)
        else:
            delattr(owner, attribute)


def fail_at_every_call(
    make: Callable[[], Any], act: Callable[[Any], Any], owner: Any, attribute: str, late: bool = False
) -> int:
    """Lets `act` fail at its first call of `owner.attribute`, at its second, and so on: each time the model must be as
    it was, and `act` must succeed afterwards. Returns how many calls there are."""
    for at in itertools.count():
        model = make()
        before = snapshot(model)
        with failing(owner, attribute, at, late) as struck, contextlib.suppress(Fault):
            act(model)
        if not struck:
            return at
        assert changes(before, model) == [], f"after a failure at call {at} of {attribute}"
        act(model)
    raise AssertionError


class Steps:
    """Notes each call of a function of peftlib; the one numbered `at` raises before it does anything.

    It asks Python for them, so it names no function and holds whatever they are called. A generator is left out: Python
    reports that it goes on where its own `finally` would not see what is raised."""

    def __init__(self, at: int | None = None) -> None:
        self.at = at
        self.taken: list[CodeType] = []
        self.struck = False

    def __enter__(self) -> "Steps":
        sys.setprofile(self._step)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _step(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or code.co_flags & _SUSPENDS or not _is_ours(code.co_filename):
            return
        self.taken.append(code)
        if len(self.taken) - 1 == self.at:
            self.struck = True
            raise Fault(f"at the call of {code.co_qualname}")


@functools.cache
def _is_ours(file: str) -> bool:
    return str(Path(file).resolve()).startswith(_SOURCES)


def steps_of(make: Callable[[], Any], act: Callable[[Any], Any], part: int = 0, parts: int = 1) -> list[int]:
    """The steps of `act`, or a part of them, at which a fault may strike: the first call of each function, one in the
    middle, and the last."""
    act(make())  # what is kept from then on is not found again
    model = make()
    with Steps() as steps:
        act(model)
    found: dict[CodeType, list[int]] = {}
    for number, code in enumerate(steps.taken):
        found.setdefault(code, []).append(number)
    return sorted({each[k] for each in found.values() for k in (0, len(each) // 2, -1)})[part::parts]


def fail_at_every_step(make: Callable[[], Any], act: Callable[[Any], Any], part: int = 0, parts: int = 1) -> int:
    """As `fail_at_every_call`, at the steps of peftlib's own functions. Returns how many there are."""
    numbers = steps_of(make, act, part, parts)
    for number in numbers:
        model = make()
        before = snapshot(model)
        with Steps(number) as steps, contextlib.suppress(Fault):
            act(model)
        assert steps.struck
        assert changes(before, model) == [], f"after a failure at the call of {steps.taken[-1].co_qualname}"
        act(model)
    return len(numbers)

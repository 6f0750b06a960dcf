"""A refusal: an `AdapterError` in three parts that names what it is about, and leaves the model as it was."""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from torch import nn

from peftlib import AdapterError
from support.helpers import changes, snapshot


class Refusal(NamedTuple):
    """What is there, what is done to it, and what the refusal names: where first, then the values that it is about."""

    make: Callable[[], Any]
    act: Callable[[Any], Any]
    names: tuple[str, ...]


def refuses(table: dict[str, Refusal]) -> Any:
    return pytest.mark.parametrize("refusal", table.values(), ids=table)


def check(refusal: Refusal, model: Any = None) -> None:
    model = refusal.make() if model is None else model
    with refused(model, *refusal.names):
        refusal.act(model)


@contextlib.contextmanager
def refused(model: nn.Module | None, *names: str) -> Iterator[pytest.ExceptionInfo[AdapterError]]:
    """What is done inside is refused, and the message names these; the model, if there is one, is as it was."""
    before = {} if model is None else snapshot(model)
    with pytest.raises(AdapterError) as error:
        yield error
    require_three_parts(str(error.value), *names)
    assert model is None or changes(before, model) == []


def require_three_parts(message: str, *names: str) -> None:
    """Where and what was found, in a sentence that names where; then, in a sentence of its own, what to do."""
    found, *advice = re.split(r"(?<=[.)])\s+(?=[A-Z])", message)
    assert message.endswith("."), f"no whole sentence: {message}"
    assert advice, f"nothing about what to do: {message}"
    assert not names or is_named(names[0], found), f"{names[0]} is not where it was: {message}"
    missing = [name for name in names if not is_named(name, message)]
    assert not missing, f"{missing} not named: {message}"


def is_named(name: str, message: str) -> bool:
    """As a whole: "0" is not named by "layers.0", nor by "0.weight"."""
    before = r"(?<![\w.])" if re.match(r"\w", name) else ""
    after = r"(?!\w|\.\w)" if re.search(r"\w$", name) else ""
    return re.search(before + re.escape(name) + after, message) is not None

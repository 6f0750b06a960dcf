"""Keywords from a file fit what a kind's constructor says that it takes, or are refused before it is called."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Optional

import pytest
import torch
from torch import nn

import peftlib
from peftlib import AdapterError
from support.forgery import Forgery
from support.helpers import linears

if TYPE_CHECKING:
    from decimal import Decimal as OnlyForTheChecker


class Taker(peftlib.Adapter):
    """Takes a keyword of every sort of type that a hint can name."""

    def __init__(
        self,
        host: Any,
        *,
        whole: int = 1,
        number: float = 1.0,
        word: str = "",
        truth: bool = False,
        maybe: int | None = None,
        older: Optional[str] = None,  # noqa: UP045 (this spelling is read too)
        one_of: Literal["a", 2] = "a",
        words: list[str] | None = None,
        several: Sequence[int] = (),
        bare: list = [],  # noqa: B006
        any_order: Iterable[float] = (),
        pair: tuple[int, ...] = (),
        named: dict[str, int] | None = None,
        mapping: Mapping[str, float] | None = None,
        plain: dict | None = None,
        dtype: torch.dtype | None = None,
        anything: Any = None,
        unsaid=None,
        foreign: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1))


FITS = {
    "whole": [0, -3, 10**30],
    "number": [0, 1.5, -2],
    "word": ["", "a"],
    "truth": [True, False],
    "maybe": [None, 3],
    "older": [None, "a"],
    "one_of": ["a", 2],
    "words": [None, [], ["a", "b"]],
    "several": [[], [1, 2]],
    "bare": [[], [1, "a"]],
    "any_order": [[1, 2.5]],
    "pair": [[1], [1, 2, 3]],
    "named": [None, {}, {"a": 1}],
    "mapping": [{"a": 1.5}],
    "plain": [{"a": []}],
    "dtype": [None, "float32"],
    "anything": [None, 1, "a", [], {}],
    "unsaid": [None, 1, "a", [], {}],
    "foreign": [None, 1],
}
MISFITS = {
    "whole": [True, 1.0, "1", None, [1], {}],
    "number": [True, "1", None, [1.0]],
    "word": [1, None, ["a"], True],
    "truth": [0, 1, None, "yes"],
    "maybe": ["3", 3.0, True, []],
    "older": [3, ["a"]],
    "one_of": ["b", 3, 2.0, True, None],
    "words": ["a", [1], {}, ["a", None]],
    "several": ["12", 1, [1.0], {"a": 1}],
    "bare": ["a", {}, 1],
    "any_order": [["a"], "12"],
    "pair": [["1"], 1],
    "named": [[], {"a": "1"}, "a"],
    "mapping": [{"a": None}, []],
    "plain": [[], "a", 1],
    "dtype": [32, ["float32"], True],
}


@pytest.fixture
def load(tmp_path):
    """Loads a file that gives these keywords to a kind, and gives the adapter's configuration."""

    def loaded(kind: type[peftlib.Adapter], keywords: dict[str, Any]) -> Mapping[str, Any]:
        model, path = linears(1), tmp_path / "adapter"
        peftlib.inject(model, "0", kind)
        peftlib.save(model, path)
        peftlib.eject(model)
        forgery = Forgery(path.read_bytes())
        forgery.header["configs"][0]["config"] = keywords
        path.write_bytes(forgery.whole())
        peftlib.load(model, path)
        ((_, _, adapter),) = peftlib.adapters(model)
        return adapter.config

    return loaded


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in FITS.items() for value in values])
def test_what_fits_is_taken(key, value, load):
    assert load(Taker, {key: value})[key] == value


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in MISFITS.items() for value in values])
def test_what_does_not_fit_is_refused(key, value, load):
    with pytest.raises(AdapterError, match=re.escape(f"{key}={value!r}") + ".*Taker"):
        load(Taker, {key: value})


@pytest.mark.parametrize("key", ["host", "self", "unheard", "__init__", ""])
def test_a_keyword_that_is_not_there_is_refused(key, load):
    with pytest.raises(AdapterError, match=rf"'{key}'.*Taker.*whole, number, word"):
        load(Taker, {key: 1})


class Collector(peftlib.Adapter):
    """Takes whatever it is given."""

    def __init__(self, host: Any, *, rank: int = 1, **others: Any) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1))


def test_a_kind_that_collects_keywords_gets_them_and_its_own_are_still_checked(load):
    keywords = {"rank": 2, "other": [1], "more": None}
    assert load(Collector, keywords) == keywords
    with pytest.raises(AdapterError, match=r"rank='2'.*Collector.*int"):
        load(Collector, {"rank": "2", "other": 1})


class Unreadable(peftlib.Adapter):
    """Its hint names what only the type checker imports."""

    def __init__(self, host: Any, *, value: "OnlyForTheChecker | None" = None) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize("value", [1, "a", [1], {"a": 1}])
def test_a_hint_that_cannot_be_read_checks_nothing(value, load):
    assert load(Unreadable, {"value": value}) == {"value": value}
    with pytest.raises(AdapterError, match=r"'other'.*Unreadable"):
        load(Unreadable, {"other": 1})


class Bare(peftlib.Adapter):
    """Takes no keywords at all."""

    def __init__(self, host: Any) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1))


def test_a_kind_without_keywords_takes_none(load):
    assert load(Bare, {}) == {}
    with pytest.raises(AdapterError, match=r"'rank'.*Bare takes none"):
        load(Bare, {"rank": 1})


def test_every_default_of_our_kinds_fits_its_own_hint(load):
    """Else a file of ours would be refused: save writes the defaults out."""
    for name in ("LoRA", "DoRA", "IA3", "Bottleneck", "Full"):
        model = linears(1)
        peftlib.inject(model, "0", getattr(peftlib, name))
        ((_, _, adapter),) = peftlib.adapters(model)
        assert load(type(adapter), dict(adapter.config)) == adapter.config

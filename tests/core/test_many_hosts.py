"""Each operation costs in proportion to the number of hosts: counted in calls of Python functions, not in seconds."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import peftlib
from peftlib import Full, LoRA
from support.helpers import linears


def calls(act: Callable[[], object]) -> int:
    """How many functions Python enters, anyone's, and how often it goes on with a generator."""
    count = 0

    def note(_: FrameType, event: str, __: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(None)
    return count


def adapted(count: int) -> Any:
    model = linears(count)
    peftlib.inject(model, nn.Linear, LoRA, rank=1)
    return model


def with_copies(count: int) -> Any:
    model = linears(count)
    peftlib.inject(model, nn.Linear, Full, params="weight")
    return model


def merged(count: int) -> Any:
    model = adapted(count)
    peftlib.merge(model)
    return model


def encoder(count: int) -> Any:
    return nn.Sequential(*(nn.TransformerEncoderLayer(4, 1, 4) for _ in range(count)))


def each_name(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def base_alone(model: Any) -> dict[str, Any]:
    return {key: value for key, value in model.state_dict().items() if ".adapters." not in key}


ACTS: dict[str, tuple[Callable[[int], Any], Callable[[Any], object]]] = {
    "inject": (linears, lambda m: peftlib.inject(m, nn.Linear, LoRA, rank=1)),
    "inject by names": (linears, lambda m: peftlib.inject(m, each_name(m), LoRA, rank=1)),
    "inject but for names": (linears, lambda m: peftlib.inject(m, nn.Linear, LoRA, rank=1, exclude=each_name(m)[1:])),
    "inject beside": (adapted, lambda m: peftlib.inject(m, nn.Linear, LoRA, rank=1, name="b")),
    "inject beside copies": (with_copies, lambda m: peftlib.inject(m, nn.Linear, Full, params="bias", name="b")),
    "inject below fast paths": (encoder, lambda m: peftlib.inject(m, "linear1", LoRA, rank=1)),
    "plan": (linears, lambda m: peftlib.plan(m, nn.Linear, LoRA, rank=1)),
    "summary": (adapted, lambda m: str(peftlib.summary(m))),
    "verify": (adapted, lambda m: peftlib.verify(m, torch.zeros(1, 4))),
    "activate": (adapted, lambda m: peftlib.activate(m, "default")),
    "train_only": (adapted, lambda m: peftlib.train_only(m, "default")),
    "view": (adapted, lambda m: peftlib.view(m, "default")),
    "merge": (adapted, peftlib.merge),
    "unmerge": (merged, peftlib.unmerge),
    "merged_state_dict": (adapted, lambda m: list(peftlib.merged_state_dict(m))),
    "load_state_dict": (adapted, lambda m: m.load_state_dict(m.state_dict())),
    "load_state_dict of the base": (adapted, lambda m: m.load_state_dict(base_alone(m))),
    "eject": (adapted, peftlib.eject),
    "eject for good": (adapted, lambda m: peftlib.eject(m, merge=True)),
}


def assert_linear(make: Callable[[int], Any], act: Callable[[Any], object]) -> None:
    """From 20 to 40 hosts, and from 40 to 80: twice as many are added, so twice as many calls, and 2 % at most."""
    act(make(80))  # what is kept from then on is not found again
    counts = []
    for hosts in (20, 40, 80):
        model = make(hosts)
        counts.append(calls(lambda model=model: act(model)))
    assert counts[2] - counts[1] <= 1.02 * 2 * (counts[1] - counts[0]), counts


@pytest.mark.parametrize(("make", "act"), ACTS.values(), ids=ACTS)
def test_twice_the_hosts_take_twice_the_calls(make, act):
    assert_linear(make, act)


def test_files_are_written_and_read_in_proportion(tmp_path):
    path = tmp_path / "adapter.safetensors"

    def saved(count: int) -> Any:
        torch.manual_seed(0)
        peftlib.save(adapted(count), path)
        torch.manual_seed(0)
        return linears(count)

    assert_linear(adapted, lambda model: peftlib.save(model, tmp_path / "other"))
    assert_linear(saved, lambda model: peftlib.load(model, path))


def all_but_one(count: int) -> Any:
    model = linears(count)
    peftlib.inject(model, nn.Linear, LoRA, rank=1, exclude="0")
    return model


def test_one_host_more_costs_a_few_walks_and_nothing_for_each_adapter_that_is_in_already():
    """A walk of torch's own over the adapted model is the unit."""
    counts, walks = [], []
    for hosts in (20, 40):
        model = all_but_one(hosts)
        walks.append(calls(lambda model=model: list(model.named_modules())))
        counts.append(calls(lambda model=model: peftlib.inject(model, "0", LoRA, rank=1)))
    assert counts[1] - counts[0] <= 2 * (walks[1] - walks[0])


def test_a_quadratic_cost_would_be_seen():
    with pytest.raises(AssertionError):
        assert_linear(adapted, lambda model: [model.get_submodule("0") for _ in model for _ in model])

"""Another name: renamed in place, or copied beside."""

from typing import Any

import pytest
import torch
from torch import nn

import peftlib
from peftlib import Full, LoRA
from support.faults import fail_at_every_step
from support.helpers import bits, changes, linears, moved, network, snapshot, tokens
from support.refusals import refused

pytestmark = pytest.mark.mutants


def two() -> Any:
    """Adapter a of several parts, two of them on one host, and b."""
    torch.manual_seed(0)
    model = network()
    peftlib.inject(model, nn.Linear, LoRA, rank=2, name="a")
    peftlib.inject(model, "head", Full, params="bias", name="a")
    peftlib.inject(model, "q_proj", LoRA, rank=3, name="b")
    return moved(model)


def test_a_renamed_adapter_is_the_same_adapter_at_the_same_place():
    model = two()
    peftlib.activate(model, {"b": 0.5, "a": 0.25})
    expected = model(tokens())
    parts = [adapter for _, _, adapter in peftlib.adapters(model, "a")]
    order = [(host, name) for host, name, _ in peftlib.adapters(model)]
    peftlib.rename(model, "a", "c")
    assert [adapter for _, _, adapter in peftlib.adapters(model, "c")] == parts
    assert [(h, "c" if n == "a" else n) for h, n in order] == [(h, n) for h, n, _ in peftlib.adapters(model)]
    assert torch.equal(model(tokens()), expected)
    assert not [key for key in model.state_dict() if ".adapters.a" in key]
    assert {row.name: row.weight for row in peftlib.summary(model).rows} == {"c": 0.25, "b": 0.5}
    peftlib.eject(model, "c")
    assert {name for _, name, _ in peftlib.adapters(model)} == {"b"}


def test_renamed_back_nothing_is_changed():
    model = two()
    before = snapshot(model)
    peftlib.rename(model, "a", "c")
    peftlib.rename(model, "c", "a")
    left = [key for key in changes(before, model) if ".selection" not in key]  # counts are a dict of their own
    assert left == []


def test_a_lost_host_is_named_with_the_new_name():
    model = linears(2)
    peftlib.inject(model, nn.Linear, LoRA, rank=2, name="a")
    peftlib.rename(model, "a", "c")
    model[0] = nn.Linear(4, 4)
    with refused(None, "0", '"c"'):
        list(peftlib.parameters(model))


def test_a_renamed_adapter_is_saved_and_loaded_under_its_new_name(tmp_path):
    model, fresh = two(), network()
    peftlib.rename(model, "a", "c")
    peftlib.save(model, tmp_path / "c.safetensors", "c")
    peftlib.load(fresh, tmp_path / "c.safetensors")
    peftlib.activate(model, "c")
    assert torch.equal(fresh(tokens()), model(tokens()))


def test_a_copy_gives_the_same_and_moves_alone():
    model = two()
    peftlib.activate(model, "a")
    before = snapshot(model)
    expected = model(tokens())
    peftlib.copy(model, "a", "c")
    assert torch.equal(model(tokens()), expected)  # the copy is off
    assert [p.requires_grad for p in peftlib.parameters(model, "c")] == [
        p.requires_grad for p in peftlib.parameters(model, "a")
    ]
    with peftlib.activate(model, "c"):
        assert torch.equal(model(tokens()), expected)
        moved(model, "c")
        assert not torch.equal(model(tokens()), expected)
    assert torch.equal(model(tokens()), expected)
    peftlib.eject(model, "c")
    assert changes(before, model) == []


def test_a_copy_keeps_flags_and_draws_nothing():
    model = two()
    peftlib.train_only(model, "b")
    torch.manual_seed(7)
    peftlib.copy(model, "a", "c")
    assert not any(p.requires_grad for p in peftlib.parameters(model, "c"))
    drawn = torch.rand(2)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(2))


def test_parameters_that_two_parts_share_are_shared_by_the_parts_of_the_copy():
    model = linears(2)
    peftlib.inject(model, nn.Linear, LoRA, rank=2, name="a")
    one, other = (part for _, _, part in peftlib.adapters(model, "a"))
    other.lora_A = one.lora_A
    peftlib.copy(model, "a", "c")
    one, other = (part for _, _, part in peftlib.adapters(model, "c"))
    assert one.lora_A is other.lora_A
    assert one.lora_A is not model[0].adapters["a"].lora_A
    assert bits(one.lora_A) == bits(model[0].adapters["a"].lora_A)


def test_a_copy_has_the_masks_of_its_original():
    model = linears(1)
    peftlib.inject(model, "0", LoRA, rank=2, dropout=0.5, seed=3, name="a")
    moved(model)
    peftlib.copy(model, "a", "c")
    x = torch.randn(3, 4)
    with peftlib.activate(model, "a"):
        expected = model(x)
    with peftlib.activate(model, "c"):
        assert torch.equal(model(x), expected)


ACTS = {"rename": peftlib.rename, "copy": peftlib.copy}


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_what_cannot_be_named_so_is_refused(act):
    model = two()
    for old, new, named in (("a", "b", "'b'"), ("d", "c", "'d'"), ("a", "c.d", "'c.d'"), ("a", "a", "'a'")):
        with refused(model, named):
            act(model, old, new)
    with peftlib.route(model, ["a", "b"]), refused(model, act.__name__):
        act(model, "a", "c")
    view = peftlib.view(model, "a")
    with refused(model, act.__name__):
        act(model, "a", "c")
    with refused(view, act.__name__):
        act(view, "a", "c")
    del view
    with peftlib.merged(model, "a"), refused(model, act.__name__):
        act(model, "a", "c")


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_a_failure_on_the_way_leaves_all_as_it_was(act):
    def make() -> Any:
        model = linears(1)
        peftlib.inject(model, "0", LoRA, rank=2, name="a")
        return model

    assert fail_at_every_step(make, lambda model: act(model, "a", "c")) > 10

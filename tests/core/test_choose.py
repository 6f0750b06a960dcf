"""Choosing: which adapters act, which train, and a view that holds a choice of its own."""

import gc
import sys
import threading
from typing import Any

import pytest
import torch
from torch import nn

import peftlib
from peftlib import AdapterError, Full, LoRA
from support.helpers import (
    Gain,
    base_bits,
    bits,
    changes,
    linears,
    modules,
    moved,
    network,
    same_bits,
    snapshot,
    tokens,
)
from support.refusals import refused

pytestmark = pytest.mark.mutants


def two(**sizes: Any) -> Any:
    """A model with adapters a and b that differ; both are active."""
    model = network(**sizes)
    peftlib.inject(model, nn.Linear, LoRA, rank=2, name="a")
    peftlib.inject(model, ["q_proj", "head"], LoRA, rank=3, name="b")
    return moved(model)


def alone(name: str) -> Any:
    """The output with one adapter, by a model that has no other."""
    model = two()
    for other in {"a", "b"} - {name}:
        peftlib.eject(model, other)
    return model(tokens())


def outputs(model: Any) -> dict[str, torch.Tensor]:
    found = {}
    for names in ((), ("a",), ("b",), ("a", "b")):
        with peftlib.activate(model, *names):
            found[" ".join(names)] = model(tokens()).detach()
    return found


def active(model: Any) -> set[str]:
    return {row.name for row in peftlib.summary(model).rows if row.state == "active"}


def operations(act: Any) -> int:
    """How many Python functions a call enters."""
    count = 0

    def profiler(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(profiler)
    try:
        act()
    finally:
        sys.setprofile(None)
    return count


# ---- activate


def test_each_choice_acts_as_if_it_were_alone():
    torch.manual_seed(3)
    model = two()
    torch.manual_seed(3)
    expected_a = alone("a")
    torch.manual_seed(3)
    expected_b = alone("b")
    found = outputs(model)
    assert same_bits(found[""], network()(tokens()))
    assert same_bits(found["a"], expected_a)
    assert same_bits(found["b"], expected_b)
    assert len({bits(output) for output in found.values()}) == 4


def test_activate_costs_a_bare_walk_over_the_modules_and_no_work_at_a_host():
    costs, modules = [], []
    for layers in (1, 40):
        model = two(layers=layers)
        costs.append(operations(lambda model=model: peftlib.activate(model, "a")))
        modules.append(sum(1 for _ in model.modules()))
    assert costs[1] - costs[0] <= 4 * (modules[1] - modules[0])


def test_activate_moves_no_requires_grad():
    model = two()
    before = [p.requires_grad for p in model.parameters()]
    peftlib.activate(model, "a")
    assert [p.requires_grad for p in model.parameters()] == before


def test_activate_stays_without_with_and_is_undone_by_it():
    model = two()
    peftlib.activate(model, "b")
    assert active(model) == {"b"}
    before = snapshot(model)
    with peftlib.activate(model, "a") as same:
        assert same is model
        assert active(model) == {"a"}
        with peftlib.activate(model):
            assert active(model) == set()
        assert active(model) == {"a"}
    assert changes(before, model) == []
    with pytest.raises(KeyError), peftlib.activate(model, "a"):
        raise KeyError
    assert changes(before, model) == []


def test_a_name_twice_acts_once_and_the_order_of_names_does_not_matter():
    model = two()
    expected = model(tokens())
    for names in (("a", "b", "a"), ("b", "a")):
        peftlib.activate(model, *names)
        assert same_bits(model(tokens()), expected)


def test_leaving_a_block_never_brings_back_what_was_ejected_in_it():
    model = two()
    with peftlib.activate(model, "b"):
        peftlib.eject(model, "a")
    peftlib.merge(model)  # what is active must exist
    assert active(model) <= {"b"}
    peftlib.unmerge(model)
    assert active(model) == {"b"}
    peftlib.inject(model, "v_proj", Gain, name="c")
    with peftlib.activate(model):
        pass
    assert active(model) == {"b", "c"}


def test_an_adapter_that_is_ejected_inside_its_own_block_is_gone_after_it():
    model = network()
    peftlib.inject(model, "head", LoRA, name="a")
    with peftlib.activate(model, "a"):
        peftlib.eject(model, "a")
        peftlib.inject(model, "head", LoRA, name="b")
    assert active(model) == {"b"}
    peftlib.activate(model)
    with refused(None, "active"):
        peftlib.merge(model)


def test_leaving_a_block_in_which_the_model_was_merged_does_not_count_an_adapter_twice():
    """`activate` is refused in a merged model, so leaving the block may not do it either."""
    model = two()
    peftlib.activate(model, "b")
    with peftlib.activate(model, "a"):
        expected = model(tokens())
        peftlib.merge(model)
    torch.testing.assert_close(model(tokens()), expected)
    peftlib.unmerge(model)
    assert active(model) in ({"a"}, {"b"})


def test_choosing_through_a_submodule_chooses_for_the_whole():
    model = two()
    peftlib.activate(model.layers[1], "a")
    assert active(model) == {"a"}
    peftlib.activate(model)
    assert active(model.layers[0]) == set()


# ---- train_only


def training(model: Any) -> set[str]:
    return {name for _, name, a in peftlib.adapters(model) for p in a.parameters() if p.requires_grad}


def test_train_only_sets_exactly_the_named_and_touches_no_base():
    model = two()
    peftlib.train_only(model, "a")
    assert training(model) == {"a"}
    assert all(p.requires_grad for p in peftlib.parameters(model, "a"))
    with peftlib.train_only(model, "b") as same:
        assert same is model
        assert training(model) == {"b"}
    assert training(model) == {"a"}
    peftlib.train_only(model)
    assert training(model) == set()
    assert active(model) == {"a", "b"}, "what acts is another choice"
    assert peftlib.summary(model).base_trainable == 0


def test_train_only_brings_single_flags_back():
    model = two()
    next(iter(peftlib.parameters(model, "a"))).requires_grad_(False)
    before = snapshot(model)
    with peftlib.train_only(model, "a", "b"):
        assert all(p.requires_grad for p in peftlib.parameters(model))
    with pytest.raises(KeyError), peftlib.train_only(model):
        raise KeyError
    assert changes(before, model) == []


def test_only_what_trains_gets_a_gradient():
    model = two()
    peftlib.train_only(model, "b")
    model(tokens()).square().sum().backward()
    assert {name for _, name, a in peftlib.adapters(model) for p in a.parameters() if p.grad is not None} == {"b"}


def test_parameters_are_each_given_once_and_by_name():
    model = two()
    first, second = (adapter for _, name, adapter in list(peftlib.adapters(model, "b"))[:2])
    second.lora_B = first.lora_B
    everything = list(peftlib.parameters(model))
    assert len({id(p) for p in everything}) == len(everything)
    assert len(list(peftlib.parameters(model, "b"))) == 2 * 3 - 1


# ---- view


def test_a_view_shares_every_parameter_and_buffer():
    model = two()
    model.register_buffer("scale", torch.ones(1))
    other = peftlib.view(model, "a")
    assert other is not model
    assert type(other) is type(model)
    assert [(k, id(p)) for k, p in other.named_parameters()] == [(k, id(p)) for k, p in model.named_parameters()]
    assert [(k, id(b)) for k, b in other.named_buffers()] == [(k, id(b)) for k, b in model.named_buffers()]
    assert not {id(m) for m in other.modules()} & {id(m) for m in model.modules()}


def test_a_view_keeps_ties_and_flat_weights():
    model = modules({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "rnn": nn.LSTM(4, 4)})
    model["b"].weight = model["a"].weight
    peftlib.inject(model, "a", LoRA)
    other = peftlib.view(model)
    assert other["b"].weight is other["a"].weight is model["a"].weight
    assert [id(w) for w in other["rnn"]._flat_weights] == [id(w) for w in model["rnn"]._flat_weights]


def test_a_view_has_a_selection_of_its_own():
    model = two()
    expected = outputs(model)
    other = peftlib.view(model, "a")
    peftlib.activate(model, "b")
    assert same_bits(other(tokens()), expected["a"])
    assert same_bits(model(tokens()), expected["b"])
    peftlib.activate(other)
    assert same_bits(other(tokens()), expected[""])
    assert same_bits(model(tokens()), expected["b"])
    assert same_bits(peftlib.view(model)(tokens()), expected[""])


def test_making_a_view_leaves_the_model_as_it_was():
    model = two()
    before = snapshot(model)
    other = peftlib.view(model, "a")
    assert changes(before, model) == []
    del other


def test_training_one_face_trains_all():
    model = two()
    other = peftlib.view(model, "a")
    other(tokens()).square().sum().backward()
    grads = [p.grad is not None for p in peftlib.parameters(model, "a")]
    assert all(grads)
    with torch.no_grad():
        next(iter(peftlib.parameters(model, "a"))).zero_()
    with peftlib.activate(model, "a"):
        assert same_bits(other(tokens()), model(tokens()))


def test_threads_with_different_adapters_are_right():
    model = two()
    expected = outputs(model)
    faces = {names: peftlib.view(model, *names.split()) for names in expected}
    wrong: list[str] = []

    def work(names: str) -> None:
        for _ in range(30):
            if not same_bits(faces[names](tokens()), expected[names]):
                wrong.append(names)

    threads = [threading.Thread(target=work, args=(names,)) for names in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_threads_with_kinds_that_shadow_weights_are_right():
    model = network()
    peftlib.inject(model, nn.LayerNorm, Full, name="a")
    peftlib.inject(model, "v_proj", Gain, start=2.0, name="b")
    moved(model)
    test_outputs = outputs(model)
    faces = {names: peftlib.view(model, *names.split()) for names in test_outputs}
    wrong: list[str] = []

    def work(names: str) -> None:
        wrong.extend(names for _ in range(30) if not same_bits(faces[names](tokens()), test_outputs[names]))

    threads = [threading.Thread(target=work, args=(names,)) for names in faces]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


CHANGES = {
    "inject": lambda model: peftlib.inject(model, "v_proj", Full, name="c"),
    "eject": peftlib.eject,
    "eject, a name": lambda model: peftlib.eject(model, "a"),
    "eject, for good": lambda model: peftlib.eject(model, merge=True),
    "merge": peftlib.merge,
    "merged": lambda model: peftlib.merged(model).__enter__(),
    "unmerge": peftlib.unmerge,
}
every_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
THROUGH = "a view"  # what is refused on a view, and beside one
BESIDE = "view(s)"


@every_change
def test_a_view_only_selects(change):
    model = two()
    other = peftlib.view(model, "a")
    before, before_other = snapshot(model), snapshot(other)
    with refused(None, THROUGH):
        change(other)
    with refused(None, BESIDE):
        change(model)
    assert changes(before, model) == []
    assert changes(before_other, other) == []


@every_change
def test_dropping_the_view_lifts_the_refusal(change):
    model = two()
    other = peftlib.view(model, "a")
    del other
    if change is peftlib.unmerge:
        peftlib.merge(model)
    change(model)


@every_change
def test_a_view_outlives_its_model_as_a_view(change):
    model = two()
    other = peftlib.view(model, "a")
    expected = other(tokens())
    del model
    gc.collect()
    assert same_bits(other(tokens()), expected)


@every_change
def test_a_view_of_a_view_counts_too(change):
    model = two()
    first = peftlib.view(model, "a")
    second = peftlib.view(first, "b")
    with refused(None, THROUGH):
        change(second)
    del first
    gc.collect()
    with refused(None, BESIDE):
        change(model)
    with refused(None, THROUGH):
        change(second)


@every_change
def test_a_view_is_seen_from_a_part_of_the_model(change):
    model = two()
    other = peftlib.view(model, "a")
    with refused(None, BESIDE):
        change(model.layers)
    with refused(None, THROUGH):
        change(other.layers)


def test_loading_is_refused_through_and_beside_a_view(tmp_path):
    model = two()
    peftlib.save(model, tmp_path / "a.safetensors", "a")
    other = peftlib.view(model, "a")
    for face, message in ((other, THROUGH), (model, BESIDE)):
        with refused(None, message):
            peftlib.load(face, tmp_path / "a.safetensors", name="c")
    peftlib.save(other, tmp_path / "b.safetensors", "b")
    del other
    del face
    peftlib.load(model, tmp_path / "b.safetensors", name="c")


def test_reading_is_allowed_through_and_beside_a_view():
    model = two()
    other = peftlib.view(model, "a")
    assert {row.state for row in peftlib.summary(other).rows if row.name == "b"} == {"off"}
    expected = {key: bits(t) for key, t in peftlib.merged_state_dict(model, "a")}
    assert {key: bits(t) for key, t in peftlib.merged_state_dict(other)} == expected
    peftlib.plan(other, "head", LoRA)
    peftlib.train_only(other, "a")
    assert training(model) == {"a"}


def test_a_model_with_buffers_on_hooks_and_cycles_can_be_viewed():
    model: Any = linears()
    model[0].friend = [model]  # a cycle that is not a child
    peftlib.inject(model, "0", LoRA)
    model.register_forward_hook(lambda module, args, output: output + 1)
    other = peftlib.view(model, "default")
    x = torch.ones(1, 4)
    assert other[0].friend[0] is other
    assert same_bits(other(x), model(x))


# ---- copies of one weight, and merged models


def two_copies(first: Any = None, second: Any = None) -> Any:
    model = network()
    peftlib.inject(model, "head", Full, name="a", **(first or {}))
    peftlib.activate(model)
    peftlib.inject(model, "head", Full, name="b", **(second or {}))
    peftlib.activate(model, "a")
    return model


CHOICES: dict[str, Any] = {
    "activate": lambda model: peftlib.activate(model, "a", "b"),
    "view": lambda model: peftlib.view(model, "a", "b"),
    "merge": lambda model: peftlib.merge(model, "b", "a"),
    "merged_state_dict": lambda model: list(peftlib.merged_state_dict(model, "a", "b")),
    "inject": lambda model: peftlib.inject(model, "head", Full, name="c"),
}


@pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES)
def test_two_copies_of_one_weight_are_refused_together(choose):
    model = two_copies()
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r'"a".*head\.weight') as refusal:
        choose(model)
    assert '"b"' in str(refusal.value) or '"c"' in str(refusal.value)
    assert changes(before, model) == []


def test_copies_of_other_weights_or_other_rows_act_together():
    bias_and_weight = two_copies({"params": "bias"}, {"params": "weight"})
    peftlib.activate(bias_and_weight, "a", "b")
    rows = two_copies({"params": "weight", "rows": [0]}, {"params": "weight", "rows": [1, 2]})
    peftlib.activate(rows, "a", "b")
    both = two_copies({"params": "weight", "rows": [0, 1]}, {"params": "weight", "rows": [1, 2]})
    with pytest.raises(AdapterError, match=r"head\.weight"):
        peftlib.activate(both, "a", "b")


def test_a_copy_inside_a_block_that_is_copied_whole_is_one_too():
    model = network()
    peftlib.inject(model, "layers.0", Full, name="block")
    with pytest.raises(AdapterError, match=r'"block" and "inner".*layers\.0\.q_proj\.weight'):
        peftlib.inject(model, "layers.0.q_proj", Full, name="inner")


@pytest.mark.parametrize("names", [(), ("other",)])
def test_a_merged_model_is_unmerged_for_the_block_and_merged_again_to_the_bit(names):
    model, base = network(), network()
    peftlib.inject(model, nn.Linear, LoRA, rank=2)
    peftlib.inject(model, "head", Full, name="other")
    moved(model)
    with peftlib.activate(model, *names):
        expected = model(tokens())
    peftlib.merge(model, "default")
    merged_bits, merged_output = base_bits(model), model(tokens())
    with peftlib.activate(model, *names):
        assert same_bits(model(tokens()), expected)
        assert base_bits(model) == base_bits(base)
    assert base_bits(model) == merged_bits
    assert same_bits(model(tokens()), merged_output)
    peftlib.unmerge(model)
    assert base_bits(model) == base_bits(base)
    assert {row.name for row in peftlib.summary(model).rows if row.state == "active"} == {"default", "other"}

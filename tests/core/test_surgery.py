"""What inject does to a module, and that eject undoes all of it, whatever else stands there."""

import copy
import functools
import gc
import inspect
import math
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm

import peftlib
from peftlib import Full, LoRA
from support.helpers import (
    Gain,
    Offset,
    bits,
    chain,
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

X = torch.arange(8.0).view(2, 4) / 8

# ---- a forward of somebody else's


def hooked(module: Any) -> Any:
    """As accelerate's `add_hook_to_module` does: the old forward kept, a wrapper in `__dict__`."""
    module._old_forward = module.forward
    module.forward = functools.update_wrapper(
        functools.partial(lambda module, x: module._old_forward(x * 2) + 1, module), module._old_forward
    )
    return module


def wrapped(module: Any) -> Any:
    """A wrapper of which nobody can say what it calls."""
    inner = module.forward
    module.forward = lambda x: inner(x * 2) + 1
    return module


@pytest.mark.parametrize(("change", "seen"), [(hooked, 2), (wrapped, 1)])
def test_a_forward_in_dict_stays_and_adapters_stand_inside_accelerate_s_hook(change, seen):
    """They see what the hook gives to the host, on the device of the host; a wrapper that says nothing is called."""
    model = linears()
    change(model[0])
    before, expected = snapshot(model), model(X)
    peftlib.inject(model, nn.Linear, LoRA)
    assert same_bits(model(X), expected)
    moved(model)
    lora: Any = next(peftlib.adapters(model))[2]
    h = 2 * X @ model[0].weight.T + model[0].bias + 1 + seen * X @ lora.lora_A.T @ lora.lora_B.T
    torch.testing.assert_close(model[:1](X), h)
    peftlib.eject(model)
    assert [key for key in changes(before, model) if key != "0: keys" and key != "0.forward"] == []
    assert model[0].__dict__["forward"] is before["0.forward"].item
    assert same_bits(model(X), expected)


def test_a_forward_in_dict_comes_back_to_its_place():
    model = linears()
    hooked(model[0])
    before = snapshot(model)
    peftlib.inject(model, nn.Linear, LoRA)
    peftlib.eject(model)
    assert changes(before, model) == []


def test_a_forward_that_came_after_inject_still_runs_the_adapters():
    model = linears()
    peftlib.inject(model, nn.Linear, LoRA)
    moved(model)
    live = model[:1](X * 2) + 1
    hooked(model[0])
    torch.testing.assert_close(model[:1](X), live)


def test_accelerate_s_hook_that_came_after_inject_stays_at_eject():
    model = linears()
    expected = model[:1](X * 2) + 1
    peftlib.inject(model, nn.Linear, LoRA)
    hooked(model[0])
    peftlib.eject(model)
    assert same_bits(model[:1](X), expected)
    assert model[0]._old_forward.__func__ is nn.Linear.forward


def test_a_wrapper_that_came_after_inject_is_refused_at_eject():
    model = linears()
    peftlib.inject(model, nn.Linear, LoRA)
    wrapped(model[0])
    before = snapshot(model)
    with refused(None, "0", "forward"):
        peftlib.eject(model)
    assert changes(before, model) == []


@pytest.mark.parametrize("order", ["hook, inject, unhook", "inject, hook, unhook"])
def test_accelerate_s_hook_may_be_taken_away_while_adapters_are_in(order):
    model = linears()
    expected = model(X)
    for act in order.split(", ")[:-1]:
        hooked(model[0]) if act == "hook" else peftlib.inject(model, nn.Linear, LoRA)
    model[0].forward = model[0].__dict__.pop("_old_forward")  # as accelerate's remove_hook_from_module
    assert same_bits(model(X), expected)
    moved(model)
    lora: Any = next(peftlib.adapters(model))[2]
    torch.testing.assert_close(model[:1](X), X @ model[0].weight.T + model[0].bias + X @ lora.lora_A.T @ lora.lora_B.T)
    peftlib.eject(model)
    assert same_bits(model(X), expected)
    assert type(model[0]) is nn.Linear


# ---- somebody else's class


def test_a_class_on_top_can_be_taken_away_and_then_eject_works():
    model = linears()
    before = snapshot(model)
    peftlib.inject(model, nn.Linear, LoRA)
    parametrize.register_parametrization(model[1], "weight", nn.Tanh())
    with refused(None, "1", "ParametrizedLinear", "Linear"):
        peftlib.eject(model)
    parametrize.remove_parametrizations(model[1], "weight", leave_parametrized=False)
    peftlib.eject(model)
    assert [key for key in changes(before, model) if not key.endswith(("_parameters", "keys"))] == []


def test_an_adapter_under_a_foreign_class_can_be_ejected_while_others_stay():
    model = linears()
    peftlib.inject(model, nn.Linear, LoRA, name="a")
    peftlib.inject(model, nn.Linear, LoRA, name="b")
    model[1].__class__ = type("Foreign", (type(model[1]),), {})
    peftlib.eject(model, "a")
    assert {name for _, name, _ in peftlib.adapters(model)} == {"b"}


def test_a_parametrized_host_is_adapted_and_ejected():
    model = chain(weight_norm(nn.Linear(4, 4)))
    before, expected = snapshot(model), model(X)
    peftlib.inject(model, nn.Linear, LoRA, rank=2)
    assert same_bits(model(X), expected)
    moved(model)
    lora: Any = next(peftlib.adapters(model))[2]
    torch.testing.assert_close(model(X), expected + 4 * X @ lora.lora_A.T @ lora.lora_B.T)
    peftlib.eject(model)
    assert changes(before, model) == []


@pytest.mark.parametrize("training", [True, False])
def test_what_inject_puts_in_is_in_the_mode_of_its_host(training):
    model = linears().train(training)
    peftlib.inject(model, nn.Linear, LoRA)
    assert {module.training for module in model.modules()} == {training}


def test_adapted_classes_are_one_for_each_class_and_look_like_it():
    model = linears()
    peftlib.inject(model, nn.Linear, LoRA)
    assert type(model[0]) is type(model[1])
    assert isinstance(model[0], nn.Linear)
    assert type(model[0]) is not nn.Linear
    assert type(model[0]).__doc__ == nn.Linear.__doc__


def test_a_subclass_that_calls_super_is_adapted_around_its_own_forward():
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    model = chain(Doubled(4, 4))
    expected = model(X)
    peftlib.inject(model, "0", LoRA)
    assert same_bits(model(X), expected)
    moved(model)
    live = model(X)
    with peftlib.merged(model):
        torch.testing.assert_close(model(X), live)


# ---- eject leaves nothing


INJECTIONS = {
    "LoRA": (network, nn.Linear, LoRA),
    "LoRA on everything with a matrix": (network, [nn.Linear, nn.Embedding], LoRA),
    "Full on layers": (network, "layers.?", Full),
    "Full on the root": (network, lambda name, module: name == "", Full),
    "a root that is a Linear": (lambda: nn.Linear(4, 4), nn.Linear, LoRA),
    "an LSTM": (lambda: nn.LSTM(4, 4, 2), nn.LSTM, LoRA),
    "attention and its out_proj": (lambda: nn.MultiheadAttention(8, 2), ["out_proj", nn.MultiheadAttention], LoRA),
    "fast paths": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 2),
        "linear1",
        LoRA,
    ),
    "a kind of one's own": (linears, "1", Gain),
    "a call of one's own": (linears, "0", Offset),
}


@pytest.mark.parametrize(("make", "targets", "kind"), INJECTIONS.values(), ids=INJECTIONS)
def test_eject_leaves_everything_as_it_was(make, targets, kind):
    model = make()
    first = next(model.parameters())
    first.requires_grad_(False)
    model.register_forward_hook(lambda *_: None)
    before = snapshot(model)
    peftlib.inject(model, targets, kind, name="a")
    peftlib.activate(model)
    peftlib.inject(model, targets, kind, name="b")
    assert changes(before, model) != []
    moved(model)
    peftlib.eject(model, "a")
    peftlib.eject(model)
    assert changes(before, model) == []


def test_no_key_of_the_base_changes():
    model = network()
    keys = list(model.state_dict())
    peftlib.inject(model, [nn.Linear, nn.LayerNorm], Full)
    assert [key for key in model.state_dict() if ".adapters." not in key] == keys
    assert [name for name, _ in model.named_parameters() if ".adapters." not in name] == keys


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_names_are_ejected_in_any_order(order):
    model = network()
    before = snapshot(model)
    peftlib.inject(model, nn.Linear, LoRA, name="a")
    peftlib.inject(model, "layers.0", Full, name="b")
    for name in order:
        peftlib.eject(model, name)
    assert changes(before, model) == []


def test_a_name_can_be_used_again_after_its_eject():
    model = linears()
    for _ in range(3):
        peftlib.inject(model, nn.Linear, LoRA, rank=2)
        peftlib.inject(model, nn.Linear, Full)
        assert len(list(peftlib.adapters(model))) == 4
        peftlib.eject(model)


# ---- freezing


def flags(model: Any) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters() if ".adapters." not in f".{name}"}


def test_freeze_remembers_over_several_injects():
    model = network()
    model.embedding.weight.requires_grad_(False)
    before = flags(model)
    peftlib.inject(model, "q_proj", LoRA, name="a", freeze=False)
    assert flags(model) == before
    peftlib.inject(model, "q_proj", LoRA, name="b")
    assert not any(flags(model).values())
    model.head.bias.requires_grad_(True)  # a user's own wish in between
    peftlib.inject(model, "v_proj", LoRA, name="c")
    assert not any(flags(model).values())
    assert all(p.requires_grad for p in peftlib.parameters(model)), "it never freezes another adapter"
    for name in ("b", "c"):
        peftlib.eject(model, name)
        assert not any(flags(model).values()), "the last one unfreezes"
    peftlib.eject(model, "a")
    assert flags(model) == before


def test_freeze_keeps_what_train_only_chose():
    model = network()
    peftlib.inject(model, "q_proj", LoRA, name="a")
    peftlib.train_only(model)
    peftlib.inject(model, "v_proj", LoRA, name="b")
    assert not any(p.requires_grad for p in peftlib.parameters(model, "a"))
    assert all(p.requires_grad for p in peftlib.parameters(model, "b"))


def test_a_tied_weight_is_frozen_and_unfrozen_once():
    model = modules({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    before = snapshot(model)
    peftlib.inject(model, "c", LoRA)
    assert not any(flags(model).values())
    peftlib.eject(model)
    assert changes(before, model) == []


def pruned(module: Any) -> None:
    prune.l1_unstructured(module, "weight", amount=1)


def replaced(module: Any) -> None:
    module.weight = nn.Parameter(torch.ones(4, 4))


def dropped(module: Any) -> None:
    module.bias = None


@pytest.mark.parametrize("change", [pruned, replaced, dropped])
@pytest.mark.parametrize("at", [0, 1], ids=["at a host", "beside it"])
def test_eject_unfreezes_what_is_left_after_others_changed_parameters(change, at):
    model = linears()
    peftlib.inject(model, "0", LoRA)
    change(model[at])
    peftlib.eject(model)
    assert not any("adapters" in name for name, _ in model.named_modules())
    plain = linears()
    change(plain[at])
    assert [vars(module).keys() for module in model.modules()] == [vars(module).keys() for module in plain.modules()]
    assert model[1 - at].weight.requires_grad


# ---- parts of a model


def parted() -> Any:
    model = network()
    peftlib.inject(model.layers[0], "q_proj", LoRA)
    peftlib.inject(model.layers[1], "v_proj", LoRA, name="other")
    peftlib.inject(model.layers[1], "q_proj", LoRA)
    return moved(model)


def test_parts_share_one_selection_once_the_whole_is_injected():
    model = parted()
    peftlib.inject(model, "head", LoRA, name="third")
    assert {row.state for row in peftlib.summary(model).rows} == {"active"}
    peftlib.activate(model, "other")
    assert {(row.name, row.state) for row in peftlib.summary(model).rows} == {
        ("default", "off"),
        ("other", "active"),
        ("third", "off"),
    }
    peftlib.activate(model)
    assert same_bits(model(tokens()), network()(tokens()))
    peftlib.eject(model, "default")
    peftlib.eject(model)
    assert flags(model) == flags(network())


def test_parts_share_one_selection_before_the_whole_is_injected():
    """Whoever adapts the encoder and the decoder each by itself, and then chooses for the whole, means the whole."""
    model = parted()
    peftlib.activate(model)
    assert same_bits(model(tokens()), network()(tokens()))
    peftlib.activate(model, "other")
    expected = model(tokens())
    assert {(row.name, row.state) for row in peftlib.summary(model).rows} == {("default", "off"), ("other", "active")}
    assert not torch.equal(expected, network()(tokens()))


def test_parts_merge_once_before_the_whole_is_injected():
    model = parted()
    live = model(tokens())
    before = {name: bits(p) for name, p in model.named_parameters()}
    with peftlib.merged(model, "default", "other"):
        torch.testing.assert_close(model(tokens()), live)
    assert {name: bits(p) for name, p in model.named_parameters()} == before
    assert same_bits(model(tokens()), live)


def test_a_name_in_the_second_part_is_found():
    model = network()
    peftlib.inject(model.layers[0], "q_proj", LoRA, name="a")
    peftlib.inject(model.layers[1], "q_proj", LoRA, name="b")
    peftlib.eject(model, "b")
    assert [name for _, name, _ in peftlib.adapters(model)] == ["a"]


def test_two_adapted_models_in_one_share_one_selection():
    first, second = linears(1), linears(1)
    for part in (first, second):
        peftlib.inject(part, "0", LoRA)
        moved(part)
    whole = chain(first, second)
    live = whole(X)
    with peftlib.merged(whole):
        torch.testing.assert_close(whole(X), live)
    peftlib.activate(whole)
    assert {row.state for row in peftlib.summary(whole).rows} == {"off"}


def test_a_copied_layer_follows_the_model_it_is_put_into():
    model = chain(nn.Linear(4, 4))
    peftlib.inject(model, "0", LoRA)
    model.append(copy.deepcopy(model[0]))
    moved(model)
    peftlib.activate(model)
    torch.testing.assert_close(
        model(X), X @ model[0].weight.T @ model[1].weight.T + model[0].bias @ model[1].weight.T + model[1].bias
    )


def test_eject_of_a_part_leaves_the_rest_frozen_and_live():
    model = network()
    peftlib.inject(model, "q_proj", LoRA)
    peftlib.eject(model.layers[0])
    assert [host for host, _, _ in peftlib.adapters(model)] == ["layers.1.q_proj"]
    assert peftlib.summary(model).rows[0].state == "active"
    peftlib.eject(model)
    assert flags(model) == flags(network())


# ---- one host, several names


def test_a_host_under_several_names_is_adapted_once():
    shared = nn.Linear(4, 4)
    model = modules({"a": shared, "b": chain(nn.ReLU(), shared), "c": nn.Linear(4, 4)})
    before = snapshot(model)
    assert peftlib.inject(model, nn.Linear, LoRA) == ["a", "c"]
    assert len(list(peftlib.adapters(model))) == 2
    assert peftlib.summary(model).adapter_parameters == 2 * 2 * 8 * 4
    with peftlib.merged(moved(model)):
        assert model["a"].weight is model["b"][1].weight
    peftlib.eject(model)
    assert changes(before, model) == []


@pytest.mark.parametrize("name", ["a", "b.1", "1"])
def test_a_host_under_several_names_is_found_under_each(name):
    shared = nn.Linear(4, 4)
    model = modules({"a": shared, "b": chain(nn.ReLU(), shared)})
    assert peftlib.inject(model, name, LoRA) == ["a"]


def test_one_fold_serves_a_host_with_two_names(tmp_path):
    shared = nn.Linear(4, 4)
    model, other = (
        chain(shared, nn.ReLU(), shared),
        chain(shared2 := nn.Linear(4, 4), nn.ReLU(), shared2),
    )
    other.load_state_dict(model.state_dict())
    peftlib.inject(model, nn.Linear, LoRA)
    moved(model)
    peftlib.save(model, tmp_path / "a.safetensors")
    assert peftlib.load(other, tmp_path / "a.safetensors") == ["0"]
    assert same_bits(other(X), model(X))


# ---- a host's children are not its adapters


CONTAINERS = {
    "Sequential": lambda: chain(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
    "a user's own loop": lambda: Looping(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
}


class Looping(nn.Module):
    """Runs its children in order, as many do."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        for index, layer in enumerate(layers):
            self.add_module(f"layer{index}", layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
@pytest.mark.parametrize("root", [True, False], ids=["the root", "inside"])
def test_a_host_that_runs_over_its_children_runs_on(make, root):
    model = make() if root else chain(make())
    expected = model(X)
    peftlib.inject(model, lambda name, module: name == ("" if root else "0"), Full)
    assert same_bits(model(X), expected)
    moved(model)
    live = model(X)
    assert not torch.equal(live, expected)
    with peftlib.merged(model):
        torch.testing.assert_close(model(X), live)
    peftlib.eject(model)
    assert same_bits(model(X), expected)


# ---- how LoRA begins


def begun(init: str, make: Any = lambda: nn.Linear(64, 48), **config: Any) -> tuple[Any, Any]:
    model = chain(make())
    peftlib.inject(model, "0", LoRA, init=init, **config)
    return model, next(peftlib.adapters(model))[2]


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_one_factor_is_drawn_and_the_other_is_zero(init):
    _, adapter = begun(init)
    assert not adapter.lora_B.any()
    assert adapter.lora_A.ne(0).all()
    _, lookup = begun(init, lambda: nn.Embedding(50, 16))
    assert not lookup.lora_A.any()
    assert lookup.lora_B.ne(0).all()


def test_kaiming_is_uniform_within_one_over_root_of_fan_in():
    _, adapter = begun("kaiming", rank=32)
    _, lookup = begun("kaiming", lambda: nn.Embedding(50, 64), rank=32)
    bound = 1 / math.sqrt(64)
    for drawn in (adapter.lora_A, lookup.lora_B):
        assert drawn.abs().max() <= bound
        # The standard deviation of 2,048 draws strays from bound / √3 by 1 % (√(0.2 / 2048)): five times is allowed.
        assert drawn.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_gaussian_has_standard_deviation_one_over_rank():
    _, adapter = begun("gaussian", rank=32)
    # 2,048 draws stray by 1 / √(2 · 2048) = 1.6 %: five times that is allowed.
    assert adapter.lora_A.std().item() == pytest.approx(1 / 32, rel=0.08)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(64, 48),
        lambda: nn.Conv2d(4, 8, 3),
        lambda: nn.Embedding(50, 16),
        lambda: nn.ConvTranspose1d(12, 6, 3),
    ],
    ids=["Linear", "Conv2d", "Embedding", "ConvTranspose1d"],
)
def test_orthogonal_has_orthonormal_rows(make):
    _, adapter = begun("orthogonal", make, rank=8)
    drawn = adapter.lora_B.T if adapter.form.looks_up else adapter.lora_A.flatten(1)
    torch.testing.assert_close(drawn @ drawn.T, torch.eye(8), rtol=0, atol=1e-5)


def test_pissa_begins_from_the_principal_part_and_changes_nothing():
    model = chain(nn.Linear(12, 10))
    x = torch.randn(5, 12)
    expected = model(x)
    peftlib.inject(model, "0", LoRA, init="pissa", rank=3, alpha=6)
    adapter: Any = next(peftlib.adapters(model))[2]
    U, S, Vh = torch.linalg.svd(model[0].weight.detach().double())
    principal = U[:, :3] * S[:3] @ Vh[:3]
    torch.testing.assert_close(2 * adapter.lora_B.double() @ adapter.lora_A.double(), principal, rtol=1e-5, atol=1e-6)
    assert same_bits(model(x), expected)
    before = bits(model[0].weight)
    with peftlib.merged(model):
        assert bits(model[0].weight) == before
    assert {name for name, _ in adapter.named_parameters()} == {"lora_A", "lora_B"}
    moved(model)
    live = model(x)
    delta = (
        2 * adapter.lora_B.double() @ adapter.lora_A.double()
        - 2 * adapter.initial_B.double() @ adapter.initial_A.double()
    )
    torch.testing.assert_close(live.double(), expected.double() + x.double() @ delta.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rank_stabilized", "scale"), [(False, 6 / 4), (True, 6 / 2)])
def test_the_scale_is_alpha_over_rank_or_its_root(rank_stabilized, scale):
    model, adapter = begun("kaiming", rank=4, alpha=6, rank_stabilized=rank_stabilized)
    moved(model)
    x = torch.randn(3, 64)
    expected = x @ (model[0].weight + scale * adapter.lora_B @ adapter.lora_A).T + model[0].bias
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_dropout_acts_in_training_only_and_as_on_the_input():
    model, _ = begun("kaiming", dropout=0.5, rank=4)
    moved(model)
    x = torch.ones(2000, 64)
    model.eval()
    kept = model(x)
    assert same_bits(model(x), kept)
    model.train()
    dropped = model(x)
    assert not torch.equal(dropped, kept)
    # An element is kept with probability 1/2 and doubled, so the mean over many rows is the output without dropout.
    spread = (dropped - kept).std(0) / math.sqrt(2000)
    assert ((dropped - kept).mean(0).abs() <= 5 * spread + 1e-6).all()


def test_an_ejected_name_is_unknown_and_acts_no_more():
    model = linears()
    for name in ("a", "b"):
        peftlib.inject(model, nn.Linear, LoRA, name=name)
    moved(model)
    peftlib.eject(model, "a")
    with refused(model, "'a'"):
        peftlib.activate(model, "a")
    with peftlib.merged(model):
        assert {row.name: row.state for row in peftlib.summary(model).rows} == {"b": "merged"}


def test_where_the_active_name_was_ejected_none_is_active():
    model = linears()
    for name in ("a", "b"):
        peftlib.inject(model, nn.Linear, LoRA, name=name)
    peftlib.activate(model, "a")
    peftlib.eject(model, "a")
    with refused(None, "merge", "active", "'b'"):
        peftlib.merge(model)


def test_an_adapted_forward_has_the_signature_of_the_host_s():
    """Trainers read from it which columns of a batch a model takes."""
    model = modules({"attention": nn.MultiheadAttention(4, 2), "linear": nn.Linear(4, 4)})
    before = {name: inspect.signature(module.forward) for name, module in model.items()}
    peftlib.inject(model, ["attention", "linear"], LoRA)
    assert {name: inspect.signature(module.forward) for name, module in model.items()} == before


def test_keywords_reach_a_host_whose_adapters_are_off():
    model = linears(1)
    expected = model(X)
    peftlib.inject(model, "0", LoRA)
    with peftlib.activate(moved(model)):
        assert same_bits(model[0](input=X), expected)


@pytest.mark.parametrize(
    ("at", "make"), [("the root", lambda: nn.Linear(4, 4)), ("1", linears)], ids=["root", "inside"]
)
def test_a_merged_host_that_is_given_other_weights_is_named(at, make):
    model = make()
    state = copy.deepcopy(model.state_dict())
    peftlib.inject(model, "1" if at == "1" else nn.Linear, LoRA)
    peftlib.merge(model)
    with refused(None, "load_state_dict", "default", at):
        model.load_state_dict(state)


def test_the_fast_path_of_an_encoder_layer_is_off_while_adapters_act_and_only_then():
    """torch takes it in eval, with the weights of the children and not their calls, unless this attribute is 0."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    own = layer.activation_relu_or_gelu
    assert own
    peftlib.inject(layer, "linear1", LoRA)
    assert layer.activation_relu_or_gelu == 0
    with peftlib.activate(layer):
        assert layer.activation_relu_or_gelu == own
        layer.activation_relu_or_gelu = 2
    assert layer.activation_relu_or_gelu == 0
    peftlib.eject(layer)
    assert layer.activation_relu_or_gelu == 2


def test_parts_of_which_one_is_merged_cannot_be_one_model():
    merged, live = linears(), linears()
    for part in (merged, live):
        peftlib.inject(part, "0", LoRA)
    peftlib.merge(moved(merged))
    model = chain(live, merged)
    with refused(None, "merged", "unmerge"):
        peftlib.activate(model, "default")


class Tupled(nn.Linear):
    """Says its state as a tuple, as a class with slots does."""

    def __getstate__(self) -> Any:
        return (self.__dict__, {})

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state[0])


def test_a_state_that_is_no_dict_is_copied_as_it_is():
    model = chain(Tupled(4, 4))
    peftlib.inject(model, "0", LoRA)
    moved(model)
    other = copy.deepcopy(model)
    assert same_bits(other(X), model(X))
    assert type(other[0]) is type(model[0])
    assert other[0].weight is not model[0].weight


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((0,), "0 B"),
        ((124,), "992 B"),
        ((125,), "1.0 kB"),
        ((516_250,), "4.1 MB"),
        ((312_500, 1000), "2.5 GB"),
        ((875_000, 1_000_000), "7000.0 GB"),
    ],
)
def test_bytes_are_said_for_people(shape, said):
    """Adam keeps two numbers of four bytes for each parameter."""
    model = chain(nn.Module())
    model[0].weight = nn.Parameter(torch.empty(shape, device="meta"))
    model[0].forward = lambda x: x
    assert f" {said} of Adam state" in str(peftlib.plan(model, "0", Full))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_pissa_remembers_its_start_in_the_dtype_of_its_factors(dtype):
    model = linears(1)
    peftlib.inject(model, "0", LoRA, init="pissa", rank=2, dtype=dtype)
    ((_, _, adapter),) = peftlib.adapters(model)
    assert {tensor.dtype for tensor in adapter.state_dict().values()} == {getattr(torch, dtype)}
    assert same_bits(adapter.initial_A, adapter.lora_A)
    assert same_bits(adapter.initial_B, adapter.lora_B)


def test_pissa_may_take_every_singular_vector():
    model = chain(nn.Linear(4, 3))
    expected = model(X)
    peftlib.inject(model, "0", LoRA, init="pissa", rank=3)
    assert torch.equal(model(X), expected)


def test_drawing_again_needs_no_host_but_for_pissa():
    _, adapter = begun("kaiming")
    before = bits(adapter.lora_A)
    adapter.reset_parameters()
    assert bits(adapter.lora_A) != before
    model, adapter = begun("pissa", rank=2)
    before = bits(adapter.lora_A)
    moved(model)
    adapter.reset_parameters(model[0])
    assert bits(adapter.lora_A) == before


def test_a_model_on_the_meta_device_draws_once_it_is_real():
    with torch.device("meta"):
        model = chain(nn.Linear(4, 4))
    peftlib.inject(model, "0", LoRA, rank=2)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    base = nn.functional.linear(X, model[0].weight, model[0].bias)
    assert same_bits(model(X), base)


# ---- kinds of one's own


class Everywhere(peftlib.Adapter):
    """A weight form alone, over all that a host computes from."""

    def __init__(self, host: Any) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def fold(self, host: Any) -> dict[str, Tensor]:
        return {name: p * self.factor for name, p in host.named_parameters() if ".adapters." not in f".{name}"}


OWN = {
    "Linear": (lambda: nn.Linear(4, 4), X),
    "Conv1d": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), X.view(1, 2, 4)),
    "Embedding": (lambda: nn.Embedding(5, 4), torch.tensor([1, 3])),
    "LayerNorm": (lambda: nn.LayerNorm(4), X),
    "LSTM": (lambda: nn.LSTM(4, 3, 2, bidirectional=True), X[None]),
    "GRUCell": (lambda: nn.GRUCell(4, 3), X),
    "Bilinear": (lambda: Same2(nn.Bilinear(4, 4, 2)), X),
    "MultiheadAttention": (lambda: Same3(nn.MultiheadAttention(4, 2)), X),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(4, 2, 4, dropout=0.0), X[None]),
    "weight_norm": (lambda: weight_norm(nn.Linear(4, 4)), X),
}


class Same2(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x, x)


class Same3(Same2):
    def forward(self, x: Tensor) -> Any:
        return self.inner(x, x, x)[0]


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else first(output[0])


@pytest.mark.parametrize(("make", "x"), OWN.values(), ids=OWN)
@pytest.mark.parametrize("training", [True, False])
def test_a_kind_with_only_a_weight_form_runs_trains_and_merges_on_any_host(make, x, training):
    model = chain(make()).train(training)
    before, expected = snapshot(model), first(model(x))
    peftlib.inject(model, "0", Everywhere)
    assert same_bits(first(model(x)), expected)
    moved(model)
    adapter: Any = next(peftlib.adapters(model))[2]
    reference = copy.deepcopy(model)
    peftlib.eject(reference)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(adapter.factor)
    live = first(model(x))
    torch.testing.assert_close(live, first(reference(x)))
    live.square().sum().backward()
    assert adapter.factor.grad is not None
    with peftlib.merged(model):
        torch.testing.assert_close(first(model(x)), live)
    peftlib.eject(model)
    assert changes(before, model) == []


def test_a_kind_that_raises_in_its_call_leaves_the_hosts_weights():
    class Raising(Gain):
        def forward(self, host: Any, call: Any, *args: Any, **kwargs: Any) -> Any:
            return super().forward(host, self.fail, *args, **kwargs)

        def fail(self, *args: Any) -> Any:
            raise KeyError

    model = linears()
    peftlib.inject(model, "0", Raising)
    before = snapshot(model)
    with pytest.raises(KeyError):
        model(X)
    assert changes(before, model) == []


def test_a_forward_pass_changes_nothing():
    model = network()
    peftlib.inject(model, nn.Linear, LoRA)
    peftlib.inject(model, nn.LayerNorm, Full)
    before = snapshot(model)
    model(tokens())
    assert changes(before, model) == []


def test_nothing_warns(recwarn):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        model = network()
        peftlib.inject(model, nn.Linear, LoRA)
        model(tokens())
        peftlib.merge(model)
        peftlib.eject(model, merge=True)
    assert list(recwarn) == []


def test_a_class_that_was_made_for_one_module_is_gone_with_it():
    """As torch's parametrizations make one for each module."""
    model = weight_norm(nn.Linear(4, 4))
    made = weakref.ref(type(model))
    peftlib.inject(model, lambda name, module: name == "", LoRA, rank=2)
    peftlib.eject(model)
    del model
    gc.collect()  # our class, which has that one as its base
    gc.collect()
    assert made() is None

"""Weights of a choice: they go wherever the choice goes, and are data where torch.compile looks."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import peftlib
from peftlib import IA3, Bottleneck, DoRA, Full, LoRA, Prefix, Prompt
from support.helpers import changes, linears, moved, network, same_bits, snapshot, tokens
from support.refusals import refused

pytestmark = pytest.mark.mutants


def two(kind: Any = LoRA) -> Any:
    """Adapters a and b of other ranks and scales on the same two layers."""
    torch.manual_seed(0)
    model = linears(2, 6).double()
    peftlib.inject(model, nn.Linear, kind, rank=2, alpha=3, name="a")
    peftlib.inject(model, nn.Linear, kind, rank=3, alpha=1.5, name="b")
    torch.manual_seed(1)
    return moved(model)


def x() -> Tensor:
    return torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)


def by_hand(model: Any, weights: dict[str, float]) -> Tensor:
    """W + Σ w s B A on each layer, dense."""
    y = x()
    for layer in model:
        if not isinstance(layer, nn.Linear):
            y = layer(y)
            continue
        weight = layer.weight.detach().clone()
        for name, part in layer.adapters.items():
            change = part.config["alpha"] / part.config["rank"] * part.lora_B @ part.lora_A
            weight += weights.get(name, 0.0) * change.detach()
        y = nn.functional.linear(y, weight, layer.bias)
    return y


MIXES = [{"a": 0.7, "b": 0.3}, {"a": -1.0}, {"a": 1.0, "b": 2.0}, {"a": 0.0, "b": 0.5}, {"b": 1, "a": 1}]


@pytest.mark.parametrize("weights", MIXES, ids=str)
def test_weights_stand_on_top_of_each_adapter_s_own_scale_live_merged_streamed_and_in_a_view(weights):
    model = two()
    expected = by_hand(model, weights)
    with peftlib.activate(model, weights):
        torch.testing.assert_close(model(x()), expected, rtol=0, atol=1e-12)
        with peftlib.merged(model):
            torch.testing.assert_close(model(x()), expected, rtol=0, atol=1e-12)
    before = snapshot(model)
    with peftlib.merged(model, weights):
        torch.testing.assert_close(model(x()), expected, rtol=0, atol=1e-12)
        assert dict(peftlib.merged_state_dict(model, weights)).keys() == linears(2, 6).state_dict().keys()
    streamed = linears(2, 6).double()
    streamed.load_state_dict(dict(peftlib.merged_state_dict(model, weights)))
    torch.testing.assert_close(streamed(x()), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(peftlib.view(model, weights)(x()), expected, rtol=0, atol=1e-12)
    assert changes(before, model) == []


def test_each_adapter_s_gradient_is_its_weight_times_what_it_is_alone():
    model = two()
    gradients = {}
    for weight in (1.0, 0.25):
        with peftlib.activate(model, {"a": weight}):
            model[0](x()).sum().backward()
        gradients[weight] = [p.grad.clone() for p in model[0].adapters["a"].parameters()]
        model.zero_grad()
    for whole, quarter in zip(gradients[1.0], gradients[0.25], strict=True):
        torch.testing.assert_close(quarter, whole / 4, rtol=1e-14, atol=0)
    assert all(p.grad is None for p in peftlib.parameters(model, "b"))


def test_names_and_mappings_may_stand_together():
    model = two()
    with peftlib.activate(model, "a", {"b": 0.5}):
        torch.testing.assert_close(model(x()), by_hand(model, {"a": 1.0, "b": 0.5}), rtol=0, atol=1e-12)


def test_nothing_of_an_adapter_with_weight_zero_is_read():
    model = two()
    with torch.no_grad():
        model[0].adapters["a"].lora_B.fill_(float("nan"))
    with peftlib.activate(model, {"a": 0.0, "b": 0.5}):
        assert model(x()).isfinite().all()


def test_a_choice_with_weights_is_undone_also_around_a_merge_and_a_route():
    model = two()
    peftlib.activate(model, {"a": 0.7, "b": 0.3})
    before, y = snapshot(model), model(x()).detach()
    with peftlib.activate(model, "a"):
        torch.testing.assert_close(model(x()), by_hand(model, {"a": 1.0}), rtol=0, atol=1e-12)
    with peftlib.route(model, ["a", "b", None]):
        torch.testing.assert_close(model(x())[0], by_hand(model, {"a": 1.0})[0], rtol=0, atol=1e-12)
    expected = by_hand(model, {"b": 0.3})
    with peftlib.merged(model, "b"):  # by its name alone, with the weight that it has
        torch.testing.assert_close(model(x()), expected, rtol=0, atol=1e-12)
    assert changes(before, model) == []
    peftlib.merge(model)
    with peftlib.activate(model, {"b": 2.0}):
        torch.testing.assert_close(model(x()), by_hand(model, {"b": 2.0}), rtol=0, atol=1e-12)
    torch.testing.assert_close(model(x()), y, rtol=0, atol=1e-12)
    assert {row.state for row in peftlib.summary(model).rows} == {"merged"}
    assert {row.weight for row in peftlib.summary(model).rows} == {0.7, 0.3}
    peftlib.unmerge(model)
    assert changes(before, model) == []


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_and_a_pickle_have_the_weights(clone):
    model = two()
    peftlib.activate(model, {"a": 0.7})
    assert same_bits(clone(model)(x()), model(x()))


def test_the_summary_shows_a_weight():
    model = two()
    peftlib.activate(model, {"a": 0.7})
    assert "active ×0.7" in str(peftlib.summary(model))
    assert "a active ×0.7" in repr(peftlib.activate(model, {"a": 0.7}))
    assert {row.name: row.weight for row in peftlib.summary(model).rows} == {"a": 0.7, "b": 1.0}


def test_an_ejected_adapter_leaves_no_weight_behind():
    model = two()
    peftlib.activate(model, {"a": 0.7, "b": 0.3})
    peftlib.eject(model, "a")
    peftlib.inject(model, "0", LoRA, rank=2, name="a")
    assert {row.name: row.weight for row in peftlib.summary(model).rows} == {"a": 1.0, "b": 0.3}


def test_folding_for_good_keeps_the_weights_of_the_others():
    model = two()
    peftlib.activate(model, {"a": 0.7, "b": 0.3})
    expected = by_hand(model, {"a": 0.7, "b": 0.3})
    peftlib.eject(model, "a", merge=True)
    torch.testing.assert_close(model(x()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("value", "named"), [("0.5", "0.5"), (float("nan"), "nan"), (float("inf"), "inf"), (True, "True"), (None, "None")]
)
def test_a_weight_that_is_no_finite_number_is_refused(value, named):
    model = two()
    for act in (peftlib.activate, peftlib.view, peftlib.merge, peftlib.merged_state_dict):
        with refused(model, "a", named):
            act(model, {"a": value})


def test_a_list_of_names_is_refused_with_what_to_pass():
    model = two()
    for act in (peftlib.activate, peftlib.view, peftlib.merge):
        with refused(model, "['a']", "'b'"):
            act(model, ["a"])


def test_an_absent_name_is_refused_also_with_weight_zero():
    model = two()
    with refused(model, "c"):
        peftlib.activate(model, {"a": 0.5, "c": 0.0})


def _prefixed() -> nn.Module:
    model = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    peftlib.inject(model, "self_attn", Prefix, length=2)
    return model


def _prompted() -> nn.Module:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
    peftlib.inject(model, "0", Prompt, length=2)
    return model


@pytest.mark.parametrize(("make", "kind"), [(_prefixed, "Prefix"), (_prompted, "Prompt")])
def test_what_has_no_effect_to_scale_takes_no_weight_but_1_and_0(make, kind):
    model = make()
    with refused(model, "default", kind):
        peftlib.activate(model, {"default": 0.5})
    before = snapshot(model)
    peftlib.activate(model, {"default": 1})
    assert changes(before, model) == []


def test_a_type_with_a_forward_of_its_own_says_itself_that_it_takes_a_weight():
    class ShiftWithAWeight(peftlib.Adapter):
        def __init__(self, host: nn.Module) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(6, dtype=torch.float64))

        def forward(self, host: nn.Module, call: Any, *args: Any, **kwargs: Any) -> Any:
            return call(*args, **kwargs) + self.shift

    model = linears(1, 6).double()
    peftlib.inject(model, "0", ShiftWithAWeight)
    with refused(model, "default", "ShiftWithAWeight"):
        peftlib.activate(model, {"default": 0.5})


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (LoRA, {"rank": 2}),
    "lora-pissa": (LoRA, {"rank": 2, "init": "pissa"}),
    "dora": (DoRA, {"rank": 2}),
    "ia3": (IA3, {}),
    "bottleneck": (Bottleneck, {"width": 2}),
    "full": (Full, {}),
}


class Halved(peftlib.Adapter):
    """A type of someone else's, with a fold alone."""

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((6, 1), 0.5))

    def fold(self, host: Any) -> dict[str, Tensor]:
        return {"weight": host.weight * self.factor}


@pytest.mark.parametrize("kind", [Halved, Full, DoRA, IA3])
def test_between_the_base_s_output_and_its_own_lies_what_a_weight_gives(kind):
    """A linear layer is linear in its weight."""
    torch.manual_seed(0)
    model = linears(1, 6).double()
    base = model(x())
    peftlib.inject(model, "0", kind)
    own = moved(model)(x())
    for weight in (0.25, -2.0, 3.0):
        with peftlib.activate(model, {"default": weight}):
            torch.testing.assert_close(model(x()), base + weight * (own - base), rtol=0, atol=1e-12)
            with peftlib.merged(model):
                torch.testing.assert_close(model(x()), base + weight * (own - base), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_beside_half_precision_the_weight_between_is_rounded_once(dtype):
    torch.manual_seed(0)
    model = linears(1, 6).to(dtype)
    weight = model[0].weight.detach().double()
    peftlib.inject(model, "0", Full)
    own = moved(model)[0].adapters["default"].own.weight.detach().double()
    assert own.float().dtype == torch.float32
    exact = weight + 0.3 * (own - weight)
    found = dict(peftlib.merged_state_dict(model, {"default": 0.3}))["0.weight"]
    unit = torch.finfo(dtype).eps / 2
    assert ((found.double() - exact).abs() <= unit * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("name", KINDS)
def test_compiled_another_weight_is_the_same_graph(name):
    torch.compiler.reset()
    kind, config = KINDS[name]
    model = linears(2, 6).double()
    peftlib.inject(model, nn.Linear, kind, **config)
    moved(model)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with peftlib.activate(model, {"default": 0.5}):
        compiled(x())
    warm = counter.frame_count
    for weight in (0.7, -2.0, 1e-3):
        with peftlib.activate(model, {"default": weight}):
            torch.testing.assert_close(compiled(x()), model(x()), rtol=0, atol=1e-12)
    assert counter.frame_count == warm


def test_compiled_a_switch_back_to_an_earlier_choice_compiles_nothing():
    torch.compiler.reset()
    model = two()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    choices: list[Any] = [("a",), ("b",), ("a", "b"), ({"a": 0.5, "b": 0.5},)]
    for choice in choices:
        with peftlib.activate(model, *choice):
            compiled(x())
    warm = counter.frame_count
    for choice in [*choices, *reversed(choices)]:
        with peftlib.activate(model, *choice):
            torch.testing.assert_close(compiled(x()), model(x()), rtol=0, atol=1e-12)
    assert counter.frame_count == warm


def test_weights_reach_every_kind_of_host():
    model = network()
    peftlib.inject(model, [nn.Linear, nn.Embedding], LoRA, rank=2, alpha=1)
    other = network()
    peftlib.inject(other, [nn.Linear, nn.Embedding], LoRA, rank=2, alpha=0.25)
    moved(model)
    with torch.no_grad():
        for own, found in zip(peftlib.parameters(other), peftlib.parameters(model), strict=True):
            own.copy_(found)
    with peftlib.activate(model, {"default": 0.25}):
        torch.testing.assert_close(model(tokens()), other(tokens()))

"""Merging rounds once, comes back to the bit, refuses what it would spoil, and streams without touching the model."""

import copy
import functools
import gc
import itertools
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlib
from peftlib import Full, LoRA
from support.helpers import (
    Gain,
    Offset,
    base_bits,
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

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def dyadic(*shape: int, step: float, most: int) -> Tensor:
    """Random multiples of a power of two."""
    return torch.randint(-most, most + 1, shape).double() * step


def exact(dtype: torch.dtype, own: str | None = None) -> tuple[Any, Tensor]:
    """A linear whose every sum is exact in float32, and what it merges to before the rounding, in float64.

    W below 2 in steps of 2^-12 where the dtype has them, 4 B A below 16 in steps of 2^-8: 17 bits hold the sum."""
    model = chain(nn.Linear(6, 5, bias=False).to(dtype))
    peftlib.inject(model, "0", LoRA, rank=4, alpha=16, dtype=own)
    ((_, _, adapter),) = peftlib.adapters(model)
    with torch.no_grad():
        model[0].weight.copy_(dyadic(5, 6, step=2**-12, most=2**13))
        adapter.lora_A.copy_(dyadic(4, 6, step=2**-5, most=32))
        adapter.lora_B.copy_(dyadic(5, 4, step=2**-5, most=32))
    base = model[0].weight.detach().double()
    return model, base + 4 * adapter.lora_B.detach().double() @ adapter.lora_A.detach().double()


@every_dtype
@pytest.mark.parametrize("own", [None, "float32", "bfloat16", "float16", "float64"])
def test_the_merged_weight_is_the_reference_rounded_once(dtype, own):
    model, reference = exact(dtype, own)
    peftlib.merge(model)
    assert same_bits(model[0].weight, reference.to(dtype))


def test_rounding_twice_would_be_seen():
    """The reference tells one rounding from two: from the delta rounded first, and from a subtraction that undoes."""
    model, reference = exact(torch.bfloat16)
    base = model[0].weight.detach().double()
    twice = (base.bfloat16() + (reference - base).bfloat16()).double()
    assert not torch.equal(twice, reference.bfloat16().double())
    assert not torch.equal((reference.bfloat16().double() - (reference - base)).bfloat16().double(), base)


@every_dtype
def test_a_merged_weight_is_within_one_rounding_of_the_float64_reference(dtype):
    """Half an ulp of the dtype, and what float32 sums of rank + 1 terms may lose, each relative to the sum of sizes."""
    model = chain(nn.Linear(64, 48)).to(dtype)
    peftlib.inject(model, "0", LoRA, rank=8, alpha=16)
    moved(model)
    ((_, _, adapter),) = peftlib.adapters(model)
    W, A, B = (t.detach().double().clone() for t in (model[0].weight, adapter.lora_A, adapter.lora_B))
    peftlib.merge(model)
    reference, size = W + 2 * B @ A, W.abs() + 2 * B.abs() @ A.abs()
    allowed = torch.finfo(dtype).eps / 2 * reference.abs() + (8 + 3) * torch.finfo(torch.float32).eps * size
    if dtype == torch.float16:
        allowed += 2**-25  # half a step among the subnormal numbers
    assert ((model[0].weight.double() - reference).abs() <= allowed).all()


@every_dtype
def test_full_merges_to_its_own_copy(dtype):
    model = moved_network(dtype, nn.LayerNorm, Full)
    expected = {(host, k): p.to(dtype) for host, _, a in peftlib.adapters(model) for k, p in a.own.named_parameters()}
    peftlib.merge(model)
    assert all(same_bits(model.get_submodule(host).get_parameter(k), value) for (host, k), value in expected.items())


def moved_network(dtype: torch.dtype, targets: Any = nn.Linear, kind: Any = LoRA, **config: Any) -> Any:
    model = network().to(dtype)
    peftlib.inject(model, targets, kind, **config)
    return moved(model)


def several(dtype: torch.dtype = torch.float32) -> Any:
    """Two names, three kinds, on shared and on separate hosts, around and inside one another."""
    model = network().to(dtype)
    peftlib.inject(model, "v_proj", Gain, start=1.5, name="a")
    peftlib.inject(model, "head", Full, name="b")
    peftlib.inject(model, nn.Linear, LoRA, rank=2, name="a")
    peftlib.inject(model, "q_proj", LoRA, rank=3, name="b")
    peftlib.inject(model, "layers.1", Full, name="b")
    return moved(model)


@every_dtype
@pytest.mark.parametrize("names", [("a",), ("b",), ("a", "b"), ("b", "a"), ()], ids=str)
@pytest.mark.parametrize("backup", ["device", "cpu"])
def test_unmerge_restores_every_bit_and_everything_else(dtype, names, backup):
    model = several(dtype)
    before = snapshot(model)
    for _ in range(3):
        peftlib.merge(model, *names, backup=backup)
        assert base_bits(model) != {}
        assert changes(before, model) != []
        peftlib.unmerge(model)
        assert changes(before, model) == []


@pytest.mark.parametrize("special", [0.0, -0.0, 1e-45, float("inf"), float("-inf"), float("nan")])
def test_special_values_in_the_base_come_back(special):
    model = linears()
    with torch.no_grad():
        model[0].weight[0, 0] = special
    peftlib.inject(model, "0", LoRA)
    moved(model)
    before = snapshot(model)
    peftlib.merge(model)
    peftlib.unmerge(model)
    assert changes(before, model) == []


def test_a_base_that_holds_infinity_already_can_be_merged():
    """A masked row, say: what was not finite before is no fault of the adapter."""
    model = linears()
    with torch.no_grad():
        model[0].weight[0, 0] = float("-inf")
    peftlib.inject(model, "0", LoRA)
    peftlib.merge(moved(model))
    assert model[0].weight[0, 0] == float("-inf")


def test_what_was_active_beside_the_merged_stands_aside_and_comes_back():
    model = several()
    peftlib.activate(model, "a", "b")
    x = tokens()
    peftlib.merge(model, "b")
    other = several_alone("b", model)
    torch.testing.assert_close(model(x), other(x))
    assert {row.name: row.state for row in peftlib.summary(model).rows} == {"a": "off", "b": "merged"}
    peftlib.unmerge(model)
    assert {row.state for row in peftlib.summary(model).rows} == {"active"}


def several_alone(name: str, like: Any) -> Any:
    other = copy.deepcopy(like)
    peftlib.unmerge(other)
    peftlib.activate(other, name)
    return other


def test_a_merged_model_runs_no_adapter():
    model = several()
    peftlib.merge(model)
    ran = []
    hooks = [a.register_forward_pre_hook(lambda *_: ran.append(1)) for _, _, a in peftlib.adapters(model)]
    model(tokens())
    assert ran == []
    assert hooks


def test_merged_restores_after_the_block_and_after_an_exception():
    model = several()
    before = snapshot(model)
    with peftlib.merged(model, "a", backup="cpu") as same:
        assert same is model
        assert changes(before, model)
    assert changes(before, model) == []
    with pytest.raises(KeyError), peftlib.merged(model):
        raise KeyError
    assert changes(before, model) == []


def test_a_name_that_cannot_be_merged_is_no_obstacle_to_another():
    model = linears()
    peftlib.inject(model, "0", Offset, name="offset")
    peftlib.inject(model, "1", LoRA, name="lora")
    peftlib.merge(moved(model), "lora")
    assert {row.name: row.state for row in peftlib.summary(model).rows} == {"offset": "off", "lora": "merged"}


def test_merged_hands_its_backup_on():
    with pytest.raises(ValueError, match="backup='disk'"), peftlib.merged(several(), backup="disk"):
        pass


def test_weights_that_train_merge_stream_and_come_back():
    """What autograd refuses outside of no_grad: writing in place into a leaf that requires a gradient."""
    model = linears()
    peftlib.inject(model, "0", LoRA, freeze=False)
    moved(model)
    before = snapshot(model)
    streamed = dict(peftlib.merged_state_dict(model))
    assert not any(tensor.requires_grad for tensor in streamed.values())
    with peftlib.merged(model):
        assert same_bits(model[0].weight, streamed["0.weight"])
        assert model[0].weight.is_leaf
    assert changes(before, model) == []


def test_merging_keeps_the_parameter_objects():
    """Optimizers and ties hold on to them."""
    model = several()
    before = dict(model.named_parameters())
    peftlib.merge(model)
    assert all(p is before[name] for name, p in model.named_parameters())


def kept(model: nn.Module) -> list[Tensor]:
    """The copies beside the model's own tensors, wherever a module has them."""
    own = ("_parameters", "_buffers")
    slots = [slot for module in model.modules() for key, slot in vars(module).items() if key not in own]
    return [item for slot in slots if isinstance(slot, dict) for item in slot.values() if isinstance(item, Tensor)]


def test_backup_on_the_cpu_is_a_copy_and_another_word_is_a_value_error():
    model = several()
    with pytest.raises(ValueError, match=r"backup='disk'.*device.*cpu"):
        peftlib.merge(model, backup="disk")
    peftlib.merge(model, backup="cpu")
    assert kept(model)
    assert not {t.data_ptr() for t in kept(model)} & {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@every_dtype
def test_a_copy_of_a_merged_model_unmerges_by_itself(copied, dtype):
    model = several(dtype)
    before, x = snapshot(model), tokens()
    live = model(x)
    peftlib.merge(model)
    other = copied(model)
    assert same_bits(other(x), model(x))
    peftlib.unmerge(other)
    assert same_bits(other(x), live)
    assert peftlib.summary(model).rows[0].state == "merged", "the original is merged still"
    peftlib.unmerge(model)
    assert changes(before, model) == []
    assert base_bits(other) == base_bits(model)


def test_a_model_merged_in_inference_mode_unmerges_outside_of_it_and_trains_on():
    model = several()
    before = snapshot(model)
    with torch.inference_mode():
        peftlib.merge(model)
        model(tokens())
    peftlib.unmerge(model)
    assert changes(before, model) == []
    model(tokens()).square().sum().backward()
    assert all(p.grad is not None for p in peftlib.parameters(model, "a"))


# ---- for good


def test_eject_with_merge_leaves_a_plain_model_with_the_merged_weights():
    model = several()
    peftlib.activate(model, "a", "b")
    with peftlib.merged(model):
        merged = base_bits(model)
    peftlib.eject(model, merge=True)
    plain = network()
    assert base_bits(model) == merged
    assert list(model.state_dict()) == list(plain.state_dict())
    for module, twin in zip(model.modules(), plain.modules(), strict=True):
        assert type(module) is type(twin)
        assert list(vars(module)) == list(vars(twin))
    assert all(p.requires_grad for p in model.parameters())


def test_eject_of_a_merged_model_makes_the_merge_final():
    model = several()
    peftlib.merge(model, "a", "b")
    merged = base_bits(model)
    peftlib.eject(model, merge=True)
    assert base_bits(model) == merged
    assert kept(model) == []


def test_eject_of_one_name_with_merge_keeps_the_other_live():
    model = network()
    peftlib.inject(model, "q_proj", LoRA, name="a")
    peftlib.inject(model, "v_proj", LoRA, name="b")
    moved(model)
    x, both = tokens(), moved(model)(tokens())
    peftlib.eject(model, "a", merge=True)
    torch.testing.assert_close(model(x), both)
    assert [(row.name, row.state) for row in peftlib.summary(model).rows] == [("b", "active")] * 2
    peftlib.merge(model)
    peftlib.unmerge(model)


# ---- nested


class Pair(nn.Module):
    def __init__(self, a: Any = None, b: Any = None) -> None:
        super().__init__()
        self.a, self.b = a or nn.Linear(4, 4), b or nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def nested() -> tuple[Any, Any]:
    """A chain of two linears, LoRA on both, then Full around the chain; and its dense float64 reference."""
    model = chain(Pair())
    peftlib.inject(model, nn.Linear, LoRA, rank=2, name="inner")
    peftlib.inject(model, "0", Full, name="outer")
    moved(model)

    def reference(x: Tensor, inner: bool, outer: bool) -> Tensor:
        found = {host: adapter for host, _, adapter in peftlib.adapters(model)}
        own = dict(found["0"].own.named_parameters())
        for leaf in "ab":
            host, lora = model.get_submodule(f"0.{leaf}"), found[f"0.{leaf}"]
            W, b = (own[f"{leaf}.weight"], own[f"{leaf}.bias"]) if outer else (host.weight, host.bias)
            delta = lora.lora_B.double() @ lora.lora_A.double() * (8 / 2) if inner else 0
            x = x @ (W.double() + delta).T + b.double()
        return x.detach()

    return model, reference


# Each value is a sum of at most 4 + 2 products and a few roundings of float32 (6e-8), amplified by two layers.
close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("inner", "outer"), [(True, False), (False, True), (True, True)])
def test_full_around_lora_hosts_merges_to_what_runs(inner, outer):
    model, reference = nested()
    names = ["inner"] * inner + ["outer"] * outer
    x = torch.randn(3, 4)
    expected = reference(x.double(), inner, outer)
    before = snapshot(model)
    peftlib.activate(model, *names)
    close(model(x).double(), expected)
    peftlib.merge(model, *names)
    close(model(x).double(), expected)
    peftlib.unmerge(model)
    peftlib.activate(model, "inner", "outer")
    assert changes(before, model) == []
    plain = chain(Pair())
    plain.load_state_dict(dict(peftlib.merged_state_dict(model, *names)))
    close(plain(x).double(), expected)


def test_full_on_a_sequential_runs_and_merges():
    """A Sequential calls its children one after another, and `adapters` is none of those."""
    model = chain(chain(nn.Linear(4, 4), nn.Linear(4, 4)))
    peftlib.inject(model, lambda name, module: name == "0", Full)
    moved(model)
    own = dict(next(adapter for *_, adapter in peftlib.adapters(model)).own.named_parameters())
    x = torch.randn(3, 4)
    h = x.double() @ own["0.weight"].double().T + own["0.bias"].double()
    expected = (h @ own["1.weight"].double().T + own["1.bias"].double()).detach()
    close(model(x).double(), expected)
    with peftlib.merged(model):
        close(model(x).double(), expected)


@pytest.mark.parametrize("kinds", [*itertools.permutations([Gain, LoRA, Full], 2)], ids=str)
def test_two_kinds_on_one_host_merge_to_what_runs(kinds):
    model = chain(nn.Linear(4, 4, bias=False))
    for kind in kinds:
        peftlib.inject(model, "0", kind)
    moved(model)
    x = torch.randn(3, 4)
    live = model(x)
    with peftlib.merged(model):
        close(model(x), live)


def test_kinds_on_one_host_nest_in_the_order_in_which_they_came():
    for kinds in ((Gain, LoRA), (LoRA, Gain)):
        model = chain(nn.Linear(4, 4, bias=False))
        for kind in kinds:
            peftlib.inject(model, "0", kind)
        moved(model)
        W = model[0].weight.detach().double()
        for _, _, adapter in peftlib.adapters(model):
            if isinstance(adapter, LoRA):
                W = W + adapter.lora_B.detach().double() @ adapter.lora_A.detach().double()
            else:
                W = W * adapter.gain.detach().double()
        x = torch.randn(3, 4)
        close(model(x).double(), x.double() @ W.T, msg=lambda text, kinds=kinds: f"live, {kinds}: {text}")
        peftlib.merge(model)
        close(model[0].weight.double(), W)


# ---- ties inside one fold


def test_a_tie_inside_one_full_host_merges():
    model = chain(Pair())
    model[0].b.weight = model[0].a.weight
    peftlib.inject(model, "0", Full)
    moved(model)
    before, x = snapshot(model), torch.randn(2, 4)
    live = model(x)
    with peftlib.merged(model):
        close(model(x), live)
        assert model[0].a.weight is model[0].b.weight
    assert changes(before, model) == []


def test_a_tie_that_the_adapter_does_not_touch_is_no_obstacle():
    model = modules({"embedding": nn.Embedding(4, 4), "head": nn.Linear(4, 4)})
    model["head"].weight = model["embedding"].weight
    peftlib.inject(model, "head", Full, params="bias")
    peftlib.merge(moved(model))


def test_overlapping_memory_is_a_tie_too():
    """A weight that is a slice of another: merging into one would change the other."""
    model = chain(nn.Linear(4, 8, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.detach()[2:6])
    peftlib.inject(model, "1", LoRA)
    with refused(None, "1.weight", '"default"', "0.weight"):
        peftlib.merge(moved(model))


# ---- streaming


@every_dtype
@pytest.mark.parametrize("names", [(), ("a",), ("b",)], ids=str)
def test_a_stream_is_the_merged_models_state_dict_and_touches_nothing(dtype, names):
    model = several(dtype)
    before = snapshot(model)
    streamed = list(peftlib.merged_state_dict(model, *names))
    assert changes(before, model) == []
    plain = network().to(dtype)
    assert [key for key, _ in streamed] == list(plain.state_dict())
    with peftlib.merged(model, *names):
        expected = base_bits(model)
    assert {key: bits(tensor) for key, tensor in streamed} == expected
    assert not any(tensor.requires_grad for _, tensor in streamed)


def test_a_stream_loads_strictly_into_a_plain_base_and_computes_the_same():
    model = several(torch.float64)
    plain = network(seed=5).double()
    plain.load_state_dict(dict(peftlib.merged_state_dict(model)), strict=True)
    torch.testing.assert_close(plain(tokens()), model(tokens()), rtol=1e-12, atol=1e-12)


def test_a_stream_of_a_merged_model_is_its_own_weights():
    model = several()
    expected = {key: bits(tensor) for key, tensor in peftlib.merged_state_dict(model, "a", "b")}
    peftlib.merge(model, "a", "b")
    assert {key: bits(tensor) for key, tensor in peftlib.merged_state_dict(model)} == expected
    assert {key: bits(tensor) for key, tensor in peftlib.merged_state_dict(model, "b", "a")} == expected


def test_a_stream_of_a_root_host_and_of_a_host_under_two_names():
    root = nn.Linear(4, 4)
    peftlib.inject(root, nn.Linear, LoRA)
    assert [key for key, _ in peftlib.merged_state_dict(moved(root))] == ["weight", "bias"]
    shared = nn.Linear(4, 4)
    twice = chain(shared, nn.ReLU(), shared)
    peftlib.inject(twice, nn.Linear, LoRA)
    streamed = dict(peftlib.merged_state_dict(moved(twice)))
    assert list(streamed) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert same_bits(streamed["0.weight"], streamed["2.weight"])
    assert not torch.equal(streamed["0.weight"], twice[0].weight)


class Watched(LoRA):
    """Notes each weight that it folds."""

    def fold(self, host: Any) -> dict[str, Tensor]:
        found = super().fold(host)
        self.note(found["weight"])
        return found


def watched(note: Callable[[Tensor], object]) -> Any:
    model = linears(12).bfloat16()
    peftlib.inject(model, nn.Linear, Watched)
    for _, _, adapter in peftlib.adapters(model):
        adapter.__dict__["note"] = note
    return moved(model)


def test_a_stream_holds_one_tensor_at_a_time():
    """Counted: of all tensors that folding made, how many are alive when the next one is asked for."""
    made: list[weakref.ref[Tensor]] = []
    model = watched(lambda weight: made.append(weakref.ref(weight)))
    gc.disable()
    try:
        peak = 0
        for key, tensor in peftlib.merged_state_dict(model):
            del key, tensor
            peak = max(peak, sum(ref() is not None for ref in made))
    finally:
        gc.enable()
    assert len(made) == 12
    assert peak <= 1, f"{peak} folded weights alive at once"


def test_a_stream_lets_go_of_what_it_gave():
    given: list[weakref.ref[Tensor]] = []
    for key, tensor in peftlib.merged_state_dict(watched(lambda weight: None)):
        if key.endswith("weight"):
            given.append(weakref.ref(tensor))
        del key, tensor
        assert sum(ref() is not None for ref in given) <= 1
    assert len(given) == 12


def test_a_stream_keeps_no_graph_for_a_backward_that_never_comes():
    folded: list[Tensor] = []
    list(peftlib.merged_state_dict(watched(folded.append)))
    assert len(folded) == 12
    assert all(value.grad_fn is None for value in folded)


def test_a_stream_may_be_dropped_in_the_middle():
    model = several()
    before = snapshot(model)
    stream = peftlib.merged_state_dict(model)
    next(stream)
    del stream
    assert changes(before, model) == []
    peftlib.merge(model)


def test_a_stream_refuses_before_its_first_tensor():
    model = linears()
    peftlib.inject(model, "1", Offset)
    with refused(model, "1", "merged_state_dict", "Offset"):
        peftlib.merged_state_dict(model)


def test_persistent_buffers_stream_and_adapters_do_not():
    model = chain(nn.Linear(4, 4), nn.BatchNorm1d(4))
    peftlib.inject(model, nn.BatchNorm1d, Full)
    model(torch.randn(8, 4))
    streamed = dict(peftlib.merged_state_dict(model))
    plain = chain(nn.Linear(4, 4), nn.BatchNorm1d(4))
    plain.load_state_dict(streamed)
    x = torch.randn(3, 4)
    assert same_bits(plain.eval()(x), model.eval()(x))
    assert streamed["1.num_batches_tracked"] == 1

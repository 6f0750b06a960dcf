"""A failure in the middle, at any host, leaves the model as it was: every bit, every attribute, every class."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peftlib
from peftlib import AdapterError, Full, LoRA
from support.faults import Fault, Steps, fail_at_every_call, fail_at_every_step, failing, steps_of
from support.helpers import (
    Gain,
    base_bits,
    changes,
    linears,
    moved,
    network,
    snapshot,
    tokens,
)
from support.refusals import refused

pytestmark = pytest.mark.mutants


def encoder() -> Any:
    """A model whose parents have a fast path, so that they become hosts without an adapter."""
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


def wrapped() -> Any:
    """Some of its linears have a forward of their own in `__dict__`, as other tools put there."""
    model = network()
    for module in (model.head, model.layers[0].q_proj):
        module.__dict__["forward"] = module.forward
    return model


def small() -> Any:
    return network(layers=1)


def adapted(make: Any = network) -> Any:
    model = make()
    peftlib.inject(model, nn.Linear, LoRA, rank=2, name="a")
    peftlib.inject(model, nn.LayerNorm, Full, name="b")
    return moved(model)


def halves() -> Any:
    """Two parts of one model that were adapted each by itself."""
    model = network()
    peftlib.inject(model.layers[0], "q_proj", LoRA, name="a")
    peftlib.inject(model.layers[1], "q_proj", LoRA, name="b")
    return moved(model)


def with_gradients() -> Any:
    model = adapted()
    model(tokens()).square().sum().backward()
    return model


MODELS = {
    "plain": network,
    "fast paths": encoder,
    "forwards of others": wrapped,
    "adapted": adapted,
    "adapted in parts": halves,
    "with gradients": with_gradients,
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def put_in(model: Any) -> None:
    peftlib.inject(model, nn.Linear, LoRA, rank=3, name="new")


@every_model
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("owner", "attribute"),
    [(LoRA, "__init__"), (LoRA, "reset_parameters")],
    ids=["constructor", "draw"],
)
def test_inject_fails_at_each_host(make, owner, attribute, late):
    assert fail_at_every_call(make, put_in, owner, attribute, late) >= (0 if attribute == "__init__" else 2)


@pytest.mark.parametrize(("part", "make"), [*enumerate(MODELS.values())], ids=MODELS)
def test_inject_fails_at_each_step(part, make):
    """Each model meets another part of the steps."""
    assert fail_at_every_step(make, put_in, part, len(MODELS)) >= 20


class Fragile(Gain):
    """Refuses one width, as a kind may that finds an unsuitable host late."""

    def __init__(self, host: Any) -> None:
        super().__init__(host)
        if host.out_features == 3:
            raise RuntimeError("no host of three")


def test_inject_is_undone_when_a_users_kind_raises():
    model = network()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="no host of three"):
        peftlib.inject(model, nn.Linear, Fragile)
    assert changes(before, model) == []


def take_all(model: Any) -> None:
    peftlib.eject(model)


def take_one(model: Any) -> None:
    peftlib.eject(model, "a")


@pytest.mark.parametrize("act", [take_all, take_one], ids=["all", "one"])
@pytest.mark.parametrize("make", [adapted, lambda: adapted(encoder), lambda: adapted(wrapped), halves, with_gradients])
def test_eject_fails_at_each_step(make, act):
    assert fail_at_every_step(make, act) >= 25


def adapted_once() -> Any:
    torch.manual_seed(0)
    return adapted(small)


def merged_once() -> Any:
    model = adapted_once()
    peftlib.merge(model)
    return model


@pytest.mark.parametrize("make", [adapted_once, merged_once], ids=["live", "merged"])
def test_eject_for_good_fails_at_each_step_and_leaves_the_model_whole(make):
    """As it was; or, where the weights are written already, all of them: then another call takes the adapters out."""
    done = make()
    peftlib.eject(done, merge=True)
    undone = 0
    numbers = steps_of(make, lambda m: peftlib.eject(m, merge=True), 0, 2)
    for number in numbers:
        model = make()
        before = snapshot(model)
        with Steps(number), contextlib.suppress(Fault):
            peftlib.eject(model, merge=True)
        if changes(before, model) == []:
            undone += 1
        else:
            assert base_bits(model) == base_bits(done)
        if peftlib.summary(model).rows:
            assert len(peftlib.summary(model).rows) == len(peftlib.summary(make()).rows)
            peftlib.eject(model, merge=True)
        assert base_bits(model) == base_bits(done)
        assert [type(module) for module in model.modules()] == [type(module) for module in done.modules()]
    assert undone >= len(numbers) - 5


FOLDING = {
    "fold": (LoRA, "fold"),
    "fold of another kind": (Full, "fold"),
    "widen, or back up": (torch.Tensor, "to"),
    "round, or write": (torch.Tensor, "copy_"),
    "check": (torch.Tensor, "sum"),
}


def in_place(make: Callable[[], Any]) -> Callable[[], Any]:
    """The same model in shared memory, where another process may read its weights."""
    return lambda: make().share_memory()


@pytest.mark.parametrize("make", [adapted, in_place(adapted)], ids=["swapped", "in place"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "attribute"), FOLDING.values(), ids=FOLDING)
@pytest.mark.parametrize("act", [peftlib.merge, lambda m: peftlib.eject(m, merge=True)], ids=["merge", "eject"])
def test_merge_fails_at_each_weight(make, act, owner, attribute, late):
    assert fail_at_every_call(make, act, owner, attribute, late) >= 2


@pytest.mark.parametrize("change", [lambda make: make, in_place], ids=["swapped", "in place"])
def test_merge_fails_at_each_step(change):
    assert fail_at_every_step(change(lambda: adapted(small)), peftlib.merge, 0, 2) >= 50


def merged_model() -> Any:
    model = adapted(small)
    peftlib.merge(model)
    return model


FOR_GOOD = {
    "eject, merged": (merged_model, lambda m: peftlib.eject(m, merge=True)),
    "eject, unmerged": (lambda: adapted(small), lambda m: peftlib.eject(m, merge=True)),
    "eject of one": (lambda: adapted(small), lambda m: peftlib.eject(m, "a", merge=True)),
}


@pytest.mark.parametrize(("make", "act"), FOR_GOOD.values(), ids=FOR_GOOD)
def test_eject_of_what_is_merged_fails_at_each_step_to_the_last(make, act):
    assert fail_at_every_step(make, act) >= 10


def test_unmerge_fails_at_each_step_to_the_last():
    """Which of two equal tensors holds a copy then is not looked at."""
    plain = base_bits(adapted(small))
    for step in steps_of(merged_model, peftlib.unmerge):
        model = merged_model()
        before = base_bits(model)
        with Steps(step), pytest.raises(Fault):
            peftlib.unmerge(model)
        assert base_bits(model) == before != plain
        peftlib.unmerge(model)
        assert base_bits(model) == plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merge_fails_at_each_weight_in_half_precision(dtype):
    assert fail_at_every_call(lambda: adapted().to(dtype), peftlib.merge, torch.Tensor, "copy_", late=True) >= 9


@pytest.mark.parametrize("backup", ["device", "cpu"])
def test_merge_into_the_last_weight_refuses_after_all_others_are_written(backup):
    model = linears(6)
    peftlib.inject(model, nn.Linear, LoRA)
    moved(model)
    with torch.no_grad():
        list(peftlib.adapters(model))[-1][2].lora_B[0, 0] = float("nan")
    with refused(model, "5", "lora_B", "NaN"):
        peftlib.merge(model, backup=backup)


def test_an_interrupt_in_the_middle_of_a_merge_is_no_exception_to_the_rule(monkeypatch):
    model = adapted()
    before = snapshot(model)
    real, calls = LoRA.fold, []

    def interrupted(self: Any, host: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, host)

    monkeypatch.setattr(LoRA, "fold", interrupted)
    with pytest.raises(KeyboardInterrupt):
        peftlib.merge(model)
    assert changes(before, model) == []


@pytest.fixture
def saved(tmp_path):
    model = network()
    peftlib.inject(model, ["q_proj", "head"], LoRA, rank=2)
    peftlib.inject(model, nn.LayerNorm, Full)
    peftlib.save(moved(model), tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


LOADING = {
    "constructor": (LoRA, "__init__", 3),
    "constructor of another kind": (Full, "__init__", 2),
    "fill": (peftlib.Adapter, "load_state_dict", 5),
}


def switched_off() -> Any:
    """Its copies and those that are loaded could not be active together."""
    model = adapted()
    peftlib.activate(model)
    return model


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "attribute", "calls"), LOADING.values(), ids=LOADING)
@pytest.mark.parametrize("make", [network, wrapped, switched_off, halves])
def test_load_fails_at_each_host(make, owner, attribute, calls, late, saved):
    assert fail_at_every_call(make, lambda m: peftlib.load(m, saved), owner, attribute, late) == calls


@pytest.mark.parametrize(("part", "make"), [*enumerate([network, wrapped, switched_off, halves])])
def test_load_fails_at_each_step(part, make, saved):
    """Each model meets another part of the steps; together, one in two."""
    assert fail_at_every_step(make, lambda m: peftlib.load(m, saved), part, 8) >= 30


def test_a_fault_really_strikes_and_a_change_is_really_seen():
    """The tests above could pass without testing: here are a fault and changes that must be noticed."""
    model = network()
    with failing(LoRA, "__init__", 0), pytest.raises(Fault):
        put_in(model)
    with Steps(steps_of(network, put_in)[-1]), pytest.raises(Fault, match="at the call of"):
        put_in(model)
    for change in (
        lambda m: m.head.weight.data[0, 0].add_(1e-6),
        lambda m: m.head.bias.requires_grad_(False),
        lambda m: m.head.__dict__.update(extra=1),
        lambda m: setattr(m, "head", nn.Linear(8, 3)),
        lambda m: m.head.__dict__.update(training=m.head.__dict__.pop("training")),
        lambda m: setattr(m.head, "__class__", type("Other", (nn.Linear,), {})),
        lambda m: m.head.register_forward_hook(lambda *_: None),
        lambda m: setattr(m.head.weight, "grad", torch.ones(3, 8)),
        lambda m: m.train(),
        lambda m: peftlib.inject(m, "head", LoRA),
        lambda m: peftlib.activate(m),
        lambda m: peftlib.merge(m),
    ):
        model = network()
        peftlib.inject(model, "embedding", LoRA, name="there", freeze=False)
        before = snapshot(model)
        assert changes(before, model) == []
        change(model)
        assert changes(before, model) != []


def test_activate_and_train_only_of_an_absent_name_change_nothing():
    model = adapted()
    for act in (peftlib.activate, peftlib.train_only):
        with refused(model, "Network", "'c'"):
            act(model, "a", "c")


# ---- unmerge, freezing and unfreezing


def all_merged() -> Any:
    model = adapted()
    peftlib.merge(model)
    return model


def values(model: Any) -> dict[str, Any]:
    """Weights, what unmerge would make of them, and what is merged; a kept copy may be another object than it was."""
    unmerged = copy.deepcopy(model)
    if any(row.state == "merged" for row in peftlib.summary(model).rows):
        peftlib.unmerge(unmerged)
    return {"kept": base_bits(unmerged), "weights": base_bits(model), "rows": peftlib.summary(model).rows}


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("attribute", ["copy_", "to"])
def test_unmerge_fails_at_each_weight_and_stays_merged(attribute, late):
    original, at = base_bits(adapted_once()), 0
    while True:
        model = in_place(merged_once)()
        before = values(model)
        with failing(torch.Tensor, attribute, at, late) as struck, contextlib.suppress(Fault):
            peftlib.unmerge(model)
        if not struck:
            break
        assert values(model) == before
        peftlib.unmerge(model)
        assert base_bits(model) == original
        at += 1
    assert at >= 5


@pytest.mark.parametrize("make", [merged_once, in_place(merged_once)], ids=["swapped", "in place"])
def test_unmerge_fails_at_each_step_and_stays_merged(make):
    original, numbers = base_bits(adapted_once()), steps_of(make, peftlib.unmerge)
    for number in numbers:
        model = make()
        before = values(model)
        with Steps(number) as steps, contextlib.suppress(Fault):
            peftlib.unmerge(model)
        assert steps.struck
        assert values(model) == before
        peftlib.unmerge(model)
        assert base_bits(model) == original
    assert len(numbers) >= 10


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_freezing_and_unfreezing_fail_at_each_parameter(late):
    assert fail_at_every_call(network, put_in, torch.Tensor, "requires_grad_", late) >= 9
    assert fail_at_every_call(adapted, take_all, torch.Tensor, "requires_grad_", late) >= 9


def test_eject_unfreezes_a_complex_weight_and_passes_by_one_that_was_packed_since():
    model = linears()
    model[1].register_parameter("phase", nn.Parameter(torch.ones(2, dtype=torch.complex64)))
    peftlib.inject(model, "0", LoRA)
    model[0].bias = nn.Parameter(torch.ones(4, dtype=torch.int8), requires_grad=False)
    peftlib.eject(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "0.weight",
        "1.weight",
        "1.bias",
        "1.phase",
    }


# ---- out of memory


class Allocator(TorchDispatchMode):
    """The allocation number `at` fails, as it does where memory has run out."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count, self.struck = at, 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and not leaf.is_meta]
        if any(leaf.untyped_storage()._cdata not in given for leaf in made):
            self.count += 1
            if self.count == self.at + 1:
                self.struck = True
                raise torch.OutOfMemoryError("simulated")
        return result


def put_in_all_kinds(model: Any) -> None:
    peftlib.inject(model, ["q_proj", "head"], LoRA, rank=3, init="pissa", name="new")


def small_adapted() -> Any:
    return adapted(small)


OUT_OF_MEMORY = {
    "inject": (small, put_in_all_kinds),
    "inject into an adapted model": (small_adapted, put_in_all_kinds),
    "merge": (small_adapted, peftlib.merge),
    "merge in half precision": (lambda: small_adapted().to(torch.bfloat16), peftlib.merge),
    "eject for good": (small_adapted, lambda model: peftlib.eject(model, merge=True)),
    "stream": (small_adapted, lambda model: dict(peftlib.merged_state_dict(model))),
}


@pytest.mark.parametrize(("make", "act"), OUT_OF_MEMORY.values(), ids=list(OUT_OF_MEMORY))
def test_memory_runs_out_at_each_allocation(make, act):
    assert run_out_of_memory(make, act, watched) >= 5


def test_memory_runs_out_at_each_allocation_of_unmerge():
    assert run_out_of_memory(in_place(all_merged), peftlib.unmerge, unmoved) >= 9


def watched(model: Any) -> Callable[[], Any]:
    before = snapshot(model)
    return lambda: changes(before, model)


def unmoved(model: Any) -> Callable[[], Any]:
    before = values(model)
    return lambda: values(model) != before


def test_eject_view_and_unmerge_allocate_nothing():
    for act in (take_all, lambda model: peftlib.view(model, "a")):
        assert run_out_of_memory(adapted, act, unmoved) == 0
    assert run_out_of_memory(all_merged, peftlib.unmerge, unmoved) == 0, "weights go back to where they were"


def run_out_of_memory(make: Any, act: Any, watch: Callable[[Any], Callable[[], Any]]) -> int:
    """Lets each allocation of `act` fail once; returns how many there are."""
    for at in range(10_000):
        model = make()
        changed = watch(model)
        with Allocator(at) as allocator, contextlib.suppress(torch.OutOfMemoryError, ValueError, AdapterError):
            act(model)  # torch tells some failures inside its parsers as a ValueError
        if not allocator.struck:
            return at
        assert not changed(), f"allocation {at}"
        act(model)
    raise AssertionError


def test_memory_runs_out_at_each_allocation_of_load_and_save(tmp_path):
    path = tmp_path / "adapter.safetensors"
    model = small()
    peftlib.inject(model, "head", LoRA, rank=2)
    peftlib.inject(model, nn.LayerNorm, Full)
    peftlib.save(model, path)
    whole = path.read_bytes()
    assert run_out_of_memory(small, lambda model: peftlib.load(model, path), watched) >= 10
    assert path.read_bytes() == whole
    assert run_out_of_memory(small_adapted, lambda model: peftlib.save(model, tmp_path / "other", "b"), watched) >= 2
    assert {file.name for file in tmp_path.iterdir()} == {path.name, "other"}

"""`eject(merge=True, dequantize=True)`: quantised layers become plain ones, with the values of their codes, or nothing
changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

import peftlib
from peftlib import IA3, Bottleneck, Full, LoRA
from support.ecosystem import close, moved
from support.faults import Fault, Steps, fail_at_every_call, fail_at_every_step, steps_of
from support.helpers import bits
from support.quantised import BASES, BY_NAME, WIDTH, Base, by_torchao, chain, four_bits
from support.refusals import refused

each_base = pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
EPSILON = torch.finfo(torch.float32).eps
X = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(2))


def adapted(base: Base = BASES[0], kind: Any = LoRA, name: str = "default", **config: Any) -> Any:
    model = base.of(chain())
    peftlib.inject(model, ["0", "2"], kind, name=name, **config)
    return moved(model, name)


def half_quantised() -> Any:
    """A layer that computes in bfloat16 beside a bias in float32, a torchao layer, and one in plain bfloat16."""
    first, middle = four_bits("nf4", compute_dtype=torch.bfloat16), BY_NAME["torchao int8 weight-only"].pack
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        layers = [nn.Linear(WIDTH, WIDTH) for _ in range(3)]
        model = nn.Sequential(first(layers[0]), middle(layers[1]), layers[2].bfloat16()).requires_grad_(False)
        peftlib.inject(model, ["0", "1", "2"], LoRA, rank=2)
    return moved(model)


def dequantised(model: nn.Module, name: str | None = None) -> dict[str, float]:
    return peftlib.eject(model, name, merge=True, dequantize=True)


@each_base
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [LoRA, IA3])
def test_a_weight_is_the_value_that_the_library_packed(base, training, kind):
    """One rounding of a code times a scale, or two, also where the layer rounds more in eval mode; an adapter at its
    start changes nothing."""
    model = base.of(chain()).train(training)
    expected = [base.values(model[at]).double() for at in (0, 2)]
    biases = [model[at].bias.clone() for at in (0, 2)]
    peftlib.inject(model, ["0", "2"], kind)
    dequantised(model)
    for at, values, bias in zip((0, 2), expected, biases, strict=True):
        assert (model[at].weight - values).abs().max() <= 2 * EPSILON * values.abs().max()
        assert torch.equal(model[at].bias, bias)


@pytest.mark.mutants
@each_base
def test_the_adapter_is_folded_in_float32(base):
    model = adapted(base, rank=4, alpha=8)
    parts = [
        {key: p.detach().double() for key, p in adapter.named_parameters()} for *_, adapter in peftlib.adapters(model)
    ]
    expected = [
        base.values(model[at]).double() + 2 * part["lora_B"] @ part["lora_A"]
        for at, part in zip((0, 2), parts, strict=True)
    ]
    dequantised(model)
    for at, values in zip((0, 2), expected, strict=True):
        # A product of rank 4, a scale, the packed value and the sum: eight roundings.
        assert (model[at].weight - values).abs().max() <= 8 * EPSILON * values.abs().max()


@pytest.mark.mutants
@each_base
def test_nothing_of_the_library_is_left_on_the_layer(base):
    model = adapted(base)
    before = model[0]
    dequantised(model)
    assert model[0] is before
    assert type(before) is nn.Linear
    assert vars(before).keys() == vars(nn.Linear(1, 1)).keys()
    assert not before._load_state_dict_pre_hooks
    assert str(before) == f"Linear(in_features={WIDTH}, out_features={WIDTH}, bias=True)"
    assert type(before.weight) is type(before.bias) is nn.Parameter
    assert before.weight.dtype == before.bias.dtype == torch.float32
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    fresh = chain()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(X), model(X))


@each_base
@pytest.mark.parametrize("training", [True, False])
def test_the_error_is_the_distance_from_the_live_layer(base, training):
    model = adapted(base).train(training)
    probes = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        live = [model[at](probes) for at in (0, 2)]
    errors = dequantised(model)
    assert list(errors) == ["0", "2"]
    for error, y, layer in zip(errors.values(), live, (model[0], model[2]), strict=True):
        expected = (nn.functional.linear(probes, layer.weight, layer.bias) - y).norm() / y.norm()
        assert error == pytest.approx(expected.item(), rel=1e-3, abs=EPSILON)
        rounds_input = base.name == "bitsandbytes 8-bit" and not training
        # Whole numbers up to 127 for the input: half a step of a largest value near 2.7, over a deviation of 1.
        assert (1e-3 < error < 2.7 / 127) if rounds_input else error <= 16 * EPSILON


def test_the_error_is_that_of_the_adapters_that_are_merged_without_their_dropout():
    model = adapted(rank=2, name="merged", dropout=0.5).train()
    peftlib.inject(model, "0", LoRA, name="other")
    moved(model, "other")
    peftlib.activate(model, "other")
    assert all(error <= 16 * EPSILON for error in dequantised(model, "merged").values())


def test_hosts_that_are_not_quantised_merge_as_usual():
    model, usual_last = half_quantised(), nn.Sequential(half_quantised()[2])
    peftlib.merge(usual_last)
    errors = dequantised(model)
    assert list(errors) == ["0", "1"]
    assert model[2].weight.dtype == torch.bfloat16
    assert torch.equal(model[2].weight, usual_last[0].weight)
    # One layer computes in bfloat16: input, scales, values and product are rounded.
    assert EPSILON * 16 < errors["0"] <= 4 * torch.finfo(torch.bfloat16).eps
    assert errors["1"] <= 16 * EPSILON


def test_without_a_quantised_host_it_is_a_merge():
    model, usual = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    usual.load_state_dict(model.state_dict())
    for each in (model, usual):
        with torch.random.fork_rng([]):
            peftlib.inject(each, "0", LoRA, rank=2)
        moved(each)
    assert dequantised(model) == {}
    peftlib.eject(usual, merge=True)
    assert torch.equal(model[0].weight, usual[0].weight)


def test_another_adapter_of_the_layer_goes_on():
    model = adapted(rank=2, name="merged")
    peftlib.inject(model, ["0", "2"], LoRA, rank=2, name="live")
    moved(model, "live", seed=9)
    expected = model(X)
    dequantised(model, "merged")
    assert [name for _, name, _ in peftlib.adapters(model)] == ["live", "live"]
    assert close(model(X), expected)
    peftlib.eject(model, "live")
    assert type(model[0]) is nn.Linear
    assert not close(model(X), expected)


def test_who_shares_the_codes_keeps_them():
    model = BASES[0].of(chain())
    model[2].weight = model[0].weight
    peftlib.inject(model, "0", LoRA)
    moved(model)
    before = model[2](X)
    dequantised(model)
    assert type(model[2].weight).__name__ == "Int8Tensor"
    assert torch.equal(model[2](X), before)


@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(300, 33, False), (256, 1, True), (2, 300, True)])
def test_every_width_is_read_whole(inputs, outputs, bias):
    """Columns are read 256 at a time."""
    layer = BASES[0].pack(nn.Linear(inputs, outputs, bias=bias))
    values = BASES[0].values(layer)
    model = nn.Sequential(layer).requires_grad_(False)
    peftlib.inject(model, "0", LoRA, rank=1)
    dequantised(model)
    assert (model[0].weight - values).abs().max() <= 2 * EPSILON * values.abs().max()
    assert (model[0].bias is not None) is bias


@pytest.mark.mutants
def test_hooks_mode_and_flags_of_the_user_stay():
    calls: list[object] = []
    model = BASES[0].of(chain())
    model[0].bias.requires_grad_(True)
    model[0].register_forward_hook(lambda module, args, output: calls.append(module))
    peftlib.inject(model, "0", LoRA)
    model.eval()
    calls.clear()
    dequantised(model)
    assert not calls, "a hook saw the probe"
    model(X)
    assert calls == [model[0]]
    assert not model[0].training
    assert model[0].bias.requires_grad
    assert not model[0].weight.requires_grad


def test_a_bias_that_trains_beside_the_adapter_goes_on():
    model = BASES[0].of(chain())
    model[0].bias.requires_grad_(True)
    peftlib.inject(model, ["0", "2"], LoRA, freeze=False)
    dequantised(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.bias"]


def test_a_layer_in_bfloat16_without_a_bias_is_measured_in_bfloat16():
    model = nn.Sequential(BASES[0].pack(nn.Linear(WIDTH, WIDTH, bias=False).bfloat16()))
    values = BASES[0].values(model[0])
    peftlib.inject(model, "0", LoRA)
    unit = torch.finfo(torch.bfloat16).eps
    assert unit / 16 < dequantised(model)["0"] <= 4 * unit
    assert (model[0].weight - values).abs().max() <= unit * values.abs().max()  # the library's values are rounded
    assert not torch.equal(model[0].weight, model[0].weight.bfloat16().float()), "the merged ones are not"


def test_autocast_and_random_numbers_around_it_are_left_alone():
    plain, around = adapted(), adapted()
    around.load_state_dict(plain.state_dict())
    dequantised(plain)
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        errors = dequantised(around)
    assert torch.equal(torch.get_rng_state(), state)
    assert bits(around[0].weight) == bits(plain[0].weight)
    assert max(errors.values()) <= 16 * EPSILON


# All or nothing


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_failure_at_any_fold_leaves_the_model_as_it_was(late):
    assert fail_at_every_call(half_quantised, dequantised, LoRA, "fold", late) == 3


@pytest.mark.parametrize("part", range(4))
def test_a_failure_at_any_step_leaves_the_model_as_it_was(part):
    assert fail_at_every_step(half_quantised, dequantised, part, 4) >= 30


def test_after_a_failure_the_output_is_the_same_to_the_bit():
    with torch.no_grad():
        for step in steps_of(half_quantised, dequantised, 0, 10):
            model = half_quantised()
            expected = model[1](model[0](X))
            with Steps(step), pytest.raises(Fault):
                dequantised(model)
            assert torch.equal(model[1](model[0](X)), expected)


def with_own_forward(name: str) -> Any:
    """As accelerate's hooks do."""
    model: Any = BASES[0].of(chain()) if name else BASES[0].pack(nn.Linear(WIDTH, 3)).requires_grad_(False)
    host = model.get_submodule(name)
    host.forward = host.forward
    peftlib.inject(model, lambda found, _: found == name, LoRA)
    return model


def with_class_above() -> Any:
    model = adapted()
    model[2].__class__ = type("Foreign", (type(model[2]),), {})
    return model


def with_nan() -> Any:
    model = adapted()
    with torch.no_grad():
        model[2].adapters.default.lora_A[0, 0] = float("nan")
    return model


def merged_already() -> Any:
    model = adapted(kind=Full, params="bias")
    peftlib.merge(model)
    return model


REFUSALS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], tuple[str, ...]]] = {
    "without merge": (
        adapted, lambda m: peftlib.eject(m, dequantize=True),
        ("eject", "dequantize=True", "merge=True"),
    ),
    "an absent name": (adapted, lambda m: dequantised(m, "other"), ("Sequential", "'other'")),
    "merged already": (merged_already, dequantised, ("eject", "default", "unmerge")),
    "no weight form": (lambda: adapted(kind=Bottleneck), dequantised, ("0", "Bottleneck")),
    "a forward of its own": (
        lambda: with_own_forward("0"), dequantised,
        ("0", "forward", "Linear"),
    ),
    "a forward of its own, on the root": (
        lambda: with_own_forward(""), dequantised, ("the root", "forward", "Linear"),
    ),
    "a class above": (with_class_above, dequantised, ("2", "Foreign", "Linear")),
    "not finite": (with_nan, dequantised, ("2", '"default"', "lora_A", "NaN")),
}  # fmt: skip


@pytest.mark.mutants
@pytest.mark.parametrize(("make", "act", "names"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_says_why_and_leaves_the_model_as_it_was(make, act, names):
    model = make()
    with refused(model, *names):
        act(model)


def test_a_live_view_stands_in_the_way():
    model = adapted()
    other = peftlib.view(model)
    with refused(None, "eject", "1", "view(s)"):
        dequantised(model)
    del other
    dequantised(model)


def test_a_layer_that_takes_bfloat16_alone_is_read_in_it():
    """torchao's int4 kernel for the CPU; it has no derivative, so it is no base to train on."""
    config = PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)
    layer = by_torchao(config)(nn.Linear(WIDTH, WIDTH).bfloat16())
    model = nn.Sequential(layer).requires_grad_(False)
    peftlib.inject(model, "0", LoRA, rank=2)
    moved(model)
    with pytest.raises(RuntimeError, match="derivative for aten::_weight_int4pack_mm_for_cpu is not implemented"):
        model(X.bfloat16().requires_grad_()).sum().backward()
    live = model(X.bfloat16()).float()
    unit = torch.finfo(torch.bfloat16).eps
    assert unit / 16 < dequantised(model)["0"] <= 4 * unit  # input, value, product and sum are rounded
    assert (model(X) - live).norm() <= 4 * unit * live.norm()


def test_layers_whose_codes_lie_in_a_floating_point_dtype_are_known_by_their_shape():
    model = adapted(Base("", four_bits("nf4", quant_storage=torch.bfloat16), BASES[4].values))
    assert model[0].weight.dtype == torch.bfloat16
    live: Tensor = model(X)
    with refused(model, "0.weight", "[4096, 1]", "torch.bfloat16"):
        peftlib.merge(model)
    assert max(dequantised(model).values()) <= 16 * EPSILON
    assert close(model(X), live)

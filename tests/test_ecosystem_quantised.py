"""Bases quantised by torchao and bitsandbytes, on CPU: inject, train, save, load; and merge refuses in words."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ecosystem import feature
from torch import Tensor, nn

import peftlib

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the libraries warn of their own affairs
WIDTH = 64


def dense() -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).requires_grad_(False)


def library(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def torchao_int8() -> Any:
    api = library("torchao.quantization")
    model = dense()
    api.quantize_(model, api.Int8WeightOnlyConfig())
    return model


def torchao_int4() -> Any:
    api, int4 = library("torchao.quantization"), library("torchao.prototype.quantization.int4")
    model = dense().bfloat16()
    api.quantize_(model, int4.Int4WeightOnlyOpaqueTensorConfig(group_size=32))
    return model


def torchao_nf4() -> Any:
    api = library("torchao.quantization")
    model = dense().bfloat16()
    for layer in (model[0], model[2]):
        layer.weight = nn.Parameter(api.to_nf4(layer.weight, WIDTH, WIDTH), requires_grad=False)
    return model


def bitsandbytes_8bit() -> Any:
    layers = library("bitsandbytes.nn")
    return replaced(dense(), lambda: layers.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False))


def bitsandbytes_4bit() -> Any:
    layers = library("bitsandbytes.nn")
    return replaced(dense(), lambda: layers.Linear4bit(WIDTH, WIDTH, quant_type="nf4", compute_dtype=torch.float32))


def replaced(model: Any, make: Callable[[], nn.Module]) -> Any:
    for at in (0, 2):
        layer = make()
        layer.load_state_dict(model[at].state_dict())
        model[at] = layer.to("cpu").requires_grad_(False)
    return model


BASES = {
    "torchao int8 weight-only": torchao_int8,
    "torchao int4 weight-only": torchao_int4,
    "torchao NF4": torchao_nf4,
    "bitsandbytes 8-bit": bitsandbytes_8bit,
    "bitsandbytes 4-bit": bitsandbytes_4bit,
}
every_base = pytest.mark.parametrize(
    "base", [pytest.param(make, id=name, marks=feature(f"quantised base, {name}")) for name, make in BASES.items()]
)
KINDS = {
    "LoRA": (peftlib.LoRA, {"rank": 4}),
    "IA3": (peftlib.IA3, {}),
    "Bottleneck": (peftlib.Bottleneck, {"width": 4}),
    "Full": (peftlib.Full, {"params": "bias"}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def put(model: nn.Module, kind: str) -> Any:
    made, config = KINDS[kind]
    peftlib.inject(model, ["0", "2"], made, **config)
    return model


def given(model: nn.Module) -> Tensor:
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2))
    return x.to(model[0].bias.dtype)


def train(model: nn.Module) -> list[float]:
    optimizer = torch.optim.AdamW(peftlib.parameters(model), lr=0.01)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (model(given(model)).float() - 0.5).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def codes(model: nn.Module) -> list[Tensor]:
    """What the quantised layers give without an adapter: all that can be read of every such weight alike."""
    with torch.no_grad(), peftlib.activate(model):
        return [model[0](given(model)), model[2](given(model))]


@every_base
@each_kind
def test_inserting_changes_no_bit_and_only_the_adapter_trains(base, kind):
    expected = base()(given(base()))
    model = put(base(), kind)
    assert torch.equal(model(given(model)), expected)
    before = codes(model)
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 or kind == "Full" for p in peftlib.parameters(model))
    assert all(map(torch.equal, codes(model), before))
    assert all(p.grad is not None and p.grad.any() for p in peftlib.parameters(model))
    peftlib.eject(model)
    assert torch.equal(model(given(model)), expected)


@every_base
@each_kind
def test_the_adapter_acts_as_beside_the_dense_weights(base, kind):
    """The quantised layer plus the same low-rank term, bottleneck or factor, written by hand from its own output."""
    model = put(base(), kind)
    train(model)
    x = given(model)
    with torch.no_grad(), peftlib.activate(model):
        y = model[0](x).float()
    adapter = next(part for at, _, part in peftlib.adapters(model) if at == "0")
    with torch.no_grad():
        found = model[0](x).float()
        expected = BY_HAND[kind](adapter, x.float(), y, model[0])
    unit = torch.finfo(x.dtype).eps
    assert (found - expected).abs().max() <= 8 * unit * expected.abs().max()


BY_HAND: dict[str, Callable[..., Tensor]] = {
    "LoRA": lambda a, x, y, host: y + 2 * (x @ a.lora_A.T) @ a.lora_B.T,  # alpha/rank: 8/4
    "IA3": lambda a, x, y, host: y * a.factor,
    "Bottleneck": lambda a, x, y, host: (
        y + nn.functional.gelu(y @ a.down_weight.T + a.down_bias) @ a.up_weight.T + a.up_bias
    ),
    "Full": lambda a, x, y, host: y - host.bias.float() + a.own.bias,
}


@every_base
@each_kind
def test_saved_and_loaded_the_output_is_identical(base, kind, tmp_path):
    model, fresh = put(base(), kind), base()
    train(model)
    peftlib.save(model, tmp_path / "adapter.safetensors")
    peftlib.load(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(fresh(given(fresh)), model(given(model)))


@every_base
@pytest.mark.parametrize("kind", ["LoRA", "IA3"])
def test_merging_is_refused_in_words_and_is_done_on_the_base_in_full_precision(base, kind, tmp_path):
    """The merged base in full precision differs from the live quantised one by the quantisation of the base alone."""
    model = put(base(), kind)
    train(model)
    before = codes(model)
    for act in (peftlib.merge, lambda m: peftlib.eject(m, merge=True), lambda m: dict(peftlib.merged_state_dict(m))):
        with pytest.raises(peftlib.AdapterError, match=r"quantised|not floating point"):
            act(model)
    assert all(map(torch.equal, codes(model), before))
    peftlib.save(model, tmp_path / "adapter.safetensors")
    full = dense()
    peftlib.load(full, tmp_path / "adapter.safetensors")
    live = full(given(full))
    peftlib.eject(full, merge=True)
    assert (full(given(full)) - live).abs().max() <= 1e-5
    base_error = (base()(given(model)).float() - dense()(given(full))).abs().max()
    assert (model(given(model)).float() - live).abs().max() <= 3 * base_error


@every_base
def test_kinds_that_need_the_weights_refuse_in_words(base, record_property):
    for kind, config, why in (
        (peftlib.DoRA, {"rank": 4}, "needs the norms of its rows. Dequantise it, or use LoRA"),
        (peftlib.Full, {}, "which cannot train. Leave it out of params"),
        (peftlib.LoRA, {"rank": 4, "init": "pissa"}, "singular vectors"),
    ):
        with pytest.raises(peftlib.AdapterError, match=why) as error:
            peftlib.inject(base(), ["0", "2"], kind, **config)
        if kind is peftlib.DoRA:
            record_property("refused DoRA", str(error.value))


@every_base
def test_biases_of_a_quantised_layer_merge(base):
    model = put(base(), "Full")
    train(model)
    live = model(given(model))
    peftlib.merge(model)
    assert torch.equal(model(given(model)), live)
    peftlib.unmerge(model)

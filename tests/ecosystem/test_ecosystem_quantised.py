"""Bases quantised by torchao and bitsandbytes, on CPU: inject, train, save, load; merging refuses in words, or is done
in float32."""

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchao.quantization import Int8WeightOnlyConfig

import peftlib
from peftlib import IA3, AdapterError, Bottleneck, DoRA, Full, LoRA
from support.ecosystem import Column, adapter_state, close, feature, gradients, moved, refused, same, tokens
from support.helpers import bits
from support.quantised import BASES, HAS_BFLOAT16_KERNEL, KINDS, WIDTH, Base, chain, four_bits, llama

each_base = pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
ROWS = {
    "torchao int8 weight-only": feature("quantized base, torchao int8 weight-only"),
    "torchao int4 weight-only": feature("quantized base, torchao int4 weight-only"),
    "torchao NF4": feature("quantized base, torchao NF4"),
    "bitsandbytes 8-bit": feature("quantized base, bitsandbytes 8-bit"),
    "bitsandbytes 4-bit NF4, doubly quantized": feature("quantized base, bitsandbytes 4-bit NF4, doubly quantized"),
    "bitsandbytes 4-bit FP4": feature("quantized base, bitsandbytes 4-bit FP4"),
}
every_base = pytest.mark.parametrize(
    "base", [pytest.param(base, id=base.name, marks=ROWS[base.name]) for base in BASES]
)
# A cell takes a third of a second, and there are hundreds: LoRA at each commit, the others with the slow tests.
every_kind = pytest.mark.parametrize(
    "column",
    [pytest.param(column, marks=() if column.kind is LoRA else pytest.mark.slow) for column in KINDS],
    ids=lambda column: column.name,
)
Record = Callable[[str, object], None]


def quantised(base: Base) -> Any:
    return base.of(llama(), "_proj").train()


def put(model: Any, column: Column, record: Record) -> bool:
    """Whether this kind goes into a quantised model; of one that does not, that it says so and changes nothing."""
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        if column.kind is not DoRA:
            peftlib.inject(model, column.llama, column.kind, **column.config)
            return True
    with pytest.raises(AdapterError, match=r"DoRA.*LoRA") as error:
        peftlib.inject(model, column.llama, column.kind, **column.config)
    assert not list(peftlib.adapters(model))
    refused(record, error)
    return False


def logits(model: Any, embedded: Tensor | None = None) -> Tensor:
    given = {"input_ids": tokens()} if embedded is None else {"inputs_embeds": embedded}
    return model(**given, use_cache=False).logits[:, -tokens().shape[1] :]  # without those of prompts in front


def loss_of(model: Any) -> Tensor:
    return nn.functional.cross_entropy(logits(model)[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())


def train(model: Any, steps: int = 8) -> list[float]:
    optimizer = torch.optim.AdamW(peftlib.parameters(model), lr=0.02, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def codes(model: nn.Module) -> dict[str, bytes]:
    """Every bit of the base, inside its packed tensors too."""
    kept = {key: tensor for key, tensor in model.state_dict().items() if ".adapters." not in f".{key}"}
    # Joined with nothing, for NF4 holds a mean of one element whose stride is 256, and torch reads no bytes of that.
    return {
        name: bits(torch.cat([leaf.reshape(-1)])) for key, tensor in kept.items() for name, leaf in leaves(key, tensor)
    }


def leaves(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from leaves(f"{name}.{inner}", getattr(tensor, inner))


# A whole model, each kind in its place


@every_base
@every_kind
def test_inserting_changes_no_bit_and_only_the_adapter_trains(base, column, record_property):
    model = quantised(base)
    expected, before = logits(model), codes(model)
    if not put(model, column, record_property):
        return
    if column.name not in ("Prefix", "Prompt"):
        assert torch.equal(logits(model), expected)
    with peftlib.activate(model):
        assert torch.equal(logits(model), expected)
    losses = train(model)
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 and p.grad.any() for p in peftlib.parameters(model))
    assert set(gradients(model)) == set(adapter_state(model))
    assert codes(model) == before
    peftlib.eject(model)
    assert codes(model) == before
    assert torch.equal(logits(model), expected)
    assert type(model.model.layers[0].mlp.up_proj) is type(quantised(base).model.layers[0].mlp.up_proj)


@every_base
@every_kind
def test_saved_and_loaded_the_output_is_identical(base, column, record_property, tmp_path):
    model, fresh = quantised(base), quantised(base)
    if not put(model, column, record_property):
        return
    train(model, steps=2)
    peftlib.save(model, tmp_path / "adapter.safetensors")
    peftlib.load(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(logits(fresh), logits(model))


@every_base
@every_kind
def test_a_file_goes_to_the_dense_base_and_comes_from_it(base, column, record_property, tmp_path):
    packed, dense = quantised(base), llama()
    if not put(packed, column, record_property):
        return
    peftlib.save(moved(packed), tmp_path / "from packed")
    peftlib.load(dense, tmp_path / "from packed")
    assert same(adapter_state(dense), adapter_state(packed))
    peftlib.save(dense, tmp_path / "from dense")
    again = quantised(base)
    peftlib.load(again, tmp_path / "from dense")
    assert torch.equal(logits(again), logits(packed))


@every_base
@every_kind
def test_copies_are_identical_and_independent(base, column, record_property):
    model = quantised(base)
    if not put(model, column, record_property):
        return
    moved(model)
    expected = logits(model)
    clones = [copy.deepcopy(model)]
    if base.pickles:
        clones.append(pickle.loads(pickle.dumps(model)))
    else:  # torchao leaves an `extra_repr` on each layer that does not pickle
        with pytest.raises(AttributeError):
            pickle.dumps(quantised(base))
    for clone in clones:
        assert torch.equal(logits(clone), expected)
        moved(clone, seed=9)
        assert not torch.equal(logits(clone), expected)
    assert torch.equal(logits(model), expected)


@every_base
@every_kind
def test_checkpointed_layers_give_the_same_gradients_to_the_bit(base, column, record_property):
    model = quantised(base)
    if not put(model, column, record_property):
        return
    moved(model)
    loss_of(model).backward()
    expected = gradients(model)
    model.zero_grad()
    for layer in model.model.layers:
        layer.forward = _recomputing(layer.forward)
    loss_of(model).backward()
    assert same(gradients(model), expected)


def _recomputing(forward: Any) -> Any:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


@every_base
@every_kind
def test_views_hold_adapters_of_their_own_also_before_the_first_call(base, column, record_property):
    """bitsandbytes' 8-bit layer takes its codes from its weight at the first call: of one view, or of the model."""
    model = quantised(base)
    if not put(model, column, record_property):
        return
    moved(model)
    with_adapter, without = peftlib.view(model, "default"), peftlib.view(model)
    found, bare, expected = logits(with_adapter), logits(without), logits(model)
    assert torch.equal(found, expected)
    assert torch.equal(bare, logits(quantised(base)))
    later = peftlib.view(model)
    for mine, theirs in zip(_packed_layers(model), _packed_layers(later), strict=True):
        for one, other in zip(_memory(mine), _memory(theirs), strict=True):
            assert one == other, "a view copied a weight"


def _packed_layers(model: nn.Module) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith("_proj")]


def _memory(layer: Any) -> list[int]:
    held = [layer.state.CB] if hasattr(layer, "state") else []
    return [leaf.data_ptr() for tensor in [layer.weight, *held] for _, leaf in leaves("", tensor)]


@feature("quantized model in bfloat16, adapter in float32")
@pytest.mark.parametrize("base", [BASES[0], *BASES[2:5]], ids=lambda base: base.name)
@every_kind
def test_a_quantised_model_in_bfloat16_trains_adapters_in_float32(base, column, record_property):
    model = base.of(llama().bfloat16(), "_proj").train()
    if not put(model, column, record_property):
        return
    losses = train(model)
    assert losses[-1] < losses[0]
    assert logits(model).dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 and p.grad.any() for p in peftlib.parameters(model))


# Merging


@feature("merge into a quantized base")
@each_base
@every_kind
def test_merging_is_refused_in_words_where_codes_would_change(base, column, record_property):
    model = quantised(base)
    if not put(model, column, record_property):
        return
    moved(model)
    live, before = logits(model), codes(model)
    if column.kind is Full:  # norms and the head, which are not quantised
        with peftlib.merged(model):
            assert close(logits(model), live)
        assert codes(model) == before
        return
    why = ".weight.*dequantize=True" if column.folds else column.name
    for act in (peftlib.merge, _merged, _streamed, lambda m: peftlib.eject(m, merge=True)):
        with pytest.raises(AdapterError, match=why) as error:
            act(model)
        assert codes(model) == before
        assert torch.equal(logits(model), live)
    refused(record_property, error)


def _merged(model: nn.Module) -> None:
    with peftlib.merged(model):
        raise AssertionError("it was merged")


def _streamed(model: nn.Module) -> None:
    dict(peftlib.merged_state_dict(model))


@feature("eject(merge=True, dequantize=True) from a quantized base")
@each_base
@every_kind
def test_merged_in_float32_the_output_is_the_live_one(base, column, record_property):
    """In training none of these layers rounds more than float32 does, so neither does the result."""
    model = quantised(base)
    if not put(model, column, record_property):
        return
    moved(model)
    live, before = logits(model), codes(model)
    if not column.folds:
        with pytest.raises(AdapterError, match=column.name) as error:
            peftlib.eject(model, merge=True, dequantize=True)
        assert codes(model) == before
        assert torch.equal(logits(model), live)
        refused(record_property, error)
        return
    errors = peftlib.eject(model, merge=True, dequantize=True)
    assert close(logits(model), live, roundings=2 * 7 * 128)  # two layers of seven products of 128 terms
    expected = [name for name, module in model.named_modules() if _is_target(name, column) and column.kind is not Full]
    assert list(errors) == expected
    for name, error in errors.items():
        host = model.get_submodule(name)
        assert type(host) is nn.Linear
        assert host.weight.dtype == torch.float32
        assert error <= 16 * torch.finfo(torch.float32).eps  # √128 roundings of a sum, on both sides


def _is_target(name: str, column: Column) -> bool:
    leaf = name.rpartition(".")[2]
    return leaf.endswith("_proj") if column.llama == "*_proj" else leaf in column.llama


# Against float64


BY_HAND: dict[str, Callable[..., Tensor]] = {
    "LoRA": lambda own, x, W, b: x @ W.T + b + 2 * (x @ own["lora_A"].T) @ own["lora_B"].T,  # alpha/rank: 8/4
    "IA3": lambda own, x, W, b: (x @ W.T + b) * own["factor"],
    "Bottleneck": lambda own, x, W, b: _bottleneck(own, x @ W.T + b),
    "Full": lambda own, x, W, b: x @ W.T + own["own.bias"],
}
WITH: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoRA": (LoRA, {"rank": 4, "alpha": 8}),
    "IA3": (IA3, {}),
    "Bottleneck": (Bottleneck, {"width": 4}),
    "Full": (Full, {"params": "bias"}),
}


def _bottleneck(own: dict[str, Tensor], y: Tensor) -> Tensor:
    inner = nn.functional.gelu(y @ own["down_weight"].T + own["down_bias"])
    return y + inner @ own["up_weight"].T + own["up_bias"]


def linears(base: Base, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    made, config = WITH[kind]
    model = base.of(chain(dtype))
    peftlib.inject(model, ["0", "2"], made, **config)
    return moved(model)


def given(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


def in_float64(base: Base, model: Any, kind: str) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, gradients and dX of the same computation by hand, on the values that the library says it packed."""
    names = [
        f"{at}.adapters.default.{key}" for at in (0, 2) for key, _ in model[at].adapters.default.named_parameters()
    ]
    own = {name: model.get_parameter(name).detach().double().requires_grad_() for name in names}
    x = given().detach().double().requires_grad_()
    y = x
    for at in (0, 2):
        prefix = f"{at}.adapters.default."
        part = {name.removeprefix(prefix): p for name, p in own.items() if name.startswith(prefix)}
        W, b = base.values(model[at]).double(), model[at].bias.detach().double()
        y = BY_HAND[kind](part, y.tanh() if at else y, W, b)
    loss = (y - 0.5).square().mean()
    found = torch.autograd.grad(loss, [x, *own.values()])
    return loss.detach(), dict(zip(own, found[1:], strict=True)), found[0]


@each_base
@pytest.mark.parametrize("kind", WITH)
def test_output_gradients_and_the_inputs_gradient_are_those_of_the_unpacked_weights_in_float64(base, kind):
    model, x = linears(base, kind), given()
    loss = (model(x) - 0.5).square().mean()
    loss.backward()
    expected, by_name, to_input = in_float64(base, model, kind)
    assert close(loss.detach().double(), expected)
    assert set(gradients(model)) == set(by_name)
    for name, gradient in [*gradients(model).items(), ("input", x.grad)]:
        reference = to_input if name == "input" else by_name[name]
        assert reference.abs().max() > 0
        # Sums of 128 terms through two layers and back: √128 roundings in each of four products.
        error = (gradient.double() - reference).norm()
        assert error <= 48 * torch.finfo(torch.float32).eps * reference.norm(), name


@each_base
def test_dropout_drops_from_the_input_of_the_pair_alone(base):
    """With A and B the identity, what the pair adds is the input itself, with zeros and scaled by 1/(1-p)."""
    model = base.of(chain())
    peftlib.inject(model, "0", LoRA, rank=WIDTH, alpha=WIDTH, dropout=0.25)
    adapter = model[0].adapters.default
    with torch.no_grad():
        adapter.lora_A.copy_(torch.eye(WIDTH))
        adapter.lora_B.copy_(torch.eye(WIDTH))
    x = given()
    with peftlib.activate(model):
        y = model[0](x).detach()
    added = model[0](x) - y
    kept = added.abs() > 1e-4  # y is of the size 1, with an error of 1e-7
    assert close(added[kept], x[kept] / 0.75)
    share = kept.float().mean().item()
    assert abs(share - 0.75) <= 4 * (0.75 * 0.25 / x.numel()) ** 0.5 + 1e-3  # four deviations, and inputs near zero
    assert not torch.equal(kept, (model[0](x) - y).abs() > 1e-4), "the same mask twice"
    model.eval()
    with peftlib.activate(model):
        y = model[0](x).detach()
    assert close(model[0](x) - y, x)


BFLOAT16 = {
    **{f"{base.name}, model in bfloat16": (base, torch.bfloat16) for base in BASES[:1] + BASES[2:4]},
    "bitsandbytes 4-bit NF4, computing in bfloat16": (
        Base("", four_bits("nf4", compute_dtype=torch.bfloat16), BASES[4].values), torch.float32,
    ),
    "bitsandbytes 4-bit NF4, stored and computing in bfloat16": (
        Base("", four_bits("nf4", compute_dtype=torch.bfloat16, quant_storage=torch.bfloat16), BASES[4].values),
        torch.bfloat16,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BFLOAT16)
@pytest.mark.parametrize("kind", WITH)
def test_beside_a_layer_in_bfloat16_the_adapter_trains_in_float32(case, kind):
    """Within the rounding of bfloat16 of the loss and the gradients in float64."""
    base, dtype = BFLOAT16[case]
    model, x = linears(base, kind, dtype), given(dtype)
    y = model(x)
    assert y.dtype == dtype
    loss = (y.float() - 0.5).square().mean()
    loss.backward()
    expected, by_name, to_input = in_float64(base, model, kind)
    unit = torch.finfo(torch.bfloat16).eps
    assert (loss - expected).abs() <= 4 * unit * expected
    for name, gradient in [*gradients(model).items(), ("input", x.grad)]:
        reference = to_input if name == "input" else by_name[name]
        assert gradient.dtype == (dtype if name == "input" else torch.float32)
        # The input, two weights, two products and their way back: eight tensors rounded to bfloat16.
        assert (gradient.double() - reference).norm() <= 8 * unit * reference.norm(), name
    assert all(p.dtype == torch.float32 for p in peftlib.parameters(model))


@each_base
def test_files_of_hf_peft_load_onto_a_quantised_base(base, tmp_path):
    """Made on the dense base; written again from the quantised one, peft computes with it what it did."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], init_lora_weights=False)
    theirs = peft.get_peft_model(chain(), config)
    expected = theirs(given())
    theirs.save_pretrained(tmp_path / "theirs")
    model = base.of(chain())
    peftlib.hf.load(model, tmp_path / "theirs")
    y = given().detach().double()
    for at in (0, 2):
        own = {key: p.detach().double() for key, p in model[at].adapters.default.named_parameters()}
        y = BY_HAND["LoRA"](own, y.tanh() if at else y, base.values(model[at]).double(), model[at].bias.double())
    assert close(model(given()).double(), y)
    peftlib.hf.save(model, tmp_path / "ours")
    assert torch.equal(peft.PeftModel.from_pretrained(chain(), tmp_path / "ours")(given()), expected)


# What a kind cannot do


@pytest.mark.mutants
@each_base
@pytest.mark.parametrize("act", [peftlib.inject, peftlib.plan])
@pytest.mark.parametrize(
    ("kind", "config", "why"),
    [
        (DoRA, {"rank": 4}, "DoRA"),
        (Full, {}, "params"),
        (Full, {"params": "weight", "rows": [1]}, "rows"),
        (LoRA, {"rank": 4, "init": "pissa"}, "singular"),
    ],
    ids=["DoRA", "Full", "Full, rows", "LoRA, pissa"],
)
def test_what_needs_the_values_of_a_packed_weight_refuses_in_words(base, act, kind, config, why):
    model = base.of(chain())
    before = codes(model)
    with pytest.raises(AdapterError, match=why):
        act(model, ["0", "2"], kind, **config)
    assert codes(model) == before


@each_base
def test_biases_of_a_quantised_layer_merge(base):
    model = linears(base, "Full")
    live = model(given())
    with peftlib.merged(model):
        assert torch.equal(model(given()), live)


@each_base
def test_verify_and_summary_know_a_quantised_base(base):
    model = linears(base, "LoRA")
    before = codes(model)
    verdict = peftlib.verify(model, given().detach())
    assert verdict
    assert verdict.difference is None
    assert codes(model) == before
    assert peftlib.summary(model).trainable == 2 * 2 * 4 * WIDTH
    assert peftlib.summary(model).base_parameters == 2 * (WIDTH * WIDTH + WIDTH)


@pytest.mark.skipif(not HAS_BFLOAT16_KERNEL, reason="bitsandbytes repacks where the CPU has AVX512-BF16 alone")
def test_verify_does_not_make_a_4_bit_layer_repack_itself():
    """A pass in eval mode does, and a repacked layer gives its input no gradient."""
    model, x = linears(Base("", four_bits("nf4", trains=False), BASES[4].values), "LoRA"), given().detach()
    assert peftlib.verify(model, x)
    assert not getattr(model[0].weight.quant_state, "packing_format_for_cpu", False)
    with torch.no_grad():
        live = model.eval()(x)
        assert model[0].weight.quant_state.packing_format_for_cpu
        errors = peftlib.eject(model, merge=True, dequantize=True)
        # Input, scales, values, product: each is rounded to bfloat16 in each of two layers.
        assert (model(x) - live).norm() <= 8 * torch.finfo(torch.bfloat16).eps * live.norm()
    assert all(1e-4 < error <= 4 * torch.finfo(torch.bfloat16).eps for error in errors.values())


# The whole of QLoRA, through transformers


CONFIGS: dict[str, Callable[[], Any]] = {
    "bitsandbytes 4-bit NF4, doubly quantized": lambda: hf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "bitsandbytes 8-bit": lambda: hf.BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8 weight-only": lambda: hf.TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False)),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(path)
    return path


# transformers compiles parts of itself in an old way when it first quantises.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@feature("transformers, from_pretrained: bitsandbytes 4-bit and 8-bit, torchao int8")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@every_kind
def test_a_model_that_transformers_quantised_trains_and_becomes_a_dense_one(config, column, folder, record_property):
    model = hf.LlamaForCausalLM.from_pretrained(folder, quantization_config=config(), dtype=torch.float32).train()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if not put(model, column, record_property):
        return
    losses = train(model)
    assert losses[-1] < losses[0]
    live = logits(model)
    if not column.folds:
        peftlib.eject(model)
        return
    peftlib.eject(model, merge=True, dequantize=True)
    if column.name != "LoRA":  # the only one here that is on every projection
        return
    fresh = llama()
    fresh.load_state_dict(model.state_dict())
    assert close(logits(fresh), live, roundings=256)

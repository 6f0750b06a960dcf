"""HF peft's files on transformers' models: embeddings, heads, experts, new tokens, prefixes."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import peftlib
from peftlib import hf
from support.ecosystem import feature
from support.helpers import same_bits, seeded
from support.peft_models import CLOSE, assert_same, quiet, shifted
from support.refusals import refused

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
                         "num_attention_heads": 4}  # fmt: skip


def llama(tied: bool = False, **more: Any) -> Any:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=tied, **more)
    return seeded(lambda: transformers.LlamaForCausalLM(config))


def tied() -> Any:
    return llama(tied=True)


def qwen3() -> Any:
    config = transformers.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16)
    return seeded(lambda: transformers.Qwen3ForCausalLM(config))


def neox() -> Any:
    """Only a quarter of each key is rotated."""
    return seeded(lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES, rotary_pct=0.25)))


def yarn() -> Any:
    """The rotation is scaled as well."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
    return llama(rope_parameters=rope, max_position_embeddings=128)


def mixtral() -> Any:
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
    return seeded(lambda: transformers.MixtralForCausalLM(config))


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return seeded(lambda: transformers.GPT2LMHeadModel(config))


def bert() -> Any:
    return seeded(lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)))


def tokens() -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 50, (2, 7))


MODELS = feature("HF peft: models of transformers, tied weights and experts among them", "LoRA", "DoRA", "Full")
TOKENS = feature("HF peft: trainable_token_indices", "Full")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROWS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "attention": (llama, {"target_modules": ["q_proj", "v_proj"]}),
    "dora": (llama, {"target_modules": "all-linear", "use_dora": True}),
    "embeddings": (llama, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "kept embeddings": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied embedding": (tied, {"target_modules": ["q_proj", "embed_tokens"]}),
    "new tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 49, 3]}),
    "new tokens of tied embeddings": (tied, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]}),
    "named tokens": (llama, {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [2]}}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "experts": (mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "experts named as in transformers 4": (mixtral, {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    "classifier": (bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "bias": "lora_only"}),
}
every_row = pytest.mark.parametrize(
    ("make", "config"),
    [pytest.param(*row, id=name, marks=TOKENS if "new tokens" in name else MODELS) for name, row in ROWS.items()],
)


def saved(make: Callable[[], Any], config: Any, folder: Any) -> Tensor:
    """What peft's model gives after a little training; its files are in the folder."""
    with quiet():
        model = peft.get_peft_model(make(), config)
        shifted(parameter for parameter in model.parameters() if parameter.requires_grad)
        model.eval().save_pretrained(folder)
        return model(tokens()).logits.detach()


def lora(config: dict[str, Any]) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **config})


@every_row
def test_files_go_there_and_back_and_compute_the_same(make, config, tmp_path):
    expected = saved(make, lora(config), tmp_path / "theirs")
    model = make()
    hf.load(model, tmp_path / "theirs")
    assert_same(model(tokens()).logits, expected)
    hf.save(model, tmp_path / "ours", task_type=config.get("task_type", "CAUSAL_LM"))
    with quiet():
        loaded = peft.PeftModel.from_pretrained(make(), str(tmp_path / "ours"))
    assert_same(loaded(tokens()).logits, expected)
    theirs, ours = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    along = {key for key in theirs if key.endswith("base_layer.weight")}  # peft writes the untouched embedding too
    assert ours.keys() == theirs.keys() - along
    assert all(same_bits(ours[key], theirs[key]) for key in ours)


@every_row
def test_a_configuration_works_unchanged(make, config, tmp_path):
    saved(make, lora(config), tmp_path)
    model, loaded = make(), make()
    hf.inject(model, tmp_path / "adapter_config.json")
    assert_same(model(tokens()).logits, make()(tokens()).logits)
    hf.load(loaded, tmp_path)
    places = lambda model: [(at, type(part).__name__, part.config) for at, _, part in peftlib.adapters(model)]  # noqa: E731
    assert places(model) == places(loaded)


def test_an_embedding_that_was_trained_beside_is_kept(tmp_path):
    """peft writes the embedding under a pair along; where it is not the model's own, it counts."""
    make = lambda: llama()  # noqa: E731
    with quiet():
        model = peft.get_peft_model(make(), lora({"target_modules": ["embed_tokens"]}))
        shifted([model.base_model.model.model.embed_tokens.base_layer.weight])
        model.eval().save_pretrained(tmp_path / "theirs")
    expected, ours = model(tokens()).logits, make()
    hf.load(ours, tmp_path / "theirs")
    assert_same(ours(tokens()).logits, expected)
    hf.save(ours, tmp_path / "ours", task_type="CAUSAL_LM")
    with quiet():
        assert_same(peft.PeftModel.from_pretrained(make(), str(tmp_path / "ours"))(tokens()).logits, expected)


def test_only_the_rows_of_new_tokens_train(tmp_path):
    saved(llama, lora(ROWS["new tokens"][1]), tmp_path)
    model = llama()
    hf.load(model, tmp_path)
    model(torch.tensor([[49, 2, 3]])).logits.square().sum().backward()
    (rows,) = (part for at, _, part in peftlib.adapters(model) if at.endswith("embed_tokens"))
    assert rows.own.weight.shape == (3, 32)
    assert rows.own.weight.grad.abs().amax(1).bool().tolist() == [False, True, True]
    assert model.model.embed_tokens.weight.grad is None


PREFIXES = {"llama": llama, "grouped queries and norms": qwen3, "part of each key": neox, "scaled": yarn}


@feature("HF peft: prefix tuning, plain and projected", "Prefix")
@pytest.mark.parametrize("make", PREFIXES.values(), ids=PREFIXES)
@pytest.mark.parametrize("projected", [False, True], ids=["plain", "projected"])
def test_a_prefix_computes_the_same_though_peft_counts_its_positions(make, projected, tmp_path):
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=projected, encoder_hidden_size=6
    )
    expected = saved(make, config, tmp_path / "theirs")
    model = make()
    hf.load(model, tmp_path / "theirs")
    assert_same(model(tokens()).logits, expected)
    assert (make()(tokens()).logits - expected).abs().max() > 1e-2
    hf.save(model, tmp_path / "ours")
    with quiet():  # peft calls with the name that a cache had up to transformers 5.23
        read_by_peft = peft.PeftModel.from_pretrained(make(), str(tmp_path / "ours"))(tokens()).logits
    assert_same(read_by_peft, expected)
    theirs, ours = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert ours.keys() == theirs.keys() == {"prompt_embeddings"}
    # Two rotations of each key, in float32.
    assert (ours["prompt_embeddings"] - theirs["prompt_embeddings"]).abs().max() < 4 * CLOSE


def test_a_prefix_is_refused_where_positions_are_learned(tmp_path):
    saved(gpt2, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5), tmp_path)
    with refused(None, "GPT2LMHeadModel", "prefix"):
        hf.load(gpt2(), tmp_path)


def test_a_prefix_configuration_works_unchanged():
    model = llama()
    hf.inject(model, {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4, "task_type": "CAUSAL_LM"})
    kinds = [(type(part).__name__, part.length) for _, _, part in peftlib.adapters(model)]
    assert kinds == [("Prefix", 4)] * 3


def vocabulary() -> Any:
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB")


def encoded() -> Any:
    return peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8)


@feature("HF peft: prompt tuning, and what P-tuning gives", "Prompt")
@pytest.mark.parametrize("make", [llama, gpt2, qwen3])
@pytest.mark.parametrize("config", [vocabulary, encoded], ids=["prompt tuning", "p-tuning"])
def test_a_prompt_computes_the_same_at_the_tokens_of_the_text(make, config, tmp_path):
    """peft gives the outputs at the prompt too."""
    expected = saved(make, config(), tmp_path / "theirs")[:, 4:]
    model = make()
    assert hf.load(model, tmp_path / "theirs") == [""]
    assert_same(model(tokens()).logits, expected)
    assert (make()(tokens()).logits - expected).abs().max() > 1e-2
    hf.save(model, tmp_path / "ours")
    with quiet():
        loaded = peft.PeftModel.from_pretrained(make(), str(tmp_path / "ours"))
    assert_same(loaded(tokens()).logits[:, 4:], expected)
    theirs, ours = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    assert same_bits(ours["prompt_embeddings"], theirs["prompt_embeddings"])


def test_a_prompt_configuration_works_unchanged():
    model = llama()
    hf.inject(model, vocabulary().to_dict())
    ((_, _, part),) = peftlib.adapters(model)
    assert part.prompt.shape == (4, 32)
    assert part.config["init"] == "vocabulary"
    with refused(None, "P_TUNING"):
        hf.inject(llama(), encoded().to_dict())


def test_prompts_and_prefixes_of_another_model_or_beside_others_are_refused(tmp_path):
    saved(llama, vocabulary(), tmp_path / "prompt")
    with refused(None, "prompt_embeddings", "[4, 32]", "[4, 16]"):
        hf.load(seeded(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | {"hidden_size": 16}))),
                tmp_path / "prompt")  # fmt: skip
    model = llama()
    peftlib.inject(model, "self_attn", peftlib.Prefix, length=3)
    peftlib.inject(model, "q_proj", peftlib.LoRA)
    with refused(None, "prefix", "gate", "3"):
        hf.save(model, tmp_path / "out")
    gated = llama()
    peftlib.inject(gated, "self_attn", peftlib.Prefix, length=3, gate=True)
    with refused(None, "prefix", "gate"):
        hf.save(gated, tmp_path / "out")

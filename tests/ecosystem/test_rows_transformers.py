"""Rows in models of transformers: what each row generates is what it generates alone, with beams and padding too."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import peftlib
from peftlib import IA3, AdapterError, Bottleneck, DoRA, LoRA
from support.helpers import moved

ROWS: list[Any] = ["lora", None, "mixed", "dora", "lora", ("lora", "mixed")]


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).double().eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=None, pad_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).double().eval()


def t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=61, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).double().eval()


def whisper() -> Any:
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=61, d_model=16, num_mel_bins=8, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=24,
        encoder_attention_heads=2, decoder_attention_heads=2, decoder_ffn_dim=24, max_source_positions=6,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=None, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config).double().eval()


FAMILIES = {
    llama: (["q_proj", "down_proj"], ["v_proj", "mlp"], "o_proj"),
    gpt2: (["c_attn", "mlp.c_proj"], ["c_fc", "mlp"], "attn.c_proj"),
    t5: (["q", "wo"], ["v", "DenseReluDense"], "o"),
    whisper: (["q_proj", "fc2"], ["v_proj", "fc1"], "out_proj"),
}


def adapted(make: Any) -> Any:
    model = make()
    lora, mixed, dora = FAMILIES[make]
    peftlib.inject(model, lora, LoRA, rank=2, alpha=16.0, name="lora")
    peftlib.inject(model, lora, LoRA, rank=3, alpha=9.0, name="mixed")
    peftlib.inject(model, mixed[0], IA3, name="mixed")
    peftlib.inject(model, mixed[1], Bottleneck, width=4, dim=24 if mixed[1] == "fc1" else 16, name="mixed")
    peftlib.inject(model, dora, DoRA, rank=2, name="dora")
    return moved(model, size=0.5)


def prompts() -> tuple[Tensor, Tensor]:
    """Left-padded to one length."""
    tokens, mask = torch.randint(2, 61, (len(ROWS), 6)), torch.ones(len(ROWS), 6, dtype=torch.long)
    for row, padding in enumerate((0, 2, 1, 0, 4, 3)):
        tokens[row, :padding] = mask[row, :padding] = 0
    return tokens, mask


def generate(model: Any, tokens: Tensor, mask: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    """Of a model of sound, each row hears what its tokens say."""
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask}
    if model.main_input_name == "input_features":
        drawn = torch.Generator().manual_seed(1)
        inputs = {"input_features": torch.randn(61, 8, 12, dtype=torch.float64, generator=drawn)[tokens].sum(1)}
    out = transformers.GenerationMixin.generate(
        model, **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True, **how
    )
    return out.sequences, torch.stack(out.logits, 1)


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("beams", [1, 3])
def test_each_row_generates_what_it_generates_alone(make, beams):
    model = adapted(make)
    tokens, mask = prompts()
    with peftlib.route(model, ROWS):
        sequences, logits = generate(model, tokens, mask, num_beams=beams)
    others = set()
    for row, choice in enumerate(ROWS):
        with peftlib.activate(model, *((choice,) if isinstance(choice, str) else choice or ())):
            expected, scores = generate(model, tokens[row : row + 1], mask[row : row + 1], num_beams=beams)
        assert torch.equal(sequences[row], expected[0])
        torch.testing.assert_close(logits[row * beams : (row + 1) * beams], scores, rtol=0, atol=1e-10)
        others.add(tuple(expected[0, -5:].tolist()))
    assert len(others) > 2, "the adapters make no difference"


@pytest.mark.parametrize("make", [llama, gpt2], ids=lambda make: make.__name__)
@pytest.mark.parametrize("beams", [1, 3])
def test_rows_with_prefixes_of_other_lengths_share_a_cache(make, beams):
    model, rows = make(), ["a", None, "b", "a", "c", "b"]
    for name, length in {"a": 2, "b": 5, "c": 1}.items():
        peftlib.inject(model, "self_attn" if make is llama else "*.attn", peftlib.Prefix, length=length, name=name)
    moved(model, size=0.5)
    tokens, mask = prompts()
    with peftlib.route(model, rows):
        sequences, logits = generate(model, tokens, mask, num_beams=beams)
    for row, choice in enumerate(rows):
        with peftlib.activate(model, *([] if choice is None else [choice])):
            expected, scores = generate(model, tokens[row : row + 1], mask[row : row + 1], num_beams=beams)
        assert torch.equal(sequences[row], expected[0])
        torch.testing.assert_close(logits[row * beams : (row + 1) * beams], scores, rtol=0, atol=1e-10)


def test_a_module_that_must_run_by_groups_refuses_a_cache_and_runs_without():
    model = llama()
    for name in ("a", "b"):
        peftlib.inject(model, "self_attn", peftlib.Prefix, length=2, gate=True, name=name)
    tokens, mask = prompts()
    tokens, mask = tokens[:2], mask[:2]
    with peftlib.route(model, ["a", "b"]):
        with pytest.raises(AdapterError, match=r"layers\.0\.self_attn"):
            generate(model, tokens, mask)
        sequences, _ = generate(model, tokens, mask, use_cache=False)
    for row, name in enumerate(("a", "b")):
        with peftlib.activate(model, name):
            assert torch.equal(sequences[row], generate(model, tokens[row : row + 1], mask[row : row + 1])[0][0])


def test_a_loss_of_each_group_trains_its_adapter_alone():
    model = adapted(llama)
    tokens, mask = prompts()

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    with peftlib.route(model, ["lora", "mixed", "lora", "dora", "dora", "dora"]):
        logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    found = {}
    for name, rows in {"lora": [0, 2], "mixed": [1], "dora": [3, 4, 5]}.items():
        found[name] = loss(logits[rows], tokens[rows])
    torch.stack([*found.values()]).sum().backward()
    gradients = {name: [p.grad.clone() for p in peftlib.parameters(model, name)] for name in found}
    model.zero_grad()
    for name, rows in {"lora": [0, 2], "mixed": [1], "dora": [3, 4, 5]}.items():
        with peftlib.activate(model, name):
            alone = loss(model(input_ids=tokens[rows], attention_mask=mask[rows]).logits, tokens[rows])
        torch.testing.assert_close(alone, found[name], rtol=0, atol=1e-12)
        expected = torch.autograd.grad(alone, list(peftlib.parameters(model, name)))
        for one, other in zip(gradients[name], expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)

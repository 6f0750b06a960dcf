"""Twelve families of transformers: five groups of unequal size in one batch, adapters of other ranks, scales and types,
give the outputs and the gradients of each group run alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import peftlib
from peftlib import IA3, DoRA, LoRA
from support.helpers import moved

# A row's adapters: groups of 4, 1, 3, 2 and 1 rows, shuffled.
ROWS: list[Any] = [
    "low", None, "scaled", "low", "high", None, "scaled", ("low", "scaled"), "scaled", "low", "low",
]  # fmt: skip
TOKENS = 5  # no other size that a call sees is the number of rows, or of rows times tokens
TEXT = {"vocab_size": 43, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = TEXT | {"intermediate_size": 20, "num_key_value_heads": 1, "max_position_embeddings": 32}


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(2, 43, (len(ROWS), TOKENS))}


def both_sides() -> dict[str, Tensor]:
    return {**tokens(), "decoder_input_ids": torch.randint(2, 43, (len(ROWS), 3))}


def pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(len(ROWS), 3, 8, 8, dtype=torch.float64)}


def sound() -> dict[str, Tensor]:
    features = torch.randn(len(ROWS), 8, 12, dtype=torch.float64)
    return {"input_features": features, "decoder_input_ids": torch.randint(2, 43, (len(ROWS), 3))}


Make = Callable[[], Any]
FAMILIES: dict[str, tuple[Make, Callable[[], dict[str, Tensor]]]] = {
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER)), tokens),
    "gpt2": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=43, n_embd=24, n_layer=2, n_head=2)), tokens),
    "bert": (lambda: tf.BertModel(tf.BertConfig(**TEXT, intermediate_size=20)), tokens),
    "roberta": (lambda: tf.RobertaModel(tf.RobertaConfig(**TEXT, intermediate_size=20)), tokens),
    "t5": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=43, d_model=24, d_kv=6, d_ff=20, num_layers=2, num_heads=4)
        ),
        both_sides,
    ),
    "whisper": (
        lambda: tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(
                vocab_size=43, d_model=24, num_mel_bins=8, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=20,
                encoder_attention_heads=2, decoder_attention_heads=2, decoder_ffn_dim=20, max_source_positions=6,
                max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1,
            )
        ),
        sound,
    ),
    "vit": (
        lambda: tf.ViTModel(
            tf.ViTConfig(
                hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, image_size=8,
                patch_size=4,
            )
        ),
        pixels,
    ),
    "mamba2": (
        lambda: tf.Mamba2ForCausalLM(
            tf.Mamba2Config(
                vocab_size=43, hidden_size=24, num_hidden_layers=2, state_size=8, num_heads=6, head_dim=8, n_groups=1,
                chunk_size=4,
            )
        ),
        tokens,
    ),
    "qwen3-moe": (
        lambda: tf.Qwen3MoeForCausalLM(
            tf.Qwen3MoeConfig(
                **DECODER, head_dim=12, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
                decoder_sparse_step=1,
            )
        ),
        tokens,
    ),
    "opt": (
        lambda: tf.OPTForCausalLM(tf.OPTConfig(**TEXT, ffn_dim=20, word_embed_proj_dim=24, max_position_embeddings=32)),
        tokens,
    ),
    "gpt-neox": (
        lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**TEXT, intermediate_size=20, max_position_embeddings=32)),
        tokens,
    ),
    "bloom": (lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=43, hidden_size=24, n_layer=2, n_head=2)), tokens),
}  # fmt: skip
FAST = ("llama", "whisper", "qwen3-moe")


def adapted(family: str) -> Any:
    """LoRA of ranks 2 and 5 and of other scales on all that is linear, and DoRA and IA3 on half of it."""
    torch.manual_seed(0)
    model = FAMILIES[family][0]()
    with torch.no_grad():  # initial weights are so small that attention would not see them
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model = model.double().eval()
    if family == "qwen3-moe":
        model.set_experts_implementation("eager")  # torch's grouped product has no float64
    heads = ("lm_head", "proj_out", "embed_out")
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, tf.pytorch_utils.Conv1D)) and not name.endswith(heads)
    ]
    peftlib.inject(model, linear, LoRA, rank=2, alpha=16.0, name="low")
    peftlib.inject(model, linear, LoRA, rank=5, alpha=3.0, rank_stabilized=True, name="scaled")
    if family == "qwen3-moe":
        peftlib.inject(model, "*.experts", LoRA, rank=2, alpha=7.0, name="scaled")
    peftlib.inject(model, linear, DoRA, rank=1, alpha=5.0, name="high")
    peftlib.inject(model, linear[::2], IA3, name="high")
    return moved(model, size=0.3)


def floating(output: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 1]


def run(model: Any, given: dict[str, Tensor]) -> list[Tensor]:
    options = {} if "pixel_values" in given else {"use_cache": False}
    return floating(dict(model(**given, **options)))


def loss_of(output: Tensor, rows: list[int]) -> Tensor:
    """Each element times a number of its own, which is the same in the batch and alone."""
    drawn = torch.Generator().manual_seed(len(output.shape))
    weights = torch.randn((len(ROWS), *output.shape[1:]), generator=drawn, dtype=output.dtype)
    return (output * weights[rows]).sum()


def difference(one: Tensor, other: Tensor) -> float:
    """Relative to the largest element."""
    return ((one - other).abs().max() / other.abs().max().clamp(min=1.0)).item()


@pytest.mark.parametrize(
    "family", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in FAST)]
)
def test_outputs_and_gradients_of_each_group_are_those_of_its_run_alone(family):
    model, given = adapted(family), FAMILIES[family][1]()
    trained = {
        f"{host}:{name}:{key}": p for host, name, a in peftlib.adapters(model) for key, p in a.named_parameters()
    }
    for parameter in trained.values():
        parameter.requires_grad_()
    groups = {choice: [row for row, other in enumerate(ROWS) if other == choice] for choice in dict.fromkeys(ROWS)}
    assert sorted(map(len, groups.values())) == [1, 1, 2, 3, 4]
    with peftlib.route(model, ROWS):
        together = run(model, given)
    together = [output for output in together if len(output) == len(ROWS)]
    assert together
    total = torch.stack([loss_of(output, [*range(len(ROWS))]) for output in together]).sum()
    found = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    sums: dict[str, Tensor] = {}
    for choice, rows in groups.items():
        with peftlib.activate(model, *((choice,) if isinstance(choice, str) else choice or ())):
            alone = run(model, {key: value[rows] for key, value in given.items()})
        alone = [output for output in alone if len(output) == len(rows)]
        for one, other in zip(together, alone, strict=True):
            assert difference(one[rows], other) <= 1e-12
        if choice is not None:
            loss = torch.stack([loss_of(output, rows) for output in alone]).sum()
            own = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            for key, gradient in zip(trained, own, strict=True):
                if gradient is not None:
                    sums[key] = sums[key] + gradient if key in sums else gradient
    assert {key for key, gradient in zip(trained, found, strict=True) if gradient is not None} == {*sums}
    for key, gradient in zip(trained, found, strict=True):
        if gradient is not None:
            assert difference(gradient, sums[key]) <= 1e-12, key
    assert sum(bool(gradient.any()) for gradient in sums.values()) > 0.8 * len(sums), "what was compared was zero"


def test_accumulated_over_batches_of_other_rows_each_gradient_is_its_own():
    model, given = adapted("llama"), tokens()
    trained = list(peftlib.parameters(model, "low"))
    for parameter in trained:
        parameter.requires_grad_()
    expected = []
    for rows in (ROWS, ROWS[::-1]):
        with peftlib.route(model, rows):
            run(model, given)[0].square().sum().backward()
        own = [row for row, choice in enumerate(rows) if choice == "low" or isinstance(choice, tuple)]
        for row in own:
            choice = rows[row]
            with peftlib.activate(model, *((choice,) if isinstance(choice, str) else choice)):
                loss = run(model, {"input_ids": given["input_ids"][row : row + 1]})[0].square().sum()
            expected.append(torch.autograd.grad(loss, trained))
    for at, parameter in enumerate(trained):
        assert difference(parameter.grad, torch.stack([own[at] for own in expected]).sum(0)) <= 1e-12


def test_under_autocast_each_row_is_what_it_is_alone():
    """In bfloat16: a product of other size sums in another order, and is rounded to 8 bits after each layer."""
    model, given = adapted("llama").float(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        with peftlib.route(model, ROWS):
            (logits,) = run(model, given)
        for row, choice in enumerate(ROWS):
            with peftlib.activate(model, *((choice,) if isinstance(choice, str) else choice or ())):
                (alone,) = run(model, {"input_ids": given["input_ids"][row : row + 1]})
            assert logits.dtype == alone.dtype
            assert difference(logits[row].float(), alone[0].float()) <= 8 * torch.finfo(torch.bfloat16).eps

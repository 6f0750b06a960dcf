"""Twelve families of transformers: five groups of unequal size in one batch, adapters of other ranks, scales and types,
give the outputs and the gradients of each group run alone."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

import peftlib
from peftlib import IA3, Bottleneck, DoRA, Full, LoRA, Prefix, Prompt
from support.helpers import moved

BOTH = ("low", "scaled")
# A row's adapters: groups of 4, 1, 3, 2 and 1 rows, shuffled.
ROWS: list[Any] = [
    "low", None, "scaled", "low", "high", None, "scaled", BOTH, "scaled", "low", "low",
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
FAST = {
    "mixed": ("llama", "whisper", "qwen3-moe"), "LoRA": ("vit",), "DoRA": ("gpt2",), "IA3": ("bert",),
    "Bottleneck": ("t5",), "Prefix": ("llama",), "Prefix, padded": ("gpt2", "whisper"), "Prompt": ("mamba2",),
    "Full": ("opt",),
}  # fmt: skip
# Where a type has no place: no attention, one that is computed in place, no input of embedded tokens.
WITHOUT = {
    "Prefix": ("mamba2", "bloom"),
    "Prefix, padded": ("mamba2", "bloom"),
    "Prompt": ("bert", "roberta", "whisper", "vit"),
}
PROMPTED = {"t5": "encoder"}  # else the whole model
HEADS = ("lm_head", "proj_out", "embed_out")


def names_of(model: Any, is_one: Callable[[str, Any], bool]) -> list[str]:
    return [name for name, module in model.named_modules() if is_one(name, module)]


def linears(model: Any) -> list[str]:
    linear = (torch.nn.Linear, tf.pytorch_utils.Conv1D)
    return names_of(model, lambda name, module: isinstance(module, linear) and not name.endswith(HEADS))


def all_types(model: Any) -> None:
    """LoRA on all that is linear, and DoRA and IA3 in one adapter."""
    peftlib.inject(model, linears(model), LoRA, rank=2, alpha=16.0, name="low")
    peftlib.inject(model, linears(model), LoRA, rank=5, alpha=3.0, rank_stabilized=True, name="scaled")
    if names_of(model, lambda name, _: name.endswith(".experts")):
        peftlib.inject(model, "*.experts", LoRA, rank=2, alpha=7.0, name="scaled")
    peftlib.inject(model, linears(model), DoRA, rank=1, alpha=5.0, name="high")
    peftlib.inject(model, linears(model)[::2], IA3, name="high")


def lora(model: Any) -> None:
    """With convolutions and the embedding of the tokens; that of positions is called once for all rows."""
    convolutions, embedding = (torch.nn.Conv1d, torch.nn.Conv2d), model.get_input_embeddings()
    embedding = embedding if isinstance(embedding, torch.nn.Embedding) else None
    others = names_of(model, lambda _, module: isinstance(module, convolutions) or module is embedding)
    hosts = [name for name in dict.fromkeys([*linears(model), *others]) if not name.endswith("mixer.conv1d")]
    for name, rank, alpha in (("low", 1, 16.0), ("scaled", 2, 3.0), ("high", 3, 6.0)):
        peftlib.inject(model, hosts, LoRA, rank=rank, alpha=alpha, name=name)


def dora(model: Any) -> None:
    for name, rank, alpha in (("low", 1, 16.0), ("scaled", 5, 3.0), ("high", 2, 6.0)):
        peftlib.inject(model, linears(model), DoRA, rank=rank, alpha=alpha, name=name)


def ia3(model: Any) -> None:
    peftlib.inject(model, linears(model), IA3, name="low")
    peftlib.inject(model, linears(model)[::2], IA3, on="input", name="scaled")
    peftlib.inject(model, linears(model)[1::2], IA3, name="scaled")
    peftlib.inject(model, linears(model)[1::2], IA3, name="high")


def bottleneck(model: Any) -> None:
    """On the layers, and on what is linear inside them and called."""
    read = ("mixer.out_proj", "self_attention.dense", "mlp.dense_4h_to_h")
    linear = [name for name in linears(model) if not name.endswith(read)]
    layers = names_of(model, lambda name, _: name.rpartition(".")[2].isdigit())
    layers = [name for name in layers if not any(name.startswith(f"{other}.") for other in layers)]
    for name, width, scale in (("low", 3, 1.0), ("scaled", 3, 0.3)):
        peftlib.inject(model, layers, Bottleneck, width=width, scale=scale, dim=24, axis=-1, name=name)
        peftlib.inject(model, linear, Bottleneck, width=width, scale=scale, name=name)
    config = {"width": 2, "position": "parallel", "norm": "before", "activation": "relu"}
    peftlib.inject(model, linear[::2], Bottleneck, name="high", **config)


def prefix(model: Any) -> None:
    """Of other lengths, and one with a gate."""
    hosts = names_of(model, lambda _, module: module_is_attention(module))
    for name, config in {"low": {"length": 2}, "scaled": {"length": 4}, "high": {"length": 3, "gate": True}}.items():
        peftlib.inject(model, hosts, Prefix, name=name, **config)


def padded_prefix(model: Any) -> None:
    """Of other lengths, in one softmax with the tokens."""
    hosts = names_of(model, lambda _, module: module_is_attention(module))
    for name, length in {"low": 2, "scaled": 4, "high": 3, "both": 4}.items():
        peftlib.inject(model, hosts, Prefix, length=length, name=name)


def module_is_attention(module: Any) -> bool:
    """The innermost, which makes the call."""
    inside = [child for child in module.modules() if child is not module]
    named = "Attention" in type(module).__name__
    return named and not any("Attention" in type(child).__name__ for child in inside)


def prompt(model: Any) -> None:
    place = PROMPTED.get(model.config.model_type, "")
    for name in ("low", "scaled", "high", "base", "both"):
        peftlib.inject(model, lambda path, _: path == place, Prompt, length=3, name=name)
        peftlib.activate(model)


def full(model: Any) -> None:
    """Norms and biases, and layers."""
    norms = names_of(model, lambda _, module: "Norm" in type(module).__name__)
    biased = [name for name in linears(model) if getattr(model.get_submodule(name), "bias", None) is not None]
    for name in ("low", "scaled"):
        peftlib.inject(model, norms, Full, name=name)
        peftlib.activate(model)
        if biased:
            peftlib.inject(model, biased, Full, params="bias", name=name)
            peftlib.activate(model)
    for name, hosts in {"high": linears(model)[::2], "both": [*norms, *linears(model)[1::2]]}.items():
        peftlib.inject(model, hosts, Full, name=name)
        peftlib.activate(model)


TYPES: dict[str, Callable[[Any], None]] = {
    "mixed": all_types, "LoRA": lora, "DoRA": dora, "IA3": ia3, "Bottleneck": bottleneck, "Prefix": prefix,
    "Prefix, padded": padded_prefix,
    "Prompt": prompt, "Full": full,
}  # fmt: skip


def rows_for(kind: str) -> list[Any]:
    """Two copies of one weight have no sum; and prompts of one length alone lie in a common batch."""
    other: dict[Any, str] = {
        "Full": {BOTH: "both"},
        "Prefix, padded": {BOTH: "both"},
        "Prompt": {BOTH: "both", None: "base"},
    }.get(kind, {})
    return [other.get(row, row) for row in ROWS]


def adapted(family: str, kind: str = "mixed") -> Any:
    torch.manual_seed(0)
    model = FAMILIES[family][0]()
    with torch.no_grad():  # initial weights are so small that attention would not see them
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model = model.double().eval()
    if family == "qwen3-moe":
        model.set_experts_implementation("eager")  # torch's grouped product has no float64
    TYPES[kind](model)
    return moved(model, size=0.3)


def floating(output: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 1]


class InDouble(TorchFunctionMode):
    """Norms and Mamba's scan compute in float32 whatever they are given, where a last bit of float64 may become one
    of 1e-7."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args, kwargs = tree_map_only(torch.dtype, _as_double, (args, kwargs or {}))
        return func(*args, **kwargs)


def _as_double(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float32 else dtype


def run(model: Any, given: dict[str, Tensor]) -> list[Tensor]:
    options = {} if "pixel_values" in given else {"use_cache": False}
    in_double = next(model.parameters()).dtype is torch.float64
    with InDouble() if in_double else contextlib.nullcontext():
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
    ("family", "kind"),
    [
        pytest.param(family, kind, marks=() if family in FAST[kind] else pytest.mark.slow)
        for kind in TYPES
        for family in FAMILIES
        if family not in WITHOUT.get(kind, ())
    ],
)
def test_outputs_and_gradients_of_each_group_are_those_of_its_run_alone(family, kind):
    model, given, of = adapted(family, kind), FAMILIES[family][1](), rows_for(kind)
    trained = {
        f"{host}:{name}:{key}": p for host, name, a in peftlib.adapters(model) for key, p in a.named_parameters()
    }
    for parameter in trained.values():
        parameter.requires_grad_()
    groups = {choice: [row for row, other in enumerate(of) if other == choice] for choice in dict.fromkeys(of)}
    assert sorted(map(len, groups.values())) == [1, 1, 2, 3, 4]
    with peftlib.route(model, of):
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

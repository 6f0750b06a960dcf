"""The zoo: small models, each built from a configuration, and what a kind adapts in them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import functional as F

from support.hosts import converted


@dataclass(frozen=True)
class Animal:
    """A model and what it is called with, in keywords; no dropout anywhere, so training draws no random numbers.

    `linears`: weights (LoRA, DoRA, IA3). `blocks`: modules with an output of their own, tensors and tuples
    (Bottleneck). `attention`: what calls attention once (Prefix); none in some. `embedding`: of tokens (Prompt).
    `generates`: it has `generate`, which continues `inputs()`."""

    name: str
    module: Callable[[], nn.Module]
    arguments: Callable[[], dict[str, Any]]
    linears: Any
    blocks: Any
    attention: Any = None
    embedding: Any = None
    head: Any = None
    generates: bool = False
    fast_path: bool = False
    # Keywords of a kind that this model needs, by the kind's name: `{"Bottleneck": {"dim": 16}}`.
    needs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def make(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> Any:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return self.module().to(dtype).eval()

    def inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        with torch.random.fork_rng([]):
            torch.manual_seed(2)
            return converted(self.arguments(), dtype)


class GroupedQueryAttention(nn.Module):
    """Four query heads, two key and value heads, causal; a user's own module around torch's function."""

    def __init__(self, width: int = 16, heads: int = 4, groups: int = 2) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, groups * self.head_dim)
        self.o_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [batch, heads, tokens, head_dim]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        causal = mask is None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class GroupedQueryBlock(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.attention = GroupedQueryAttention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class GroupedQueryModel(nn.Module):
    """A small causal language model; `mask` [batch, 1, tokens, tokens] takes the place of the causal one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(37, 16)
        self.layers = nn.ModuleList(GroupedQueryBlock() for _ in range(2))
        self.head = nn.Linear(16, 37, bias=False)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.Conv2d(8, 12, 3, stride=2, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 2)


_LANGUAGE: dict[str, Any] = {
    "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.3,
}  # fmt: skip
_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def _llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_LANGUAGE, **_SPECIAL))


def _qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**_LANGUAGE, **_SPECIAL, head_dim=8))


def _gemma2() -> nn.Module:
    config = hf.Gemma2Config(**_LANGUAGE, **_SPECIAL, head_dim=8, sliding_window=4, query_pre_attn_scalar=8)
    return hf.Gemma2ForCausalLM(config)


def _gpt2() -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=37, n_embd=16, n_layer=2, n_head=4, n_positions=32, initializer_range=0.3,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **_SPECIAL,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config)


def _bert() -> nn.Module:
    config = hf.BertConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return hf.BertForSequenceClassification(config)


def _t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=37, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def _vit() -> nn.Module:
    config = hf.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4,
        initializer_range=0.3,
    )  # fmt: skip
    return hf.ViTForImageClassification(config)


def _whisper() -> nn.Module:
    config = hf.WhisperConfig(
        vocab_size=37, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=6,
        max_target_positions=24, init_std=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return hf.WhisperForConditionalGeneration(config)


def _tokens(*shape: int) -> Tensor:
    return torch.randint(3, 37, shape)


def _padded(left: bool) -> dict[str, Any]:
    """Three rows of seven tokens, of which the second has two of padding and the third one."""
    tokens, mask = _tokens(3, 7), torch.ones(3, 7, dtype=torch.long)
    for row, count in ((1, 2), (2, 1)):
        at = slice(0, count) if left else slice(7 - count, 7)
        tokens[row, at], mask[row, at] = 0, 0
    return {"input_ids": tokens, "attention_mask": mask}


def _causal() -> dict[str, Any]:
    return {**_padded(left=True), "use_cache": False}


def _right_padded() -> dict[str, Any]:
    """In float64 transformers' eager attention gives NaN where a row sees nothing, as with padding on the left."""
    return {**_padded(left=False), "use_cache": False}


def _translated() -> dict[str, Any]:
    return {**_padded(left=False), "decoder_input_ids": _tokens(3, 4), "use_cache": False}


def _spoken() -> dict[str, Any]:
    return {"input_features": torch.randn(2, 8, 12), "decoder_input_ids": _tokens(2, 4), "use_cache": False}


_DECODER: dict[str, Any] = {
    "linears": ["*_proj"], "blocks": ["layers.?", "self_attn", "mlp", "*norm"], "attention": "self_attn",
    "embedding": "embed_tokens", "head": "lm_head", "generates": True,
}  # fmt: skip

ZOO = [
    Animal("mlp", _mlp, lambda: {"input": torch.randn(5, 6)}, linears=nn.Linear, blocks=["0", "1", "3"], head="5"),
    Animal("cnn", _cnn, lambda: {"input": torch.randn(2, 3, 6, 6)}, linears=[nn.Conv2d, nn.Linear],
           blocks=["0", "1", "3", "4", "6"], head="9"),
    Animal("encoder", _encoder, lambda: {"src": torch.randn(3, 5, 16)},
           linears=["self_attn", "out_proj", "linear1", "linear2"],
           blocks=["layers.0", "self_attn", "linear2", "norm1"], attention="self_attn", head="norm2", fast_path=True),
    Animal("grouped-query", GroupedQueryModel, lambda: {"tokens": _tokens(3, 7)}, linears=["*_proj", "mlp.[02]"],
           blocks=["layers.?", "attention", "mlp", "norm?"], attention="attention", embedding="embedding", head="head",
           needs={"Bottleneck": {"dim": 16}}),
    Animal("llama", _llama, _causal, **_DECODER),
    Animal("qwen3", _qwen3, _causal, **_DECODER),
    Animal("gemma2", _gemma2, _right_padded, **{**_DECODER, "head": "model.norm"}),  # its lm_head is tied
    Animal("gpt2", _gpt2, _causal, linears=["c_attn", "c_proj", "c_fc"], blocks=["h.?", "attn", "mlp"],
           attention="attn", embedding="wte", head="ln_f", generates=True, needs={"Bottleneck": {"dim": 16}}),
    Animal("bert", _bert, lambda: _padded(left=False), linears=["query", "key", "value", "dense"],
           blocks=["layer.?", "attention.self", "attention.output", "encoder"], attention="attention.self",
           embedding="word_embeddings", head="classifier", needs={"Bottleneck": {"dim": 16}}),
    Animal("t5", _t5, _translated, linears=["q", "k", "v", "o", "wi", "wo"],
           blocks=["block.?", "SelfAttention", "EncDecAttention", "DenseReluDense"],
           attention=["SelfAttention", "EncDecAttention"], embedding="encoder.embed_tokens",
           head="final_layer_norm", generates=True, needs={"Bottleneck": {"dim": 16}}),
    Animal("vit", _vit, lambda: {"pixel_values": torch.randn(2, 3, 8, 8)},
           linears=["*_proj", "fc1", "fc2", "projection"], blocks=["layers.?", "attention", "mlp", "projection"],
           attention="attention", head="classifier"),
    Animal("whisper", _whisper, _spoken, linears=["*_proj", "fc1", "fc2", "conv?"],
           blocks=["layers.?", "self_attn", "encoder_attn", "conv1"], attention=["self_attn", "encoder_attn"],
           embedding="embed_tokens", head="decoder.layer_norm", generates=True),
]  # fmt: skip
BY_NAME = {animal.name: animal for animal in ZOO}

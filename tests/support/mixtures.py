"""Small mixtures of experts of transformers."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import Tensor

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 24, "moe_intermediate_size": 16, "vocab_size": 31, "num_experts_per_tok": 2,
    "max_position_embeddings": 32, "pad_token_id": 0, "attn_implementation": "eager",
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 4,
}  # fmt: skip
MODELS: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**SIZES, num_experts=4, decoder_sparse_step=1)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_local_experts=4)),
    "deepseek": lambda: tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**SIZES | LATENT)),
    "gpt_oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(**SIZES, num_local_experts=4, layer_types=["full_attention"] * 2)
    ),
    "llama4": lambda: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(**SIZES | {"num_experts_per_tok": 1}, intermediate_size_mlp=24, num_local_experts=4)
    ),
    "glm4": lambda: tf.Glm4MoeForCausalLM(
        tf.Glm4MoeConfig(**SIZES, n_routed_experts=4, first_k_dense_replace=1, n_group=1, topk_group=1)
    ),
    "qwen2, shared experts": lambda: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(**SIZES, num_experts=4, shared_expert_intermediate_size=12, decoder_sparse_step=1)
    ),
}
TARGETS = {"llama4": "feed_forward.experts"}


def mixture(name: str, how: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for p in model.parameters():  # some start at zero, and a router of zeros has no choice to make
            p.copy_(torch.randn(p.shape) / 4)
    if name != "llama4":
        model.set_experts_implementation(how)
    return model.to(dtype).eval()


def tokens() -> Tensor:
    torch.manual_seed(2)
    return torch.randint(1, 31, (2, 7))


def logits(model: Any) -> Tensor:
    return model(tokens()).logits

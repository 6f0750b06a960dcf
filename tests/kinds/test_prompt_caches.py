"""Generation with a Prompt: cached, each token is that of plain forward passes, whatever the cache is called."""

from typing import Any

import pytest
import torch
import transformers

import peftlib
from peftlib import AdapterError, Prompt

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 37}
MODELS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, intermediate_size=16, num_attention_heads=2)
    ),
    "mamba": lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES, state_size=4)),
    "mamba2": lambda: transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(**SIZES, state_size=4, num_heads=4, head_dim=8, n_groups=1)
    ),
}


def prompted(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.generation_config.eos_token_id = None
    peftlib.inject(model, lambda at, module: at == "", Prompt, length=3, init="normal")
    for parameter in peftlib.parameters(model):
        torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_cached_decoding_equals_plain_forward_passes(name):
    model = prompted(name)
    ids = torch.tensor([[5, 7, 11, 2], [3, 19, 23, 29]])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    with torch.no_grad():
        for scores in found.scores:
            plain = model(ids, use_cache=False).logits[:, -1]
            # fp32: a recurrent state and a scan over all tokens round some hundred operations in another order.
            torch.testing.assert_close(scores, plain, rtol=1e-4, atol=1e-5)
            ids = torch.cat([ids, plain.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found.sequences, ids)


def test_a_cache_under_an_unknown_name_is_refused():
    model = prompted("llama")
    ids = torch.tensor([[5, 7, 11, 2]])
    cache = transformers.DynamicCache(config=model.config)
    with pytest.raises(AdapterError, match="memory"):
        model(ids, memory=cache)

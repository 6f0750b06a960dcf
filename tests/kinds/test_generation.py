"""Generation with a Prompt and with a Prefix: cached, each token is that of plain forward passes, whatever the cache is
called."""

from typing import Any

import pytest
import torch
import transformers

import peftlib
from peftlib import AdapterError, Prefix, Prompt

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 37}
MODELS: dict[str, Any] = {
    "llama": lambda **more: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, intermediate_size=16, num_attention_heads=2, **more)
    ),
    "mamba": lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES, state_size=4)),
    "mamba2": lambda: transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(**SIZES, state_size=4, num_heads=4, head_dim=8, n_groups=1)
    ),
}
# The model, its attention, the modules that are adapted, the adapter type and its arguments.
CASES: dict[str, tuple[str, dict[str, Any], Any, Any, dict[str, Any]]] = {
    **{f"prompt-{name}": (name, {}, lambda at, _: at == "", Prompt, {}) for name in MODELS},
    **{
        f"prefix-{implementation}-{'gated' if gate else 'joint'}": (
            "llama", {"attn_implementation": implementation}, "*.self_attn", Prefix, {"gate": gate}
        )
        for implementation in ("eager", "sdpa") for gate in (False, True)
    },
}  # fmt: skip


def adapted(case: str) -> Any:
    name, options, targets, kind, config = CASES[case]
    torch.manual_seed(0)
    model = MODELS[name](**options).eval()
    model.generation_config.eos_token_id = None
    peftlib.inject(model, targets, kind, length=3, **config)
    for parameter in peftlib.parameters(model):
        torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("case", CASES)
def test_cached_decoding_equals_plain_forward_passes(case):
    model = adapted(case)
    ids = torch.tensor([[5, 7, 11, 2], [3, 19, 23, 29]])
    with torch.no_grad(), peftlib.activate(model):
        base = model(ids, use_cache=False).logits[:, -1]
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    assert not torch.allclose(found.scores[0], base, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        for scores in found.scores:
            plain = model(ids, use_cache=False).logits[:, -1]
            # fp32: a recurrent state and a scan over all tokens round some hundred operations in another order.
            torch.testing.assert_close(scores, plain, rtol=1e-4, atol=1e-5)
            ids = torch.cat([ids, plain.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found.sequences, ids)


@pytest.mark.parametrize("case", [case for case in CASES if "mamba" not in case])
def test_a_cache_that_is_handed_on_equals_one_forward_pass(case):
    """As loops of one's own do it, under the keyword and in the field that this transformers has."""
    model = adapted(case)
    ids = torch.tensor([[5, 7, 11, 2, 13]])
    with torch.no_grad():
        first = model(ids[:, :3], use_cache=True)
        (key,) = [name for name, item in first.items() if isinstance(item, transformers.Cache)]
        second = model(ids[:, 3:], use_cache=True, **{key: first[key]})
        whole = model(ids, use_cache=False)
    torch.testing.assert_close(second.logits, whole.logits[:, 3:], rtol=1e-4, atol=1e-5)


def test_a_cache_under_an_unknown_name_is_refused():
    model = adapted("prompt-llama")
    ids = torch.tensor([[5, 7, 11, 2]])
    cache = transformers.DynamicCache(config=model.config)
    with pytest.raises(AdapterError, match="memory"):
        model(ids, memory=cache)

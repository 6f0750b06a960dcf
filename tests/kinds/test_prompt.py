"""Prompt against what it stands for: the base, given longer embeddings, masks, positions and labels by hand."""

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import peftlib
from peftlib import Prompt
from support.refusals import refused
from support.zoo import BY_NAME, GroupedQueryModel

DIGITS = 1e-10
LENGTH = 3
LANGUAGE = ["llama", "qwen3", "gemma2", "gpt2"]


def prompted(animal: Any, **config: Any) -> tuple[Any, Tensor]:
    """A model with a prompt, and a leaf of its own for the reference."""
    model = animal.make(torch.float64)
    peftlib.inject(model, type(model), Prompt, **{"length": LENGTH, **config})
    return model, vectors(model).detach().clone().requires_grad_()


def vectors(model: nn.Module) -> Tensor:
    (own,) = peftlib.parameters(model)
    return own


def in_front(own: Tensor, embedded: Tensor) -> Tensor:
    return torch.cat([own.expand(len(embedded), -1, -1), embedded], 1)


def ones_in_front(mask: Tensor) -> Tensor:
    return torch.cat([torch.ones(len(mask), LENGTH, dtype=mask.dtype), mask], 1)


def assert_equal(found: Tensor, model: nn.Module, expected: Tensor, own: Tensor) -> None:
    torch.manual_seed(9)
    toward = torch.randn(expected.shape, dtype=expected.dtype)
    (gradient,) = torch.autograd.grad((found * toward).sum(), vectors(model))
    (exact,) = torch.autograd.grad((expected * toward).sum(), own)
    assert exact.abs().max() > 0
    assert (found - expected).abs().max() <= DIGITS * max(1.0, expected.abs().max().item())
    assert (gradient - exact).abs().max() <= DIGITS * max(1.0, exact.abs().max().item())


def right_padded(animal: Any) -> dict[str, Any]:
    """As float64 wants it: in eager attention a row that sees nothing gives NaN, with or without a prompt."""
    tokens = animal.inputs(torch.float64)["input_ids"].clamp(min=3)
    mask = torch.ones_like(tokens)
    mask[1, -2:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


@pytest.mark.parametrize("name", LANGUAGE)
@pytest.mark.parametrize("given", ["tokens", "vectors", "positional"])
def test_a_language_model_equals_the_base_on_longer_embeddings(name, given):
    animal = BY_NAME[name]
    model, own = prompted(animal)
    base, inputs = animal.make(torch.float64), right_padded(animal)
    embedded = base.get_input_embeddings()(inputs["input_ids"])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    expected = base(
        inputs_embeds=in_front(own, embedded),
        attention_mask=ones_in_front(inputs["attention_mask"]),
        labels=torch.cat([torch.full((len(labels), LENGTH), -100), labels], 1),
        output_hidden_states=True,
    )
    if given == "vectors":
        found = model(**{**inputs, "input_ids": None}, inputs_embeds=embedded, labels=labels, output_hidden_states=True)
    elif given == "positional" and name != "gpt2":
        found = model(*inputs.values(), labels=labels, output_hidden_states=True)
    else:
        found = model(**inputs, labels=labels, output_hidden_states=True)
    assert type(found) is type(expected)
    assert found.logits.shape[1] == inputs["input_ids"].shape[1]
    assert_equal(found.logits, model, expected.logits[:, LENGTH:], own)
    found = model(**inputs, labels=labels)
    expected = base(
        inputs_embeds=in_front(own, embedded),
        attention_mask=ones_in_front(inputs["attention_mask"]),
        labels=torch.cat([torch.full((len(labels), LENGTH), -100), labels], 1),
    )
    assert_equal(found.loss, model, expected.loss, own)


def test_hidden_states_and_attentions_are_those_of_the_tokens():
    animal = BY_NAME["llama"]
    model, own = prompted(animal)
    base, inputs = animal.make(torch.float64), right_padded(animal)
    for one in (model, base):
        one.config._attn_implementation = "eager"
    more = {"output_hidden_states": True, "output_attentions": True}
    embedded = base.get_input_embeddings()(inputs["input_ids"])
    expected = base(
        inputs_embeds=in_front(own, embedded), attention_mask=ones_in_front(inputs["attention_mask"]), **more
    )
    found = model(**inputs, **more)
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(one, other[:, LENGTH:])
    for one, other in zip(found.attentions, expected.attentions, strict=True):
        assert torch.equal(one, other[..., LENGTH:, LENGTH:])


@pytest.mark.parametrize("keep", [1, 2, 9, torch.tensor([0, 4])], ids=["one", "two", "more than tokens", "indices"])
def test_logits_to_keep_count_the_tokens(keep):
    animal = BY_NAME["llama"]
    model, _ = prompted(animal)
    inputs = right_padded(animal)
    whole = model(**inputs).logits
    kept = model(**inputs, logits_to_keep=keep).logits
    assert torch.allclose(kept, whole[:, -keep:] if isinstance(keep, int) else whole[:, keep], rtol=0, atol=DIGITS)


@pytest.mark.parametrize("target", [hf.LlamaForCausalLM, hf.LlamaModel])
def test_the_model_without_its_head_takes_a_prompt_too(target):
    animal, inputs = BY_NAME["llama"], right_padded(BY_NAME["llama"])
    model, base = animal.make(torch.float64), animal.make(torch.float64)
    peftlib.inject(model, target, Prompt, length=LENGTH)
    own = vectors(model).detach().clone().requires_grad_()
    embedded = base.get_input_embeddings()(inputs["input_ids"])
    expected = base(inputs_embeds=in_front(own, embedded), attention_mask=ones_in_front(inputs["attention_mask"]))
    assert_equal(model(**inputs).logits, model, expected.logits[:, LENGTH:], own)


@pytest.mark.parametrize("name", LANGUAGE)
def test_generating_with_and_without_a_cache_gives_the_same_tokens(name, monkeypatch):
    # eager functions of transformers compute their softmax in float32, whatever the model's dtype
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda scores, dim, dtype=None: scores.softmax(dim))
    animal = BY_NAME[name]
    model, _ = prompted(animal)
    tokens = right_padded(animal)["input_ids"]
    tokens[1, :2] = 0
    inputs = {"input_ids": tokens, "attention_mask": (tokens != 0).long()}
    how = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(**inputs, **how, use_cache=True)
    without = model.generate(**inputs, **how, use_cache=False)
    with peftlib.activate(model):
        base = model.generate(**inputs, **how, use_cache=True)
    assert torch.equal(cached.sequences, without.sequences)
    assert not torch.equal(cached.logits[0], base.logits[0])
    for one, other in zip(cached.logits, without.logits, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-9)


def test_rows_padded_on_the_left_generate_what_each_generates_alone():
    model, _ = prompted(BY_NAME["llama"])
    tokens = right_padded(BY_NAME["llama"])["input_ids"]
    tokens[1, :2] = 0
    mask = (tokens != 0).long()
    together = model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for row in range(len(tokens)):
        one = tokens[row][mask[row].bool()][None]
        alone = model.generate(input_ids=one, attention_mask=one > 0, max_new_tokens=6, do_sample=False)
        assert torch.equal(together[row, 7:], alone[0, one.shape[1] :])


def test_encoders_that_return_a_row_for_each_token():
    config = hf.BertConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(1)
    model = hf.BertForTokenClassification(config).double()
    base = hf.BertForTokenClassification(config).double()
    base.load_state_dict(model.state_dict())
    peftlib.inject(model, hf.BertForTokenClassification, Prompt, length=LENGTH)
    own = vectors(model).detach().clone().requires_grad_()
    inputs = right_padded(BY_NAME["llama"])
    kinds = torch.zeros_like(inputs["input_ids"])
    kinds[:, 4:] = 1
    expected = base(
        inputs_embeds=in_front(own, base.get_input_embeddings()(inputs["input_ids"])),
        attention_mask=ones_in_front(inputs["attention_mask"]),
        token_type_ids=torch.cat([kinds.new_zeros(3, LENGTH), kinds], 1),
    )
    assert_equal(model(**inputs, token_type_ids=kinds).logits, model, expected.logits[:, LENGTH:], own)


def test_an_encoder_of_t5_gives_its_decoder_the_states_of_the_tokens():
    animal = BY_NAME["t5"]
    model, base = animal.make(torch.float64), animal.make(torch.float64)
    peftlib.inject(model, "encoder", Prompt, length=LENGTH)
    own = vectors(model).detach().clone().requires_grad_()
    inputs = animal.inputs(torch.float64)
    states = base.encoder(
        inputs_embeds=in_front(own, base.shared(inputs["input_ids"])),
        attention_mask=ones_in_front(inputs["attention_mask"]),
    ).last_hidden_state[:, LENGTH:]
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    assert_equal(model(**inputs).logits, model, base(encoder_outputs=(states,), **rest).logits, own)


def test_an_embedding_of_one_s_own_model_gives_longer_sequences():
    animal = BY_NAME["grouped-query"]
    model, base = animal.make(torch.float64), animal.make(torch.float64)
    peftlib.inject(model, "embedding", Prompt, length=LENGTH)
    own = vectors(model).detach().clone().requires_grad_()
    tokens = animal.inputs()["tokens"]
    x = in_front(own, base.embedding(tokens))
    for layer in base.layers:
        x = layer(x)
    assert_equal(model(tokens), model, base.head(x), own)


def test_what_it_starts_from():
    model = GroupedQueryModel()
    weight = model.embedding.weight
    peftlib.inject(model, "embedding", Prompt, length=5, init=[4, 9])
    assert torch.equal(vectors(model), weight[[4, 9, 4, 9, 4]])
    peftlib.eject(model)
    peftlib.inject(model, "embedding", Prompt, length=5, init="vocabulary")
    assert all((weight == row).all(1).any() for row in vectors(model))
    peftlib.eject(model)
    with torch.no_grad():
        weight.mul_(7)
    peftlib.inject(model, "embedding", Prompt, length=4000)
    found = vectors(model).std().item()  # of 64,000 normal draws: off by 1/√(2·64,000) = 0.3 %, six times that allowed
    assert abs(found / weight.std().item() - 1) <= 6 * 0.003


@pytest.mark.parametrize("name", ["llama", "grouped-query"])
def test_compiled_the_results_are_the_same(name):
    torch._dynamo.reset()
    animal = BY_NAME[name]
    model, inputs = animal.make(torch.float64), animal.inputs(torch.float64)
    peftlib.inject(model, type(model) if name == "llama" else "embedding", Prompt, length=LENGTH)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for one in (model, compiled):
        found = one(**inputs)
        found = found if isinstance(found, Tensor) else found.logits
        results.append([found, *torch.autograd.grad(found.square().sum(), [vectors(model)])])
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() <= DIGITS * max(1.0, other.abs().max().item())
    torch._dynamo.reset()


def inputs_of(name: str) -> dict[str, Any]:
    return BY_NAME[name].inputs()


PLACES = {
    "an embedding inside": ("llama", "embed_tokens",
                            ("LlamaForCausalLM", "masks")),
    "no embeddings": ("vit", hf.ViTForImageClassification, ("inputs_embeds", "Prefix")),
    "a linear": ("llama", "lm_head", ("Linear", "inputs_embeds")),
    "two stacks": ("t5", hf.T5ForConditionalGeneration, ("encoder", "decoder")),
}  # fmt: skip


@pytest.mark.parametrize(("name", "target", "names"), PLACES.values(), ids=PLACES)
def test_places_that_are_refused(name, target, names):
    model = BY_NAME[name].make()
    with refused(model, *names):
        peftlib.inject(model, target, Prompt)
    assert not hasattr(model, "adapters")


CALLS = {
    "a pooled output": ("bert", {}, ("logits (3, 2)", "Prefix")),
    "masks of layers": ("llama", {"attention_mask": torch.ones(3, 1, 7, 7).bool()}, ("attention_mask", "(3, 1, 7, 7)")),
    "masks by kind": ("llama", {"attention_mask": {"full_attention": None}}, ("attention_mask", "dict")),
    "other tensors": ("llama", {"token_weights": torch.ones(3, 7)}, ("token_weights",)),
    "other shapes": ("llama", {"position_ids": torch.zeros(3, 3, 7)}, ("position_ids", "(3, 3, 7)")),
    "no names": ("llama", {"return_dict": False}, ("tuple", "return_dict=True")),
    "no tokens": ("llama", {"input_ids": None}, ("input_ids", "inputs_embeds")),
}  # fmt: skip


@pytest.mark.parametrize(("name", "more", "names"), CALLS.values(), ids=CALLS)
def test_calls_that_are_refused(name, more, names):
    model = BY_NAME[name].make()
    peftlib.inject(model, type(model), Prompt, length=LENGTH)
    with refused(model, *names):
        model(**{**inputs_of(name), **more})


class StatesOfLayers:
    """A cache that counts nothing, as xLSTM's."""


def test_a_cache_that_does_not_say_how_many_tokens_it_holds_is_refused():
    model, _ = prompted(BY_NAME["llama"])
    with refused(model, "StatesOfLayers"):
        model(input_ids=torch.tensor([[1, 2]]), past_key_values=StatesOfLayers())


def test_a_cache_that_was_filled_without_the_prompt_is_refused():
    model, _ = prompted(BY_NAME["llama"])
    tokens = torch.arange(3, 10)[None]
    with peftlib.activate(model):
        cache = model(input_ids=tokens, use_cache=True).past_key_values
    with refused(model, "7", "attention_mask", "8", "1"):
        model(input_ids=tokens[:, :1], past_key_values=cache, attention_mask=torch.ones(1, 8))


CONFIGS = {
    "length": ({"length": 0}, ("length=0",)),
    "init": ({"init": "zeros"}, ("init='zeros'",)),
    "no ids": ({"init": []}, ("init=[]",)),
}


@pytest.mark.parametrize(("config", "names"), CONFIGS.values(), ids=CONFIGS)
def test_configurations_that_are_refused(config, names):
    with refused(None, *names):
        peftlib.inject(GroupedQueryModel(), "embedding", Prompt, **config)


def test_it_cannot_be_merged_and_says_so():
    model, _ = prompted(BY_NAME["llama"])
    with refused(model, "merge", "Prompt"):
        peftlib.merge(model)


def test_saved_and_loaded_the_output_is_identical(tmp_path):
    animal = BY_NAME["llama"]
    model, _ = prompted(animal, init="vocabulary")
    peftlib.save(model, tmp_path / "prompt.safetensors")
    fresh = animal.make(torch.float64)
    peftlib.load(fresh, tmp_path / "prompt.safetensors")
    inputs = right_padded(animal)
    assert torch.equal(fresh(**inputs).logits, model(**inputs).logits)
    peftlib.eject(fresh)
    assert torch.equal(fresh(**inputs).logits, animal.make(torch.float64)(**inputs).logits)


class TwoEmbeddings(nn.Module):
    """As Gemma 3n and 4: each layer adds what a second embedding has for the token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.embed_tokens_per_layer = nn.Embedding(5, 4), nn.Embedding(5, 4)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Tensor:
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds


def test_a_model_with_a_second_embedding_of_its_tokens_is_refused():
    with refused(model := nn.Sequential(TwoEmbeddings()), "TwoEmbeddings", "embed_tokens_per_layer"):
        peftlib.inject(model, "0", peftlib.Prompt, length=2)

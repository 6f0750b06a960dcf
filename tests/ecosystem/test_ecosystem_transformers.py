"""transformers with every kind: Trainer, generate, pipelines, checkpoints of the model, gradient checkpointing."""

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler

import peftlib
from support.ecosystem import (
    Column,
    adapter_state,
    base_state,
    close,
    every_kind,
    feature,
    gradients,
    llama,
    moved,
    put,
    refused,
    same,
    tokens,
)
from support.helpers import checkpoint_activations
from support.refusals import refused as named_refusal
from support.zoo import BY_NAME

STEPS, BATCH = 6, 4


class Rows(Dataset[dict[str, Tensor]]):
    """One batch, again at each step, so that the loss falls; the labels are the tokens, as for a language model."""

    def __init__(self) -> None:
        self.tokens = tokens(BATCH, 7).repeat(STEPS, 1)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[at], "labels": self.tokens[at]}


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset or self.train_dataset)


@pytest.fixture
def quiet() -> Iterator[None]:
    """The libraries warn of their own affairs: pinned memory, missing model cards."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trained(model: Any, folder: Path, resume: str | None = None, **more: Any) -> list[float]:
    """Runs the Trainer; the loss of each step."""
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=0.02, seed=3,
        lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.0, optim="adamw_torch", use_cpu=True,
        report_to=[], disable_tqdm=True, logging_steps=1, **{"save_strategy": "no", **more},
    )  # fmt: skip
    trainer = InOrder(model=model, args=args, train_dataset=Rows())
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_hand(model: Any) -> list[float]:
    """The same in a plain loop."""
    optimizer, losses = torch.optim.AdamW(peftlib.parameters(model), lr=0.02, weight_decay=0.0), []
    for batch in Rows().tokens.split(BATCH):
        loss = model(batch, labels=batch, num_items_in_batch=torch.tensor(batch[:, 1:].numel())).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def bits(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in state.items()}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(tokens()).logits


# Trainer


@feature("Trainer: the run of a plain loop, to the bit")
@every_kind
def test_the_trainer_trains_what_a_plain_loop_trains(column, tmp_path, quiet):
    model, expected = llama(column), llama(column).train()
    base = bits(base_state(model))
    found, losses = trained(model, tmp_path), by_hand(expected)
    assert losses[-1] < losses[0]
    assert found == losses
    assert same(adapter_state(model), adapter_state(expected))
    assert same(base_state(model), base)


@feature("Trainer: a run that was stopped and resumed from its checkpoint is the same run, to the bit")
@every_kind
def test_a_run_of_the_trainer_is_resumed(column, tmp_path, quiet):
    whole, stopped = llama(column), llama(column)
    trained(whole, tmp_path / "whole", save_strategy="steps", save_steps=4)
    put(fresh := llama(), column, "llama")
    trained(fresh, tmp_path / "rest", resume=str(tmp_path / "whole" / "checkpoint-4"))
    assert same(adapter_state(fresh), adapter_state(whole))
    assert not same(adapter_state(stopped), adapter_state(whole))


@feature("Trainer: its checkpoint is the base's, with the adapters beside it")
@every_kind
def test_a_checkpoint_of_the_trainer_is_one_of_the_base(column, tmp_path, quiet):
    """`from_pretrained` finds the base; a model with adapters in it finds all."""
    model = llama(column)
    trained(model, tmp_path, save_strategy="steps", save_steps=STEPS)
    folder = tmp_path / f"checkpoint-{STEPS}"
    state = load_file(folder / "model.safetensors")
    assert {key for key in state if ".adapters." in f".{key}"} == set(adapter_state(model))
    base, report = transformers.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert set(report["unexpected_keys"]) == set(adapter_state(model))
    assert torch.equal(logits(base), logits(llama()))
    put(fresh := llama(), column, "llama")
    fresh.load_state_dict(state)
    assert torch.equal(logits(fresh), logits(model))


class SaveAdapter(transformers.TrainerCallback):
    """As docs/libraries.md shows it."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        peftlib.save(kwargs["model"], f"{args.output_dir}/checkpoint-{state.global_step}/adapter.safetensors")


@feature("Trainer: peftlib.save in each of its checkpoints")
@every_kind
def test_the_adapter_is_saved_into_each_checkpoint(column, tmp_path, quiet):
    model, args = llama(column), {"save_strategy": "steps", "save_steps": 3}
    trainer = InOrder(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=STEPS, per_device_train_batch_size=BATCH, use_cpu=True, report_to=[],
            disable_tqdm=True, **args,
        ),
        train_dataset=Rows(),
        callbacks=[SaveAdapter()],
    )  # fmt: skip
    trainer.train()
    first, last = (llama() for _ in range(2))
    peftlib.load(first, tmp_path / "checkpoint-3" / "adapter.safetensors")
    peftlib.load(last, tmp_path / "checkpoint-6" / "adapter.safetensors")
    assert torch.equal(logits(last), logits(model))
    assert not torch.equal(logits(first), logits(model))


# Generating


def tokenizer() -> Any:
    words = {"<pad>": 0, "<bos>": 1, "<unk>": 2} | {f"w{at}": at for at in range(3, 37)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>", padding_side="left"
    )


def generated(model: Any, **how: Any) -> Tensor:
    torch.manual_seed(11)
    with torch.no_grad():
        return model.generate(tokens(), max_new_tokens=8, pad_token_id=0, **how)


HOW: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
}


@feature("generate: greedy, sampled and with beams, the same tokens with a cache and without")
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@every_kind
def test_generating_with_a_cache_gives_the_same_tokens(column, how):
    model = llama(column)
    found = generated(model, use_cache=True, **how)
    assert found.shape[1] == tokens().shape[1] + 8
    assert torch.equal(found, generated(model, use_cache=False, **how))
    assert not torch.equal(found, generated(llama(), use_cache=True, **how))


@feature("generate: the same tokens merged and unmerged")
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@every_kind
def test_generating_merged_gives_the_same_tokens(column, how, record_property):
    model = llama(column)
    live = generated(model, **how)
    if not column.folds:
        with pytest.raises(peftlib.AdapterError, match=column.name) as error:
            peftlib.merge(model)
        refused(record_property, error)
        return
    with peftlib.merged(model):
        assert torch.equal(generated(model, **how), live)


TEXTS = ["w5 w9 w30", "w7 w7 w12 w20 w3"]


@feature('pipeline("text-generation"), also in batches with padding')
@every_kind
def test_a_pipeline_generates_the_same_text_live_and_merged(column, quiet):
    """In a batch each row gives what it gives alone: 64 roundings do not change which of 37 words is likeliest."""
    model = llama(column)
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer())
    say = lambda **how: [one[0]["generated_text"] for one in pipe(TEXTS, max_new_tokens=6, do_sample=False, **how)]  # noqa: E731
    live = say()
    assert say(batch_size=2) == live
    with peftlib.activate(model):
        assert say() != live
    if column.folds:
        with peftlib.merged(model):
            assert say() == live


# Checkpoints of the model


@feature("save_pretrained after eject(merge=True), from_pretrained")
@every_kind
def test_a_merged_model_is_saved_and_read_as_any_other(column, tmp_path, record_property):
    model = llama(column)
    live = logits(model)
    if not column.folds:
        with pytest.raises(peftlib.AdapterError, match=column.name) as error:
            peftlib.eject(model, merge=True)
        refused(record_property, error)
        return
    peftlib.eject(model, merge=True)
    model.save_pretrained(tmp_path)
    fresh, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert type(fresh) is transformers.LlamaForCausalLM
    assert torch.equal(logits(fresh), logits(model))
    assert close(logits(fresh), live)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@feature("save_pretrained after eject(merge=True) of models with tied weights")
@pytest.mark.parametrize("name", ["gpt2-tied", "t5", "gemma2"])
@pytest.mark.parametrize("kind", [peftlib.LoRA, peftlib.DoRA, peftlib.IA3, peftlib.Full])
def test_tied_weights_stay_tied_through_merge_and_save(kind, name, tmp_path):
    model = tied_model(name)
    animal = BY_NAME[name.removesuffix("-tied")]
    torch.manual_seed(3)
    peftlib.inject(model, animal.linears, kind)
    moved(model)
    peftlib.eject(model, merge=True)
    model.save_pretrained(tmp_path)
    fresh, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert fresh.get_output_embeddings().weight is fresh.get_input_embeddings().weight
    inputs = animal.inputs()
    with torch.no_grad():
        assert torch.equal(fresh.eval()(**inputs).logits, model.eval()(**inputs).logits)
        assert not torch.equal(tied_model(name).eval()(**inputs).logits, model(**inputs).logits)


def tied_model(name: str) -> Any:
    if name != "gpt2-tied":
        return BY_NAME[name].make()
    config = BY_NAME["gpt2"].make().config
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return transformers.GPT2LMHeadModel(config).eval()


# Gradient checkpointing


def step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.train().zero_grad()
    loss = model(tokens(), labels=tokens(), use_cache=False).loss
    loss.backward()
    return loss.detach(), gradients(model)


def adapted(column: Column, order: str, **how: Any) -> Any:
    model = llama()
    if order == "before":
        checkpoint_activations(model, **how)
    put(model, column, "llama")
    if order == "after":
        checkpoint_activations(model, **how)
    return moved(model)


either_order = pytest.mark.parametrize("order", ["before", "after"])


@feature("gradient checkpointing, enabled before inject or after it")
@either_order
@every_kind
def test_checkpointing_gives_the_same_gradients_to_the_bit(column, order):
    model, calls = adapted(column, order, use_reentrant=False), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    found, expected = step(model), step(llama(column))
    assert len(calls) == 2, "the layer was not computed again"
    assert torch.equal(found[0], expected[0])
    assert same(found[1], expected[1])


@feature("gradient checkpointing, reentrant, with enable_input_require_grads")
@either_order
@every_kind
def test_reentrant_checkpointing_gives_the_same_gradients_to_the_bit(column, order):
    model = adapted(column, order, use_reentrant=True)
    model.enable_input_require_grads()
    with warnings.catch_warnings(action="ignore"):
        found, expected = step(model), step(llama(column))
    assert torch.equal(found[0], expected[0])
    assert same(found[1], expected[1])


@feature("gradient checkpointing in the Trainer")
@every_kind
def test_the_trainer_checkpoints(column, tmp_path, quiet):
    model, expected = llama(column), llama(column)
    found = trained(model, tmp_path / "one", gradient_checkpointing=True)
    assert model.is_gradient_checkpointing
    assert found == trained(expected, tmp_path / "other")
    assert same(adapter_state(model), adapter_state(expected))


# Models that change their own weights


def rwkv(blocks: int) -> Any:
    sizes = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": blocks, "intermediate_size": 16}
    return transformers.RwkvModel(transformers.RwkvConfig(**sizes, rescale_every=2))


@pytest.mark.parametrize("target", ["blocks.0.attention.key", "blocks.3.attention", "blocks.3"])
def test_a_model_that_rescales_its_weights_in_eval_is_refused_until_it_does_not(target):
    model = rwkv(blocks=4)
    for put_in in (peftlib.inject, peftlib.plan):
        with named_refusal(model, target, "RwkvModel", "config.rescale_every"):
            put_in(model, target, peftlib.Full)
    model.config.rescale_every = 0
    assert peftlib.inject(model, target, peftlib.Full)
    assert peftlib.inject(rwkv(blocks=2), target.replace("3", "1"), peftlib.Full)


def test_an_adapter_from_a_file_is_refused_where_weights_are_rescaled(tmp_path):
    model, other = rwkv(blocks=4), rwkv(blocks=4)
    model.config.rescale_every = 0
    peftlib.inject(model, "blocks.3.attention.key", peftlib.LoRA, rank=2)
    peftlib.save(model, tmp_path / "adapter.safetensors")
    other.load_state_dict(base_state(model))
    with named_refusal(other, "blocks.3.attention.key", "RwkvModel"):
        peftlib.load(other, tmp_path / "adapter.safetensors")

"""A model that accelerate spreads over devices, memory and disk: its hooks around forwards, before and after inject."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, remove_hook_from_module
from torch import Tensor
from transformers import AutoModelForCausalLM

import peftlib
from support.ecosystem import (
    COLUMNS,
    Column,
    adapter_state,
    every_kind,
    feature,
    gradients,
    llama,
    moved,
    not_applicable,
    put,
    refused,
    same,
    tokens,
)

Spread = Callable[[Any, Path], Any]


def dispatched(model: Any, folder: Path) -> Any:
    return dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


def in_memory(model: Any, folder: Path) -> Any:
    return cpu_offload(model, execution_device=torch.device("cpu"))


def on_disk(model: Any, folder: Path) -> Any:
    disk_offload(model, str(folder / "offloaded"), execution_device=torch.device("cpu"))
    return model


def partly(model: Any, folder: Path) -> Any:
    """The first layer stays; the rest is in memory or on disk between calls."""
    places = {"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "disk"}
    rest = {f"model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")}
    return dispatch_model(model, places | rest, main_device="cpu", offload_dir=str(folder / "rest"), force_hooks=True)


every_spread = pytest.mark.parametrize("spread", [in_memory, on_disk, partly])


def step(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    return loss.detach(), gradients(model)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def check(model: Any, column: Column) -> None:
    """Outputs and gradients are those of a model in one place, and three steps move it as that one."""
    expected = llama(column)
    assert torch.equal(logits(model), logits(expected))
    for one in (model, expected):
        optimizer = torch.optim.AdamW(peftlib.parameters(one), lr=0.01)
        for _ in range(3):
            step(one)
            optimizer.step()
    assert same(gradients(model), gradients(expected))
    assert same(adapter_state(model), adapter_state(expected))
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".adapters." not in f".{key}")


def before(column: Column, spread: Spread, folder: Path) -> Any:
    model = spread(llama(), folder)
    put(model, column, "llama")
    return moved(model)


@feature("device_map: accelerate's hooks, put on before inject")
@every_kind
def test_adapters_go_into_a_dispatched_model(column, tmp_path):
    model = before(column, dispatched, tmp_path)
    check(model, column)
    peftlib.eject(model)
    assert torch.equal(logits(model), logits(llama()))
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(logits(model), logits(llama()))


@feature("device_map: accelerate's hooks, put on after inject")
@every_kind
def test_a_model_with_adapters_is_dispatched(column, tmp_path):
    model = dispatched(llama(column), tmp_path)
    check(model, column)
    peftlib.eject(model)
    assert torch.equal(logits(model), logits(llama()))
    assert not any("Adapted" in str(type(module).__mro__) for module in model.modules())


@feature("device_map: accelerate's hooks, taken off while adapters are in")
@every_kind
@pytest.mark.parametrize("first", ["hook", "inject"])
def test_hooks_may_go_while_adapters_stay(column, first, tmp_path):
    model = before(column, dispatched, tmp_path) if first == "hook" else dispatched(llama(column), tmp_path)
    remove_hook_from_module(model, recurse=True)
    check(model, column)
    peftlib.eject(model)
    assert torch.equal(logits(model), logits(llama()))


@feature("from_pretrained(device_map=...)")
@every_kind
def test_a_model_that_was_loaded_with_a_device_map_is_like_another(column, tmp_path):
    llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    put(model, column, "llama")
    check(moved(model), column)


@feature("cpu_offload, disk_offload, and a device_map with disk in it, before inject: outputs and training")
@every_spread
@every_kind
def test_adapters_train_in_a_model_whose_weights_are_elsewhere(column, spread, tmp_path):
    model = before(column, spread, tmp_path)
    check(model, column)
    assert not peftlib.verify(model, tokens()).problems
    peftlib.eject(model)
    assert torch.equal(logits(model), logits(llama()))


@feature("cpu_offload and disk_offload: save and load")
@every_spread
@every_kind
def test_a_file_goes_into_and_out_of_an_offloaded_model(column, spread, tmp_path):
    model, plain, fresh = before(column, spread, tmp_path), llama(), spread(llama(), tmp_path / "other")
    peftlib.save(model, tmp_path / "adapter.safetensors")
    peftlib.load(plain, tmp_path / "adapter.safetensors")
    peftlib.load(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(logits(plain), logits(llama(column)))
    assert torch.equal(logits(fresh), logits(plain))


@feature("cpu_offload and disk_offload: merge")
@every_spread
@every_kind
def test_weights_that_are_elsewhere_are_not_merged(column, spread, tmp_path, record_property):
    model = before(column, spread, tmp_path)
    expected = logits(model)
    with pytest.raises(peftlib.AdapterError, match="accelerate" if column.folds else column.name) as error:
        peftlib.merge(model)
    assert torch.equal(logits(model), expected)
    refused(record_property, error)


@feature("cpu_offload and disk_offload, after inject")
@pytest.mark.parametrize("spread", [in_memory, on_disk])
@every_kind
def test_offloading_adapters_too_never_goes_wrong_in_silence(column, spread, tmp_path, record_property):
    model, expected = llama(column), logits(llama(column))
    try:
        spread(model, tmp_path)
        assert torch.equal(logits(model), expected)
        assert all("got no gradient" in problem for problem in peftlib.verify(model, tokens()).problems)
        assert not peftlib.verify(model, tokens())
    except (RuntimeError, NotImplementedError) as error:
        assert "meta" in str(error)  # noqa: PT017 (either answer is right)
    why = "accelerate moves the adapters' own weights away too, and what trains is a copy: offload first, then inject"
    not_applicable(record_property, why)


def test_constructing_brings_only_the_embedding_for_a_prompt(tmp_path, monkeypatch):
    """A model may be offloaded because it has no room as a whole."""
    model = on_disk(llama(), tmp_path)
    brought = []
    real = AlignDevicesHook.pre_forward
    monkeypatch.setattr(
        AlignDevicesHook,
        "pre_forward",
        lambda self, module, *args: (brought.append(module), real(self, module, *args))[1],
    )
    peftlib.inject(model, lambda name, module: name == "", peftlib.Prompt, length=2)
    assert brought == [model.model.embed_tokens]


def test_what_was_brought_for_a_constructor_that_fails_is_taken_away(tmp_path):
    model = in_memory(llama(), tmp_path)
    with pytest.raises(peftlib.AdapterError, match="rank"):
        peftlib.inject(model, "q_proj", peftlib.LoRA, rank=0)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_view_of_an_offloaded_model_copies_no_weight(tmp_path):
    model = in_memory(llama(), tmp_path)
    put(model, COLUMNS[0], "llama")
    moved(model)
    face = peftlib.view(model, "default")
    assert torch.equal(logits(face), logits(llama(COLUMNS[0])))
    assert face.lm_head._hf_hook is model.lm_head._hf_hook

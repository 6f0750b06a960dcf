"""What each kind trains in a Llama, in the files of other tools and back: the same tensors, or refused by name."""

import warnings
from typing import Any

import peft
import pytest
import torch

import peftlib
from peftlib import exchange, hf
from support.ecosystem import Column, adapter_state, close, every_kind, feature, llama, refused, same, tokens


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(tokens()).logits


def in_order(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(sorted(state.items()))


@feature("HF peft: every adapter type in a Llama, read by peft itself and read back")
@every_kind
def test_peft_reads_what_each_kind_writes(column, tmp_path, record_property):
    model = llama(column)
    if column.kind is peftlib.Bottleneck:
        with pytest.raises(peftlib.AdapterError) as error:
            hf.save(model, tmp_path, task_type="CAUSAL_LM")
        assert not list(tmp_path.iterdir())
        refused(record_property, error)
        return
    hf.save(model, tmp_path, task_type="CAUSAL_LM")
    with warnings.catch_warnings(action="ignore"):
        theirs = peft.PeftModel.from_pretrained(llama(), str(tmp_path))
    found = logits(theirs)[:, -tokens().shape[1] :]  # peft gives the outputs at the prompt too
    assert close(found, logits(model))
    fresh = llama()
    hf.load(fresh, tmp_path)
    assert close(logits(fresh), logits(model))
    if column.kind is peftlib.Prefix:  # its keys are rotated to peft's positions and back
        assert close(in_order(adapter_state(fresh)), in_order(adapter_state(model)))
        return
    assert same(in_order(adapter_state(fresh)), in_order(adapter_state(model)))


HOLDS = {"kohya": (peftlib.LoRA,), "diffusers": (peftlib.LoRA, peftlib.DoRA)}


def _through_a_file(column: Column, layout: str, tmp_path: Any, record_property: Any) -> None:
    model, path = llama(column), tmp_path / "file.safetensors"
    if column.kind not in HOLDS[layout]:
        with pytest.raises(peftlib.AdapterError, match="no place") as error:
            exchange.save(model, path, layout)
        assert not list(tmp_path.iterdir())
        refused(record_property, error)
        return
    exchange.save(model, path, layout)
    fresh = llama()
    exchange.load(fresh, path, layout)
    assert same(adapter_state(fresh), adapter_state(model))
    assert close(logits(fresh), logits(model))


@feature("kohya: written and read back")
@every_kind
def test_through_kohya_s_file(column, tmp_path, record_property):
    _through_a_file(column, "kohya", tmp_path, record_property)


@feature("diffusers: written and read back")
@every_kind
def test_through_diffusers_file(column, tmp_path, record_property):
    _through_a_file(column, "diffusers", tmp_path, record_property)

"""What another library replaces takes its adapters with it: the next call of ours says so, and the way on is there."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import peftlib
from peftlib import Full, LoRA
from support.helpers import linears, network, tokens
from support.refusals import refused


def adapted() -> Any:
    model = network()
    peftlib.inject(model, ["embedding", "q_proj"], LoRA, rank=2)
    return model


def resized(model: Any) -> None:
    """As transformers' resize_token_embeddings does."""
    model.embedding = nn.Embedding(15, 8)


def quantised(model: Any) -> None:
    """As quantizers do: each plain linear layer inside becomes one of theirs."""
    for layer in model.layers:
        layer.q_proj = nn.Linear(8, 8)


def another_layer(model: Any) -> None:
    model.layers[1] = copy.deepcopy(network().layers[1])


REPLACED = {
    "embedding": (resized, "embedding"),
    "linears": (quantised, "layers.0.q_proj"),
    "a whole layer": (another_layer, "layers.1"),
}
CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "save": lambda model, path: peftlib.save(model, path),
    "parameters": lambda model, path: list(peftlib.parameters(model)),
    "merge": lambda model, path: peftlib.merge(model),
    "merged_state_dict": lambda model, path: list(peftlib.merged_state_dict(model)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("replace", "where"), REPLACED.values(), ids=REPLACED)
def test_a_host_that_was_replaced_is_named_by_the_next_call(replace, where, call, tmp_path):
    model = adapted()
    replace(model)
    with refused(model, where, '"default"'):
        call(model, tmp_path / "adapter.safetensors")
    assert not [*tmp_path.iterdir()]
    assert any(where in problem for problem in peftlib.verify(model, tokens()).problems)


@pytest.mark.parametrize(("replace", "where"), REPLACED.values(), ids=REPLACED)
def test_after_eject_or_another_inject_nothing_is_missing(replace, where):
    model = adapted()
    replace(model)
    peftlib.eject(model)
    assert all(p.requires_grad for p in adapted_base(model))
    peftlib.inject(model, ["embedding", "q_proj"], LoRA, rank=2)
    assert len(list(peftlib.parameters(model))) == 6
    again = adapted()
    replace(again)
    peftlib.inject(again, bare(again), LoRA, rank=2)
    assert len(list(peftlib.parameters(again))) == 6


def test_a_name_that_was_lost_and_put_in_again_is_gone_once_ejected():
    model = adapted()
    peftlib.inject(model, "head", LoRA, rank=2, name="other")
    quantised(model)
    peftlib.inject(model, "q_proj", LoRA, rank=2)
    peftlib.eject(model, "default")
    assert {name for _, name, _ in peftlib.adapters(model)} == {"other"}
    with refused(model, "Network", "'default'"):
        peftlib.activate(model, "default")


def bare(model: Any) -> list[str]:
    """Where an adapter was and is no more."""
    taken = {host for host, _, _ in peftlib.adapters(model)}
    return [name for name in ("embedding", "layers.0.q_proj", "layers.1.q_proj") if name not in taken]


def adapted_base(model: Any) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "adapters" not in name]


def test_where_every_host_was_replaced_eject_unfreezes_what_is_left():
    model = linears(2)
    peftlib.inject(model, "1", LoRA, rank=2)
    model[1] = nn.Linear(model[1].in_features, model[1].out_features)
    with refused(model, "1", '"default"'):
        list(peftlib.parameters(model))
    peftlib.eject(model)
    assert all(p.requires_grad for p in model.parameters())
    with refused(model, "Sequential"):
        list(peftlib.parameters(model))


def test_statistics_that_were_held_are_missed_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    peftlib.inject(model, "0", LoRA, rank=2)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with refused(model, "1", "SyncBatchNorm"):
        list(peftlib.parameters(model))
    peftlib.eject(model)
    assert [name for name, _ in model.named_modules()] == ["", "0", "1"]
    peftlib.inject(model, ["0", "1"], Full)
    assert list(peftlib.parameters(model))


LEFT_OUT = {
    "a part by itself": lambda model: model.layers[0],
    "layers deleted": lambda model: model.layers.__delitem__(0) or model,
    "the last layer deleted": lambda model: model.layers.__delitem__(-1) or model,
    "a layer inserted": lambda model: model.layers.insert(0, copy.deepcopy(network().layers[0])) or model,
    "layers in another order": lambda model: setattr(model, "layers", nn.ModuleList([*model.layers][::-1])) or model,
    "a layer without weights in place": lambda model: model.layers.__setitem__(1, nn.Identity()) or model,
    "a layer wrapped": lambda model: model.layers.__setitem__(1, nn.Sequential(model.layers[1])) or model,
    "a host wrapped": lambda model: setattr(model.layers[0], "q_proj", nn.Sequential(model.layers[0].q_proj)) or model,
    "a copy": copy.deepcopy,
    "a view": peftlib.view,
}


@pytest.mark.parametrize("change", LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_is_changed_on_purpose_raises_no_alarm(change):
    model = adapted()
    assert list(peftlib.parameters(change(model)))


def test_an_embedding_that_grew_in_place_is_named_before_forward():
    model = adapted()
    model.embedding.weight = nn.Parameter(torch.randn(15, 8))
    model.embedding.num_embeddings = 15
    with refused(model, "embedding", "15", "11", '"default"'):
        list(peftlib.parameters(model))

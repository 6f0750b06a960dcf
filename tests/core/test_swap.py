"""Merging takes over a weight's storage where nobody could tell, and writes in place where somebody reads it."""

import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlib
from peftlib import LoRA
from support.helpers import bits, chain, linears, moved, same_bits

pytestmark = pytest.mark.mutants


def adapted(model: Any = None) -> Any:
    model = model or linears()
    peftlib.inject(model, nn.Linear, LoRA, rank=2)
    return moved(model)


def merged_weight(model: Any) -> Tensor:
    return dict(peftlib.merged_state_dict(model))["0.weight"].clone()


def test_the_weight_of_before_is_kept_and_not_copied():
    """At the address where it was it is again; in between nobody reads it there."""
    model = adapted()
    before = model[0].weight.data_ptr()
    peftlib.merge(model)
    assert model[0].weight.data_ptr() != before
    peftlib.unmerge(model)
    assert model[0].weight.data_ptr() == before


@pytest.mark.parametrize("act", ["merge", "unmerge"])
@pytest.mark.parametrize("share", [False, True], ids=["swapped", "in place"])
def test_a_graph_that_was_recorded_before_raises_in_its_backward(act, share):
    model = adapted()
    if share:
        model.share_memory()
    if act == "unmerge":
        peftlib.merge(model)
    x = torch.randn(3, 4, requires_grad=True)
    loss = model(x).sum()
    (peftlib.merge if act == "merge" else peftlib.unmerge)(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


READERS: dict[str, Callable[[Tensor], Any]] = {
    "detached": lambda weight: weight.detach(),
    "transposed": lambda weight: weight.detach().t(),
    "a slice": lambda weight: weight.detach()[1:, :2],
    "numpy": lambda weight: weight.detach().numpy(),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_whoever_looks_at_the_weight_sees_the_merged_one_and_then_the_old_one(reader):
    model = adapted()
    own, expected = bits(torch.as_tensor(reader(model[0].weight))), merged_weight(model)
    eye = reader(model[0].weight)
    peftlib.merge(model)
    assert bits(torch.as_tensor(eye)) == bits(torch.as_tensor(reader(expected)))
    peftlib.unmerge(model)
    assert bits(torch.as_tensor(eye)) == own


def test_whoever_looks_at_the_merged_weight_sees_the_old_one_after_unmerge():
    model = adapted()
    own = bits(model[0].weight)
    peftlib.merge(model)
    eye = model[0].weight.detach()
    peftlib.unmerge(model)
    assert bits(eye) == bits(model[0].weight) == own


def flat() -> Any:
    """All weights are parts of one storage, as optimizers and others lay them out."""
    model, memory = linears(), torch.randn(2 * 20)
    for each, module in zip(memory.split(20), model, strict=True):
        module.weight, module.bias = nn.Parameter(each[:16].view(4, 4)), nn.Parameter(each[16:])
    return model


def of_numpy() -> Any:
    """The memory is not torch's: it may be another process's too."""
    model = linears()
    model[0].weight = nn.Parameter(torch.from_numpy(model[0].weight.detach().numpy().copy()))
    return model


def in_shared_memory() -> Any:
    return linears().share_memory()


@pytest.mark.parametrize("make", [flat, of_numpy, in_shared_memory])
def test_a_weight_that_has_no_storage_to_itself_stays_where_it_is(make):
    model = adapted(make())
    own, address, expected = bits(model[0].weight), model[0].weight.data_ptr(), merged_weight(model)
    peftlib.merge(model)
    assert (same_bits(model[0].weight, expected), model[0].weight.data_ptr()) == (True, address)
    peftlib.unmerge(model)
    assert (bits(model[0].weight), model[0].weight.data_ptr()) == (own, address)


def test_a_model_shared_while_it_is_merged_is_unmerged_in_place():
    model = adapted()
    own = bits(model[0].weight)
    peftlib.merge(model)
    model.share_memory()
    address = model[0].weight.data_ptr()
    peftlib.unmerge(model)
    assert (bits(model[0].weight), model[0].weight.data_ptr()) == (own, address)


def read(weight: Tensor, pipe: Any) -> None:
    """Another process: the weight now, each time it is asked."""
    pipe.send(weight.tolist())
    while pipe.recv():
        pipe.send(weight.tolist())


def test_another_process_with_the_same_memory_reads_the_merged_weight():
    model = adapted(in_shared_memory())
    own, expected = model[0].weight.tolist(), merged_weight(model).tolist()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    other = context.Process(target=read, args=(model[0].weight.detach(), there))
    other.start()
    try:
        assert here.recv() == own
        peftlib.merge(model)
        here.send(True)
        assert here.recv() == expected
        peftlib.unmerge(model)
        here.send(True)
        assert here.recv() == own
    finally:
        here.send(False)
        other.join(timeout=60)


class Held(peftlib.Adapter):
    """Gives tensors that it goes on to hold: a buffer, an attribute, one in a list, one in numpy's memory."""

    def __init__(self, host: Any, how: str = "buffer") -> None:
        super().__init__()
        value = torch.arange(16.0).view(4, 4)
        self.register_buffer("value", value.clone())
        self.how = how
        self.__dict__["kept"] = {
            "attribute": value.clone(),
            "list": [value.clone()],
            "numpy": value.numpy().copy(),
        }

    def fold(self, host: Any) -> dict[str, Tensor]:
        kept: Any = self.__dict__["kept"]
        given = {"buffer": self.value, "attribute": kept["attribute"], "list": kept["list"][0]}
        return {"weight": torch.from_numpy(kept["numpy"]) if self.how == "numpy" else given[self.how]}


@pytest.mark.parametrize("how", ["buffer", "attribute", "list", "numpy"])
def test_what_an_adapter_goes_on_to_hold_never_becomes_the_weight(how):
    model = chain(nn.Linear(4, 4))
    peftlib.inject(model, "0", Held, how=how)
    peftlib.merge(model)
    with torch.no_grad():
        model[0].weight.zero_()
    peftlib.unmerge(model)
    assert merged_weight(model).equal(torch.arange(16.0).view(4, 4))


def test_a_model_that_changes_its_dtype_while_merged_unmerges_in_that_dtype():
    model = adapted()
    own = model[0].weight.detach().clone()
    peftlib.merge(model)
    model.half()
    peftlib.unmerge(model)
    assert same_bits(model[0].weight, own.half())


@pytest.mark.parametrize("made", [lambda w: w.t().contiguous().t(), lambda w: w.contiguous()], ids=["columns", "rows"])
def test_a_weight_keeps_its_layout(made):
    model = linears()
    model[0].weight = nn.Parameter(made(model[0].weight.detach()))
    strides = model[0].weight.stride()
    peftlib.merge(adapted(model))
    assert model[0].weight.stride() == strides
    peftlib.unmerge(model)
    assert model[0].weight.stride() == strides

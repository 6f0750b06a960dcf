"""Which path LoRA takes: the fused one wherever it serves, one product for adapters that one can serve, and the plain
one where dropout or a host's own forward asks for it. Values are tested elsewhere; these laws see what ran, in the
graph of a step that is too large for plain ops."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlib
from peftlib import LoRA
from support.helpers import chain, moved

pytestmark = pytest.mark.mutants

FUSED = ("DenseLoRABackward", "LoRALinearBackward")
X = torch.randn(1024, 256, generator=torch.Generator().manual_seed(0))


def graph(y: Tensor) -> list[str]:
    """The names of the operations that gave y, from the last to the first."""
    names, waiting = [], [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.append(type(node).__name__)
            waiting += [inner for inner, _ in node.next_functions]
    return names


def adapted(*names: str, dropout: float = 0.0, training: bool = True) -> Any:
    model = chain(nn.Linear(256, 256)).train(training)
    for name in names:
        peftlib.inject(model, "0", LoRA, rank=2, name=name, dropout=dropout)
    return moved(model)


@pytest.mark.parametrize(("training", "dropout"), [(True, 0.0), (False, 0.0), (True, 0.1), (False, 0.1)])
def test_one_adapter_on_a_linear_is_one_fused_step(training, dropout):
    ran = graph(adapted("a", dropout=dropout, training=training)(X))
    assert ran[0] in FUSED
    assert "LoRAAddBackward" not in ran


@pytest.mark.parametrize(("training", "dropout"), [(True, 0.0), (False, 0.0), (False, 0.1)])
def test_adapters_on_one_linear_are_one_product_where_no_dropout_acts(training, dropout):
    ran = graph(adapted("a", "b", "c", dropout=dropout, training=training)(X))
    assert ran[0] in FUSED
    assert "LoRAAddBackward" not in ran


def test_adapters_on_one_linear_each_drop_for_themselves():
    assert graph(adapted("a", "b", dropout=0.1)(X)).count("LoRAAddBackward") == 1


def halved() -> Any:
    """A linear with somebody's own forward in front, as other tools put there: nothing may run in its place."""
    host: Any = nn.Linear(256, 256)
    inner = host.forward
    host.forward = lambda input: inner(input) / 2
    return host


def test_a_host_with_a_forward_of_its_own_is_added_to():
    model = chain(halved())
    peftlib.inject(model, "0", LoRA, rank=2)
    assert graph(model(X))[0] == "LoRAAddBackward"


@pytest.mark.parametrize("make", [lambda: nn.Linear(256, 256), halved], ids=["fused", "added"])
def test_dropout_acts_in_training_and_only_then(make):
    """A half of the input dropped: in training two runs are the same with a probability of 2⁻¹³¹⁰⁷²."""
    model = chain(make())
    peftlib.inject(model, "0", LoRA, rank=2, dropout=0.5)
    moved(model)
    assert not torch.equal(model(X), model(X))
    model.eval()
    assert torch.equal(model(X), model(X))


def test_the_rows_of_an_embedding_are_looked_up_in_the_pair():
    """No product of the pair over all entries: that would be a table of the size of the base's."""
    model = chain(nn.Embedding(1000, 64))
    peftlib.inject(model, "0", LoRA, rank=2)
    ran = graph(model(torch.tensor([[1, 2, 3]])))
    assert "IndexSelectBackward0" in ran
    assert "MmBackward0" not in ran


@pytest.mark.parametrize("make", [lambda: nn.Linear(256, 256), halved], ids=["fused", "added"])
@pytest.mark.parametrize("names", ["a", "ab"])
def test_an_input_given_by_its_name_is_the_same_input(make, names):
    host: Any = make()
    for name in names:
        peftlib.inject(host, nn.Linear, LoRA, rank=2, name=name)
    moved(host)
    assert torch.equal(host(input=X), host(X))

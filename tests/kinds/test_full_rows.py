"""Full with rows: some rows of a weight train, the others stay the base's."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import peftlib
from peftlib import Full
from support import helpers
from support.refusals import refused

pytestmark = pytest.mark.mutants

ROWS = [4, 0, 7]


def table(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 5, padding_idx=7, dtype=dtype))


def head(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 9, dtype=dtype))


def cases() -> list[tuple[nn.Sequential, torch.Tensor]]:
    return [(table(), torch.tensor([[0, 1, 4], [4, 8, 7]])), (head(), torch.randn(3, 5, dtype=torch.float64))]


def rows_in(model: nn.Module) -> Any:
    ((_, _, adapter),) = peftlib.adapters(model)
    return adapter.own.weight


@pytest.mark.parametrize(("model", "x"), cases(), ids=["embedding", "linear"])
def test_the_rows_replace_those_of_the_weight_and_alone_learn(model, x):
    base = copy.deepcopy(model).requires_grad_(False)
    peftlib.inject(model, "0", Full, params="weight", rows=ROWS)
    assert torch.equal(model(x), base(x))
    own = rows_in(helpers.moved(model))
    assert own.shape == (3, 5)
    dense = copy.deepcopy(base).requires_grad_()
    with torch.no_grad():
        for at, row in zip(ROWS, own, strict=True):
            dense[0].weight[at] = row
    assert torch.equal(model(x), dense(x))
    model(x).square().sum().backward()
    dense(x).square().sum().backward()
    assert torch.allclose(own.grad, dense[0].weight.grad[ROWS], rtol=1e-12)
    assert own.grad.abs().sum() > 0
    assert model[0].weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_the_other_rows_keep_every_bit_and_unmerge_restores_all(dtype):
    model, base = table(dtype), table(dtype)
    peftlib.inject(model, "0", Full, params="weight", rows=ROWS)
    own = rows_in(helpers.moved(model)).detach()
    live = model(torch.arange(9))
    peftlib.merge(model)
    merged = model[0].weight.detach()
    others = [at for at in range(9) if at not in ROWS]
    assert helpers.same_bits(merged[others], base[0].weight[others].detach())
    assert helpers.same_bits(merged[ROWS], own.to(dtype))
    assert torch.equal(model(torch.arange(9)), live)
    peftlib.unmerge(model)
    assert helpers.base_bits(model) == helpers.base_bits(base)


def test_a_file_holds_the_rows_alone(tmp_path):
    model, again = table(), table()
    peftlib.inject(model, "0", Full, params="weight", rows=ROWS)
    helpers.moved(model)
    peftlib.save(model, tmp_path / "rows.safetensors")
    assert peftlib.read_header(tmp_path / "rows.safetensors")["tensors"]["0.weight"]["shape"] == [3, 5]
    peftlib.load(again, tmp_path / "rows.safetensors")
    assert torch.equal(again(torch.arange(9)), model(torch.arange(9)))


@pytest.mark.parametrize("rows", [[], [9], [-1], [1, 1], [True], [0.5]], ids=str)
def test_rows_that_are_not_there(rows):
    model = table()
    with refused(model, f"rows={rows}", "Embedding.weight", "(9, 5)"):
        peftlib.inject(model, "0", Full, params="weight", rows=rows)


def test_a_vector_has_no_rows():
    with refused(None, "Linear.bias", "(9,)"):
        peftlib.inject(head(), "0", Full, rows=[1])

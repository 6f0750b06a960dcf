"""Progress: told for each module or batch, and nothing else changes for it."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlib
from peftlib import LoRA
from support.helpers import chain, network, snapshot
from support.refusals import refused


def losses(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().sum(-1)


def adapted() -> nn.Module:
    model = network(layers=2)
    peftlib.inject(model, ["q_proj", "v_proj"], LoRA, rank=2)
    return model


def of_batches(batches: Any, told: Any) -> None:
    peftlib.EWC(nn.Linear(4, 3), batches, losses, progress=told)


WORK = {
    "merge": (4, 4, lambda told: peftlib.merge(adapted(), progress=told)),
    "merged_state_dict": (4, 4, lambda told: [*peftlib.merged_state_dict(adapted(), progress=told)]),
    "inject": (4, 4, lambda told: peftlib.inject(network(layers=2), ["q_proj", "v_proj"], LoRA, progress=told)),
    "EWC": (3, 3, lambda told: of_batches(torch.randn(3, 2, 4), told)),
    "EWC over what has no length": (3, None, lambda told: of_batches(iter(torch.randn(3, 2, 4)), told)),
}


@pytest.mark.parametrize("name", WORK)
def test_each_module_or_batch_is_told_once(name):
    steps, total, work = WORK[name]
    told: list[tuple[int, int | None]] = []
    work(lambda done, of: told.append((done, of)))
    assert told == [(done, total) for done in range(1, steps + 1)]


def test_a_merge_whose_progress_raises_leaves_the_model_as_it_was():
    model = adapted()

    def stop(done: int, total: int | None) -> None:
        if done == 2:
            raise KeyboardInterrupt

    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        peftlib.merge(model, progress=stop)
    assert snapshot(model) == before


def test_a_refusal_is_the_same_with_progress():
    model = chain(nn.Linear(4, 4))
    with refused(model, "absent"):
        peftlib.inject(model, "absent", LoRA, progress=lambda done, total: None)


def many() -> nn.Module:
    model = chain(*(nn.Linear(2, 2) for _ in range(40)))
    peftlib.inject(model, nn.Linear, LoRA, rank=1)
    return model


def test_tqdm_shows_a_bar_of_many_modules_where_it_is_installed(monkeypatch):
    made: list[Any] = []

    class Tqdm:
        def tqdm(self, items: Any, doing: str, total: int, **given: Any) -> Any:
            made.append((doing, total, given["disable"]))
            return items

    model = many()
    monkeypatch.setitem(sys.modules, "tqdm", Tqdm())
    peftlib.merge(model)
    assert made == [("merge", 40, None)]


def test_without_tqdm_nothing_is_shown(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    peftlib.merge(many())
    assert capsys.readouterr() == ("", "")


def test_away_from_a_terminal_no_bar_is_written(capsys):
    peftlib.merge(many())
    assert capsys.readouterr() == ("", "")

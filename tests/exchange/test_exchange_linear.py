"""What reading and writing a file costs grows with the modules in it, and with nothing more."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import peftlib
from peftlib import exchange, hf


class Counting(nn.Module):
    """Blocks in a row, and how often all their names were asked for."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"to_q": nn.Linear(2, 2)}) for _ in range(blocks))
        self.walks = 0

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        self.walks += 1
        return super().named_modules(*args, **kwargs)


def adapted(blocks: int, differ: bool) -> Counting:
    """With a rank and an alpha of its own for each block, where they differ."""
    model = Counting(blocks)
    for at in range(blocks if differ else 0):
        config: dict[str, Any] = {"rank": 1 + at % 2, "alpha": 1.0 + at}
        peftlib.inject(model.blocks[at], "to_q", peftlib.LoRA, **config)
    if not differ:
        peftlib.inject(model, "to_q", peftlib.LoRA, rank=2)
    return model


def ranks_in(model: nn.Module) -> dict[str, int]:
    found: list[tuple[str, str, Any]] = list(peftlib.adapters(model))
    return {host: adapter.rank for host, _, adapter in found}


def calls(act: Callable[[], object]) -> int:
    """Calls of functions, those of builtins among them: as time, without a machine's moods."""
    count = 0

    def on_event(_: Any, event: str, __: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(on_event)
    try:
        act()
    finally:
        sys.setprofile(before)
    return count


FILES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "kohya": (lambda m, p: exchange.save(m, p, "kohya"), lambda m, p: exchange.load(m, p, "kohya")),
    "diffusers": (lambda m, p: exchange.save(m, p, "diffusers"), lambda m, p: exchange.load(m, p, "diffusers")),
    "HF peft": (hf.save, hf.load),
}
every_file = pytest.mark.parametrize(("save", "load"), FILES.values(), ids=FILES)


@every_file
@pytest.mark.parametrize("differ", [False, True], ids=["alike", "each with its own rank and alpha"])
def test_four_times_the_modules_take_four_times_the_calls(save, load, differ, tmp_path):
    costs = []
    for blocks in (40, 160):
        model, fresh, path = adapted(blocks, differ), Counting(blocks), tmp_path / str(blocks)
        costs.append((calls(lambda m=model, p=path: save(m, p)), calls(lambda m=fresh, p=path: load(m, p))))
    (small_save, small_load), (large_save, large_load) = costs
    assert large_save <= 4.4 * small_save
    assert large_load <= 4.4 * small_load


@every_file
def test_the_names_of_the_modules_are_asked_for_no_more_often_than_by_inject(save, load, tmp_path):
    model, fresh = adapted(3, differ=False), Counting(3)
    injecting, model.walks = model.walks, 0
    save(model, tmp_path / "file")
    load(fresh, tmp_path / "file")
    assert fresh.walks <= injecting
    assert model.walks <= injecting


def test_a_list_of_all_modules_is_looked_up_and_not_compared(tmp_path):
    """As peft writes where a rank differs: full names, escaped or not."""
    costs = []
    for blocks in (40, 160):
        names = [f"blocks.{at}.to_q" for at in range(blocks)]
        ranks = {name: 1 + at % 2 for at, name in enumerate(names)}
        model = Counting(blocks)
        costs.append(calls(lambda m=model, n=names, r=ranks: hf.inject(m, {"target_modules": n, "rank_pattern": r})))
        assert ranks_in(model) == {name: ranks[name] for name in names}
    assert costs[1] <= 4.4 * costs[0]


def test_a_pattern_is_followed_as_peft_follows_it():
    """The first that matches a whole name or its end counts, and a dot in it stands for any letter."""
    model = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(9, 9)}), "axb": nn.Linear(9, 9), "b": nn.Linear(9, 9)})
    hf.inject(model, {"target_modules": ["b", "axb"], "rank_pattern": {"^b": 2, "a.b": 3, "b": 4, "axb": 5, "^axb": 6}})
    assert ranks_in(model) == {"a.b": 3, "axb": 3, "b": 2}

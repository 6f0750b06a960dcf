"""`monitor` on sharded parameters: every rank has the numbers of one process."""

import json
import pathlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

import peftlib

RANKS = 2


def build() -> Any:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(4, 4)).double()
    peftlib.inject(model, "0", peftlib.LoRA, rank=2)
    peftlib.inject(model, "1", peftlib.DoRA, rank=2)
    peftlib.inject(model, "2", peftlib.Full)
    peftlib.inject(model, "3", peftlib.Bottleneck, width=2)
    with torch.no_grad():
        for p in peftlib.parameters(model):
            p.add_(torch.randn_like(p), alpha=0.3)
    return model


def numbers(model: nn.Module) -> list[dict[str, float]]:
    """Before and after a step on the same rows for each rank, whose mean gradient is that of one."""
    optimizer = torch.optim.AdamW(peftlib.parameters(model), lr=0.05)
    found = [peftlib.monitor(model)]
    model(torch.ones(3, 8, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    return [*found, peftlib.monitor(model)]


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    model, mesh = build(), init_device_mesh("cpu", (RANKS,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    pathlib.Path(folder, f"{rank}.json").write_text(json.dumps(numbers(model)))
    dist.destroy_process_group()


@pytest.mark.slow
def test_the_numbers_of_sharded_adapters_are_those_of_one_process(tmp_path):
    spawn(work, (str(tmp_path),), nprocs=RANKS)
    whole = numbers(build())
    for rank in range(RANKS):
        for found, expected in zip(json.loads((tmp_path / f"{rank}.json").read_text()), whole, strict=True):
            assert found == pytest.approx(expected, rel=1e-9)

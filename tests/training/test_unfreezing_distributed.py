"""Gradual unfreezing on two gloo ranks, DDP and FSDP2, equals one process through every freeze and unfreeze."""

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import peftlib
from peftlib import schedules
from support.helpers import Network

RANKS, STEPS, BATCH = 2, 12, 8
SCHEDULES = {
    "every": lambda: schedules.every(2),
    "chain-thaw": lambda: schedules.chain_thaw(schedules.every(2)),
}


def build(adapted: bool) -> Any:
    torch.manual_seed(1)
    model = Network(layers=2).double()
    if adapted:
        peftlib.inject(model, ["q_proj", "v_proj"], peftlib.LoRA, rank=2)
        peftlib.inject(model, "head", peftlib.Full)
    return model


def train(model: nn.Module, network: Any, part: slice, schedule: Any) -> list[list[str]]:
    groups = peftlib.layer_groups(network)
    optimizer = torch.optim.AdamW(peftlib.discriminative_lr(groups, 0.05, decay=1.5), weight_decay=0.1)
    unfreezing = peftlib.GradualUnfreezing(groups, schedule, optimizer, warmup=2)
    near = peftlib.L2SP(network, alpha=0.1, targets="layers")
    generator, unfrozen = torch.Generator().manual_seed(2), []
    for _ in range(STEPS):
        tokens = torch.randint(0, 11, (BATCH, 5), generator=generator)[part]
        labels = torch.randint(0, 3, (BATCH, 5), generator=generator)[part]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
        (loss + near()).backward()
        optimizer.step()
        unfrozen.append(unfreezing.unfrozen)
        unfreezing.step()
    return unfrozen


def state_of(network: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Any] = network.state_dict()
    return {key: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for key, t in state.items()}


def with_ddp(network: Any) -> nn.Module:
    return DistributedDataParallel(network, find_unused_parameters=True)


def with_ddp_in_buckets(network: Any) -> nn.Module:
    return DistributedDataParallel(network, find_unused_parameters=True, gradient_as_bucket_view=True)


def with_fsdp(network: Any) -> nn.Module:
    """The embedding and the head share a unit, so one unit holds frozen and unfrozen parameters."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in network.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(network, mesh=mesh)


WAYS: list[Callable[[Any], nn.Module]] = [with_ddp, with_ddp_in_buckets, with_fsdp]
CASES = [(way, name, adapted) for way in WAYS for name in SCHEDULES for adapted in (False, True)]


def refused_when_made_late() -> str:
    network = build(False)
    groups = peftlib.layer_groups(network)
    unfreezing = peftlib.GradualUnfreezing(groups, schedules.every(100))
    model = with_ddp(network)
    model(torch.zeros(2, 5, dtype=torch.long)).sum().backward()
    try:
        unfreezing.step()
    except peftlib.AdapterError as error:
        return str(error)
    return "no refusal"


def under_mixed_precision(first: bool) -> str:
    """FSDP2 asks a unit what it trains at its first forward; `first` runs one before the freezing."""
    network = build(False).float()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for unit in [*network.layers, network]:
        fully_shard(unit, mesh=init_device_mesh("cpu", (RANKS,)), mp_policy=policy)
    tokens = torch.zeros(2, 5, dtype=torch.long)
    if first:
        network(tokens)
    groups = peftlib.layer_groups(network)
    unfreezing = peftlib.GradualUnfreezing(groups, schedules.every(1))
    try:
        for _ in range(4):
            network(tokens).float().sum().backward()
            unfreezing.step()
    except RuntimeError as error:
        return str(error)
    return ", ".join(sorted({str(p.grad.dtype) for p in network.parameters()}))


def work(rank: int, folder: str) -> None:
    """One rank: all cases after one another, so that the processes start once."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    share = BATCH // RANKS
    for at, (way, name, adapted) in enumerate(CASES):
        network = build(adapted)
        train(way(network), network, slice(rank * share, (rank + 1) * share), SCHEDULES[name]())
        torch.save(state_of(network), f"{folder}/{at}-{rank}.pt")
        dist.barrier()
    said = [refused_when_made_late(), under_mixed_precision(False), under_mixed_precision(True)]
    torch.save(said, f"{folder}/said-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("ranks")
    spawn(work, (str(folder),), nprocs=RANKS)
    return folder


@pytest.mark.parametrize("at", range(len(CASES)), ids=[f"{way.__name__}-{n}-{a}" for way, n, a in CASES])
def test_two_ranks_equal_one_process_through_every_unfreeze(at: int, ran: pathlib.Path):
    """In float64 the mean of two halves differs from that of the whole batch by 1e-16 or so, in gradients of at most 1.
    Adam divides by √v + 1e-8, so a weight differs by at most lr · 1e-16 / 1e-8 = 5e-10 a step: 1e-8 for twelve."""
    _, name, adapted = CASES[at]
    network = build(adapted)
    start = state_of(network)
    unfrozen = train(network, network, slice(None), SCHEDULES[name]())
    assert len({tuple(each) for each in unfrozen}) >= (4 if not adapted else 3)
    expected = state_of(network)
    for rank in range(RANKS):
        found = torch.load(ran / f"{at}-{rank}.pt")
        assert list(found) == list(expected)
        for key, tensor in expected.items():
            assert (found[key] - tensor).abs().max() <= 1e-8, key
            trains = not adapted or ".adapters." in key
            assert torch.equal(found[key], start[key]) != trains, key


def test_a_ddp_that_was_made_too_late_is_refused_at_the_first_step(ran: pathlib.Path):
    for rank in range(RANKS):
        said, _, _ = torch.load(ran / f"said-{rank}.pt")
        assert "averages the gradients of 2 other parameters" in said
        assert said.endswith("Make it first, with find_unused_parameters=True, then GradualUnfreezing.")


def test_fsdp_with_mixed_precision_wants_one_forward_first_and_says_so(ran: pathlib.Path):
    for rank in range(RANKS):
        _, without, with_one = torch.load(ran / f"said-{rank}.pt")
        assert "gradient" in without
        assert "dtype" in without
        assert with_one == "torch.float32"

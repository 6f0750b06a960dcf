"""DDP and FSDP2 on two gloo ranks equal one process: the same adapters after the same steps."""

import pathlib
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import peftlib

RANKS, STEPS, BATCH = 2, 3, 8


class Mixture(nn.Module):
    """Experts in one stack, whose adapted weight is never made."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(2, 8, 8) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.stack[0]) * torch.einsum("bti,eoi->bto", x, self.stack)


class Block(nn.Module):
    """A fused host, one that runs with shadowed weights, one that reads a stack, and one with its own copy."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 8)
        self.mixture = Mixture()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.mixture(x)
        return x + torch.tanh(self.linear(self.norm(x)))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def build() -> Network:
    torch.manual_seed(1)
    model = Network().double()
    peftlib.inject(
        model, ["embedding", "attention", "out_proj", "linear", "mixture"], peftlib.LoRA, rank=2, name="task"
    )
    peftlib.inject(model, ["norm", "head"], peftlib.Full, name="task")
    peftlib.inject(model, "attention", peftlib.Prefix, length=2, name="task")
    peftlib.inject(model, "embedding", peftlib.Prompt, length=2, name="task")
    peftlib.inject(model, ["linear", "norm"], peftlib.Bottleneck, width=2, norm="before", scale="learned", name="task")
    peftlib.inject(model, ["attention", "linear"], peftlib.IA3, name="task")
    peftlib.inject(model, "linear", peftlib.LoRA, rank=2, name="idle")
    peftlib.activate(model, "task")
    peftlib.train_only(model, "task")
    return model


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.randint(0, 11, (STEPS, BATCH, 5)), torch.randint(0, 3, (STEPS, BATCH))


def train(model: nn.Module, network: Network, part: slice) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    losses: list[float] = []
    for tokens, labels in zip(*data(), strict=True):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens[part]), labels[part])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def state_of(network: nn.Module) -> dict[str, Tensor]:
    state = network.state_dict()
    return {key: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for key, t in state.items()}


def with_ddp(network: Network) -> nn.Module:
    return DistributedDataParallel(network)


def with_fsdp(network: Network) -> nn.Module:
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in network.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def with_fsdp_on_hosts(network: Network) -> nn.Module:
    """The hosts themselves are sharded units: FSDP's class stands above the adapted one."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in network.blocks:
        fully_shard(block.linear, mesh=mesh)
        fully_shard(block.norm, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


WAYS: list[Callable[[Network], nn.Module]] = [with_ddp, with_fsdp, with_fsdp_on_hosts]


MERGED_WAYS: list[Callable[[Network], nn.Module]] = [with_fsdp, with_fsdp_on_hosts]


def build_foldable() -> Network:
    torch.manual_seed(1)
    model = Network().double()
    peftlib.inject(model, ["attention", "linear"], peftlib.LoRA, rank=2, name="task")
    peftlib.inject(model, ["norm", "head"], peftlib.Full, name="task")
    with torch.no_grad():
        for parameter in peftlib.parameters(model):
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


@torch.no_grad()
def merge_and_back(network: Network) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """What the merged network gives, after a call that gathered its shards once; its state before, in, and after."""
    tokens = data()[0][0]
    network(tokens)
    states = [state_of(network)]
    with peftlib.merged(network):
        y = network(tokens)
        states.append(state_of(network))
    return y, [*states, state_of(network)]


def work(rank: int, folder: str) -> None:
    """One rank: all ways after one another, so that the processes start once."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    share = BATCH // RANKS
    for way in WAYS:
        network = build()
        losses = train(way(network), network, slice(rank * share, (rank + 1) * share))
        torch.save((losses, state_of(network)), f"{folder}/{way.__name__}-{rank}.pt")
        dist.barrier()
    for way in MERGED_WAYS:
        network = build_foldable()
        way(network)
        torch.save(merge_and_back(network), f"{folder}/merged-{way.__name__}-{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("ranks")
    spawn(work, (str(folder),), nprocs=RANKS)
    return folder


@pytest.mark.parametrize("way", [way.__name__ for way in WAYS])
def test_two_ranks_equal_one_process(way: str, ran: pathlib.Path):
    """In float64; the ranks' mean of two halves adds in another order than one whole batch: 1e-10 for a few steps."""
    network = build()
    start = state_of(network)
    losses = train(network, network, slice(None))
    expected = state_of(network)
    results = [torch.load(ran / f"{way}-{rank}.pt") for rank in range(RANKS)]
    for step, loss in enumerate(losses):
        assert abs(sum(result[0][step] for result in results) / RANKS - loss) <= 1e-10
    for _, found in results:
        assert list(found) == list(expected)
        for key, tensor in expected.items():
            assert (found[key] - tensor).abs().max() <= 1e-10, key
            trains = ".task" in key
            assert torch.equal(found[key], start[key]) != trains, key


@pytest.mark.parametrize("way", [way.__name__ for way in MERGED_WAYS])
def test_shards_merge_to_what_one_process_merges_to_and_come_back_to_the_bit(way: str, ran: pathlib.Path):
    """A product of rank 2 adds in the same order on each shard, the rounding aside that one product or three make."""
    y, (_, merged, _) = merge_and_back(build_foldable())
    for rank in range(RANKS):
        found, (before, inside, after) = torch.load(ran / f"merged-{way}-{rank}.pt")
        assert (found - y).abs().max() <= 1e-10
        for key, tensor in merged.items():
            assert (inside[key] - tensor).abs().max() <= 1e-12, key
            assert torch.equal(after[key], before[key]), key
            if key.endswith("linear.weight"):
                assert not torch.equal(inside[key], before[key])

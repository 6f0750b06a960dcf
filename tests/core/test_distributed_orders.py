"""Training, validation, merging and files in any order, on two and four gloo ranks, as in one process."""

import datetime
import os
import pathlib
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import peftlib
from peftlib import schedules
from support.helpers import is_near

BATCH, LENGTH, PATIENCE = 8, 14, 180


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def build() -> Any:
    torch.manual_seed(1)
    model = Network().double()
    peftlib.inject(model, ["up", "down"], peftlib.LoRA, rank=2, name="first")
    peftlib.inject(model, ["norm", "head"], peftlib.Full, name="first")
    peftlib.inject(model, "up", peftlib.LoRA, rank=2, init="pissa", name="second")
    peftlib.inject(model, "down", peftlib.DoRA, rank=2, name="second")
    peftlib.inject(model, "embedding", peftlib.Full, rows=[2, 7], name="second")
    with torch.no_grad():
        for parameter in peftlib.parameters(model):
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64) * 0.1)
    return model


# The ways to lay a model out. Each gives what is called, and which part of the batch this process takes.


def alone(model: Any) -> nn.Module:
    return model


def ddp(model: Any) -> nn.Module:
    trains = any(p.requires_grad for p in model.parameters())
    return DistributedDataParallel(model, find_unused_parameters=True) if trains else model


def fsdp(model: Any, mesh: Any = None, **how: Any) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **how)
    return fully_shard(model, mesh=mesh, **how)


def fsdp_root_alone(model: Any) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def fsdp_resharding(model: Any) -> nn.Module:
    return fsdp(model, reshard_after_forward=True)


def fsdp_staying(model: Any) -> nn.Module:
    return fsdp(model, reshard_after_forward=False)


def fsdp_on_hosts(model: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for host in [*(block.up for block in model.blocks), model.blocks[0].norm, model.head]:
        fully_shard(host, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def hsdp(model: Any) -> nn.Module:
    return fsdp(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")))


def tensor_parallel(model: Any, mesh: Any = None) -> nn.Module:
    plan = peftlib.tensor_parallel({"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()})
    return parallelize_module(model, mesh or init_device_mesh("cpu", (dist.get_world_size(),)), plan)


def fsdp_around_tensor_parallel(model: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    return fsdp(tensor_parallel(model, mesh["tensor"]), mesh["data"])


WAYS: dict[int, list[Callable[[Any], nn.Module]]] = {
    2: [ddp, fsdp, fsdp_root_alone, fsdp_resharding, fsdp_staying, fsdp_on_hosts, tensor_parallel],
    4: [ddp, fsdp, hsdp, tensor_parallel, fsdp_around_tensor_parallel],
}
SEEDS = {2: 20, 4: 12}


def share(way: Callable[[Any], nn.Module]) -> slice:
    if way in (alone, tensor_parallel):
        return slice(None)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if way is fsdp_around_tensor_parallel:
        rank, ranks = rank // 2, 2
    each = BATCH // ranks
    return slice(rank * each, (rank + 1) * each)


def whole(state: dict[str, Any]) -> dict[str, Tensor]:
    return {key: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for key, t in state.items()}


class Run:
    """One model through an order of actions; each gives what can be compared."""

    def __init__(self, way: Callable[[Any], nn.Module], folder: str) -> None:
        self.way, self.file = way, f"{folder}/adapter.safetensors"
        self.network, self.count, self.saved = build(), 0, False
        self.wrapped: Any = way(self.network)
        self.near = peftlib.L2SP(self.network, targets="blocks")
        self.begin()

    def begin(self) -> None:
        self.unfreezing: Any = None
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.05, momentum=0.5)

    def changed(self, change: Callable[[], object]) -> None:
        """Modules come and go while no replica is around them, and the optimizer is another one after that."""
        if self.unfreezing is not None:
            self.unfreezing.remove()
        self.unfreezing = None
        if self.way is not ddp:
            change()
        else:
            self.wrapped = None
            try:
                change()
            finally:
                self.wrapped = ddp(self.network)
        self.begin()

    def batch(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.count)
        self.count += 1
        return torch.randint(0, 11, (BATCH, 5), generator=generator), torch.randint(0, 3, (BATCH,), generator=generator)

    def step(self, near: bool = False) -> None:
        tokens, labels = self.batch()
        part = share(self.way)
        self.network.train()
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.wrapped(tokens[part]), labels[part])
        loss = loss + self.near() if near else loss
        if loss.requires_grad:
            loss.backward()
        self.optimizer.step()

    def step_near(self) -> None:
        self.step(near=True)

    @torch.no_grad()
    def validate(self) -> Tensor:
        self.network.eval()
        return self.wrapped(self.batch()[0])

    def train_first(self) -> None:
        peftlib.train_only(self.network, "first")

    def train_second(self) -> None:
        peftlib.train_only(self.network, "second")

    def train_for_a_step(self) -> None:
        with peftlib.train_only(self.network, "first"):
            self.step()

    def activate_first(self) -> Tensor:
        peftlib.activate(self.network, "first")
        return self.validate()

    def unfreeze(self) -> list[str]:
        if self.unfreezing is None:
            groups = peftlib.layer_groups(self.network)
            self.unfreezing = peftlib.GradualUnfreezing(groups, schedules.plateau(1, restore=True))
        self.unfreezing.step(metric=float(self.count % 3))
        return self.unfreezing.unfrozen

    def resume_unfreezing(self) -> dict[str, Tensor]:
        if self.unfreezing is None:
            return {}
        state = self.unfreezing.state_dict()
        self.unfreezing.load_state_dict(state)
        return whole(state["best"]["kept"])

    def merged(self) -> Tensor:
        with peftlib.merged(self.network):
            return self.validate()

    def merge(self) -> Tensor:
        peftlib.merge(self.network)
        return self.validate()

    def merge_nan(self) -> None:
        """In one shard, where there are any; on all processes that have it."""
        parameter: Any = next(peftlib.parameters(self.network))
        own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        before = own.detach().clone()
        with torch.no_grad():
            if own is parameter or has_first_shard(parameter):
                own.fill_(float("nan"))
        try:
            peftlib.merge(self.network, parameter_owner(self.network))
        finally:
            with torch.no_grad():
                own.copy_(before)

    def unmerge(self) -> None:
        peftlib.unmerge(self.network)

    def merged_state(self) -> dict[str, Tensor]:
        return whole(dict(peftlib.merged_state_dict(self.network)))

    def verify(self) -> tuple[str, ...]:
        return peftlib.verify(self.network, self.batch()[0]).problems

    def save(self) -> dict[str, Tensor]:
        peftlib.save(self.network, self.file, "first")
        self.saved = True
        if self.way is not alone:
            dist.barrier()
        return load_file(self.file)

    def load_inside(self) -> list[str]:
        """Without a word to whatever wraps the model."""
        return peftlib.load(self.network, self.file, "third") if self.saved else []

    def load(self) -> None:
        if self.saved and "third" not in {name for _, name, _ in peftlib.adapters(self.network)}:
            self.changed(lambda: self.load_alone("third"))

    def load_alone(self, name: str) -> None:
        """Two copies of one weight are not active together."""
        if any(True for _ in peftlib.adapters(self.network)):
            peftlib.activate(self.network, "second")
        peftlib.load(self.network, self.file, name)

    def eject_first(self) -> None:
        self.changed(lambda: peftlib.eject(self.network, "first"))

    def eject_merged(self) -> None:
        self.changed(lambda: peftlib.eject(self.network, merge=True))

    def state(self) -> tuple[dict[str, Tensor], list[str]]:
        self.network.zero_grad()
        trained = [name for name, p in self.network.named_parameters() if p.requires_grad]
        return whole(self.network.state_dict()), trained


def has_first_shard(parameter: Any) -> bool:
    at = zip(parameter.device_mesh.get_coordinate(), parameter.placements, strict=True)
    return all(coordinate == 0 for coordinate, placement in at if placement.is_shard())


def parameter_owner(model: nn.Module) -> str:
    _, name, _ = next(iter(peftlib.adapters(model)))
    return name


ACTIONS = [
    "step", "step", "step", "step_near", "validate", "validate", "train_first", "train_second", "train_for_a_step",
    "activate_first", "unfreeze", "unfreeze", "resume_unfreezing", "merged", "merge", "merge_nan", "merged_state",
    "verify", "save", "load", "load_inside",
]  # fmt: skip
MERGED = ["unmerge", "unmerge", "unmerge", "validate", "merged_state", "step", "merge", "verify", "load", "unfreeze"]
ENDS = ["eject_first", "eject_merged"]
# What a wrapper makes impossible, and one process may do.
REFUSED_HERE = {
    "ddp": {"train_first", "train_second", "train_for_a_step", "load_inside", "unfreeze"},
    "fsdp_on_hosts": {"eject_first", "eject_merged"},
}


def order(way: str, seed: int) -> list[str]:
    """Nearly all is refused while a model is merged, so that does not last; and what takes adapters out comes late."""
    drawn, found = random.Random(f"{way} {seed}"), ["save"]
    while len(found) < LENGTH:
        merged = "merge" in found and "unmerge" not in found[found.index("merge") :]
        found.append(drawn.choice(MERGED if merged else ACTIONS))
        if found[-1] == "unmerge":
            found = [f"{each} " if each in ("merge", "unmerge") else each for each in found]
    found.insert(drawn.randrange(LENGTH // 2, LENGTH), drawn.choice(ENDS))
    return [*(each.strip() for each in found), "state"]


def act(run: Run, action: str) -> Any:
    torch.manual_seed(run.count)  # what verify draws is the same on all ranks
    try:
        return getattr(run, action)()
    except peftlib.AdapterError as error:
        return error


def work(rank: int, ranks: int, folder: str, orders: list[tuple[str, int]]) -> None:
    """One rank: all orders after one another, so that the processes start once."""
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks, timeout=limit)
    for way, seed in orders:
        home = f"{folder}/{way}-{seed}"
        os.makedirs(home, exist_ok=True)
        run, results = Run(globals()[way], home), []
        for action in order(way, seed):
            pathlib.Path(f"{folder}/now-{rank}").write_text(f"{way} {seed} {order(way, seed)}: {action}")
            results.append(act(run, action))
        torch.save(results, f"{home}/results-{rank}")
        dist.barrier()
        del run
    dist.destroy_process_group()


def ran(ranks: int, orders: list[tuple[str, int]], folder: pathlib.Path) -> pathlib.Path:
    """A hang or a crash is a failure that names the order and the action that each rank was at."""
    processes: Any = spawn(work, (ranks, str(folder), orders), nprocs=ranks, join=False)
    end = time.monotonic() + PATIENCE + 60 * len(orders)
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < end, "hangs"
    except Exception as error:
        for process in processes.processes:
            process.kill()
        at = [path.read_text() for path in sorted(folder.glob("now-*"))]
        raise AssertionError(f"{at}: {error}") from None
    return folder


def check(way: str, seed: int, ranks: int, folder: pathlib.Path, own: pathlib.Path) -> None:
    results = [torch.load(folder / f"{way}-{seed}/results-{rank}", weights_only=False) for rank in range(ranks)]
    run = Run(alone, str(own))
    for at, action in enumerate(order(way, seed)):
        found = [result[at] for result in results]
        where = f"{way} {seed}: action {at} of {order(way, seed)}, {action}: {found}"
        refusals = [isinstance(one, Exception) for one in found]
        assert all(refusals) or not any(refusals), where
        if all(refusals) and action in REFUSED_HERE.get(way, ()):
            advance(run, action)
            continue
        expected = act(run, action)
        assert all(refusals) == isinstance(expected, Exception), f"{where}, and {expected!r} in one process"
        for one in found if not all(refusals) else ():
            assert is_near(one, expected), f"{where}, and {expected!r} in one process"


def advance(run: Run, action: str) -> None:
    """What an action that was refused had done before that."""
    if action.startswith("eject"):
        run.changed(lambda: None)


def few() -> list[tuple[str, int]]:
    return [(way.__name__, 0) for way in (ddp, fsdp_root_alone, tensor_parallel)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return ran(2, few(), tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize(("way", "seed"), few())
def test_an_order_of_actions_gives_what_it_gives_in_one_process(way, seed, two, tmp_path):
    check(way, seed, 2, two, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "way"), [(ranks, way.__name__) for ranks, ways in WAYS.items() for way in ways])
def test_two_hundred_orders_of_actions_give_what_they_give_in_one_process(ranks, way, tmp_path):
    """All ways together. One takes half a minute of CPU on two ranks, most of it for starts and collectives."""
    orders = [(way, seed) for seed in range(1, 1 + SEEDS[ranks])]
    folder = ran(ranks, orders, tmp_path)
    for at, (_, seed) in enumerate(orders):
        own = tmp_path / f"own-{at}"
        own.mkdir()
        check(way, seed, ranks, folder, own)


def test_the_orders_are_two_hundred():
    assert sum(len(ways) * SEEDS[ranks] for ranks, ways in WAYS.items()) == 200

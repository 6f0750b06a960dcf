"""After a validation forward, and around a wrapper, on two gloo ranks: as in one process, or refused by both."""

import pathlib
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import peftlib
from peftlib import schedules
from support.helpers import Network, is_near

RANKS = 2
TOKENS = torch.arange(20).view(4, 5) % 11
LABELS = torch.arange(20).view(4, 5) % 3
Wrap = Callable[[Any], Any]


def plain() -> Any:
    torch.manual_seed(1)
    return Network(layers=2).double()


def build(*targets: str, kind: Any = peftlib.LoRA, **config: Any) -> Any:
    """Two adapters, far from zero; the first acts and trains."""
    model = plain()
    peftlib.inject(model, [*targets] or ["q_proj", "v_proj"], kind, **(config or {"rank": 2}), name="first")
    peftlib.inject(model, ["q_proj", "head"], peftlib.LoRA, rank=2, name="second")
    with torch.no_grad():
        for p in peftlib.parameters(model):
            p.add_(torch.randn(p.shape, dtype=torch.float64) * 0.1)
    peftlib.activate(model, "first")
    return model


def alone(model: Any) -> Any:
    return model


def ddp(model: Any) -> Any:
    return DistributedDataParallel(model, find_unused_parameters=True)


def fsdp_root_alone(model: Any) -> Any:
    return fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))


def fsdp(model: Any) -> Any:
    for layer in model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (RANKS,)))
    return fsdp_root_alone(model)


def fsdp_on_hosts(model: Any) -> Any:
    fully_shard(model.layers[0].q_proj, mesh=init_device_mesh("cpu", (RANKS,)))
    return fsdp_root_alone(model)


def tensor_parallel(model: Any) -> Any:
    plan = peftlib.tensor_parallel({"layers.*.q_proj": ColwiseParallel(), "head": RowwiseParallel()})
    for style in plan.values():
        style.output_layouts = (torch.distributed.tensor.Replicate(),)
        style.input_layouts = (torch.distributed.tensor.Replicate(),)
    return parallelize_module(model, init_device_mesh("cpu", (RANKS,)), plan)


def part(wrap: Wrap) -> slice:
    if wrap in (alone, tensor_parallel):
        return slice(None)
    return slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)


@torch.no_grad()
def validate(model: Any) -> Tensor:
    return model(TOKENS).clone()  # waits for what a collective brings


def loss_of(model: Any, wrap: Wrap) -> Tensor:
    return nn.functional.cross_entropy(model(TOKENS[part(wrap)]).flatten(0, 1), LABELS[part(wrap)].flatten())


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def state(model: Any) -> dict[str, Tensor]:
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


# Each of these runs on both ranks, laid out by `wrap`, and in one process.


def trains_what_it_was_told_to(wrap: Wrap, folder: str) -> Any:
    model = wrap(build())
    validate(model)
    peftlib.train_only(model, "second")
    peftlib.activate(model, "second")
    loss_of(model, wrap).backward()
    return gradients(model)


def trains_what_a_part_was_told_to(wrap: Wrap, folder: str) -> Any:
    model = wrap(build())
    validate(model)
    peftlib.train_only(model.layers, "first")
    peftlib.activate(model, "first", "second")
    loss_of(model, wrap).backward()
    return gradients(model)


def trains_again_after_a_block(wrap: Wrap, folder: str) -> Any:
    model = wrap(build())
    with peftlib.train_only(model, "second"):
        validate(model)
    loss_of(model, wrap).backward()
    return gradients(model)


def goes_on_after_a_refusal_that_is_kept(wrap: Wrap, folder: str) -> Any:
    """As a notebook keeps the last one, with its traceback: the replica around the model can be thrown away."""
    network = build()
    peftlib.train_only(network, "first")
    model, kept = wrap(network), []
    try:
        peftlib.train_only(network, "second")
    except peftlib.AdapterError as error:
        kept.append(error)
    assert len(kept) == (wrap is ddp)
    del model
    peftlib.train_only(network, "second")
    peftlib.activate(network, "second")
    model = wrap(network)
    loss_of(model, wrap).backward()
    return gradients(network)


def merges_and_comes_back(wrap: Wrap, folder: str) -> Any:
    model = wrap(build())
    validate(model)
    with peftlib.merged(model):
        inside = state(model), validate(model)
    peftlib.merge(model, "second")
    merged = validate(model)
    peftlib.unmerge(model)
    return inside, merged, validate(model)


def merges_for_good(wrap: Wrap, folder: str) -> Any:
    model = wrap(build())
    validate(model)
    peftlib.eject(model, merge=True)
    return state(model), validate(model)


def merges_what_keeps_tensors_beside_the_shards(wrap: Wrap, folder: str) -> Any:
    model = wrap(build("embedding", kind=peftlib.Full, rows=[1, 4]))
    other = wrap(build("v_proj", rank=2, init="pissa"))
    for each in (model, other):
        peftlib.merge(each)
    return state(model), state(other)


def holds_weights_near(wrap: Wrap, folder: str) -> Any:
    model = plain()
    before = peftlib.EWC(model, [TOKENS], lambda model, batch: -model(batch).log_softmax(-1)[:, 0, 0])
    model = wrap(model)
    near = peftlib.L2SP(model)
    loss_of(model, wrap).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(p.grad, alpha=0.1)
    validate(model)
    return near().detach(), before().detach()


def finds_nothing_wrong(wrap: Wrap, folder: str) -> Any:
    model = wrap(build())
    validate(model)
    for p in peftlib.parameters(model, "first"):
        p.grad = torch.zeros_like(p)
    found = peftlib.verify(model, TOKENS)
    rows = peftlib.verify(model, TOKENS, rows=["first", None, "second", "first"])
    kept = all(p.grad is not None and not whole(p.grad).any() for p in peftlib.parameters(model, "first"))
    return found.problems, rows.problems, kept


def finds_what_is_dead(wrap: Wrap, folder: str) -> Any:
    model = build()
    for name, p in model.named_parameters():
        if "v_proj.adapters" in name:
            nn.init.zeros_(p)
    model = wrap(model)
    return peftlib.verify(model, TOKENS).problems


def unfreezes_when_it_is_time(wrap: Wrap, folder: str) -> Any:
    model = wrap(plain())
    groups = peftlib.layer_groups(model)
    optimizer = torch.optim.SGD(peftlib.discriminative_lr(groups, 0.1), momentum=0.5)
    unfreezing = peftlib.GradualUnfreezing(groups, schedules.plateau(1, restore=True), optimizer)
    trained = []
    for metric in (2.0, 1.0, 3.0, 0.5, 4.0, 5.0):
        optimizer.zero_grad()
        loss_of(model, wrap).backward()
        optimizer.step()
        trained.append(sorted(gradients(model)))
        validate(model)
        unfreezing.step(metric)
    resumed = peftlib.GradualUnfreezing(groups, schedules.plateau(1, restore=True), optimizer)
    resumed.load_state_dict(unfreezing.state_dict())
    validate(model)
    resumed.step(9.0)
    kept = unfreezing.state_dict()["best"]["kept"]
    assert all(type(tensor) is Tensor for tensor in kept.values())
    return trained, state(model), dict(kept)


def is_written_once(wrap: Wrap, folder: str) -> Any:
    """Each process has a path of its own here, so that it shows who writes."""
    model = wrap(build())
    validate(model)
    rank = dist.get_rank() if dist.is_initialized() and wrap is not alone else 0
    peftlib.save(model, f"{folder}/{wrap.__name__}-{rank}.safetensors", "first")
    if wrap is not alone:
        dist.barrier()
    return sorted(path.name.rpartition("-")[2] for path in pathlib.Path(folder).glob(f"{wrap.__name__}-*.safetensors"))


def is_loaded_and_trained(wrap: Wrap, folder: str) -> Any:
    """Into shards that have run, after all adapters left, and then one more beside it."""
    model, path = build(), f"{folder}/loaded-{wrap.__name__}.safetensors"
    if wrap is alone or dist.get_rank() == 0:
        peftlib.save(model, path, "first")
    if wrap is not alone:
        dist.barrier()
    model = wrap(model)
    validate(model)
    peftlib.eject(model)
    validate(model)
    peftlib.load(model, path, strict=False)
    peftlib.load(model, path, "again", strict=False)
    optimizer = torch.optim.SGD(peftlib.parameters(model), lr=0.1, momentum=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, wrap).backward()
        optimizer.step()
    found = gradients(model)
    validate(model)
    return found, state(model)


ROWS = ["first", "second", None, ("first", "second")]


def routes_rows(wrap: Wrap, folder: str) -> Any:
    """Two halves of a batch, accumulated, each rank with other rows of it, layers computed again in backward."""
    network = build()
    for layer in network.layers:
        layer.forward = lambda x, own=layer.forward: checkpoint(own, x, use_reentrant=False)
    model = wrap(network)
    if wrap in (fsdp, fsdp_root_alone):
        model.set_reduce_scatter_unused_params(True)
    own = part(wrap)
    with peftlib.route(network, ROWS[own]):
        y = validate(network if wrap is ddp else model) if own == slice(None) else None
        for _ in range(2):
            loss_of(model, wrap).backward()
    return gradients(network), y if wrap is tensor_parallel else None


FSDP = [fsdp, fsdp_root_alone]
CASES: dict[Callable[[Wrap, str], Any], list[Wrap]] = {
    trains_what_it_was_told_to: [fsdp_root_alone],
    trains_what_a_part_was_told_to: [fsdp_root_alone],
    trains_again_after_a_block: [fsdp_root_alone],
    goes_on_after_a_refusal_that_is_kept: [ddp],
    merges_and_comes_back: [*FSDP, fsdp_on_hosts, tensor_parallel],
    merges_for_good: [fsdp_root_alone],
    merges_what_keeps_tensors_beside_the_shards: [fsdp, tensor_parallel],
    holds_weights_near: [fsdp_root_alone],
    finds_nothing_wrong: [fsdp, fsdp_on_hosts],
    finds_what_is_dead: [fsdp_root_alone],
    unfreezes_when_it_is_time: FSDP,
    is_loaded_and_trained: [*FSDP, tensor_parallel],
    routes_rows: [ddp, fsdp],
}


def nan_in_one_shard() -> None:
    model = fsdp(build())
    if dist.get_rank() == 0:
        with torch.no_grad():
            next(peftlib.parameters(model)).to_local().fill_(float("nan"))  # pyright: ignore[reportCallIssue]
    peftlib.merge(model)


def infinity_in_one_shard_of_a_copy() -> None:
    model = fsdp(build("v_proj", kind=peftlib.Full, dtype="float64"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "v_proj.adapters.first" in name and dist.get_rank() == 1:
                p.to_local().fill_(float("inf"))
    peftlib.merge(model)


def view_of_shards() -> None:
    peftlib.view(fsdp(build()), "first")


def eject_from_a_unit() -> None:
    peftlib.eject(fsdp_on_hosts(build()))


def fisher_of_shards() -> None:
    model = fsdp(build())
    peftlib.EWC(model, [TOKENS], lambda model, batch: -model(batch).log_softmax(-1)[:, 0, 0])


def train_what_is_not_averaged() -> None:
    model = build()
    peftlib.train_only(model, "first")
    _wrapped = ddp(model)
    peftlib.train_only(model, "first")
    peftlib.train_only(model, "second")


def inject_into_a_replica() -> None:
    model = build()
    _wrapped = ddp(model)
    peftlib.inject(model, "embedding", peftlib.LoRA, rank=2, name="third")


def load_into_a_replica() -> None:
    model, path = build(), f"{FOLDER[0]}/replica-{dist.get_rank()}.safetensors"
    peftlib.save(model, path, "first")
    _wrapped = ddp(model)
    peftlib.load(model, path, "third")


def save_flat_shards() -> None:
    """FSDP1 lays parameters out flat; the file that was there stays."""
    model, path = build(), f"{FOLDER[0]}/flat-{dist.get_rank()}.safetensors"
    peftlib.save(model, path, "first")
    before = pathlib.Path(path).read_bytes()
    _wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    try:
        peftlib.save(model, path, "first")
    finally:
        assert pathlib.Path(path).read_bytes() == before


def load_into_a_part_of_a_unit() -> None:
    model = build()
    path = f"{FOLDER[0]}/part-{dist.get_rank()}.safetensors"
    peftlib.save(model.layers, path, "first")
    fsdp_root_alone(model)
    peftlib.load(model.layers, path, "third", strict=False)


def load_over_shards() -> None:
    model, path = build(), f"{FOLDER[0]}/over-{dist.get_rank()}.safetensors"
    peftlib.save(model, path, "first")
    peftlib.load(fsdp(model), path, into="first")


FOLDER: list[str] = []
REFUSED: dict[Callable[[], None], tuple[str, ...]] = {
    nan_in_one_shard: ("first", "NaN"),
    infinity_in_one_shard_of_a_copy: ("v_proj", "infinity"),
    view_of_shards: ("view", "fully_shard"),
    eject_from_a_unit: ("layers.0.q_proj", "FSDP"),
    fisher_of_shards: ("EWC", "fully_shard"),
    train_what_is_not_averaged: ("train_only", "second", "DistributedDataParallel"),
    inject_into_a_replica: ("embedding", "DistributedDataParallel"),
    load_into_a_replica: ("q_proj", "DistributedDataParallel"),
    save_flat_shards: ("save", "layers"),
    load_into_a_part_of_a_unit: ("0.q_proj", "fully_shard"),
    load_over_shards: ("layers.0.q_proj", "first", "shard"),
}


def refusal(act: Callable[[], None]) -> str:
    try:
        act()
    except peftlib.AdapterError as error:
        return str(error)
    return "no refusal"


def attempt(case: Callable[[Wrap, str], Any], wrap: Wrap, folder: str) -> Any:
    """A failure fails its own case alone, where it was the same on both ranks."""
    try:
        return case(wrap, folder)
    except Exception:
        return traceback.format_exc()


def work(rank: int, folder: str) -> None:
    """One rank: all cases after one another, so that the processes start once."""
    torch.set_num_threads(1)
    FOLDER.append(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    for case, wraps in [*CASES.items(), (is_written_once, [fsdp_root_alone])]:
        for wrap in wraps:
            torch.save(attempt(case, wrap, folder), f"{folder}/{case.__name__}-{wrap.__name__}-{rank}")
            dist.barrier()
    torch.save({act.__name__: refusal(act) for act in REFUSED}, f"{folder}/refused-{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("ranks")
    spawn(work, (str(folder),), nprocs=RANKS)
    return folder


@pytest.mark.parametrize(
    ("case", "wrap"),
    [
        pytest.param(case, wrap, id=f"{case.__name__}-{wrap.__name__}")
        for case, wraps in CASES.items()
        for wrap in wraps
    ],
)
def test_two_ranks_do_what_one_process_does(case, wrap, ran, tmp_path):
    expected = case(alone, str(tmp_path))
    for rank in range(RANKS):
        found = torch.load(ran / f"{case.__name__}-{wrap.__name__}-{rank}", weights_only=False)
        assert is_near(found, expected), (found, expected)


def test_one_process_writes_the_file_of_a_sharded_model(ran):
    for rank in range(RANKS):
        assert torch.load(ran / f"is_written_once-fsdp_root_alone-{rank}") == ["0.safetensors"]


@pytest.mark.parametrize("act", REFUSED, ids=lambda act: act.__name__)
def test_both_ranks_refuse_alike(act, ran):
    said = [torch.load(ran / f"refused-{rank}")[act.__name__] for rank in range(RANKS)]
    for each in said:
        assert all(name in each for name in REFUSED[act]), said

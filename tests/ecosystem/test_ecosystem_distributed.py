"""Two and four gloo ranks equal one process: DDP, FSDP2, tensor parallel, sharded checkpoints, files, each kind."""

import copy
import datetime
import pathlib
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

import peftlib
from support.ecosystem import (
    COLUMNS,
    Column,
    adapter_state,
    close,
    every_kind,
    feature,
    moved,
    network,
    put,
    same,
    tokens,
)

STEPS, BATCH = 10, 8
SPLIT = {"q_proj": ColwiseParallel, "k_proj": ColwiseParallel, "v_proj": ColwiseParallel, "o_proj": RowwiseParallel}
# Beside the layers that are split, so that each of these kinds is split with them.
ON_WEIGHTS = (peftlib.LoRA, peftlib.DoRA, peftlib.IA3, peftlib.Full)


def shares(rank: int, ranks: int) -> slice:
    each = BATCH // ranks
    return slice(rank * each, (rank + 1) * each)


def train(model: nn.Module, part: slice, steps: int = STEPS, before_step: Any = None) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    losses: list[float] = []
    for at in range(steps):
        if before_step:
            before_step(at)
        given = tokens(BATCH, seed=at)[part]
        optimizer.zero_grad()
        logits = model(given)[:, -given.shape[1] :]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), given.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(state: dict[str, Any]) -> dict[str, Tensor]:
    return {key: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for key, t in state.items()}


def sharded(model: Any, **how: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **how)
    return fully_shard(model, mesh=mesh, **how)


def two_adapters(column: Column) -> Any:
    model = network(column, name="first")
    peftlib.activate(model)  # two copies of one weight are not active together
    put(model, column, name="second")
    peftlib.activate(moved(model, "second", seed=9), "first")
    return model


def switching(model: nn.Module) -> Callable[[int], object]:
    return lambda at: peftlib.activate(model, "first" if at < STEPS // 2 else "second")


def on_weights(column: Column) -> Any:
    """The same kind beside every layer that is split, where it stands beside weights."""
    if column.kind not in ON_WEIGHTS:
        return network(column)
    model = network()
    torch.manual_seed(3)
    peftlib.inject(model, ["*_proj", "mlp.[02]"], column.kind, **column.config)
    return moved(model)


def split(model: Any, mesh: Any, attention: bool = True) -> Any:
    plan: dict[str, Any] = {"layers.*.mlp.0": ColwiseParallel(), "layers.*.mlp.2": RowwiseParallel()}
    plan |= {f"layers.*.attention.{name}": style() for name, style in SPLIT.items()} if attention else {}
    parallelize_module(model, mesh, peftlib.tensor_parallel(plan))
    return model


# What each rank does; the result of each is compared with one process below.


def run_ddp(column: Column, part: slice, folder: str) -> Any:
    model = network(column)
    return train(DistributedDataParallel(model), part), whole(adapter_state(model))


def run_ddp_switching(column: Column, part: slice, folder: str) -> Any:
    model = two_adapters(column)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    return train(wrapped, part, before_step=switching(model)), whole(adapter_state(model))


def run_fsdp(column: Column, part: slice, folder: str) -> Any:
    model = sharded(network(column))
    return train(model, part), whole(adapter_state(model))


def run_fsdp_switching(column: Column, part: slice, folder: str) -> Any:
    model = sharded(two_adapters(column))
    return train(model, part, before_step=switching(model)), whole(adapter_state(model))


def run_fsdp_mixed(column: Column, part: slice, folder: str) -> Any:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(network(column), mp_policy=policy)
    found = train(model, part)
    assert all(p.dtype == torch.float32 for p in peftlib.parameters(model))
    return found, whole(adapter_state(model))


def run_checkpoint(column: Column, part: slice, folder: str) -> Any:
    """Half the steps, a sharded checkpoint, a new model that reads it, and files of peftlib from both."""
    model = sharded(network(column))
    losses = train(model, part, STEPS // 2)
    dcp.save({"model": model.state_dict()}, checkpoint_id=f"{folder}/{column.name}-dcp")  # pyright: ignore[reportPrivateImportUsage]
    fresh = sharded(moved(network(column), seed=8))
    state = {"model": fresh.state_dict()}
    dcp.load(state, checkpoint_id=f"{folder}/{column.name}-dcp")  # pyright: ignore[reportPrivateImportUsage]
    fresh.load_state_dict(state["model"])
    for one, name in ((model, "trained"), (fresh, "restored")):
        peftlib.save(one, f"{folder}/{column.name}-{name}.safetensors")
    return losses, whole(adapter_state(fresh))


def run_base_checkpoint(column: Column, part: slice, folder: str) -> Any:
    """A checkpoint of the base, read by the first rank alone, into a sharded model with adapters."""
    model = sharded(network(column))
    before = whole(adapter_state(model))
    base = {key: tensor * 0.5 for key, tensor in network().state_dict().items()} if dist.get_rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, base, options=options)
    assert same(whole(adapter_state(model)), before)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return [], {key: tensor for key, tensor in full.items() if ".adapters." not in key}


def run_tensor_parallel(column: Column, part: slice, folder: str) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = split(on_weights(column), mesh, attention=dist.get_world_size() == 2)
    losses = train(model, slice(None))
    peftlib.save(model, f"{folder}/{column.name}-split.safetensors")
    return losses, whole(adapter_state(model))


def run_fsdp_around_tensor_parallel(column: Column, part: slice, folder: str) -> Any:
    """Two by two: each pair of ranks splits the layers, and the pairs share the batch."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = split(on_weights(column), mesh["tensor"])
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    return train(model, shares(mesh["data"].get_local_rank(), 2)), whole(adapter_state(model))


EVERY = [run_ddp, run_fsdp, run_tensor_parallel]
RUNS = {
    2: [*EVERY, run_ddp_switching, run_fsdp_switching, run_fsdp_mixed, run_checkpoint, run_base_checkpoint],
    4: [*EVERY, run_fsdp_around_tensor_parallel],
}


def work(rank: int, ranks: int, folder: str) -> None:
    """One rank: all runs of all kinds one after another, so that the processes start once."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "torch.distributed.*deprecated", FutureWarning)
    minute = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks, timeout=minute)
    for run in RUNS[ranks]:
        for column in COLUMNS:
            try:
                result: Any = run(column, shares(rank, ranks), folder)
            except Exception as error:
                result = error if isinstance(error, peftlib.AdapterError) else traceback.format_exc()
            torch.save(result, f"{folder}/{run.__name__}-{column.name}-{rank}.pt")
            dist.barrier()
    dist.destroy_process_group()


def start(ranks: int, factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = factory.mktemp(f"ranks{ranks}")
    spawn(work, (ranks, str(folder)), nprocs=ranks)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return start(2, tmp_path_factory)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return start(4, tmp_path_factory)


both = pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])


def results(run: Any, column: Column, folder: pathlib.Path, ranks: int) -> list[Any]:
    found = [
        torch.load(folder / f"{run.__name__}-{column.name}-{rank}.pt", weights_only=False) for rank in range(ranks)
    ]
    for one in found:
        if isinstance(one, Exception):
            raise one
        assert not isinstance(one, str), one
    return found


def check(found: list[Any], model: nn.Module, losses: list[float], averaged: bool = True) -> None:
    """1e-6 of the loss, relative, in float32; and of the parameters, whose steps of 1e-3 AdamW scales by the gradient
    over its own size, as far as that moves the loss: 1e-3 of the distance that they went, 1e-5."""
    for step, loss in enumerate(losses):
        each = [result[0][step] for result in found]
        mean = sum(each) / len(each) if averaged else each[0]
        assert abs(mean - loss) <= 1e-6 * abs(loss), f"step {step}: {mean} and {loss}"
    expected = adapter_state(model)
    for _, state in found:
        assert list(state) == list(expected)
        for key, tensor in expected.items():
            assert (state[key] - tensor).abs().max() <= 1e-5, key


def folder_of(ranks: int, request: pytest.FixtureRequest) -> pathlib.Path:
    return request.getfixturevalue({2: "two", 4: "four"}[ranks])


@feature("DDP")
@both
@every_kind
def test_ddp_equals_one_process(column, ranks, request):
    model = network(column)
    losses = train(model, slice(None))
    assert losses[-1] < losses[0]
    check(results(run_ddp, column, folder_of(ranks, request), ranks), model, losses)


@feature("DDP with adapters that are not used, and activate in mid-training")
@every_kind
def test_ddp_with_another_adapter_from_the_middle_on_equals_one_process(column, two):
    model = two_adapters(column)
    losses = train(model, slice(None), before_step=switching(model))
    check(results(run_ddp_switching, column, two, 2), model, losses)


@feature("FSDP2")
@both
@every_kind
def test_fsdp_equals_one_process(column, ranks, request):
    model = network(column)
    losses = train(model, slice(None))
    check(results(run_fsdp, column, folder_of(ranks, request), ranks), model, losses)


@feature("FSDP2 with activate in mid-training")
@every_kind
def test_fsdp_with_another_adapter_from_the_middle_on_equals_one_process(column, two):
    model = two_adapters(column)
    losses = train(model, slice(None), before_step=switching(model))
    check(results(run_fsdp_switching, column, two, 2), model, losses)


@feature("FSDP2 with a mixed precision policy")
@every_kind
def test_fsdp_in_mixed_precision_follows_the_run_in_full(column, two):
    """bfloat16 products round by 2⁻⁹ each, some dozens of them one after another; the master copies stay float32."""
    losses = train(network(column), slice(None))
    found = results(run_fsdp_mixed, column, two, 2)
    for step, loss in enumerate(losses):
        mean = sum(result[0][step] for result in found) / 2
        assert abs(mean - loss) <= 2**-9 * 16 * loss
    assert same(found[0][1], found[1][1])


@feature("FSDP2, sharded save and load through torch.distributed.checkpoint")
@every_kind
def test_a_sharded_checkpoint_comes_back(column, two):
    model = network(column)
    losses = train(model, slice(None), STEPS // 2)
    check(results(run_checkpoint, column, two, 2), model, losses)


@feature("FSDP2, peftlib.save: one file, whole")
@every_kind
def test_the_file_of_a_sharded_model_is_whole_and_loads_in_one_process(column, two):
    (_, expected), _ = results(run_checkpoint, column, two, 2)
    for name in ("trained", "restored"):
        model = network()
        peftlib.load(model, two / f"{column.name}-{name}.safetensors")
        assert same(adapter_state(model), expected)
    assert not [path for path in two.iterdir() if path.name.endswith(".tmp")]


@feature("FSDP2, a checkpoint of the base, from rank 0, after inject")
@every_kind
def test_a_checkpoint_of_the_base_loads_into_a_sharded_model(column, two):
    for _, found in results(run_base_checkpoint, column, two, 2):
        assert same(found, {key: tensor * 0.5 for key, tensor in network().state_dict().items()})


@feature("tensor parallel, by columns and by rows")
@both
@every_kind
def test_tensor_parallel_equals_one_process(column, ranks, request, record_property):
    model, folder = on_weights(column), folder_of(ranks, request)
    if column.kind is peftlib.Prefix and ranks == 2:
        with pytest.raises(peftlib.AdapterError, match="heads") as error:
            results(run_tensor_parallel, column, folder, ranks)
        record_property("refused", str(error.value))
        return
    losses = train(model, slice(None))
    check(results(run_tensor_parallel, column, folder, ranks), model, losses, averaged=False)
    fresh = network()
    peftlib.load(fresh, folder / f"{column.name}-split.safetensors")
    assert close(adapter_state(fresh), adapter_state(model), roundings=128)


@pytest.mark.slow
@feature("FSDP2 around tensor parallel")
@every_kind
def test_fsdp_around_tensor_parallel_equals_one_process(column, four, record_property):
    model = on_weights(column)
    if column.kind is peftlib.Prefix:
        with pytest.raises(peftlib.AdapterError, match="heads") as error:
            results(run_fsdp_around_tensor_parallel, column, four, 4)
        record_property("refused", str(error.value))
        return
    losses = train(model, slice(None))
    check(results(run_fsdp_around_tensor_parallel, column, four, 4), model, losses)


def test_a_plan_does_what_it_did_where_there_are_no_adapters():
    style = ColwiseParallel()
    plan = peftlib.tensor_parallel({"a": style})
    assert type(plan["a"]) is ColwiseParallel
    assert plan["a"] is not style
    assert vars(copy.copy(style)) == {key: value for key, value in vars(plan["a"]).items() if key != "_apply"}

"""A sharded model: its parameters made the real ones, gathered and split again, before anything here touches them.

FSDP2 registers other parameters while a unit is gathered, and a unit that does not reshard after its forward stays so
until the next backward. What is read, flagged or written on those is gone with them. So whatever reads, flags or writes
parameters calls `settle` first. What is decided by values is decided on whole ones, which are the same on all
processes: then all refuse, or none.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .._errors import AdapterError


def is_sharded(tensor: object) -> bool:
    return hasattr(tensor, "full_tensor")


def any_sharded(modules: Iterable[nn.Module]) -> bool:
    """Whether one of these modules has a shard of its own."""
    return any(is_sharded(p) for module in modules if module._parameters for p in module._parameters.values())


def whole(tensor: Any) -> Tensor:
    """Every process of the mesh must ask, and each gets all of it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def split_as(tensor: Tensor, like: Any) -> Tensor:
    """A tensor that every process has whole, laid out as this one is: each keeps its own part, and nothing is sent."""
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    return _split(tensor, like.device_mesh, like.placements)


def local(tensor: Any) -> Tensor:
    """What this process has of it, for functions that take each element by itself: torch would gather what has fewer
    rows than there are processes, and give it a gradient of another layout than its unit adds to."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def summed(part: Tensor, like: Any) -> Tensor:
    """The sum over all of a sharded tensor, of sums over what each process has of it."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor, Partial, Replicate  # 0.4 s that most users never need

    placements = [Partial() if placement.is_shard() else Replicate() for placement in like.placements]
    return DTensor.from_local(part, like.device_mesh, placements, run_check=False).full_tensor()


def settle(model: nn.Module) -> None:
    """Registers the sharded parameters of every unit of FSDP2, the ones that the optimizer has. Between forward and
    backward too: backward gathers them again."""
    if is_compiling() or not _fsdp_is_there():
        return
    modules = every_module(model)
    found = _units_among(modules)
    for unit in found:
        unit.reshard()
    if not any(unit is model for unit in found):
        _settle_outer(modules)


def units(model: nn.Module) -> list[Any]:
    """The modules of a model that FSDP2 gathers as one."""
    if not _fsdp_is_there():
        return []
    return _units_among(every_module(model))


def _units_among(modules: list[nn.Module]) -> list[Any]:
    kind = sys.modules["torch.distributed.fsdp"].FSDPModule
    return [module for module in modules if isinstance(module, kind)]


def every_module(model: nn.Module) -> list[nn.Module]:
    """As `model.modules()`, in a tenth of the time: every call that reads parameters asks for them."""
    found, seen = [model], {id(model)}
    for module in found:
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found


def _fsdp_is_there() -> bool:
    """Whoever shards has imported it; a look-up costs nothing, the import a third of a second."""
    return hasattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule")


def _settle_outer(modules: list[nn.Module]) -> None:
    """A part of a model may belong to a unit around it, which is not at hand; torch reshards that where one of its
    modules is asked for its state."""
    for module in modules:
        if module._parameters and "_is_fsdp_managed_module" in module.__dict__:
            module.state_dict(keep_vars=True)


def require_no_units(model: nn.Module, doing: str, advice: str) -> None:
    if units(model):
        raise AdapterError(
            f"{doing}: {type(model).__name__} is sharded by fully_shard, which gathers its parameters for the length "
            f"of a call alone. {advice}."
        )


def gradients(model: nn.Module, loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Of a loss, and none where it does not reach. FSDP2 gives gradients to its shards in a backward pass alone, summed
    over the processes; those that stood there are put back."""
    if not loss.requires_grad or not parameters:
        return [None] * len(parameters)
    if not units(model):
        return list(torch.autograd.grad(loss, list(parameters), allow_unused=True))
    settle(model)
    before = [(p, p.grad) for p in {*model.parameters(), *parameters}]
    try:
        for p, _ in before:
            p.grad = None
        loss.backward()
        settle(model)
        return [p.grad for p in parameters]
    finally:
        for p, gradient in before:
            p.grad = gradient


def place(adapter: Any, host: nn.Module, mesh: Any, placements: Any) -> None:
    """Splits an adapter's tensors beside a weight that lies on a mesh: what goes along its outputs or inputs is split
    with them, the rest is whole on every process."""
    axes: Mapping[str, Any] = adapter.axes if isinstance(host, nn.Linear) else {}
    for path, module in adapter.named_modules():
        for tensors in (module._parameters, module._buffers):
            for leaf, tensor in tensors.items():
                if tensor is not None:
                    along = axes.get(f"{path}.{leaf}".lstrip("."), (None, None))
                    tensors[leaf] = _beside(tensor, along, placements, mesh)


def _beside(tensor: Tensor, along: tuple[int | None, int | None], placements: Any, mesh: Any) -> Tensor:
    from torch.distributed.tensor import Replicate, Shard

    split = [along[placement.dim] if placement.is_shard() else None for placement in placements]
    return _split(tensor, mesh, [Replicate() if dim is None else Shard(dim) for dim in split])


def _split(tensor: Tensor, mesh: Any, placements: Any) -> Any:
    from torch.distributed.tensor import distribute_tensor

    placed = distribute_tensor(tensor.detach(), mesh, placements, src_data_rank=None)
    return nn.Parameter(placed, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else placed


def shard_as_hosts(model: nn.Module, placed: Sequence[tuple[str, nn.Module, Any]]) -> None:
    """Adapters that are whole on every process, made for hosts that lie in shards already: each is split as its host
    is, and joins the unit of FSDP2 that gathers it."""
    settle(model)
    sharded = [(host_name, host, a) for host_name, host, a in placed if any_sharded([host])]
    if not sharded:
        return
    around = _unit_of_each(model)
    by_unit: dict[int, list[tuple[nn.Module, Any]]] = {}
    for host_name, host, adapter in sharded:
        unit = around.get(id(host))
        if unit is None and "_is_fsdp_managed_module" in host.__dict__:
            raise AdapterError(
                f"{host_name or 'the root'}: a module around what was given gathers it (fully_shard). Give the whole "
                "model, or load before fully_shard."
            )
        by_unit.setdefault(id(unit), []).append((host, adapter))
    found = {id(unit): unit for unit in [None, *around.values()]}
    for key, items in by_unit.items():
        _join(found[key], items)


def _unit_of_each(model: nn.Module) -> dict[int, Any]:
    """The innermost unit around each module; `modules` gives a module before those inside it."""
    return {id(inner): unit for unit in units(model) for inner in unit.modules()}


def _join(unit: Any, items: list[tuple[nn.Module, Any]]) -> None:
    if unit is not None:
        unit.unshard()  # what is left of a weight's placements then is what tensor parallel made of it
    for host, adapter in items:
        weight = next((p for p in host._parameters.values() if is_sharded(p)), None)
        if weight is not None:
            place(adapter, host, weight.device_mesh, weight.placements)  # pyright: ignore[reportAttributeAccessIssue]
    if unit is not None:
        unit.reshard()
        _join_unit(unit, nn.Sequential(*(adapter for _, adapter in items)))


def _join_unit(unit: Any, newcomers: nn.Module) -> None:
    """Has torch shard them as a unit of their own, and hands what came of it to this one."""
    from torch.distributed.fsdp import fully_shard

    if not any(True for _ in newcomers.parameters()):
        return
    group = _group_of(unit)
    kept: bool | int = group.post_forward_mesh_info is not None
    if kept and group.post_forward_mesh_info != group.mesh_info:
        kept = group.post_forward_mesh_info.shard_mesh_size
    made: Any = fully_shard(
        newcomers,
        mesh=group.mesh_info.mesh,
        reshard_after_forward=kept,
        mp_policy=group.mp_policy,
        offload_policy=group.offload_policy,
    )
    group.fsdp_params.extend(_group_of(made).fsdp_params)
    if hasattr(group.fsdp_params[0], "orig_dtype"):  # it ran before, and asks what a gathering needs only once
        group.lazy_init()


def _group_of(unit: Any) -> Any:
    groups = _groups_of(unit)
    if len(groups) != 1:
        raise AdapterError(
            f"{type(unit).__name__}: this unit of fully_shard has {len(groups)} groups of parameters, and adapters "
            "join one. Load before fully_shard."
        )
    return groups[0]


def leave_units(model: nn.Module) -> None:
    """Units gather no more what was taken out of the model."""
    there = {id(module) for module in model.modules()}
    for group in (group for unit in units(model) for group in _groups_of(unit)):
        staying = [each for each in group.fsdp_params if id(each._module_info.module) in there]
        group.fsdp_params[:] = staying or group.fsdp_params


def _groups_of(unit: Any) -> list[Any]:
    """The one place that knows how torch keeps a unit's parameters: privately, in one group or in a list of them."""
    try:
        state = unit._get_fsdp_state()
        if hasattr(state, "_fsdp_param_groups"):
            return [*state._fsdp_param_groups]
        return [group for group in [state._fsdp_param_group] if group is not None]
    except AttributeError as error:
        raise AdapterError(
            f"{type(unit).__name__}: how torch {torch.__version__} keeps the parameters of fully_shard is not known "
            f"here ({error}). Load and eject before fully_shard."
        ) from None

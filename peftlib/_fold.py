"""What each base weight becomes when adapters are folded in: float32 or wider until the one rounding."""

from collections.abc import Container, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ._adapter import Adapter, owner_of
from ._errors import AdapterError
from ._host import face, is_host, parts
from ._walk import candidates, hosts


@dataclass
class Folded:
    """One weight of the base, by owner and attribute, and the value that it takes, not yet rounded."""

    name: str
    owner: nn.Module
    leaf: str
    value: Tensor

    @property
    def base(self) -> Tensor:
        return getattr(self.owner, self.leaf)

    def rounded(self) -> Tensor:
        rounded = self.value.to(self.base.dtype)
        if not rounded.isfinite().all() and self.base.isfinite().all():
            raise AdapterError(
                f"cannot merge into {self.name}: the result has NaN or infinity in {self.base.dtype}. "
                "Keep the adapter live, or widen the weight first."
            )
        return rounded


def folded_by_host(model: nn.Module, names: Container[str]) -> Iterator[tuple[nn.Module, list[Folded]]]:
    """Host after host, outer before inner; a weight that an inner host changes again comes with that host."""
    owners = _owners(model)
    pending: list[Folded] = []
    for host_name, host in hosts(model):
        if not parts(host, names):
            continue
        inside = {id(module) for module in host.modules()}
        start = [item for item in pending if id(item.owner) in inside]
        items = _fold(host_name, host, names, start)
        _refuse_shared(items, owners, host)
        again = _changed_inside(host, names)
        pending = [item for item in pending if id(item.owner) not in inside]
        pending += [item for item in items if id(item.owner) in again]
        yield host, _unique(item for item in items if id(item.owner) not in again)


def _fold(host_name: str, host: nn.Module, names: Container[str], start: list[Folded]) -> list[Folded]:
    """Each fold reads what the one before it gave, on a scratch face of the host."""
    scratch = face(host)
    paths = {id(module): path for path, module in host.named_modules()}
    values = {f"{paths[id(item.owner)]}.{item.leaf}".lstrip("."): item.value for item in start}
    _shadow(scratch, values)
    for adapter in parts(scratch, names):
        _require_finite(host_name, adapter)
        folded = adapter.fold(scratch)
        _shadow(scratch, folded)
        values |= folded
    return [_item(host_name, host, path, value) for path, value in values.items()]


def _shadow(scratch: nn.Module, values: dict[str, Tensor]) -> None:
    for path, value in values.items():
        owner, leaf = owner_of(scratch, path)
        owner.__dict__[leaf] = value


def _item(host_name: str, host: nn.Module, path: str, value: Tensor) -> Folded:
    owner, leaf = owner_of(host, path)
    name = f"{host_name}.{path}".lstrip(".")
    own = owner._parameters.get(leaf, owner._buffers.get(leaf))
    if own is None:
        raise AdapterError(
            f"cannot merge into {name}: it is computed from other parameters. Make it a plain weight first "
            "(torch.nn.utils.parametrize.remove_parametrizations), or keep the adapter live."
        )
    if own.is_meta or own.shape != value.shape:
        found = "on the meta device" if own.is_meta else f"{list(own.shape)} and its folded form {list(value.shape)}"
        raise AdapterError(f"cannot merge into {name}: it is {found}. Materialise the model, or mend the kind's fold.")
    return Folded(name, owner, leaf, value)


def _require_finite(host_name: str, adapter: Adapter) -> None:
    for key, tensor in adapter.state_dict().items():
        if not tensor.isfinite().all():
            raise AdapterError(
                f'cannot merge "{adapter.name}" into {host_name or "the root"}: {key} holds NaN or infinity. '
                "Load a sound adapter, or eject this one."
            )


def _owners(model: nn.Module) -> dict[object, list[tuple[int, str, str]]]:
    """Every place where each tensor's memory is registered: `(id of the module, attribute, qualified name)`."""
    owners: dict[object, list[tuple[int, str, str]]] = {}
    for name, module in candidates(model):
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                owners.setdefault(_memory(tensor), []).append((id(module), leaf, f"{name}.{leaf}".lstrip(".")))
    return owners


def _memory(tensor: Tensor) -> object:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.numel() and not tensor.is_meta
    return (tensor.device, tensor.data_ptr()) if plain else id(tensor)


def _refuse_shared(items: list[Folded], owners: dict[object, list[tuple[int, str, str]]], host: nn.Module) -> None:
    """A tensor may have several owners only if one fold gives all of them the same value."""
    by_place = {(id(item.owner), item.leaf): item for item in items}
    for item in items:
        for owner, leaf, name in owners[_memory(item.base)]:
            twin = by_place.get((owner, leaf))
            if twin is None or twin.value is not item.value:
                names = ", ".join(f'"{part.name}"' for part in parts(host))
                raise AdapterError(
                    f"cannot merge {names} into {item.name}: it is also {name}, which would change too. "
                    "Untie them first."
                )


def _changed_inside(host: nn.Module, names: Container[str]) -> set[int]:
    inner = [module for module in host.modules() if module is not host and is_host(module) and parts(module, names)]
    return {id(module) for other in inner for module in other.modules()}


def _unique(items: Iterator[Folded]) -> list[Folded]:
    return list({id(item.base): item for item in items}.values())

"""What an adapter changes of each weight, W' − W: as a product of factors where it is one, else whole."""

from collections.abc import Container, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._core.adapter import Adapter, can_be_merged
from .._core.finite import is_finite
from .._core.host import parts
from .._core.merged_weights import folded_by_host
from .._core.override import owner_of, weight_of
from .._core.quantized import weight_shape
from .._core.walk import adapters, hosts
from .._errors import AdapterError
from ..kinds._weight_layout import Form, form_of
from ..kinds.lora import LoRA

Pair = tuple[Tensor, Tensor]  # A [*stack, rank, in], B [*stack, out, rank], of the matrix that the weight is


class Site(NamedTuple):
    """A weight, by the module on which an adapter of it stands and its dotted name there."""

    host_name: str
    host: nn.Module
    path: str

    @property
    def name(self) -> str:
        return f"{self.host_name}.{self.path}".lstrip(".")

    @property
    def shape(self) -> tuple[int, ...]:
        owner, leaf = owner_of(self.host, self.path)
        return tuple(weight_shape(owner, leaf))

    @property
    def key(self) -> tuple[int, str]:
        """The same for every module from which the weight is reached."""
        owner, leaf = owner_of(self.host, self.path)
        return id(owner), leaf

    @property
    def weight(self) -> Tensor:
        return weight_of(self.host, self.path).detach()

    @property
    def form(self) -> type[Form] | None:
        """How factors lie beside it; None of a vector, or of a buffer, which has none."""
        owner, leaf = owner_of(self.host, self.path)
        if len(self.shape) < 2 or leaf in owner._buffers:
            return None
        return form_of(self.host, self.path, self.shape)


class Change(NamedTuple):
    """Of one weight: a pair with B A, the scale in B; or the whole, in the weight's shape."""

    site: Site
    pair: Pair | None
    dense: Tensor | None

    def whole(self) -> Tensor:
        """In the weight's shape."""
        if self.dense is not None:
            return self.dense
        assert self.pair is not None
        assert self.site.form is not None
        A, B = self.pair
        return self.site.form.weight(B @ A, self.site.shape)


@torch.no_grad()
def changes_of(model: nn.Module, name: str, doing: str) -> Iterator[Change]:
    """Weight after weight. Factors are read as they are, so that the base may be quantized or tied; whatever else a
    type makes of a weight is what `merge` would make of it, refusals included."""
    for host_name, _, adapter in adapters(model, name):
        _require_values(adapter, f'{doing}: "{name}" on {host_name or "the root"}')
    factored = _factored(model, name)
    for host_name, host in hosts(model):
        if id(host) in factored:
            for adapter in parts(host, (name,)):
                yield Change(Site(host_name, host, _lora(adapter).param), pair_of(_lora(adapter)), None)
    names = {id(host): host_name for host_name, host in hosts(model)}
    for host, items in folded_by_host(model, (name,), skipped=factored):
        for item in items:
            path = item.name.removeprefix(names[id(host)]).lstrip(".")
            yield Change(Site(names[id(host)], host, path), None, item.value - item.base)


def _require_values(adapter: Adapter, where: str) -> None:
    if not can_be_merged(adapter):
        raise AdapterError(f"{where} is a {type(adapter).__name__}, which has no merged weight. Name another adapter.")
    for key, tensor in adapter.state_dict().items():
        if tensor.is_meta or hasattr(tensor, "device_mesh"):
            found = "on the meta device" if tensor.is_meta else "a shard"
            raise AdapterError(f"{where}: {key} is {found}. Materialize or gather it first.")
        if not is_finite(tensor):
            raise AdapterError(f"{where}: {key} holds NaN or infinity. Load a finite adapter, or eject this one.")


def _factored(model: nn.Module, name: str) -> Container[int]:
    """Hosts on which all is LoRA, and around and inside which all is: there factors add up."""
    found = [(host_name, host, parts(host, (name,))) for host_name, host in hosts(model)]
    others = [host_name for host_name, _, own in found if any(type(adapter) is not LoRA for adapter in own)]
    return {
        id(host) for host_name, host, own in found if own and not any(_are_nested(host_name, other) for other in others)
    }


def _are_nested(one: str, other: str) -> bool:
    inner, outer = f"{max(one, other, key=len)}.", f"{min(one, other, key=len)}."
    return outer == "." or inner.startswith(outer)


def _lora(adapter: Adapter) -> LoRA:
    assert isinstance(adapter, LoRA)
    return adapter


def pair_of(adapter: LoRA) -> Pair:
    """In double precision, the scale in B; what did not start at zero as a second pair to subtract."""
    A, B = _flat(adapter, adapter.lora_A, adapter.lora_B)
    if adapter.init != "pissa":
        return A, adapter.scale * B
    initial_A, initial_B = _flat(adapter, adapter.initial_A, adapter.initial_B)
    return torch.cat([A, initial_A], -2), adapter.scale * torch.cat([B, -initial_B], -1)


def _flat(adapter: LoRA, lora_A: Tensor, lora_B: Tensor) -> Pair:
    wide = torch.promote_types(lora_A.dtype, torch.float64)
    return adapter.form.pair(lora_A.detach().to(wide), lora_B.detach().to(wide))

"""What the adapters of one name are made of: their tensors and seeds, which can be copied, saved, and told apart."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._core.adapter import Adapter
from .._core.randomness import Masks

# What may differ between two adapters of which one becomes a copy of the other: how it is trained, not what it is.
_OF_TRAINING = ("seed", "dropout")


class Contents:
    """The adapters of one name. What cannot change is worked out once: a copy of 882 adapters takes a few ms."""

    def __init__(self, adapters: Sequence[tuple[str, Adapter]]) -> None:
        self.adapters = adapters
        self.parameters = [*{id(p): p for _, adapter in adapters for p in adapter.parameters()}.values()]
        self.slots = [slot for _, adapter in adapters for module in adapter.modules() for slot in _slots(module)]
        self.masks = [(adapter, masks) for _, adapter in adapters for masks in _masks_of(adapter)]
        self.descriptions = [_description(one) for one in self.state()]
        self.key = repr(self.descriptions)

    def copy_from(self, other: "Contents", more_into: list[Tensor], more: list[Tensor]) -> None:
        """Of another of which `difference` is None; and more tensors, into those."""
        into, out = ([held[key] for held, key in contents.slots] for contents in (self, other))
        with torch.no_grad():
            torch._foreach_copy_(into + more_into, out + more)
        self._reseed([adapter.config.get("seed") for adapter, _ in other.masks])

    def state(self) -> list[dict[str, Any]]:
        return [{**_place(host_name, adapter), "tensors": _state(adapter)} for host_name, adapter in self.adapters]

    def load(self, state: Sequence[Mapping[str, Any]]) -> None:
        with torch.no_grad():
            for (_, adapter), saved in zip(self.adapters, state, strict=True):
                for key, tensor in _state(adapter).items():
                    tensor.copy_(saved["tensors"][key])
        self._reseed([one["config"].get("seed") for one in state if "seed" in one["config"]][: len(self.masks)])

    def difference(self, other: "Contents | Sequence[Mapping[str, Any]]") -> str | None:
        """What the other has that these have not, in words, if anything."""
        if isinstance(other, Contents) and other.key == self.key:
            return None
        theirs = other.descriptions if isinstance(other, Contents) else [*map(_description, other)]
        if [one[0] for one in theirs] != [one[0] for one in self.descriptions]:
            return "adapters on other modules"
        pairs = zip(theirs, self.descriptions, strict=True)
        return next((_in_words(one, own) for one, own in pairs if one != own), None)

    def _reseed(self, seeds: Sequence[int | None]) -> None:
        for (adapter, masks), seed in zip(self.masks, seeds, strict=True):
            if adapter.config.get("seed") != seed:
                adapter.config["seed"] = seed
                masks.reseed(seed)


def _slots(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where its tensors are, not these themselves: a move to another device replaces some."""
    buffers = [key for key in module._buffers if key not in module._non_persistent_buffers_set]
    found: list[tuple[dict[str, Any], str]] = [(module._parameters, key) for key in module._parameters]
    found += [(module._buffers, key) for key in buffers]
    return [(held, key) for held, key in found if held[key] is not None]


def _masks_of(adapter: Adapter) -> list[Masks]:
    masks = adapter._modules.get("masks")
    return [masks] if isinstance(masks, Masks) else []


def _state(adapter: Adapter) -> dict[str, Tensor]:
    return dict(adapter.state_dict())


def _place(host_name: str, adapter: Adapter) -> dict[str, Any]:
    return {"host": host_name, "kind": type(adapter).__name__, "config": dict(adapter.config)}


def _description(state: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
    config = {key: value for key, value in state["config"].items() if key not in _OF_TRAINING}
    shapes = {f"the shape of {key}": [*tensor.shape] for key, tensor in state["tensors"].items()}
    return state["host"], state["kind"], {**config, **shapes}


def _in_words(theirs: tuple[str, str, dict[str, Any]], own: tuple[str, str, dict[str, Any]]) -> str:
    (host, kind, config), (_, own_kind, own_config) = theirs, own
    where = f"on {host or 'the root'}"
    if kind != own_kind:
        return f"{kind} {where}, not {own_kind}"
    key = next(key for key in {**config, **own_config} if config.get(key) != own_config.get(key))
    return f"{key}={config.get(key)} {where}, not {own_config.get(key)}"

"""What the adapters of one name are made of: their tensors and seeds, which can be copied, saved, and told apart."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._core.adapter import KINDS, Adapter, takes_keyword
from .._core.randomness import Masks

_torch: Any = torch  # whose types leave out its functions on lists


class Contents:
    """The adapters of one name. What cannot change is worked out once: a copy of 882 adapters takes a few ms."""

    def __init__(self, adapters: Sequence[tuple[str, Adapter]]) -> None:
        self.adapters = adapters
        self.parameters = [*{id(p): p for _, adapter in adapters for p in adapter.parameters()}.values()]
        self.slots = [slot for _, adapter in adapters for module in adapter.modules() for slot in _slots(module)]
        self.descriptions = [_description(one) for one in self.state()]
        self.key = repr(self.descriptions)

    def copy_from(self, other: "Contents", more_into: list[Tensor], more: list[Tensor]) -> None:
        """Of another of which `difference` is None; and more tensors, into those."""
        into, out = ([held[key] for held, key in contents.slots] for contents in (self, other))
        with torch.no_grad():
            _torch._foreach_copy_(into + more_into, out + more)
        self._reseed([adapter.config for _, adapter in other.adapters])

    def state(self) -> list[dict[str, Any]]:
        return [{**_place(host_name, adapter), "tensors": _state(adapter)} for host_name, adapter in self.adapters]

    def load(self, state: Sequence[Mapping[str, Any]]) -> None:
        with torch.no_grad():
            for (_, adapter), saved in zip(self.adapters, state, strict=True):
                for key, tensor in _state(adapter).items():
                    tensor.copy_(saved["tensors"][key])
        self._reseed([saved["config"] for saved in state])

    def difference(self, other: "Contents | Sequence[Mapping[str, Any]]") -> str | None:
        """What the other has that these have not, in words, if anything."""
        if isinstance(other, Contents) and other.key == self.key:
            return None
        theirs = other.descriptions if isinstance(other, Contents) else [*map(_description, other)]
        if [one[0] for one in theirs] != [one[0] for one in self.descriptions]:
            return "adapters on other modules"
        pairs = zip(theirs, self.descriptions, strict=True)
        return next((_in_words(one, own) for one, own in pairs if one != own), None)

    def _reseed(self, configs: Iterable[Mapping[str, Any]]) -> None:
        for (_, adapter), config in zip(self.adapters, configs, strict=True):
            masks = adapter._modules.get("masks")
            if isinstance(masks, Masks) and adapter.config["seed"] != config["seed"]:
                adapter.config["seed"] = config["seed"]
                masks.reseed(config["seed"])


def _slots(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where its tensors are, not these themselves: a move to another device replaces some."""
    buffers = [key for key in module._buffers if key not in module._non_persistent_buffers_set]
    found: list[tuple[dict[str, Any], str]] = [(module._parameters, key) for key in module._parameters]
    found += [(module._buffers, key) for key in buffers]
    return [(held, key) for held, key in found if held[key] is not None]


def _state(adapter: Adapter) -> dict[str, Tensor]:
    return dict(adapter.state_dict())


def _place(host_name: str, adapter: Adapter) -> dict[str, Any]:
    return {"host": host_name, "kind": type(adapter).__name__, "config": dict(adapter.config)}


def _description(state: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """What two adapters must have in common if one is to become a copy of the other: dropout is how it is trained, and
    a seed goes with the copy, unless the type has a use of its own for it."""
    free = {"dropout"} if takes_keyword(KINDS.get(state["kind"], Adapter), "seed") else {"dropout", "seed"}
    config = {key: value for key, value in state["config"].items() if key not in free}
    shapes = {f"the shape of {key}": [*tensor.shape] for key, tensor in state["tensors"].items()}
    return state["host"], state["kind"], {**config, **shapes}


def _in_words(theirs: tuple[str, str, dict[str, Any]], own: tuple[str, str, dict[str, Any]]) -> str:
    (host, kind, config), (_, own_kind, own_config) = theirs, own
    where = f"on {host or 'the root'}"
    if kind != own_kind:
        return f"{kind} {where}, not {own_kind}"
    key = next(key for key in {**config, **own_config} if config.get(key) != own_config.get(key))
    return f"{key}={config.get(key)} {where}, not {own_config.get(key)}"

"""(IA)³ in the files of HF peft: a factor for each layer, on its outputs, or its inputs where it is `feedforward`."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .._core.inject import Part
from .._errors import AdapterError
from ..kinds._low_rank import low_rank_branch_of
from ..kinds._weight_layout import is_transposed_linear
from ..kinds.full import Full
from ..kinds.ia3 import IA3
from .config import Config
from .lora_read import kept_parts
from .lora_sites import PREFIX, Sites
from .modules import Modules
from .modules_to_save import Found, Tensors, copies_of, kept_tensors, require_exactly_kept, with_heads
from .refusals import class_of
from .targets import module_target, modules_named, named_by, one_of
from .tensors import FileTensors

_SUFFIX = "ia3_l"
_HOSTS = (nn.Linear, nn.Conv2d, nn.Conv3d)


def ia3_parts(modules: Modules, config: Config, tensors: FileTensors | None, where: str) -> list[Part]:
    """Adapters with the file's factors, or fresh ones."""
    sites = _sites(modules, config)
    if config["feedforward_modules"] is None:
        raise AdapterError(f"{where}: feedforward_modules is missing, and there are no defaults here. Name them.")
    kept = kept_parts(modules, config, sites, tensors)
    parts = [_part(modules, name, config, tensors) for name in sites.depths]
    if tensors is not None:
        tensors.require_all_taken()
    return [*kept, *parts]


def _sites(modules: Modules, config: Config) -> Sites:
    return Sites([], dict.fromkeys(modules_named(modules, config), 1))


def _part(modules: Modules, name: str, config: Config, tensors: FileTensors | None) -> Part:
    host = modules.by_name[name]
    _require_same(modules, name, host)
    on = "input" if _is_feedforward(config["feedforward_modules"], name) else "output"
    found = None
    if tensors is not None:
        found = {"factor": tensors.take(f"{PREFIX}{name}.{_SUFFIX}", _shape(host, on)).flatten()}
    return Part(name, host, IA3, {"on": on}, found)


def _require_same(modules: Modules, name: str, host: nn.Module) -> None:
    reason = None
    if modules.place(name).inner:
        reason = "its parent reads it without calling it, so the factor never acts"
    elif not isinstance(host, _HOSTS) and not is_transposed_linear(host):
        reason = f"peft has no (IA)³ for {class_of(host)}"
    elif low_rank_branch_of(host, "weight") is None:
        reason = f"{class_of(host)} has a forward of its own; peft scales around it, here the weight is scaled"
    if reason:
        raise AdapterError(f"{name}: {reason}. Leave this layer out.")


def _shape(host: Any, on: str) -> tuple[int, ...]:
    if isinstance(host, (nn.Conv2d, nn.Conv3d)):
        return (1, host.in_channels if on == "input" else host.out_channels, *[1] * (host.weight.dim() - 2))
    sizes = host.weight.shape if is_transposed_linear(host) else (host.in_features, host.out_features)
    return (1, sizes[0]) if on == "input" else (sizes[1], 1)


def _is_feedforward(named: Any, name: str) -> bool:
    return named_by(named)(name) if isinstance(named, str) else name.endswith(tuple(named))


def ia3_files(modules: Modules, found: Found, task: str | None = None) -> tuple[Config, Tensors]:
    """The configuration and the tensors by their keys."""
    factors = {modules.name_of[id(host)]: (host, adapter) for host, adapter in found if isinstance(adapter, IA3)}
    other = sorted({type(each).__name__ for _, each in found if not isinstance(each, (IA3, Full))})
    if other:
        raise AdapterError(f"{', '.join(other)} beside IA3 has no place in peft's file. Save it by a name of its own.")
    for name, (host, _) in factors.items():
        _require_same(modules, name, host)
    own, kept = copies_of(modules, found, set(factors))
    if own or any(isinstance(each, Full) and each.rows is not None for _, each in found):
        raise AdapterError("peft keeps no learned bias and no rows of weights beside (IA)³. Save them by another name.")
    kept = with_heads(modules, task, kept, factors)
    config: Config = {
        "peft_type": "IA3", "inference_mode": True, "exclude_modules": None, "modules_to_save": sorted(kept) or None,
        "fan_in_fan_out": any(is_transposed_linear(host) for host, _ in factors.values()),
    }  # fmt: skip
    config["target_modules"] = module_target(modules, config, factors)
    config["feedforward_modules"] = _feedforward(config["target_modules"], {n: a.on for n, (_, a) in factors.items()})
    require_exactly_kept(modules, config, kept)
    sites = _sites(modules, config)
    return config, {**dict(_tensors(sites, factors)), **kept_tensors(sites, kept)}


def _tensors(sites: Sites, factors: dict[str, tuple[nn.Module, IA3]]) -> Iterator[tuple[str, Tensor]]:
    for name, (host, adapter) in factors.items():
        path = sites.path(name).removesuffix(".base_layer")
        yield f"{PREFIX}{path}.{_SUFFIX}", adapter.factor.detach().reshape(_shape(host, adapter.on))


def _feedforward(targets: Any, sides: dict[str, str]) -> Any:
    """A list that is among the targets where peft asks for that, else an expression."""
    inputs = [name for name, side in sides.items() if side == "input"]
    leaves = sorted({name.rpartition(".")[2] for name in inputs})
    exact = all(name.endswith(tuple(leaves)) == (side == "input") for name, side in sides.items())
    if not inputs or (exact and isinstance(targets, list) and set(leaves) <= set(targets)):
        return leaves
    return one_of(inputs)

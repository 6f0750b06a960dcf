"""Where a LoRA configuration of HF peft puts its pairs: the keys in its file, and the places in the model."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from .._core.foreign import reader_of
from .._core.walk import candidates
from .._errors import AdapterError
from .config import Config
from .lora_layouts import Layout, layout_of
from .refusals import class_of
from .targets import modules_named, parameters_named, pattern_value

PREFIX = "base_model.model."
_INSIDE = ".base_layer"


class Site(NamedTuple):
    """One pair: `path` before its suffix in the file, `key` that patterns match, and its place here."""

    path: str
    key: str
    host_name: str
    host: nn.Module
    param: str
    layout: Layout
    rank: int
    alpha: float

    def __str__(self) -> str:
        return self.key


class Sites(NamedTuple):
    """All pairs of a configuration, and how deep each wrapped module lies in peft's own model."""

    pairs: list[Site]
    depths: dict[str, int]

    def path(self, name: str) -> str:
        """A module's path in peft's model: what wraps a module on the way adds a level, as does what wraps itself."""
        parts = name.split(".")
        prefixes = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        levels = (_INSIDE * self.depths.get(prefix, 0) for prefix in prefixes)
        return "".join(f".{part}{level}" for part, level in zip(parts, levels, strict=True)).lstrip(".")


def sites_of(model: nn.Module, config: Config) -> Sites:
    by_name = dict(candidates(model))
    modules = modules_named(model, config)
    parameters = parameters_named(model, config)
    both = sorted(set(modules) & parameters.keys())
    if both:
        raise AdapterError(
            f"{both[0]}: target_modules and target_parameters both name it, which peft refuses. Name it once."
        )
    depths = dict.fromkeys(modules, 1) | {name: len(leaves) for name, leaves in parameters.items()}
    depths |= {f"{name}.out_proj": 1 for name in modules if isinstance(by_name[name], nn.MultiheadAttention)}
    sites = Sites([], depths)
    for name in modules:
        sites.pairs.extend(_of_module(model, config, sites, name, by_name[name]))
    for name, leaves in parameters.items():
        sites.pairs.extend(_of_parameters(config, sites, name, by_name[name], leaves))
    return sites


def _of_module(model: nn.Module, config: Config, sites: Sites, name: str, module: nn.Module) -> Iterator[Site]:
    host_name, _, inner = reader_of(model, name, module)
    if inner:
        raise AdapterError(
            f"{name}: its parent reads it without calling it, so peft's adapter there never acts. "
            f"Target {host_name.rpartition('.')[2] or 'the parent'!r}, which takes it along."
        )
    path = sites.path(name).removesuffix(_INSIDE)
    if isinstance(module, nn.MultiheadAttention):
        yield _site(config, path, name, name, module, "in_proj_weight")
        yield _site(config, f"{path}{_INSIDE}.out_proj", name, name, module, "out_proj.weight")
        return
    yield _site(config, path, name, name, module, "weight")


def _of_parameters(config: Config, sites: Sites, name: str, module: nn.Module, leaves: list[str]) -> Iterator[Site]:
    """The last one is outermost in peft's model."""
    path = sites.path(name).removesuffix(_INSIDE * len(leaves))
    for depth, leaf in enumerate(reversed(leaves)):
        yield _site(config, path + _INSIDE * depth, f"{name}.{leaf}", name, module, leaf)


def _site(config: Mapping[str, Any], path: str, key: str, name: str, host: nn.Module, param: str) -> Site:
    try:
        layout = layout_of(host, param)
    except AttributeError:
        raise AdapterError(
            f"{name}: {class_of(host)} has no {param}, so peft refuses it. Narrow the targets."
        ) from None
    except AdapterError as error:
        raise AdapterError(f"{name}: {error}") from None
    rank = pattern_value(config["rank_pattern"], key, config["r"])
    alpha = pattern_value(config["alpha_pattern"], key, config["lora_alpha"])
    return Site(path, key, name, host, param, layout, rank, alpha)

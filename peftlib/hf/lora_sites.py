"""Where a LoRA configuration of HF peft puts its pairs: the keys in its file, and the places in the model."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from .._errors import AdapterError
from .config import Config
from .lora_layouts import Layout, layout_of
from .modules import Modules
from .refusals import class_of
from .targets import PREFIX as PREFIX
from .targets import Patterns, modules_named, parameters_named

_INSIDE = ".base_layer"


class Site(NamedTuple):
    """One pair: `path` before its suffix in the file, `key` that patterns match, the module's name and the weight in it
    (`at`), and its place here."""

    path: str
    key: str
    at: tuple[str, str]
    host_name: str
    host: nn.Module
    param: str
    layout: Layout
    rank: int
    alpha: float

    def __str__(self) -> str:
        return self.key


def scale_of(alpha: float, rank: int, stabilized: bool) -> float:
    return alpha / (math.sqrt(rank) if stabilized else rank)


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


def sites_of(modules: Modules, config: Config) -> Sites:
    named, parameters = modules_named(modules, config), parameters_named(modules, config)
    both = sorted(set(named) & parameters.keys())
    if both:
        raise AdapterError(
            f"{both[0]}: target_modules and target_parameters both name it, which peft refuses. Name it once."
        )
    depths = dict.fromkeys(named, 1) | {name: len(leaves) for name, leaves in parameters.items()}
    depths |= {f"{name}.out_proj": 1 for name in named if isinstance(modules.by_name[name], nn.MultiheadAttention)}
    sites = Sites([], depths)
    ranks = Patterns(config["rank_pattern"], config["r"])
    alphas = Patterns(config["alpha_pattern"], config["lora_alpha"])
    for place in _places(modules, sites, named, parameters):
        sites.pairs.append(place._replace(rank=ranks.value(place.key), alpha=alphas.value(place.key)))
    return sites


def _places(modules: Modules, sites: Sites, named: list[str], parameters: dict[str, list[str]]) -> Iterator[Site]:
    for name in named:
        path, module = sites.path(name).removesuffix(_INSIDE), modules.by_name[name]
        if isinstance(module, nn.MultiheadAttention):
            yield site_of(modules, path, name, "in_proj_weight")
            yield site_of(modules, f"{path}{_INSIDE}.out_proj", name, "out_proj.weight")
        else:
            yield site_of(modules, path, name)
    for name, leaves in parameters.items():  # the last one is outermost in peft's model
        path = sites.path(name).removesuffix(_INSIDE * len(leaves))
        for depth, leaf in enumerate(reversed(leaves)):
            site = site_of(modules, path + _INSIDE * depth, name, leaf)
            yield site._replace(key=f"{name}.{leaf}")


def site_of(modules: Modules, path: str, name: str, param: str = "weight", rank: int = 0, alpha: float = 0) -> Site:
    """The place of a pair on one weight; refused where peft cannot adapt it, or where no adapter would act."""
    host_name, host, inner, called = modules.place(name)
    if not called:
        raise AdapterError(
            f"{name}: its parent reads it without calling it, so peft's adapter there never acts. "
            f"Target {host_name.rpartition('.')[2] or 'the parent'!r}, which takes it along."
        )
    where = f"{inner}.{param}".lstrip(".")
    try:
        layout = layout_of(host, where)
    except AttributeError:
        raise AdapterError(
            f"{name}: {class_of(host)} has no {param}, so peft refuses it. Narrow the targets."
        ) from None
    except AdapterError as error:
        raise AdapterError(f"{name}: {error}") from None
    return Site(path, name, (name, param), host_name, host, where, layout, rank, alpha)

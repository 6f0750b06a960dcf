"""The pairs of a file of HF peft under the keys of kohya and diffusers."""

import json
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._errors import AdapterError
from ..files.header import some
from ..hf.config import Config
from ..hf.lora_layouts import Layout
from ..hf.lora_read import MAGNITUDE
from ..hf.lora_sites import PREFIX, Site, sites_of
from .keys import METADATA, A, B

Written = tuple[dict[str, Tensor], dict[str, str]]


class Component(NamedTuple):
    """What its keys begin with, its module, and the configuration and the tensors that peft would get."""

    name: str
    part: nn.Module
    config: Config
    tensors: dict[str, Tensor]


def as_diffusers(components: list[Component]) -> Written:
    """Tensors and metadata."""
    tensors: dict[str, Tensor] = {}
    for each in components:
        _require_pairs("diffusers", each, (A, B, MAGNITUDE))
        tensors |= {f"{each.name}.{key.removeprefix(PREFIX)}": tensor for key, tensor in each.tensors.items()}
    said = {f"{each.name}.{key}": value for each in components for key, value in each.config.items()}
    return tensors, {METADATA: json.dumps(said, indent=2, sort_keys=True)}


def as_kohya(components: list[Component]) -> Written:
    """Tensors and metadata."""
    tensors: dict[str, Tensor] = {}
    for each in components:
        _require_pairs("kohya", each, (A, B))
        for site in sites_of(each.part, each.config).pairs:
            stem = f"{each.name}_{site.key.replace('.', '_')}"
            if f"{stem}.alpha" in tensors:
                raise AdapterError(f"{site.key}: kohya writes it as {stem}, like another module. Rename one of them.")
            tensors |= {f"{stem}.{key}": tensor for key, tensor in _kohya_pair(each, site).items()}
    return tensors, {"ss_network_module": "networks.lora"}


def _kohya_pair(component: Component, site: Site) -> dict[str, Tensor]:
    if site.path != site.key or type(site.layout) is not Layout:
        raise AdapterError(f"{site.key}: kohya adapts Linear and ungrouped convolutions alone. Merge it instead.")
    down, up = (component.tensors[f"{PREFIX}{site.path}.{factor}"] for factor in (A, B))
    alpha = site.alpha * site.rank**0.5 if component.config["use_rslora"] else site.alpha
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(float(alpha))}


def _require_pairs(layout: str, component: Component, kinds: tuple[str, ...]) -> None:
    other = sorted(key.removeprefix(PREFIX) for key in component.tensors if not key.endswith(kinds))
    if other:
        raise AdapterError(f"{some(other)}: {layout} has no place for it. Save it under another name, or merge it.")

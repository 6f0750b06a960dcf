"""What a LoRA file of kohya, diffusers, loralib or torchtune says, in the terms of HF peft."""

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._core.inject import Part
from .._core.walk import candidates
from .._errors import AdapterError
from ..files.container import Path, listed, opened, read_tensor
from ..files.header import strict_json
from ..hf.config import Config, checked, plain
from ..hf.lora_read import MAGNITUDE, lora_parts
from ..hf.lora_sites import PREFIX
from ..hf.targets import exact_patterns
from ..hf.tensors import FileTensors
from .keys import ALPHA, METADATA, A, Key, peft_name


class Source(NamedTuple):
    where: str
    shapes: dict[str, list[int]]
    read: Callable[[str], Tensor]
    metadata: Mapping[str, str]


@contextlib.contextmanager
def opened_source(source: Path | Mapping[str, Tensor]) -> Iterator[Source]:
    if isinstance(source, Mapping):
        yield Source("source", {k: list(t.shape) for k, t in source.items()}, lambda key: source[key].detach(), {})
        return
    with opened(source) as file:
        shapes = {key: one["shape"] for key, one in listed(file).items()}
        yield Source(os.fspath(source), shapes, lambda key: read_tensor(file, key), file.metadata() or {})


def parts_of(
    layout: str, component: str, part: nn.Module, keys: list[Key], found: Source, alpha: float | None
) -> list[Part]:
    if not keys:
        raise AdapterError(f"{found.where}: no key begins with {component!r}. Name the components that are there.")
    by_name = dict(candidates(part))
    place = {f"{PREFIX}{k.module}.{peft_name(k.what, by_name[k.module])}": k for k in keys if k.what != ALPHA}
    shapes = {at: _shape(found.shapes[key.key], by_name[key.module]) for at, key in place.items()}
    said = _said(found, component) if layout == "diffusers" else None
    config = said or _config(keys, found, alpha)
    if layout == "kohya":
        _require_ungrouped(by_name, keys)
    tensors = FileTensors(
        shapes, lambda at: found.read(place[at].key).reshape(shapes[at]), found.where,
        {at: key.key for at, key in place.items()},
    )  # fmt: skip
    return lora_parts(part, config, tensors)


def _shape(shape: list[int], module: nn.Module) -> list[int]:
    """kohya keeps some Linear layers as convolutions of one pixel."""
    return shape[:2] if isinstance(module, nn.Linear) and shape[2:] == [1, 1] else shape


def _require_ungrouped(by_name: dict[str, Any], keys: list[Key]) -> None:
    for key in keys:
        if getattr(by_name[key.module], "groups", 1) != 1:
            raise AdapterError(f"{key.module}: kohya ignores the groups of a convolution. Leave this layer out.")


def _said(found: Source, component: str) -> Config | None:
    """The configuration that diffusers writes into its metadata."""
    if METADATA not in found.metadata:
        return None
    said, begin = strict_json(found.metadata[METADATA], found.where), f"{component}."
    if not isinstance(said, dict):
        raise AdapterError(f"{found.where}: its {METADATA} is no JSON object. Save it again.")
    own = {key.removeprefix(begin): value for key, value in said.items() if key.startswith(begin)}
    return checked(own, found.where) if own else None


def _config(keys: list[Key], found: Source, alpha: float | None) -> Config:
    """A configuration of peft for exactly these modules, ranks and scales."""
    ranks = {key.module: found.shapes[key.key][0] for key in keys if key.what == A and found.shapes[key.key]}
    alphas: dict[str, float] = {module: rank if alpha is None else alpha for module, rank in ranks.items()}
    for key in keys:
        if key.what == ALPHA:
            alphas[key.module] = _number(found, key.key)
    modules = sorted({key.module for key in keys})
    return checked(
        {
            "target_modules": f"({'|'.join(map(re.escape, modules))})",
            "rank_pattern": exact_patterns(ranks, None),
            "alpha_pattern": exact_patterns(alphas, None),
            "use_dora": any(key.what == MAGNITUDE for key in keys),
        },
        found.where,
    )


def _number(found: Source, key: str) -> float:
    tensor = found.read(key) if found.shapes[key] in ([], [1]) else torch.empty(2)
    if tensor.numel() != 1 or not torch.isfinite(tensor):
        raise AdapterError(f"{found.where}: {key} is no finite number. Save it again.")
    return plain(tensor.item())

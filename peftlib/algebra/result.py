"""An adapter made of changes: LoRA where a change is a product of factors, a copy of the weight where it is not."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .._core.inject import Part
from ..kinds.full import Full
from ..kinds.lora import LoRA
from .changes import Change, Pair, Site
from .low_rank import nearest


@torch.no_grad()
def parts_of(changes: Iterable[Change], rank: int | None) -> tuple[list[Part], dict[str, float]]:
    """The parts, and by the weight's name what is left out, relative to the change. Without a rank nothing is."""
    found: list[Part] = []
    errors: dict[str, float] = {}
    copies: dict[int, list[tuple[Site, Tensor]]] = {}
    for change in changes:
        site = change.site
        errors[site.name] = 0.0
        if site.form is None or (change.pair is None and rank is None):
            copies.setdefault(id(site.host), []).append((site, _moved(site.weight, change.whole())))
            continue
        pair = change.pair
        if rank is not None:
            matrix = None if change.dense is None else site.form.matrix(change.dense)
            pair, errors[site.name] = nearest(pair, matrix, rank)
        assert pair is not None
        found.append(_low_rank(site, pair))
    return [*found, *map(_copy, copies.values())], errors


def _moved(weight: Tensor, change: Tensor) -> Tensor:
    """In the wider dtype of both; a count in its own."""
    return weight + change if weight.is_floating_point() or weight.is_complex() else weight + change.to(weight.dtype)


def _low_rank(site: Site, pair: Pair) -> Part:
    """With scale 1: alpha is the rank."""
    rank = pair[0].shape[-2]
    assert site.form is not None
    shapes = site.form.shapes(site.shape, rank)
    lora_A, lora_B = (torch.empty(shape, dtype=pair[0].dtype, device=pair[0].device) for shape in shapes)
    for view, values in zip(site.form.pair(lora_A, lora_B), pair, strict=True):
        view.copy_(values)
    prefix = "" if site.path == "weight" else f"{site.path}."
    config = {"rank": rank, "alpha": float(rank), "param": site.path}
    return Part(site.host_name, site.host, LoRA, config, {f"{prefix}lora_A": lora_A, f"{prefix}lora_B": lora_B})


def _copy(values: list[tuple[Site, Any]]) -> Part:
    site = values[0][0]
    tensors = {at.path: value for at, value in values}
    return Part(site.host_name, site.host, Full, {"params": [*tensors]}, tensors)

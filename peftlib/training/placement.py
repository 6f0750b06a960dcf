"""Putting a trial's parts into a model under one name, all or nothing, and without changing what acts there."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from .._core.activate import activate
from .._core.adapter import Adapter
from .._core.eject import eject
from .._core.inject import inject
from .._core.targets import Targets
from .._core.walk import adapters, all_hosts
from .._errors import AdapterError

Part = tuple[Targets, type[Adapter], Mapping[str, Any]]


def as_parts(name: str, parts: Any) -> list[Part]:
    several = [parts] if isinstance(parts, tuple) and not all(map(_is_part, parts)) else parts
    if not isinstance(several, (list, tuple)) or not several or not all(map(_is_part, several)):
        raise AdapterError(
            f"trial {name!r}: parts={parts!r} is no list of parts. Pass (targets, type, keywords) or several of these: "
            '("q_proj", peftlib.LoRA, {"rank": 8}).'
        )
    return [*several]


@contextlib.contextmanager
def placed_aside(model: nn.Module, name: str, parts: list[Part], seed: int) -> Iterator[list[tuple[str, Adapter]]]:
    """The adapters by host. If the block raises, the model is as it was.

    What acts is switched off meanwhile, for copies of one weight that act together are refused."""
    with _switched_off(model):
        try:
            for targets, kind, keywords in parts:
                inject(model, targets, kind, name=name, seed=seed, **keywords)
            yield [(host_name, adapter) for host_name, _, adapter in adapters(model, name)]
        except BaseException:
            if any(True for _ in adapters(model, name)):
                eject(model, name)
            raise


@contextlib.contextmanager
def _switched_off(model: nn.Module) -> Iterator[None]:
    """What acted before comes back, with its weights; what came in meanwhile is off."""
    if _has_hosts(model):
        with activate(model):
            yield
        return
    try:
        yield
    finally:
        if _has_hosts(model):
            activate(model)


def _is_part(part: Any) -> bool:
    return isinstance(part, (tuple, list)) and len(part) == 3 and isinstance(part[2], Mapping)


def _has_hosts(model: nn.Module) -> bool:
    return bool(all_hosts(model))

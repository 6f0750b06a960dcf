"""Replicas: what trains must be among the parameters whose gradients DistributedDataParallel averages."""

import gc
from collections.abc import Collection, Iterable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .._errors import AdapterError


def require_averaged(doing: str, parameters: Iterable[nn.Parameter], advice: str) -> None:
    """DDP averages the gradients of what required one when it was made, and of nothing else, without a word."""
    if not _has_replicas():
        return
    training = {id(p) for p in parameters}
    for wrapper, names, count in _left_alone(training):
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise AdapterError(
            f"{doing}: {shown} would train, and DistributedDataParallel around {type(wrapper.module).__name__}, which "
            f"was made before, averages the gradients of {count} other parameters alone. {advice}."
        )


def require_outside(doing: str, hosts: Collection[tuple[str, nn.Module]], advice: str) -> None:
    """The same of adapters that are about to come to these modules."""
    if not _has_replicas():
        return
    names = {id(host): name for name, host in hosts}
    for wrapper in _wrappers():
        inside = next((names[id(module)] for module in wrapper.modules() if id(module) in names), None)
        if inside is not None:
            raise AdapterError(
                f"{doing}: {inside or 'the root'} is inside a DistributedDataParallel that was made before, which "
                f"would never average what comes to it now. {advice}."
            )


def _has_replicas() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _left_alone(training: set[int]) -> list[tuple[Any, list[str], int]]:
    """Wrappers around some of these, the names of what each of them does not average, and how many it does."""
    found = []
    for wrapper in _wrappers():
        named = [(n, p) for n, p in wrapper.module.named_parameters() if n not in wrapper.parameters_to_ignore]
        if any(id(p) in training for _, p in named):
            averaged = {id(p) for bucket in _buckets(wrapper) for p in bucket.parameters()}
            names = [name for name, p in named if id(p) in training and id(p) not in averaged]
            found += [(wrapper, names, len(averaged))] if names else []
    return found


def _buckets(wrapper: Any) -> list[Any]:
    """What it hands from process to process: the one thing that says which parameters these are."""
    return wrapper.reducer._get_zeros_like_grad_buckets()


def _wrappers() -> list[Any]:
    """All that are alive. One that was thrown away may still stand in a cycle."""
    if not any(_is_wrapper(each) for each in gc.get_objects()):
        return []
    gc.collect()
    return [each for each in gc.get_objects() if _is_wrapper(each)]


def _is_wrapper(each: object) -> bool:
    return issubclass(type(each), DistributedDataParallel)

"""Replicas: what trains must be among the parameters whose gradients DistributedDataParallel averages."""

import gc
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .._errors import AdapterError

_T = TypeVar("_T")


def require_averaged(doing: str, parameters: Iterable[nn.Parameter], advice: str) -> None:
    """DDP averages the gradients of what required one when it was made, and of nothing else, without a word."""
    if not _has_replicas():
        return
    training = {id(p) for p in parameters}
    for around, names, count in _found(lambda: _left_alone(training)):
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise AdapterError(
            f"{doing}: {shown} would train, and DistributedDataParallel around {around}, which was made before, "
            f"averages the gradients of {count} other parameters alone. {advice}."
        )


def require_outside(doing: str, hosts: Collection[tuple[str, nn.Module]], advice: str) -> None:
    """The same of adapters that are about to come to these modules."""
    if not _has_replicas():
        return
    names = {id(host): name for name, host in hosts}
    for inside in _found(lambda: [names[id(m)] for one in _wrappers() for m in one.modules() if id(m) in names]):
        raise AdapterError(
            f"{doing}: {inside or 'the root'} is inside a DistributedDataParallel that was made before, which would "
            f"never average what comes to it now. {advice}."
        )


def _has_replicas() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _left_alone(training: set[int]) -> list[tuple[str, list[str], int]]:
    """For each wrapper around some of these what is in it, the names that it does not average, and how many it does.
    No wrapper itself: the traceback of a refusal, which notebooks keep, would keep it alive."""
    found = []
    for wrapper in _wrappers():
        named = [(n, p) for n, p in wrapper.module.named_parameters() if n not in wrapper.parameters_to_ignore]
        if any(id(p) in training for _, p in named):
            averaged = {id(p) for bucket in _buckets(wrapper) for p in bucket.parameters()}
            names = [name for name, p in named if id(p) in training and id(p) not in averaged]
            found += [(type(wrapper.module).__name__, names, len(averaged))] if names else []
    return found


def _buckets(wrapper: Any) -> list[Any]:
    """What it hands from process to process: the one thing that says which parameters these are."""
    ask = getattr(wrapper.reducer, "_get_zeros_like_grad_buckets", None)  # private
    if ask is None:
        raise AdapterError(
            f"torch {torch.__version__} does not say which gradients its DistributedDataParallel averages, so those of "
            "adapters may be left out in silence. Choose what trains first, and make the DistributedDataParallel after "
            "it."
        )
    return ask()


def _found(search: Callable[[], list[_T]]) -> list[_T]:
    """What a search among the wrappers finds. One that was thrown away may still stand in a cycle, so what is found is
    looked for again without those; to collect them each time would take longer than all the rest."""
    if not search():
        return []
    gc.collect()
    return search()


def _wrappers() -> list[Any]:
    """All that are there. Torch keeps no list of them; each refers to its class, and so a search in C finds them."""
    kinds = (DistributedDataParallel, *_derived_from(DistributedDataParallel))
    return [each for each in gc.get_referrers(*kinds) if isinstance(each, DistributedDataParallel)]


def _derived_from(cls: type) -> Iterator[type]:
    for each in cls.__subclasses__():
        yield each
        yield from _derived_from(each)

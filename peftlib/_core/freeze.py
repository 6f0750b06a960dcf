"""A frozen base: its parameters get no gradient, its statistics are held, and a buffer that moves is noticed."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .foreign import keeps_statistics
from .host import BUFFERS, Selection, attach, is_host
from .merge import base_weight
from .swap import brought_along
from .walk import all_hosts, base_modules, candidates, selections_of

_FROZEN = "_peftlib_frozen"
_LARGEST = 2**24  # bytes; what is larger is a table or a quantized weight, and copies of them would be a second model
_MOST_INTEGERS = 2**10  # counters, not codes


def freeze_base(base: Iterable[tuple[str, nn.Module]], selection: Selection) -> list[str]:
    """Remembers on each of these modules which of its parameters trained, by name: others may replace the parameters;
    and its buffers, by value. What moves running statistics becomes a host, whose forward holds them; the names are
    those of what was none before."""
    held: list[str] = []
    for name, module in base:
        own: dict[str, Any] = module._parameters
        on = [leaf for leaf, p in own.items() if p is not None and p.requires_grad] if own else ()
        if on:
            module.__dict__[_FROZEN] = (*module.__dict__.get(_FROZEN, ()), *on)
            for leaf in on:
                own[leaf].requires_grad_(False)
        if not module._buffers:
            continue
        if BUFFERS not in module.__dict__:
            kept = {
                leaf: (buffer, buffer.detach().clone())
                for leaf, buffer in persistent_buffers(module)
                if _is_state(buffer)
            }
            if kept or keeps_statistics(module):
                module.__dict__[BUFFERS] = kept
        if keeps_statistics(module) and not is_host(module):
            attach(name, module, selection)
            held.append(name)
    return held


def unfreeze_base(model: nn.Module, *, keep_buffers: bool) -> None:
    if not keep_buffers:
        with torch.no_grad():
            for _, module, leaf, own, kept in _moved(model):
                _put_back(module._buffers, leaf, own, kept)
    for module in base_modules(model):
        module.__dict__.pop(BUFFERS, None)
        for leaf in module.__dict__.pop(_FROZEN, ()):
            parameter = module._parameters.get(leaf)  # gone where something pruned, parametrized or packed it since
            if parameter is not None and (parameter.is_floating_point() or parameter.is_complex()):
                parameter.requires_grad_(True)


def held_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Hosts that have no adapter of their own, perhaps, and hold their statistics while the model has some."""
    return (module for module in base_modules(model) if BUFFERS in module.__dict__ and keeps_statistics(module))


def moved_buffers(model: nn.Module) -> list[str]:
    """The buffers of the base whose values are no longer those of when adapters came in."""
    if is_reloaded(model):
        return []
    return [f"{name}.{leaf}".lstrip(".") for name, _, leaf, *_ in _moved(model)]


def is_reloaded(model: nn.Module) -> bool:
    """Whether a checkpoint of the base was loaded since, so that what is remembered is that of another base."""
    return any(selection.reloaded for selection in selections_of(all_hosts(model)))


@contextlib.contextmanager
def statistics_held(modules: Iterable[nn.Module]) -> Iterator[None]:
    """For what reads weights while the adapters that hold statistics are yet to come: to compute a parametrized weight
    may take a step of its power iteration."""
    moving = [module for module in modules if module._buffers and module.training and keeps_statistics(module)]
    try:
        for module in moving:
            module.training = False
        yield
    finally:
        for module in moving:
            module.training = True


def _put_back(buffers: dict[str, Any], leaf: str, own: Tensor, kept: Tensor) -> None:
    """Into the tensor itself; where the model assigned another, perhaps the caller's input, that one is let go."""
    found = buffers[leaf]
    if found is own and found.shape == kept.shape:
        found.copy_(kept)
    else:
        buffers[leaf] = brought_along(kept, found)


def _moved(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor, Tensor]]:
    remembered = any(module.__dict__.get(BUFFERS) for module in base_modules(model))
    for name, module in candidates(model) if remembered else ():
        for leaf, (own, kept) in module.__dict__.get(BUFFERS, {}).items():
            buffer = module._buffers.get(leaf)
            if buffer is None or buffer.is_meta:
                continue
            found = base_weight(module, leaf)
            if not torch.equal(kept.to(found), found):
                yield name, module, leaf, own, kept


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for leaf, buffer in module._buffers.items():
        if buffer is not None and leaf not in module._non_persistent_buffers_set:
            yield leaf, buffer


def _is_state(buffer: Tensor) -> bool:
    """Plain values, of a size that statistics have."""
    if type(buffer) is not Tensor or buffer.is_meta:
        return False
    return buffer.nbytes <= _LARGEST and (buffer.is_floating_point() or buffer.numel() <= _MOST_INTEGERS)

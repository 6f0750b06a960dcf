"""How many features a module of an unknown class has: by a forward pass on the meta device, where it can run alone."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._core.clone import clone
from .._core.foreign import is_offloaded
from .._core.host import adapters_of, is_host
from .._errors import AdapterError
from ._hidden_states import with_hidden_states

_BATCH, _PLACES = 2, (11, 13)  # unlike any number of features, so that an axis tells what it is
_PIXELS = 224, 224  # whole patches
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Found(NamedTuple):
    """Features in and out, their axis from the end, and whether the other axes of both are the same."""

    inputs: int
    outputs: int
    axis: int
    keeps_places: bool


def probed(host: nn.Module, inputs: Sequence[int], outputs: Sequence[int], images_first: bool) -> Found | None:
    """What a call of the host says, where it can be called with hidden states alone; `inputs` and `outputs` are the
    sizes of which it may be."""
    if not inputs or is_offloaded(host) or isinstance(host, (nn.ModuleList, nn.ModuleDict)):
        return None
    try:
        scratch = _scratch(host)
    except Exception:  # a module that cannot be copied
        return None
    for size in inputs:
        for shape, axis in _shapes(size, _pixels(host), images_first):
            y = _output(scratch, shape)
            found = None if y is None else _read(y, shape, axis, outputs)
            if found is not None:
                return found
    return None


def _scratch(host: nn.Module) -> nn.Module:
    """On the meta device, without hooks, so that nothing of the user's learns of it, and without its adapters."""
    scratch: nn.Module = clone(host, meta=True)
    for module in scratch.modules():
        for hooks in _HOOKS:
            getattr(module, hooks).clear()
        module.training = False
        if is_host(module):
            adapters_of(module).selection.active = ()  # a copy of the model's
    return scratch


def _pixels(host: Any) -> tuple[int, ...]:
    """Height and width of the images that it takes, which some insist on."""
    for module in host.modules():
        for said in (module, getattr(module, "config", None)):
            for size in (getattr(said, "image_size", None), getattr(said, "img_size", None)):
                if isinstance(size, int):
                    return size, size
                if isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(one, int) for one in size):
                    return tuple(size)
    return _PIXELS


def _shapes(size: int, pixels: tuple[int, ...], images_first: bool) -> Iterator[tuple[tuple[int, ...], int]]:
    """Inputs and the axis of their features: tokens, images of channels first or last, signals."""
    one, other = _PLACES
    tokens = ((_BATCH, one, size), -1), ((_BATCH, one, other, size), -1)
    images = ((_BATCH, size, one, other), -3), ((_BATCH, size, *pixels), -3), ((_BATCH, size, one), -2)
    yield from (*images, *tokens) if images_first else (*tokens, *images)


def _output(scratch: nn.Module, shape: tuple[int, ...]) -> Tensor | None:
    dtype = next((p.dtype for p in scratch.parameters() if p.is_floating_point()), torch.float32)
    for count in _counts(scratch.forward):
        given = [torch.empty(shape, device="meta", dtype=dtype) for _ in range(count)]
        try:
            with torch.no_grad(), torch.random.fork_rng([]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _hidden_states(scratch(*given))
        except Exception:  # another shape, other arguments, or values that are needed: whatever its author wrote
            continue
    return None


def _counts(forward: Callable[..., Any]) -> list[int]:
    """With how many tensors it may be called: one, or as many as it must be given (a residual, say)."""
    needed = [
        p for p in inspect.signature(forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]  # fmt: skip
    return [max(1, len(needed))]


def _hidden_states(output: Any) -> Tensor | None:
    found: list[Tensor] = []

    def seen(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    try:
        with_hidden_states(output, seen)
    except AdapterError:
        return None
    return found[0]


def _read(y: Tensor, shape: tuple[int, ...], axis: int, outputs: Sequence[int]) -> Found | None:
    """Where the other axes are those of the input, the features are what is left; else an axis of a known size."""
    places = list(shape)
    size = places.pop(axis)
    if y.dim() == len(shape):
        others = list(y.shape)
        outs = others.pop(axis)
        if others == places:
            return Found(size, outs, axis, True)
        if outs in outputs and axis != -1:
            return Found(size, outs, axis, False)
    if y.dim() > 1 and y.shape[-1] in outputs:
        return Found(size, y.shape[-1], -1, y.dim() != len(shape))
    return None

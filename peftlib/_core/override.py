"""A weight temporarily overridden: a tensor that a host reads in the place of its own, for one call."""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function

from ..kernels.dispatch import apply


def owner_of(host: nn.Module, path: str) -> tuple[nn.Module, str]:
    parent, _, leaf = path.rpartition(".")
    return host.get_submodule(parent) if parent else host, leaf


def weight_of(host: nn.Module, path: str) -> Tensor:
    owner, leaf = owner_of(host, path)
    return getattr(owner, leaf)


def tensors_of(module: nn.Module, one: str, other: str) -> tuple[Any, Any]:
    """What `getattr` gives for two parameters, looked for where they lie: 0.25 µs, where nn.Module takes 1.3."""
    own = module.__dict__
    if one not in own and other not in own:
        own = own["_parameters"]
    try:
        return own[one], own[other]
    except KeyError:  # computed, or one of them overridden
        return getattr(module, one), getattr(module, other)


@contextlib.contextmanager
def overridden(
    host: nn.Module, values: Mapping[str, Tensor], assigned: Callable[[str, Any], None] = lambda path, value: None
) -> Iterator[None]:
    """Puts tensors before the host's own: attribute look-up finds `__dict__` before `_parameters`. `assigned` is told
    what the host has put in the place of an overridden buffer."""
    if not values:
        yield
        return
    every = [(path, *owner_of(host, path), value) for path, value in values.items()]
    buffers = [place for place in every if place[2] in place[1]._buffers]
    places = [place for place in every if place[2] not in place[1]._buffers]
    before = [(owner, leaf, owner.__dict__.get(leaf, _absent)) for _, owner, leaf, _ in places]
    try:
        for _, owner, leaf, value in places:
            owner.__dict__[leaf] = value
        owners = [owner for _, owner, *_ in places]  # without their ids: Dynamo would compile each host anew
        with _flat_weights_overridden(owners), _buffers_overridden(buffers, assigned):
            yield
    finally:
        for owner, leaf, value in before:
            _put_back(owner.__dict__, leaf, value)


@contextlib.contextmanager
def _buffers_overridden(places: Any, assigned: Callable[[str, Any], None]) -> Iterator[None]:
    """In the module's own place for buffers: what a host assigns to one goes there, and is read from there."""
    before = [(owner, leaf, owner._buffers[leaf], owner.__dict__.get(ASIDE, _absent)) for _, owner, leaf, _ in places]
    try:
        for _, owner, leaf, value in places:
            owner.__dict__[ASIDE] = {leaf: owner._buffers[leaf], **owner.__dict__.get(ASIDE, {})}
            owner._buffers[leaf] = value
        yield
        for path, owner, leaf, value in places:
            if owner._buffers[leaf] is not value:
                assigned(path, owner._buffers[leaf])
    finally:
        for owner, leaf, value, aside in before:
            owner._buffers[leaf] = value
            _put_back(owner.__dict__, ASIDE, aside)


ASIDE = "_peftlib_aside"  # on a module for one call: its own buffers, in whose place others stand


def is_overridden(module: nn.Module, leaf: str) -> bool:
    return leaf in module.__dict__ or leaf in module.__dict__.get(ASIDE, ())


def _put_back(attributes: dict[str, Any], name: str, value: Any) -> None:
    if value is _absent:
        attributes.pop(name, None)
    else:
        attributes[name] = value


_absent = object()


@contextlib.contextmanager
def _flat_weights_overridden(owners: Any) -> Iterator[None]:
    """RNNs compute from a list of their weights, not from the attributes, and make it anew where a weak reference to
    an attribute no longer holds."""
    before = [
        (owner, owner._flat_weights, owner._flat_weight_refs) for owner in owners if isinstance(owner, nn.RNNBase)
    ]
    try:
        for owner, *_ in before:
            compute_from_attributes(owner)
        yield
    finally:
        for owner, weights, refs in before:
            owner.__dict__.update(_flat_weights=weights, _flat_weight_refs=refs)


def compute_from_attributes(rnn: nn.RNNBase) -> None:
    weights = [getattr(rnn, name) for name in rnn._flat_weights_names]
    rnn.__dict__.update(_flat_weights=weights, _flat_weight_refs=[weakref.ref(weight) for weight in weights])


def as_weights(host: nn.Module, folded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the host may run with: in its dtypes, and such that nothing that it does moves a parameter."""
    rounded = {path: value.to(weight_of(host, path).dtype) for path, value in folded.items()}
    return {path: _readable(owner_of(host, path)[0], value) for path, value in rounded.items()}


def _readable(owner: Any, value: Tensor) -> Tensor:
    """No parameter itself, which a host may cast in place (bitsandbytes' 4-bit layer does with its bias), and a copy
    where an embedding renormalizes the rows that it looks up, in place. A sparse gradient reaches a parameter as it is,
    and is made dense for whatever else gave the value, through which it has no way."""
    is_parameter, renormalizes = isinstance(value, nn.Parameter), getattr(owner, "max_norm", None) is not None
    if getattr(owner, "sparse", False) and value.requires_grad:
        return value if is_parameter and not renormalizes else apply(_DenseGradient, value)
    if not is_parameter:
        return value
    return value.clone() if renormalizes else value.view_as(value)


class _DenseGradient(Function):
    @staticmethod
    def forward(_: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor | None:
        (gradient,) = grad_outputs
        if not ctx.needs_input_grad[0]:
            return None
        return gradient.to_dense() if gradient.is_sparse else gradient

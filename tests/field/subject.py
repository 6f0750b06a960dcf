"""A model that nobody described, watched once: what it gives, which modules it runs, which weights it reads."""

import contextlib
import copy
import functools
import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from copies import Copies
from families import Built
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import peftlib


@dataclass(eq=False)
class Subject:
    built: Built

    def fresh(self, train: bool = False) -> Any:
        try:
            return self._copies.one().train(train)
        except RuntimeError:  # a weight that a hook computed is no leaf
            return self.built.again().train(train)

    @functools.cached_property
    def _copies(self) -> Copies:
        return Copies(self.built.model)

    def run(self, model: nn.Module) -> list[Tensor]:
        """Floating-point outputs, from the same random state each time."""
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)
        leaves = tree_leaves(model(**self.inputs(_is_wide(model))))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())]

    def inputs(self, wide: bool = False) -> dict[str, Any]:
        """Copies, for some models write into what they are given."""
        given = copy.deepcopy(self.built.inputs)
        if not wide:
            return given
        tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
        return given | {
            k: t.to(torch.promote_types(t.dtype, torch.float64)) for k, t in tensors.items() if t.is_floating_point()
        }

    @torch.no_grad()
    def plain(self, model: nn.Module) -> list[Tensor]:
        """Without gradients, and from one state to the same: what a model remembers of a call is forgotten."""
        before = [(module._buffers, dict(module._buffers), _values(module)) for module in model.modules()]
        try:
            return self.run(model)
        finally:
            for buffers, own, values in before:
                buffers.update(own)
                for leaf, value in values.items():
                    if not same([own[leaf]], [value]):
                        own[leaf].copy_(value)

    @functools.cached_property
    def output(self) -> list[Tensor]:
        """Of the frozen base: torch has other kernels for weights that train, a GRU's and an attention's say."""
        return self.plain(self.fresh().requires_grad_(False))

    @functools.cached_property
    def bases(self) -> dict[tuple[bool, bool], list[Tensor]]:
        """Outputs by train mode and by whether its weights train; without what fails."""
        found = {}
        for key in itertools.product((False, True), (False, True)):
            with contextlib.suppress(Exception):
                found[key] = self.run(self.fresh(key[0]).requires_grad_(key[1]))
        return found

    @functools.cached_property
    def bars(self) -> dict[bool, str]:
        """What the base itself raises in a forward and a backward, by train mode; without the modes that go well."""
        found = {}
        for train in (False, True):
            try:
                projected([tensor for tensor in self.run(self.fresh(train)) if tensor.requires_grad]).backward()
            except Exception as error:
                found[train] = type(error).__name__
        return found

    @functools.cached_property
    def runs_wide(self) -> bool:
        """Whether the base runs in float64, in which rounding and a wrong result are told apart."""
        with contextlib.suppress(Exception):
            return bool(self.plain(self.fresh().double()))
        return False

    @functools.cached_property
    def called(self) -> dict[str, int]:
        """How often each module runs, by its first name."""
        model, count = self.fresh(), dict.fromkeys((name for name, _ in self.built.model.named_modules()), 0)
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: count.update({name: count[name] + 1}))
        self.plain(model)
        return count

    @functools.cached_property
    def read(self) -> set[str]:
        """Weights that reach the output; one that is shared counts where its module is called."""
        model = self.fresh().requires_grad_(False)
        weights = [(name, p) for name, p in _weights(model) if p.is_floating_point() or p.is_complex()]
        for _, p in weights:
            p.requires_grad_(True)
        output = [tensor for tensor in self.run(model) if tensor.requires_grad]
        found = torch.autograd.grad(projected(output), [p for _, p in weights], allow_unused=True) if output else []
        shared = {id(p) for p, count in Counter(p for _, p in weights).items() if count > 1}
        pairs = zip(weights, found, strict=False)
        read = [(name, p) for (name, p), gradient in pairs if gradient is not None and gradient.any()]
        return {name for name, p in read if self.called[name.rpartition(".")[0]] or id(p) not in shared}

    def usable(self) -> str | None:
        """Why nothing can be said of this model, if so."""
        if not self.output or not any(tensor.numel() for tensor in self.output):
            return "its output holds no numbers"
        if not all(tensor.isfinite().any() for tensor in self.output if tensor.numel()):
            return "its output is not finite"
        if not same(self.output, self.plain(self.fresh().requires_grad_(False))):
            return "two runs from the same random state differ"
        return None


def _values(module: nn.Module) -> dict[str, Tensor]:
    return {leaf: buffer.clone() for leaf, buffer in module._buffers.items() if buffer is not None}


def _is_wide(model: nn.Module) -> bool:
    return any(parameter.dtype == torch.float64 for parameter in model.parameters())


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Under every name, for a tied weight is read through each of its modules, or through one."""
    return model.named_parameters(remove_duplicate=False)


def projected(output: list[Tensor]) -> Tensor:
    """A random projection: a plain sum has no gradient behind a LayerNorm."""
    drawn = torch.Generator().manual_seed(6)
    terms = [(torch.view_as_real(t) if t.is_complex() else t).double().nan_to_num(0.0, 0.0, 0.0) for t in output]
    nothing = torch.zeros((), dtype=torch.float64, requires_grad=True)
    return sum(((t * torch.randn(t.shape, generator=drawn, dtype=t.dtype)).sum() for t in terms), nothing)


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """In every bit but the sign of a zero, for x + 0 has another than x; NaN is equal to itself."""
    shapes = [[(t.shape, t.dtype) for t in tensors] for tensors in (found, expected)]
    pairs = zip(found, expected, strict=False)
    return shapes[0] == shapes[1] and all(bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in pairs)


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, infinite where shapes differ."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a.numel()]
    return max((((a - b).abs().nan_to_num(0.0, 0.0, 0.0)).max().item() for a, b in pairs), default=0.0)


@torch.no_grad()
def moved(model: nn.Module, size: float = 0.2) -> None:
    """The adapters as after training: no factor is zero."""
    torch.manual_seed(7)
    for parameter in peftlib.parameters(model):
        parameter.add_(torch.randn_like(parameter), alpha=size)


def state(model: nn.Module) -> dict[str, Any]:
    """All that eject promises to bring back: classes, flags, weights and every buffer to the bit."""
    named = dict(model.named_modules(remove_duplicate=False))
    tensors = {f"weight {k}": (bits(p), p.requires_grad) for k, p in model.named_parameters(remove_duplicate=False)}
    buffers = {f"buffer {k}": bits(b) for k, b in model.named_buffers(remove_duplicate=False)}
    classes = {f"class of {name or 'the root'}": (type(module), list(vars(module))) for name, module in named.items()}
    return {**tensors, **buffers, **classes, "keys": list(model.state_dict())}


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [key for key in {**before, **after} if before.get(key) != after.get(key)]

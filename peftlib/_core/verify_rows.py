"""Verifying rows: in a routed batch each group gives what it gives alone, or the first module that mixes is named."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .._errors import AdapterError
from .activate import activate
from .route import names_by_row, route
from .row_groups import Groups, Rows
from .row_layout import Layout
from .sharded import gradients, settle, whole
from .walk import adapters, candidates, in_eval_mode, require


class Found(NamedTuple):
    """What is wrong, in sentences, and the largest difference between an output in the batch and by itself."""

    problems: tuple[str, ...]
    difference: float | None


class _Run(NamedTuple):
    """The tensors that each module returned, call by call, in the order in which the calls ended; the model's own; and
    the gradients of the adapters."""

    calls: list[tuple[str, list[Tensor]]]
    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]


def compare_rows(model: nn.Module, rows: Any, inputs: Sequence[Any], named_inputs: Mapping[str, Any]) -> Found:
    """Runs the batch once, and each group's rows by themselves, all in eval mode and with one random projection as the
    loss. Equal is within the root of the dtype's epsilon, relative to the largest element: a product of other size sums
    in another order."""
    of = Rows(names_by_row(rows, None), 0)
    groups = of.groups(tuple(require(model, {name for own in of.of for name in own}).count))
    try:
        with route(model, rows), in_eval_mode(model):
            together = _run(model, inputs, named_inputs, None)
    except AdapterError as error:
        return Found((str(error),), None)
    if not any(output.dim() and len(output) == groups.size for output in together.outputs):
        return Found((f"the model returned no tensor of {groups.size} rows, so there is nothing to compare.",), None)
    with in_eval_mode(model):
        alone = list(_each_alone(model, groups, Layout(model, groups, of), inputs, named_inputs))
    problems = [*_first_difference(groups, together, alone), *_gradient_differences(together, alone)]
    pairs = [pair for i, one in enumerate(alone) for pair in _pairs(groups, i, together.outputs, one.outputs)]
    return Found(tuple(problems), max((_distance(*pair) for pair in pairs), default=None))


def _each_alone(
    model: nn.Module, groups: Groups, layout: Layout, inputs: Sequence[Any], named_inputs: Mapping[str, Any]
) -> Iterator[_Run]:
    cut = layout.split_inputs(inputs, named_inputs)
    for at, (group, (args, kwargs)) in enumerate(zip(groups.each, cut, strict=True)):
        with activate(model, *group.names):
            yield _run(model, args, kwargs, (groups, at))


def _run(model: nn.Module, args: Any, kwargs: Any, part: tuple[Groups, int] | None) -> _Run:
    settle(model)
    calls: list[tuple[str, list[Tensor]]] = []
    trained = {
        f'"{name}" on {host or "the root"}: {key}': p
        for host, name, adapter in adapters(model)
        for key, p in adapter.named_parameters()
        if p.requires_grad
    }
    hooks = [
        module.register_forward_hook(
            lambda module, args, output, name=name: calls.append((name, [o.detach() for o in _floating(output)]))
        )
        for name, module in candidates(model)
    ]
    try:
        with torch.enable_grad():
            outputs = _floating(model(*args, **kwargs))
    finally:
        for hook in hooks:
            hook.remove()
    return _Run(calls, [output.detach() for output in outputs], _gradients(model, trained, outputs, part))


def _gradients(
    model: nn.Module, trained: dict[str, nn.Parameter], outputs: list[Tensor], part: tuple[Groups, int] | None
) -> dict[str, Tensor | None]:
    """Of the sum of all outputs that have rows, each element times a number that is the same in the batch and alone."""
    losses = [(output * _weights(output, part)).sum() for output in outputs if output.requires_grad and output.dim()]
    if not losses or not trained:
        return dict.fromkeys(trained)
    found = gradients(model, torch.stack(losses).sum(), list(trained.values()))
    return {key: None if each is None else whole(each) for key, each in zip(trained, found, strict=True)}


def _weights(output: Tensor, part: tuple[Groups, int] | None) -> Tensor:
    generator = torch.Generator().manual_seed(output.dim())
    if part is None:
        return torch.randn(output.shape, generator=generator).to(output)
    groups, at = part
    rows = output.shape[0] // groups.each[at].count * groups.size
    whole = torch.randn((rows, *output.shape[1:]), generator=generator)
    return groups.split(whole, 0)[at].to(output)


def _first_difference(groups: Groups, together: _Run, alone: list[_Run]) -> Iterator[str]:
    """A module that ran as often in the batch as alone is compared call by call."""
    for at, (group, one) in enumerate(zip(groups.each, alone, strict=True)):
        by_module: dict[str, list[list[Tensor]]] = {}
        for name, tensors in together.calls:
            by_module.setdefault(name, []).append(tensors)
        seen: dict[str, int] = {}
        times = [name for name, _ in one.calls]
        for name, tensors in one.calls:
            call = seen[name] = seen.get(name, -1) + 1
            if times.count(name) != len(by_module.get(name, ())):
                continue
            if any(not _are_near(*pair) for pair in _pairs(groups, at, by_module[name][call], tensors)):
                names = ", ".join(map(repr, group.names)) or "the base"
                yield (
                    f"{name or 'the model'} gives the rows of {names} another result in the batch than alone: it mixes "
                    "rows. Run these by themselves."
                )
                break


def _gradient_differences(together: _Run, alone: list[_Run]) -> Iterator[str]:
    for key, gradient in together.gradients.items():
        own = [one.gradients[key] for one in alone]
        given = [each for each in own if each is not None]
        if gradient is None and not given:
            continue
        if gradient is None or not given or not _are_near(gradient, torch.stack(given).sum(0)):
            yield f"{key} gets another gradient in the batch than from its own rows: something behind it mixes rows."


def _pairs(groups: Groups, at: int, together: list[Tensor], alone: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """What was returned for a group's rows, in the batch and alone, where the rows lie in front."""
    for every, own in zip(together, alone, strict=False):
        has_rows = every.dim() > 0 and len(every) > 0 and len(every) % groups.size == 0 and every.dim() == own.dim()
        if has_rows and len(own) == len(every) // groups.size * groups.each[at].count:
            yield groups.split(every, 0)[at], own


def _are_near(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    size = max((each[each.isfinite()].abs().max().item() for each in (one, other) if each.isfinite().any()), default=1)
    return torch.allclose(one, other, rtol=0, atol=torch.finfo(one.dtype).eps ** 0.5 * size, equal_nan=True)


def _distance(one: Tensor, other: Tensor) -> float:
    return (one.double() - other.double()).abs().max().item() if one.numel() else 0.0


def _floating(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

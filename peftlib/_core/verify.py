"""Verifying: each adapter runs, learns and agrees with its merged form, checked without leaving a trace."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import AdapterError
from .adapter import Adapter, can_be_merged
from .foreign import is_offloaded
from .freeze import moved_buffers
from .lazy_weight import materialized
from .lost import lost
from .merge import merged
from .quantized import quantized_as
from .sharded import gradients, settle, split_as, whole
from .table import equal_lines, html_lines
from .verify_rows import compare_rows
from .walk import (
    adapters,
    candidates,
    in_eval_mode,
    require,
    require_no_views,
    require_unmerged,
    require_unrouted,
)

Named = tuple[str, str, Adapter]
Gradients = dict[int, list[Tensor | None]]


@dataclass(frozen=True)
class Verification:
    """What `verify` found. It is true where there is no problem; `str()` lists the problems, those of equal layers in
    one line, and which weights a low-rank adapter had to make whole, by the function that read them: right, and slower
    than it could be."""

    problems: tuple[str, ...]
    difference: float | None
    materialized: tuple[str, ...] = ()
    compared: str = "unmerged and merged"

    def __bool__(self) -> bool:
        return not self.problems

    def __repr__(self) -> str:
        found = f"{len(self.problems)} problem{'s' * (len(self.problems) != 1)}" if self.problems else "no problem"
        return f"Verification({found}; {self._agreement()})"

    def __str__(self) -> str:
        return "\n".join([*self._findings(), self._agreement(), *equal_lines(self.materialized)])

    def _repr_html_(self) -> str:
        sign = "✗" if self.problems else "✓"
        findings = [f"{sign} {finding}" for finding in self._findings()]
        return html_lines(*findings, self._agreement(), *equal_lines(self.materialized))

    def _findings(self) -> list[str]:
        fine = "every active adapter runs and learns; the base cannot move"
        if self.compared != Verification.compared:
            fine = "each group of rows gives what it gives alone"
        return equal_lines(self.problems) or [fine]

    def _agreement(self) -> str:
        if self.difference is None:
            return "nothing that merges to compare"
        return f"{self.compared} differ by {self.difference:.3g}"


def verify(
    model: nn.Module, *inputs: Any, rows: Any = None, optimizer: Any = None, **named_inputs: Any
) -> Verification:
    """Runs the model once forward and backward and says which active adapters do nothing.

    An adapter is named when it did not run, when no gradient reached it, or when a factor is dead: all zero and with
    an all-zero gradient, also after a step of the others, so that no step can move it. A base parameter that still
    trains is named too, and a buffer of the base that moves; and an adapter that the optimizer does not have, for it
    was made before `inject`, or loaded since. Gradients, random state, training flags and buffers are as
    they were.

    With `rows`, as `route` takes them, it compares instead each group of rows in one batch with its run alone, outputs
    and gradients, in eval mode, and names the first module where they differ: a loss over all rows, attention across
    them, experts with a capacity.

    Args:
        model: a model with adapters.
        *inputs: what the model is called with.
        rows: a list, or a mapping, of the adapters of each row; the batch is in front.
        optimizer: that trains the adapters, for it to be checked too; default none.
        **named_inputs: keywords of that call.

    Returns:
        Verification: `problems`, one sentence each; `difference`, the largest absolute difference between unmerged
        and merged output in eval mode, None where a type cannot be merged, a host is quantized or `merge` refuses, and
        with `rows` that between outputs in the batch and alone; `materialized`, one line for each function that needed
        an adapted weight whole.

    Raises:
        AdapterError: the model has no adapters, is merged, or has a live view.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2)
        >>> bool(peftlib.verify(model, torch.ones(1, 4)))
        True
    """
    selection = require(model)
    require_unmerged(selection, "verify")
    require_unrouted(selection, "verify")
    if rows is not None:
        with _no_trace(model):
            return Verification(*compare_rows(model, rows, inputs, named_inputs), compared="routed and alone")
    active = [item for item in adapters(model) if item[1] in selection.active]
    with _no_trace(model):
        with materialized() as heard:
            ran = _run_backward(model, active, inputs, named_inputs)
        moved = moved_buffers(model)
        later = ran
        if _has_zeros_without_gradient(active, ran):
            with _stepped(active, ran):
                later = _run_backward(model, active, inputs, named_inputs)
        require_no_views(selection, "verify")
        with in_eval_mode(model):
            difference = _difference(model, active, inputs, named_inputs)
    problems = (
        *_adapter_problems(active, ran, later),
        *_untrained(active, optimizer),
        *_base_problems(model, moved),
        *_lost_problems(model),
    )
    return Verification(problems, difference, _materialized_lines(active, heard))


def _materialized_lines(active: list[Named], heard: list[tuple[str, tuple[nn.Module, ...]]]) -> tuple[str, ...]:
    hosts = {id(adapter): host_name for host_name, _, adapter in active}
    lines = [
        f"materialized by {function} on {hosts.get(id(adapter), '')}.{getattr(adapter, 'param', 'weight')}"
        for function, adapters_of_weight in heard
        for adapter in adapters_of_weight
    ]
    return tuple(dict.fromkeys(line.replace(" on .", " on ") for line in lines))


def _run_backward(model: nn.Module, active: list[Named], inputs: Any, named_inputs: Any) -> Gradients:
    """The gradients of each adapter that ran, by the adapter's id."""
    settle(model)
    wanted = [p for *_, adapter in active for p in adapter.parameters() if p.requires_grad]
    ran: set[int] = set()
    hooks = [adapter.register_forward_pre_hook(lambda module, _: ran.add(id(module))) for *_, adapter in active]
    try:
        with torch.enable_grad():
            loss = _loss(model(*inputs, **named_inputs))
    finally:
        for hook in hooks:
            hook.remove()
    found = iter(gradients(model, loss, wanted))
    reached = {id(adapter): [next(found) for p in adapter.parameters() if p.requires_grad] for *_, adapter in active}
    reached_any = {key for key, value in reached.items() if any(gradient is not None for gradient in value)}
    return {key: value for key, value in reached.items() if key in ran | reached_any}


def _with_gradients(active: list[Named], ran: Gradients) -> Iterator[tuple[nn.Parameter, Tensor | None]]:
    for *_, adapter in active:
        trained = [p for p in adapter.parameters() if p.requires_grad]
        yield from zip(trained, ran.get(id(adapter), [None] * len(trained)), strict=True)


def _has_zeros_without_gradient(active: list[Named], ran: Gradients) -> bool:
    return any(_is_still(gradient) and _is_zero(p) for p, gradient in _with_gradients(active, ran))


def _is_still(gradient: Tensor | None) -> bool:
    return gradient is None or _is_zero(gradient)


def _is_zero(tensor: Tensor) -> bool:
    """Of a shard, all of it: each process must see the same."""
    return not whole(tensor.detach()).any()


@contextlib.contextmanager
def _stepped(active: list[Named], ran: Gradients) -> Iterator[None]:
    """The adapters as after a first step, for a moment: what stands behind a factor of zero learns from then on."""
    before = {p: p.detach().clone() for p, _ in _with_gradients(active, ran)}
    try:
        with torch.no_grad():
            for p, gradient in _with_gradients(active, ran):
                if gradient is not None:
                    p.sub_(split_as(whole(gradient).sign(), p), alpha=1e-2)
        yield
    finally:
        with torch.no_grad():
            for p, own in before.items():
                p.copy_(own)


def _loss(output: Any) -> Tensor:
    """A random projection: a plain sum, of squares too, has no gradient behind a LayerNorm."""
    projected = [(tensor.double() * torch.randn_like(tensor, dtype=torch.float64)).sum() for tensor in _tensors(output)]
    return torch.stack(projected).sum() if projected else torch.zeros(())


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        yield from (tensor for value in output.values() for tensor in _tensors(value))
    elif isinstance(output, (list, tuple)):
        yield from (tensor for value in output for tensor in _tensors(value))


def _adapter_problems(active: list[Named], ran: Gradients, later: Gradients) -> Iterator[str]:
    for host, name, adapter in active:
        where = f'"{name}" on {host or "the root"} ({type(adapter).__name__})'
        trained = [(key, p) for key, p in adapter.named_parameters() if p.requires_grad]
        if id(adapter) not in ran:
            yield f"{where} did not run: the model computes its host in another way. Target a module that it calls."
        elif not trained:
            yield f"{where} does not train: none of its parameters has requires_grad. Call train_only with its name."
        else:
            yield from _factor_problems(where, trained, ran[id(adapter)], later.get(id(adapter), ran[id(adapter)]))


def _factor_problems(
    where: str, trained: list[tuple[str, nn.Parameter]], found: list[Tensor | None], later: list[Tensor | None]
) -> Iterator[str]:
    if all(gradient is None for gradient in found):
        yield f"{where} got no gradient: its output does not reach the model's. Look for detach() or no_grad()."
        return
    by_key = dict(zip([key for key, _ in trained], found, strict=True))
    still = [key for key, gradient in by_key.items() if _is_still(gradient)]
    dead = [
        key for (key, p), then in zip(trained, later, strict=True) if key in still and _is_still(then) and _is_zero(p)
    ]
    if dead:
        zero = ", ".join(f"{key} is all zero and gets no gradient" for key in dead)
        yield f"{where} has a dead factor: {zero}. Reset the adapter."
    elif len(still) == len(trained):
        yield f"{where} got no gradient: every one is zero. Look for a factor of zero behind it."
    for key in (key for key, gradient in by_key.items() if gradient is None and key not in dead):
        yield f"{where}: {key} got no gradient, for the host does not read it. Leave it out."


def _untrained(active: list[Named], optimizer: Any) -> Iterator[str]:
    if optimizer is None:
        return
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for host, name, adapter in active:
        absent = [key for key, p in adapter.named_parameters() if p.requires_grad and id(p) not in known]
        if absent:
            where = f'"{name}" on {host or "the root"} ({type(adapter).__name__})'
            yield (
                f"{where}: {type(optimizer).__name__} does not have its {', '.join(absent)}. Make the optimizer after "
                "inject, over peftlib.parameters(model)."
            )


def _lost_problems(model: nn.Module) -> Iterator[str]:
    yield from (f"{sentence}. Inject there again, or eject." for sentence in lost(model))


def _base_problems(model: nn.Module, moved: list[str]) -> Iterator[str]:
    for name in moved:
        yield f"{name} of the base, a buffer, moves in a forward pass. Put Full on its module, or run it in eval mode."
    for name, module in candidates(model):
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                yield f"{f'{name}.{leaf}'.lstrip('.')} of the base trains. Freeze it, or adapt it with Full."


@torch.no_grad()
def _difference(model: nn.Module, active: list[Named], inputs: Any, named_inputs: Any) -> float | None:
    if not active or is_offloaded(model) or not all(can_be_merged(adapter) for *_, adapter in active):
        return None
    if any(_is_quantized(model.get_submodule(host_name)) for host_name, *_ in active):
        return None  # before a pass in eval mode, at which a layer may pack its weight so that it trains no more
    live = list(_tensors(model(*inputs, **named_inputs)))
    try:
        with merged(model):
            folded = list(_tensors(model(*inputs, **named_inputs)))
    except AdapterError:  # a weight that is shared, or computed from others: merge itself says which
        return None
    return max(
        ((a.double() - b.double()).abs().max().item() for a, b in zip(live, folded, strict=True) if a.numel()),
        default=0.0,
    )


def _is_quantized(host: nn.Module) -> bool:
    return any(quantized_as(host, leaf) for leaf, p in host._parameters.items() if p is not None)


@contextlib.contextmanager
def _no_trace(model: nn.Module) -> Iterator[None]:
    buffers = [
        (m, leaf, b, b.detach().clone()) for m in model.modules() for leaf, b in m._buffers.items() if b is not None
    ]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng([device.index for device in devices]):
            yield
    finally:
        with torch.no_grad():
            for module, leaf, buffer, before in buffers:
                module._buffers[leaf] = buffer.copy_(before)

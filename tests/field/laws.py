"""Laws that need no knowledge of the model."""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from placing import Case, named_modules
from subject import Subject, changes, distance, projected, same, state
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm

import peftlib

_MOVING = (_NormBase, _SpectralNorm)  # modules whose buffers move in training
_EFFECT = 1e-3  # merged and unmerged may differ by this part of what the adapter does: an inert host makes more
_ROUNDING = 1e-5  # of float32, summed in another order


class NotHere(Exception):
    """A law that has no meaning here, and why."""


class Wrong(Exception):
    """A law that does not hold."""


def _require_gradients(subject: Subject, train: bool) -> None:
    if train in subject.bars:
        raise NotHere(f"the base itself has no gradients: {subject.bars[train]}")


@contextlib.contextmanager
def _slow_path() -> Iterator[None]:
    """torch's attention takes a shorter way where nothing trains, which rounds otherwise."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@_slow_path()
def unchanged_at_the_start(case: Case) -> None:
    if not case.kind.silent:
        raise NotHere("inserting may change the output")
    for train in (False, True):
        bases = _bases(case.subject, train)
        found = case.subject.run(case.adapted(train)) if bases else []
        others = (_partly_free, _without_gaps)
        if (
            bases
            and not any(same(found, base) for base in bases)
            and not any(same(found, b(case, train)) for b in others)
        ):
            raise Wrong(f"{'train' if train else 'eval'}: differs by {min(distance(found, b) for b in bases):.2g}")


@functools.cache
def _bases(subject: Subject, train: bool) -> list[list[Tensor]]:
    """What the base gives, its weights training or not, with its running statistics held as adapters hold them."""
    if not train or not any(isinstance(module, _MOVING) for module in subject.fresh().modules()):
        return [output for (mode, _), output in subject.bases.items() if mode == train]
    found = []
    for free in (False, True):
        with contextlib.suppress(Exception):  # what the base itself cannot do
            found.append(subject.run(_held(subject.fresh(True)).requires_grad_(free)))
    return found


def _held(base: nn.Module) -> nn.Module:
    for module in base.modules():
        if isinstance(module, _MOVING):
            module.eval()
    return base


def _partly_free(case: Case, train: bool) -> list[Tensor]:
    """The base where the hosts' weights alone train: torch has other kernels for those that do."""
    base = _held(case.subject.fresh(train)).requires_grad_(False)
    for name, _ in case.hosts:
        for parameter in base.get_submodule(name).parameters(recurse=False):
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    return case.subject.run(base)


def _without_gaps(case: Case, train: bool) -> list[Tensor]:
    """The base where the hosts' outputs have no gaps between their rows, as a sum has none: a function of each number
    rounds otherwise where torch reads them one by one."""
    base = _held(case.subject.fresh(train)).requires_grad_(False)
    for name, _ in case.hosts:
        base.get_submodule(name).register_forward_hook(lambda *given: _dense(given[-1]))
    return case.subject.run(base)


def _dense(output: Any) -> Any:
    gaps = isinstance(output, Tensor) and torch.empty_like(output).stride() != output.stride()
    return output.contiguous() if gaps else output


def each_adapter_runs(case: Case) -> None:
    """An adapter on a module that is called, or whose weight reaches the output, acts too."""
    _require_gradients(case.subject, train=False)
    model, ran = case.adapted(size=0.2), set()
    every = [(name, adapter) for name, _, adapter in peftlib.adapters(model)]
    for _, adapter in every:
        adapter.register_forward_pre_hook(lambda module, _: ran.add(id(module)))
    own = {
        name: [p for p in host._parameters.values() if p is not None and _can_train(p)] for name, host in _named(model)
    }
    for parameter in (p for each in own.values() for p in each):
        parameter.requires_grad_(True)
    output = [tensor for tensor in case.subject.run(model) if tensor.requires_grad]
    grads = _gradients(output, [adapter for _, adapter in every])
    met = _reached(output, own)  # of a mixture with adapters in, other experts are chosen than in the base
    inert = [name for name, a in every if id(a) not in ran | grads and name in met and _is_read(case, name, a)]
    if inert:
        raise Wrong(f"{len(inert)} of {len(every)} did not run, though their weights are read: {', '.join(inert[:6])}")


def _named(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, model.get_submodule(name)) for name in dict.fromkeys(name for name, *_ in peftlib.adapters(model))]


def _can_train(parameter: Tensor) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


def _of(output: list[Tensor], tensors: list[Tensor]) -> tuple[Tensor | None, ...]:
    if not output or not tensors:
        return ()
    return torch.autograd.grad(projected(output), tensors, allow_unused=True, retain_graph=True)


def _reached(output: list[Tensor], own: dict[str, list[Tensor]]) -> set[str]:
    """The hosts of whose own weights one has a part in the output."""
    pairs = [(name, p) for name, each in own.items() for p in each]
    found = _of(output, [p for _, p in pairs])
    return {name for (name, _), gradient in zip(pairs, found, strict=False) if gradient is not None}


def _is_read(case: Case, host_name: str, adapter: Any) -> bool:
    """The adapted weight where one is named, else any of the host's own; one that is computed has no name here."""
    own = f"{host_name}.{adapter.config.get('param', '')}"
    named = dict(case.subject.built.model.named_parameters(remove_duplicate=False))
    return own in case.subject.read if own in named else host_name in _hosts_read(case.subject)


def _hosts_read(subject: Subject) -> set[str]:
    return {name.rpartition(".")[0] for name in subject.read}


def _gradients(output: list[Tensor], adapters: list[Any]) -> set[int]:
    wanted = [(id(a), p) for a in adapters for p in a.parameters()]
    found = _of(output, [p for _, p in wanted])
    return {key for (key, _), gradient in zip(wanted, found, strict=False) if gradient is not None}


def merged_equals_unmerged(case: Case) -> None:
    if case.kind.cls.fold is peftlib.Adapter.fold:
        raise NotHere("cannot be merged")
    case = _mergeable(case)
    off = _disagreement(case, torch.float32)
    if off > _EFFECT and (not case.subject.runs_wide or _disagreement(case, torch.float64) > _EFFECT):
        raise Wrong(f"differs by {off:.2g} of what the adapter does")


def _mergeable(case: Case) -> Case:
    """Without hosts whose weight another module shares, for which merging is refused."""
    try:
        with peftlib.merged(case.adapted(size=0.2)):
            return case
    except peftlib.AdapterError as error:
        case.merge_refused = str(error)
    named = case.subject.built.model.named_parameters(remove_duplicate=False)
    owners: dict[int, set[str]] = {}
    for name, parameter in named:
        owners.setdefault(id(parameter), set()).add(name.rpartition(".")[0])
    shared = {name for names in owners.values() if len(names) > 1 for name in names}
    rest = Case(case.subject, case.kind, [host for host in case.hosts if host[0] not in shared])
    if not rest.hosts:
        raise NotHere("no weight but shared ones")
    return rest


def _disagreement(case: Case, dtype: torch.dtype) -> float:
    model, run = case.adapted(size=0.05), case.subject.plain
    if dtype == torch.float64:
        model.double()
    unmerged, before = run(model), state(model)
    with peftlib.merged(model):
        pass  # no run between, which may change the base's own state, as a cached table
    if changes(before, state(model)):
        raise Wrong(f"after unmerge {', '.join(changes(before, state(model))[:4])} differ")
    with peftlib.merged(model):
        merged = run(model)
    if not same(run(model), unmerged):
        raise Wrong("after unmerge the output is another")
    with peftlib.activate(model):
        base = run(model)
    effect = distance(unmerged, base)
    if not effect and not _hosts_read(case.subject).isdisjoint(name for name, _ in case.hosts):
        raise Wrong("the adapter changes nothing")
    return distance(merged, unmerged) / effect if effect else 0.0


def off_equals_base(case: Case) -> None:
    model = case.adapted(size=0.2)
    on = case.subject.plain(model)
    with peftlib.activate(model):
        off = case.subject.plain(model)
    if not same(off, case.subject.output):
        raise Wrong(f"off: differs from the base by {distance(off, case.subject.output):.2g}")
    again = case.subject.plain(model)
    if not same(again, on):
        raise Wrong(f"on again: differs by {distance(again, on):.2g}")


def saved_and_loaded_is_equal(case: Case) -> None:
    model, fresh = case.adapted(size=0.2), case.subject.fresh()
    with tempfile.TemporaryDirectory() as folder:
        peftlib.save(model, Path(folder) / "a.safetensors")
        peftlib.load(fresh, Path(folder) / "a.safetensors")
    found, expected = case.subject.plain(fresh), case.subject.plain(model)
    if not same(found, expected):
        raise Wrong(f"differs by {distance(found, expected):.2g}")


def cached_decoding_equals_uncached(case: Case) -> None:
    if not case.subject.built.generates:
        raise NotHere("does not generate")
    base = _gap_of_the_base(case.subject)
    if base > 1e-4:
        raise NotHere("the base itself does not generate, or its own cache gives other scores")
    gap = _cache_gap(case.subject, case.adapted(size=0.05))
    if gap > 1e-3:
        raise Wrong(f"scores differ by {gap:.2g}, the base's by {base:.2g}")


@functools.cache
def _gap_of_the_base(subject: Subject) -> float:
    try:
        return _cache_gap(subject, subject.fresh())
    except Exception:
        return float("inf")


@torch.no_grad()
def _cache_gap(subject: Subject, model: Any) -> float:
    """How far scores of three greedy tokens are apart, as part of the largest."""
    given = {k: v for k, v in subject.inputs().items() if k not in ("decoder_input_ids", "use_cache")}
    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": 1}
    if getattr(model.config, "is_encoder_decoder", False):
        options["decoder_start_token_id"] = 5  # no padding, which some give no position of its own
    options |= {"output_scores": True, "return_dict_in_generate": True}
    runs = [model.generate(**given, **options, use_cache=cache) for cache in (True, False)]
    cached, uncached = (torch.stack([score.float() for score in run.scores]).clamp(-1e4, 1e4) for run in runs)
    return distance([cached], [uncached]) / (1 + cached[cached > -1e4].abs().max().item())


def trained_and_ejected_is_the_base(case: Case) -> None:
    """Three steps in train mode, an optimizer with weight decay; then every bit, buffers too."""
    _require_gradients(case.subject, train=True)
    model = case.adapted(train=True)
    before = state(case.subject.fresh(train=True))
    optimizer = torch.optim.AdamW(peftlib.parameters(model), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        output = [tensor for tensor in case.subject.run(model) if tensor.requires_grad]
        if not output:
            raise NotHere("no gradient reaches an adapter")
        projected(output).backward()
        optimizer.step()
    peftlib.eject(model)
    left = changes(before, state(model))
    if left:  # in train mode RWKV writes to its weights, others keep what they computed: then the base that was called
        called = _held(case.subject.fresh(train=True))
        case.subject.run(called)
        also = changes(state(called), state(model))
        left = [key for key in left if key in also]
    if left:
        raise Wrong(f"{len(left)} differ: {', '.join(left)[:200]}")


def in_place_on_outputs_equals_out_of_place(case: Case) -> None:
    """What follows each host changes its output in place; the base must bear that there, or the host is left out."""
    _require_gradients(case.subject, train=False)
    leaves = [name for name, m in named_modules(case.subject) if not list(m.children()) and case.subject.called[name]]
    names = {name for name, _ in case.hosts} & set(leaves)
    if not _bears(case.subject, frozenset(names)):
        names = {name for name in names if _bears(case.subject, frozenset({name}))}
    if not names:
        raise NotHere("no host whose output the base may change in place")
    results = []
    for in_place in (False, True):
        model = case.adapted(train=False, size=0.05)
        with _after(model, names, in_place):
            results.append(_with_gradients(case, model))
    largest = 1 + max(tensor.abs().max().item() for tensors in results[0] for tensor in tensors if tensor.numel())
    gap = max(map(distance, *results)) / largest
    if gap > _ROUNDING:
        raise Wrong(f"differs by {gap:.2g}")


@functools.cache
def _bears(subject: Subject, names: frozenset[str]) -> bool:
    model = subject.fresh()
    with contextlib.suppress(Exception), _after(model, names, True):
        projected([tensor for tensor in subject.run(model) if tensor.requires_grad]).backward()
        return True
    return False


def _with_gradients(case: Case, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    output = case.subject.run(model)
    projected([tensor for tensor in output if tensor.requires_grad]).backward()
    return output, [p.grad for p in peftlib.parameters(model) if p.grad is not None]


@contextlib.contextmanager
def _after(model: nn.Module, names: Collection[str], in_place: bool) -> Iterator[None]:
    def change(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):
            return output
        return output.add_(1.0) if in_place else output.add(1.0)

    hooks = [module.register_forward_hook(change) for name, module in model.named_modules() if name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


LAWS: list[Callable[[Case], None]] = [
    unchanged_at_the_start,
    each_adapter_runs,
    merged_equals_unmerged,
    off_equals_base,
    saved_and_loaded_is_equal,
    cached_decoding_equals_uncached,
    trained_and_ejected_is_the_base,
    in_place_on_outputs_equals_out_of_place,
]

"""Where each kind of adapter goes in a model, and where it is refused."""

import contextlib
import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from copies import Copies
from subject import Subject, moved
from torch import Tensor, nn

import peftlib

Host = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Kind:
    """`silent`: inserting changes no bit. `hosts`: where it goes, with keywords."""

    name: str
    cls: type[peftlib.Adapter]
    hosts: Callable[[Subject], list[Host]]
    config: Mapping[str, Any] = field(default_factory=dict)
    silent: bool = True


def named_modules(subject: Subject) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in subject.built.model.named_modules() if name)


def _own(module: nn.Module, dims: int) -> list[str]:
    own = module._parameters.items()
    return [k for k, p in own if p is not None and p.dim() >= dims and (p.is_floating_point() or p.is_complex())]


def matrices(subject: Subject) -> list[Host]:
    """Every module with a matrix of its own, called `weight` or not."""
    found = [(name, module, _own(module, 2)) for name, module in named_modules(subject)]
    return [(n, {} if isinstance(getattr(m, "weight", None), Tensor) else {"param": own}) for n, m, own in found if own]


def scaled(subject: Subject) -> list[Host]:
    return [(name, {}) for name, given in matrices(subject) if not given]


def weights(subject: Subject) -> list[Host]:
    """Every module with weights of its own, which alone are copied."""
    return [(name, {"params": own}) for name, module in named_modules(subject) if (own := _own(module, 1))]


def callees(subject: Subject) -> list[Host]:
    return [(name, {}) for name, module in named_modules(subject) if subject.called[name] and [*module.parameters()]]


def attentions(subject: Subject) -> list[Host]:
    return [
        (name, {}) for name, _ in callees(subject) if "ttention" in type(dict(named_modules(subject))[name]).__name__
    ]


def models(subject: Subject) -> list[Host]:
    """The model itself, if it runs from embedded tokens by itself."""
    model = subject.fresh()
    if "inputs_embeds" not in inspect.signature(model.forward).parameters or "input_ids" not in subject.built.inputs:
        return []
    with contextlib.suppress(NotImplementedError):  # of a model that has no embedding, which Prompt must refuse
        embedded = model.get_input_embeddings()(subject.built.inputs["input_ids"])
        rest = {key: value for key, value in subject.built.inputs.items() if key != "input_ids"}
        try:
            model(inputs_embeds=embedded, **rest)
        except Exception:
            return []
    return [("", {})]


KINDS = [
    Kind("LoRA", peftlib.LoRA, matrices, {"rank": 2}),
    Kind("DoRA", peftlib.DoRA, matrices, {"rank": 2}),
    Kind("IA3", peftlib.IA3, scaled),
    Kind("Bottleneck", peftlib.Bottleneck, callees, {"width": 3}),
    Kind("Full", peftlib.Full, weights),
    Kind("Prefix", peftlib.Prefix, attentions, {"length": 2}, silent=False),
    Kind("Prompt", peftlib.Prompt, models, {"length": 2}, silent=False),
]


@dataclass
class Case:
    """One kind in one model: where it goes, and where it was refused, with the reason. `alike`: so many are taken of
    hosts of one class whose names differ in numbers alone, as those of equal layers and experts do."""

    subject: Subject
    kind: Kind
    hosts: list[Host] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    merge_refused: str = ""
    alike: int = 1

    def adapted(self, train: bool = False, size: float = 0.0) -> Any:
        """A copy of one model that was injected into; injecting is what costs most here."""
        try:
            model: Any = self._copies.one().train(train)
        except RuntimeError:  # as for the base
            model = self.injected(train)
        if size:
            moved(model, size)
        return model

    @functools.cached_property
    def _copies(self) -> Copies:
        return Copies(self.injected())

    def injected(self, train: bool = False) -> Any:
        model = self.subject.fresh(train)
        self.put(model)
        return model

    def put(self, model: nn.Module) -> None:
        """One call for hosts with the same keywords."""
        torch.manual_seed(4)
        groups: dict[str, list[Host]] = {}
        for host in self.hosts:
            groups.setdefault(repr(host[1]), []).append(host)
        for group in groups.values():
            self._put({name for name, _ in group}, model, group[0][1])

    def _put(self, names: set[str], model: nn.Module, config: Any) -> None:
        peftlib.inject(model, lambda name, _: name in names, self.kind.cls, **{**self.kind.config, **config})

    def settle(self) -> None:
        """Finds the hosts: those where injecting is not refused, nor the call."""
        self.hosts = _distinct(self.subject.built.model, self.kind.hosts(self.subject), self.alike)
        model = self.subject.fresh()
        if self.hosts and _why("inject", lambda: self._copies):
            self.hosts = [host for host in self.hosts if not self._drop("inject", host, lambda case: case.put(model))]
        if self.hosts and _why("call", self._called):
            self.hosts = [host for host in self.hosts if not self._drop("call", host, Case._called)]
            del self._copies

    def _called(self) -> None:
        self.subject.plain(self.adapted())

    def _drop(self, doing: str, host: Host, do: Callable[["Case"], None]) -> bool:
        why = _why(doing, lambda: do(Case(self.subject, self.kind, [host])))
        self.refused.update({host[0]: why} if why else {})
        return bool(why)


def _why(doing: str, do: Callable[[], Any]) -> str | None:
    """Why it is refused, if so."""
    try:
        do()
    except peftlib.AdapterError as error:
        return f"{doing}: {error}"
    return None


def _distinct(model: nn.Module, offered: list[Host], limit: int) -> list[Host]:
    alike: Counter[tuple[type, str]] = Counter()
    chosen = []
    for name, config in offered:
        key = type(model.get_submodule(name)), re.sub(r"\d+", "", name)
        alike[key] += 1
        chosen += [(name, config)] if alike[key] <= limit else []
    return chosen

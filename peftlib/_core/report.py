"""Looking: what an injection would do, and what a model holds."""

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from .adapter import Adapter
from .freeze import statistics_held
from .host import Selection
from .inject import build, parts_to_inject
from .quantized import weight_shape
from .table import equal_layers, html_table, size, table
from .targets import Targets
from .walk import adapters, candidates, require


@dataclass(frozen=True)
class PlanRow:
    """One adapter to be: its host, its tensors' shapes, its trainable parameters, Adam's two moments in bytes."""

    host: str
    kind: str
    shapes: dict[str, tuple[int, ...]]
    parameters: int
    adam_bytes: int


@dataclass(frozen=True)
class Plan:
    """What `inject` would do; `str()` is a table, with a row for equal layers, and a notebook shows it as one."""

    rows: tuple[PlanRow, ...]

    @property
    def parameters(self) -> int:
        """Trainable parameters in all."""
        return sum(row.parameters for row in self.rows)

    @property
    def adam_bytes(self) -> int:
        """Bytes of Adam's first and second moments in all, in the dtype of the parameters."""
        return sum(row.adam_bytes for row in self.rows)

    def __repr__(self) -> str:
        return f"Plan({self._total()})"

    def __str__(self) -> str:
        return f"{table(_PLANNED, self._shown())}\n{self._total()}"

    def _repr_html_(self) -> str:
        return html_table(_PLANNED, self._shown(), self._total())

    def _total(self) -> str:
        moments = f"{size(self.adam_bytes)} of Adam state"
        return f"{len(self.rows)} adapters, {self.parameters:,} trainable parameters, {moments}"

    def _shown(self) -> list[tuple[object, ...]]:
        beside = [(r.host, (r.kind, _shapes(r.shapes), r.parameters, r.adam_bytes)) for r in self.rows]
        return [
            (host or "(root)", kind, shapes, n * parameters, size(n * adam_bytes))
            for host, n, (kind, shapes, parameters, adam_bytes) in equal_layers(beside)
        ]


_PLANNED = ("host", "kind", "shapes", "parameters", "Adam state")


def plan(model: nn.Module, targets: Targets, kind: type[Adapter], *, exclude: Targets = (), **config: Any) -> Plan:
    """What `inject` would do with the same arguments; touches nothing, allocates nothing.

    Args:
        model: any module.
        targets: as in `inject`.
        kind: as in `inject`.
        exclude: as in `inject`.
        **config: keywords of the kind.

    Returns:
        Plan: a row for each adapter, with its shapes, trainable parameters and bytes of Adam state (two moments).

    Raises:
        AdapterError: what `inject` refuses about targets, hosts and configuration.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> print(peftlib.plan(model, torch.nn.Linear, peftlib.LoRA, rank=2))
        host  kind  shapes                       parameters  Adam state
        ----  ----  ---------------------------  ----------  ----------
        0     LoRA  lora_A [2, 8] lora_B [8, 2]          32  256 B
        2     LoRA  lora_A [2, 8] lora_B [2, 2]          20  160 B
        2 adapters, 52 trainable parameters, 416 B of Adam state
    """
    with statistics_held(model):
        built = [build(part, "plan", on_meta=True) for part in parts_to_inject(model, targets, kind, exclude, config)]
    return Plan(tuple(_plan_row(host_name, adapter) for host_name, _, adapter in built))


def _plan_row(host_name: str, adapter: Adapter) -> PlanRow:
    state = adapter.state_dict()
    shapes = {key: tuple(state[inner].shape) for key, inner in adapter.file_keys().items()}
    trained = [p for p in adapter.parameters() if p.requires_grad]
    moments = sum(2 * p.numel() * p.element_size() for p in trained)
    return PlanRow(host_name, type(adapter).__name__, shapes, sum(p.numel() for p in trained), moments)


def _shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    return " ".join(f"{key} {list(shape)}" for key, shape in shapes.items())


@dataclass(frozen=True)
class SummaryRow:
    """One adapter on one host; `state` is "active", "off" or "merged"."""

    host: str
    name: str
    kind: str
    state: str
    parameters: int
    trainable: int


@dataclass(frozen=True)
class Summary:
    """What a model holds; `str()` is a table, with a row for equal layers, and a notebook shows it as one."""

    rows: tuple[SummaryRow, ...]
    base_parameters: int
    base_trainable: int

    @property
    def adapter_parameters(self) -> int:
        """Parameters of all adapters."""
        return sum(row.parameters for row in self.rows)

    @property
    def trainable(self) -> int:
        """Parameters with `requires_grad`, adapters and base together."""
        return self.base_trainable + sum(row.trainable for row in self.rows)

    def __repr__(self) -> str:
        return f"Summary({self._total()})"

    def __str__(self) -> str:
        return f"{table(_HELD, self._shown())}\n{self._total()}"

    def _repr_html_(self) -> str:
        return html_table(_HELD, self._shown(), self._total())

    def _total(self) -> str:
        everything = self.base_parameters + self.adapter_parameters
        share = 100 * self.trainable / max(1, everything)
        return (
            f"{self.trainable:,} of {everything:,} parameters train ({share:.2f} %); "
            f"base {self.base_parameters:,}, adapters {self.adapter_parameters:,}"
        )

    def _shown(self) -> list[tuple[object, ...]]:
        beside = [(r.host, (r.name, r.kind, r.state, r.parameters, r.trainable)) for r in self.rows]
        return [
            (host or "(root)", *said, n * parameters, n * trainable)
            for host, n, (*said, parameters, trainable) in equal_layers(beside)
        ]


_HELD = ("host", "adapter", "kind", "state", "parameters", "trainable")


def summary(model: nn.Module) -> Summary:
    """A table of the adapters in a model: `str()` for people, plain numbers as attributes.

    A packed, quantized weight counts as the weight that it stands for.

    Args:
        model: any module, with adapters or without.

    Returns:
        Summary: a row for each adapter on each host, and totals.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2)
        >>> print(peftlib.summary(model))
        host  adapter  kind  state   parameters  trainable
        ----  -------  ----  ------  ----------  ---------
        0     default  LoRA  active          32         32
        32 of 104 parameters train (30.77 %); base 72, adapters 32
    """
    base = {
        id(p): (math.prod(weight_shape(module, leaf)), p.requires_grad)
        for _, module in candidates(model)
        for leaf, p in module._parameters.items()
        if p is not None
    }
    injected = list(adapters(model))
    selection = require(model) if injected else Selection()
    rows = tuple(_summary_row(selection, *item) for item in injected)
    return Summary(rows, sum(n for n, _ in base.values()), sum(n for n, trains in base.values() if trains))


def _summary_row(selection: Selection, host_name: str, name: str, adapter: Adapter) -> SummaryRow:
    state = "merged" if name in selection.merged else "active" if name in selection.active else "off"
    own = list(adapter.parameters())
    trainable = sum(p.numel() for p in own if p.requires_grad)
    return SummaryRow(host_name, name, type(adapter).__name__, state, sum(p.numel() for p in own), trainable)

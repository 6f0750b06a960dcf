"""Looking: what a model holds."""

import math
from dataclasses import dataclass

from torch import nn

from .adapter import Adapter
from .host import Selection
from .quantized import weight_shape
from .table import equal_layers, html_table, table
from .walk import adapters, candidates, require
from .weights import with_weight


@dataclass(frozen=True)
class SummaryRow:
    """One adapter on one host; `state` is "active", "off" or "merged", `weight` what its effect is multiplied by."""

    host: str
    name: str
    kind: str
    state: str
    parameters: int
    trainable: int
    weight: float = 1.0


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
        beside = [
            (r.host, (r.name, r.kind, with_weight(r.state, r.weight), r.parameters, r.trainable)) for r in self.rows
        ]
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
    weight = selection.weights[name].item() if name in selection.weights and state != "off" else 1.0
    return SummaryRow(host_name, name, type(adapter).__name__, state, sum(p.numel() for p in own), trainable, weight)

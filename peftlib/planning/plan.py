"""Planning: what an injection would do, and what a step of training with it would cost."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .._checks import require_whole_number
from .._core.adapter import Adapter
from .._core.freeze import statistics_held
from .._core.inject import build, parts_to_inject, require_uncompiled
from .._core.table import equal_layers, html_table, size, table
from .._core.targets import Targets
from .._core.walk import candidates
from .forecast import Forecast, forecast


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
    forecast: Forecast | None = None
    tokens: int | None = None

    @property
    def parameters(self) -> int:
        """Trainable parameters in all."""
        return sum(row.parameters for row in self.rows)

    @property
    def adam_bytes(self) -> int:
        """Bytes of Adam's first and second moments in all, in the dtype of the parameters."""
        return sum(row.adam_bytes for row in self.rows)

    def __repr__(self) -> str:
        return f"Plan({self._totals()[0]})"

    def __str__(self) -> str:
        return "\n".join([table(_PLANNED, self._shown()), *self._totals()])

    def _repr_html_(self) -> str:
        return html_table(_PLANNED, self._shown(), *self._totals())

    def _totals(self) -> list[str]:
        moments = f"{size(self.adam_bytes)} of Adam state"
        lines = [f"{len(self.rows)} adapters, {self.parameters:,} trainable parameters, {moments}"]
        if self.forecast is not None:
            lines.append(str(self.forecast))
        if self.tokens is not None:
            lines.append(f"{self.parameters / self.tokens:.2g} trainable parameters for each of {self.tokens:,} tokens")
        return lines

    def _shown(self) -> list[tuple[object, ...]]:
        beside = [(r.host, (r.kind, _shapes(r.shapes), r.parameters, r.adam_bytes)) for r in self.rows]
        return [
            (host or "(root)", kind, shapes, n * parameters, size(n * adam_bytes))
            for host, n, (kind, shapes, parameters, adam_bytes) in equal_layers(beside)
        ]


_PLANNED = ("host", "kind", "shapes", "parameters", "Adam state")


def plan(
    model: nn.Module,
    targets: Targets,
    kind: type[Adapter],
    *,
    exclude: Targets = (),
    inputs: Any = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    trials: int = 1,
    tokens: int | None = None,
    **config: Any,
) -> Plan:
    """What `inject` would do with the same arguments; touches nothing, allocates nothing.

    With `inputs` it also forecasts a step of training: the model is copied without its values (the meta device), given
    the adapters and called once, and what autograd keeps is counted. Counted as on a CPU; a workspace that a library
    keeps for itself (oneDNN's recurrent layers) is not.

    Args:
        model: any module.
        targets: as in `inject`.
        kind: as in `inject`.
        exclude: as in `inject`.
        inputs: what the model is called with in training: a tensor, a tuple of arguments, or a dict of keywords, of
            the real shapes; only shapes and dtypes are read. Default: no forecast.
        optimizer: makes the optimizer of a list of parameters.
        trials: how many adapters like this train side by side, each on such inputs (`route`).
        tokens: how many the training data has; said beside the parameters that are to learn from them.
        **config: keywords of the kind.

    Returns:
        Plan: a row for each adapter, with its shapes, trainable parameters and bytes of Adam state (two moments);
        `forecast`, with bytes for backward, of gradients, of optimizer state, and of the file of one adapter.

    Raises:
        AdapterError: what `inject` refuses about targets, hosts and configuration; a model whose forward asks for
            values, or an optimizer that does, so that shapes alone do not tell.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> print(peftlib.plan(model, torch.nn.Linear, peftlib.LoRA, inputs=torch.ones(64, 8), rank=2))
        host  kind  shapes                       parameters  Adam state
        ----  ----  ---------------------------  ----------  ----------
        0     LoRA  lora_A [2, 8] lora_B [8, 2]          32  256 B
        2     LoRA  lora_A [2, 8] lora_B [2, 2]          20  160 B
        2 adapters, 52 trainable parameters, 416 B of Adam state
        a step keeps 5.1 kB for backward, 208 B of gradients and 432 B of optimizer state; a file has 1.4 kB
    """
    if tokens is not None:
        require_whole_number("tokens", tokens, say=1_000_000)
    require_uncompiled(model, "plan")
    named = candidates(model, aliases=True)
    with statistics_held(module for _, module in named):
        there = parts_to_inject(model, named, targets, kind, exclude, config)
        built = [build(part, "plan", on_meta=True) for part in there]
    rows = tuple(_plan_row(host_name, adapter) for host_name, _, adapter in built)
    cost = None if inputs is None else forecast(model, built, inputs, optimizer, trials)
    return Plan(rows, cost, tokens)


def _plan_row(host_name: str, adapter: Adapter) -> PlanRow:
    state = adapter.state_dict()
    shapes = {key: tuple(state[inner].shape) for key, inner in adapter.file_keys().items()}
    trained = [p for p in adapter.parameters() if p.requires_grad]
    moments = sum(2 * p.numel() * p.element_size() for p in trained)
    return PlanRow(host_name, type(adapter).__name__, shapes, sum(p.numel() for p in trained), moments)


def _shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    return " ".join(f"{key} {list(shape)}" for key, shape in shapes.items())

"""Plots of norms, spectra, schedules, memory and results, each drawn on the axes that it is given and returned."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ._checks import require_one_of
from ._core.table import size
from ._core.walk import adapters
from ._errors import AdapterError
from .training.monitoring import singular_values
from .training.unfreezing import GradualUnfreezing
from .training.unfreezing_plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEGEND = 12  # more names would cover the plot


def delta_norms(numbers: Mapping[str, float], *, ax: "Axes | None" = None) -> "Axes":
    r"""How far each module has moved: :math:`\lVert \Delta W \rVert_F / \lVert W \rVert_F`, a line over the layers for
    each kind of module.

    Args:
        numbers: what `monitor` returned.
        ax: to draw on; default new axes, of a figure that pyplot does not know.

    Returns:
        matplotlib.axes.Axes: `ax.figure` is the figure.

    Raises:
        AdapterError: numbers without a `delta_ratio`, or no matplotlib for new axes.

    Example:
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        >>> _ = peftlib.inject(model, torch.nn.Linear, peftlib.LoRA, rank=2)
        >>> ax = peftlib.plot.delta_norms(peftlib.monitor(model))
        >>> ax.figure.savefig("norms.png")
    """
    lines: dict[str, list[tuple[int, float]]] = {}
    for (layer, label), value in _over_layers(_by_module(numbers, "delta_ratio")):
        lines.setdefault(label, []).append((layer, value))
    axes = _axes(ax)
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=label)
    return _labelled(axes, "layer", "‖ΔW‖ / ‖W‖", len(lines))


def spectrum(
    model: nn.Module, name: str | None = None, *, modules: Iterable[str] | None = None, ax: "Axes | None" = None
) -> "Axes":
    """The singular values of ΔW, a line for each adapted module; of a stack of matrices their mean.

    Args:
        model: a model with adapters.
        name: only the adapters of this name; default all.
        modules: only these, by the names that `monitor` gives them; default all.
        ax: to draw on; default new axes, of a figure that pyplot does not know.

    Returns:
        matplotlib.axes.Axes: with a logarithmic scale, so that values of zero are left out.

    Raises:
        AdapterError: the model has no such adapter, is merged, has nothing that merges, or has no such module.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2)
        >>> _ = torch.nn.init.ones_(model[0].adapters["default"].lora_B)
        >>> ax = peftlib.plot.spectrum(model)
    """
    found = singular_values(model, name)
    shown = [*found] if modules is None else list(modules)
    absent = [one for one in shown if one not in found]
    if absent or not found:
        raise AdapterError(
            f"spectrum: {absent[0] if absent else 'the model'} has no change of a weight. It has "
            f"{', '.join([*found][:4]) or 'none'}. Name those that can be merged."
        )
    axes = _axes(ax)
    for place in shown:
        values: list[float] = found[place].tolist()
        axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=place)
    axes.set_yscale("log", nonpositive="mask")
    return _labelled(axes, "singular value", "of ΔW", len(shown))


def schedule(unfreezing: "GradualUnfreezing | Plan", *, ax: "Axes | None" = None) -> "Axes":
    """Which layer group trains when: a bar for each group where it trains, the top one above.

    Args:
        unfreezing: a `GradualUnfreezing`, or its `plan`.
        ax: to draw on; default new axes, of a figure that pyplot does not know.

    Returns:
        matplotlib.axes.Axes: over the steps, or over the stages where a metric decides.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        >>> groups = peftlib.layer_groups(model)
        >>> ax = peftlib.plot.schedule(peftlib.GradualUnfreezing(groups, peftlib.schedules.every(10)))
    """
    plan = unfreezing.plan if isinstance(unfreezing, GradualUnfreezing) else unfreezing
    starts = list(plan.counts or range(len(plan.stages)))
    end = starts[-1] + max(1, round(starts[-1] / max(1, len(starts) - 1)))
    spans = [*zip(starts, [*starts[1:], end], strict=True)]
    axes = _axes(ax)
    for row in range(len(plan.groups)):
        trains = [(start, stop - start) for (start, stop), on in zip(spans, plan.stages, strict=True) if row in on]
        axes.broken_barh(trains, (row - 0.4, 0.8))
    axes.set_yticks(range(len(plan.groups)), [group.name for group in plan.groups])
    axes.set_title(plan.title)
    return _labelled(axes, "step" if plan.counts else "stage", "", 0)


def memory(model: nn.Module, *, ax: "Axes | None" = None) -> "Axes":
    """What training holds besides activations: weights, gradients and Adam's two moments, as the model is now and if
    all of it trained.

    Args:
        model: any module, with adapters or without.
        ax: to draw on; default new axes, of a figure that pyplot does not know.

    Returns:
        matplotlib.axes.Axes: two bars, in MB (10⁶ bytes).

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2)
        >>> ax = peftlib.plot.memory(model)
    """
    ours = {id(p) for *_, adapter in adapters(model) for p in adapter.parameters()}
    base = _bytes(p for p in model.parameters() if id(p) not in ours)
    held, trained = _bytes(model.parameters()), _bytes(p for p in model.parameters() if p.requires_grad)
    parts = {
        "base weights": (base, base),
        "adapters": (held - base, 0),
        "gradients": (trained, base),
        "Adam's moments": (2 * trained, 2 * base),
    }
    axes, left = _axes(ax), [0.0, 0.0]
    for label, amounts in parts.items():
        wide = [amount / 1e6 for amount in amounts]
        axes.barh([0, 1], wide, left=list(left), label=label)
        left = [start + width for start, width in zip(left, wide, strict=True)]
    for row, total in enumerate(left):
        axes.annotate(f" {size(total * 1e6)}", (total, row), va="center")
    axes.set_yticks([0, 1], ["as it is", "if all of it trained"])
    axes.margins(x=0.2)
    return _labelled(axes, "MB, without activations", "", len(parts))


def monitor(
    history: Sequence[Mapping[str, float]],
    number: str = "delta_ratio",
    *,
    by: str = "adapter",
    steps: Sequence[float] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Curves of one number over training.

    Args:
        history: what `monitor` returned, call after call.
        number: the last part of the keys: "delta_ratio", "gradient_norm", "stable_rank", ...
        by: "adapter" for one line each, or "module".
        steps: at which each call was made; default 0, 1, 2, ...
        ax: to draw on; default new axes, of a figure that pyplot does not know.

    Returns:
        matplotlib.axes.Axes: with a line for each adapter or module.

    Raises:
        AdapterError: an empty history, a number that is not in it, steps of another length, an unknown `by`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2)
        >>> history = [peftlib.monitor(model) for _ in range(3)]
        >>> ax = peftlib.plot.monitor(history, "parameter_norm", steps=[0, 10, 20])
    """
    require_one_of(("adapter", "module"), "by", by, where="plot.monitor")
    if not history or (steps is not None and len(steps) != len(history)):
        found = "no call of monitor" if not history else f"{len(history)} calls of monitor and {len(steps or ())} steps"
        raise AdapterError(f"plot.monitor: {found}. Pass a list of what monitor returned, and a step for each.")
    depth = 1 if by == "adapter" else 2
    keys = [key for key in history[-1] if key.endswith(f"/{number}") and (key.count("/") == 1) == (depth == 1)]
    if not keys:
        known = ", ".join(dict.fromkeys(key.rsplit("/", 1)[-1] for key in history[-1]))
        raise AdapterError(f"plot.monitor: no {number!r} by {by} in the last call. There are {known}.")
    axes = _axes(ax)
    for key in keys:
        x = range(len(history)) if steps is None else steps
        points = [(at, numbers[key]) for at, numbers in zip(x, history, strict=True) if key in numbers]
        axes.plot(*zip(*points, strict=True), label=key.rsplit("/", 1)[0])
    return _labelled(axes, "call" if steps is None else "step", number.replace("_", " "), len(keys))


def compare(results: Mapping[str, tuple[float, float]], *, ax: "Axes | None" = None) -> "Axes":
    """Accuracy against trained parameters, a named point for each result.

    Args:
        results: by name, how many parameters train, and the accuracy.
        ax: to draw on; default new axes, of a figure that pyplot does not know.

    Returns:
        matplotlib.axes.Axes: with a logarithmic scale of parameters.

    Raises:
        AdapterError: no result, or one without parameters.

    Example:
        >>> ax = peftlib.plot.compare({"LoRA, rank 4": (73_728, 0.842), "IA3": (9_216, 0.827)})
    """
    small = [name for name, (parameters, _) in results.items() if parameters <= 0]
    if small or not results:
        found = f"{small[0]} has no parameter" if small else "there is no result"
        raise AdapterError(f"compare: {found}. Pass for each name (parameters, accuracy), with at least 1 parameter.")
    axes = _axes(ax)
    for name, (parameters, accuracy) in results.items():
        axes.plot([parameters], [accuracy], "o", label=name)
        axes.annotate(name, (parameters, accuracy), xytext=(5, 4), textcoords="offset points")
    axes.set_xscale("log")
    axes.margins(x=0.25)
    return _labelled(axes, "trained parameters", "accuracy", 0)


def _axes(ax: "Axes | None") -> Any:
    """New ones belong to a figure that pyplot does not know, so that nothing global changes and none is kept alive."""
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise AdapterError(
            'plot: matplotlib is not installed. Install it: pip install "peftlib[plot]", or pass ax= of your own.'
        ) from None
    return Figure(layout="constrained").subplots()


def _labelled(ax: Any, x: str, y: str, names: int) -> Any:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    if 0 < names <= _LEGEND:
        ax.legend()
    return ax


def _by_module(numbers: Mapping[str, float], number: str) -> dict[str, float]:
    found = {
        key.rsplit("/", 1)[0]: v for key, v in numbers.items() if key.endswith(f"/{number}") and key.count("/") > 1
    }
    if not found:
        raise AdapterError(f"plot: no module has a {number!r}. Pass what monitor returned for adapters that merge.")
    return found


def _over_layers(values: Mapping[str, float]) -> Iterator[tuple[tuple[int, str], float]]:
    """The layer of each module, and its name without it: of names that differ in their numbers alone, the first number
    that differs. Of "a/0.layers.3.fc" and "a/0.layers.4.fc" these are 3, 4 and "a/0.layers.*.fc"."""
    alike: dict[str, list[list[str]]] = {}
    for key in values:
        parts = re.split(r"([/.])", key)
        alike.setdefault(re.sub(r"\b\d+\b", "#", key), []).append(parts)
    for names in alike.values():
        columns = [*zip(*names, strict=True)]
        at = next((i for i, column in enumerate(columns) if len({*column}) > 1), None)
        for parts in names:
            shown = parts if at is None else [*parts[:at], "*", *parts[at + 1 :]]
            yield (0 if at is None else int(parts[at]), "".join(shown)), values["".join(parts)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in tensors}.values())

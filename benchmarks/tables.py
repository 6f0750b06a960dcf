"""The pages' tables and pictures, from the cells that are kept: `python benchmarks/tables.py`."""

import math
from collections.abc import Mapping, Sequence
from itertools import permutations
from statistics import fmean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from methods import FULL, HEAD, LORA, METHODS, NARROW, SEEDS, STEPS_OF_RATE, Method, kept, key_of
from tasks import ROOT

Cell = Mapping[str, Any]  # "rates": by rate accuracy and loss in validation, accuracy in test and on the old task
VALIDATION, LOSS, TEST, OLD = range(4)
TASKS = {"reviews": "Film reviews", "digits": "Digits"}


def finished(cells: Sequence[Cell]) -> list[str]:
    """The rates with which every seed came to an end; a trial that is not finite does not."""
    return [rate for rate in cells[0]["rates"] if all(rate in cell["rates"] for cell in cells)]


def chosen(cells: Sequence[Cell]) -> str:
    """The rate of the best accuracy on the validation rows, then of the least loss there; the mean over the seeds."""

    def quality(rate: str) -> tuple[float, float]:
        found = [cell["rates"][rate] for cell in cells]
        return round(fmean(one[VALIDATION] for one in found), 9), -fmean(one[LOSS] for one in found)

    return max(finished(cells), key=quality)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """And the standard error of the mean."""
    return fmean(values), stdev(values) / math.sqrt(len(values))


def difference(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Paired by seed: a seed has the same rows, the same order and the same start of the head with every method."""
    return mean_and_error([one - other for one, other in zip(values, others, strict=True)])


def is_clear(mean: float, error: float) -> bool:
    """Beyond two standard errors, and beyond what rounding leaves of none."""
    return abs(mean) > max(2 * error, 1e-9)


class Results:
    """What one task's cells say."""

    def __init__(self, task: str, found: Mapping[str, Cell]) -> None:
        self.methods = [method for method in METHODS if task in method.tasks]
        self.cells = {method: [found[key_of(task, method, seed)] for seed in SEEDS] for method in self.methods}

    def rate(self, method: Method) -> str:
        return chosen(self.cells[method])

    def rate_in_words(self, method: Method) -> str:
        """And whether no higher, or no lower, one was tried."""
        rate, tried = self.rate(method), [*self.cells[method][0]["rates"]]
        edge = {tried[0]: " (lowest)", tried[-1]: " (highest)"}
        return rate + edge.get(rate, "")

    def values(self, method: Method, what: int, rate: str = "") -> list[float]:
        return [cell["rates"][rate or self.rate(method)][what] for cell in self.cells[method]]

    def rates(self, method: Method) -> list[str]:
        return finished(self.cells[method])

    def difference(self, method: Method, other: Method, what: int) -> tuple[float, float]:
        return difference(self.values(method, what), self.values(other, what))

    def side_by_side(self, *methods: Method) -> float:
        """Time of a step of five trials side by side, as a multiple of that one after another; default of all."""
        together, apart = zip(*(self.cells[method][0]["steps"] for method in methods or self.methods), strict=True)
        return sum(together) / sum(apart)

    def step(self, method: Method) -> float:
        """Time of a step by itself, as a multiple of full fine-tuning's."""
        return self.cells[method][0]["steps"][1] / self.cells[FULL][0]["steps"][1]


def percent(mean: float, error: float, sign: bool = False) -> str:
    return f"{100 * mean:{'+' if sign else ''}.1f} ± {100 * error:.1f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = rows
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rest])


def accuracy(results: Results) -> str:
    rows = [["", "test accuracy", "against full fine-tuning", "trainable", "rate", "a step", "five side by side"]]
    for method in results.methods:
        against = "–" if method is FULL else percent(*results.difference(method, FULL, TEST), sign=True)
        cells = [method.name, percent(*mean_and_error(results.values(method, TEST))), against]
        cells += [f"{results.cells[method][0]['trainable']:,}", results.rate_in_words(method)]
        rows.append([*cells, f"{results.step(method):.2f}", f"{results.side_by_side(method):.2f}"])
    return table(rows)


def forgetting(results: Results) -> str:
    rows = [["", "old task", "change", "new task", "rate", "old task at each rate"]]
    for method in results.methods:
        change = "–" if method is HEAD else percent(*results.difference(method, HEAD, OLD), sign=True)
        cells = [method.name, percent(*mean_and_error(results.values(method, OLD))), change]
        cells += [percent(*mean_and_error(results.values(method, TEST))), results.rate_in_words(method)]
        each = [f"{100 * fmean(results.values(method, OLD, rate)):.0f}" for rate in results.rates(method)]
        rows.append([*cells, ", ".join(each)])
    return table(rows)


def clear(results: Results, what: int) -> str:
    """Which differences exceed two standard errors."""
    pairs = [*permutations(results.methods, 2)]
    above = {method: [] for method in results.methods}
    for better, worse in pairs:
        mean, error = results.difference(better, worse, what)
        if mean > 0 and is_clear(mean, error):
            above[better].append(worse.name)
    lines = [f"- {method.name}: above {'; '.join(names)}." for method, names in above.items() if names]
    count = sum(map(len, above.values()))
    return "\n".join([f"Of {len(pairs) // 2} differences {count} exceed two standard errors:", "", *lines])


def rates(results: Mapping[str, Results]) -> str:
    """Accuracy of LoRA and of full fine-tuning at each rate, and what more targets give."""
    rows = [["", "test accuracy at each rate, from the lowest", "the best by validation"]]
    for task, title in TASKS.items():
        one = results[task]
        for method in (NARROW, LORA, FULL):
            each = [f"{rate}: {100 * fmean(one.values(method, TEST, rate)):.1f}" for rate in one.rates(method)]
            rows.append([f"{title}: {method.name}", ", ".join(each), one.rate_in_words(method)])
    gains = [
        f"{percent(*one.difference(LORA, NARROW, TEST), sign=True)} ({TASKS[task].lower()})"
        for task, one in results.items()
    ]
    return table(rows) + f"\n\nAll linear layers against query and value: {' and '.join(gains)}."


def summary(results: Mapping[str, Results]) -> str:
    """For those who choose a type: no errors, which stand on the pages of their own."""
    titles = [text for title in TASKS.values() for text in (title.lower(), "their old task")]
    rows = [["", *titles, "a step, full fine-tuning = 1"]]
    for method in results["reviews"].methods:
        means = [fmean(one.values(method, what)) for one in results.values() for what in (TEST, OLD)]
        rows.append([method.name, *(f"{100 * mean:.1f}" for mean in means), f"{results['reviews'].step(method):.2f}"])
    return table(rows)


def picture_of_accuracy(results: Mapping[str, Results]) -> Figure:
    """The mean with its standard error, and a small dot for each seed."""
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (task, title) in zip(panels, TASKS.items(), strict=True):
        for method in results[task].methods:
            values, at = results[task].values(method, TEST), METHODS.index(method)
            mean, error = mean_and_error(values)
            axes.scatter(values, [at] * len(values), s=14, color="#edae49", zorder=2)
            axes.errorbar(mean, at, xerr=error, fmt="o", color="#30638e", markersize=6, zorder=3)
        axes.set_yticks(range(len(METHODS)), [method.name for method in METHODS], fontsize=9)
        axes.set(title=title, xlabel="accuracy on the test rows")
        plain(axes)
    panels[0].invert_yaxis()
    return figure


def picture_of_forgetting(results: Mapping[str, Results]) -> Figure:
    """Old against new: a line joins the rates of a method, a large dot is the one that validation chose."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (task, title) in zip(panels, TASKS.items(), strict=True):
        for method in results[task].methods:
            draw_rates(axes, results[task], method)
        axes.set(title=title, xlabel="new task", ylabel="old task")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        plain(axes)
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    return figure


def draw_rates(axes: Axes, results: Results, method: Method) -> None:
    at, rates = METHODS.index(method), results.rates(method)
    new, old = ([fmean(results.values(method, what, rate)) for rate in rates] for what in (TEST, OLD))
    best = rates.index(results.rate(method))
    style: dict[str, Any] = {"color": f"C{at % 10}", "marker": "os"[at // 10]}
    axes.plot(new, old, markersize=3, linewidth=1, alpha=0.6, **style)
    axes.scatter(new[best], old[best], s=55, zorder=3, label=method.name, **style)


def plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(PercentFormatter(1))


def publish(page: str, texts: Mapping[str, str]) -> None:
    """Puts each text between the two marks of its name."""
    path = ROOT / "docs" / f"{page}.md"
    written = path.read_text()
    for name, text in texts.items():
        before, mark, rest = written.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        if not (mark and end):
            raise SystemExit(f"{path} has no place for {name}")
        written = f"{before}{mark}{text}\n{end}{after}"
    path.write_text(written)


def texts(results: Mapping[str, Results], machine: str) -> dict[str, dict[str, str]]:
    """By page, then by mark."""
    measured = f"Measured on {machine}."
    return {
        "accuracy": {
            **{f"accuracy of {task}": accuracy(one) for task, one in results.items()},
            **{f"differences of {task}": clear(one, TEST) for task, one in results.items()},
            "time": time_of(results) + " " + measured,
        },
        "forgetting": {
            **{f"forgetting of {task}": forgetting(one) for task, one in results.items()},
            **{f"differences of {task}": clear(one, OLD) for task, one in results.items()},
        },
        "rates": {"tasks": rates(results)},
        "start/choose": {"measured": summary(results)},
    }


def time_of(results: Mapping[str, Results]) -> str:
    cells = [cell for one in results.values() for of_method in one.cells.values() for cell in of_method]
    trainings, minutes = len(STEPS_OF_RATE) * len(cells), sum(cell["seconds"][1] for cell in cells) / 60
    ratios = " and ".join(f"{one.side_by_side():.2f} ({TASKS[task].lower()})" for task, one in results.items())
    return (
        f"All {trainings} trainings, with what is measured of them, took {minutes:.0f} minutes of one processor. Over "
        f"all methods a step of five trials side by side took {ratios} of the time of five steps one after another."
    )


def main() -> None:
    found = kept()
    results = {task: Results(task, found) for task in TASKS}
    for page, marks in texts(results, found["machine"]).items():
        publish(page, marks)
    picture_of_accuracy(results).savefig(ROOT / "docs" / "accuracy.png", dpi=110)
    picture_of_forgetting(results).savefig(ROOT / "docs" / "forgetting.png", dpi=110)


if __name__ == "__main__":
    main()

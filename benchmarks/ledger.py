"""Every finished run kept, the values chosen among them, and their tables."""

import argparse
import json
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from reviews import ROOT, Method, run, step_times
from torch import Tensor
from transformers.utils import logging

KEPT = ROOT / "benchmarks" / "results" / "reviews.json"
SEEDS = (0, 1, 2)


def options(doc: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of methods; default all")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after this time")
    parser.add_argument("--steps", action="store_true", help="time the steps of training anew; needs a quiet machine")
    given = parser.parse_args()
    torch.set_num_threads(1)  # another number of threads sums in another order
    logging.disable_progress_bar()
    return given


def finish(methods: list[Method], seconds: float) -> None:
    """Does the missing runs one by one, and starts none after this time."""
    began = time.perf_counter()
    while (left := missing(methods)) and time.perf_counter() - began < seconds:
        method, value, seed = left[0]
        result = run(method, value, seed)
        everything = kept()
        everything["runs"][method.key(value, seed)] = result
        keep(everything)
        shown = ", ".join(f"{key} {result[key]:.4g}" for key in ("validation", "test", "cosine", "order"))
        print(f"{method.key(value, seed)}: {shown}, {result['training seconds']:.0f} s", flush=True)


def missing(methods: list[Method]) -> list[tuple[Method, float, int]]:
    """The first seed at every value; then the other seeds at the chosen one."""
    runs = kept()["runs"]
    wanted = [(method, value, SEEDS[0]) for method in methods for value in method.values]
    for method in methods:
        value = chosen(method)
        wanted += [] if value is None else [(method, value, seed) for seed in SEEDS[1:]]
    return [(method, value, seed) for method, value, seed in wanted if method.key(value, seed) not in runs]


def chosen(method: Method) -> float | None:
    results = grid(method)
    return (method.choose or best)(results) if len(results) == len(method.values) else None


def best(results: dict[float, dict[str, Any]]) -> float:
    """By accuracy on the validation sentences, then by their loss."""
    return max(results, key=lambda value: (results[value]["validation"], -results[value]["validation loss"]))


def grid(method: Method) -> dict[float, dict[str, Any]]:
    """The finished runs of the first seed, by value."""
    runs = kept()["runs"]
    found = {value: runs.get(method.key(value, SEEDS[0])) for value in method.values}
    return {value: result for value, result in found.items() if result is not None}


def results(method: Method) -> list[dict[str, Any]]:
    """The finished runs at the chosen value."""
    value = chosen(method)
    runs = kept()["runs"]
    found = [] if value is None else [runs.get(method.key(value, seed)) for seed in SEEDS]
    return [result for result in found if result is not None]


def keep_steps(methods: list[Method]) -> None:
    keep({**kept(), "steps": step_times(methods)})


def kept() -> dict[str, Any]:
    return json.loads(KEPT.read_text()) if KEPT.exists() else {"machine": machine(), "runs": {}, "steps": {}}


def keep(result: dict[str, Any]) -> None:
    """An interruption loses no finished run."""
    KEPT.parent.mkdir(exist_ok=True)
    beside = KEPT.with_suffix(".writing")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(beside, KEPT)


def machine() -> str:
    cpu = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else None
    return f"one thread of {model[1] if model else platform.processor()}, torch {torch.__version__}"


def publish(name: str, table: str, figure: Figure) -> None:
    """Puts the table between the two marks of the page docs/<name>.md, and the picture beside the page."""
    page = ROOT / "docs" / f"{name}.md"
    before, mark, rest = page.read_text().partition("<!-- table -->\n")
    _, end, after = rest.partition("<!-- end of table -->")
    page.write_text(f"{before}{mark}{table}\n\nMeasured on {kept()['machine']}.\n{end}{after}")
    figure.savefig(page.with_suffix(".png"), dpi=110)
    print(table)


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def percent(values: Tensor, sign: bool = False) -> str:
    """The mean over the test sentences, and its standard error."""
    return f"{100 * values.mean():{'+' if sign else ''}.1f} ± {100 * values.std() / len(values) ** 0.5:.1f}"


def each(runs: list[dict[str, Any]], key: str) -> str:
    return ", ".join(f"{100 * run[key]:.1f}" for run in runs)


def right(method: Method) -> Tensor:
    """How many of its seeds are right about each test sentence, as a share [sentences]."""
    return torch.tensor([[int(hit) for hit in run["right"]] for run in results(method)]).double().mean(0)


def plain(figure: Figure) -> Figure:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
    return figure

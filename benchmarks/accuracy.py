"""Accuracy, size and time of each kind on the demo's task, three seeds each: `python benchmarks/accuracy.py`."""

from collections.abc import Callable
from typing import Any

import ledger
import torch
from matplotlib.figure import Figure
from reviews import HEAD_RATE, Method, Plan, demo, group

import peftlib

Prepare = Callable[[demo.Classifier, float, list[demo.Batch]], Plan]


def adapted(kind: type[peftlib.Adapter], *parts: tuple[list[str], dict[str, Any]]) -> Prepare:
    """The head, and adapters of one kind in these places, under one name."""

    def prepare(model: demo.Classifier, rate: float, training: list[demo.Batch]) -> Plan:
        for targets, config in parts:
            peftlib.inject(model, targets, kind, **config)
        peftlib.inject(model, "head", peftlib.Full)
        head = head_of(model)
        rest = [parameter for parameter in peftlib.parameters(model) if not any(parameter is one for one in head)]
        return Plan([group(rest, rate), group(head, HEAD_RATE)], model, training)

    return prepare


def head_of(model: demo.Classifier) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.head.parameters() if parameter.requires_grad]


def head_only(model: demo.Classifier, rate: float, training: list[demo.Batch]) -> Plan:
    """The encoder is frozen, so its vectors are computed once, and the head sees them 20 times."""
    peftlib.inject(model, "head", peftlib.Full)
    vectors = demo.embedded(model, training, size=64)
    return Plan([group(peftlib.parameters(model), rate)], model.head, vectors, epochs=20)


def full(model: demo.Classifier, rate: float, training: list[demo.Batch]) -> Plan:
    return Plan([group(model.encoder.parameters(), rate), group(model.head.parameters(), HEAD_RATE)], model, training)


QUERY_VALUE, SUBLAYERS = ["query", "value"], ["attention.output.dense", "layer.[0-5].output.dense"]
HEAD = Method("head only", (1e-3, 3e-3, 1e-2, 3e-2), head_only)
LORA = Method("LoRA", (1e-3, 2e-3, 4e-3), adapted(peftlib.LoRA, (QUERY_VALUE, {"rank": 8, "alpha": 16})))
DORA = Method("DoRA", (1e-3, 2e-3), adapted(peftlib.DoRA, (QUERY_VALUE, {"rank": 8, "alpha": 16})))
FACTORS = (["key", "value"], {}), (["layer.[0-5].output.dense"], {"on": "input"})
IA3 = Method("IA3", (1e-2, 3e-2), adapted(peftlib.IA3, *FACTORS))
AFTER = Method("Bottleneck, after", (1e-3, 3e-3, 1e-2), adapted(peftlib.Bottleneck, (SUBLAYERS, {"width": 8})))
BESIDE = {"width": 8, "position": "parallel", "dim": 384}
PARALLEL = Method(
    "Bottleneck, parallel", (3e-3, 1e-2), adapted(peftlib.Bottleneck, (["attention", "layer.[0-5]"], BESIDE))
)
PREFIX = Method("Prefix", (3e-3, 1e-2, 3e-2, 1e-1), adapted(peftlib.Prefix, (["self"], {"length": 16})))
BLOCK = Method("Full, the last block", (3e-4, 1e-3), adapted(peftlib.Full, (["layer.5"], {})))
EVERYTHING = Method("full fine-tuning", (5e-5, 1e-4, 2e-4), full)
METHODS = [HEAD, LORA, DORA, IA3, AFTER, PARALLEL, PREFIX, BLOCK, EVERYTHING]
NAMES = [method.name for method in METHODS]


HEADER = ["", "test accuracy", "of the seeds", "against full fine-tuning", "trainable", "file", "a step", "rate"]


def table() -> str:
    steps, most = ledger.kept()["steps"], ledger.right(EVERYTHING)
    rows = [ledger.row(HEADER), ledger.row(["---"] * len(HEADER))]
    for method in METHODS:
        runs = ledger.results(method)
        if not runs:
            continue
        against = ledger.percent(ledger.right(method) - most, sign=True) if method is not EVERYTHING else "–"
        cells = [method.name, ledger.percent(ledger.right(method)), ledger.each(runs, "test"), against]
        cells += [f"{runs[0]['trainable']:,}", demo.in_bytes(runs[0]["bytes"])]
        cells += [f"{steps[method.name] / steps[EVERYTHING.name]:.2f}" if method.name in steps else "–"]
        rows.append(ledger.row([*cells, f"{ledger.chosen(method):g}"]))
    return "\n".join(rows)


def picture() -> Figure:
    """Accuracy by method with its standard error; a small dot for each seed."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    shown = [method for method in METHODS if ledger.results(method)]
    for at, method in enumerate(shown):
        right, hits = ledger.right(method), [run["test"] for run in ledger.results(method)]
        error = (right.std() / len(right) ** 0.5).item()
        axes.errorbar(right.mean().item(), at, xerr=error, fmt="o", color="#30638e", markersize=7)
        axes.scatter(hits, [at] * len(hits), s=16, color="#edae49", zorder=3)
    sizes = [f"{method.name}\n{ledger.results(method)[0]['trainable']:,}" for method in shown]
    axes.set_yticks(range(len(shown)), sizes, fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel="accuracy on 1,000 test sentences", title="Accuracy by method, and what trains")
    return ledger.plain(figure)


def main() -> None:
    options = ledger.options(__doc__)
    ledger.finish([method for method in METHODS if method.name in (options.only or NAMES)], options.seconds)
    if options.steps or not (options.only or ledger.kept()["steps"]):
        ledger.keep_steps([method for method in METHODS if method is not HEAD])
    ledger.publish("accuracy", table(), picture())


if __name__ == "__main__":
    main()

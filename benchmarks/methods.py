"""Every method at five rates with five seeds on two tasks, trained side by side: `python benchmarks/methods.py`.

A cell is one method with one seed: its five rates are five trials on one base, which see the same rows. Each finished
cell is kept, so it goes on where it was stopped.
"""

import argparse
import json
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tasks import ROOT, TASKS, Data, Task
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.utils import logging

import peftlib

KEPT = ROOT / "benchmarks" / "results" / "methods.json"
SEEDS = (0, 1, 2, 3, 4)
STEPS_OF_RATE = (1.0, 3.0, 10.0, 30.0, 100.0)

Part = tuple[Any, type[peftlib.Adapter], dict[str, Any]]
# Of the body's parameters and their start, of the features that are given and those that the base gives.
Term = Callable[[Sequence[nn.Parameter], Sequence[Tensor], Tensor, Callable[[], Tensor]], Tensor]


@dataclass(frozen=True, eq=False)
class Method:
    """A way to train: adapters beside the one of the head, the lowest of its rates, and a term of its loss."""

    name: str
    parts: list[Part]
    lowest: float
    term: Term | None = None
    tasks: tuple[str, ...] = ("reviews", "digits")

    def rates(self, task: Task) -> list[float]:
        return [float(f"{self.lowest * task.rates * step:.0e}") for step in STEPS_OF_RATE]


def near_the_start(now: Sequence[nn.Parameter], start: Sequence[Tensor], *features: Any) -> Tensor:
    """L2-SP, α = 0.1."""
    return 0.05 * torch.stack([(p - p0).square().sum() for p, p0 in zip(now, start, strict=True)]).sum()


def near_the_features(now: Any, start: Any, given: Tensor, base: Callable[[], Tensor]) -> Tensor:
    """Distillation: the squared distance from the features of the base, as a share of their squared length."""
    return ((given - base()).square().sum(1) / base().square().sum(1)).mean()


SUBLAYERS = ["attention.output.dense", "blocks.[0-9].output.dense"]
FACTORS: list[Part] = [(["key", "value"], peftlib.IA3, {}), (SUBLAYERS[1], peftlib.IA3, {"on": "input"})]
BESIDE: Part = (["attention", "blocks.[0-9]"], peftlib.Bottleneck, {"width": 8, "position": "parallel"})
LINEARS = ["query", "key", "value", "dense"]
LOW_RANK = {"rank": 8, "alpha": 16}
BODY: list[Part] = [("body", peftlib.Full, {})]

HEAD = Method("head only", [], 1e-3)
NARROW = Method("LoRA, query and value", [(["query", "value"], peftlib.LoRA, LOW_RANK)], 3e-4)
LORA = Method("LoRA, all linear", [(LINEARS, peftlib.LoRA, LOW_RANK)], 3e-4)
FULL = Method("full fine-tuning", BODY, 3e-5)
METHODS = [
    HEAD,
    NARROW,
    LORA,
    Method("DoRA, query and value", [(["query", "value"], peftlib.DoRA, LOW_RANK)], 3e-4),
    Method("IA3", FACTORS, 1e-2),
    Method("Bottleneck, after", [(SUBLAYERS, peftlib.Bottleneck, {"width": 8})], 1e-4),
    Method("Bottleneck, parallel", [BESIDE], 3e-4),
    Method("Prefix", [("self", peftlib.Prefix, {"length": 8})], 1e-3),
    Method("Full, the last block", [("blocks.1", peftlib.Full, {})], 3e-5),
    FULL,
    Method("Full, biases", [("body", peftlib.Full, {"params": "*.bias"})], 3e-4, tasks=("digits",)),
    Method("full, L2SP", BODY, 3e-5, near_the_start, ("digits",)),
    Method("full, distilled", BODY, 3e-5, near_the_features, ("digits",)),
]


class Cell:
    """One method with one seed: a trial for each of its rates."""

    def __init__(self, task: Task, method: Method, seed: int) -> None:
        self.task, self.method = task, method
        self.network = task.network(seed)
        self.trials = peftlib.Trials(self.network)
        self.batches = task.batches(seed)
        self.names = {f"rate-{at}": rate for at, rate in enumerate(method.rates(task))}
        for name, rate in self.names.items():
            self.trials.add(
                name,
                [*method.parts, ("head", peftlib.Full, {})],
                optimizer=lambda parameters, rate=rate: self.optimizer(parameters, rate),
                scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, self.slope),
                clip=1.0,
                seed=seed,
            )
        self.start = [p.detach().clone() for p in self.body("rate-0")] if method.term else []

    def body(self, name: str) -> list[nn.Parameter]:
        return [*peftlib.parameters(self.network.body, name)] if self.method.parts else []

    def optimizer(self, parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        of_head = {id(p) for p in self.network.head.parameters()}
        head = [p for p in parameters if id(p) in of_head]
        rest = [p for p in parameters if id(p) not in of_head]
        groups = [{"params": head, "lr": self.task.head_rate}, {"params": rest, "lr": rate}]
        return torch.optim.AdamW(groups if rest else [{"params": head, "lr": rate}], weight_decay=0.0, fused=True)

    def slope(self, step: int) -> float:
        """A warm-up, then a line down to zero."""
        return min((step + 1) / (0.1 * len(self.batches)), 1 - step / len(self.batches))

    def step(self, batch: Data, *names: str) -> None:
        """Of these trials, or of all that run."""
        given = dict.fromkeys(names or self.trials.running, batch.inputs)
        outputs = self.trials(given)
        base = cache(lambda: self.features_of_the_base(batch))
        self.trials.step({name: self.loss(name, x, y, batch, base) for name, (x, y) in outputs.items()})

    @torch.no_grad()
    def features_of_the_base(self, batch: Data) -> Tensor:
        return self.network(**batch.inputs)[0]  # outside of its calls no trial acts

    def loss(self, name: str, features: Tensor, logits: Tensor, batch: Data, base: Callable[[], Tensor]) -> Tensor:
        loss = cross_entropy(logits, batch.labels)
        term = self.method.term
        return loss if term is None else loss + term(self.body(name), self.start, features, base)

    def outputs(self, data: Data) -> dict[str, tuple[Tensor, Tensor]]:
        """Features and logits of all rows, by trial."""
        with self.trials.evaluate():
            parts = [self.trials(**batch.inputs) for batch in data.batches(64)]
        features, logits = ({name: torch.cat([part[name][at] for part in parts]) for name in parts[0]} for at in (0, 1))
        return {name: (features[name], logits[name]) for name in features}

    def results(self) -> dict[str, list[float]]:
        """By rate: accuracy and loss on the validation rows, accuracy on the test rows and on the old task."""
        validation, test, old = map(self.outputs, (self.task.validation, self.task.test, self.task.old))
        found = {}
        for name in self.trials.running:
            logits = validation[name][1]
            found[f"{self.names[name]:g}"] = [
                accuracy(logits, self.task.validation.labels),
                cross_entropy(logits, self.task.validation.labels).item(),
                accuracy(test[name][1], self.task.test.labels),
                self.task.old_hits(old[name][0]).mean().item(),
            ]
        return found


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).double().mean().item()


def run(task: Task, method: Method, seed: int) -> dict[str, Any]:
    began = time.perf_counter(), time.process_time()
    cell = Cell(task, method, seed)
    for batch in cell.batches:
        cell.step(batch)
    found: dict[str, Any] = {"rates": cell.results()}
    found["seconds"] = [round(time.perf_counter() - began[0], 2), round(time.process_time() - began[1], 2)]
    if seed == SEEDS[0]:
        found["trainable"] = sum(p.numel() for p in cell.trials["rate-0"].parameters)
        found["steps"] = step_times(cell)
    return found


def step_times(cell: Cell, rounds: int = 2) -> list[float]:
    """Least processor seconds of a step of all trials side by side, and of their steps one after another; in turn."""
    batch, times = cell.batches[0], [float("inf")] * 2
    running = cell.trials.running
    for _ in range(rounds):
        for at, groups in enumerate(([running], [[name] for name in running])):
            began = time.process_time()
            for names in groups:
                cell.step(batch, *names)
            times[at] = min(times[at], time.process_time() - began)
    return times


def kept() -> dict[str, Any]:
    return json.loads(KEPT.read_text()) if KEPT.exists() else {"machine": machine()}


def keep(found: dict[str, Any]) -> None:
    """A line a cell; an interruption loses none that is finished."""
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
    beside = KEPT.with_suffix(".writing")
    beside.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(beside, KEPT)


def machine() -> str:
    cpu = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpu.read_text()) if cpu.exists() else None
    return f"one thread of {model[1] if model else platform.processor()}, torch {torch.__version__}"


def key_of(task: str, method: Method, seed: int) -> str:
    return f"{task}: {method.name}, seed {seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    given = parser.parse_args()
    torch.set_num_threads(1)  # another number of threads sums in another order
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    methods = [method for method in METHODS if not given.only or method.name in given.only]
    cells = [
        (task, method, seed) for seed in given.seeds for task in TASKS for method in methods if task in method.tasks
    ]
    for task, method, seed in cells:
        key = key_of(task, method, seed)
        if key not in kept():
            found = run(TASKS[task](), method, seed)
            keep({**kept(), key: found})
            print(f"{key}, {found['seconds'][1]:.1f} s: {in_words(found)}", flush=True)


def in_words(found: dict[str, Any]) -> str:
    """By rate what validation says, and test, and the old task."""
    results = found["rates"].items()
    return "  ".join(f"{rate}: {100 * v:.1f} {100 * test:.1f} {100 * old:.1f}" for rate, (v, _, test, old) in results)


if __name__ == "__main__":
    main()

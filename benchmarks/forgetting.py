"""What fine-tuning takes from the encoder's old behaviour, by method: `python benchmarks/forgetting.py`."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ledger
import torch
from accuracy import EVERYTHING, HEAD, LORA, Prepare, full
from matplotlib.figure import Figure
from reviews import HEAD_RATE, Method, Plan, demo, group
from torch import Tensor, nn

import peftlib

Holds = Callable[[demo.Classifier, float, list[demo.Batch]], Callable[[], Tensor]]


def rate_of_full() -> float:
    rate = ledger.chosen(EVERYTHING)
    if rate is None:
        raise SystemExit(f"{EVERYTHING.name} comes first: the methods that hold it back take its rate.")
    return rate


def gradual(model: demo.Classifier, rate: float, training: list[demo.Batch]) -> Plan:
    """The head first, then one block more at a time; all of the model in the second half."""
    schedule = peftlib.schedules.linear(len(training) // 2)
    unfreezing = peftlib.GradualUnfreezing(peftlib.layer_groups(model), schedule)
    return replace(full(model, rate, training), after_step=unfreezing.step)


def discriminative(model: demo.Classifier, rate: float, training: list[demo.Batch]) -> Plan:
    """Each block at the rate of the one above it, divided by 2.6."""
    blocks = peftlib.layer_groups(model)[:-1]  # the head, above them, has the rate that it always has
    groups = peftlib.discriminative_lr(blocks, rate)
    return Plan([*groups, group(model.head.parameters(), HEAD_RATE)], model, training)


def held(hold: Holds) -> Prepare:
    """Full fine-tuning with a term that pulls the weights back to where they were."""

    def prepare(model: demo.Classifier, strength: float, training: list[demo.Batch]) -> Plan:
        term = hold(model, strength, training)
        plan = full(model, rate_of_full(), training)
        return replace(
            plan,
            groups=[{**each, "weight_decay": 0.0} for each in plan.groups],
            loss=lambda inputs, labels: nn.functional.cross_entropy(model(**inputs), labels) + term(),
        )

    return prepare


def l2sp(model: demo.Classifier, strength: float, training: list[demo.Batch]) -> Callable[[], Tensor]:
    return peftlib.L2SP(model.encoder, alpha=strength)


def ewc(model: demo.Classifier, strength: float, training: list[demo.Batch]) -> Callable[[], Tensor]:
    """Of the sentences that train, 128 one by one; other text of the old task is not to be had."""
    sentences = [({key: tensor[:1] for key, tensor in inputs.items()}, labels[:1]) for inputs, labels in training]
    return peftlib.EWC(model, sentences, surprise, strength, targets="encoder")


def surprise(model: demo.Classifier, batch: demo.Batch) -> Tensor:
    """-log p(y|x), where what the encoder says is the mean of a normal distribution, and y is drawn from it."""
    mean = spread(model.embed(**batch[0]))
    drawn = (mean + torch.randn_like(mean)).detach()
    return (drawn - mean).square().sum(1) / 2


def spread(vectors: Tensor) -> Tensor:
    """Embeddings without their length, which no similarity sees, and coordinates of about one."""
    return nn.functional.normalize(vectors) * vectors.shape[1] ** 0.5


class Embedding(nn.Module):
    """The model without its head, which is new and has no old behaviour."""

    def __init__(self, model: demo.Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.embed(input_ids, attention_mask)


def distilled(model: demo.Classifier, strength: float, training: list[demo.Batch]) -> Plan:
    """The whole encoder is one adapter, so its base is one switch away."""
    peftlib.inject(model, lambda name, module: module is model.encoder, peftlib.Full)
    embedding = Embedding(model)

    def loss(inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        texts = inputs["input_ids"], inputs["attention_mask"]
        vectors = embedding(*texts)
        divergence = peftlib.distill(embedding, vectors, *texts, output=spread, temperature=1.0)
        return nn.functional.cross_entropy(model.head(vectors), labels) + strength * divergence

    groups = [group(peftlib.parameters(model), rate_of_full()), group(model.head.parameters(), HEAD_RATE)]
    model.head.requires_grad_(True)
    return Plan(groups, model, training, loss=loss)


def strongest(results: dict[float, dict[str, Any]]) -> float:
    """That costs no more than one standard error of full fine-tuning's accuracy on the validation sentences."""
    most = ledger.grid(EVERYTHING)[rate_of_full()]["validation"]
    floor = most - (most * (1 - most) / 1012) ** 0.5
    return max((value for value in results if results[value]["validation"] >= floor), default=min(results))


GRADUAL = Method("gradual unfreezing", (1e-4, 3e-4), gradual)
DISCRIMINATIVE = Method("discriminative rates", (2e-4, 6e-4), discriminative)
L2SP = Method("L2SP", (0.1, 1.0), held(l2sp), "strength", strongest)
EWC = Method("EWC", (1.0, 10.0, 100.0), held(ewc), "strength", strongest)
DISTILL = Method("distill", (0.1, 1.0, 10.0), distilled, "strength", strongest)
METHODS = [HEAD, EVERYTHING, GRADUAL, DISCRIMINATIVE, L2SP, EWC, DISTILL, LORA]
NAMES = [method.name for method in METHODS]
HEADER = ["", "test accuracy", "of the seeds", "cosine to before", "of the seeds", "order kept", "chosen"]


def table() -> str:
    rows = [ledger.row(HEADER), ledger.row(["---"] * len(HEADER))]
    for method in METHODS:
        if runs := ledger.results(method):
            cells = [method.name, ledger.percent(ledger.right(method)), ledger.each(runs, "test")]
            cells += [f"{mean(runs, 'cosine'):.3f}", ", ".join(f"{run['cosine']:.3f}" for run in runs)]
            rows.append(
                ledger.row([*cells, f"{mean(runs, 'order'):.3f}", f"{method.quantity} {ledger.chosen(method):g}"])
            )
    return "\n".join(rows)


def mean(runs: list[dict[str, Any]], key: str) -> float:
    return sum(run[key] for run in runs) / len(runs)


def picture() -> Figure:
    """What is kept against what is learned: small dots for the values that were tried, large for the chosen one."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for at, method in enumerate(METHODS):
        runs, color = ledger.results(method), f"C{at}"
        tried = [(run["test"], run["cosine"]) for run in ledger.grid(method).values()]
        if runs:
            axes.plot(*zip(*tried, strict=True), "o:", markersize=4, color=color, alpha=0.5)
            axes.scatter([mean(runs, "test")], [mean(runs, "cosine")], s=80, color=color, label=method.name)
    axes.set(xlabel="new task: accuracy on the test sentences", ylabel="old behaviour: cosine to what it was")
    axes.legend(frameon=False)
    return ledger.plain(figure)


def main() -> None:
    options = ledger.options(__doc__)
    ledger.finish([method for method in METHODS if method.name in (options.only or NAMES)], options.seconds)
    ledger.publish("forgetting", table(), picture())


if __name__ == "__main__":
    main()

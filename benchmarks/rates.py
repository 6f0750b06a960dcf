"""Which rate for which rank: a grid of both under each scale of LoRA, beside full copies, all trained side by side.

A network of residual blocks is pretrained to imitate a teacher, and tuned to imitate another, whose weights are the
first one's moved at random in every direction: a change of full rank, from data without end. What is compared is the
divergence from the second teacher on 2,000 inputs that nothing trained on.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

import peftlib

ROOT = Path(__file__).parents[1]
KEPT, PAGE = ROOT / "benchmarks" / "results" / "rates.json", ROOT / "docs" / "rates.md"
WIDTH, CLASSES, STEPS, ROWS = 64, 10, 400, 32
SEEDS = (0, 1, 2)
RANKS = (2, 4, 8, 16, 32, 64)
RATES = tuple(1e-4 * 2**power for power in range(9))
LINEARS = ["blocks.*.1", "blocks.*.3"]
SCALES = {"LoRA, α/r": {"rank_stabilized": False}, "LoRA, α/√r": {"rank_stabilized": True}}


class Network(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(depth)
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def divergence(logits: Tensor, teacher: nn.Module, x: Tensor) -> Tensor:
    return F.kl_div(logits.log_softmax(-1), teacher(x).softmax(-1), reduction="batchmean")


@torch.no_grad()
def teachers(seed: int) -> tuple[Network, Network]:
    torch.manual_seed(seed)
    first = Network().requires_grad_(False)
    for parameter in first.parameters():
        parameter *= 1.5
    second = copy.deepcopy(first)
    for parameter in second.parameters():
        if parameter.dim() == 2:
            parameter += 0.5 * parameter.std() * torch.randn_like(parameter)
    return first, second


def pretrained(teacher: nn.Module, steps: int = 600) -> Network:
    model = Network()
    optimizer = AdamW(model.parameters(), lr=2e-3)
    schedule = CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = torch.randn(128, WIDTH)
        optimizer.zero_grad()
        divergence(model(x), teacher, x).backward()
        optimizer.step()
        schedule.step()
    return model


def rows_of_the_table(ranks: tuple[int, ...] = RANKS) -> list[tuple[str, int | None, type[peftlib.Adapter], dict]]:
    low_rank = [
        (scale, rank, peftlib.LoRA, {"rank": rank, **options}) for scale, options in SCALES.items() for rank in ranks
    ]
    return [*low_rank, ("full copies", None, peftlib.Full, {})]


def run(seed: int, steps: int = STEPS, ranks: tuple[int, ...] = RANKS) -> dict[str, list[float]]:
    """For each row of the table the divergence at each rate."""
    first, second = teachers(seed)
    model = pretrained(first)
    trials = peftlib.Trials(model)
    rows = rows_of_the_table(ranks)
    for row, (_, _, kind, options) in enumerate(rows):
        for column, rate in enumerate(RATES):
            trials.add(
                f"{row}-{column}",
                (LINEARS, kind, options),
                optimizer=lambda parameters, rate=rate: AdamW(parameters, lr=rate, weight_decay=0.0),
                scheduler=lambda optimizer: CosineAnnealingLR(optimizer, steps),
                seed=seed,
            )
    for _ in range(steps):
        x = torch.randn(ROWS, WIDTH)
        trials.step({name: divergence(logits, second, x) for name, logits in trials(x).items()})
    x = torch.randn(2000, WIDTH)
    with trials.evaluate():
        found = {name: divergence(logits, second, x).item() for name, logits in trials(x).items()}
    return {
        label(name, rank): [found[f"{row}-{column}"] for column in range(len(RATES))]
        for row, (name, rank, _, _) in enumerate(rows)
    }


def label(name: str, rank: int | None) -> str:
    return name if rank is None else f"{name}, rank {rank}"


def best(values: list[float]) -> float:
    return RATES[min(range(len(values)), key=values.__getitem__)]


def table(runs: list[dict[str, list[float]]]) -> str:
    """The mean over seeds; the best of each row is bold, and its own column says the best rate of each seed."""
    head = ["", *(f"{rate:.1e}" for rate in RATES), "best, by seed"]
    lines = [head, ["---"] * len(head)]
    for name in runs[0]:
        means = [math.fsum(run[name][column] for run in runs) / len(runs) for column in range(len(RATES))]
        cells = [f"**{mean:.3f}**" if mean == min(means) else f"{mean:.3f}" for mean in means]
        lines.append([name, *cells, ", ".join(f"{best(run[name]):.1e}" for run in runs)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    torch.set_num_threads(1)
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for seed in SEEDS:
        if str(seed) not in kept:
            kept[str(seed)] = run(seed)
            KEPT.write_text(json.dumps(kept, indent=1) + "\n")
            print(f"seed {seed} is done", flush=True)
    before, mark, rest = PAGE.read_text().partition("<!-- table -->\n")
    _, end, after = rest.partition("<!-- end of table -->")
    PAGE.write_text(f"{before}{mark}{table([kept[str(seed)] for seed in SEEDS])}\n{end}{after}")


if __name__ == "__main__":
    main()

"""A training step: forward and backward through transformer blocks, LoRA on all seven projections"""

from collections.abc import Callable

import pytest
import torch
from models import contenders
from torch import nn

TESTS = "tests/kernels/test_kernels_lora.py"
# width, tokens, blocks, rank: the two shapes that decide (one bound by arithmetic, one by Python), and what lies around
SHAPES = [
    (128, 16, 4, 8),
    (128, 128, 4, 8),
    (256, 256, 4, 8),
    (512, 512, 4, 4),
    (512, 512, 4, 8),
    (512, 512, 4, 64),
    (1024, 512, 1, 8),
]


def step(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]

    def run() -> None:
        torch.autograd.grad(model(x).sum(), leaves)

    return run


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("width", "tokens", "depth", "rank"), SHAPES)
def bench_step(contest, width: int, tokens: int, depth: int, rank: int, dropout: float) -> None:
    x = torch.randn(1, tokens, width, requires_grad=True)
    runs = {name: step(model, x) for name, model in contenders(width, depth, rank, dropout).items()}
    contest(f"step d={width} tokens={tokens} r={rank} p={dropout}", runs, tests=TESTS)

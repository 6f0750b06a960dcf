"""Inference: one token through transformer blocks, LoRA live on all seven projections, no gradient"""

from collections.abc import Callable

import pytest
import torch
from bare import NAME, with_bare
from models import blocks, contenders
from torch import nn

TESTS = "tests/kernels/test_kernels_lora.py"


def infer(model: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with torch.no_grad():
            return model(x)

    return run


@pytest.mark.parametrize(("width", "tokens", "rank"), [(128, 1, 8), (512, 1, 8), (512, 128, 8)])
def bench_inference(contest, width: int, tokens: int, rank: int) -> None:
    x = torch.randn(1, tokens, width)
    models = contenders(width, 4, rank, 0.0, training=False)
    models.pop("loralib")  # it merges in eval mode: its live form cannot be asked for
    if tokens == 1:
        models[NAME] = with_bare(blocks(width, 4), rank, 0.0)
    runs = {name: infer(model, x) for name, model in models.items()}
    contest(f"inference d={width} tokens={tokens} r={rank}", runs, tests=TESTS)

"""A layer: one adapted linear, forward and backward"""

import pytest
import torch
from bench_step import TESTS, step
from models import PEERS, with_peftlib
from torch import nn


def _linear(inputs: int, outputs: int) -> nn.Sequential:
    """One linear, under a name that the peers target."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("q", nn.Linear(inputs, outputs, bias=False))
    return model.requires_grad_(False)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"), [(16, 128, 128), (512, 512, 512), (512, 512, 2048), (512, 2048, 512)]
)
def bench_layer(contest, tokens: int, inputs: int, outputs: int, dropout: float) -> None:
    x = torch.randn(tokens, inputs, requires_grad=True)
    models = {"base": _linear(inputs, outputs), "peftlib": with_peftlib(_linear(inputs, outputs), 8, dropout)}
    models |= {name: put_in(_linear(inputs, outputs), 8, dropout) for name, put_in in PEERS.items()}
    runs = {name: step(model, x) for name, model in models.items()}
    contest(f"layer {tokens}x{inputs}->{outputs} r=8 p={dropout}", runs, tests=TESTS)

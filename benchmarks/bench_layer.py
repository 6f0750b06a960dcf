"""A layer: one adapted linear or convolution, forward and backward"""

import pytest
import torch
from bare import NAME, with_bare
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
    models = {"base": _linear(inputs, outputs), "peftlib": with_peftlib(_linear(inputs, outputs), 8, dropout, ["q"])}
    models |= {name: put_in(_linear(inputs, outputs), 8, dropout) for name, put_in in PEERS.items()}
    if tokens == 16:
        models[NAME] = with_bare(_linear(inputs, outputs), 8, dropout)
    runs = {name: step(model, x) for name, model in models.items()}
    contest(f"layer {tokens}x{inputs}->{outputs} r=8 p={dropout}", runs, tests=TESTS)


def _convolution(channels: int) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("q", nn.Conv2d(channels, channels, 3, padding=1, bias=False))
    return model.requires_grad_(False)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def bench_convolution(contest, dropout: float) -> None:
    x = torch.randn(8, 64, 28, 28, requires_grad=True)
    models = {"base": _convolution(64), "peftlib": with_peftlib(_convolution(64), 8, dropout, ["q"])}
    models["HF peft"] = PEERS["HF peft"](_convolution(64), 8, dropout)
    runs = {name: step(model, x) for name, model in models.items()}
    contest(
        f"layer 3x3 convolution, 64 channels, 8x28x28, r=8 p={dropout}",
        runs,
        tests="tests/kernels/test_kernels_convolution.py tests/kernels/test_kernels_dropped.py",
    )

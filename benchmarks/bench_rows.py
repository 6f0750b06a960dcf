"""Rows: eight adapters on one base in one pass, forward and backward, and one token each without gradients"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import PROJECTIONS, blocks
from torch import Tensor, nn

import peftlib

TESTS = "tests/core/test_rows.py tests/kernels/test_kernels_rows.py"
OF_TYPES = "tests/kinds/test_row_parameters.py tests/kinds/test_bottleneck_rows.py"
RANK, DEPTH = 8, 4
Run = Callable[[], Any]


def adapted(width: int, adapters: int) -> nn.Module:
    """Blocks with this many adapters on all seven projections, no factor zero."""
    model = blocks(width, DEPTH)
    for at in range(adapters):
        peftlib.inject(model, PROJECTIONS, peftlib.LoRA, rank=RANK, alpha=RANK, name=f"a{at}")
    for *_, adapter in peftlib.adapters(model):
        nn.init.normal_(adapter.get_parameter("lora_B"), std=0.02)
    return model


def with_peft(width: int, adapters: int) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=PROJECTIONS, init_lora_weights=False)
    model: Any = peft.get_peft_model(blocks(width, DEPTH), config, adapter_name="a0")  # pyright: ignore[reportArgumentType]
    for at in range(1, adapters):
        model.add_adapter(f"a{at}", config)
    return model.eval()


def contenders(width: int, adapters: int, tokens: int, training: bool, shuffled: bool = False) -> dict[str, Run]:
    """All rows through their own adapters: in one pass, or adapter after adapter; and the base, and one adapter."""
    model = adapted(width, adapters)
    x = torch.randn(adapters, tokens, width)
    order = torch.randperm(adapters).tolist() if shuffled else range(adapters)
    views = [peftlib.view(model, f"a{at}") for at in order]
    routed, one = peftlib.view(model), peftlib.view(model, "a0")
    peftlib.route(routed, [f"a{at}" for at in order])
    run = _step(list(peftlib.parameters(model))) if training else _infer
    base = copy.deepcopy(blocks(width, DEPTH))
    return {
        "base": lambda: run(base, x),
        "one adapter on all rows": lambda: run(one, x),
        "one after another": lambda: [run(view, row) for view, row in zip(views, x.split(1), strict=True)],
        "peftlib": lambda: run(routed, x),
    }


def _step(parameters: list[nn.Parameter]) -> Callable[[nn.Module, Tensor], None]:
    def run(model: nn.Module, x: Tensor) -> None:
        model(x.clone().requires_grad_(True)).square().mean().backward()
        for parameter in parameters:
            parameter.grad = None

    return run


@torch.no_grad()
def _infer(model: nn.Module, x: Tensor) -> None:
    model(x)


def serving(width: int, rows: int) -> dict[str, Run]:
    """As many rows as adapters, one token each, beside HF peft's batch of mixed adapters."""
    runs = contenders(width, rows, 1, training=False)
    peers, x, names = with_peft(width, rows), torch.randn(rows, 1, width), [f"a{at}" for at in range(rows)]

    def mixed() -> None:
        with torch.no_grad():
            peers(x, adapter_names=names)

    return {**runs, "HF peft": mixed}


@pytest.mark.parametrize(("tokens", "width"), [(16, 128), (32, 256), (48, 384), (128, 512), (512, 512)])
def bench_training(contest, tokens: int, width: int) -> None:
    contest(f"8 adapters, {tokens} tokens each, d={width}", contenders(width, 8, tokens, True), tests=TESTS)


def of_one_module(make: Callable[[], nn.Module], kind: Any, config: dict[str, Any], tokens: int) -> dict[str, Run]:
    """Eight adapters of another type on one module, all parameters of the adapters learn."""
    model = nn.Sequential(make())
    for at in range(8):
        peftlib.inject(model, "0", kind, name=f"a{at}", **config)
        peftlib.activate(model)  # copies of one weight cannot act together
    run = _step(list(peftlib.parameters(model)))
    for parameter in peftlib.parameters(model):
        parameter.requires_grad_()
    x, views = torch.randn(8, tokens, 128), [peftlib.view(model, f"a{at}") for at in range(8)]
    routed, one = peftlib.view(model), peftlib.view(model, "a0")
    peftlib.route(routed, [f"a{at}" for at in range(8)])
    return {
        "one adapter on all rows": lambda: run(one, x),
        "one after another": lambda: [run(view, row) for view, row in zip(views, x.split(1), strict=True)],
        "peftlib": lambda: run(routed, x),
    }


TYPES: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any]]] = {
    "IA3, Linear": (lambda: nn.Linear(128, 128), peftlib.IA3, {}),
    "Full, bias of a Linear": (lambda: nn.Linear(128, 128), peftlib.Full, {"params": "bias"}),
    "Full, LayerNorm": (lambda: nn.LayerNorm(128), peftlib.Full, {}),
    "Bottleneck of width 8, Linear": (lambda: nn.Linear(128, 128), peftlib.Bottleneck, {"width": 8}),
}


@pytest.mark.parametrize("name", TYPES)
def bench_types(contest, name: str) -> None:
    contest(f"{name}: 8 adapters, 16 tokens each, d=128", of_one_module(*TYPES[name], 16), tests=OF_TYPES)


@pytest.mark.parametrize("width", [128, 512])
def bench_one_token(contest, width: int) -> None:
    contest(f"8 adapters, one token each, d={width}", contenders(width, 8, 1, False), tests=TESTS)


@pytest.mark.parametrize("width", [128, 512])
def bench_serving(contest, width: int) -> None:
    contest(f"16 rows through 16 adapters, one token each, d={width}", serving(width, 16), tests=TESTS)

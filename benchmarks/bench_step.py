"""A training step: forward and backward through transformer blocks, LoRA on all seven projections"""

from collections.abc import Callable, Iterator

import pytest
import torch
from bare import NAME, with_bare
from models import blocks, contenders
from torch import nn

from peftlib.kernels.lora.aten import gemm_dtype

TESTS = "tests/kernels/test_kernels_lora.py"
# width, tokens, blocks, rank: the two shapes that decide (one bound by arithmetic, one by Python), and what lies around
SHAPES = [
    (128, 16, 4, 8),
    (128, 128, 4, 8),
    (256, 256, 4, 8),
    (512, 512, 2, 4),
    (512, 512, 2, 8),
    (512, 512, 2, 64),
    (1024, 512, 1, 8),
]
# The two that decide, at each dropout, for what is asked in other ways than above; beside HF peft alone.
DECIDING = [(128, 16, 4), (512, 512, 1)]


def step(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]

    def run() -> None:
        torch.autograd.grad(model(x).sum(), leaves)

    return run


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("width", "tokens", "depth", "rank"), SHAPES)
def bench_step(contest, width: int, tokens: int, depth: int, rank: int, dropout: float) -> None:
    x = torch.randn(1, tokens, width, requires_grad=True)
    models = contenders(width, depth, rank, dropout)
    if tokens == 16:
        models[NAME] = with_bare(blocks(width, depth), rank, dropout)
    runs = {name: step(model, x) for name, model in models.items()}
    contest(f"step d={width} tokens={tokens} r={rank} p={dropout}", runs, tests=TESTS)


def train(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """As a user's loop: gradients are accumulated into `.grad`, and the base has nothing to train."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6) if trained else None

    def run() -> None:
        model(x).sum().backward()
        x.grad = None
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("width", "tokens", "depth"), DECIDING)
def bench_training(contest, width: int, tokens: int, depth: int, dropout: float) -> None:
    x = torch.randn(1, tokens, width, requires_grad=True)
    runs = {name: train(model, x) for name, model in contenders(width, depth, 8, dropout, peers=["HF peft"]).items()}
    contest(f"step with AdamW d={width} tokens={tokens} r=8 p={dropout}", runs, tests=TESTS)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("width", "tokens", "depth"), DECIDING)
def bench_two_threads(contest, two_threads: None, width: int, tokens: int, depth: int, dropout: float) -> None:
    x = torch.randn(1, tokens, width, requires_grad=True)
    runs = {name: step(model, x) for name, model in contenders(width, depth, 8, dropout, peers=["HF peft"]).items()}
    contest(f"step, two threads, d={width} tokens={tokens} r=8 p={dropout}", runs, tests=TESTS)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def bench_half(contest, dropout: float) -> None:
    """The width of SmolLM2-135M, in bfloat16."""
    x = torch.randn(1, 512, 576, dtype=torch.bfloat16, requires_grad=True)
    models = contenders(576, 1, 8, dropout, dtype=x.dtype, peers=["HF peft"])
    runs = {name: step(model, x) for name, model in models.items()}
    units = "with" if gemm_dtype(x) == x.dtype else "without"
    contest(
        f"step in bfloat16 d=576 tokens=512 r=8 p={dropout}", runs, tests=TESTS, note=f"a CPU {units} bfloat16 units"
    )


class _Whole(nn.Module):
    """One graph: of a Sequential torch compiles each child by itself, and of HF peft's model around it the whole."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.compile()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


@pytest.mark.parametrize(("width", "tokens", "depth"), DECIDING)
def bench_compiled(contest, width: int, tokens: int, depth: int) -> None:
    """Warm: the first call of each, which compiles, is not timed."""
    x = torch.randn(1, tokens, width, requires_grad=True)
    models = contenders(width, depth, 8, 0.0, peers=["HF peft"])
    models[NAME] = with_bare(blocks(width, depth), 8, 0.0)
    runs = {name: step(_Whole(model), x) for name, model in models.items()}
    contest(f"step, compiled, d={width} tokens={tokens} r=8 p=0.0", runs, tests=TESTS)

"""What the tests of HF peft's files share: small models, and a step that training would take."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

CLOSE = 1e-6


class Around(nn.Module):
    """A layer with a name, and a head that may be adapted beside it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(3, 2)

    def forward(self, *args: Any) -> Any:
        y = self.layer(*args)
        return y[0] if isinstance(y, tuple) else y


class Net(nn.Module):
    """Blocks with numbers, names inside them that repeat, an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(9, 6)
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}) for _ in range(3))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = x + layer["down"](torch.tanh(layer["up"](x)))
        return self.head(self.norm(x))


class Experts(nn.Module):
    """Stacks [experts, out, in], or [experts, in, out] as `is_transposed` says, a matrix, and a layer inside."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        shapes = ((3, 4, 6), (3, 6, 4)) if is_transposed else ((3, 6, 4), (3, 4, 6))
        self.up, self.down = (nn.Parameter(torch.randn(shape) / 2) for shape in shapes)
        self.gate = nn.Parameter(torch.randn(3, 4) / 2)
        self.shared = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        up, down = (w.mT if self.is_transposed else w for w in (self.up, self.down))
        shares = (x @ self.gate.T).softmax(-1)
        hidden = torch.tanh(torch.einsum("ti,eoi->teo", x, up))
        return torch.einsum("te,teh,eoh->to", shares, hidden, down) + self.shared(x)


@torch.no_grad()
def shifted(parameters: Any) -> None:
    torch.manual_seed(3)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape) * 0.3)


def quiet() -> Any:
    """peft warns of much that is its own: of missing model cards, of biases, of weights that are tied."""
    return warnings.catch_warnings(action="ignore")


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= CLOSE * max(1, expected.abs().max())

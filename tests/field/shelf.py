"""A shelf of small nets written by hand, each with a habit that adapters may meet in a user's model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

modules: Any = nn.ModuleList


class InPlace(nn.Module):
    """Activations and sums in place, behind linears of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.LeakyReLU(inplace=True))
        self.skip, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.skip(x)
        y += self.body(x)
        y[:, 0] = 0.5
        return self.head(y.transpose_(1, 2).transpose_(1, 2))


class Shared(nn.Module):
    """One layer under two names, called three times, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.second, self.head = self.first, nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for _ in range(2):
            x = torch.tanh(self.first(x))
        return self.head(self.second(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.cell = nn.GRU(6, 5, num_layers=2, bidirectional=True, batch_first=True), nn.LSTMCell(10, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        state = None
        for step in y.unbind(1):
            state = self.cell(step, state)
        assert state is not None
        return self.head(state[0])


class Functional(nn.Module):
    """Reads its children's weights, and calls none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.conv, self.embedding = nn.Linear(6, 8), nn.Conv1d(8, 8, 3, padding=1), nn.Embedding(4, 8)
        self.scale, self.called = nn.Parameter(torch.ones(8, 8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.inner.weight, self.inner.bias)
        y = F.conv1d(y.transpose(1, 2), self.conv.weight, self.conv.bias, padding=1).transpose(1, 2)
        y = y + self.embedding.weight.mean(0)
        return self.called(torch.matmul(y, self.scale))


class Parametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.orthogonal = parametrizations.orthogonal(nn.Linear(6, 6))
        self.normed = parametrizations.weight_norm(nn.Linear(6, 6))
        self.spectral = parametrizations.spectral_norm(nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.spectral(torch.tanh(self.normed(torch.tanh(self.orthogonal(x)))))


class Hooked(nn.Module):
    """Norms of weights that a hook computes before each forward, as old code has them."""

    def __init__(self) -> None:
        super().__init__()
        self.normed, self.spectral = weight_norm(nn.Linear(6, 6)), spectral_norm(nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.spectral(torch.tanh(self.normed(x)))


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.relu(y)


def _resnet() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    return nn.Sequential(
        stem, ResidualBlock(8), ResidualBlock(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


class Policy(nn.Module):
    """A recurrent policy: the state of an episode lies in buffers from call to call, so do statistics of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.action, self.value = nn.LSTMCell(6, 8), nn.Linear(8, 3), nn.Linear(8, 1)
        self.deviation = nn.Parameter(torch.zeros(3))
        self.register_buffer("hidden", torch.zeros(2, 8))
        self.register_buffer("memory", torch.zeros(2, 8))
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("seen", torch.tensor(1.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.training:
            self.seen += 1
            self.mean = self.mean + (x.detach().mean((0, 1)) - self.mean) / self.seen
        outputs, (hidden, memory) = [], (self.hidden.clone(), self.memory.clone())
        for step in (x - self.mean).unbind(1):
            hidden, memory = self.cell(step, (hidden, memory))
            outputs.append(hidden)
        self.hidden.copy_(hidden.detach())
        self.memory.copy_(memory.detach())
        y = torch.stack(outputs, 1)
        return self.action(y), self.value(y), self.deviation.exp()


class Codebook(nn.Module):
    """Vector quantisation whose codes follow a moving average of what falls to them, in training."""

    def __init__(self, codes: int = 8, width: int = 6) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, width), nn.Linear(width, 6)
        self.register_buffer("codes", torch.randn(codes, width))
        self.register_buffer("counts", torch.ones(codes))

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        index = torch.cdist(z, self.codes.expand(len(z), -1, -1)).argmin(-1)
        quantised = self.codes[index]
        if self.training:
            with torch.no_grad():
                chosen = F.one_hot(index.flatten(), len(self.codes)).to(z.dtype)
                self.counts.mul_(0.9).add_(chosen.sum(0), alpha=0.1)
                means = chosen.T @ z.flatten(0, 1) / chosen.sum(0).clamp_min(1)[:, None]
                self.codes.mul_(0.9).add_(means, alpha=0.1)
        return self.decoder(z + (quantised - z).detach())


class DenseBlock(nn.ModuleDict):
    """As DenseNet's: a container that is called, and goes through its own items."""

    def __init__(self) -> None:
        super().__init__({f"layer{i}": nn.Conv2d(4 + 2 * i, 2, 3, padding=1) for i in range(3)})

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for _, layer in self.items():
            features.append(F.relu(layer(torch.cat(features, 1))))
        return torch.cat(features, 1)


class Indexed(nn.Sequential):
    """A Sequential that is indexed, sliced and counted by its own forward."""

    def forward(self, input: Tensor) -> Tensor:
        for layer in self[:-1]:
            input = F.gelu(layer(input))
        return self[-1](input) / len(self)


class Sliced(nn.Module):
    """A ModuleList of which forward takes slices, from the end too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = modules(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.layers[:2], *self.layers[-2:]]:
            x = x + torch.tanh(layer(x))
        return x


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 8, 4, stride=2, padding=1)
        self.norm, self.up = nn.InstanceNorm2d(8, affine=True), nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1)
        self.leave = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = F.relu(self.enter(x), inplace=True)
        low = F.silu(self.norm(self.down(high)), inplace=True)
        return self.leave(torch.cat([high, self.up(low)], 1))


class Graph(nn.Module):
    """Messages along edges, added up at the nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update, self.head = nn.Linear(12, 6), nn.GRUCell(6, 6), nn.Linear(6, 2)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        for _ in range(2):
            sent = self.message(torch.cat([nodes[edges[0]], nodes[edges[1]]], -1)).relu_()
            nodes = self.update(torch.zeros_like(nodes).index_add_(0, edges[1], sent), nodes)
        return self.head(nodes)


class Complex(nn.Module):
    """A linear over complex numbers, and a spectral filter as a raw parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(5, 5, dtype=torch.complex64)
        self.filter, self.head = nn.Parameter(torch.randn(8, 5, dtype=torch.complex64)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.fft(x, dim=1) * self.filter
        return self.head(torch.fft.ifft(self.mix(spectrum), dim=1).real)


class Attentive(nn.Module):
    """torch's own attention, of which forward also returns the weights; a mask; another dtype inside."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.1)
        self.encoder, self.attention = nn.TransformerEncoder(layer, 2), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.encoder(x)
        return self.attention(y, y, y)


class Bagged(nn.Module):
    """Embeddings in bags, with a padding index and a bound on norms, and a bilinear form."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.embedding = nn.EmbeddingBag(11, 6), nn.Embedding(11, 6, padding_idx=0, max_norm=2.0)
        self.bilinear = nn.Bilinear(6, 6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.bilinear(self.bag(tokens), self.embedding(tokens).mean(1))


def _net(make: Callable[[], nn.Module], **given: Callable[[], Any]) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
    return lambda: (make(), {key: value() for key, value in given.items()})


def _tensor(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def _tokens() -> Tensor:
    return torch.arange(10).view(2, 5)


def _dense() -> nn.Module:
    return nn.Sequential(DenseBlock(), nn.BatchNorm2d(10), nn.Conv2d(10, 3, 1))


def _indexed() -> nn.Module:
    return nn.Sequential(Indexed(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)), nn.LayerNorm(6))


NETS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "in-place": _net(InPlace, x=_tensor(2, 5, 6)),
    "shared": _net(Shared, tokens=_tokens),
    "recurrent": _net(Recurrent, x=_tensor(2, 5, 6)),
    "functional": _net(Functional, x=_tensor(2, 5, 6)),
    "parametrized": _net(Parametrized, x=_tensor(4, 6)),
    "hooked": _net(Hooked, x=_tensor(4, 6)),
    "resnet": _net(_resnet, input=_tensor(4, 3, 8, 8)),
    "policy": _net(Policy, x=_tensor(2, 4, 6)),
    "codebook": _net(Codebook, x=_tensor(2, 5, 6)),
    "dense block": _net(_dense, input=_tensor(2, 4, 6, 6)),
    "indexed": _net(_indexed, input=_tensor(4, 6)),
    "sliced": _net(Sliced, x=_tensor(4, 6)),
    "u-net": _net(UNet, x=_tensor(2, 2, 8, 8)),
    "graph": _net(Graph, nodes=_tensor(5, 6), edges=lambda: torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])),
    "complex": _net(Complex, x=_tensor(2, 8, 5)),
    "attention": _net(Attentive, x=_tensor(2, 5, 8)),
    "bags": _net(Bagged, tokens=_tokens),
}

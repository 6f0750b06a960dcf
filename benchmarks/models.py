"""The model of the benchmarks, and the same adapters put into it by peftlib and by its peers."""

import copy
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftlib

PROJECTIONS = ["q", "k", "v", "o", "gate", "up", "down"]


class Block(nn.Module):
    """A pre-norm transformer block, gated feed-forward four times as wide as the model."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_feed_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, 4 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.before_attention(x)
        q, k, v = (self._split(project(normed)) for project in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        normed = self.before_feed_forward(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [batch, heads, tokens, width of a head]


def blocks(width: int, depth: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width, max(1, width // 64)) for _ in range(depth))).requires_grad_(False)


def with_peftlib(model: nn.Module, rank: int, dropout: float, targets: list[str] = PROJECTIONS) -> nn.Module:
    peftlib.inject(model, targets, peftlib.LoRA, rank=rank, alpha=rank, dropout=dropout)
    return model


def with_peft(model: nn.Module, rank: int, dropout: float) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=PROJECTIONS)
    return peft.get_peft_model(model, config)  # pyright: ignore[reportArgumentType]


def with_loralib(model: nn.Module, rank: int, dropout: float) -> nn.Module:
    import loralib

    for parent in [*model.modules()]:
        for name, child in [*parent.named_children()]:
            if isinstance(child, nn.Linear) and name in PROJECTIONS:
                twin: Any = loralib.Linear(
                    child.in_features, child.out_features, r=rank, lora_alpha=rank, lora_dropout=dropout, bias=False
                )
                twin.weight.data.copy_(child.weight.data)
                setattr(parent, name, twin)
    return model


def with_lycoris(model: nn.Module, rank: int, dropout: float) -> nn.Module:
    from lycoris import LycorisNetwork, create_lycoris

    logging.getLogger("LyCORIS").setLevel(logging.WARNING)
    LycorisNetwork.apply_preset({"enable_conv": False, "target_module": ["Linear"], "target_name": []})
    network = create_lycoris(model, 1.0, linear_dim=rank, linear_alpha=rank, algo="lora", dropout=dropout)
    network.apply_to()
    return _Beside(model, network)


class _Beside(nn.Module):
    """LyCORIS keeps its factors in a network of its own, outside the model."""

    def __init__(self, model: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.model, self.network = model, network

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


PEERS: dict[str, Callable[[nn.Module, int, float], nn.Module]] = {
    "HF peft": with_peft,
    "LyCORIS": with_lycoris,
    "loralib": with_loralib,
}


def contenders(
    width: int,
    depth: int,
    rank: int,
    dropout: float,
    *,
    training: bool = True,
    dtype: torch.dtype = torch.float32,
    peers: Iterable[str] = tuple(PEERS),
) -> dict[str, nn.Module]:
    """The frozen base, peftlib, and each peer, over the same weights, no factor zero."""
    base = blocks(width, depth).to(dtype)
    made = {"base": copy.deepcopy(base), "peftlib": with_peftlib(copy.deepcopy(base), rank, dropout)}
    made |= {name: PEERS[name](copy.deepcopy(base), rank, dropout) for name in peers}
    for model in made.values():
        model.train(training)
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return made

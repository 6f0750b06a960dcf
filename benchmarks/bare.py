"""The least that LoRA of a linear layer takes: its products and its mask, and nothing beside them.

No other dtype, no bias, no second derivative, no hooks, no other adapter: what peftlib takes above it, it looks up.
"""

from typing import Any

import torch
from models import PROJECTIONS
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from peftlib.kernels.dropout import draw_small, survivors_scale

NAME = "its products alone"


def with_bare(model: nn.Module, rank: int, dropout: float) -> nn.Module:
    """Puts factors beside the weights, and the products into the layers."""
    for name, layer in model.named_modules():
        if name.rpartition(".")[-1] in PROJECTIONS and isinstance(layer, nn.Linear):
            layer.A, layer.B = factors(layer, rank)
            nn.init.normal_(layer.B, std=0.02)
            layer.__class__ = _Bare
            layer.__dict__["dropout"] = dropout
    return model


def factors(layer: nn.Linear, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    A = torch.empty(rank, layer.in_features).uniform_(-1, 1) / layer.in_features**0.5
    return nn.Parameter(A), nn.Parameter(torch.zeros(layer.out_features, rank))


class _Bare(nn.Linear):
    dropout: float

    def forward(self, input: Tensor) -> Tensor:
        own: Any = self._parameters
        weight, A, B = own["weight"], own["A"], own["B"]
        if torch.is_grad_enabled():
            return _Products.apply(input, weight, A, B, self.dropout)
        row = input.view(-1)
        return torch.mv(weight, row).addmv_(B, torch.mv(A, row)).view(1, 1, -1)


class _Products(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, dropout: float) -> Tensor:
        y, x2, keep, scale = F.linear(x, weight), x.view(-1, x.shape[-1]), None, 1.0
        if dropout:
            keep, scale = draw_small(x2, dropout), survivors_scale(dropout)
            x2 = x2 * keep
        h = F.linear(x2, A)
        y.view(-1, y.shape[-1]).addmm_(h, B.t(), alpha=scale)
        ctx.save_for_backward(x, weight, A, B, h, keep)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        x, weight, A, B, h, keep = ctx.saved_tensors
        x2, dY, scale = x.view(-1, x.shape[-1]), grad_outputs[0].view(-1, weight.shape[0]), ctx.scale
        wide = dY.numel() >= 1 << 13  # 16 rows of 512 take 6 µs the other way round, not 11
        g = torch.mm(B.t(), dY.t()).t() if wide else torch.mm(dY, B)
        if keep is None:
            dX = torch.mm(dY, weight).addmm_(g, A)
        else:
            keep = keep.to(x.dtype)
            dX, x2 = torch.mm(g, A).mul_(keep).addmm_(dY, weight, beta=scale), x2 * keep
        dA = torch.addmm(A, g.t(), x2, beta=0, alpha=scale)
        dB = (
            torch.addmm(B.t(), h.t(), dY, beta=0, alpha=scale).t()
            if wide
            else torch.addmm(B, dY.t(), h, beta=0, alpha=scale)
        )
        return dX.view(x.shape), None, dA, dB, None

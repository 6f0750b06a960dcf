"""A quantized linear layer made a plain one: its weight is what its own forward gives for the identity."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .clone import clone
from .host import adapters_of, base_type, parts, replace_class, require_unwrapped
from .merged_weights import full_precision
from .quantized import quantized_as, wraps_others
from .walk import hosts

_ROWS = 256  # of the identity at a time: of 8192 inputs they take 8 MB, all at once 256 MB
_PROBES = 64


class Probe(NamedTuple):
    """What a live quantized host gave for x, and the host."""

    host: nn.Module
    x: Tensor
    y: Tensor

    def error(self) -> float:
        """How far the host is from it now, relative to its size, in the Frobenius norm."""
        host: Any = self.host
        with full_precision([host]):
            found = F.linear(self.x.float(), host.weight, host.bias)
        size = self.y.float().norm().clamp_min(torch.finfo(torch.float32).tiny)
        return ((found - self.y.float()).norm() / size).item()


@torch.no_grad()
def dequantize_linears(model: nn.Module, names: tuple[str, ...]) -> dict[str, Probe]:
    """Makes each quantized linear layer that these adapters are on an `nn.Linear` in float32, in place. What the live
    layers gave is kept, by name."""
    quantized = [(name, host) for name, host in hosts(model) if parts(host, names) and _is_quantized_linear(host)]
    probes: dict[str, Probe] = {}
    for name, host in quantized:
        require_unwrapped(name, host)
        with full_precision([host]):
            probes[name] = _probe(host, names)
            replace_class(host, _plain(host))
    return probes


def _is_quantized_linear(host: nn.Module) -> bool:
    return isinstance(host, nn.Linear) and quantized_as(host, "weight") is not None


def _probe(host: Any, names: tuple[str, ...]) -> Probe:
    """In the mode that the host is in, training or not, its adapters without dropout."""
    live = clone(host)
    adapters_of(live).selection.active = names
    adapters_of(live).eval()
    _own_bias(live)
    x = torch.randn(_PROBES, host.in_features, generator=torch.Generator().manual_seed(0))
    x = x.to(host.weight.device, _dtype(host))
    return Probe(host, x, live.forward(x))  # the hooks around it are not for this


def _dtype(host: Any) -> torch.dtype:
    """What the model gives such a layer, as far as the layer shows it. Codes may lie in a dtype that means nothing."""
    if wraps_others(host.weight):
        return host.weight.dtype
    return torch.float32 if host.bias is None else host.bias.dtype


def _own_bias(other: Any) -> None:
    """A quantized layer may cast its bias in place."""
    if other.bias is not None:
        other._parameters["bias"] = nn.Parameter(other.bias.detach().clone(), requires_grad=False)


def _plain(host: Any) -> nn.Linear:
    plain = nn.Linear(host.in_features, host.out_features, host.bias is not None, device="meta")
    plain.weight = nn.Parameter(_weight(host), requires_grad=False)
    if host.bias is not None:
        plain.bias = nn.Parameter(host.bias.detach().to(torch.float32), requires_grad=host.bias.requires_grad)
    return plain


def _weight(host: Any) -> Tensor:
    """[out, in], in blocks of columns. A row of the identity is exact in every dtype, and where rows are quantized; in
    training layers round less: bitsandbytes then multiplies by the weight itself, not in 8 bits or in bfloat16."""
    bare: Any = clone(host).train()
    bare._parameters["bias"] = None
    forward: Any = base_type(type(host)).forward
    dtype = torch.float32 if _takes_float32(bare, forward) else _dtype(host)
    weight = torch.empty(host.out_features, host.in_features, device=host.weight.device)
    for start in range(0, host.in_features, _ROWS):
        columns = weight[:, start : start + _ROWS]
        rows = torch.zeros(columns.shape[1], host.in_features, dtype=dtype, device=weight.device)
        rows[:, start:].fill_diagonal_(1)
        columns.copy_(forward(bare, rows).t())
    return weight


def _takes_float32(bare: Any, forward: Any) -> bool:
    try:
        forward(bare, torch.zeros(1, bare.in_features, device=bare.weight.device))
    except RuntimeError:
        return False
    return True

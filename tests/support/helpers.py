"""What the tests share: small models, and a snapshot of all that a model is."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import peftlib

# Typed loosely: torch says of a child's attributes only that each is a tensor or a module.
chain: Any = nn.Sequential
modules: Any = nn.ModuleDict


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.q_proj(self.norm(x))) * self.v_proj(x)


class Network(nn.Module):
    """An embedding, a few layers with a norm and two projections, a head."""

    def __init__(self, layers: int = 2, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.head = nn.Linear(width, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class HelperGain(peftlib.Adapter):
    """A user's own kind with only a weight form: one factor for the whole weight."""

    def __init__(self, host: Any, start: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((), start, device=host.weight.device))

    def fold(self, host: Any) -> dict[str, Tensor]:
        return {"weight": host.weight * self.gain}


def checkpoint_activations(model: Any, **how: Any) -> None:
    """Of transformers; the method had its older name up to 5.22."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(how)


Gain = HelperGain  # kinds are known by name for the whole run, and the pages define a Gain of their own


class Offset(peftlib.Adapter):
    """A user's own kind with only a call form: a vector added to what the host gives."""

    def __init__(self, host: Any) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(len(host.weight), device=host.weight.device))

    def forward(self, host: Any, call: Any, *args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs) + self.offset


def network(seed: int = 0, **sizes: Any) -> Any:
    """The same seed gives the same base. In eval mode, as a pretrained model arrives."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return Network(**sizes).eval()


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    """What `make` makes from this seed, in eval mode."""
    torch.manual_seed(seed)
    return make().eval()


def linears(count: int = 2, width: int = 4) -> Any:
    return chain(*(nn.Linear(width, width) for _ in range(count)))


def tokens() -> Tensor:
    return torch.arange(10).view(2, 5)


@torch.no_grad()
def moved(model: Any, name: str | None = None, size: float = 0.3) -> Any:
    """The model, its adapters shifted as training would: no factor is zero any more."""
    for parameter in peftlib.parameters(model, name):
        parameter.add_(torch.randn(parameter.shape).to(parameter) * size)
    return model


def bits(tensor: Tensor) -> bytes:
    copied = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)  # numpy() marks it
    return copied.reshape(-1).view(torch.uint8).numpy().tobytes()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Also tells 0.0 from -0.0, and finds NaN equal to itself."""
    return a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


class Same:
    """Equal only to what holds the very same object; it keeps that object alive, so that its id stays its own."""

    def __init__(self, item: object) -> None:
        self.item = item

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.item is self.item

    def __hash__(self) -> int:
        return id(self.item)


def _frozen(value: Any) -> Any:
    if isinstance(value, Tensor):
        readable = type(value) in (Tensor, nn.Parameter) and not value.is_meta
        grad = None if not readable or value.grad is None else bits(value.grad)
        return Same(value), value.requires_grad, bits(value) if readable else None, grad
    if hasattr(value, "active") and hasattr(value, "merged"):  # what all hosts of a model share
        weights = {name: weight.item() for name, weight in value.weights.items()}
        return value.active, str(weights), Same(value.rows), value.merged, tuple(value.count.items())
    if isinstance(value, dict):
        return "dict", Same(value), tuple((key, _frozen(item)) for key, item in value.items())
    if isinstance(value, (list, tuple, set)):
        return type(value).__name__, tuple(map(_frozen, value))
    if isinstance(value, (int, float, str, type(None))):
        return value
    return Same(value)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a model is: classes, every attribute in order, bits, flags, gradients, selections."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[f"{name}: class"] = type(module)
        found[f"{name}: keys"] = tuple(vars(module))
        found |= {f"{name}.{key}": _frozen(value) for key, value in vars(module).items()}
    return found


def changes(before: dict[str, Any], model: nn.Module) -> list[str]:
    """What differs now from a snapshot, by name."""
    after, absent = snapshot(model), object()
    return [key for key in {**before, **after} if before.get(key, absent) != after.get(key, absent)]


def base_bits(model: nn.Module) -> dict[str, bytes]:
    return {key: bits(tensor) for key, tensor in model.state_dict().items() if ".adapters." not in f".{key}"}


def is_near(one: Any, other: Any) -> bool:
    """Results of several ranks and of one process, in whatever they are kept.

    In float64 a mean of two halves, or a sum in another order, differs from that of the whole by 1e-15 of it; a dozen
    steps of SGD at most double that each."""
    if isinstance(one, Tensor):
        return one.shape == other.shape and bool((one - other).abs().max() <= 1e-10)
    if isinstance(one, dict):
        return list(one) == list(other) and all(is_near(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(is_near, one, other))
    return one == other

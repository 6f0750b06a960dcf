"""What the ecosystem's tests share: the kinds as a user puts them in, two small models, and a cell of the matrix."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlib
from support.zoo import BY_NAME


@dataclass(frozen=True)
class Column:
    """A kind, and where it goes in the plain network (`GroupedQueryModel`) and in the small Llama."""

    kind: type[peftlib.Adapter]
    network: Any
    llama: Any
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.kind.__name__

    @property
    def folds(self) -> bool:
        return self.kind not in (peftlib.Bottleneck, peftlib.Prefix, peftlib.Prompt)


COLUMNS = [
    Column(peftlib.LoRA, "*_proj", "*_proj", {"rank": 2}),
    Column(peftlib.DoRA, "*_proj", "*_proj", {"rank": 2}),
    Column(peftlib.IA3, "*_proj", ["k_proj", "v_proj", "down_proj"]),
    Column(peftlib.Bottleneck, "mlp", "mlp", {"width": 3, "dim": 16}),
    Column(peftlib.Prefix, "attention", "self_attn", {"length": 2}),
    Column(peftlib.Prompt, "embedding", lambda name, module: name == "", {"length": 2}),
    Column(peftlib.Full, ["norm?", "head"], ["*norm", "lm_head"]),
]
every_kind = pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.name)


def feature(name: str, *kinds: str) -> Any:
    """A row of the matrix: of these kinds alone; or else for the kind of the test's own column, or for all kinds."""
    return pytest.mark.feature(name, *kinds)


def network(column: Column | None = None, dtype: torch.dtype = torch.float32, name: str = "default") -> Any:
    """A small causal language model of torch's own modules, adapted, its adapters away from where they start."""
    return adapted(BY_NAME["grouped-query"].make(dtype), column, "network", name)


def llama(column: Column | None = None, dtype: torch.dtype = torch.float32, name: str = "default") -> Any:
    return adapted(BY_NAME["llama"].make(dtype), column, "llama", name)


def adapted(model: Any, column: Column | None, where: str, name: str = "default") -> Any:
    if column is None:
        return model
    put(model, column, where, name)
    return moved(model, name)


def put(model: nn.Module, column: Column, where: str = "network", name: str = "default") -> list[str]:
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        return peftlib.inject(model, getattr(column, where), column.kind, name=name, **column.config)


@torch.no_grad()
def moved(model: Any, name: str = "default", seed: int = 4) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in peftlib.parameters(model, name):
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def tokens(batch: int = 3, length: int = 7, seed: int = 5) -> Tensor:
    return torch.randint(3, 37, (batch, length), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in model.state_dict().items() if ".adapters." in f".{key}"}


def base_state(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in model.state_dict().items() if ".adapters." not in f".{key}"}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def close(found: Any, expected: Any, dtype: torch.dtype = torch.float32, roundings: float = 64) -> bool:
    """Up to so many roundings of the largest element: two orders of the same sums through a network of two layers, of
    some dozens of operations each."""
    if isinstance(expected, Mapping):
        return found.keys() == expected.keys() and all(close(found[k], expected[k], dtype, roundings) for k in expected)
    limit = roundings * torch.finfo(dtype).eps * max(1.0, expected.abs().max().item())
    return bool((found - expected).abs().max() <= limit)


def refused(record: Callable[[str, object], None], error: pytest.ExceptionInfo[Exception]) -> None:
    """Writes into the matrix that this kind refuses this feature, and why."""
    record("refused", str(error.value))


def not_applicable(record: Callable[[str, object], None], why: str) -> None:
    """Writes into the matrix that this feature has no meaning for this kind, and why."""
    record("not applicable", why)

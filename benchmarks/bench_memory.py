"""Memory: megabytes that a forward pass keeps for backward, beyond the parameters"""

import pytest
import torch
from models import contenders
from torch import nn


def saved_megabytes(model: nn.Module, x: torch.Tensor) -> float:
    """Each storage once, whatever the number of tensors that look at it."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = model(x)  # alive while counted, so that no address is used twice
    total = sum(size for address, size in kept.items() if address not in own) / 1e6
    assert y.requires_grad
    return total


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def bench_memory(record, dropout: float) -> None:
    x = torch.randn(1, 512, 512, requires_grad=True)
    models = contenders(512, 4, 8, dropout)
    record(f"saved d=512 tokens=512 r=8 p={dropout}", {n: saved_megabytes(m, x) for n, m in models.items()}, unit="MB")

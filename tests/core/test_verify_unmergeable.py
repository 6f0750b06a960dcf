"""`verify` looks at a model that cannot be merged as at any other, and compares nothing."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import peftlib
from peftlib import AdapterError, LoRA


def tied() -> Any:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    model[1].weight = model[0].weight
    return model, "1", torch.tensor([[1, 2]])


def normed() -> Any:
    return nn.Sequential(weight_norm(nn.Linear(4, 4))), "^0", torch.randn(2, 4)


@pytest.mark.parametrize("made", [tied, normed])
def test_what_cannot_be_merged_is_verified_without_a_difference(made):
    model, target, x = made()
    peftlib.inject(model, target, LoRA, rank=2)
    with pytest.raises(AdapterError):
        peftlib.merge(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = peftlib.verify(model, x)
    assert (bool(found), found.difference) == (True, None)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_live_view_is_refused_as_before():
    model = nn.Sequential(nn.Linear(4, 4))
    peftlib.inject(model, "0", LoRA, rank=2)
    view = peftlib.view(model, "default")
    with pytest.raises(AdapterError, match="view"):
        peftlib.verify(model, torch.randn(2, 4))
    assert view is not model

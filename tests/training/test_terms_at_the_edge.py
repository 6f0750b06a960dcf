"""Terms of the loss where names, models or logits are out of the ordinary."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlib
from peftlib import EWC, L2SP, LoRA
from support.helpers import linears
from support.refusals import refused

NAMES = ("a/b", "a", "~1", "a~b", "/", "~0/~1")


def named() -> Any:
    return nn.ModuleDict({name: nn.ModuleDict({"b": nn.Linear(2, 2)}) for name in NAMES})


def losses(model: Any, batch: Tensor) -> Tensor:
    return torch.stack([inner["b"](batch).square().sum(-1) for inner in model.values()]).sum(0)


TERMS: dict[str, Any] = {
    "L2SP": lambda model: L2SP(model, alpha=2.0),
    "EWC": lambda model: EWC(model, [torch.ones(1, 2)], losses, strength=2.0),
}


@pytest.mark.parametrize("make", TERMS.values(), ids=TERMS)
def test_a_name_may_have_any_character_in_it(make):
    model = named()
    term = make(model)
    assert term().item() == 0
    for name in NAMES:
        moved = model[name]["b"].bias
        with torch.no_grad():
            moved.add_(1.0)
        assert term().item() > 0, name
        with torch.no_grad():
            moved.sub_(1.0)
    other = make(named())
    other.load_state_dict(term.state_dict())
    assert set(other.state_dict()) == set(term.state_dict())
    assert sum(tensor.numel() for tensor in L2SP(model).state_dict().values()) == 6 * len(NAMES)


def test_a_state_of_an_ordinary_model_has_the_keys_that_it_had():
    assert [*L2SP(linears()).state_dict()] == ["start.0/weight", "start.0/bias", "start.1/weight", "start.1/bias"]


@pytest.mark.parametrize("make", [
    lambda model: L2SP(model), lambda model: EWC(model, [torch.ones(1, 4)], lambda m, x: m(x).sum(-1))
], ids=["L2SP", "EWC"])  # fmt: skip
def test_a_term_over_an_adapter_that_was_ejected_is_refused(make):
    model = linears()
    peftlib.inject(model, "0", LoRA, rank=2)
    term = make(model)
    assert term().item() == 0
    peftlib.eject(model)
    with refused(model, type(term).__name__) as error:
        term()
    assert "lora_A" in str(error.value)


def test_a_term_over_a_layer_of_another_size_is_refused():
    model = linears()
    term = L2SP(model)
    model[0] = nn.Linear(4, 1)
    with refused(model, "L2SP") as error:
        term()
    assert "0.weight" in str(error.value)


def test_a_term_over_the_base_outlives_its_adapters():
    model = linears()
    term = L2SP(model, alpha=2.0)
    peftlib.inject(model, "0", LoRA, rank=2)
    assert term().item() == 0
    peftlib.eject(model)
    with torch.no_grad():
        model[0].bias.add_(1.0)
    assert term().item() == pytest.approx(4.0)


class Masked(nn.Module):
    """A class that no example has: of logits of minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).index_fill(-1, torch.tensor([1, 3]), -torch.inf)


def test_classes_that_are_masked_out_leave_the_divergence_of_the_others():
    torch.manual_seed(0)
    model, x = Masked(), torch.randn(3, 4)
    peftlib.inject(model, "head", LoRA, rank=2)
    for parameter in peftlib.parameters(model):
        nn.init.normal_(parameter)
    z = model(x)
    loss = peftlib.distill(model, z, x, temperature=2.0)
    with peftlib.activate(model):
        z0 = model(x).detach()
    kept = [0, 2, 4]
    p0, log_p = (z0[:, kept] / 2).softmax(-1), (z[:, kept] / 2).log_softmax(-1)
    expected = 4 * (p0 * (p0.log() - log_p)).sum(-1).mean()
    torch.testing.assert_close(loss, expected)
    own = [*peftlib.parameters(model)]
    for found, wanted in zip(
        torch.autograd.grad(loss, own, retain_graph=True), torch.autograd.grad(expected, own), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_a_class_that_only_the_adapted_model_rules_out_is_infinitely_wrong():
    model = nn.Sequential(nn.Linear(4, 3))
    peftlib.inject(model, "0", LoRA, rank=2)
    x = torch.randn(2, 4)
    z = model(x).index_fill(-1, torch.tensor([0]), -torch.inf)
    assert peftlib.distill(model, z, x).item() == torch.inf

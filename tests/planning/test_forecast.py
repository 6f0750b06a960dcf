"""What `plan` says that a step will cost, beside what the step then costs on this CPU."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlib
from support.refusals import refused
from support.zoo import BY_NAME, ZOO

KINDS: dict[str, tuple[type[peftlib.Adapter], str, dict[str, Any]]] = {
    "LoRA": (peftlib.LoRA, "linears", {"rank": 2}),
    "LoRA-dropout": (peftlib.LoRA, "linears", {"rank": 2, "dropout": 0.1}),
    "DoRA": (peftlib.DoRA, "linears", {"rank": 2}),
    "IA3": (peftlib.IA3, "linears", {}),
    "Bottleneck": (peftlib.Bottleneck, "blocks", {}),
    "Prefix": (peftlib.Prefix, "attention", {"length": 3}),
    "Prompt": (peftlib.Prompt, "embedding", {"length": 3}),
    "Full": (peftlib.Full, "head", {}),
}


def _cells() -> Iterator[Any]:
    """Every type on every model that has a place for it; the quick ones are one type on all, and all on two models."""
    for kind, (_, place, _) in KINDS.items():
        for animal in ZOO:
            if getattr(animal, place):
                quick = kind == "LoRA-dropout" or animal.name in ("encoder", "llama")
                yield pytest.param(kind, animal, id=f"{kind}-{animal.name}", marks=() if quick else pytest.mark.slow)


def kept_for_backward(model: nn.Module, inputs: dict[str, Any]) -> int:
    """Bytes that autograd keeps of a real forward pass beside the model's own tensors, each storage once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict(keep_vars=True).values()}
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = model(**inputs)
    assert outputs is not None
    return sum(size for address, size in found.items() if address not in own)


@pytest.mark.parametrize(("kind", "animal"), [*_cells()])
def test_a_step_costs_what_was_forecast(kind, animal, tmp_path):
    adapter, place, config = KINDS[kind]
    targets = getattr(animal, place)
    model, inputs, config = animal.make(), animal.inputs(), {**config, **animal.needs.get(kind, {})}
    try:
        said = peftlib.plan(model, targets, adapter, inputs=inputs, **config).forecast
    except peftlib.AdapterError:  # not a type for these modules: then inject says the same
        with refused(model):
            peftlib.inject(model, targets, adapter, **config)
        return
    peftlib.inject(model, targets, adapter, **config)
    saved = kept_for_backward(model.train(), inputs)
    optimizer = torch.optim.AdamW(peftlib.parameters(model))
    gradients = 0
    for parameter in peftlib.parameters(model):
        parameter.grad = torch.zeros_like(parameter)
        gradients += parameter.nbytes
    optimizer.step()
    state = sum(t.nbytes for of in optimizer.state.values() for t in of.values() if isinstance(t, Tensor))
    peftlib.save(model, tmp_path / "adapter.safetensors")
    file = os.path.getsize(tmp_path / "adapter.safetensors")
    assert said.saved_bytes == pytest.approx(saved, rel=0.03)
    assert (said.gradient_bytes, said.optimizer_bytes) == (gradients, state)
    assert said.file_bytes == pytest.approx(file, rel=0.03)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("LoRA", "mlp"), ("LoRA-dropout", "llama"), ("IA3", "encoder"), ("Bottleneck", "mlp"), ("Full", "gpt2")],
)
def test_trials_side_by_side_cost_what_was_forecast(kind, name):
    animal, (adapter, place, config) = BY_NAME[name], KINDS[kind]
    model, inputs, config = animal.make(), animal.inputs(), {**config, **animal.needs.get(kind, {})}
    said = peftlib.plan(model, getattr(animal, place), adapter, inputs=inputs, trials=3, **config).forecast
    alone = peftlib.plan(model, getattr(animal, place), adapter, inputs=inputs, **config).forecast
    for trial in "abc":
        peftlib.inject(model, getattr(animal, place), adapter, name=trial, **config)
        peftlib.activate(model)
    together = {key: torch.cat([t] * 3) if isinstance(t, Tensor) else t for key, t in inputs.items()}
    rows = next(t.shape[0] for t in inputs.values() if isinstance(t, Tensor))
    with peftlib.route(model, dict.fromkeys("abc", rows)):
        saved = kept_for_backward(model.train(), together)
    assert said.saved_bytes == pytest.approx(saved, rel=0.03)
    assert said.gradient_bytes == 3 * alone.gradient_bytes
    assert said.optimizer_bytes == 3 * alone.optimizer_bytes
    assert said.file_bytes == alone.file_bytes


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4))


def test_the_optimizer_that_is_given_is_the_one_that_is_counted():
    for optimizer, moments in ((torch.optim.SGD, 0), (torch.optim.RMSprop, 1), (torch.optim.AdamW, 2)):
        said = peftlib.plan(linear(), "0", peftlib.LoRA, rank=2, inputs=torch.ones(3, 4), optimizer=optimizer).forecast
        steps = 0 if optimizer is torch.optim.SGD else 2 * 4  # a counter of four bytes for each of two factors
        assert said.optimizer_bytes == moments * said.gradient_bytes + steps


def test_inputs_are_a_tensor_or_arguments_or_keywords():
    x = torch.ones(3, 4)
    said = [peftlib.plan(linear(), "0", peftlib.LoRA, rank=2, inputs=each) for each in (x, (x,), {"input": x})]
    assert said[0] == said[1] == said[2]
    assert peftlib.plan(linear(), "0", peftlib.LoRA, rank=2).forecast is None


def test_nothing_of_the_model_or_the_inputs_changes():
    model, x = linear().eval(), torch.ones(3, 4, requires_grad=True)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    peftlib.plan(model, "0", peftlib.LoRA, rank=2, inputs=x, trials=2)
    assert type(model[0]) is nn.Linear
    assert not model.training
    assert x.grad is None
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


class Sparse(nn.Module):
    """How many rows it computes depends on their values."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x[x.sum(-1).nonzero().flatten()])


def test_what_shapes_cannot_tell_is_refused():
    with refused(model := Sparse(), "Sparse", "inputs"):
        peftlib.plan(model, "proj", peftlib.LoRA, rank=2, inputs=torch.ones(3, 4))
    for wrong in (0, 1.5):
        with refused(model := linear(), "trials"):
            peftlib.plan(model, "0", peftlib.LoRA, rank=2, inputs=torch.ones(3, 4), trials=wrong)
    with refused(model := linear(), "tokens"):
        peftlib.plan(model, "0", peftlib.LoRA, rank=2, tokens=0)
    with refused(model := linear(), "inputs"):
        peftlib.plan(model, "0", peftlib.LoRA, rank=2, inputs=(), trials=2)


def test_tokens_are_said_beside_parameters():
    shown = str(peftlib.plan(linear(), "0", peftlib.LoRA, rank=2, tokens=160))
    assert "0.1" in shown
    assert "160" in shown

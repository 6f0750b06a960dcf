"""A host looks up once for a choice of adapters what its call comes to; the next call sees what changed since."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

import peftlib
from peftlib import LoRA


def called() -> Any:
    """A layer with an adapter that does something, after its first call."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    peftlib.inject(model, "0", LoRA, rank=2, alpha=6)
    redraw(model)
    model(torch.randn(3, 6).double())
    return model


def redraw(model: nn.Module) -> None:
    for parameter in peftlib.parameters(model):
        nn.init.normal_(parameter)


def dense(model: Any, x: Tensor, **weights: float) -> Tensor:
    """y = W x + b + Σ w s B A x, of the tensors that the model has now."""
    host = model[0]
    W = host.weight
    for _, name, adapter in peftlib.adapters(model):
        W = W + weights.get(name, 0.0) * adapter.scale * adapter.lora_B @ adapter.lora_A
    return x @ W.T + host.bias


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def exchange_weight(model: Any) -> None:
    model[0].weight = nn.Parameter(torch.randn(5, 6).double())


def exchange_factor(model: Any) -> None:
    model[0].adapters.default.lora_B = nn.Parameter(torch.randn(5, 2).double())


def parametrize_factor(model: Any) -> None:
    parametrize.register_parametrization(model[0].adapters.default, "lora_A", Doubled())


def parametrize_weight(model: Any) -> None:
    parametrize.register_parametrization(model[0], "weight", Doubled())


def come_back(model: Any) -> None:
    peftlib.eject(model)
    peftlib.inject(model, "0", LoRA, rank=3, name="default")
    redraw(model)


def one_more(model: Any) -> None:
    peftlib.inject(model, "0", LoRA, rank=3, name="other")
    redraw(model)
    peftlib.activate(model, "default", "other")


def merge_and_back(model: Any) -> None:
    peftlib.merge(model)
    model(torch.randn(3, 6).double())
    peftlib.unmerge(model)


CHANGES: dict[str, tuple[Callable[[Any], object], dict[str, float]]] = {
    "scale": (lambda model: setattr(model[0].adapters.default, "scale", 0.25), {"default": 1.0}),
    "another weight": (exchange_weight, {"default": 1.0}),
    "another factor": (exchange_factor, {"default": 1.0}),
    "values": (redraw, {"default": 1.0}),
    "a parametrized factor": (parametrize_factor, {"default": 1.0}),
    "a parametrized weight": (parametrize_weight, {"default": 1.0}),
    "renamed": (lambda model: peftlib.rename(model, "default", "new"), {"new": 1.0}),
    "ejected, and another under its name": (come_back, {"default": 1.0}),
    "one more": (one_more, {"default": 1.0, "other": 1.0}),
    "off": (peftlib.activate, {}),
    "a weight": (lambda model: peftlib.activate(model, {"default": 0.5}), {"default": 0.5}),
    "merged and back": (merge_and_back, {"default": 1.0}),
    "routed": (lambda model: peftlib.route(model, [None, None, None]), {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_after_a_call_is_seen(change):
    model, x = called(), torch.randn(3, 6).double()
    alter, weights = CHANGES[change]
    alter(model)
    assert torch.allclose(model(x), dense(model, x, **weights), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        token = x[:1] if change != "routed" else x
        assert torch.allclose(model(token), dense(model, token, **weights), rtol=1e-12, atol=1e-12)


def test_dropout_and_modes_that_change_are_seen():
    model, x = called(), torch.randn(300, 6).double()
    adapter = model[0].adapters.default
    adapter.dropout = 0.5
    assert not torch.allclose(model(x), dense(model, x, default=1.0))
    adapter.eval()
    assert torch.allclose(model(x), dense(model, x, default=1.0))


def test_an_adapter_of_a_name_that_is_active_already_acts_at_once():
    model, x = called(), torch.randn(3, 6).double()
    model.append(nn.Linear(5, 5).double())
    peftlib.inject(model, "1", LoRA, rank=2, name="other")
    peftlib.activate(model, "default", "other")
    model(x)
    peftlib.inject(model, "0", LoRA, rank=2, name="other")
    redraw(model)
    assert torch.allclose(model[0](x), dense(model[:1], x, default=1.0, other=1.0))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_after_a_call_acts_by_its_own_adapters(copied):
    model, x = called(), torch.randn(3, 6).double()
    other = copied(model)
    before = model(x)
    redraw(other)
    assert torch.allclose(other(x), dense(other, x, default=1.0))
    assert torch.equal(model(x), before)


def test_hooks_on_an_adapter_run_whenever_they_came():
    model, x, seen = called(), torch.randn(3, 6).double().requires_grad_(), []
    adapter = model[0].adapters.default
    hooks: list[Callable[[], Any]] = [
        lambda: adapter.register_forward_pre_hook(lambda module, args: seen.append(module)),
        lambda: adapter.register_forward_hook(lambda module, args, y: seen.append(module)),
        lambda: adapter.register_full_backward_hook(lambda module, *_: seen.append(module)),
        lambda: register_module_forward_hook(lambda module, *_: seen.append(module)),
    ]
    for hook in hooks:
        seen.clear()
        handle = hook()
        model(x).sum().backward()
        handle.remove()
        assert adapter in seen
        seen.clear()
        model(x).sum().backward()
        assert not seen


def test_a_forward_put_on_an_adapter_runs():
    """As accelerate does, to bring an offloaded adapter's tensors for its call."""
    model, x, seen = called(), torch.randn(3, 6).double(), []
    adapter = model[0].adapters.default
    forward = adapter.forward
    adapter.forward = lambda *args, **kwargs: seen.append(args) or forward(*args, **kwargs)
    assert torch.allclose(model(x), dense(model, x, default=1.0))
    assert seen


@pytest.mark.parametrize("choose", [lambda view: None, lambda view: peftlib.route(view, ["default", None, "default"])])
def test_a_view_that_ran_ends_with_the_last_reference_to_it(choose):
    model = called()
    gc.disable()
    try:
        view = peftlib.view(model, "default")
        choose(view)
        view(torch.randn(3, 6).double())
        host = weakref.ref(view[0])
        del view
        assert host() is None
        peftlib.merge(model)
    finally:
        gc.enable()

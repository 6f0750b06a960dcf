"""LoRA from a fine-tuned model: what it leaves out, and which checkpoints it takes."""

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import peftlib
from peftlib import Full, LoRA
from support.faults import fail_at_every_step
from support.helpers import linears, network, tokens
from support.refusals import refused

pytestmark = pytest.mark.mutants


class Whole(nn.Module):
    """Layers, one of them read without being called, a parameter of the model's own, a norm with statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(5, 8))
        self.embedding = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens) + self.position)
        return self.head(x + self.attention(x, x, x)[0])


def whole() -> Any:
    torch.manual_seed(0)
    return Whole().double().eval()


@torch.no_grad()
def tuned(model: nn.Module, *names: str) -> Any:
    """A copy, with these tensors, or all, moved by a change of full rank."""
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    for name, tensor in other.state_dict().items():
        if tensor.is_floating_point() and (not names or name in names):
            tensor.add_(torch.randn_like(tensor).abs() * 0.2)
        elif not names:
            tensor.add_(7)
    return other


def test_with_all_singular_values_the_model_is_the_tuned_one():
    model = whole()
    other = tuned(model)
    errors = peftlib.extract(model, other.state_dict(), rank=8)
    assert max(errors.values()) < 1e-13
    torch.testing.assert_close(model(tokens()), other(tokens()), rtol=0, atol=1e-11)
    found = dict(peftlib.merged_state_dict(model))
    assert found.keys() == other.state_dict().keys()
    for key, tensor in other.state_dict().items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-12)
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".adapters." not in f".{key}")


@pytest.mark.parametrize("rank", [1, 3])
def test_each_matrix_is_the_nearest_of_its_rank_and_the_error_is_measured(rank):
    model = whole()
    other = tuned(model)
    before = copy.deepcopy(model).state_dict()
    errors = peftlib.extract(model, other.state_dict(), rank=rank)
    found = dict(peftlib.merged_state_dict(model))
    for key, tensor in other.state_dict().items():
        if not tensor.is_floating_point():
            continue
        delta = tensor - before[key]
        U, S, Vh = torch.linalg.svd(delta if delta.dim() == 2 else delta[:, None], full_matrices=False)
        nearest = ((U[:, :rank] * S[:rank]) @ Vh[:rank]).view_as(delta)
        torch.testing.assert_close(found[key] - before[key], nearest, rtol=0, atol=1e-11)
        assert errors[key] == pytest.approx(((nearest - delta).norm() / delta.norm()).item(), abs=1e-9)


def test_what_is_as_in_the_base_gets_nothing():
    model = network()
    other = tuned(model, "head.weight", "layers.1.q_proj.bias")
    errors = peftlib.extract(model, other.state_dict(), rank=2, name="tuned")
    assert errors.keys() == {"head.weight", "layers.1.q_proj.bias"}
    found = {(host, name): type(part) for host, name, part in peftlib.adapters(model)}
    assert found == {("head", "tuned"): LoRA, ("layers.1.q_proj", "tuned"): Full}
    assert peftlib.verify(model, tokens())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_is_read_as_a_state_dict_is(tmp_path, dtype):
    model, same = network().to(dtype), network().to(dtype)
    other = tuned(model)
    save_file(other.state_dict(), tmp_path / "tuned.safetensors")
    by_file = peftlib.extract(model, tmp_path / "tuned.safetensors", rank=2)
    assert by_file == peftlib.extract(same, other.state_dict(), rank=2)
    assert torch.equal(model(tokens()), same(tokens()))


def test_tied_weights_are_each_adapted_and_one_key_of_them_is_enough():
    def tied() -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)).double()
        model[1].weight = model[0].weight
        return model

    model = tied()
    other = tuned(model, "0.weight")
    peftlib.extract(model, {"1.weight": other.state_dict()["1.weight"]}, rank=4)
    x = torch.arange(7)
    torch.testing.assert_close(model(x), other(x), rtol=0, atol=1e-12)


def test_what_was_tied_and_is_not_any_more_has_a_change_of_its_own_at_each_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)).double()
    model[1].weight = model[0].weight
    other = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)).double()
    peftlib.extract(model, other.state_dict(), rank=4)
    x = torch.arange(7)
    torch.testing.assert_close(model(x), other(x), rtol=0, atol=1e-12)


def test_a_module_under_two_names_is_adapted_once():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).double()
    model = nn.Sequential(layer, nn.Tanh(), layer)
    other = tuned(model)
    errors = peftlib.extract(model, other.state_dict(), rank=4)
    assert errors.keys() == {"0.weight", "0.bias"}
    x = torch.randn(3, 4).double()
    torch.testing.assert_close(model(x), other(x), rtol=0, atol=1e-12)


def test_a_base_without_values_is_refused():
    model = network().to("meta")
    with refused(model, "extract", "embedding.weight", "meta"):
        peftlib.extract(model, network().state_dict(), rank=2)


def test_other_adapters_of_the_model_stay_and_the_base_is_compared():
    model = network()
    other = tuned(model)
    peftlib.inject(model, "head", LoRA, rank=1, name="mine")
    with torch.no_grad():
        model.head.adapters["mine"].lora_B.fill_(1.0)
    errors = peftlib.extract(model, other.state_dict(), rank=8, name="tuned")
    assert max(errors.values()) < 1e-6
    peftlib.activate(model, "tuned")
    torch.testing.assert_close(model(tokens()), other(tokens()))


def wrong() -> dict[str, tuple[Any, tuple[str, ...]]]:
    state = tuned(network()).state_dict()
    without = {key: tensor for key, tensor in state.items() if key != "head.bias"}
    large = {**state, "head.weight": torch.randn(4, 8)}
    infinite = {**state, "head.weight": torch.full((3, 8), torch.inf)}
    return {
        "missing": (without, ("extract", "head.bias")),
        "unexpected": ({**state, "other.weight": torch.zeros(2)}, ("extract", "other.weight")),
        "shape": (large, ("head.weight", "[4, 8]", "[3, 8]")),
        "infinite": (infinite, ("head.weight", "infinity")),
        "the base itself": (network().state_dict(), ("extract",)),
    }


@pytest.mark.parametrize("which", ["missing", "unexpected", "shape", "infinite", "the base itself"])
def test_a_checkpoint_that_does_not_fit_is_refused(which):
    state, named = wrong()[which]
    model = network()
    with refused(model, *named):
        peftlib.extract(model, state, rank=2)


def test_a_taken_name_a_rank_of_zero_and_a_merged_model_are_refused(tmp_path):
    model = network()
    state = tuned(model).state_dict()
    peftlib.inject(model, "head", LoRA, rank=1)
    with refused(model, "extract", "'default'"):
        peftlib.extract(model, state, rank=2)
    with refused(model, "rank=0"):
        peftlib.extract(model, state, rank=0, name="tuned")
    with peftlib.merged(model), refused(model, "extract"):
        peftlib.extract(model, state, rank=2, name="tuned")
    with pytest.raises(FileNotFoundError):
        peftlib.extract(model, tmp_path / "none.safetensors", rank=2, name="tuned")


def test_a_failure_on_the_way_leaves_all_as_it_was():
    state = tuned(linears(1)).state_dict()
    assert fail_at_every_step(lambda: linears(1), lambda model: peftlib.extract(model, state, rank=2)) > 20

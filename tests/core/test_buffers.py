"""Buffers of the base stand still while adapters are in, or are named: statistics, power iterations, codebooks."""

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import peftlib
from peftlib import AdapterError, Bottleneck, DoRA, Full, LoRA
from support.faults import Fault, Steps, steps_of
from support.helpers import bits
from support.refusals import refused

X = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(3))


class Codebook(nn.Module):
    """Vector quantization whose codes are a moving average, as in VQ-VAE."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x, self.codes).argmin(-1)
        if self.training:
            with torch.no_grad():
                self.codes.index_add_(0, nearest, x.detach() * 0.1)
        return x + (self.codes[nearest] - x).detach()


class Remembering(nn.Module):
    """State that is assigned, not written into: a moving average, a counter, what came last, of any batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("last", torch.zeros(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.steps += 1
        y = self.linear(x - self.mean) / self.steps
        self.last = x
        return y


def convolutional() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.InstanceNorm2d(8, track_running_stats=True),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
        nn.BatchNorm1d(4, affine=False),
    )


def spectral() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), parametrizations.spectral_norm(nn.Linear(48, 8)), parametrizations.spectral_norm(nn.Linear(8, 4))
    )


def quantizing() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 4), Codebook())


def buffers(model: nn.Module) -> dict[str, Any]:
    return {name: bits(buffer) for name, buffer in model.named_buffers() if ".adapters." not in f".{name}"}


def train(model: Any, steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.AdamW(peftlib.parameters(model), lr=0.05)
    for step in range(steps):
        torch.manual_seed(step)
        model(torch.randn(6, 3, 4, 4) + 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("make", [convolutional, spectral])
@pytest.mark.parametrize("kind", [LoRA, Bottleneck])
def test_statistics_stand_still_in_training_and_the_file_alone_gives_the_same_function(make, kind, tmp_path):
    model = make().train()
    before = buffers(model)
    peftlib.inject(model, nn.Linear, kind)
    train(model)
    assert buffers(model) == before
    peftlib.save(model, tmp_path / "adapter.safetensors")
    fresh = make()
    peftlib.load(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(fresh.eval()(X), model.eval()(X))


@pytest.mark.parametrize("make", [convolutional, spectral, quantizing])
def test_eject_leaves_every_buffer_as_it_was(make):
    model = make().train()
    state, types = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    peftlib.inject(model, nn.Linear, LoRA, rank=2)
    train(model)
    peftlib.eject(model)
    assert [type(module) for module in model.modules()] == types
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    model(X)
    if make is convolutional:
        assert not torch.equal(model[1].running_mean, state["1.running_mean"]), "without adapters it trains as before"


def test_inject_and_plan_take_no_step_of_a_power_iteration():
    model = spectral().train()
    before = buffers(model)
    peftlib.plan(model, nn.Linear, LoRA, rank=2)
    peftlib.inject(model, nn.Linear, LoRA, rank=2)
    assert buffers(model) == before


def test_a_magnitude_is_refused_where_a_hook_divides_the_weight_by_what_moves_in_training():
    model = nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(6, 6)))
    with refused(model, "DoRA", "0", "Linear.weight"):
        peftlib.inject(model, "0", DoRA, rank=2)


def test_the_norm_runs_as_in_eval_mode_and_the_flags_stay_the_users():
    model, reference = convolutional().train(), convolutional().eval()
    peftlib.inject(model, "5", LoRA, rank=2)
    assert torch.equal(model(X), reference(X))
    assert all(module.training for module in model.modules())
    model.eval()
    assert not any(module.training for module in model.modules())


def test_full_on_a_norm_makes_its_statistics_the_adapters():
    model = convolutional().train()
    before = buffers(model)
    peftlib.inject(model, "1", Full)
    train(model)
    assert buffers(model) == before
    ((_, _, adapter),) = peftlib.adapters(model)
    state = adapter.state_dict()
    assert state["own.num_batches_tracked"] == 3
    assert not torch.equal(state["own.running_mean"], model[1].running_mean)


def test_in_training_full_on_a_norm_is_that_norm_trained_statistics_and_all():
    model, reference = convolutional().train(), convolutional().train()
    peftlib.inject(model, "1", Full)
    for module in (reference[3], reference[6]):
        module.eval()
    for seed in range(3):
        x = torch.randn(X.shape, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(model(x), reference(x))
    ((_, _, adapter),) = peftlib.adapters(model)
    assert {key.removeprefix("own."): bits(value) for key, value in adapter.state_dict().items()} == {
        key: bits(value) for key, value in reference[1].state_dict().items()
    }


def test_full_on_a_block_around_a_norm_makes_its_statistics_the_adapters():
    model = nn.Sequential(convolutional()).train()
    peftlib.inject(model, lambda name, module: name == "0", Full)
    train(model)
    ((_, _, adapter),) = peftlib.adapters(model)
    assert adapter.state_dict()["own.1.num_batches_tracked"] == 3


@pytest.mark.parametrize("target", ["0", ""])
def test_full_on_a_module_that_assigns_its_buffers_is_that_module_and_the_base_stays(target):
    model = nn.Sequential(Remembering())
    reference, before = copy.deepcopy(model), buffers(model)
    peftlib.inject(model, lambda name, module: name == target, Full)
    batches = torch.randn(4, 5, 4, generator=torch.Generator().manual_seed(0))
    for x in batches[:3]:
        assert torch.equal(model(x), reference(x))
    assert buffers(model) == before
    ((_, _, adapter),) = peftlib.adapters(model)
    own = {key.removeprefix("own.").removeprefix("0."): value for key, value in adapter.state_dict().items()}
    assert all(torch.equal(own[key], value) for key, value in reference[0].state_dict().items())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(batches[3]), reference(batches[3]))
    assert buffers(model) == before


def test_a_copy_made_while_a_module_runs_with_other_buffers_has_its_own():
    model = nn.Sequential(Remembering())
    made = []
    model[0].linear.register_forward_hook(lambda *_: made.append(copy.deepcopy(model)))
    peftlib.inject(model, lambda name, module: name == "0", Full, params=["mean", "steps", "last"])
    before = buffers(model)
    model(torch.ones(5, 4))
    assert buffers(made[0]) == before
    assert vars(made[0][0]).keys() == vars(model[0]).keys()


@pytest.mark.parametrize("rows", [2, 5])
def test_eject_leaves_alone_what_the_model_put_in_the_place_of_a_buffer(rows):
    model = Remembering()
    before = buffers(model)
    peftlib.inject(model, "linear", LoRA, rank=2)
    x = torch.ones(rows, 4)
    model(x)
    peftlib.eject(model)
    assert torch.equal(x, torch.ones(rows, 4))
    assert buffers(model) == before


@pytest.mark.parametrize("rows", [2, 5])
def test_unmerge_leaves_alone_what_the_model_put_in_the_place_of_a_merged_buffer(rows):
    model = Remembering()
    own, before = dict(model.named_buffers()), buffers(model)
    peftlib.inject(model, lambda name, module: name == "", Full)
    x = torch.ones(rows, 4)
    with peftlib.merged(model):
        model(x)
        assert model.last is x
    assert torch.equal(x, torch.ones(rows, 4))
    assert buffers(model) == before
    assert all(model.get_buffer(name) is buffer for name, buffer in own.items())


def merged_and_called() -> Any:
    model = Remembering()
    peftlib.inject(model, lambda name, module: name == "", Full)
    peftlib.merge(model)
    model(torch.ones(2, 4))
    return model


def test_unmerge_fails_at_each_step_and_leaves_what_the_model_assigned():
    torch.manual_seed(0)
    original = buffers(Remembering())
    numbers = steps_of(merged_and_called, peftlib.unmerge)
    for number in numbers:
        model = merged_and_called()
        assigned, before = dict(model.named_buffers()), buffers(model)
        with Steps(number) as steps, contextlib.suppress(Fault):
            peftlib.unmerge(model)
        assert steps.struck
        assert all(model.get_buffer(name) is buffer for name, buffer in assigned.items())
        assert buffers(model) == before
        peftlib.unmerge(model)
        assert buffers(model) == original
    assert len(numbers) >= 10


def test_buffers_of_a_model_that_changes_its_dtype_while_merged_come_back_in_that_dtype():
    model = Remembering()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    peftlib.inject(model, lambda name, module: name == "", Full)
    model(torch.ones(2, 4))
    with peftlib.merged(model):
        model.double()
        model(torch.ones(2, 4).double())
    assert model.steps.dtype == torch.int64
    assert model.mean.dtype == model.last.dtype == torch.float64
    assert all(torch.equal(model.get_buffer(name).to(was.dtype), was) for name, was in before.items())


def test_an_unfrozen_base_moves_its_statistics():
    model = convolutional().train()
    before = buffers(model)
    peftlib.inject(model, "5", LoRA, rank=2, freeze=False)
    model(X)
    assert buffers(model) != before


def test_a_buffer_that_moves_all_the_same_is_named_by_verify_and_refused_by_save(tmp_path):
    model = quantizing().train()
    peftlib.inject(model, "1", LoRA, rank=2)
    found = peftlib.verify(model, X)
    assert not found
    assert "2.codes" in str(found)
    before = buffers(model)
    peftlib.save(model, tmp_path / "before.safetensors")
    model(X)
    with pytest.raises(AdapterError, match=r"2\.codes"):
        peftlib.save(model, tmp_path / "after.safetensors")
    assert not (tmp_path / "after.safetensors").exists()
    with pytest.raises(AdapterError, match=r"2\.codes"):
        peftlib.hf.save(model, tmp_path / "directory")
    with pytest.raises(AdapterError, match=r"2\.codes"):
        peftlib.exchange.save(model, tmp_path / "kohya.safetensors", "kohya")
    assert [path.name for path in tmp_path.iterdir()] == ["before.safetensors"]
    peftlib.eject(model)
    assert buffers(model) == before


def test_merging_for_good_keeps_the_buffers_that_the_function_rests_on():
    model = quantizing().train()
    peftlib.inject(model, "1", LoRA, rank=2)
    train(model)
    moved, y = buffers(model), model.eval()(X)
    peftlib.eject(model, merge=True)
    assert buffers(model) == moved
    torch.testing.assert_close(model(X), y)


def test_a_checkpoint_of_the_base_brings_its_own_buffers(tmp_path):
    model, other = convolutional(), convolutional()
    with torch.no_grad():
        other[1].running_mean.add_(1)
    peftlib.inject(model, "5", LoRA, rank=2)
    model.load_state_dict(other.state_dict())
    peftlib.save(model, tmp_path / "adapter.safetensors")
    peftlib.eject(model)
    assert torch.equal(model[1].running_mean, other[1].running_mean)


@pytest.mark.parametrize("leaf", ["running_mean", "running_var"])
def test_a_base_with_other_statistics_is_another_base(leaf, tmp_path):
    model, other = nn.Sequential(convolutional()), nn.Sequential(convolutional())
    peftlib.inject(model, lambda name, module: name == "0", Bottleneck, dim=4)
    peftlib.save(model, tmp_path / "adapter.safetensors")
    with torch.no_grad():
        other[0][1].get_buffer(leaf).add_(1)
    with pytest.raises(AdapterError, match="statistics"):
        peftlib.load(other, tmp_path / "adapter.safetensors")
    peftlib.load(other, tmp_path / "adapter.safetensors", strict=False)


def test_compiled_as_one_graph_statistics_stand_still():
    model = convolutional().train()
    peftlib.inject(model, "5", LoRA, rank=2)
    before = buffers(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(X), model(X))
    assert buffers(model) == before

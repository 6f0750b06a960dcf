"""`monitor`: its numbers are those of dense matrices in float64, and it makes no such matrix for LoRA."""

import copy
import csv
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import peftlib
from peftlib import IA3, Bottleneck, DoRA, Full, LoRA, Prompt
from support import quantised
from support.helpers import Gain, chain, moved, network, snapshot
from support.hosts import HOSTS as EVERY_HOST
from support.refusals import refused

HOSTS = {
    "Linear": lambda: nn.Linear(12, 7),
    "Conv2d": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
    "Embedding": lambda: nn.Embedding(9, 5),
    "Bilinear": lambda: nn.Bilinear(3, 4, 5),
}


def adapted(host: nn.Module, kind: Any = LoRA, dtype: torch.dtype = torch.float64, **config: Any) -> nn.Module:
    """With an adapter that has learned something."""
    torch.manual_seed(3)
    model = chain(host).to(dtype)
    peftlib.inject(model, "0", kind, **config)
    with torch.no_grad():
        for p in peftlib.parameters(model):
            p.add_(torch.randn_like(p), alpha=0.3)
    return model


def dense(model: nn.Module) -> tuple[Tensor, Tensor]:
    """ΔW and W as matrices in float64, by merging a copy."""
    merged = copy.deepcopy(model).double()
    before = merged[0].weight.detach().clone()
    peftlib.eject(merged, merge=True)
    return (merged[0].weight.detach() - before).flatten(1), before.flatten(1)


def check_spectrum(numbers: dict[str, float], delta: Tensor, rank: int, tolerance: float) -> None:
    """The tolerance: an eigenvalue of a [rank, rank] product is within some eps of the largest, whose root is σ₁."""
    values = torch.linalg.svdvals(delta)[:rank]
    largest = values[0]
    assert numbers["default/0/stable_rank"] == pytest.approx(float((values / largest).square().sum()), rel=tolerance)
    share = float((values >= 0.01 * largest).double().sum()) / rank
    assert numbers["default/0/rank_share"] == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize("config", [{}, {"rank_stabilized": True, "alpha": 3.0}, {"init": "pissa"}], ids=str)
@pytest.mark.parametrize("host", HOSTS)
def test_the_numbers_of_lora_are_those_of_the_dense_change(host, config):
    model = adapted(HOSTS[host](), rank=3, **config)
    numbers, (delta, weight) = peftlib.monitor(model), dense(model)
    # Sums of at most 144 products in float64, one after another: 144 eps is 3e-14.
    assert numbers["default/0/delta_norm"] == pytest.approx(float(delta.norm()), rel=1e-12)
    assert numbers["default/0/delta_ratio"] == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-12)
    if config.get("init") != "pissa":
        check_spectrum(numbers, delta, 3, 1e-11)


def test_a_pair_in_float32_is_measured_in_float64():
    model = adapted(nn.Linear(300, 200), dtype=torch.float32, rank=8)
    numbers, (delta, weight) = peftlib.monitor(model), dense(model)
    assert numbers["default/0/delta_norm"] == pytest.approx(float(delta.norm()), rel=1e-12)
    check_spectrum(numbers, delta, 8, 1e-11)
    # The frozen weight's norm is summed in its own float32: 60,000 squares, each rounded once.
    assert numbers["default/0/delta_ratio"] == pytest.approx(float(delta.norm() / weight.norm()), rel=2e-6)


def test_rank_that_is_not_used_shows():
    model = adapted(nn.Linear(12, 7), rank=4)
    with torch.no_grad():
        model[0].adapters["default"].lora_B[:, 1:] *= 1e-4
    numbers, (delta, _) = peftlib.monitor(model), dense(model)
    assert numbers["default/0/rank_share"] == 0.25
    check_spectrum(numbers, delta, 4, 1e-11)


def test_a_stack_of_experts_is_the_mean_of_its_matrices():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 5, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.up.sum(0).t()

    model = adapted(Experts(), rank=2)
    numbers = peftlib.monitor(model)
    pair = model[0].adapters["default"]
    deltas = (pair.scale * pair.lora_B @ pair.lora_A).detach()
    values = torch.linalg.svdvals(deltas)[:, :2]
    assert numbers["default/0.up/stable_rank"] == pytest.approx(
        float((values / values[:, :1]).square().sum(-1).mean()), rel=1e-11
    )
    assert numbers["default/0.up/delta_norm"] == pytest.approx(float(deltas.norm()), rel=1e-12)


@pytest.mark.parametrize("kind", [DoRA, Full, IA3, Gain], ids=lambda kind: kind.__name__)
def test_another_type_is_measured_by_its_merged_weight(kind):
    model = adapted(nn.Linear(12, 7, bias=False), kind)
    numbers, (delta, weight) = peftlib.monitor(model), dense(model)
    assert numbers["default/0/delta_norm"] == pytest.approx(float(delta.norm()), rel=1e-12)
    assert numbers["default/0/delta_ratio"] == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-12)
    assert "default/0/stable_rank" not in numbers


@pytest.mark.parametrize("kind", [Bottleneck, Prompt], ids=lambda kind: kind.__name__)
def test_a_type_without_a_merged_weight_has_what_it_has(kind):
    model = adapted(nn.Embedding(9, 6), kind)
    numbers = peftlib.monitor(model)
    norm = math.sqrt(sum(float(p.detach().square().sum()) for p in peftlib.parameters(model)))
    assert numbers["default/0/parameter_norm"] == pytest.approx(norm, rel=1e-12)
    assert not any("delta" in key or "rank" in key for key in numbers)


def test_gradients_and_drift_are_those_of_the_parameters():
    model = adapted(nn.Linear(12, 7), rank=3)
    own = [*peftlib.parameters(model)]
    assert peftlib.monitor(model)["default/0/gradient_norm"] == 0
    model(torch.ones(2, 12, dtype=torch.float64)).square().sum().backward()
    before = torch.cat([p.detach().flatten() for p in own])
    gradient = torch.cat([p.grad.flatten() for p in own])
    torch.optim.SGD(own, lr=0.1).step()
    after = torch.cat([p.detach().flatten() for p in own])
    numbers = peftlib.monitor(model)
    assert numbers["default/0/gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-12)
    assert numbers["default/0/drift"] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-12)
    assert peftlib.monitor(model)["default/0/drift"] == 0


def test_dead_terms_are_counted():
    model = chain(nn.Linear(12, 7))
    peftlib.inject(model, "0", LoRA, rank=4)
    assert peftlib.monitor(model)["default/0/dead_share"] == 1
    with torch.no_grad():
        model[0].adapters["default"].lora_B[:, 0] = 1.0
        model[0].adapters["default"].lora_B[:, 1] = 1e-30
    assert peftlib.monitor(model)["default/0/dead_share"] == 0.5


def test_a_parameter_that_is_zero_and_gets_no_gradient_is_dead():
    model = chain(nn.Linear(4, 4), nn.ReLU())
    peftlib.inject(model, "0", Full)
    own = model[0].adapters["default"].own
    with torch.no_grad():
        own.weight.zero_()
        own.bias.fill_(-1.0)
    assert peftlib.monitor(model)["default/0/dead_share"] == 0, "no gradient is known yet"
    model(torch.ones(1, 4)).sum().backward()
    assert peftlib.monitor(model)["default/0/dead_share"] == 0.5


def test_the_numbers_of_an_adapter_are_those_of_all_its_modules():
    model = moved(network_with_pairs())
    numbers = peftlib.monitor(model)
    parts = [key.rsplit("/", 1)[0] for key in numbers if key.startswith("a/") and key.endswith("/delta_norm")]
    parts.remove("a")
    assert len(parts) == 4
    for number in ("delta_norm", "parameter_norm", "gradient_norm"):
        whole = math.sqrt(sum(numbers[f"{part}/{number}"] ** 2 for part in parts))
        assert numbers[f"a/{number}"] == pytest.approx(whole, rel=1e-9)
    weights = sum((numbers[f"{part}/delta_norm"] / numbers[f"{part}/delta_ratio"]) ** 2 for part in parts)
    assert numbers["a/delta_ratio"] == pytest.approx(numbers["a/delta_norm"] / math.sqrt(weights), rel=1e-9)


def network_with_pairs() -> nn.Module:
    model = network(layers=2)
    peftlib.inject(model, ["q_proj", "v_proj"], LoRA, rank=2, name="a")
    peftlib.inject(model, "head", Full, name="b")
    return model


def test_a_call_gives_plain_numbers_under_the_same_keys_and_touches_nothing(tmp_path):
    model = network_with_pairs()
    before = snapshot(model)
    first = peftlib.monitor(model)
    assert snapshot(model) == before
    model(torch.randint(0, 11, (2, 5))).sum().backward()
    second = peftlib.monitor(model)
    assert list(first) == list(second)
    assert all(type(value) is float and math.isfinite(value) for value in second.values())
    assert json.loads(json.dumps(second)) == second
    with open(tmp_path / "log.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=first)
        writer.writeheader()
        writer.writerows([first, second])
    with open(tmp_path / "log.csv", newline="") as file:
        assert [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)] == [first, second]


def test_one_name_alone():
    numbers = peftlib.monitor(network_with_pairs(), "b")
    assert {key.split("/")[0] for key in numbers} == {"b"}


def test_two_weights_of_one_module_are_told_apart():
    model = chain(nn.LSTM(4, 4))
    peftlib.inject(model, nn.LSTM, LoRA, rank=2)
    numbers = peftlib.monitor(model)
    assert {"default/0.weight_ih_l0/delta_norm", "default/0.weight_hh_l0/delta_norm"} <= numbers.keys()


def test_a_weight_that_is_written_to_is_measured_again():
    model = adapted(nn.Linear(12, 7), rank=3)
    ratio = peftlib.monitor(model)["default/0/delta_ratio"]
    with torch.no_grad():
        model[0].weight *= 2
    assert peftlib.monitor(model)["default/0/delta_ratio"] == pytest.approx(ratio / 2, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [LoRA, DoRA, IA3, Full], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("host", EVERY_HOST, ids=lambda host: host.name)
def test_on_every_host_the_norm_is_that_of_what_merging_changes(host, kind):
    model, config = host.model(torch.float64), {"rank": 2, **host.lora} if issubclass(kind, LoRA) else {}
    try:
        peftlib.inject(model, host.target, kind, **config)
        after = dict(peftlib.merged_state_dict(moved(model)))
    except peftlib.AdapterError:
        return  # of this type, or of merging, on such a host: their own tests say which
    state = {key: tensor for key, tensor in model.state_dict(keep_vars=True).items() if key in after}
    once = {id(tensor): key for key, tensor in state.items() if tensor.is_floating_point()}
    squares = [float((after[key] - state[key].detach()).square().sum()) for key in once.values()]
    assert peftlib.monitor(model)["default/delta_norm"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-9)


@pytest.mark.parametrize("base", ["torchao int8 weight-only", "bitsandbytes 4-bit FP4"])
def test_beside_a_quantized_weight_there_is_no_ratio(base):
    model = quantised.chain()
    model[0] = quantised.BY_NAME[base].pack(model[0])
    peftlib.inject(model, "0", LoRA, rank=2)
    numbers = peftlib.monitor(moved(model))
    assert numbers["default/0/delta_norm"] > 0
    assert numbers["default/0/stable_rank"] > 0
    assert not any("ratio" in key for key in numbers)


class Largest(TorchDispatchMode):
    """How many elements the largest tensor has that any operation gives."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, (list, tuple)) else [out]
        self.size = max([self.size, *(tensor.numel() for tensor in made if isinstance(tensor, Tensor))])
        return out


def test_lora_is_measured_without_a_matrix_of_the_weights_size():
    model = adapted(nn.Linear(60, 50), dtype=torch.float32, rank=2)
    with Largest() as largest:
        peftlib.monitor(model)
    assert 0 < largest.size <= 2 * 60


def test_what_is_merged_or_has_no_adapters_is_refused():
    model = adapted(nn.Linear(12, 7), rank=3)
    with refused(model, "absent"):
        peftlib.monitor(model, "absent")
    peftlib.merge(model)
    with refused(model, "monitor", "unmerge"):
        peftlib.monitor(model)
    with refused(nn.Linear(2, 2), "Linear"):
        peftlib.monitor(nn.Linear(2, 2))

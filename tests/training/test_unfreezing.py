"""Gradual unfreezing: a frozen group stands still to the bit, an unfrozen one trains, a resumed run is the same run."""

import copy
import dataclasses
import doctest
import gc
import inspect
import json
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, OneCycleLR, ReduceLROnPlateau

import peftlib
from peftlib import Full, GradualUnfreezing, LoRA, SlantedTriangular, schedules
from support.helpers import bits, network, tokens
from support.refusals import refused

LAYERS = 3
GROUPS = ["embedding", "layers.0", "layers.1", "layers.2", "head"]


def sgd(groups: Any) -> Any:
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1)


def adamw(groups: Any, **options: Any) -> Any:
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1, **options)


OPTIMIZERS = {
    "SGD": sgd,
    "SGD, one at a time": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=False),
    "AdamW": adamw,
    "AdamW, foreach": lambda groups: adamw(groups, foreach=True),
    "AdamW, fused": lambda groups: adamw(groups, fused=True),
    "AdamW, amsgrad": lambda groups: adamw(groups, amsgrad=True),
}
SCHEDULES = {
    "every": lambda: schedules.every(2),
    "milestones": lambda: schedules.milestones([1, 4, 4, 7]),
    "linear": lambda: schedules.linear(10),
    "cosine": lambda: schedules.cosine(10),
    "chain-thaw": lambda: schedules.chain_thaw(schedules.every(2)),
    "plateau": lambda: schedules.plateau(2, restore=True),
    "chain-thaw by plateau": lambda: schedules.chain_thaw(schedules.plateau(1, restore=True)),
}
RATES: dict[str, Callable[[Any], Any]] = {
    "no scheduler": lambda optimizer: None,
    "slanted triangle": lambda optimizer: SlantedTriangular(optimizer, total_steps=20, cut_frac=0.3),
    "from the rate before": lambda optimizer: ExponentialLR(optimizer, 0.9),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 7),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, 0.1, total_steps=20),
    "on plateau": lambda optimizer: ReduceLROnPlateau(optimizer, patience=1),
}
every_optimizer = pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
every_schedule = pytest.mark.parametrize("make_schedule", SCHEDULES.values(), ids=SCHEDULES)


class Run:
    """A model, its optimizer, a rate's scheduler and an unfreezing; `train` goes on with them."""

    def __init__(
        self,
        schedule: Any,
        make_optimizer: Any = adamw,
        rate: Any = RATES["no scheduler"],
        model: Any = None,
        set_to_none: bool = True,
        **options: Any,
    ) -> None:
        self.model = network(layers=LAYERS).train() if model is None else model
        self.groups = peftlib.layer_groups(self.model)
        self.optimizer = make_optimizer(peftlib.discriminative_lr(self.groups, lr=0.05, decay=1.5))
        self.rate = rate(self.optimizer)
        self.unfreezing = GradualUnfreezing(self.groups, schedule, self.optimizer, **options)
        self.set_to_none = set_to_none
        self.step = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad(self.set_to_none)
            loss = loss_of(self.model, self.step)
            loss.backward()
            self.optimizer.step()
            if isinstance(self.rate, ReduceLROnPlateau):
                self.rate.step(loss.item())
            elif self.rate is not None:
                self.rate.step()
            by_metric = self.unfreezing.schedule.times is None
            self.unfreezing.step(metric(self.step) if by_metric else None)
            self.step += 1

    def save(self) -> Any:
        parts = [self.model, self.optimizer, self.unfreezing, self.rate]
        state = {str(at): part.state_dict() for at, part in enumerate(parts) if part is not None}
        return pickle.loads(pickle.dumps({**state, "step": self.step}))

    def load(self, state: Any) -> None:
        parts = [self.model, self.optimizer, self.unfreezing, self.rate]
        for at, part in enumerate(parts):
            if part is not None:
                part.load_state_dict(state[str(at)])
        self.step = state["step"]

    def bits(self) -> dict[str, Any]:
        found: dict[str, Any] = {f"model {key}": bits(t) for key, t in self.model.state_dict().items()}
        names = {p: name for name, p in self.model.named_parameters()}
        for p, state in self.optimizer.state.items():
            found |= {f"{names[p]} {key}": bits(torch.as_tensor(value)) for key, value in state.items()}
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return {**found, "rates": rates, "unfrozen": self.unfreezing.unfrozen, "finished": self.unfreezing.finished}


def loss_of(model: Any, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    found = model(torch.randint(0, 11, (4, 5), generator=generator))
    return nn.functional.cross_entropy(found.flatten(0, 1), torch.randint(0, 3, (20,), generator=generator))


def metric(step: int) -> float:
    """Falls, stays, and rises by turns; some are not a number."""
    return float("nan") if step % 5 == 4 else [1.0, 0.8, 0.9, 0.7, 0.0, 0.6, 0.9, 0.9][step % 8] - 0.01 * (step // 8)


def values(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def names_that_moved(before: dict[str, Tensor], model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if bits(p) != bits(before[name])}


def names_in(run: Run, groups: list[str]) -> set[str]:
    return {name for group in run.groups if group.name in groups for name in group.parameters}


# ---- frozen and unfrozen


@pytest.mark.parametrize("set_to_none", [True, False])
@every_optimizer
@every_schedule
def test_exactly_the_unfrozen_groups_move_at_every_step(make_schedule, make_optimizer, set_to_none):
    run = Run(without_restore(make_schedule()), make_optimizer, set_to_none=set_to_none)
    seen = set()
    for _ in range(24):
        before, unfrozen = values(run.model), run.unfreezing.unfrozen
        seen.add(tuple(unfrozen))
        run.train(1)
        assert names_that_moved(before, run.model) == names_in(run, unfrozen)
    assert len(seen) >= 4


def without_restore(schedule: Any) -> Any:
    """A restore moves weights too, which is what it is for; it has a test of its own."""
    return dataclasses.replace(schedule, restore=False)


@every_optimizer
def test_a_group_has_no_state_in_the_optimizer_until_it_unfreezes(make_optimizer):
    run = Run(schedules.every(2), make_optimizer)
    for _ in range(10):
        run.train(1)
        trained = {name for name, p in run.model.named_parameters() if run.optimizer.state.get(p)}
        # The group that was unfrozen at the end of this step has not trained yet.
        steps = run.step
        assert trained == names_in(run, GROUPS[max(0, LAYERS + 1 - (steps - 1) // 2) :])


@every_optimizer
def test_a_group_that_is_frozen_again_keeps_its_momentum_and_stands_still(make_optimizer):
    run = Run(schedules.chain_thaw(schedules.every(2)), make_optimizer)
    run.train(2)
    head = run.model.head.weight
    assert run.unfreezing.unfrozen == ["embedding"]
    weight, state = bits(head), {key: bits(torch.as_tensor(v)) for key, v in run.optimizer.state[head].items()}
    assert state
    run.train(8)
    assert run.unfreezing.unfrozen == GROUPS
    assert bits(head) == weight
    assert {key: bits(torch.as_tensor(v)) for key, v in run.optimizer.state[head].items()} == state
    run.train(1)
    assert bits(head) != weight


def torch_optimizers() -> Iterator[Any]:
    for name, kind in inspect.getmembers(torch.optim, inspect.isclass):
        if issubclass(kind, torch.optim.Optimizer) and name not in {"Optimizer", "SparseAdam", "Muon", "LBFGS"}:
            yield pytest.param(kind, id=name)


@pytest.mark.parametrize("kind", list(torch_optimizers()))
def test_every_optimizer_of_torch_passes_over_a_frozen_group(kind):
    decay = {"weight_decay": 0.1} if "weight_decay" in inspect.signature(kind).parameters else {}
    run = Run(schedules.chain_thaw(schedules.every(2)), lambda groups: kind(groups, **decay))
    for _ in range(11):
        before, unfrozen = values(run.model), run.unfreezing.unfrozen
        run.train(1)
        frozen = set(before) - names_in(run, unfrozen)
        assert not names_that_moved(before, run.model) & frozen


def test_a_second_order_optimizer_leaves_a_frozen_group_where_it_is():
    """LBFGS wants one group and a closure; it reads a gradient that is missing as zero."""
    model = network(layers=LAYERS)
    groups = peftlib.layer_groups(model)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)
    unfreezing = GradualUnfreezing(groups, schedules.every(1), optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    for _ in range(len(groups)):
        before, unfrozen = values(model), unfreezing.unfrozen
        optimizer.step(closure)
        assert names_that_moved(before, model) == {name for g in groups if g.name in unfrozen for name in g.parameters}
        unfreezing.step()


def test_muon_and_adamw_side_by_side():
    """Muon takes matrices alone, so a second optimizer has the rest; each passes over what is frozen."""
    model = network(layers=LAYERS)
    groups = peftlib.layer_groups(model)
    matrices = torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=0.01, weight_decay=0.1)
    rest = torch.optim.AdamW([p for p in model.parameters() if p.dim() != 2], lr=0.01, weight_decay=0.1)
    unfreezing = GradualUnfreezing(groups, schedules.chain_thaw(schedules.every(1)))
    for step in range(6):
        before, unfrozen = values(model), unfreezing.unfrozen
        loss_of(model, step).backward()
        matrices.step()
        rest.step()
        assert names_that_moved(before, model) == {name for g in groups if g.name in unfrozen for name in g.parameters}
        model.zero_grad()
        unfreezing.step()


def test_a_gradient_that_arrives_after_the_freeze_moves_nothing():
    run = Run(schedules.chain_thaw(schedules.every(1)))
    loss = loss_of(run.model, 0)
    run.unfreezing.step()
    loss.backward()
    before = values(run.model)
    run.optimizer.step()
    assert names_that_moved(before, run.model) == set()


def test_what_something_else_makes_trainable_still_stands_still():
    run = Run(schedules.every(2))
    run.model.requires_grad_(True)
    before = values(run.model)
    run.train(1)
    assert names_that_moved(before, run.model) == names_in(run, ["head"])


def test_the_second_of_two_parameters_of_equal_value_trains():
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.eye(4))
            layer.bias.zero_()
    groups = peftlib.layer_groups(model)
    optimizer = torch.optim.SGD(peftlib.discriminative_lr(groups, 0.1, decay=1))
    unfreezing = GradualUnfreezing(groups, schedules.every(1), optimizer)
    for _ in range(3):
        before = values(model)
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
        assert names_that_moved(before, model) == {
            f"{at}.{leaf}" for at in unfreezing.unfrozen for leaf in ("weight", "bias")
        }
        unfreezing.step()
    assert unfreezing.finished


def test_a_frozen_group_takes_no_backward_pass():
    """What lies below the lowest unfrozen group is not differentiated at all, which is where the time is saved."""
    run = Run(schedules.every(1))
    assert run.model.layers[2](torch.randn(1, 5, 8)).grad_fn is None
    run.train(1)
    assert run.model.layers[2](torch.randn(1, 5, 8)).grad_fn is not None
    assert run.model.layers[1](torch.randn(1, 5, 8)).grad_fn is None


# ---- the schedule


def test_stages_by_hand():
    expected = {
        "every": [(0, "4"), (2, "34"), (4, "234"), (6, "1234"), (8, "01234")],
        "milestones": [(0, "4"), (1, "34"), (4, "1234"), (7, "01234")],
        "linear": [(0, "4"), (2, "34"), (4, "234"), (6, "1234"), (8, "01234")],
        # 10 acos(1 - 2 i / 5) / pi = 2.95, 4.36, 5.64, 7.05
        "cosine": [(0, "4"), (3, "34"), (4, "234"), (6, "1234"), (7, "01234")],
        "chain-thaw": [(0, "4"), (2, "0"), (4, "1"), (6, "2"), (8, "3"), (10, "01234")],
    }
    for name, stages in expected.items():
        run = Run(SCHEDULES[name]())
        for step in range(12):
            unfrozen = next(groups for start, groups in reversed(stages) if start <= step)
            assert run.unfreezing.unfrozen == [GROUPS[int(at)] for at in unfrozen], (name, step)
            assert run.unfreezing.frozen == [each for each in GROUPS if each not in run.unfreezing.unfrozen]
            assert run.unfreezing.finished == (unfrozen == "01234")
            run.unfreezing.step()


def test_plateau_by_hand():
    unfreezing = Run(schedules.plateau(2, threshold=0.1)).unfreezing
    #          best  not by 0.1  move  best                       move      best  nan            move
    metrics = [1.0, 0.95, 0.92, 0.8, 0.8, 0.71, 0.6, float("nan"), 0.9, 0.9, 0.9]
    unfrozen = [1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 5]
    for given, count in zip(metrics, unfrozen, strict=True):
        unfreezing.step(given)
        assert len(unfreezing.unfrozen) == count, given
    unfreezing.step(0.9)
    assert not unfreezing.finished
    unfreezing.step(torch.tensor(0.9))
    assert unfreezing.finished


def test_plateau_of_a_metric_that_rises():
    unfreezing = Run(schedules.plateau(1, highest=True)).unfreezing
    for given, count in [(float("nan"), 2), (0.5, 2), (0.6, 2), (0.6, 3), (0.7, 3), (0.1, 4)]:
        unfreezing.step(given)
        assert len(unfreezing.unfrozen) == count


def test_a_plateau_brings_the_best_weights_and_statistics_back():
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2)))
    groups = peftlib.layer_groups(model)
    unfreezing = GradualUnfreezing(groups, schedules.plateau(1, restore=True))

    @torch.no_grad()
    def drift() -> None:
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1)
        model(torch.randn(8, 4))

    def now() -> dict[str, bytes]:
        return {key: bits(tensor) for key, tensor in model.state_dict().items()}

    drift()
    best = now()
    unfreezing.step(1.0)
    drift()
    assert now() != best
    unfreezing.step(2.0)
    assert now() == best
    assert unfreezing.unfrozen == ["0", "1"]
    drift()  # the lower group too, and it never improves
    unfreezing.step(3.0)
    assert now() == best
    assert unfreezing.finished


def test_without_restore_nothing_is_kept():
    run = Run(schedules.plateau(1))
    run.train(3)
    assert run.unfreezing.state_dict()["best"]["kept"] == {}


@pytest.mark.parametrize("counted", ["steps", "epochs"])
def test_a_schedule_counts_whatever_step_is_called_for(counted):
    run = Run(schedules.every(1))
    for _ in range(2):
        for at in range(3):
            before = run.unfreezing.unfrozen
            loss_of(run.model, at).backward()
            run.optimizer.step()
            if counted == "steps":
                run.unfreezing.step()
                assert len(run.unfreezing.unfrozen) == min(len(before) + 1, len(GROUPS))
        if counted == "epochs":
            run.unfreezing.step()
    assert len(run.unfreezing.unfrozen) == (5 if counted == "steps" else 3)


# ---- resume


@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
@pytest.mark.parametrize("make_optimizer", [sgd, adamw], ids=["SGD", "AdamW"])
@every_schedule
def test_a_resumed_run_is_the_same_to_the_bit_from_every_step(make_schedule, make_optimizer, rate):
    steps = 14
    whole = Run(make_schedule(), make_optimizer, rate, warmup=3)
    saved, expected = [whole.save()], [whole.bits()]
    for _ in range(steps):
        whole.train(1)
        saved.append(whole.save())
        expected.append(whole.bits())
    assert len({tuple(each["unfrozen"]) for each in expected}) >= 4
    for at, state in enumerate(saved):
        resumed = Run(make_schedule(), make_optimizer, rate, warmup=3, model=network(seed=9, layers=LAYERS).train())
        resumed.load(state)
        assert resumed.bits() == expected[at]
        resumed.train(min(3, steps - at))
        assert resumed.bits() == expected[min(at + 3, steps)], f"resumed at {at}"


def test_a_run_that_is_loaded_back_into_itself_freezes_again():
    run = Run(schedules.every(2))
    start = run.save()
    run.train(9)
    assert run.unfreezing.unfrozen == GROUPS
    run.load(start)
    assert run.unfreezing.unfrozen == ["head"]
    assert not any(p.requires_grad for p in run.model.layers.parameters())
    before = values(run.model)
    run.train(1)
    assert names_that_moved(before, run.model) == names_in(run, ["head"])


def test_without_restore_the_state_is_plain_values():
    run = Run(schedules.plateau(2), warmup=2)
    run.train(7)
    state = run.unfreezing.state_dict()
    assert json.loads(json.dumps(state)) == state


# ---- warm-up


@pytest.mark.parametrize("rate", [RATES["no scheduler"], RATES["from the rate before"], RATES["slanted triangle"]])
def test_a_warm_up_multiplies_the_rate_during_the_step_alone(rate):
    """Plain SGD moves a weight by rate times gradient: the rate that acted can be read off."""
    run = Run(schedules.every(4), lambda groups: torch.optim.SGD(groups, lr=1.0), rate, warmup=2)
    twin = Run(schedules.every(4), lambda groups: torch.optim.SGD(groups, lr=1.0), rate)
    unfrozen_at = dict(zip(reversed(GROUPS), range(0, 20, 4), strict=True))
    for step in range(20):
        rates = {group["name"]: group["lr"] for group in run.optimizer.param_groups}
        run.optimizer.zero_grad()
        loss_of(run.model, step).backward()
        before = values(run.model)
        run.optimizer.step()
        for group in run.groups:
            for name, p in group.parameters.items():
                since = step - unfrozen_at[group.name]
                if since < 0 or p.grad is None:
                    continue
                factor = (since + 1) / 3 if group.name != "head" and since < 2 else 1.0
                expected = before[name] - rates[group.name] * factor * p.grad
                # one multiplication and one subtraction, each rounded once: two units in the last place
                assert (p - expected).abs().max() <= 2 * torch.finfo(p.dtype).eps * expected.abs().max(), name
        for each in (run, twin):
            if each.rate is not None:
                if each is twin:
                    each.optimizer.step()
                each.rate.step()
            each.unfreezing.step()
        assert [group["lr"] for group in run.optimizer.param_groups] == [
            group["lr"] for group in twin.optimizer.param_groups
        ]


def test_a_step_that_fails_leaves_no_rate_behind():
    run = Run(schedules.every(1), warmup=5)
    run.train(2)
    rates = [group["lr"] for group in run.optimizer.param_groups]
    with pytest.raises(ZeroDivisionError):
        run.optimizer.step(lambda: 1 / 0)
    run.train(1)
    assert [group["lr"] for group in run.optimizer.param_groups] == rates


def test_a_rate_that_is_a_tensor_stays_that_tensor():
    model = network(layers=LAYERS)
    groups = peftlib.layer_groups(model)
    rates = [torch.tensor(0.1) for _ in groups]
    optimizer = torch.optim.SGD(
        [{**each, "lr": r} for each, r in zip(peftlib.discriminative_lr(groups, 0.1), rates, strict=True)],
        foreach=False,
    )
    unfreezing = GradualUnfreezing(groups, schedules.every(1), optimizer, warmup=3)
    unfreezing.step()
    loss_of(model, 0).backward()
    optimizer.step()
    assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
    assert [rate.item() for rate in rates] == [pytest.approx(0.1)] * len(rates)


# ---- running statistics


class Convolution(nn.Module):
    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm1d(4, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


def convolutions(**options: Any) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(*(Convolution(**options) for _ in range(3)))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("hold", [True, False])
def test_statistics_of_frozen_groups_stand_still_by_choice(hold, affine):
    model = convolutions(affine=affine)
    unfreezing = GradualUnfreezing(peftlib.layer_groups(model), schedules.every(1), hold_statistics=hold)
    for _ in range(4):
        model.train()
        before = {key: bits(buffer) for key, buffer in model.named_buffers()}
        unfrozen = unfreezing.unfrozen
        model(torch.randn(8, 4, 5))
        changed = {key for key, buffer in model.named_buffers() if bits(buffer) != before[key]}
        assert {key[0] for key in changed} == (set(unfrozen) if hold else {"0", "1", "2"})
        assert all(module.training for module in model.modules())
        unfreezing.step()


def test_a_frozen_group_normalises_by_what_it_holds():
    model = convolutions()
    x = torch.randn(8, 4, 5)
    expected = copy.deepcopy(model[0]).eval()(x)
    unfreezing = GradualUnfreezing(peftlib.layer_groups(model), schedules.every(1))
    model.train()
    assert torch.equal(model[0](x), expected)
    unfreezing.remove()
    assert not torch.equal(model[0](x), expected)


def test_a_forward_that_fails_leaves_the_mode_as_it_was():
    model = convolutions()
    GradualUnfreezing(peftlib.layer_groups(model), schedules.every(1))
    with pytest.raises(ValueError, match="expected 2D or 3D"):
        model[0].norm(torch.ones(2, 4, 3, 3, 3))
    assert model[0].norm.training


def test_statistics_hold_under_compile_checkpointing_deepcopy_and_pickle():
    model = convolutions()
    unfreezing = GradualUnfreezing(peftlib.layer_groups(model), schedules.every(1))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for run in (
        compiled,
        lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ):
        held = bits(model[0].norm.running_mean)
        run(torch.randn(8, 4, 5)).sum().backward()
        assert bits(model[0].norm.running_mean) == held
    unfreezing.step()
    unfreezing.step()
    held = bits(model[0].norm.running_mean)
    compiled(torch.randn(8, 4, 5))
    assert bits(model[0].norm.running_mean) != held


# ---- the rest of peftlib


def test_adapters_unfreeze_by_depth_and_the_base_never_does():
    model = network(layers=LAYERS)
    peftlib.inject(model, ["q_proj", "v_proj"], LoRA, rank=2)
    peftlib.inject(model, "head", Full)
    base = {name: bits(p) for name, p in model.named_parameters() if ".adapters." not in name}
    run = Run(schedules.every(2), model=model)
    assert [group.name for group in run.groups] == GROUPS[1:]
    for _ in range(10):
        before, unfrozen = values(model), run.unfreezing.unfrozen
        run.train(1)
        changed = names_that_moved(before, model)
        assert changed <= names_in(run, unfrozen)
        assert {name for name in names_in(run, unfrozen) if "lora_B" in name or "head" in name} <= changed
    assert {name: bits(p) for name, p in model.named_parameters() if ".adapters." not in name} == base
    peftlib.eject(model)
    assert all(p.requires_grad for p in model.parameters())


def test_lora_plus_and_a_schedule_go_together():
    model = network(layers=LAYERS)
    peftlib.inject(model, ["q_proj", "v_proj"], LoRA, rank=2)
    groups = peftlib.layer_groups(model)
    plus = peftlib.discriminative_lr(groups, 0.1, times=lambda name, p: 16 if name.endswith("lora_B") else 1)
    optimizer = torch.optim.AdamW(plus)
    unfreezing = GradualUnfreezing(groups, schedules.every(1), optimizer, warmup=2)
    loss_of(model, 0).backward()
    before = values(model)
    optimizer.step()
    assert {name.split(".")[1] for name in names_that_moved(before, model)} == {"2"}
    unfreezing.step()
    assert unfreezing.unfrozen == ["layers.1", "layers.2"]
    own = torch.optim.AdamW(peftlib.lora_plus_groups(model, 0.1))
    with refused(model, "AdamW"):
        GradualUnfreezing(groups, schedules.every(1), own)
    unfreezing.remove()
    own = torch.optim.AdamW(peftlib.lora_plus_groups(model, 0.1))
    assert GradualUnfreezing(groups, schedules.every(1), own).unfrozen == ["layers.2"]


# ---- one schedule at a time


def test_a_second_schedule_takes_the_place_of_the_first():
    run = Run(schedules.every(1), warmup=3)
    run.train(2)
    groups = peftlib.layer_groups(run.model)
    assert [group.name for group in groups] == GROUPS, "what is frozen at the moment trains later"
    second = GradualUnfreezing(groups, schedules.every(1), run.optimizer)
    assert second.unfrozen == ["head"]
    with refused(None, "place", "step"):
        run.unfreezing.step()
    assert len(run.optimizer._optimizer_step_pre_hooks) == 1


def test_remove_leaves_nothing_behind():
    model = convolutions()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    unfreezing = GradualUnfreezing(peftlib.layer_groups(model), schedules.every(1), optimizer)
    unfreezing.remove()
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_an_optimizer_keeps_no_schedule_alive():
    run = Run(schedules.every(1))
    gone = weakref.ref(run.unfreezing)
    del run.unfreezing
    gc.collect()
    assert gone() is None
    loss_of(run.model, 0).backward()
    run.optimizer.step()
    assert [group.name for group in peftlib.layer_groups(run.model)] == GROUPS


# ---- the plan


def test_the_plan_as_a_text():
    assert str(Run(schedules.every(100)).unfreezing.plan).splitlines() == [
        "every 100",
        "from  trains         parameters",
        "----  -------------  ----------",
        "   0  head                   27",
        " 100  and layers.2          179",
        " 200  and layers.1          331",
        " 300  and layers.0          483",
        " 400  and embedding         571",
    ]
    chain = str(Run(schedules.chain_thaw(schedules.plateau(3))).unfreezing.plan)
    assert chain.splitlines()[0] == "chain-thaw, when the metric has not fallen for 3"
    assert [line.split()[1] for line in chain.splitlines()[3:]] == ["head", *GROUPS[:4], "all"]
    fewer = str(Run(schedules.milestones([7])).unfreezing.plan)
    assert fewer.splitlines()[3:] == ["   0  head                  27", "   7  and layers.2         179"]


def test_the_plan_as_a_picture(tmp_path):
    plan = Run(schedules.chain_thaw(schedules.every(10))).unfreezing.plan
    plan.save(tmp_path / "plan.svg")
    root = ElementTree.parse(tmp_path / "plan.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    texts = [each.text for each in root.iter(f"{space}text")]
    assert texts == ["chain-thaw, every 10", *reversed(GROUPS), "0", "10", "20", "30", "40", "50"]
    bars = [each for each in root.iter(f"{space}rect") if each.get("fill") == "#30638e"]
    assert len(bars) == 5 + 5, "a turn for each, then all"
    assert plan._repr_svg_() == (tmp_path / "plan.svg").read_text()


# ---- refusals


def refusals() -> dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]]:
    def build(**changes: Any) -> Callable[[Any], Any]:
        def act(model: Any) -> Any:
            groups = peftlib.layer_groups(model)
            options = {"groups": groups, "schedule": schedules.every(1), **changes}
            return GradualUnfreezing(**{k: v(groups) if callable(v) else v for k, v in options.items()})

        return act

    def frozen_since(model: Any) -> Any:
        groups = peftlib.layer_groups(model)
        model.head.requires_grad_(False)
        try:
            GradualUnfreezing(groups, schedules.every(1))
        finally:
            model.head.requires_grad_(True)

    half = lambda groups: torch.optim.SGD(list(groups[-1].parameters.values()), lr=1.0)  # noqa: E731
    whole = lambda groups: torch.optim.SGD([p for g in groups for p in g.parameters.values()], lr=1.0)  # noqa: E731
    return {
        "no group": (build(groups=[]), ("GradualUnfreezing", "layer_groups(model)")),
        "a parameter in two groups": (
            build(groups=lambda groups: [*groups, groups[-1]]),
            ("head.weight", "'head'", "two"),
        ),
        "what never trains": (
            frozen_since,
            ("head.weight", "'head'", "gradient"),
        ),
        "an optimizer that lacks groups": (
            build(optimizer=half),
            ("SGD", "embedding.weight", "layers.0.norm.weight", "12"),
        ),
        "a warm-up of a group that is several": (
            build(optimizer=whole, warmup=1),
            ("warmup", "0", "head"),
        ),
        "a warm-up without an optimizer": (
            build(warmup=1),
            ("warmup=1", "optimizer="),
        ),
        "a warm-up below zero": (build(warmup=-1), ("warmup=-1",)),
        "too many milestones": (
            build(schedule=schedules.milestones([1, 2, 3, 4, 5])),
            ("1, 2, 3, 4, 5", "4"),
        ),
        "a budget that is too short": (
            build(schedule=schedules.linear(4)),
            ("linear", "4"),
        ),
    }


@pytest.mark.parametrize(("act", "names"), refusals().values(), ids=refusals())
def test_refusals_leave_the_model_as_it_was(act, names):
    model = network(layers=LAYERS)
    with refused(model, *names):
        act(model)
    assert all(p.requires_grad for p in model.parameters())
    loss_of(model, 0).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("act", "names"),
    [
        (lambda: schedules.every(0), ("every", "0", "1")),
        (lambda: schedules.every(1.5), ("every", "1.5")),
        (lambda: schedules.milestones([3, 2]), ("milestones", "[3, 2]")),
        (lambda: schedules.cosine(True), ("cosine", "True")),
        (lambda: schedules.plateau(0), ("plateau", "0")),
        (lambda: schedules.plateau(1, threshold=-1), ("plateau", "threshold=-1")),
    ],
)
def test_schedules_that_make_no_sense(act, names):
    with refused(None, *names):
        act()


def test_a_metric_for_a_schedule_that_goes_by_the_count():
    unfreezing = Run(schedules.every(1)).unfreezing
    with refused(None, "step", '"every 1"', "step()"):
        unfreezing.step(0.5)
    assert unfreezing.unfrozen == ["head"]


@pytest.mark.parametrize("key", ["groups", "schedule"])
def test_a_state_of_something_else(key):
    run = Run(schedules.every(1))
    state = {**Run(schedules.every(1)).unfreezing.state_dict(), "stage": 3, key: "other"}
    with refused(None, "load_state_dict", key, "'other'"):
        run.unfreezing.load_state_dict(state)
    assert run.unfreezing.unfrozen == ["head"]


def test_the_examples_of_the_schedules_run():
    assert doctest.testmod(schedules) == (0, 12)


def test_tokens_reach_every_group():
    """The model of these tests uses every parameter, so that what must move can."""
    model = network(layers=LAYERS)
    model(tokens()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())

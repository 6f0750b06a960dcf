"""`verify` names what does nothing, measures live against merged, and leaves no trace."""

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlib
from peftlib import Full, LoRA
from support.helpers import Gain, Offset, chain, changes, linears, moved, network, snapshot, tokens
from support.refusals import refused

pytestmark = pytest.mark.mutants


class Detached(nn.Module):
    """Its first linear runs but teaches nothing, its third never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.lost, self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + self.lost(x).detach()


def adapted(model: Any, targets: Any = nn.Linear, kind: Any = LoRA, **config: Any) -> Any:
    peftlib.inject(model, targets, kind, **config)
    return model


X = torch.arange(8.0).view(2, 4) / 8

SOUND = {
    "LoRA as it begins": lambda: adapted(linears()),
    "LoRA that has learned": lambda: moved(adapted(linears())),
    "LoRA, pissa": lambda: adapted(linears(), init="pissa", rank=2),
    "Full": lambda: adapted(linears(), kind=Full),
    "Full of zeros": lambda: adapted(zeroed(linears()), "1", Full),
    "only a weight form": lambda: adapted(linears(), kind=Gain),
    "only a call form": lambda: adapted(linears(), kind=Offset),
    "LoRA on a head of zeros": lambda: adapted(zeroed(linears()), "1"),
    "before a normalisation": lambda: adapted(chain(nn.Linear(4, 4), Unit()), "0"),
    "two names": lambda: adapted(adapted(linears(), name="a"), name="b"),
    "several outputs": lambda: adapted(chain(nn.Linear(4, 4), Many()), "0"),
    "in half precision": lambda: adapted(linears().bfloat16()),
}


class Unit(nn.Module):
    """Every output has length one, as embeddings for search have: the sum of its squares is a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1)


class Many(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return {"logits": [x, (x.argmax(-1), x * 2)], "loss": None, "count": 3}


@torch.no_grad()
def zeroed(model: Any) -> Any:
    """The last linear starts at zero, as many heads and residual branches do."""
    model[1].weight.zero_()
    model[1].bias.zero_()
    return model


@pytest.mark.parametrize("make", SOUND.values(), ids=SOUND)
def test_a_sound_model_has_no_problem(make):
    model = make()
    found = peftlib.verify(model, X.to(model[0].weight.dtype))
    assert found, str(found)
    assert found.problems == ()
    assert str(found).startswith("every active adapter runs and learns; the base cannot move\n")


@torch.no_grad()
def dead(model: Any, *keys: str) -> Any:
    for key in keys:
        getattr(model[1].adapters["default"], key).zero_()
    return model


class Spare(LoRA):
    """Holds a factor that its call form forgets."""

    def __init__(self, host: Any, **config: Any) -> None:
        super().__init__(host, **config)
        self.spare = nn.Parameter(torch.zeros(3))


def frozen_adapter() -> Any:
    model = adapted(linears())
    peftlib.train_only(model)
    return model


def unfrozen_base() -> Any:
    model = adapted(linears())
    model[0].bias.requires_grad_(True)
    return model


class Unread(peftlib.Adapter):
    """Keeps a parameter that nothing reads."""

    def __init__(self, host: Any) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(len(host.weight)))
        self.unread = nn.Parameter(torch.ones(2))

    def forward(self, host: Any, call: Any, *args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs) + self.shift


@torch.no_grad()
def silenced(model: Any) -> Any:
    """What comes after gives back nothing of what the adapter does."""
    for parameter in peftlib.parameters(model):
        parameter.add_(0.1)
    model.append(Mute())
    return model


class Mute(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0


PROBLEMS = {
    "did not run": (
        lambda: adapted(Detached(), ["used", "idle"]),
        ['"default" on idle (LoRA) did not run: the model computes its host in another way. '],
    ),
    "got no gradient": (
        lambda: adapted(Detached(), ["used", "lost"]),
        ['"default" on lost (LoRA) got no gradient: '],
    ),
    "both": (
        lambda: adapted(Detached(), nn.Linear, name="x"),
        ['"x" on lost (LoRA) got no gradient', '"x" on idle (LoRA) did not run'],
    ),
    "two dead factors": (
        lambda: dead(adapted(linears()), "lora_A", "lora_B"),
        ['"default" on 1 (LoRA) has a dead factor'],
    ),
    "a dead factor among others": (
        lambda: adapted(linears(), "1", Spare, rank=2),
        ['"default" on 1 (Spare) has a dead factor: spare is all zero and gets no gradient. Reset'],
    ),
    "a factor of zero behind": (
        lambda: silenced(adapted(linears(), "0")),
        ['"default" on 0 (LoRA) got no gradient: every one is zero. Look for a factor of zero behind it.'],
    ),
    "a parameter that is not read": (
        lambda: adapted(linears(), "1", Unread),
        ['"default" on 1 (Unread): unread got no gradient, for the host does not read it. Leave it out.'],
    ),
    "does not train": (
        frozen_adapter,
        [f'"default" on {i} (LoRA) does not train: none of its parameters has requires_grad.' for i in (0, 1)],
    ),
    "a base that trains": (unfrozen_base, ["0.bias of the base trains. Freeze it, or adapt it with Full."]),
    "a root that trains": (
        lambda: adapted(nn.Linear(4, 4), freeze=False),
        ["weight of the base trains.", "bias of the base trains."],
    ),
    "a root that did not run": (
        lambda: adapted(Skipped(), lambda name, module: name == "", Full),
        ['"default" on the root (Full) did not run'],
    ),
}


class Skipped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def __call__(self, x: Tensor) -> Tensor:
        return x * 1

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize(("make", "problems"), PROBLEMS.values(), ids=PROBLEMS)
def test_problems_are_named(make, problems):
    model = make()
    before = snapshot(model)
    found = peftlib.verify(model, X)
    assert not found
    assert len(found.problems) == len(problems), str(found)
    for problem, expected in zip(found.problems, problems, strict=True):
        assert problem.startswith(expected)
    assert all(problem in str(found) for problem in found.problems)
    assert changes(before, model) == []


def test_a_child_that_is_read_in_a_way_that_no_source_shows_is_found():

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.body(x), operator.attrgetter("head.weight")(self))

    (problem,) = peftlib.verify(adapted(Fused()), X).problems
    assert '"default" on head (LoRA) did not run' in problem


def test_adapters_that_are_off_are_not_blamed():
    model = adapted(adapted(Detached(), "idle", name="off"), "used", name="on")
    peftlib.activate(model, "on")
    assert peftlib.verify(model, X)


def test_the_difference_is_that_of_live_and_merged_output():
    model = moved(adapted(linears().bfloat16(), rank=2))
    x = X.bfloat16()
    with torch.no_grad():
        live = model(x).double()
        with peftlib.merged(model):
            expected = (live - model(x).double()).abs().max().item()
    assert expected > 0
    assert peftlib.verify(model, x).difference == expected
    assert f"unmerged and merged differ by {expected:.3g}" in str(peftlib.verify(model, x))


def test_the_difference_is_measured_in_eval_mode_though_the_model_trains():
    model = moved(adapted(chain(nn.Linear(4, 4), nn.Dropout(0.5)), dropout=0.5).train())
    found = peftlib.verify(model, X)
    assert found.difference is not None
    assert found.difference < 1e-6
    assert all(module.training for module in model.modules())


def test_there_is_no_difference_where_a_kind_has_no_weight_form():
    found = peftlib.verify(adapted(linears(), kind=Offset), X)
    assert found.difference is None
    assert "compare" in str(found)


def test_a_difference_is_found_where_call_and_weight_form_disagree():
    class Liar(LoRA):
        def fold(self, host: Any) -> dict[str, Tensor]:
            return {"weight": host.weight + 1}

    assert peftlib.verify(adapted(linears(1), kind=Liar), X).difference == pytest.approx(
        X.sum(-1).max().item(), rel=1e-4
    )


# ---- no trace


class Counting(nn.Module):
    """Buffers of both habits: changed in place, and replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.in_place.add_(1)
        self.replaced = self.replaced + 1
        return x


def busy(*layers: nn.Module) -> Any:
    model = chain(nn.Linear(4, 4), *layers, nn.Linear(4, 4))
    return moved(adapted(model, dropout=0.3))


BUSY = {
    "dropout": lambda: busy(nn.Dropout(0.5)),
    "running statistics": lambda: busy(nn.BatchNorm1d(4)),
    "running statistics of an adapter": lambda: adapted(busy(nn.BatchNorm1d(4)), nn.BatchNorm1d, Full),
    "buffers in place and replaced": lambda: busy(Counting()),
    "mixed training flags": lambda: busy(nn.Dropout(0.5).eval()),
    "in eval mode": lambda: busy(nn.BatchNorm1d(4)).eval(),
    "frozen adapters": lambda: peftlib.train_only(busy()).__enter__(),
    "one of two is active": lambda: peftlib.activate(adapted(busy(), name="b"), "default").__enter__(),
}


@pytest.mark.parametrize("make", BUSY.values(), ids=BUSY)
@pytest.mark.parametrize("gradients", [False, True], ids=["no gradients", "gradients"])
def test_verify_leaves_no_trace(make, gradients):
    model = make()
    if gradients:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    before, random = snapshot(model), torch.get_rng_state()
    x = X.clone()
    peftlib.verify(model, x)
    assert changes(before, model) == []
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, X)
    assert x.grad is None


def test_verify_leaves_no_trace_where_the_model_raises():
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch.rand(1)
            raise KeyError

    model = busy(nn.BatchNorm1d(4), Failing())
    before, random = snapshot(model), torch.get_rng_state()
    with pytest.raises(KeyError):
        peftlib.verify(model, X)
    assert changes(before, model) == []
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_verify_works_inside_other_gradient_modes(context):
    with context():
        assert peftlib.verify(adapted(linears()), X)
        assert torch.is_grad_enabled() == (context is torch.enable_grad)


def test_verify_passes_keywords_on():
    model = adapted(network(), "q_proj")
    assert peftlib.verify(model, tokens=tokens())
    assert peftlib.verify(model, tokens())


def test_verify_beside_a_view_is_refused_or_true():
    """It merges for a moment, which every face would see."""
    model = adapted(linears())
    other = peftlib.view(model)
    before = snapshot(model)
    with refused(None, "1", "view(s)"):
        peftlib.verify(model, X)
    assert changes(before, model) == []
    del other

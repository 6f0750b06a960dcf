"""Loss terms that keep what was known: each against its equation, written by hand in float64."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlib
from peftlib import EWC, L2SP, AdapterError, Full, LoRA
from support.helpers import bits, changes, moved, network, snapshot
from support.refusals import refused


def double(layers: int = 2) -> Any:
    return network(layers=layers).double()


@torch.no_grad()
def shift(model: nn.Module) -> dict[str, Tensor]:
    """Moves every parameter, and returns by how much."""
    shifts = {name: torch.randn(p.shape).to(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.add_(shifts[name])
    return shifts


def close(found: Tensor, expected: Tensor) -> bool:
    """A few hundred float64 terms added in another order: their number times the epsilon, relative to their size."""
    return (found - expected).abs().max().item() <= 1e3 * torch.finfo(torch.float64).eps * expected.abs().max().item()


# ---- L2-SP


def test_l2sp_is_its_equation_and_so_is_its_gradient():
    model = double()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    near = L2SP(model, alpha=0.3, beta=0.2, new="head")
    new = {name for name in start if name.startswith("head.")}
    assert close(near(), sum((0.1 * start[name].square().sum() for name in new), torch.zeros(())))
    shift(model)
    expected = torch.zeros((), dtype=torch.float64)
    for name, p in model.named_parameters():
        scale, origin = (0.2, 0.0) if name in new else (0.3, start[name])
        expected += scale / 2 * ((p.detach() - origin) ** 2).sum()
    omega = near()
    assert omega.shape == ()
    assert close(omega.detach(), expected)
    omega.backward()
    for name, p in model.named_parameters():
        gradient = 0.2 * p.detach() if name in new else 0.3 * (p.detach() - start[name])
        assert close(p.grad, gradient), name


def test_l2sp_is_zero_at_the_start_and_holds_only_its_targets():
    model = double()
    near = L2SP(model, targets=["layers", "head"])
    assert near().item() == 0
    shift(model)
    near().backward()
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None} == {"layers", "head"}


def test_l2sp_counts_a_shared_weight_once():
    model: Any = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)}).double()
    model["head"].weight = model["embedding"].weight
    near = L2SP(model, alpha=1.0)
    with torch.no_grad():
        model["head"].weight.add_(1.0)
    assert close(near().detach(), torch.tensor(7.5, dtype=torch.float64))


def test_l2sp_pulls_back_to_the_start():
    model = double()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    near = L2SP(model, alpha=1.0)
    shift(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        near().backward()
        optimizer.step()
    # Each step halves the distance: 2^-60 of it, far below the last place of the weights.
    for name, p in model.named_parameters():
        assert (p - start[name]).abs().max() <= 2 * torch.finfo(p.dtype).eps * (1 + start[name].abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_term_of_a_half_precision_model_is_in_float32(dtype):
    model = network().to(dtype)
    near = L2SP(model, alpha=1.0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.full_like(p, 0.5))
    omega = near()
    assert omega.dtype == torch.float32
    # In half precision the sum of so many squares would stop growing; each term is exact in float32 up to rounding
    # of the weights themselves, at most half a unit in the last place of 4.
    count = sum(p.numel() for p in model.parameters())
    assert abs(omega.item() / (count * 0.125) - 1) <= 8 * torch.finfo(dtype).eps


def test_a_resumed_term_holds_to_the_same_point():
    model = double()
    near = L2SP(model, new="head")
    shift(model)
    state = pickle.loads(pickle.dumps({"model": model.state_dict(), "near": near.state_dict()}))
    assert "start.layers/0/q_proj/weight" in state["near"]
    fresh = double()
    fresh.load_state_dict(state["model"])
    resumed = L2SP(fresh, new="head")
    resumed.load_state_dict(state["near"])
    assert bits(resumed()) == bits(near())
    assert resumed().item() > 1


def test_a_term_follows_parameters_that_are_replaced():
    """As `load_state_dict(assign=True)`, `fully_shard` and others do."""
    model = double()
    near = L2SP(model)
    model.load_state_dict({key: tensor + 1 for key, tensor in model.state_dict().items()}, assign=True)
    count = sum(p.numel() for p in model.parameters())
    assert close(near().detach(), torch.tensor(0.05 * count, dtype=torch.float64))
    near().backward()
    assert model.head.weight.grad is not None


def test_a_term_owns_no_weight_of_the_model():
    near = L2SP(double())
    assert list(near.parameters()) == []
    twin = copy.deepcopy(near)
    assert twin().item() == 0


# ---- EWC


class Softmax(nn.Module):
    """A linear softmax classifier, whose Fisher information has a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()
        self.idle = nn.Linear(2, 2).double()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.dropout(x)).log_softmax(-1)


def labelled(model: Any, batch: Any) -> Tensor:
    x, labels = batch
    return nn.functional.nll_loss(model(x), labels, reduction="none")


def task() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [
        (
            torch.randn(size, 4, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (size,), generator=generator),
        )
        for size in (5, 1, 7)
    ]


def fisher_by_hand(model: Softmax) -> tuple[Tensor, Tensor]:
    """d -log p(y|x) / dW = (p - onehot(y)) xᵀ, squared and averaged over the 13 examples."""
    weight, bias = torch.zeros(3, 4).double(), torch.zeros(3).double()
    for x, labels in task():
        for row, label in zip(x, labels, strict=True):
            p = torch.softmax(model.linear.weight.detach() @ row + model.linear.bias.detach(), 0)
            p[label] -= 1
            weight += torch.outer(p, row) ** 2 / 13
            bias += p**2 / 13
    return weight, bias


def test_the_fisher_information_is_the_mean_of_squared_gradients_of_single_examples():
    model = Softmax()
    hold = EWC(model, task(), labelled)
    weight, bias = fisher_by_hand(model)
    found = dict(hold.fisher.named_buffers())
    assert close(found["linear/weight"], weight)
    assert close(found["linear/bias"], bias)
    assert found["idle/weight"].abs().max() == 0


def test_ewc_is_its_equation_and_so_is_its_gradient():
    model = Softmax()
    weight, bias = fisher_by_hand(model)
    hold = EWC(model, task(), labelled, strength=7.0)
    assert hold().item() == 0
    shifts = shift(model)
    omega = hold()
    d_weight, d_bias = shifts["linear.weight"], shifts["linear.bias"]
    assert close(omega.detach(), 3.5 * ((weight * d_weight**2).sum() + (bias * d_bias**2).sum()))
    omega.backward()
    assert close(model.linear.weight.grad, 7 * weight * d_weight)
    assert close(model.linear.bias.grad, 7 * bias * d_bias)
    assert model.idle.weight.grad.abs().max() == 0


def test_with_drawn_labels_it_is_the_fisher_information():
    """E_y (p - onehot(y))² = p (1 - p): with many draws the mean comes near; its standard error is below 0.5/√n."""
    model = Softmax()
    x = torch.randn(1, 4, dtype=torch.float64)
    draws = 1000

    def drawn(model: Any, batch: Tensor) -> Tensor:
        log_p = model(batch)
        y = torch.distributions.Categorical(logits=log_p).sample()
        return -log_p.gather(-1, y[:, None])[:, 0]

    hold = EWC(model, [x] * draws, drawn, targets="linear")
    p = torch.softmax(model.linear(x), -1)[0].detach()
    found = dict(hold.fisher.named_buffers())["linear/bias"]
    assert (found - p * (1 - p)).abs().max() <= 5 * 0.5 / math.sqrt(draws)


def test_the_fisher_information_leaves_the_model_as_it_was():
    model = Softmax().train()
    model.idle.eval()
    model.linear.weight.requires_grad_(False)
    model.linear.bias.grad = torch.ones(3).double()
    before = snapshot(model)
    hold = EWC(model, task(), labelled)
    assert changes(before, model) == []
    assert dict(hold.fisher.named_buffers())["linear/weight"].abs().max() > 0, "frozen ones are held too"
    with pytest.raises(KeyError):
        EWC(model, task(), lambda model, batch: {}["missing"])
    assert changes(before, model) == []


def test_ewc_resumes_with_its_fisher_information():
    model = Softmax()
    hold = EWC(model, task(), labelled)
    shift(model)
    again = EWC(model, [(torch.zeros(1, 4).double(), torch.zeros(1, dtype=torch.long))], labelled)
    assert bits(again()) != bits(hold())
    again.load_state_dict(hold.state_dict())
    assert bits(again()) == bits(hold())


def test_terms_go_with_a_schedule():
    model = network()
    groups = peftlib.layer_groups(model)
    near = L2SP(model, alpha=1.0)
    unfreezing = peftlib.GradualUnfreezing(groups, peftlib.schedules.every(1))
    near().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"head.weight", "head.bias"}
    unfreezing.step()
    near().backward()
    assert model.layers[1].q_proj.weight.grad is not None
    assert model.layers[0].q_proj.weight.grad is None


# ---- distill


def adapted() -> Any:
    model = double()
    peftlib.inject(model, ["q_proj", "v_proj"], LoRA, rank=2)
    return moved(model)


def tokens() -> Tensor:
    return torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("masked", [True, False])
def test_distill_is_its_equation_and_so_is_its_gradient(temperature, masked):
    model = adapted()
    z0 = double()(tokens()).detach()
    z = model(tokens())
    z.retain_grad()
    mask = torch.rand(4, 5) < 0.5 if masked else None
    counts = torch.ones(4, 5, dtype=torch.bool) if mask is None else mask
    loss = peftlib.distill(model, z, tokens(), temperature=temperature, mask=mask)
    p0, p = (torch.exp(each / temperature) for each in (z0, z.detach()))
    p0, p = p0 / p0.sum(-1, keepdim=True), p / p.sum(-1, keepdim=True)
    kl = (p0 * (p0.log() - p.log())).sum(-1)
    assert close(loss.detach(), temperature**2 * kl[counts].mean())
    loss.backward()
    # d KL / d z = (p - p0) / T
    gradient = temperature * (p - p0) * counts[..., None] / counts.sum()
    assert close(z.grad, gradient)
    assert all(p.grad is not None for p in peftlib.parameters(model))


def test_distill_is_zero_for_a_model_that_says_what_its_base_says():
    model = double()
    peftlib.inject(model, "q_proj", LoRA, rank=2)
    assert abs(peftlib.distill(model, model(tokens()), tokens()).item()) <= torch.finfo(torch.float64).eps * 20


def test_distill_leaves_the_model_as_it_was():
    model = adapted().train()
    model.layers[0].eval()
    before = snapshot(model)
    given = model(tokens()).detach()
    state = torch.get_rng_state()
    peftlib.distill(model, given, tokens())
    assert changes(before, model) == []
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(AdapterError):
        peftlib.distill(model, given, tokens()[:2])
    with pytest.raises(TypeError):
        peftlib.distill(model, given)
    assert changes(before, model) == []


def test_the_base_is_in_eval_mode_and_keeps_its_statistics():
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    peftlib.inject(model, "0", LoRA, rank=2)
    moved(model).train()
    x = torch.randn(8, 4)
    z = model(x)
    held = bits(model[1].running_mean)
    assert bits(peftlib.distill(model, z, x)) == bits(peftlib.distill(model, z, x))
    assert bits(model[1].running_mean) == held
    assert model.training
    assert model[2].training


def test_a_teacher_may_keep_adapters_of_an_earlier_task():
    model = double()
    peftlib.inject(model, "q_proj", LoRA, rank=2, name="old")
    moved(model)
    old = model(tokens()).detach()
    peftlib.inject(model, "v_proj", LoRA, rank=2, name="new")
    moved(model, "new")
    z = model(tokens()).detach()
    teacher = nn.functional.kl_div(z.log_softmax(-1), old.log_softmax(-1), reduction="none", log_target=True)
    found = peftlib.distill(model, z, tokens(), temperature=1.0, teacher=["old"])
    assert close(found, teacher.sum(-1).mean())
    assert not close(found, peftlib.distill(model, z, tokens(), temperature=1.0))


def test_a_head_of_its_own_is_taught_by_the_head_of_the_base():
    model = double()
    peftlib.inject(model, "head", Full)
    moved(model)
    assert peftlib.distill(model, model(tokens()), tokens()).item() > 0


class Fields(nn.Module):
    def __init__(self, key: str) -> None:
        super().__init__()
        self.head, self.key = nn.Linear(4, 3), key

    def forward(self, input: Tensor) -> Any:
        return type("Output", (), {self.key: self.head(input)})()


def test_logits_are_found_in_what_language_models_return():
    model = Fields("logits")
    peftlib.inject(model, "head", LoRA, rank=2)
    moved(model)
    x = torch.randn(2, 4)
    given = model(x)
    found = peftlib.distill(model, given, input=x)
    assert bits(found) == bits(peftlib.distill(model, given.logits, input=x))
    other = Fields("scores")
    peftlib.inject(other, "head", LoRA, rank=2)
    moved(other)
    assert peftlib.distill(other, other(x), x, output=lambda output: output.scores).item() > 0


# ---- refusals

REFUSALS = {
    "a target that is not there": (lambda: L2SP(double(), targets="tail"), ("targets", "'tail'")),
    "a new part that is not there": (lambda: L2SP(double(), new="tail"), ("targets", "'tail'")),
    "nothing to hold": (
        lambda: L2SP(nn.ReLU()),
        ("targets=()",),
    ),
    "a negative strength": (
        lambda: L2SP(double(), alpha=-1),
        ("alpha=-1",),
    ),
    "an infinite strength": (lambda: EWC(Softmax(), task(), labelled, math.inf), ("strength=inf",)),
    "no example": (
        lambda: EWC(Softmax(), iter(()), labelled),
        ("EWC", "batches"),
    ),
    "one loss for a whole batch": (
        lambda: EWC(Softmax(), task(), lambda model, batch: labelled(model, batch).mean()),
        ("EWC", "losses", "()", 'reduction="none"'),
    ),
    "no adapters": (
        lambda: peftlib.distill(double(), torch.zeros(4, 5, 3), tokens()),
        ("Network", "peftlib.inject(model, ...)"),
    ),
    "other inputs": (
        lambda: peftlib.distill(adapted(), torch.zeros(4, 3), tokens()),
        ("distill", "(4, 3)", "(4, 5, 3)"),
    ),
    "a mask of another shape": (
        lambda: peftlib.distill(adapted(), torch.zeros(4, 5, 3), tokens(), mask=torch.ones(4)),
        ("distill", "mask", "(4,)", "4", "(4, 5)"),
    ),
    "a mask that counts nothing": (
        lambda: peftlib.distill(adapted(), torch.zeros(4, 5, 3), tokens(), mask=torch.zeros(4, 5)),
        ("distill", "mask", "0", "(4, 5)"),
    ),
    "a temperature of zero": (
        lambda: peftlib.distill(adapted(), torch.zeros(4, 5, 3), tokens(), temperature=0),
        ("distill", "temperature=0"),
    ),
    "no logits": (
        lambda: peftlib.distill(adapted(), (torch.zeros(4, 5, 3),), tokens()),
        ("distill", "tuple", "logits", "output="),
    ),
}


@pytest.mark.parametrize(("act", "names"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(act, names):
    with refused(None, *names):
        act()

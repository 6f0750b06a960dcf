"""Adapters added, subtracted and converted: against dense float64 changes, the papers, and HF peft."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlib
from peftlib import IA3, Bottleneck, DoRA, Full, LoRA
from support import reference
from support.faults import fail_at_every_step
from support.helpers import changes, linears, moved, network, snapshot, tokens
from support.refusals import refused

pytestmark = pytest.mark.mutants

WEIGHTS = {"a": 0.7, "b": -0.3}


class Zoo(nn.Module):
    """One host of each layout of factors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.transposed = nn.ConvTranspose1d(8, 8, 3, padding=1, groups=2)
        self.experts = Experts()
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x)[0] + self.experts(self.linear(x))
        return self.norm(self.transposed(self.conv(x.mT)).mT)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btk,nok->bto", x, self.up)


LAYOUTS = {
    "embedding.weight": reference.columns,
    "attention.in_proj_weight": reference.rows,
    "attention.out_proj.weight": reference.rows,
    "linear.weight": reference.rows,
    "conv.weight": reference.rows,
    "transposed.weight": reference.transposed_kernel,
    "experts.up": reference.stack,
}
HOSTS = ["embedding", "attention", "out_proj", "linear", "conv", "transposed", "experts"]


def zoo() -> Any:
    torch.manual_seed(0)
    return Zoo().double().eval()


def two(make: Any = zoo) -> Any:
    """a and b: LoRA of ranks 2 and 3, other scales, one that did not start at zero."""
    model = make()
    peftlib.inject(model, HOSTS, LoRA, rank=2, alpha=3, name="a")
    peftlib.inject(model, HOSTS, LoRA, rank=3, alpha=2, rank_stabilized=True, init="pissa", name="b")
    torch.manual_seed(1)
    return moved(model)


def deltas(model: Any, weights: dict[str, float]) -> dict[str, Tensor]:
    """Σ w (s B A), by hand."""
    found: dict[str, Tensor] = {}
    for host, name, part in peftlib.adapters(model):
        if name not in weights:
            continue
        config, key = part.config, f"{host}.{part.config['param']}"
        weight = model.get_parameter(key).detach()
        scale = config["alpha"] / (config["rank"] ** 0.5 if config["rank_stabilized"] else config["rank"])
        delta = LAYOUTS[key](part.lora_A.detach(), part.lora_B.detach(), weight)
        if config["init"] == "pissa":
            delta = delta - LAYOUTS[key](part.initial_A, part.initial_B, weight)
        found[key] = found.get(key, 0.0) + weights[name] * scale * delta
    return found


def changed(model: Any, name: str) -> dict[str, Tensor]:
    """What one adapter alone makes of each weight, less the weight."""
    base = {key: tensor for key, tensor in model.state_dict().items() if ".adapters." not in f".{key}"}
    merged = dict(peftlib.merged_state_dict(model, name))
    found = {key: merged[key] - base[key] for key in base}
    return {key: delta for key, delta in found.items() if delta.any()}


def equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for key, delta in expected.items():
        torch.testing.assert_close(
            found[key], delta, rtol=0, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_exact_is_the_weighted_sum_on_every_layout_of_factors():
    model = two()
    before = snapshot(model)
    errors = peftlib.combine(model, WEIGHTS, name="c")
    assert errors == dict.fromkeys(LAYOUTS, 0.0)
    assert {type(part) for _, _, part in peftlib.adapters(model, "c")} == {LoRA}
    equal(changed(model, "c"), deltas(model, WEIGHTS))
    with peftlib.activate(model, "c"):
        live = model(tokens() % 9)
    with peftlib.activate(model, WEIGHTS):
        torch.testing.assert_close(live, model(tokens() % 9), rtol=0, atol=1e-11)
    peftlib.eject(model, "c")
    assert changes(before, model) == []


def test_the_new_adapter_is_off_and_trains_when_it_is_chosen():
    model = two()
    y = model(tokens() % 9)
    peftlib.combine(model, WEIGHTS, name="c")
    assert torch.equal(model(tokens() % 9), y)
    with peftlib.activate(model, "c"):
        assert peftlib.verify(model, tokens() % 9)


@pytest.mark.parametrize("rank", [1, 3])
def test_svd_is_the_nearest_of_its_rank_and_says_how_near(rank):
    model = two()
    errors = peftlib.combine(model, WEIGHTS, name="c", method="svd", rank=rank)
    found = changed(model, "c")
    for key, delta in deltas(model, WEIGHTS).items():
        matrix = delta if delta.dim() == 3 and key == "experts.up" else as_matrix(key, delta)
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        nearest = U[..., :rank] * S[..., None, :rank] @ Vh[..., :rank, :]
        made = found[key] if key == "experts.up" else as_matrix(key, found[key])
        torch.testing.assert_close(made, nearest, rtol=0, atol=1e-10)
        assert errors[key] == pytest.approx(((found[key] - delta).norm() / delta.norm()).item(), rel=1e-9)


def as_matrix(key: str, delta: Tensor) -> Tensor:
    """[out, in]; the layouts of columns have it the other way round, which the nearest of a rank does not see."""
    return delta.flatten(1)


def test_a_rank_that_suffices_leaves_nothing_out():
    model = two()
    errors = peftlib.combine(model, WEIGHTS, name="c", method="svd", rank=8)
    assert max(errors.values()) < 1e-14
    assert {part.config["rank"] for _, _, part in peftlib.adapters(model, "c")} == {8}  # 2 + 3 + 3 of "pissa"
    equal(changed(model, "c"), deltas(model, WEIGHTS))


def mixed() -> Any:
    """Other types beside LoRA, one adapter with a head and a norm, on a small network."""
    torch.manual_seed(0)
    model = network().double()
    peftlib.inject(model, ["q_proj", "v_proj"], LoRA, rank=2, name="a")
    peftlib.inject(model, "head", Full, name="a")
    peftlib.inject(model, ["q_proj", "head"], DoRA, rank=1, name="b")
    peftlib.inject(model, "v_proj", IA3, name="b")
    torch.manual_seed(1)
    return moved(model)


def test_types_with_a_merged_weight_add_up_and_factors_stay_factors():
    model = mixed()
    a, b = changed(model, "a"), changed(model, "b")
    expected = {key: 0.7 * a.get(key, torch.zeros(())) - 0.3 * b.get(key, torch.zeros(())) for key in {**a, **b}}
    peftlib.activate(model)
    peftlib.combine(model, WEIGHTS, name="c")
    equal(dict(sorted(changed(model, "c").items())), dict(sorted(expected.items())))
    peftlib.combine(model, {"a": 2.0}, name="d")
    kinds = {host: type(part) for host, _, part in peftlib.adapters(model, "d")}
    assert {kind for host, kind in kinds.items() if host != "head"} == {LoRA}
    assert kinds["head"] is Full


# ---- TIES and DARE


def ties_of_the_paper(tasks: list[Tensor], density: float) -> Tensor:
    """Yadav et al. 2023, algorithm 1, element by element; the task vectors of one weight."""
    kept = []
    for task in tasks:
        limit = task.abs().flatten().sort(descending=True).values[int(density * task.numel()) - 1]
        kept.append(torch.where(task.abs() >= limit, task, torch.zeros_like(task)))
    merged = torch.zeros_like(tasks[0])
    for at in range(merged.numel()):
        values = [task.flatten()[at].item() for task in kept]
        total = sum(values)
        same = [value for value in values if value * total > 0]
        merged.view(-1)[at] = sum(same) / len(same) if same else 0.0
    return merged


def three(width: int = 12) -> Any:
    torch.manual_seed(0)
    model = linears(1, width).double()
    for rank, name in ((1, "a"), (2, "b"), (3, "c")):
        peftlib.inject(model, "0", LoRA, rank=rank, alpha=2, name=name)
    torch.manual_seed(1)
    return moved(model)


def of_one(part: Any) -> Tensor:
    return (part.config["alpha"] / part.config["rank"] * part.lora_B @ part.lora_A).detach()


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 0.5, "b": -1.0, "c": 2.0}], ids=str)
@pytest.mark.parametrize("density", [0.2, 0.75])
def test_ties_is_that_of_the_paper(weights, density):
    model = three()
    tasks = [weights[name] * of_one(part) for name, part in model[0].adapters.items()]
    errors = peftlib.combine(model, weights, name="d", method="ties", density=density)
    equal(changed(model, "d"), {"0.weight": ties_of_the_paper(tasks, density)})
    assert errors == {"0.weight": 0.0}
    low = peftlib.combine(model, weights, name="e", method="ties", density=density, rank=4)
    expected = ties_of_the_paper(tasks, density)
    measured = (changed(model, "e")["0.weight"] - expected).norm() / expected.norm()
    assert low["0.weight"] == pytest.approx(measured.item(), rel=1e-9)


def test_of_the_smallest_density_one_element_is_kept():
    model = three()
    peftlib.combine(model, {"a": 1.0}, name="d", method="ties", density=1e-9)
    found, own = changed(model, "d")["0.weight"], of_one(model[0].adapters["a"])
    assert found.count_nonzero() == 1
    torch.testing.assert_close(found.abs().max(), own.abs().max(), rtol=1e-12, atol=0)


def test_ties_of_equal_weights_is_that_of_hf_peft_on_dense_changes():
    from peft.utils.merge_utils import ties

    model = three()
    tasks = [of_one(part) for part in model[0].adapters.values()]
    expected = ties(tasks, torch.ones(3, dtype=torch.float64), 0.5)
    peftlib.combine(model, dict.fromkeys("abc", 1.0), name="d", method="ties", density=0.5)
    equal(changed(model, "d"), {"0.weight": expected})


def test_dare_keeps_a_share_of_each_change_enlarges_it_and_is_right_on_average():
    model = three(width=40)
    own = {name: of_one(part) for name, part in model[0].adapters.items()}
    peftlib.combine(model, {"a": 2.0}, name="d", method="dare", density=0.25, seed=0)
    found = changed(model, "d")["0.weight"]
    kept = found != 0
    torch.testing.assert_close(found[kept], (2.0 * own["a"] / 0.25)[kept], rtol=1e-12, atol=1e-12)
    share = kept.double().mean().item()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / kept.numel()) ** 0.5  # four standard deviations
    peftlib.combine(model, WEIGHTS, name="e", method="dare", density=0.25, seed=0)
    alone = changed(model, "d")["0.weight"] * 0.35
    peftlib.combine(model, {"b": -0.3}, name="f", method="dare", density=0.25, seed=0)
    equal(
        changed(model, "e"), {"0.weight": alone + changed(model, "f")["0.weight"]}
    )  # a seed's masks are each one's own
    assert not torch.equal(changed(model, "f")["0.weight"] != 0, kept)


def test_dare_without_a_seed_draws_from_torch_and_with_one_does_not():
    model = three()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    peftlib.combine(model, WEIGHTS, name="d", method="dare", density=0.5, seed=3)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(5)
    peftlib.combine(model, WEIGHTS, name="e", method="dare", density=0.5)
    assert not torch.equal(torch.rand(3), expected)


def test_nothing_dropped_is_the_sum():
    model = three()
    expected = {"0.weight": 0.7 * of_one(model[0].adapters["a"]) - 0.3 * of_one(model[0].adapters["b"])}
    peftlib.combine(model, WEIGHTS, name="d", method="dare", density=1.0)
    equal(changed(model, "d"), expected)


# ---- HF peft beside it


def hf_delta(combination: str, first: float = 0.7, second: float = 0.3, **config: Any) -> tuple[Tensor, Tensor]:
    """What HF peft's add_weighted_adapter makes of two adapters, and Σ w s B A."""
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 64)), peft.LoraConfig(r=8, target_modules=["0"]), "one")
    model.add_adapter("two", peft.LoraConfig(r=8, target_modules=["0"]))
    layer: Any = model.base_model.model[0]
    with torch.no_grad():
        for factor in (*layer.lora_A.parameters(), *layer.lora_B.parameters()):
            factor.normal_()
    expected = first * layer.get_delta_weight("one") + second * layer.get_delta_weight("two")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(["one", "two"], [first, second], "both", combination_type=combination, **config)
    return layer.get_delta_weight("both").detach(), expected.detach()


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_where_hf_peft_is_right_it_gives_the_same(combination):
    found, expected = hf_delta(combination, **({"svd_rank": 16} if combination == "svd" else {}))
    assert (found - expected).norm() / expected.norm() < 1e-5
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    peftlib.inject(model, "0", LoRA, rank=8, name="a")
    peftlib.inject(model, "0", LoRA, rank=8, name="b")
    moved(model)
    weights = {"a": 0.7, "b": 0.3}
    own = sum(weights[name] * of_one(part) for name, part in model[0].adapters.items())
    method: dict[str, Any] = {"method": "svd", "rank": 16} if combination == "svd" else {}
    peftlib.combine(model, weights, name="c", **method)
    part = model[0].adapters["c"]
    assert (of_one(part) - own).norm() / own.norm() < 1e-5


def test_hf_peft_s_linear_is_off_by_as_much_as_the_change_itself():
    """It adds up the factors apart, so their cross terms are in the product: for equal weights as large as the sum."""
    found, expected = hf_delta("linear", 0.5, 0.5)
    assert 0.95 < (found - expected).norm() / expected.norm() < 1.05


# ---- convert


@pytest.mark.parametrize(
    ("kind", "config"), [(DoRA, {"rank": 2}), (IA3, {}), (Full, {}), (LoRA, {"rank": 3})], ids=lambda each: str(each)
)
def test_every_mergeable_adapter_becomes_lora_with_a_measured_error(kind, config):
    torch.manual_seed(0)
    model = network().double()
    peftlib.inject(model, ["q_proj", "head"], kind, name="a", **config)
    torch.manual_seed(1)
    moved(model)
    expected = changed(model, "a")
    errors = peftlib.convert(model, "a", LoRA, rank=2, name="c")
    found = changed(model, "c")
    assert errors.keys() == expected.keys()
    for key, delta in expected.items():
        assert errors[key] == pytest.approx(((found[key] - delta).norm() / delta.norm()).item(), rel=1e-6, abs=1e-13)
    matrices = [key for key, delta in expected.items() if delta.dim() == 2]
    assert {
        f"{host}.{part.config['param']}" for host, _, part in peftlib.adapters(model, "c") if type(part) is LoRA
    } == {*matrices}
    peftlib.convert(model, "a", LoRA, rank=8, name="whole")
    peftlib.activate(model, "whole")
    whole = model(tokens())
    peftlib.activate(model, "a")
    torch.testing.assert_close(whole, model(tokens()), rtol=0, atol=1e-12)


def test_an_adapter_that_changed_nothing_becomes_one_that_can_learn():
    model = linears(1, 6)
    peftlib.inject(model, "0", LoRA, rank=2, name="a")
    assert peftlib.convert(model, "a", LoRA, rank=2, name="c") == {"0.weight": 0.0}
    peftlib.activate(model, "c")
    assert peftlib.verify(model, torch.randn(2, 6))


def test_a_half_precision_base_gets_the_sum_in_float32():
    torch.manual_seed(0)
    model = linears(1, 6).bfloat16()
    for name in "ab":
        peftlib.inject(model, "0", LoRA, rank=2, name=name)
    moved(model)
    expected = sum(WEIGHTS[name] * of_one(part).double() for name, part in model[0].adapters.items())
    peftlib.combine(model, WEIGHTS, name="c")
    found = model[0].adapters["c"]
    assert found.lora_B.dtype == torch.float32
    torch.testing.assert_close(of_one(found).double(), expected, rtol=0, atol=1e-6)


def test_a_tied_weight_may_have_its_factors_combined():
    model = linears(2, 6)
    model[1].weight = model[0].weight
    for name in "ab":
        peftlib.inject(model, "0", LoRA, rank=2, name=name)
    moved(model)
    own = sum(WEIGHTS[name] * of_one(part) for name, part in model[0].adapters.items())
    peftlib.combine(model, WEIGHTS, name="c")
    torch.testing.assert_close(of_one(model[0].adapters["c"]), own)


# ---- refusals

REFUSED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "absent": (lambda m: peftlib.combine(m, {"a": 1.0, "z": 1.0}, name="c"), ("'z'",)),
    "taken": (lambda m: peftlib.combine(m, WEIGHTS, name="b"), ("combine", "'b'")),
    "named": (lambda m: peftlib.combine(m, WEIGHTS, name="c.d"), ("'c.d'",)),
    "nothing": (lambda m: peftlib.combine(m, {"a": 0.0}, name="c"), ("combine",)),
    "empty": (lambda m: peftlib.combine(m, {}, name="c"), ("combine",)),
    "number": (lambda m: peftlib.combine(m, {"a": float("nan")}, name="c"), ("a", "nan")),
    "method": (lambda m: peftlib.combine(m, WEIGHTS, name="c", method="linear"), ("combine", "'linear'", "'exact'")),
    "svd without rank": (lambda m: peftlib.combine(m, WEIGHTS, name="c", method="svd"), ("combine", "rank")),
    "exact with rank": (lambda m: peftlib.combine(m, WEIGHTS, name="c", rank=2), ("combine", "rank=2", "exact")),
    "rank": (lambda m: peftlib.combine(m, WEIGHTS, name="c", method="svd", rank=0), ("combine", "rank=0")),
    "ties without density": (lambda m: peftlib.combine(m, WEIGHTS, name="c", method="ties"), ("combine", "density")),
    "density": (
        lambda m: peftlib.combine(m, WEIGHTS, name="c", method="ties", density=1.5),
        ("combine", "density=1.5"),
    ),
    "no density": (lambda m: peftlib.combine(m, WEIGHTS, name="c", method="dare", density=0), ("combine", "density=0")),
    "seed": (
        lambda m: peftlib.combine(m, WEIGHTS, name="c", method="svd", rank=2, seed=1),
        ("combine", "seed=1", "svd"),
    ),
    "wrong seed": (
        lambda m: peftlib.combine(m, WEIGHTS, name="c", method="dare", density=0.5, seed=-1),
        ("seed=-1",),
    ),
    "kind": (lambda m: peftlib.convert(m, "a", DoRA, rank=2, name="c"), ("convert", "DoRA")),
    "unmergeable": (lambda m: peftlib.combine(m, {"a": 1.0, "n": 1.0}, name="c"), ("combine", "n", "Bottleneck", "0")),
}


@pytest.mark.parametrize("which", REFUSED)
def test_what_cannot_be_combined_is_refused_and_nothing_is_changed(which):
    act, named = REFUSED[which]
    model = three()
    peftlib.eject(model, "c")
    peftlib.inject(model, "0", Bottleneck, width=2, name="n")
    with refused(model, *named):
        act(model)


def test_a_routed_merged_or_viewed_model_is_refused():
    model = three()
    with peftlib.route(model, ["a", "b"]), refused(model, "combine"):
        peftlib.combine(model, WEIGHTS, name="d")
    with peftlib.merged(model, "a"), refused(model, "combine"):
        peftlib.combine(model, WEIGHTS, name="d")
    view = peftlib.view(model, "a")
    with refused(model, "combine"):
        peftlib.combine(model, WEIGHTS, name="d")
    assert view is not None


def test_an_adapter_without_values_or_with_infinite_ones_is_refused():
    for method in ({}, {"method": "svd", "rank": 2}):
        model = three()
        with torch.no_grad():
            model[0].adapters["b"].lora_A[0, 0] = torch.inf
        with refused(model, "combine", '"b"', "0", "lora_A"):
            peftlib.combine(model, WEIGHTS, name="d", **method)
        with refused(three().to("meta"), "combine", "meta"):
            peftlib.combine(three().to("meta"), WEIGHTS, name="d", **method)


def test_a_failure_on_the_way_leaves_all_as_it_was():
    def make() -> Any:
        model = three(6)
        peftlib.activate(model, "a")
        return model

    act = lambda model: peftlib.combine(model, WEIGHTS, name="d", method="svd", rank=2)  # noqa: E731
    assert fail_at_every_step(make, act) > 20

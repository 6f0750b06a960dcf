"""Targets name modules: globs, lists, types, predicates; `plan` and `summary` say what they come to."""

import pytest
import torch
from torch import nn

import peftlib
from peftlib import AdapterError, Full, LoRA
from support.helpers import Gain, chain, changes, linears, network, snapshot
from support.refusals import refused

pytestmark = pytest.mark.mutants

EVERY_Q = ["layers.0.q_proj", "layers.1.q_proj", "layers.2.q_proj"]
EVERY_V = ["layers.0.v_proj", "layers.1.v_proj", "layers.2.v_proj"]
NORMS = ["layers.0.norm", "layers.1.norm", "layers.2.norm"]


def found(targets, exclude=(), kind=LoRA) -> list[str]:
    return [row.host for row in peftlib.plan(network(layers=3), targets, kind, exclude=exclude).rows]


TARGETS = {
    "a last part": ("q_proj", EVERY_Q),
    "a whole name": ("layers.1.q_proj", ["layers.1.q_proj"]),
    "a dotted suffix": ("1.q_proj", ["layers.1.q_proj"]),
    "a glob over the last part": ("*_proj", sorted(EVERY_Q + EVERY_V)),
    "a class of characters": ("layers.[0-1].q_proj", EVERY_Q[:2]),
    "a class of characters, negated": ("layers.[!0].q_proj", EVERY_Q[1:]),
    "a star across dots": ("layers*q_proj", EVERY_Q),
    "a question mark": ("layers.?.v_proj", EVERY_V),
    "a list, in the model's order": (["head", "layers.2.v_proj", "0.q_proj"], [EVERY_Q[0], EVERY_V[2], "head"]),
    "a tuple": (("head", "embedding"), ["embedding", "head"]),
    "a set": ({"head", "embedding"}, ["embedding", "head"]),
    "a name twice": (["head", "head", "he*"], ["head"]),
    "a type": (nn.Linear, [*(n for pair in zip(EVERY_Q, EVERY_V, strict=True) for n in pair), "head"]),
    "a type and a name": ([nn.Embedding, "head"], ["embedding", "head"]),
    "a predicate on the module": (lambda name, m: isinstance(m, nn.Linear) and m.bias is None, EVERY_V),
    "a predicate on the name": (lambda name, m: name.startswith("layers.2.q"), EVERY_Q[2:]),
}


@pytest.mark.parametrize(("targets", "hosts"), TARGETS.values(), ids=TARGETS)
def test_targets_name_hosts(targets, hosts):
    assert found(targets) == hosts


@pytest.mark.parametrize(("targets", "hosts"), TARGETS.values(), ids=TARGETS)
def test_plan_and_inject_agree_on_hosts(targets, hosts):
    model = network(layers=3)
    assert peftlib.inject(model, targets, LoRA, rank=2) == hosts
    assert [host for host, _, _ in peftlib.adapters(model)] == hosts


@pytest.mark.parametrize(
    ("exclude", "hosts"),
    [
        ((), [*EVERY_Q, "head"]),
        ([], [*EVERY_Q, "head"]),
        ("head", EVERY_Q),
        ("layers.*", ["head"]),
        (["layers.0.*", "head"], EVERY_Q[1:]),
        (lambda name, module: "1" in name, [EVERY_Q[0], EVERY_Q[2], "head"]),
        (nn.LayerNorm, [*EVERY_Q, "head"]),
    ],
    ids=["nothing", "an empty list", "a name", "a glob", "a list", "a predicate", "a type that no target is"],
)
def test_exclude_takes_away(exclude, hosts):
    assert found(["q_proj", "head"], exclude) == hosts


@pytest.mark.parametrize("pattern", ["proj", "q_pro", "Q_PROJ", "layers.0.q", "q_proj.weight", "ayers.0.q_proj"])
def test_a_glob_matches_whole_parts_only_and_case_counts(pattern):
    with refused(None, "targets", repr(pattern)):
        found(pattern)


@pytest.mark.parametrize(
    ("targets", "typo", "nearest"),
    [
        ("q_porj", "q_porj", "q_proj"),
        (["q_proj", "v_porj"], "v_porj", "v_proj"),
        (["haed", "q_proj"], "haed", "head"),
        ([nn.Linear, "v_porj"], "v_porj", "v_proj"),
        ("layers.0.q_porj", "layers.0.q_porj", "layers.0.q_proj"),
        ("layer.0.q_proj", "layer.0.q_proj", "layers.0.q_proj"),
        ("embeding", "embeding", "embedding"),
    ],
)
def test_a_typo_raises_with_the_nearest_name_even_in_a_list(targets, typo, nearest):
    model = network()
    for act in (peftlib.plan, peftlib.inject):
        with refused(model, "targets", f"'{typo}'", f"'{nearest}'"):
            act(model, targets, LoRA)


def test_a_typo_in_exclude_raises_too():
    with refused(None, "exclude", "'haed'", "'head'"):
        found("q_proj", exclude="haed")


@pytest.mark.parametrize("wrong", [3, None, [None], {"q_proj": 1}, [["q_proj"]]])
def test_what_is_no_target_is_a_type_error(wrong):
    with pytest.raises(TypeError, match="targets"):
        found(wrong)


@pytest.mark.parametrize("wrong", ["lora!", LoRA.fold, nn.Linear, None])
def test_what_is_no_kind_is_a_type_error(wrong):
    with pytest.raises(TypeError, match=r"kind: .*peftlib\.Adapter"):
        found("q_proj", kind=wrong)


def test_an_unknown_keyword_is_refused_and_changes_nothing():
    model = linears()
    before = snapshot(model)
    with pytest.raises(AdapterError, match="rnak"):
        peftlib.inject(model, "0", LoRA, rnak=3)
    assert changes(before, model) == []


def test_adapters_are_no_targets():
    model = network()
    peftlib.inject(model, nn.Linear, LoRA)
    assert peftlib.inject(model, lambda name, module: "lora" in name or "head" in name, LoRA, name="b") == ["head"]
    with refused(model, "targets", "LoRA"):
        peftlib.plan(model, LoRA, LoRA)


def test_a_child_that_its_parent_reads_is_adapted_from_the_parent():
    model = nn.TransformerEncoderLayer(8, 2)
    (row,) = peftlib.plan(model, "out_proj", LoRA, rank=2).rows
    assert (row.host, row.shapes) == ("self_attn", {"out_proj.weight.lora_A": (2, 8), "out_proj.weight.lora_B": (8, 2)})


def test_a_module_under_several_names_is_one_host():
    model: nn.Module = chain(shared := nn.Linear(4, 4), nn.ReLU(), shared)
    assert peftlib.inject(model, nn.Linear, LoRA) == ["0"]
    assert len(list(peftlib.adapters(model))) == 1


# ---- plan


PLANS = {
    "LoRA": (LoRA, {"rank": 2}, nn.Linear),
    "LoRA in bf16": (LoRA, {"rank": 3, "dtype": "bfloat16"}, "q_proj"),
    "LoRA, pissa": (LoRA, {"rank": 2, "init": "pissa"}, "q_proj"),
    "LoRA on an embedding": (LoRA, {"rank": 2}, "embedding"),
    "Full on norms": (Full, {}, nn.LayerNorm),
    "Full on biases": (Full, {"params": "bias"}, ["q_proj", "head"]),
    "Full on layers": (Full, {}, "layers.[01]"),
    "a kind of one's own": (Gain, {"start": 2.0}, "v_proj"),
}
every_plan = pytest.mark.parametrize(("kind", "config", "targets"), PLANS.values(), ids=PLANS)


@every_plan
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_plan_equals_what_inject_then_does(kind, config, targets, dtype):
    model = network().to(dtype)
    plan = peftlib.plan(model, targets, kind, **config)
    peftlib.inject(model, targets, kind, **config)
    adapters = list(peftlib.adapters(model))
    assert [(row.host, row.kind) for row in plan.rows] == [(host, type(a).__name__) for host, _, a in adapters]
    for row, (_, _, adapter) in zip(plan.rows, adapters, strict=True):
        state = adapter.state_dict()
        assert row.shapes == {key: tuple(state[inner].shape) for key, inner in adapter.file_keys().items()}
        assert row.parameters == sum(p.numel() for p in adapter.parameters())
    assert plan.parameters == sum(p.numel() for p in peftlib.parameters(model))
    assert plan.adam_bytes == adam_bytes(model)


def adam_bytes(model):
    """Measured: the two moments that Adam really holds after a step."""
    parameters = list(peftlib.parameters(model))
    optimizer = torch.optim.Adam(parameters, foreach=False)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    return sum(moment.numel() * moment.element_size() for moment in moments)


@every_plan
def test_plan_touches_nothing_and_draws_nothing(kind, config, targets):
    model = network()
    before, random = snapshot(model), torch.get_rng_state()
    peftlib.plan(model, targets, kind, **config)
    assert changes(before, model) == []
    assert torch.equal(torch.get_rng_state(), random)


def test_plan_beside_adapters_touches_nothing():
    model = network()
    peftlib.inject(model, "q_proj", LoRA)
    before = snapshot(model)
    assert len(peftlib.plan(model, nn.Linear, LoRA).rows) == 5
    assert len(peftlib.plan(model, "layers.0", Full).rows[0].shapes) == 5, (
        "an adapter inside is not a weight of the host"
    )
    assert changes(before, model) == []


def test_plan_works_where_there_are_no_values():
    with torch.device("meta"):
        model = chain(nn.Linear(4096, 4096))
    assert peftlib.plan(model, "0", LoRA, rank=8).parameters == 2 * 8 * 4096


@pytest.mark.parametrize(
    ("targets", "config"),
    [
        ("q_proj", {"rank": 0}),
        ("norm", {}),
        ("q_proj", {"rank": 9, "init": "pissa"}),
        ("q_proj", {"param": "weights"}),
        ("embedding", {"dropout": 0.1}),
        ("layers", {}),
    ],
)
def test_plan_refuses_what_inject_refuses(targets, config):
    """A plan is what `inject` would do, so its refusals, too, are those of `inject`, word for word."""
    words = []
    for act in (peftlib.inject, peftlib.plan):
        with pytest.raises(AdapterError) as refusal:
            act(network(), targets, LoRA, **config)
        words.append(str(refusal.value))
    assert words[0] == words[1]


def test_the_table_of_a_plan():
    model = network()
    assert str(peftlib.plan(model, ["embedding", "head"], LoRA, rank=2)) == "\n".join(
        [
            "host       kind  shapes                        parameters  Adam state",
            "---------  ----  ----------------------------  ----------  ----------",
            "embedding  LoRA  lora_A [2, 11] lora_B [8, 2]          38  304 B",
            "head       LoRA  lora_A [2, 8] lora_B [3, 2]           22  176 B",
            "2 adapters, 60 trainable parameters, 480 B of Adam state",
        ]
    )


# ---- summary


def test_the_numbers_of_a_summary():
    model = network(layers=1)
    base = sum(p.numel() for p in model.parameters())
    peftlib.inject(model, "q_proj", LoRA, rank=2, name="a")
    peftlib.inject(model, "head", Full, name="b")
    peftlib.activate(model, "b")
    peftlib.train_only(model, "a")
    summary = peftlib.summary(model)
    assert [(r.host, r.name, r.kind, r.state, r.parameters, r.trainable) for r in summary.rows] == [
        ("layers.0.q_proj", "a", "LoRA", "off", 32, 32),
        ("head", "b", "Full", "active", 27, 0),
    ]
    assert (summary.base_parameters, summary.base_trainable) == (base, 0)
    assert (summary.adapter_parameters, summary.trainable) == (59, 32)


def test_the_table_of_a_summary():
    model = network(layers=1)
    peftlib.inject(model, "q_proj", LoRA, rank=2, name="a")
    peftlib.inject(model, "head", Full, name="b")
    peftlib.merge(model, "b")
    assert str(peftlib.summary(model)) == "\n".join(
        [
            "host             adapter  kind  state   parameters  trainable",
            "---------------  -------  ----  ------  ----------  ---------",
            "layers.0.q_proj  a        LoRA  off             32         32",
            "head             b        Full  merged          27         27",
            "59 of 326 parameters train (18.10 %); base 267, adapters 59",
        ]
    )


def test_a_summary_counts_a_tied_weight_once_and_works_without_adapters():
    model = chain(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    summary = peftlib.summary(model)
    assert (summary.rows, summary.base_parameters, summary.trainable) == ((), 15, 15)


def test_a_summary_shows_a_root_and_big_numbers():
    model = nn.Linear(1000, 1000)
    peftlib.inject(model, nn.Linear, LoRA, rank=4)
    assert "(root)  default  LoRA  active       8,000      8,000" in str(peftlib.summary(model))

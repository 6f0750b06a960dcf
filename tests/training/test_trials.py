"""Trials: each trains beside others as it would alone, stops alone, and goes on from a copy or a file to the bit."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn

import peftlib
from peftlib import IA3, Bottleneck, DoRA, Full, LoRA, Prompt, Trials
from support.helpers import Gain, base_bits, bits, changes, network, snapshot
from support.refusals import refused


class Setting(NamedTuple):
    """A trial: its parts, and what trains it."""

    parts: Any
    optimizer: Callable[[Any], Any] = lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)
    scheduler: Callable[[Any], Any] | None = None
    clip: float | None = None
    seed: int = 0


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adam(lr: float) -> Any:
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr)


def halving(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.5)


LOW_RANK = ("*_proj", LoRA, {"rank": 2})
SETTINGS = {
    "lora": Setting(LOW_RANK, clip=0.1),
    "wider": Setting(("*_proj", LoRA, {"rank": 4, "alpha": 16, "dropout": 0.3}), adam(3e-3), halving, seed=3),
    "dora": Setting(("q_proj", DoRA, {"rank": 3}), sgd, clip=1.0, seed=4),
    "two": Setting([(["v_proj"], LoRA, {"rank": 1}), ("head", Full, {})], adam(1e-3), halving, 0.5, 5),
    "ia3": Setting(("v_proj", IA3, {}), adam(3e-2), seed=6),
    "bottleneck": Setting(("layers.[01]", Bottleneck, {"width": 2, "dim": 8, "dropout": 0.2}), sgd, halving, seed=7),
    "gain": Setting(("head", Gain, {"start": 0.5}), adam(1e-1), clip=0.01, seed=8),
    "full": Setting((["norm", "head"], Full, {}), adam(1e-3), seed=9),
}


def base() -> Any:
    return network().double().train()


def added(model: Any, settings: dict[str, Setting], **options: Any) -> Trials:
    trials = Trials(model, **options)
    for name, setting in settings.items():
        trials.add(name, setting.parts, **{key: value for key, value in setting._asdict().items() if key != "parts"})
    return trials


def pair(**options: Any) -> Trials:
    return added(base(), {"a": SETTINGS["wider"], "b": SETTINGS["wider"]._replace(seed=11)}, **options)


def batch(step: int, seed: int = 0, rows: int = 2) -> Tensor:
    return torch.randint(11, (rows, 5), generator=torch.Generator().manual_seed(1000 * seed + step))


def loss_of(logits: Tensor) -> Tensor:
    target = torch.linspace(-1, 1, logits[0].numel(), dtype=logits.dtype).view(logits.shape[1:])
    return (logits - target).square().mean()


def train(trials: Trials, steps: range) -> None:
    for step in steps:
        trials.step({name: loss_of(y) for name, y in trials(batch(step)).items()})


def weights(trials: Trials, name: str) -> list[Tensor]:
    return [p.detach() for p in trials[name].parameters]


def weights_in_bits(trials: Trials, *names: str) -> dict[str, list[bytes]]:
    return {name: [bits(p) for p in weights(trials, name)] for name in names or trials}


def alone(setting: Setting, steps: int, seed: int, rows: int) -> list[Tensor]:
    """A plain loop over one adapter."""
    model = base()
    for part in [setting.parts] if isinstance(setting.parts, tuple) else setting.parts:
        targets, kind, config = part
        peftlib.inject(model, targets, kind, seed=setting.seed, **config)
    parameters = [*peftlib.parameters(model)]
    optimizer = setting.optimizer(parameters)
    scheduler = setting.scheduler and setting.scheduler(optimizer)
    for step in range(steps):
        loss_of(model(batch(step, seed, rows))).backward()
        if setting.clip is not None:
            nn.utils.clip_grad_norm_(parameters, setting.clip)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("steps", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_eight_trials_side_by_side_equal_each_alone(steps):
    trials = added(base(), SETTINGS)
    sizes = {name: 1 + at % 3 for at, name in enumerate(SETTINGS)}
    for step in range(steps):
        batches = {name: batch(step, at, sizes[name]) for at, name in enumerate(SETTINGS)}
        assert trials.step({name: loss_of(y) for name, y in trials(batches).items()}) == {}
    for at, (name, setting) in enumerate(SETTINGS.items()):
        for found, expected in zip(weights(trials, name), alone(setting, steps, at, sizes[name]), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_groups_of_few_train_as_all_together_do():
    together, apart = added(base(), SETTINGS), added(base(), SETTINGS, side_by_side=3)
    sizes = []
    apart.model.embedding.register_forward_hook(lambda *call: sizes.append(len(call[-1])))
    for trials in (together, apart):
        train(trials, range(6))
    assert set(sizes) == {2 * 3, 2 * 2}
    for name in SETTINGS:
        for found, expected in zip(weights(apart, name), weights(together, name), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_groups_keep_nothing_for_backward_but_their_batches():
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    counts = {}
    for size in (1, 2):
        trials, saved = pair(side_by_side=size), []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trials(batch(0))
        counts[size] = sum(saved)
    assert counts[1] < 0.2 * counts[2]


@pytest.mark.parametrize(
    "broken",
    [
        lambda y: loss_of(y) * float("nan"),
        lambda y: loss_of(y) * float("inf"),
        lambda y: (y - y).square().sum().sqrt(),  # zero, and its gradient is no number
    ],
    ids=["loss is nan", "loss is infinite", "gradient is nan"],
)
def test_a_trial_that_is_not_finite_stops_alone_and_no_bit_of_the_others_changes(broken):
    names = [*SETTINGS]
    disturbed, undisturbed = added(base(), SETTINGS), added(base(), SETTINGS)
    for trials in (disturbed, undisturbed):
        train(trials, range(3))
    before = weights_in_bits(disturbed, "dora")
    losses = {name: loss_of(y) for name, y in disturbed(batch(3)).items()}
    losses["dora"] = broken(disturbed(batch(3))["dora"])
    stopped = disturbed.step(losses)
    undisturbed.step({name: loss_of(y) for name, y in (undisturbed(batch(3)), undisturbed(batch(3)))[0].items()})
    undisturbed.stop("dora", "asked to")
    assert [*stopped] == ["dora"]
    assert stopped == disturbed.stopped
    assert disturbed.running == [name for name in names if name != "dora"]
    assert weights_in_bits(disturbed, "dora") == before
    for trials in (disturbed, undisturbed):
        train(trials, range(4, 7))
    others = [name for name in names if name != "dora"]
    assert weights_in_bits(disturbed, *others) == weights_in_bits(undisturbed, *others)


def test_large_gradients_are_clipped_and_do_not_stop_a_trial():
    trials = added(network(), {"a": Setting(LOW_RANK, sgd, clip=1.0)})
    outputs = trials(batch(0))
    assert trials.step({"a": loss_of(outputs["a"]) * 1e30}) == {}
    assert all(p.isfinite().all() for p in weights(trials, "a"))


def test_a_loss_in_several_batches_is_one_step():
    parts, whole = pair(), pair()
    for trials in (parts, whole):
        trials.model.eval()
    first, second = ({name: loss_of(y) / 2 for name, y in parts(batch(step)).items()} for step in (0, 1))
    torch.stack([*first.values()]).sum().backward()
    parts.step(second)
    outputs = whole(torch.cat([batch(0), batch(1)]))
    whole.step({name: loss_of(y) for name, y in outputs.items()})
    for found, expected in zip(weights(parts, "a"), weights(whole, "a"), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_trials_without_a_batch_sit_out():
    trials = pair()
    train(trials, range(2))
    before = weights_in_bits(trials, "b")
    outputs = trials({"a": batch(2)})
    assert [*outputs] == ["a"]
    trials.step({"a": loss_of(outputs["a"])})
    assert weights_in_bits(trials, "b") == before
    assert [trials[name].steps for name in trials] == [3, 2]


def test_outside_the_calls_the_model_is_the_base():
    model, trials = base().eval(), None
    before, expected = base_bits(model), model(batch(0))
    trials = added(model, SETTINGS)
    train(trials, range(2))
    assert torch.equal(model(batch(0)), expected)
    for name in SETTINGS:
        trials.remove(name)
    assert len(trials) == 0
    assert base_bits(model) == before
    assert [*model.state_dict()] == [*before]


def test_the_weight_with_which_an_adapter_acts_is_the_same_behind_a_new_trial():
    model = base()
    peftlib.inject(model, "q_proj", LoRA, rank=2, name="own")
    peftlib.activate(model, {"own": 0.5})
    before = peftlib.summary(model).rows
    assert {row.weight for row in before} == {0.5}
    added(model, {"lora": SETTINGS["lora"]})
    assert [row for row in peftlib.summary(model).rows if row.name == "own"] == [*before]
    with refused(model, "nowhere"):
        Trials(model).add("a", ("nowhere", LoRA, {"rank": 2}), optimizer=sgd, seed=0)


def test_what_acted_before_acts_afterwards_and_in_no_trial():
    model = base().eval()
    plain = added(base().eval(), {"a": SETTINGS["full"]})
    peftlib.inject(model, ["norm", "head"], Full, name="own")
    with torch.no_grad():
        for p in peftlib.parameters(model, "own"):
            p.add_(0.5)
    expected = model(batch(0))
    trials = added(model, {"a": SETTINGS["full"]})
    assert torch.equal(model(batch(0)), expected)
    assert torch.equal(trials(batch(0))["a"], plain(batch(0))["a"])
    trials.remove("a")
    assert torch.equal(model(batch(0)), expected)


def test_the_rows_of_a_trial_that_left_are_no_longer_computed():
    trials, sizes = added(base(), SETTINGS), []
    trials.model.head.register_forward_hook(lambda *call: sizes.append(len(call[-1])))
    for leaving in ("lora", "ia3", "full"):
        train(trials, range(1))
        trials.remove(leaving)
    trials.stop("dora")
    train(trials, range(1))
    assert sizes == [16, 14, 12, 8]


def test_evaluation_runs_in_eval_mode_without_gradient_and_leaves_each_mode():
    trials = added(base(), SETTINGS)
    trials.model.layers[0].eval()
    train(trials, range(2))
    before = snapshot(trials.model)
    with trials.evaluate() as inside:
        outputs = inside(batch(7))
    assert changes(before, trials.model) == []
    trials.model.eval()
    for name in SETTINGS:
        assert not outputs[name].requires_grad
        with peftlib.activate(trials.model, name):
            torch.testing.assert_close(outputs[name], trials.model(batch(7)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("trained", [0, 3], ids=["fresh", "trained"])
def test_a_clone_goes_on_as_its_source_to_the_bit(trained):
    trials = pair()
    train(trials, range(3))
    trials.remove("b")
    setting = SETTINGS["wider"]
    trials.add("b", setting.parts, optimizer=setting.optimizer, scheduler=setting.scheduler, seed=5)
    train(trials, range(trained))
    trials.clone("a", "b")
    trials["b"].scheduler.load_state_dict(trials["a"].scheduler.state_dict())
    trials["b"].optimizer.param_groups[0]["lr"] = trials["a"].optimizer.param_groups[0]["lr"]
    assert weights_in_bits(trials, "a")["a"] == weights_in_bits(trials, "b")["b"]
    train(trials, range(3, 12))
    for found, expected in zip(weights(trials, "b"), weights(trials, "a"), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)  # rows elsewhere in a batch may round otherwise


def test_a_clone_shares_nothing_and_keeps_its_own_rate():
    trials = pair()
    train(trials, range(3))
    trials["b"].optimizer.param_groups[0]["lr"] = 0.7
    trials.clone("a", "b")
    assert trials["b"].optimizer.param_groups[0]["lr"] == 0.7
    before = weights_in_bits(trials, "b"), copy.deepcopy(trials["b"].optimizer.state_dict())
    outputs = trials({"a": batch(4)})
    trials.step({"a": loss_of(outputs["a"])})
    assert weights_in_bits(trials, "b") == before[0]
    for key, state in trials["b"].optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, before[1]["state"][key][name]) for name, value in state.items())


def test_a_clone_of_a_good_trial_revives_one_that_stopped():
    trials = pair()
    train(trials, range(2))
    outputs = trials(batch(2))
    trials.step({"a": loss_of(outputs["a"]), "b": loss_of(outputs["b"]) * float("nan")})
    assert trials.running == ["a"]
    trials.clone("a", "b")
    assert trials.running == ["a", "b"]
    train(trials, range(3, 4))


class TrialsOwnSeed(peftlib.Adapter):
    """A type that has a use of its own for the seed: directions that it does not save."""

    def __init__(self, host: Any, seed: int = 0) -> None:
        super().__init__()
        self.length = nn.Parameter(torch.zeros((), dtype=host.weight.dtype))
        direction = torch.randn(len(host.weight), generator=torch.Generator().manual_seed(seed))
        self.register_buffer("direction", direction.to(host.weight.dtype), persistent=False)

    def forward(self, host: Any, call: Any, *args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs) + self.length * self.direction


def test_a_seed_that_makes_a_type_what_it_is_must_be_the_same_in_a_clone():
    setting = Setting(("head", TrialsOwnSeed, {}))
    trials = added(base(), {"a": setting, "b": setting._replace(seed=1), "c": setting})
    with refused(trials.model, "'b'", "'a'", "seed=0"):
        trials.clone("a", "b")
    trials.clone("a", "c")


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}


def bert() -> Any:
    config = transformers.BertConfig(**SMALL, num_labels=3)
    return transformers.BertForSequenceClassification(config).eval()


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Any:
        y = self.layer(x)
        return {"y": y * scale, "more": (y.flatten(0, 1), [y[:, 0], None]), "name": "many"}


def test_outputs_of_many_forms_are_cut_by_rows():
    trials = Trials(Many())
    for rank in (1, 2):
        trials.add(str(rank), ("layer", LoRA, {"rank": rank}), optimizer=sgd, seed=0)
    first, second = torch.randn(2, 3, 4), torch.randn(5, 3, 4)
    outputs = trials({"1": first, "2": second}, scale=2.0)
    for name, x in (("1", first), ("2", second)):
        with peftlib.activate(trials.model, name):
            expected = trials.model(x, scale=2.0)
        found = outputs[name]
        assert found["name"] == "many"
        assert found["more"][1][1] is None
        for one, other in [
            (found["y"], expected["y"]),
            (found["more"][0], expected["more"][0]),
            (found["more"][1][0], expected["more"][1][0]),
        ]:
            torch.testing.assert_close(one, other)


def test_a_mask_of_positions_goes_to_every_row_also_where_there_are_as_many():
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Linear(4, 4)

        def forward(self, x: Tensor, attn_mask: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(self.query(x), x, x, attn_mask=attn_mask)

    trials = Trials(Attending())
    for name in ("a", "b"):
        trials.add(name, ("query", LoRA, {"rank": 1}), optimizer=sgd, seed=0)
    x, mask = torch.randn(3, 3, 4), torch.ones(3, 3, dtype=torch.bool).tril()
    outputs = trials({"a": (x,), "b": (x,)}, attn_mask=mask)
    for y in (*outputs.values(), *trials(x, attn_mask=mask).values()):
        torch.testing.assert_close(y, trials.model(x, attn_mask=mask))


def test_a_mask_of_each_row_s_own_positions_goes_with_its_row():
    class Pooling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return (self.inner(x) * mask.unsqueeze(-1)).sum(1)

    trials = Trials(Pooling())
    for name in ("a", "b"):
        trials.add(name, ("", Bottleneck, {"width": 2, "dim": 4}), optimizer=sgd, seed=0)
    batches = {name: (torch.randn(3, 5, 4), (torch.rand(3, 5) < 0.5).float()) for name in ("a", "b")}
    for name, y in trials(batches).items():
        with peftlib.activate(trials.model, name):
            torch.testing.assert_close(y, trials.model(*batches[name]))
    named = {name: {"x": x, "mask": mask} for name, (x, mask) in batches.items()}
    for name, y in trials(named).items():
        with peftlib.activate(trials.model, name):
            torch.testing.assert_close(y, trials.model(**named[name]))


def test_a_model_output_stays_one_and_a_loss_over_all_rows_is_refused():
    trials = Trials(bert())
    for rank in (1, 2):
        trials.add(str(rank), [("query", LoRA, {"rank": rank}), ("classifier", Full, {})], optimizer=sgd, seed=0)
    inputs = {"input_ids": torch.randint(50, (3, 6)), "attention_mask": torch.ones(3, 6, dtype=torch.int64)}
    for output in trials(**inputs).values():
        assert isinstance(output, transformers.modeling_outputs.SequenceClassifierOutput)
        assert output.logits.shape == (3, 3)
    with refused(trials.model, "Trials", "loss"):
        trials(**inputs, labels=torch.zeros(3, dtype=torch.int64))


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Any = None) -> Any:
        return self.layer(x).sum() if y is None else self.layer(x)


def bare() -> Trials:
    trials = Trials(Bare())
    for name in ("a", "b"):
        trials.add(name, ("layer", LoRA, {"rank": 1}), optimizer=sgd, seed=0)
    return trials


def half(parameters: Any) -> Any:
    return sgd(parameters[:1])


REFUSALS: dict[str, tuple[tuple[str, ...], Callable[[Trials], Any]]] = {
    "a name that a trial has": (("'a'",), lambda t: t.add("a", LOW_RANK, optimizer=sgd, seed=0)),
    "no seed that can be": (("seed=-1",), lambda t: t.add("c", ("layer", LoRA, {}), optimizer=sgd, seed=-1)),
    "parts that are none": (("'c'",), lambda t: t.add("c", LoRA, optimizer=sgd, seed=0)),
    "no part at all": (("'c'",), lambda t: t.add("c", [], optimizer=sgd, seed=0)),
    "a second part that fails": (
        ("targets", "'nowhere'"),
        lambda t: t.add("c", [("layer", LoRA, {}), ("nowhere", LoRA, {})], optimizer=sgd, seed=0),
    ),
    "an optimizer of other parameters": (("'c'",), lambda t: t.add("c", ("layer", LoRA, {}), optimizer=half, seed=0)),
    "no optimizer": (("'c'",), lambda t: t.add("c", ("layer", LoRA, {}), optimizer=list, seed=0)),
    "a clip of zero": (("'c'", "clip=0"), lambda t: t.add("c", ("layer", LoRA, {}), optimizer=sgd, clip=0, seed=0)),
    "a name that no trial has": (("Trials", "'c'"), lambda t: t.remove("c")),
    "a batch for no trial": (("Trials", "'c'"), lambda t: t({"a": torch.ones(1, 4), "c": torch.ones(1, 4)})),
    "a batch without a tensor": (("'a'",), lambda t: t(3)),
    "a batch without rows": (("'a'",), lambda t: t(torch.ones(()))),
    "batches of two lengths": (("'b'",), lambda t: t({"a": torch.ones(1, 4), "b": torch.ones(1, 5)})),
    "batches that are built otherwise": (
        ("'b'",),
        lambda t: t({"a": torch.ones(1, 4), "b": (torch.ones(1, 4), torch.ones(1))}),
    ),
    "arguments without rows that differ": (
        ("'b'",),
        lambda t: t({"a": (torch.ones(2, 4), 1), "b": (torch.ones(2, 4), 2)}),
    ),
    "a sum over all rows": (("Trials",), lambda t: t(torch.ones(2, 4))),
    "no loss": (("Trials.step",), lambda t: t.step({})),
    "a loss of no trial": (("Trials", "'c'"), lambda t: t.step({"c": torch.ones((), requires_grad=True)})),
    "a loss for each row": (("Trials.step", "'a'"), lambda t: t.step({"a": torch.ones(2, requires_grad=True)})),
    "a loss without gradient": (("Trials.step", "'a'"), lambda t: t.step({"a": torch.ones(())})),
    "a loss that is a number": (("Trials.step", "'a'"), lambda t: t.step({"a": 1.0})),
    "the clone of nothing": (("Trials", "'c'"), lambda t: t.clone("c", "a")),
}


@pytest.mark.parametrize(("names", "act"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_is_refused_and_the_model_is_as_it_was(names, act):
    trials = bare()
    with refused(trials.model, *names):
        act(trials)
    assert [*trials] == ["a", "b"]


def test_a_name_that_an_adapter_has_is_refused_and_that_adapter_stays():
    model = base()
    peftlib.inject(model, "head", LoRA, rank=1, name="a")
    with refused(model, "'a'"):
        added(model, {"a": SETTINGS["lora"]})


def test_the_first_trial_that_fails_leaves_no_trace():
    model = base()
    with refused(model, "targets", "'nowhere'"):
        Trials(model).add("a", [LOW_RANK, ("nowhere", LoRA, {})], optimizer=sgd, seed=0)


def test_side_by_side_counts_from_one():
    with refused(None, "Trials", "side_by_side=0"):
        Trials(base(), side_by_side=0)


@pytest.mark.parametrize("act", [lambda t: t(torch.ones(2, 4)), lambda t: t({"a": torch.ones(2, 4)})])
def test_without_a_trial_that_runs_there_is_nothing_to_call(act):
    trials = bare()
    for name in trials:
        trials.stop(name)
    with refused(trials.model, "Trials"):
        act(trials)


def test_a_stopped_trial_takes_no_step():
    trials = pair()
    outputs = trials(batch(0))
    trials.stop("a")
    with refused(trials.model, "Trials.step", "'a'"):
        trials.step({name: loss_of(y) for name, y in outputs.items()})


def test_a_merged_model_is_not_trained():
    trials = pair()
    peftlib.merge(trials.model, "a")
    with refused(trials.model, "Trials"):
        trials(batch(0))


@pytest.mark.parametrize(
    "other",
    [
        Setting(("q_proj", LoRA, {"rank": 4, "alpha": 16, "dropout": 0.3})),
        Setting(("*_proj", LoRA, {"rank": 3, "alpha": 16, "dropout": 0.3})),
        Setting(("*_proj", LoRA, {"rank": 4, "alpha": 8, "dropout": 0.3})),
        Setting(("*_proj", DoRA, {"rank": 4, "alpha": 16, "dropout": 0.3})),
        Setting(SETTINGS["wider"].parts, sgd),
    ],
    ids=["other modules", "another rank", "another scale", "another type", "another optimizer"],
)
def test_only_what_is_alike_can_be_cloned(other):
    trials = added(base(), {"a": SETTINGS["wider"], "b": other})
    with refused(trials.model, "'b'", "'a'"):
        trials.clone("a", "b")


def test_dropout_may_differ_in_a_clone():
    trials = added(base(), {"a": SETTINGS["wider"], "b": Setting(("*_proj", LoRA, {"rank": 4, "alpha": 16}))})
    train(trials, range(2))
    trials.clone("a", "b")
    assert weights_in_bits(trials, "a")["a"] == weights_in_bits(trials, "b")["b"]


def test_rows_that_one_trial_makes_longer_are_refused():
    trials = added(base(), {"a": SETTINGS["lora"], "b": Setting(("embedding", Prompt, {"length": 2}))})
    with refused(trials.model, "route", "embedding"):
        trials(batch(0))

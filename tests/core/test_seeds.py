"""An adapter's own randomness: the same start and the same masks to the bit, alone or in company, again and after."""

import concurrent.futures
import copy
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftlib
from peftlib import AdapterError, Bottleneck, DoRA, LoRA, Prefix
from support.helpers import changes, same_bits, snapshot

KINDS: dict[str, Any] = {
    "lora": lambda m, **more: peftlib.inject(m, nn.Linear, LoRA, rank=2, dropout=0.4, **more),
    "dora": lambda m, **more: peftlib.inject(m, nn.Linear, DoRA, rank=2, dropout=0.4, **more),
    "convolution": lambda m, **more: peftlib.inject(m, nn.Conv1d, LoRA, rank=2, dropout=0.4, **more),
    "bottleneck": lambda m, **more: peftlib.inject(m, nn.Linear, Bottleneck, width=3, dropout=0.4, **more),
}
kinds = pytest.mark.parametrize("put", KINDS.values(), ids=KINDS)


def model_of() -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()


def awake(model: Any) -> Any:
    """No factor is zero, and each adapter's values depend on its own start alone."""
    with torch.no_grad():
        for parameter in peftlib.parameters(model):
            parameter.add_(0.3)
    return model


def values(model: Any, name: str) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in peftlib.parameters(model, name)]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(map(same_bits, one, other))


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_a_start_depends_on_the_seed_alone(init):
    alone = model_of()
    before = torch.get_rng_state()
    peftlib.inject(alone, nn.Linear, LoRA, rank=2, init=init, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    beside = model_of()
    peftlib.inject(beside, nn.Linear, LoRA, rank=3, name="other")
    peftlib.inject(beside, nn.Conv1d, LoRA, rank=2, init=init, seed=5)
    peftlib.inject(beside, nn.Linear, LoRA, rank=2, init=init, seed=5)
    mine = [p.detach() for at, _, part in peftlib.adapters(beside, "default") if at != "0" for p in part.parameters()]
    assert equal(values(alone, "default"), mine)
    first, _, second, _ = values(alone, "default")
    assert not torch.equal(first, second), "two places share one start"
    another = model_of()
    peftlib.inject(another, nn.Linear, LoRA, rank=2, init=init, seed=6)
    assert not equal(values(alone, "default"), values(another, "default"))


def test_other_types_start_from_their_seed_too():
    found = []
    for _ in range(2):
        model = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        peftlib.inject(model, "self_attn", Prefix, length=2, seed=3)
        peftlib.inject(model, "linear1", Bottleneck, width=2, name="b", seed=3)
        found.append(values(model, "default") + values(model, "b"))
        torch.randn(7)
    assert equal(*found)


def outputs(model: Any, x: Tensor, steps: int = 3) -> list[Tensor]:
    return [model(x).detach() for _ in range(steps)]


@kinds
def test_masks_are_the_same_alone_and_in_a_routed_batch(put):
    x = torch.randn(6, 4, 6).double()
    alone = model_of()
    put(alone, name="a", seed=7)
    together = model_of()
    put(together, name="b", seed=8)
    put(together, name="noise")
    put(together, name="a", seed=7)
    awake(alone)
    awake(together)
    torch.manual_seed(11)
    expected = outputs(alone, x[[1, 3, 4]])
    assert not torch.equal(expected[0], expected[1]), "no mask is drawn anew"
    torch.manual_seed(12)
    with peftlib.route(together, ["b", "a", None, "a", "a", "noise"]):
        found = outputs(together, x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one[[1, 3, 4]], other, rtol=0, atol=1e-13)


@kinds
def test_without_a_seed_masks_come_from_the_generator_of_torch(put):
    x, model = torch.randn(2, 4, 6).double(), model_of()
    put(model)
    awake(model)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(outputs(model, x))
    assert equal(*found)
    assert all("masks" not in key for key in model.state_dict())


@kinds
def test_a_resumed_adapter_goes_on_with_its_masks(put, tmp_path):
    x, model = torch.randn(2, 4, 6).double(), model_of()
    put(model, seed=4)
    awake(model)
    outputs(model, x)
    peftlib.save(model, tmp_path / "a.safetensors")
    state, copied = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    expected = outputs(model, x)
    loaded = model_of()
    peftlib.load(loaded, tmp_path / "a.safetensors")
    again = model_of()
    put(again, seed=4)
    again.load_state_dict(state)
    for other in (loaded, again, copied):
        torch.manual_seed(77)
        assert equal(outputs(other, x), expected)
    assert all(config["config"]["seed"] == 4 for config in peftlib.read_header(tmp_path / "a.safetensors")["configs"])


@kinds
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_computes_with_the_masks_of_the_first_time(put, reentrant):
    """Each block twice in a step, and two steps before their backward passes."""
    x = torch.randn(2, 4, 6).double().requires_grad_()
    found = []
    for run in (lambda m, x: m(x), lambda m, x: checkpoint(m, x, use_reentrant=reentrant)):
        model = model_of()
        put(model, seed=4)
        awake(model)
        torch.manual_seed(5)
        first, second = run(model, run(model, x)).square().sum(), run(model, x).square().sum()
        (first + second).backward()
        found.append([p.grad.clone() for p in peftlib.parameters(model)])
        expected_next = model(x).detach()
        found[-1].append(expected_next)
    assert equal(*found)


def test_a_checkpoint_that_loses_the_generators_is_refused():
    model = model_of()
    KINDS["lora"](model, seed=4)
    y = checkpoint(awake(model), torch.randn(2, 4, 6).double(), use_reentrant=False, preserve_rng_state=False)
    with pytest.raises(AdapterError, match="preserve_rng_state"):
        y.sum().backward()


def test_in_eval_mode_nothing_is_drawn():
    model, x = model_of(), torch.randn(2, 4, 6).double()
    KINDS["lora"](model, seed=4)
    awake(model).eval()
    before = torch.get_rng_state()
    assert equal(*[outputs(model, x, 1) for _ in range(2)])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(int(tensor) == 0 for key, tensor in model.state_dict().items() if "masks" in key)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, "7"])
def test_what_is_no_seed_is_refused_and_the_model_unchanged(seed):
    model = model_of()
    before = snapshot(model)
    with pytest.raises(AdapterError, match="seed"):
        peftlib.inject(model, nn.Linear, LoRA, rank=2, seed=seed)
    assert changes(before, model) == []


class SeededKind(peftlib.Adapter):
    """A type whose constructor has a seed of its own."""

    def __init__(self, host: Any, seed: int = 0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((), float(seed)))

    def fold(self, host: Any) -> dict[str, Tensor]:
        return {"weight": host.weight * self.gain}


def test_a_type_with_a_seed_of_its_own_is_given_it():
    model = model_of()
    peftlib.inject(model, "1", SeededKind, seed=3)
    assert [p.item() for p in peftlib.parameters(model)] == [3.0]


def test_compiled_with_masks_of_its_own_is_refused():
    model = model_of()
    KINDS["lora"](model, seed=4)
    torch.compiler.reset()
    with pytest.raises(Exception, match="seed="):
        torch.compile(model, fullgraph=True, backend="eager")(torch.randn(2, 4, 6).double())
    model.eval()
    torch.compile(model, fullgraph=True, backend="eager")(torch.randn(2, 4, 6).double())


def test_threads_that_draw_at_once_get_the_masks_that_each_gets_alone():
    x, calls, seeds = torch.ones(64, 6, dtype=torch.float64), 200, range(4)

    def made(seed: int) -> Any:
        with torch.random.fork_rng([]):
            torch.manual_seed(1)
            model = nn.Sequential(nn.Linear(6, 6)).double()
        peftlib.inject(model, "0", LoRA, rank=2, dropout=0.4, seed=seed)
        return awake(model)

    def outputs(model: Any) -> list[Tensor]:
        return [model(x).detach() for _ in range(calls)]

    def at_once(models: list[Any]) -> list[list[Tensor]]:
        gate = threading.Barrier(len(seeds))
        with concurrent.futures.ThreadPoolExecutor(len(seeds)) as pool:
            return list(pool.map(lambda model: (gate.wait(), outputs(model))[1], models))

    alone, models, interval = [outputs(made(seed)) for seed in seeds], [*map(made, seeds)], sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-6)
        together = at_once(models)
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(*pair) for each in zip(alone, together, strict=True) for pair in zip(*each, strict=True))

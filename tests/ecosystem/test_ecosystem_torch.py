"""What torch itself offers, with every kind: compiling, precision, functions over parameters, export, checkpoints."""

import copy
import io
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import peftlib
from support.ecosystem import (
    COLUMNS,
    Column,
    adapter_state,
    base_state,
    close,
    every_kind,
    feature,
    gradients,
    moved,
    network,
    put,
    refused,
    same,
    tokens,
)

pytestmark = [
    # Dynamo looks at the .grad of whatever a compiled block is given.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # torch runs its own attention once for each adapter.
    pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning"),
]
# Compiling takes a second or more a cell: one kind at each commit, the others with the slow tests.
compiled_kinds = pytest.mark.parametrize(
    "column",
    [pytest.param(column, marks=pytest.mark.slow if at else ()) for at, column in enumerate(COLUMNS)],
    ids=lambda column: column.name,
)


@pytest.fixture
def counter() -> Iterator[Any]:
    """Counts the graphs that Dynamo makes."""
    torch._dynamo.reset()
    yield torch._dynamo.testing.CompileCounterWithBackend("eager")
    torch._dynamo.reset()


@pytest.fixture
def tracing(counter: Any) -> Any:
    """Counts them too, and has their gradients traced."""
    counter.backend = "aot_eager"
    return counter


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch)
    return nn.functional.cross_entropy(logits[:, -batch.shape[1] :].flatten(0, 1), batch.flatten())


def step(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    return loss.detach(), gradients(model)


# Compiling


@feature("torch.compile, fullgraph, forward and backward")
@compiled_kinds
def test_the_whole_model_is_one_graph_and_gives_equal_gradients(column, tracing):
    model = network(column)
    expected = step(model, tokens())
    model.compile(fullgraph=True, backend=tracing)
    loss, found = step(model, tokens())
    assert close(loss, expected[0])
    assert close(found, expected[1])
    assert tracing.frame_count == 1


@feature("torch.compile, dynamic shapes: one graph for all sizes")
@compiled_kinds
def test_one_graph_serves_every_batch_and_length(column, counter):
    model = network(column)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, length in ((3, 7), (5, 7), (3, 11), (4, 2)):
            given = tokens(batch, length)
            assert close(compiled(given), model(given))


@feature("torch.compile, shapes that begin to change: two graphs")
@compiled_kinds
def test_sizes_that_begin_to_change_cost_one_more_graph(column, counter):
    model = network(column)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    counts = []
    for length in (7, 9, 11, 5):
        given = tokens(3, length)
        assert close(compiled(given), model(given))
        counts.append(counter.frame_count)
    assert counts[1] == counts[-1]


@feature("torch.compile, regional: one graph for equal blocks")
@compiled_kinds
def test_equal_blocks_share_one_graph(column, tracing):
    """Where what comes in requires a gradient in all of them: the first block after a frozen embedding has one of its
    own otherwise, adapted or not."""
    model = network(column)
    model.embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
    expected = step(model, tokens())
    for layer in model.layers:
        layer.compile(fullgraph=True, backend=tracing)
    loss, found = step(model, tokens())
    assert close(loss, expected[0])
    assert close(found, expected[1])
    assert tracing.frame_count == 1


def two_adapters(column: Any) -> Any:
    model = network(column, name="first")
    peftlib.activate(model)
    put(model, column, name="second")
    moved(model, "second", seed=9)
    return model


@feature("torch.compile, no recompiling when a combination of adapters returns")
@compiled_kinds
def test_a_combination_that_returns_is_not_compiled_again(column, counter):
    model = two_adapters(column)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    given = tokens()
    both = [("first", "second")] if column.kind is not peftlib.Full else []  # two copies have no sum
    combinations = [(), ("first",), ("second",), *both]
    with torch.no_grad():
        for _ in range(3):
            for names in combinations:
                with peftlib.activate(model, *names):
                    assert close(compiled(given), model(given))
            assert counter.frame_count == len(combinations)


@feature("torch.compile, views with adapters of their own")
@compiled_kinds
def test_a_compiled_view_keeps_its_own_adapter(column, counter):
    model = two_adapters(column)
    faces = [peftlib.view(model, name) for name in ("first", "second")]
    compiled = [torch.compile(face, fullgraph=True, backend=counter) for face in faces]
    for name, graph in zip(("first", "second"), compiled, strict=True):
        with peftlib.activate(model, name):
            assert close(graph(tokens()), model(tokens()))


# Precision


@feature("autocast, bfloat16 and float16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@every_kind
def test_under_autocast_the_loss_is_the_exact_one_within_the_dtype(column, dtype):
    """The base's own error under autocast, and as much again for the adapter's products; the gradients are whole."""
    model = network(column)
    exact = step(network(column).double(), tokens())
    with torch.autocast("cpu", dtype):
        found = step(model, tokens())
        with peftlib.activate(model):
            base = loss_of(model, tokens())
    with peftlib.activate(model):
        own_error = (base - loss_of(model, tokens())).abs()
    assert (found[0] - exact[0]).abs() <= own_error + 8 * torch.finfo(dtype).eps * exact[0]
    assert found[1].keys() == exact[1].keys()
    for key, gradient in found[1].items():
        assert gradient.dtype == torch.float32
        size = exact[1][key].norm()
        assert (gradient - exact[1][key]).norm() <= 16 * torch.finfo(dtype).eps * size + 1e-6, key


@feature("GradScaler")
@every_kind
def test_a_grad_scaler_skips_an_overflow_and_trains_on(column):
    model = network(column)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26, growth_interval=4)
    optimizer = torch.optim.SGD(peftlib.parameters(model), lr=0.05)
    losses, before = [], {k: t.clone() for k, t in adapter_state(model).items()}
    for at in range(24):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, tokens())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        if at == 0:
            assert scaler.get_scale() < 2.0**26, "such a scale overflows float16"
            assert same(adapter_state(model), before), "the step that overflowed was taken"
    assert losses[-1] < losses[0]
    assert all(tensor.isfinite().all() for tensor in adapter_state(model).values())


# Functions over parameters


@pytest.mark.mutants
@feature("non-reentrant checkpointing")
@every_kind
def test_checkpointed_layers_give_the_same_gradients_to_the_bit(column):
    model = network(column)
    expected = step(model, tokens())
    for layer in model.layers:
        layer.forward = _recomputing(layer.forward)
    found = step(model, tokens())
    assert torch.equal(found[0], expected[0])
    assert same(found[1], expected[1])


def _recomputing(forward: Any) -> Any:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


@pytest.mark.mutants
@feature("torch.func.functional_call")
@every_kind
def test_functional_call_takes_other_adapters(column):
    model, other = network(column), moved(network(column), seed=9)
    with torch.no_grad():
        found = torch.func.functional_call(model, adapter_state(other), (tokens(),))
        assert torch.equal(found, other(tokens()))
        assert not torch.equal(found, model(tokens()))


def _several(column: Column, count: int = 3) -> tuple[nn.Module, list[dict[str, Tensor]], dict[str, Tensor]]:
    adapters = [adapter_state(moved(network(column), seed=seed)) for seed in range(count)]
    stacked = {key: torch.stack([one[key] for one in adapters]) for key in adapters[0]}
    return network(column), adapters, stacked


@pytest.mark.mutants
@feature("vmap over adapters")
@every_kind
def test_vmap_runs_several_adapters_on_one_batch(column):
    model, adapters, stacked = _several(column)
    given = tokens()
    run = lambda own: torch.func.functional_call(model, own, (given,))  # noqa: E731
    found = torch.func.vmap(run)(stacked)
    expected = torch.stack([run(own) for own in adapters])
    assert close(found, expected)


@pytest.mark.mutants
@feature("vmap of gradients over adapters")
@every_kind
def test_vmap_of_grad_is_the_gradient_of_each_adapter(column):
    model, adapters, stacked = _several(column)
    given = tokens()

    def loss(own: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, own, (given,)).square().mean()

    found = torch.func.vmap(torch.func.grad(loss))(stacked)
    expected = [torch.func.grad(loss)(own) for own in adapters]
    for key, gradient in found.items():
        assert close(gradient, torch.stack([one[key] for one in expected])), key


@feature("inference_mode")
@every_kind
def test_inference_mode_gives_the_same_bits(column):
    model = network(column)
    with torch.no_grad():
        expected = model(tokens())
    with torch.inference_mode():
        assert torch.equal(model(tokens()), expected)


# Export


def ways_to_export(model: nn.Module, given: Tensor) -> Iterator[Any]:
    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=64)
    yield torch.export.export(model, (given,))
    yield torch.export.export(model, (given,), dynamic_shapes=({0: batch, 1: length},))


@feature("torch.export of an unmerged model, also with dynamic shapes")
@every_kind
def test_a_live_model_exports_and_comes_back_from_its_file(column):
    model = network(column)
    static, dynamic = ways_to_export(model, tokens())
    buffer = io.BytesIO()
    torch.export.save(static, buffer)
    buffer.seek(0)
    assert close(torch.export.load(buffer).module()(tokens()), model(tokens()))
    assert close(dynamic.module()(tokens(5, 9)), model(tokens(5, 9)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")  # torch would rather have torch.export
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of checks that hold for every size
@feature("torch.jit.trace of an unmerged model, called with other sizes")
@every_kind
@pytest.mark.parametrize("flows", [True, False], ids=["gradients", "no gradients"])
def test_a_traced_model_serves_other_sizes(column, flows):
    model = network(column).train(flows)
    with torch.set_grad_enabled(flows):
        traced = torch.jit.trace(model, (tokens(),), check_trace=False)
        for given in (tokens(), tokens(5, 9), tokens(1, 4)):
            assert close(traced(given), model(given))


@feature("torch.export of a merged model")
@every_kind
def test_a_merged_model_exports_with_the_operators_of_the_base(column, record_property):
    model = network(column)
    if not column.folds:
        with pytest.raises(peftlib.AdapterError, match=column.name) as error:
            peftlib.merge(model)
        refused(record_property, error)
        return
    live = model(tokens())
    with peftlib.merged(model):
        program = torch.export.export(model, (tokens(),))
        assert close(program.module()(tokens()), live)  # it holds the model's own weights
    base = torch.export.export(network(), (tokens(),))
    assert _operators(program) == _operators(base)


def _operators(program: Any) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


# Copies and files


@feature("deepcopy and pickle")
@every_kind
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_clone_computes_the_same_and_shares_nothing(column, clone):
    model = network(column)
    other = clone(model)
    assert torch.equal(other(tokens()), model(tokens()))
    moved(other, seed=9)
    assert not torch.equal(other(tokens()), model(tokens()))
    peftlib.eject(other)
    assert torch.equal(other(tokens()), network()(tokens()))


@feature("torch.save of the whole model, loaded in another process")
@every_kind
def test_the_whole_model_loads_in_a_fresh_process(column, tmp_path):
    model = network(column)
    torch.save(model, tmp_path / "model.pt")
    torch.save((tokens(), model(tokens()).detach()), tmp_path / "expected.pt")
    code = (
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "model = torch.load('model.pt', weights_only=False)\n"
        "given, expected = torch.load('expected.pt')\n"
        "assert torch.equal(model(given), expected)\n"
        "import peftlib\n"
        "print(*[kind for *_, kind in peftlib.adapters(model)])\n"
        "peftlib.save(model, 'adapter.safetensors')\n"
        "peftlib.eject(model)\n"
        "print(model)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    ).stdout
    assert column.name in printed
    assert str(network()) in printed
    fresh = network()
    peftlib.load(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(fresh(tokens()), model(tokens()))


def _add_extra(module: Any, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    state[prefix + "extra"] = state[prefix + "norm1.bias"]


@pytest.mark.mutants
@feature("state-dict hooks of the model")
@every_kind
def test_state_dict_hooks_run_as_before(column):
    model, seen = network(), []
    layer = model.layers[0]
    layer.register_state_dict_pre_hook(lambda *_: seen.append("pre"))
    layer.register_state_dict_post_hook(_add_extra)
    layer.register_load_state_dict_pre_hook(lambda m, state, prefix, *_: seen.append(state.pop(prefix + "extra", None)))
    layer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    put(model, column)
    state = moved(model).state_dict()
    assert "layers.0.extra" in state
    fresh = copy.deepcopy(model)
    moved(fresh, seed=9)
    fresh.load_state_dict(state)
    assert same(adapter_state(fresh), adapter_state(model))
    assert seen[0] == "pre"
    assert "loaded" in seen
    peftlib.eject(model)
    assert "layers.0.extra" in model.state_dict()


def another_base() -> dict[str, Tensor]:
    """A checkpoint of the base alone, with other values."""
    with torch.no_grad():
        return {key: tensor * 0.5 for key, tensor in network().state_dict().items()}


def read_from_base_file(model: nn.Module, tmp_path: Path, way: str) -> Any:
    if way == "safetensors":
        save_file(another_base(), tmp_path / "base.safetensors")
        return load_model(model, tmp_path / "base.safetensors")
    return model.load_state_dict(another_base(), strict=True, assign=way == "assign")


@pytest.mark.mutants
@feature("load_state_dict(strict=True) of a checkpoint of the base, and safetensors' load_model")
@every_kind
@pytest.mark.parametrize("way", ["copy", "assign", "safetensors"])
def test_a_checkpoint_of_the_base_loads_and_leaves_the_adapters(column, way, tmp_path):
    model = network(column)
    adapters = {key: tensor.clone() for key, tensor in adapter_state(model).items()}
    own = [id(p) for p in peftlib.parameters(model)]
    missing, unexpected = read_from_base_file(model, tmp_path, way)
    assert not missing
    assert not unexpected
    assert same(base_state(model), another_base())
    assert same(adapter_state(model), adapters)
    assert [id(p) for p in peftlib.parameters(model)] == own
    assert all(p.requires_grad for p in peftlib.parameters(model))


@pytest.mark.mutants
@feature("load_state_dict(strict=True) of a checkpoint with adapters, and safetensors' save_model")
@every_kind
def test_a_whole_checkpoint_comes_back_whole(column, tmp_path):
    model = network(column)
    save_model(model, tmp_path / "whole.safetensors")
    for load in (
        lambda m: load_model(m, tmp_path / "whole.safetensors"),
        lambda m: m.load_state_dict(model.state_dict()),
    ):
        other = moved(network(column), seed=9)
        missing, unexpected = load(other)
        assert not missing
        assert not unexpected
        assert torch.equal(other(tokens()), model(tokens()))


@pytest.mark.mutants
@every_kind
def test_a_checkpoint_with_a_part_of_the_adapters_is_refused(column):
    """Whichever part: that of the first host, of the last, or one tensor."""
    model = network(column)
    state, keys = model.state_dict(), list(adapter_state(model))
    hosts = dict.fromkeys(key.partition("adapters.")[0] for key in keys)
    gone = [[key for key in keys if key.startswith(host)] for host in (next(iter(hosts)), next(reversed(hosts)))]
    for absent in [*(gone if len(hosts) > 1 else []), keys[:1]]:
        if len(absent) == len(keys):
            continue
        part = {key: tensor for key, tensor in state.items() if key not in absent}
        with pytest.raises(RuntimeError, match=r"Missing key\(s\)") as error:
            model.load_state_dict(part)
        assert all(key in str(error.value) for key in absent)
        assert sorted(model.load_state_dict(part, strict=False).missing_keys) == sorted(absent)


@pytest.mark.mutants
@every_kind
def test_a_checkpoint_of_one_adapter_is_not_one_of_two(column):
    model = network(column, name="first")
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    peftlib.activate(model)  # two copies of one weight are not active together
    put(model, column, name="second")
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*second"):
        model.load_state_dict(state)


@pytest.mark.mutants
def test_a_load_after_another_begins_anew():
    model = network(COLUMNS[0])
    whole = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for _ in range(2):
        assert not model.load_state_dict(another_base()).missing_keys
        assert not model.load_state_dict(whole).missing_keys
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*head.weight"):
        model.load_state_dict({key: tensor for key, tensor in another_base().items() if key != "head.weight"})


@pytest.mark.mutants
@pytest.mark.parametrize("column", [c for c in COLUMNS if c.folds], ids=lambda c: c.name)
def test_a_merged_model_refuses_a_checkpoint(column):
    """Unmerging would put the weights from before the merge over those that were loaded."""
    model = network(column)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    peftlib.merge(model)
    with pytest.raises(
        peftlib.AdapterError, match=r"default is merged into .*unmerge would bring the old weights back"
    ):
        model.load_state_dict(state)
    peftlib.unmerge(model)
    model.load_state_dict(state)


@pytest.mark.mutants
def test_forward_mode_differentiates_through_adapters():
    """Only torch's own deprecated use of its own scripting is passed over."""
    model = network(COLUMNS[0], torch.float64)
    own = adapter_state(model)
    run = lambda state: torch.func.functional_call(model, state, (tokens(),))  # noqa: E731
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.filterwarnings("ignore", ".*torch.jit.script")  # of another category in torch 2.14
        found = torch.func.jvp(run, (own,), (own,))[1]
    small = 1e-6
    ends = [run({key: tensor * (1 + sign * small) for key, tensor in own.items()}) for sign in (1, -1)]
    assert torch.allclose(found, (ends[0] - ends[1]) / (2 * small), atol=1e-7)

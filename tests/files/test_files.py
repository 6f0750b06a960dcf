"""What is saved comes back to the bit, onto its own base only, and a file is the old one or the new one, whole."""

import copy
import gc
import json
import os
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

import peftlib
from peftlib import AdapterError, Full, LoRA
from support.faults import Fault, failing
from support.helpers import (
    Gain,
    Offset,
    bits,
    chain,
    changes,
    linears,
    moved,
    network,
    same_bits,
    snapshot,
    tokens,
)
from support.refusals import refused

pytestmark = pytest.mark.mutants


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter.safetensors"


def adapter_bits(model: Any, name: str | None = None) -> list[Any]:
    found = peftlib.adapters(model, name)
    return [
        (host, type(a).__name__, a.config, {k: (t.dtype, t.shape, bits(t)) for k, t in a.state_dict().items()})
        for host, _, a in found
    ]


def mixed() -> Any:
    """One name, three kinds: a LoRA on attention, whole norms, a head."""
    model = network()
    peftlib.inject(model, ["q_proj", "embedding"], LoRA, rank=2, alpha=3)
    peftlib.inject(model, nn.LayerNorm, Full)
    peftlib.inject(model, "head", Full, params="*")
    peftlib.inject(model, "layers.0", Full, params="v_proj.weight")
    return moved(model)


class Conditioned(peftlib.Adapter):
    """A user's own kind: parameters, a buffer, and scratch that is drawn again in each process."""

    def __init__(self, host: Any, shift: float = 0.0, tags: list[str] | None = None) -> None:
        super().__init__()
        self.shift, self.tags = shift, tags
        self.gain = nn.Parameter(torch.ones_like(host.weight[:, :1]))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=host.weight.device))
        self.register_buffer("mask", torch.full_like(host.weight, 2.0), persistent=False)

    def fold(self, host: Any) -> dict[str, Tensor]:
        return {"weight": host.weight * self.gain * self.mask + self.shift}


CASES = {
    "LoRA": lambda: moved(injected(network(), nn.Linear, LoRA, rank=2)),
    "LoRA on an embedding": lambda: moved(injected(network(), "embedding", LoRA, rank=2)),
    "LoRA, pissa": lambda: moved(injected(network(), nn.Linear, LoRA, rank=2, init="pissa")),
    "LoRA, stabilised": lambda: moved(injected(network(), nn.Linear, LoRA, rank=2, alpha=5, rank_stabilized=True)),
    "Full, a head": lambda: moved(injected(network(), "head", Full)),
    "Full, norms": lambda: moved(injected(network(), nn.LayerNorm, Full)),
    "Full, biases": lambda: moved(injected(network(), ["q_proj", "head"], Full, params="bias")),
    "Full, the whole": lambda: moved(injected(network(), lambda name, module: name == "", Full)),
    "several kinds": mixed,
    "only a weight form": lambda: moved(injected(network(), "v_proj", Gain, start=2.0)),
    "only a call form": lambda: moved(injected(network(), "head", Offset)),
}


def injected(model: Any, targets: Any, kind: Any, **config: Any) -> Any:
    peftlib.inject(model, targets, kind, **config)
    return model


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_a_round_trip_is_exact(make, path):
    model = make()
    peftlib.save(model, path)
    other = network()
    assert peftlib.load(other, path) == list(dict.fromkeys(host for host, _, _ in peftlib.adapters(model)))
    assert adapter_bits(other) == adapter_bits(model)
    assert same_bits(other(tokens()), model(tokens()))
    assert [name for name, p in other.named_parameters() if p.requires_grad] == [
        name for name, p in model.named_parameters() if p.requires_grad
    ]
    peftlib.eject(other)
    assert changes(snapshot(network()), other) != [], "another object"
    assert same_bits(other(tokens()), network()(tokens()))


@pytest.mark.parametrize("base", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own", [None, "float32", "float64", "bfloat16", "float16"])
def test_a_round_trip_keeps_every_dtype(base, own, path):
    model = network().to(base)
    peftlib.inject(model, "q_proj", LoRA, rank=2, dtype=own)
    peftlib.inject(model, nn.LayerNorm, Full, dtype=own)
    moved(model)
    peftlib.save(model, path)
    other = network().to(base)
    peftlib.load(other, path)
    assert adapter_bits(other) == adapter_bits(model)
    expected = getattr(torch, own) if own else base if base.itemsize > 2 else torch.float32
    assert {p.dtype for p in peftlib.parameters(other)} == {expected}


def test_what_is_saved_can_train_on_after_loading_and_the_file_stays(path):
    peftlib.save(mixed(), path)
    before = path.read_bytes()
    other = network()
    peftlib.load(other, path)
    optimizer = torch.optim.AdamW(peftlib.parameters(other), lr=0.1)
    other(tokens()).square().sum().backward()
    optimizer.step()
    assert path.read_bytes() == before
    peftlib.save(other, path)
    again = network()
    peftlib.load(again, path)
    assert adapter_bits(again) == adapter_bits(other)


def test_batchnorm_statistics_travel(path):
    def make():
        with torch.random.fork_rng([]):
            torch.manual_seed(1)
            return chain(nn.Linear(4, 4), nn.BatchNorm1d(4))

    model, other = make(), make()
    peftlib.inject(model, nn.BatchNorm1d, Full)
    untouched = {key: bits(value) for key, value in model[1].named_buffers(recurse=False)}
    for _ in range(3):
        model(torch.randn(8, 4) * 3 + 1)
    assert {key: bits(value) for key, value in model[1].named_buffers(recurse=False)} == untouched
    peftlib.save(model, path)
    peftlib.load(other, path)
    x = torch.randn(5, 4)
    assert same_bits(other.eval()(x), model.eval()(x))
    assert not torch.equal(other(x), make().eval()(x))
    ((_, _, adapter),) = peftlib.adapters(other)
    assert adapter.state_dict()["own.num_batches_tracked"] == 3


def test_a_users_own_kind_travels_with_its_buffers(path):
    model = linears()
    peftlib.inject(model, "1", Conditioned, shift=0.5, tags=["a"])
    moved(model)
    ((_, _, adapter),) = peftlib.adapters(model)
    adapter.steps.fill_(7)
    peftlib.save(model, path)
    other = linears()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
    peftlib.load(other, path)
    ((_, _, found),) = peftlib.adapters(other)
    assert (found.shift, found.tags, int(found.steps)) == (0.5, ["a"], 7)
    assert same_bits(other(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_a_module_with_a_scalar_parameter_can_be_adapted_and_saved(path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))
            self.logit_scale = nn.Parameter(torch.tensor(2.0))
            self.empty = nn.Parameter(torch.ones(0, 4))

        def forward(self, x):
            return x @ self.weight * self.logit_scale

    model, other = chain(Scaled()), chain(Scaled())
    peftlib.inject(model, "0", LoRA, rank=2)
    peftlib.inject(model, "0", Full, params="logit_scale")
    moved(model)
    peftlib.save(model, path)
    peftlib.load(other, path)
    assert adapter_bits(other) == adapter_bits(model)


def test_a_root_host_and_a_stack_travel(path):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.ones(3, 4, 2))
            self.down = nn.Parameter(torch.ones(3, 2, 4))

        def forward(self, x):
            return torch.einsum("nhd,ndh,bd->bd", self.down.mT, self.up.mT, x)

    model, other = Experts(), Experts()
    assert peftlib.inject(model, Experts, LoRA, param=["up", "down"], rank=2) == [""]
    moved(model)
    peftlib.save(model, path)
    assert peftlib.load(other, path) == [""]
    assert set(peftlib.read_header(path)["tensors"]) == {f"{p}.lora_{f}" for p in ("up", "down") for f in "AB"}
    assert adapter_bits(other) == adapter_bits(model)


def test_two_parts_that_would_write_one_key_are_refused_or_both_saved(path):
    """A Full around a layer and a Full on a linear in it both know "layers.0.q_proj.weight"."""
    model = network()
    peftlib.inject(model, "layers.0.q_proj", Full, params="weight")
    try:
        peftlib.inject(model, "layers.0", Full, params="q_proj.weight")
        moved(model)
        peftlib.save(model, path)
    except AdapterError as refusal:
        assert "q_proj.weight" in str(refusal)  # noqa: PT017 (either answer is right)
        return
    other = network()
    peftlib.load(other, path)
    assert adapter_bits(other) == adapter_bits(model)


class Calibrated(peftlib.Adapter):
    """A user's own kind that looks at its host's values when it begins."""

    def __init__(self, host: Any) -> None:
        super().__init__()
        self.spread = host.weight.std().item()
        self.gain = nn.Parameter(torch.full_like(host.weight, 1.0))

    def fold(self, host: Any) -> dict[str, Tensor]:
        return {"weight": host.weight * self.gain / self.spread}


def test_a_kind_that_reads_its_hosts_values_travels_and_can_be_planned(path):
    model = linears()
    planned = peftlib.plan(model, "0", Calibrated)
    peftlib.inject(model, "0", Calibrated)
    assert planned.parameters == 16
    peftlib.save(moved(model), path)
    other = linears()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
    peftlib.load(other, path)
    assert same_bits(other(torch.ones(1, 4)), model(torch.ones(1, 4)))


# ---- the file itself


def test_what_a_file_holds(path):
    model = mixed()
    peftlib.save(model, path, metadata={"task": "reviews"})
    with safe_open(path, "pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
    header = json.loads(metadata["peftlib"])
    assert metadata["format"] == "pt"
    assert keys == {
        *(f"{host}.lora_{f}" for host in ("embedding", "layers.0.q_proj", "layers.1.q_proj") for f in "AB"),
        *(f"layers.{i}.norm.{p}" for i in (0, 1) for p in ("weight", "bias")),
        *("head.weight", "head.bias", "layers.0.v_proj.weight"),
    }
    assert set(header) == {"format", "version", "name", "configs", "hosts", "base", "metadata"}
    assert (header["format"], header["name"], header["metadata"]) == (1, "default", {"task": "reviews"})
    assert set(header["base"]) == set(header["hosts"]) == set(peftlib.read_header(path)["hosts"])


def test_equal_configurations_are_written_once(path):
    model = network(layers=6)
    peftlib.inject(model, "*_proj", LoRA, rank=2)
    peftlib.inject(model, "head", LoRA, rank=3)
    peftlib.save(model, path)
    header = peftlib.read_header(path)
    assert [one["config"]["rank"] for one in header["configs"]] == [2, 3]
    assert list(header["hosts"].values()) == [[0]] * 12 + [[1]]


def test_a_header_tells_shapes_and_dtypes_without_reading_tensors(path):
    peftlib.save(injected(network(), "head", LoRA, rank=2, dtype="bfloat16"), path)
    assert peftlib.read_header(path)["tensors"] == {
        "head.lora_A": {"dtype": "BF16", "shape": [2, 8]},
        "head.lora_B": {"dtype": "BF16", "shape": [3, 2]},
    }


@pytest.mark.parametrize(
    "metadata",
    [None, {}, {"task": "reviews", "f1": 0.1, "steps": [1, 2], "nested": {"ok": True, "none": None}, "é": "ü"}],
)
def test_metadata_come_back(metadata, path):
    peftlib.save(injected(network(), "head", LoRA), path, metadata=metadata)
    assert peftlib.read_header(path)["metadata"] == (metadata or {})


def test_metadata_that_would_not_come_back_as_they_are_are_refused(path):
    with refused(None, "metadata"):
        peftlib.save(injected(network(), "head", LoRA), path, metadata={1: "one"})


def test_only_the_named_adapter_is_in_the_file(path):
    model = network()
    peftlib.inject(model, "head", LoRA, rank=2, name="a")
    peftlib.inject(model, ["head", "q_proj"], LoRA, rank=3, name="b")
    peftlib.save(moved(model), path, "b")
    other = network()
    peftlib.load(other, path)
    assert adapter_bits(other) == adapter_bits(model, "b")
    assert {name for _, name, _ in peftlib.adapters(other)} == {"b"}


def test_an_adapter_can_be_given_another_name_on_loading(path):
    model = mixed()
    peftlib.save(model, path)
    other = network()
    peftlib.load(other, path)
    peftlib.activate(other)
    peftlib.load(other, path, name="twin")
    assert adapter_bits(other, "twin") == adapter_bits(other, "default") == adapter_bits(model)
    peftlib.activate(other, "twin")
    assert same_bits(other(tokens()), model(tokens()))


def test_loading_makes_the_adapter_active_freezes_and_draws_nothing(path):
    peftlib.save(mixed(), path)
    other = network()
    random = torch.get_rng_state()
    peftlib.load(other, path)
    assert torch.equal(torch.get_rng_state(), random)
    assert {row.state for row in peftlib.summary(other).rows} == {"active"}
    assert peftlib.summary(other).base_trainable == 0
    assert {a.training for _, _, a in peftlib.adapters(other)} == {other.training}


def test_an_adapter_saved_while_merged_is_the_same_file(path):
    model = mixed()
    peftlib.save(model, path)
    live = peftlib.read_header(path)
    with peftlib.merged(model):
        peftlib.save(model, path)
    assert peftlib.read_header(path) == live
    other = network()
    peftlib.load(other, path)
    assert adapter_bits(other) == adapter_bits(model)


def test_a_transposed_or_strided_tensor_is_saved_as_its_values(path):
    model = injected(linears(), "0", LoRA, rank=2)
    ((_, _, adapter),) = peftlib.adapters(model)
    adapter.lora_A = nn.Parameter(torch.randn(4, 2).T)
    adapter.lora_B = nn.Parameter(torch.randn(4, 4)[:, ::2])
    peftlib.save(model, path)
    other = linears()
    peftlib.load(other, path, strict=False)
    assert adapter_bits(other) == adapter_bits(model)


def test_a_kind_whose_state_holds_its_live_parameters_is_saved(path):
    model = injected(linears(), "0", LoRA)
    ((_, _, adapter),) = peftlib.adapters(model)
    adapter.register_state_dict_post_hook(lambda module, state, prefix, _: state.update(lora_A=module.lora_A))
    peftlib.save(model, path)
    other = copy.deepcopy(model)
    peftlib.eject(other)
    peftlib.load(other, path)
    assert adapter_bits(other) == adapter_bits(model)


class Second:
    """The mesh of two processes as the second of them sees it."""

    mesh = torch.arange(2)

    def get_rank(self) -> int:
        return 1


def test_a_process_that_is_not_the_first_gathers_every_tensor_holds_none_and_writes_nothing(path):
    """The others of its mesh wait for it in each gathering; what it gathers is for them."""
    model = mixed()
    alive: list[int] = []

    def gathered(tensor: Tensor) -> Tensor:
        gc.collect()
        alive.append(sum(issubclass(type(each), Tensor) for each in gc.get_objects()))
        return tensor.clone()

    def shard(tensor: Any) -> None:
        tensor.full_tensor, tensor.device_mesh = lambda: gathered(tensor), Second()

    def sharded(module: Any, state: dict[str, Tensor], prefix: str, _: Any) -> None:
        for tensor in state.values():
            shard(tensor)

    for _, _, adapter in peftlib.adapters(model):
        adapter.register_state_dict_post_hook(sharded)
        for parameter in adapter.parameters():
            shard(parameter)
    peftlib.save(model, path)
    assert len(alive) == sum(len(adapter.state_dict()) for _, _, adapter in peftlib.adapters(model))
    assert max(alive) <= alive[0] + 8, "one adapter's own, and the one that was gathered before"
    assert not path.exists()


def test_parameters_that_share_memory_are_each_saved(path):
    model = injected(linears(), ["0", "1"], LoRA, rank=2)
    first, second = (adapter for _, _, adapter in peftlib.adapters(model))
    second.lora_A = first.lora_A
    peftlib.save(moved(model), path)
    assert len(peftlib.read_header(path)["tensors"]) == 4


def test_a_meta_model_takes_the_files_values(path):
    model = mixed()
    peftlib.save(model, path)
    with torch.device("meta"):
        other: Any = type(model)()
    peftlib.load(other, path)
    assert not any(p.is_meta for p in peftlib.parameters(other))
    other.load_state_dict(network().state_dict(), strict=False, assign=True)
    assert same_bits(other.eval()(tokens()), model(tokens()))


# ---- atomic


def test_no_temporary_file_is_left(path):
    peftlib.save(mixed(), path)
    peftlib.save(mixed(), path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("step", ["fsync", "replace", "open"])
@pytest.mark.parametrize("there", [True, False], ids=["over an old file", "a new file"])
def test_a_failing_write_leaves_the_old_file(step, there, path):
    model = mixed()
    if there:
        peftlib.save(network_with_head(), path)
    before = [(file.name, file.read_bytes()) for file in path.parent.iterdir()]
    with failing(os, step, 0), pytest.raises(Fault):
        peftlib.save(model, path)
    assert [(file.name, file.read_bytes()) for file in path.parent.iterdir()] == before


def network_with_head():
    return injected(network(), "head", LoRA)


def test_a_failing_writer_leaves_the_old_file(path):
    peftlib.save(network_with_head(), path)
    before = path.read_bytes()
    with failing(safetensors, "serialize_file", 0, late=True), pytest.raises(Fault):  # it wrote, then failed
        peftlib.save(mixed(), path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_is_synced_before_it_is_renamed(path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (done.append(name), real(*args)))
    peftlib.save(mixed(), path)
    assert done == ["fsync", "replace", "fsync"], "the data, the name, the folder"


def test_a_link_stays_a_link(path, tmp_path):
    (tmp_path / "store").mkdir()
    target = tmp_path / "store" / "v1.safetensors"
    target.write_bytes(b"old")
    path.symlink_to(target)
    model = mixed()
    peftlib.save(model, path)
    assert path.is_symlink()
    assert path.resolve() == target
    peftlib.load(network(), target)


def test_a_path_may_be_a_string_or_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    peftlib.save(mixed(), "adapter")
    assert peftlib.read_header("adapter")["name"] == "default"
    peftlib.load(network(), tmp_path / "adapter")


# ---- which base


def test_another_base_is_refused_and_its_hosts_are_named(path):
    peftlib.save(mixed(), path)
    other = network(seed=1)
    before = snapshot(other)
    with refused(None, "embedding", "values", "strict=False"):
        peftlib.load(other, path)
    assert changes(before, other) == []


def test_another_root_is_called_so(path):
    peftlib.save(injected(nn.Linear(4, 4), nn.Linear, LoRA), path)
    with refused(None, "the root", "values", "strict=False"):
        peftlib.load(nn.Linear(4, 4), path)


def test_another_base_is_accepted_if_one_asks_for_it(path):
    model = mixed()
    peftlib.save(model, path)
    other = network(seed=1)
    peftlib.load(other, path, strict=False)
    assert adapter_bits(other) == adapter_bits(model)


def test_strict_false_still_refuses_other_shapes(path):
    peftlib.save(mixed(), path)
    with refused(None, "shape"):
        peftlib.load(network(width=6), path, strict=False)


def test_one_other_host_is_enough(path):
    peftlib.save(injected(network(), "q_proj", LoRA), path)
    other = network()
    with torch.no_grad():
        other.layers[1].q_proj.weight.mul_(1 + 2**-7)
    with refused(None, "layers.1.q_proj", "values", "strict=False"):
        peftlib.load(other, path)


@pytest.mark.parametrize("change", [lambda m: m.head, lambda m: m.layers[0].v_proj], ids=["the head", "another layer"])
def test_what_an_adapter_replaces_or_does_not_touch_may_differ(change, path):
    model = network()
    peftlib.inject(model, "q_proj", LoRA)
    peftlib.inject(model, "head", Full)
    peftlib.save(moved(model), path)
    other = network()
    nn.init.ones_(change(other).weight)
    peftlib.load(other, path)
    assert adapter_bits(other) == adapter_bits(model)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


# All but bfloat16 and float16 of each other: each has lost what would tell the two apart.
PAIRS = [(a, b) for a in DTYPES for b in DTYPES if {a, b} != {torch.bfloat16, torch.float16}]


@pytest.mark.parametrize(("made", "loaded"), PAIRS, ids=str)
def test_the_same_base_in_another_dtype_is_accepted(made, loaded, path):
    model = injected(network().to(made), "q_proj", LoRA, rank=2)
    peftlib.save(model, path)
    other = network().to(loaded)
    peftlib.load(other, path)
    assert adapter_bits(other)[0][3] == adapter_bits(model)[0][3]


@pytest.mark.parametrize("loaded", DTYPES)
def test_another_base_in_another_dtype_is_refused(loaded, path):
    peftlib.save(injected(network(), "q_proj", LoRA), path)
    with refused(None, "layers.0.q_proj", "values", "strict=False"):
        peftlib.load(network(seed=1).to(loaded), path)


def test_a_second_adapter_does_not_change_the_base(path):
    model = network()
    peftlib.inject(model, "layers.0", Full, name="a")
    peftlib.inject(model, "q_proj", LoRA, name="b")
    peftlib.save(moved(model), path, "b")
    peftlib.load(network(), path)
    peftlib.save(model, path, "a")
    peftlib.load(network(), path)


def test_loading_beside_a_live_adapter_works(path):
    peftlib.save(mixed(), path)
    other = network()
    peftlib.inject(other, nn.Linear, LoRA, name="b")
    peftlib.load(other, path)
    assert {name for _, name, _ in peftlib.adapters(other)} == {"b", "default"}


class OfManyDtypes(peftlib.Adapter):
    def __init__(self, host: Any) -> None:
        super().__init__()
        wide, narrow = (torch.float64, torch.complex64, torch.int64), (torch.bfloat16, torch.int16, torch.float8_e4m3fn)
        for at, dtype in enumerate((torch.uint8, torch.bool, *narrow, *wide)):
            self.register_buffer(f"{at}ключ", torch.arange(3).to(dtype))
        self.register_buffer("scalar", torch.tensor(2.5))

    def fold(self, host: Any) -> dict[str, Tensor]:
        return {}


def test_any_reader_of_safetensors_finds_every_dtype_where_it_is(path):
    """Each tensor begins at a multiple of its size, as whoever maps the file asks for."""
    model = injected(linears(1), "0", OfManyDtypes)
    peftlib.save(model, path, metadata={"said": 'a "quote"\n\u2028'})
    found, ((_, _, adapter),) = safetensors.torch.load_file(path), peftlib.adapters(model)
    expected = {f"0.{key}": tensor for key, tensor in adapter.state_dict().items()}
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape, bits(found[key])) == (tensor.dtype, tensor.shape, bits(tensor)), key
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    written = json.loads(raw[8 : 8 + length])
    assert not length % 8
    assert all(not written[key]["data_offsets"][0] % tensor.itemsize for key, tensor in expected.items())
    assert peftlib.read_header(path)["metadata"] == {"said": 'a "quote"\n\u2028'}

"""Untrusted files: whatever is wrong with one, load refuses it before it takes memory or touches the model."""

import copy
import json
import os
import random
import re
import socket
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peftlib
from peftlib import AdapterError, LoRA
from support.forgery import DTYPES, Forgery
from support.helpers import base_bits, bits, changes, linears, moved, network, snapshot
from support.refusals import refused, require_three_parts

examples = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Meter(TorchDispatchMode):
    """The bytes of memory that operations gave, not counting the meta device, where tensors have none."""

    taken = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not leaf.is_meta and leaf.untyped_storage()._cdata not in given:
                self.taken += leaf.untyped_storage().nbytes()
        return result


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "adapter.safetensors"
    model = network(layers=1)
    peftlib.inject(model, ["q_proj", "head"], LoRA, rank=2)
    torch.manual_seed(0)
    peftlib.save(moved(model), path, metadata={"task": "reviews"})
    return path.read_bytes()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "untrusted.safetensors"


def load_refused(path: Path, make: Callable[[], Any] = lambda: network(layers=1)) -> str:
    """Loads a bad file: the refusal's message, once memory and model are found in order."""
    model = make()
    before, size = snapshot(model), os.path.getsize(path)
    tracemalloc.start()
    try:
        with Meter() as meter, pytest.raises(AdapterError) as refusal:
            peftlib.load(model, path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert changes(before, model) == []
    assert meter.taken <= 10 * size + 2**20, "tensors"
    assert peak <= 100 * size + 2**22, "Python objects"
    message = str(refusal.value)
    assert message.isprintable()
    assert len(message) < 1200
    return message


def test_the_forger_can_write_a_sound_file(sound, path):
    """Else every forgery below would be refused for the wrong reason."""
    forgery = Forgery(sound)
    forgery.header["configs"][0]["config"]["alpha"] = 3.0
    path.write_bytes(forgery.whole())
    model = network(layers=1)
    peftlib.load(model, path)
    assert {adapter.scale for _, _, adapter in peftlib.adapters(model)} == {1.5}


# ---- the corpus


def entry(**change: Any) -> Callable[[Forgery], Any]:
    return lambda f: f.entries["head.lora_A"].update(change)


def config(**change: Any) -> Callable[[Forgery], Any]:
    return lambda f: f.header["configs"][0]["config"].update(change)


def header(**change: Any) -> Callable[[Forgery], Any]:
    return lambda f: f.header.update(change)


def kind(name: str) -> Callable[[Forgery], Any]:
    return lambda f: f.header["configs"][0].update(kind=name)


def attribute(**change: Any) -> Callable[[Forgery], Any]:
    return lambda f: vars(f).update(change)


def host(name: str) -> Callable[[Forgery], Any]:
    """Renames a host everywhere, its tensors too, so that only the name is wrong."""

    def rename(f: Forgery) -> None:
        for part in ("hosts", "base"):
            f.header[part][name] = f.header[part].pop("head")
        for key in [key for key in f.entries if key.startswith("head.")]:
            f.entries[f"{name}.{key.removeprefix('head.')}"] = f.entries.pop(key)

    return rename


def tensor(dtype: str, *values: float, shape: Any = (2, 8)) -> Callable[[Forgery], Any]:
    def put(f: Forgery) -> None:
        torch_dtype = DTYPES.get(dtype, torch.uint8)
        filled = torch.ones(16, dtype=torch_dtype)
        filled[: len(values)] = torch.tensor(values, dtype=torch_dtype)
        f.put("head.lora_A", dtype, list(shape), bits(filled))

    return put


def raw(dtype: str, shape: list[int], size: int) -> Callable[[Forgery], Any]:
    return lambda f: f.put("head.lora_A", dtype, shape, b"\x01" * size)


def twice(member: str) -> Callable[[Forgery], Any]:
    """The inner JSON with one of its members there twice."""
    return lambda f: vars(f).update(text=json.dumps(f.header)[:-1] + f', "{member}": {json.dumps(f.header[member])}}}')


def number(literal: str, where: str) -> Callable[[Forgery], Any]:
    def put(f: Forgery) -> None:
        f.header["configs"][0]["config"][where] = "HERE"
        f.text = json.dumps(f.header).replace('"HERE"', literal)

    return put


def many_parts(f: Forgery) -> None:
    f.header["hosts"]["head"] = [0] * 100_000


def shared_memory(f: Forgery) -> None:
    f.entries["head.lora_A"]["data_offsets"] = f.entries["layers.0.q_proj.lora_A"]["data_offsets"]


def hole(f: Forgery) -> None:
    f.data += b"\0" * 8
    last = max(f.entries.values(), key=lambda one: one["data_offsets"][1])
    last["data_offsets"] = [offset + 8 for offset in last["data_offsets"]]


CORPUS: dict[str, tuple[Callable[[Forgery], Any], str]] = {
    # the frame: length, JSON, offsets
    "a length of nothing": (attribute(length=0), " safetensors "),
    "a length one short": (lambda f: vars(f).update(length=len(f.whole()) - 8 - len(f.data) - 1), " safetensors "),
    "a length that eats the data": (lambda f: vars(f).update(length=len(f.whole()) - 8), " safetensors "),
    "a length beyond the file": (attribute(length=2**20), " safetensors "),
    "a length of 2^62": (attribute(length=2**62), " safetensors "),
    "a length of 2^64 - 1": (attribute(length=-1), " safetensors "),
    "bytes after the end": (lambda f: vars(f).update(data=f.data + b"\0"), " safetensors "),
    "bytes missing at the end": (lambda f: vars(f).update(data=f.data[:-1]), " safetensors "),
    "a hole in the data": (hole, " safetensors "),
    "two tensors in one place": (shared_memory, " safetensors "),
    "offsets beyond the file": (entry(data_offsets=[0, 2**40]), " safetensors "),
    "offsets backwards": (entry(data_offsets=[64, 0]), " safetensors "),
    "negative offsets": (entry(data_offsets=[-64, 0]), " safetensors "),
    "offsets in words": (entry(data_offsets=["0", "64"]), " safetensors "),
    "no offsets": (lambda f: f.entries["head.lora_A"].pop("data_offsets"), " safetensors "),
    "a tensor that is a list": (lambda f: f.entries.update({"head.lora_A": [1]}), " safetensors "),
    # tensors
    "a shape larger than its data": (entry(shape=[2, 9]), " safetensors "),
    "a shape of 2^80 elements": (entry(shape=[2**40, 2**40]), " safetensors "),
    "a shape that overflows to the right size": (entry(shape=[2**62, 4, 16]), " safetensors "),
    "a negative shape": (entry(shape=[-2, -8]), " safetensors "),
    "a shape of fractions": (entry(shape=[2.0, 8.0]), " safetensors "),
    "another shape of the same size": (entry(shape=[4, 4]), r"head\.lora_A .*\[4, 4\].*\[2, 8\]"),
    "a shape of a thousand ones": (entry(shape=[1] * 1000 + [2, 8]), "shape"),
    "no dimensions": (raw("F32", [], 4), r"shape \[\]"),
    "an empty tensor": (raw("F32", [0, 8], 0), r"shape \[0, 8\]"),
    "an unknown dtype": (entry(dtype="F33"), " safetensors "),
    "a dtype of another size": (entry(dtype="F64"), " safetensors "),
    "integers in place of floats": (entry(dtype="I32"), r"torch\.int32.*torch\.float32"),
    "bits": (raw("BOOL", [2, 8], 16), r"torch\.bool.*torch\.float32"),
    "complex numbers": (raw("C64", [2, 8], 128), r"torch\.complex64.*torch\.float32"),
    "eight-bit floats": (raw("F8_E4M3", [2, 8], 16), r"torch\.float8_e4m3fn.*torch\.float32"),
    "six-bit floats": (raw("F6_E2M3", [2, 8], 12), "Dtype not understood"),
    "four-bit floats": (raw("F4", [2, 8], 8), "shape|float4| safetensors "),
    "NaN": (tensor("F32", float("nan")), r"head\.lora_A .*NaN"),
    "infinity": (tensor("F32", float("inf")), r"head\.lora_A .*NaN"),
    "NaN in float16": (tensor("F16", 1.0, float("nan")), r"head\.lora_A .*NaN"),
    "minus infinity in bfloat16": (tensor("BF16", -float("inf")), r"head\.lora_A .*NaN"),
    "NaN in float64": (tensor("F64", float("nan")), r"head\.lora_A .*NaN"),
    # keys
    "a tensor twice": (attribute(again=b'"head.lora_A": {"dtype":"F32","shape":[2,8],"data_offsets":[0,64]}'), "twice"),
    "metadata twice": (attribute(again=b'"__metadata__": {}'), " safetensors |twice"),
    "a member of the header twice": (twice("name"), "twice"),
    "hosts twice": (twice("hosts"), "twice"),
    "a foreign tensor": (lambda f: f.put("other", "F32", [1], b"\0" * 4), "unexpected other"),
    "a tensor named as a path": (lambda f: f.put("../../etc/pw", "F32", [1], b"\0" * 4), r"unexpected \.\./\.\./etc"),
    "a tensor for the base": (lambda f: f.put("head.weight", "F32", [3, 8], b"\0" * 96), r"unexpected head\.weight"),
    "a tensor with commands for the terminal": (
        lambda f: f.put("\x1b[2J\x1b]0;gone\x07", "F32", [1], b"\0" * 4),
        r"unexpected \\x1b",
    ),
    "a tensor with a long name": (lambda f: f.put("x" * 10_000, "F32", [1], b"\0" * 4), "unexpected xxx"),
    "a tensor without a name": (lambda f: f.put("", "F32", [1], b"\0" * 4), "unexpected"),
    "a foreign member of the header": (header(extra=1), "keys.*extra"),
    "a foreign member of a configuration": (
        lambda f: f.header["configs"][0].update(module="os"),
        "configuration",
    ),
    # JSON
    "an inner list": (attribute(text="[]"), "format"),
    "an inner bracket a hundred thousand times": (attribute(text="[" * 100_000), "not JSON"),
    "inner braces a hundred thousand times": (attribute(text='{"a":' * 100_000), "not JSON"),
    "no text": (attribute(text=""), "not JSON"),
    "NaN in JSON": (number("NaN", "alpha"), "not JSON"),
    "infinity in JSON": (number("-Infinity", "alpha"), "not JSON"),
    "a float beyond floats": (number("1e999", "alpha"), "not JSON"),
    "an integer of ten thousand digits": (number("9" * 10_000, "rank"), "not JSON"),
    "an integer of a thousand digits": (number("9" * 1_000, "rank"), "configuration"),
    "an alpha of a thousand digits": (number("9" * 1_000, "alpha"), "configuration"),
    # hosts
    "a host named as a path": (host("../head"), r"\.\./head"),
    "a host named as an attribute": (host("head.weight"), r"head\.weight"),
    "a host named as a class": (host("__class__"), "__class__"),
    "a host of dots": (host(".."), r"\.\. "),
    "a host with commands for the terminal": (host("\x1b[31mhead"), r"\\x1b"),
    "a host that is only a container": (host("layers"), "ModuleList.*forward"),
    "a fingerprint for a host that is not named": (
        lambda f: f.header["base"].update(other=f.header["base"]["head"]),
        "fingerprint.*other",
    ),
    "a fingerprint of negative sizes": (
        lambda f: f.header["base"]["head"]["weights"].update(weight=["float32", -3, 8]),
        "fingerprint",
    ),
    "a fingerprint with a list for a hash": (
        lambda f: f.header["base"]["head"]["hash"].update(own=[1]),
        "fingerprint",
    ),
    "a hundred thousand parts": (many_parts, "100001 .*4 "),
    # names
    "a name that is a path": (header(name="../../evil"), "name="),
    "a name that is a path without dots": (header(name="/etc/passwd"), "name="),
    "a name that is a path elsewhere": (header(name="C\\evil"), "name="),
    "a name with commands for the terminal": (header(name="\x1b[2J"), "name="),
    "a name with a null": (header(name="a\0b"), "name="),
    "a name of a method": (header(name="forward"), "name=.*ModuleDict"),
    "a name of a slot": (header(name="__class__"), "name=.*ModuleDict"),
    # kinds
    **{
        f"kind {name!r}": (kind(name), "kind '")
        for name in ("Adapter", "Linear", "torch.nn.Linear", "os.system", "eval", "", "lora", "../LoRA", "x" * 10_000)
    },
    "another kind": (kind("Full"), "Full.*configuration"),
    # configurations
    **{
        f"rank={rank!r}": (config(rank=rank), "LoRA.*rank")
        for rank in (0, -1, 2.0, True, "2", [2], None, {})
    },
    **{
        f"rank={rank!r}": (config(rank=rank), "LoRA.*configuration|shape")
        for rank in (3, 10**6, 10**12, 2**62, 2**63, 2**64, 10**100)
    },
    **{
        f"{key}={value!r}": (config(**{key: value}), "configuration.*" + key)
        for key, value in {
            "host": 1, "self": 1, "cls": 1, "unheard": 1, "__init__": 1, "alpha": "8", "dropout": True, "init": 3,
            "rank_stabilized": 1, "param": ["weight"], "dtype": 32,
        }.items()
    },
    **{
        f"param={param!r}": (config(param=param), "configuration|missing")
        for param in ("__dict__", "__class__", "adapters", "weight.data", "..", "", "bias", "forward", "x" * 10_000)
    },
    **{
        f"dtype={dtype!r}": (config(dtype=dtype), "configuration.*dtype")
        for dtype in ("nn", "load", "__dict__", "int8", "complex64", "")
    },
    # the checksum
    "no checksum": (attribute(sum="none"), "bits"),
    "another checksum": (attribute(sum="0" * 64), "bits"),
    "an older checksum": (
        lambda f: (vars(f).update(sum=f.checksum(f.metadata["peftlib"])), f.header["metadata"].update(task="other")),
        "bits",
    ),
}  # fmt: skip


@pytest.mark.mutants
@pytest.mark.parametrize(("forge", "message"), CORPUS.values(), ids=[name[:40] for name in CORPUS])
def test_a_forged_file_is_refused(forge, message, sound, path):
    forgery = Forgery(sound)
    forge(forgery)
    path.write_bytes(forgery.whole())
    said = load_refused(path)
    require_three_parts(said)
    assert re.search(message, said)


FRAMES = {
    "nothing": b"",
    "seven bytes": b"\0" * 7,
    "only a length": struct.pack("<Q", 2),
    "an empty object": struct.pack("<Q", 2) + b"{}",
    "a header that is not UTF-8": struct.pack("<Q", 4) + b'{"\xff}',
    "a header of nulls": struct.pack("<Q", 64) + b"\0" * 64,
    "deep JSON": struct.pack("<Q", 50_000) + b"[" * 50_000,
    "deep JSON in an object": struct.pack("<Q", 50_004) + b'{"a"' + b":[" * 25_000,
    "a pickle": b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    "a zip": b"PK\x03\x04" + b"\0" * 100,
    "HTML": b"<!DOCTYPE html><html><body>404: Not Found</body></html>",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n",
    "another tool's file": struct.pack("<Q", 62)
    + b'{"weight": {"dtype": "F32", "shape": [1], "data_offsets":[0,4]}}'[:62].ljust(62)
    + b"\0" * 4,
}


@pytest.mark.parametrize("whole", FRAMES.values(), ids=list(FRAMES))
def test_what_is_no_adapter_file_is_refused(whole, path):
    path.write_bytes(whole)
    load_refused(path)
    with pytest.raises(AdapterError):
        peftlib.read_header(path)


def test_what_is_no_plain_file_is_refused_and_never_waited_for(tmp_path):
    """To open a pipe would wait for a writer for ever."""
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for special in (tmp_path / "pipe", tmp_path / "socket", Path("/dev/zero"), Path("/dev/null")):
            for act in (peftlib.read_header, lambda path: peftlib.load(linears(), path)):
                with refused(None, str(special)):
                    act(special)


def test_a_file_of_a_terabyte_of_nothing_takes_no_memory(path):
    with path.open("wb") as file:
        file.truncate(2**40)
    load_refused_cheaply(path)
    entry = {"head.lora_A": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}
    text = json.dumps({"__metadata__": {"peftlib": "{}"}, **entry}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(2**40 + 8 + len(text))
    load_refused_cheaply(path)


def load_refused_cheaply(path: Path) -> None:
    with Meter() as meter, pytest.raises((AdapterError, OSError)):
        peftlib.load(network(layers=1), path)
    assert meter.taken < 2**20


def test_a_child_that_is_read_but_never_called_is_no_host(path):
    """`inject` adapts the attention itself; a file that names the child would put an adapter where none ever runs."""
    part: Any = nn.MultiheadAttention(8, 2)
    peftlib.inject(part.out_proj, lambda name, module: name == "", LoRA, rank=2)
    peftlib.save(part, path)
    with refused(None, "out_proj"):
        peftlib.load(nn.MultiheadAttention(8, 2), path)


class Reading(peftlib.Adapter):
    """A kind that looks at its host's values, so that it cannot be tried on the meta device."""

    def __init__(self, host: Any, *, copies: int = 1, room: int = 1, parts: list[int] | None = None) -> None:
        super().__init__()
        self.start = host.weight.mean().item()
        self.gain = nn.Parameter(torch.ones(copies, device=host.weight.device))
        self.register_buffer("scratch", torch.ones(room, device=host.weight.device), persistent=False)

    def fold(self, host: Any) -> dict[str, Tensor]:
        return {"weight": host.weight * self.gain.mean()}


class Roomy(peftlib.Adapter):
    """A kind with scratch memory that is in no file."""

    def __init__(self, host: Any, *, room: int = 1) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones((), device=host.weight.device))
        self.register_buffer("scratch", torch.ones(room, device=host.weight.device), persistent=False)

    def fold(self, host: Any) -> dict[str, Tensor]:
        return {"weight": host.weight * self.gain}


@pytest.mark.parametrize(("kind", "change"), [(Reading, "copies"), (Reading, "room"), (Roomy, "room")])
def test_a_kind_that_must_be_tried_on_the_real_host_gets_no_absurd_memory(kind, change, path):
    model = linears(1)
    peftlib.inject(model, "0", kind)
    peftlib.save(moved(model), path)
    base = {key: value for key, value in model.state_dict().items() if "adapters" not in key}
    forgery = Forgery(path.read_bytes())
    forgery.header["configs"][0]["config"][change] = 10**9
    path.write_bytes(forgery.whole())

    def make() -> Any:
        other = linears(1)
        other.load_state_dict(base)
        return other

    require_three_parts(load_refused(path, make), str(path), "0", kind.__name__)
    forgery.header["configs"][0]["config"][change] = 1
    path.write_bytes(forgery.whole())
    peftlib.load(make(), path)


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "Bottleneck", "IA3", "Prefix", "Prompt", "Full"])
def test_no_kind_of_ours_takes_memory_for_an_absurd_keyword(name, path):
    own: Any = getattr(peftlib, name, None)
    if own is None:
        pytest.skip(f"{name} is not there yet")
    torch.manual_seed(0)
    target = {"Prefix": nn.MultiheadAttention, "Prompt": nn.Embedding}.get(name, "1")
    model: Any = nn.ModuleList([nn.Embedding(11, 8), nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)])
    base = copy.deepcopy(model)
    peftlib.inject(model, target, own)
    peftlib.save(model, path)
    whole = path.read_bytes()
    ((_, _, adapter),) = peftlib.adapters(model)
    for key in adapter.config:
        for absurd in (10**12, 10**7, 2**70, 0, -1):
            forgery = Forgery(whole)
            forgery.header["configs"][0]["config"][key] = absurd
            path.write_bytes(forgery.whole())
            other = copy.deepcopy(base)
            before = snapshot(other)
            with Meter() as meter:
                outcome(path, other, before)  # a scale of a million is unwise, and no lie
            assert meter.taken < 2**20
            assert changes(before, other) == []


# ---- damage by accident


def outcome(path: Path, model: Any, before: dict[str, Any]) -> str | None:
    """None where the file was refused as it should be, else what was loaded."""
    try:
        peftlib.load(model, path)
    except AdapterError:
        assert changes(before, model) == []
        return None
    loaded = repr(
        [(h, n, a.config, {k: bits(t) for k, t in a.state_dict().items()}) for h, n, a in peftlib.adapters(model)]
    )
    peftlib.eject(model)
    return loaded


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "adapter.safetensors"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2))
    peftlib.inject(model, "0", LoRA, rank=1)
    peftlib.save(moved(model), path)
    return path.read_bytes()


def small_model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2))


def flipped_bits(whole: bytes, positions: list[int], path: Path) -> None:
    model = small_model()
    before = snapshot(model)
    path.write_bytes(whole)
    sound = outcome(path, small_model(), {})
    for position in positions:
        flipped = bytearray(whole)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        loaded = outcome(path, model, before)
        if loaded is not None:  # a letter of JSON with two spellings
            assert loaded == sound, f"bit {position}"
            model, before = (fresh := small_model()), snapshot(fresh)


def test_a_flipped_bit_is_refused_or_changes_nothing(small, path):
    flipped_bits(small, random.Random(0).sample(range(8 * len(small)), 800), path)


@pytest.mark.slow
def test_every_single_flipped_bit_is_refused_or_changes_nothing(small, path):
    flipped_bits(small, list(range(8 * len(small))), path)


def test_every_truncation_is_refused(small, path):
    model = small_model()
    before = snapshot(model)
    for length in range(len(small)):
        path.write_bytes(small[:length])
        with pytest.raises(AdapterError):
            peftlib.load(model, path)
    assert changes(before, model) == []


edits = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "copy", "zero"]),
        st.integers(0, 2**16),
        st.integers(1, 64),
        st.binary(min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=5,
)


def edited(whole: bytes, edits: list[Any]) -> bytes:
    damaged = bytearray(whole)
    for what, where, length, filler in edits:
        at = where % max(1, len(damaged))
        if what == "flip":
            damaged[at : at + len(filler)] = bytes(a ^ b for a, b in zip(damaged[at:], filler, strict=False))
        elif what == "cut":
            del damaged[at : at + length]
        elif what == "insert":
            damaged[at:at] = filler
        elif what == "copy":
            damaged[at : at + length] = damaged[where % 97 : where % 97 + length]
        else:
            damaged[at : at + length] = bytes(length)
    return bytes(damaged)


def damage(whole: bytes, edits: list[Any], path: Path) -> None:
    path.write_bytes(whole)
    sound = outcome(path, small_model(), {})
    path.write_bytes(edited(whole, edits))
    model = small_model()
    assert outcome(path, model, snapshot(model)) in (None, sound)


@examples
@given(edits=edits)
def test_bytes_that_are_edited_are_refused_or_change_nothing(edits, small, path):
    damage(small, edits, path)


@pytest.mark.slow
@settings(examples, max_examples=5_000, derandomize=False)
@given(edits=edits)
def test_bytes_that_are_edited_are_refused_or_change_nothing_at_length(edits, small, path):
    damage(small, edits, path)


# ---- damage on purpose: a checksum that fits, and JSON that lies

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["", "head", "LoRA", "Full", "weight", "float32", "own", "0", "default", "lora_A", "../..", "\x1b["]
    ),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
)


def nodes(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON tree."""
    if not isinstance(tree, (dict, list)):
        return []
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    return [(tree, key) for key in keys] + [node for key in keys for node in nodes(tree[key])]


def lie(whole: bytes, lies: list[Any], path: Path) -> None:
    """Whatever loads is sound, and goes out without a trace; all else is refused and leaves the model."""
    forgery = Forgery(whole)
    for where, what, value in lies:
        tree = forgery.header if where % 3 else forgery.entries
        choices = nodes(tree)
        if not choices:
            continue
        container, key = choices[where % len(choices)]
        if what == "replace":
            container[key] = value
        elif what == "remove":
            del container[key]
        elif isinstance(container, dict):
            container[str(value)] = container.pop(key)
        else:
            container.append(value)
    path.write_bytes(forgery.whole())
    model = network(layers=1)
    before, weights = snapshot(model), base_bits(model)
    with Meter() as meter:
        loaded = outcome(path, model, before)
    assert meter.taken < 2**20
    assert loaded is None or base_bits(model) == weights


lies = st.lists(
    st.tuples(st.integers(0, 2**16), st.sampled_from(["replace", "remove", "rename"]), values), min_size=1, max_size=3
)


@examples
@given(lies=lies)
def test_a_header_that_lies_is_refused_or_harmless(lies, sound, path):
    lie(sound, lies, path)


@pytest.mark.slow
@settings(examples, max_examples=5_000, derandomize=False)
@given(lies=lies)
def test_a_header_that_lies_is_refused_or_harmless_at_length(lies, sound, path):
    lie(sound, lies, path)


@pytest.mark.mutants
def test_what_was_loaded_does_not_lie_in_the_file(sound, path):
    """Values that stayed in the mapped file would change with it, and end the process once the file is cut."""
    path.write_bytes(sound)
    model = network(layers=1)
    peftlib.load(model, path)
    before = [bits(parameter) for parameter in peftlib.parameters(model)]
    with path.open("r+b") as file:
        file.write(b"\xff" * len(sound))
    assert [bits(parameter) for parameter in peftlib.parameters(model)] == before
    with path.open("r+b") as file:
        file.truncate(0)
    assert [bits(parameter) for parameter in peftlib.parameters(model)] == before

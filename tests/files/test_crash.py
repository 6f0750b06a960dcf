"""Writes that survive: a killed process, a full disk or a bad path leave the old file or the new one, whole."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors import SafetensorError
from torch import nn

import peftlib
from peftlib import AdapterError, Full, LoRA
from support.helpers import linears
from support.refusals import refused

KILLED = """
import os, random, signal, sys, time
import torch, peftlib
from torch import nn

torch.set_num_threads(1)
path, kills = sys.argv[1], int(sys.argv[2])
random.seed(0)
model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
peftlib.inject(model, nn.Linear, peftlib.LoRA, rank=64)


def numbered(step):
    with torch.no_grad():
        for parameter in peftlib.parameters(model):
            parameter.fill_(step)
    peftlib.save(model, path, metadata={"step": step})


def found():
    other = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "adapters" not in k})
    step = peftlib.read_header(path)["metadata"]["step"]
    peftlib.load(other, path)
    assert all((parameter == step).all() for parameter in peftlib.parameters(other)), "a mixture"
    return step


def started(step):
    child = os.fork()
    if not child:
        numbered(step)
        os.kill(os.getpid(), signal.SIGKILL)  # an exit would first write what coverage has measured
    return child


def writing(limit):
    known = set(os.listdir(folder))
    while set(os.listdir(folder)) <= known and time.perf_counter() < limit:
        pass


folder, durations = os.path.dirname(path), []
for _ in range(6):
    start = time.perf_counter()
    os.waitpid(started(0), 0)
    durations.append(time.perf_counter() - start)
old = new = before = 0
for kill in range(1, kills + 1):
    child, whole = started(kill), 1.3 * sorted(durations)[2]
    if kill % 3:
        time.sleep(random.uniform(0, whole))
    else:
        writing(time.perf_counter() + whole)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    step = found()
    assert step in (before, kill), (step, before, kill)
    before = step
    old, new = old + (step != kill), new + (step == kill)
left = sum(name.endswith(".tmp") for name in os.listdir(folder))
print(old, new, left)
"""


@pytest.mark.parametrize("kills", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_a_killed_process_leaves_the_old_file_or_the_new_one(kills, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "adapter.safetensors"), str(kills)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    old, new, left = map(int, ran.stdout.split())
    print(f"{kills} kills: {old} times the old file, {new} times the new one, {left} in the middle of writing")
    assert old + new == kills
    assert min(old, new, left) >= kills / 40, "the moments are spread over the whole save"


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "adapter.safetensors"


def model_of(value: float, width: int = 64) -> Any:
    model = linears(1, width)
    peftlib.inject(model, "0", LoRA, rank=8)
    with torch.no_grad():
        for parameter in peftlib.parameters(model):
            parameter.fill_(value)
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@contextlib.contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """What a full disk does, without one. Python ignores the signal that comes with it, so the write itself fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 1, 100, 1000, 2000, 4000])
@pytest.mark.parametrize("there", [True, False], ids=["over an old file", "a new file"])
def test_a_full_disk_raises_and_leaves_the_old_file(size, there, path):
    if there:
        peftlib.save(model_of(1), path)
    before = contents(path.parent)
    with pytest.raises(OSError, match="while saving") as refusal, no_file_longer_than(size):
        peftlib.save(model_of(2), path)
    assert refusal.value.errno == errno.EFBIG
    assert refusal.value.filename == str(path)
    assert contents(path.parent) == before
    peftlib.save(model_of(2), path)
    peftlib.load(linears(1, 64), path, strict=False)


def test_a_disk_that_is_full_only_when_synced(path, monkeypatch):
    peftlib.save(model_of(1), path)
    before = contents(path.parent)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device while saving"):
        peftlib.save(model_of(2), path)
    assert contents(path.parent) == before


def test_an_error_without_a_number_is_told_as_it_is(path, monkeypatch):
    def broken(*_: Any, **__: Any) -> None:
        raise SafetensorError("no number")

    monkeypatch.setattr(safetensors, "serialize_file", broken)
    with refused(None, "no number"):
        peftlib.save(model_of(2), path)
    assert contents(path.parent) == {}


def test_a_dtype_that_the_format_lacks_is_refused(path):
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex128))
    peftlib.inject(model, "0", LoRA, rank=1)
    with refused(None, "0.lora_A", "torch.complex128"):
        peftlib.save(model, path)
    assert contents(path.parent) == {}


# ---- paths


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """Every folder above pytest's own is closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


@contextlib.contextmanager
def an_ordinary_user() -> Iterator[None]:
    """The superuser may write anywhere."""
    if os.getuid():
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


def test_a_read_only_folder(shared_folder):
    inside = shared_folder / "closed"
    inside.mkdir(mode=0o555)
    with (
        pytest.raises(PermissionError, match=r"Permission denied while saving: .*adapter\.safetensors"),
        an_ordinary_user(),
    ):
        peftlib.save(model_of(1), inside / "adapter.safetensors")
    assert contents(inside) == {}


def test_a_read_only_file_is_not_replaced(shared_folder):
    target = shared_folder / "adapter.safetensors"
    target.write_bytes(b"kept")
    target.chmod(0o444)
    with pytest.raises(PermissionError, match="the file is read-only"), an_ordinary_user():
        peftlib.save(model_of(1), target)
    assert contents(shared_folder) == {"adapter.safetensors": b"kept"}


def test_a_file_that_may_not_be_read(shared_folder):
    target = shared_folder / "adapter.safetensors"
    peftlib.save(model_of(1), target)
    target.chmod(0o200)
    with pytest.raises(PermissionError), an_ordinary_user():
        peftlib.load(linears(1, 64), target)


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for target in (tmp_path, tmp_path / "folder", tmp_path / "link", f"{tmp_path}/"):
        with pytest.raises(IsADirectoryError, match=r"is a folder\. Name a file in it\."):
            peftlib.save(model_of(1), target)
        with pytest.raises(IsADirectoryError):
            peftlib.load(linears(1, 64), target)
    assert sorted(os.listdir(tmp_path)) == ["folder", "link"]
    assert os.listdir(tmp_path / "folder") == []


def test_a_device_or_a_pipe_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "pipe", Path("/dev/null"), Path("/dev/full")):
        with refused(None, "device"):
            peftlib.save(model_of(1), target)
    assert Path("/dev/null").is_char_device()
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        peftlib.save(model_of(1), tmp_path / "file" / "adapter.safetensors")
    assert contents(tmp_path) == {"file": b"kept"}


def test_a_link_to_what_is_not_there_yet_is_followed(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "store" / "adapter.safetensors")
    peftlib.save(model_of(1), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert os.listdir(tmp_path / "store") == ["adapter.safetensors"]


def test_links_in_a_circle(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        peftlib.save(model_of(1), tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    assert (tmp_path / "a").is_symlink()


def test_a_name_of_every_length_that_the_system_takes(tmp_path):
    peftlib.save(model_of(1), tmp_path / ("a" * 255))
    peftlib.load(linears(1, 64), tmp_path / ("a" * 255), strict=False)
    with pytest.raises(OSError, match="File name too long"):
        peftlib.save(model_of(1), tmp_path / ("a" * 256))
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o664])
def test_the_permissions_of_the_old_file_stay(mode, path):
    peftlib.save(model_of(1), path)
    path.chmod(mode)
    peftlib.save(model_of(2), path)
    assert path.stat().st_mode & 0o777 == mode


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_permissions_that_the_umask_leaves(umask, mode, path):
    before = os.umask(umask)
    try:
        peftlib.save(model_of(1), path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


# ---- what must not take the place of a sound file

UNSOUND = {
    "NaN": (lambda a: a.lora_A.data[0].fill_(float("nan")), "NaN"),
    "infinity": (lambda a: a.lora_B.data[0].fill_(float("-inf")), "NaN"),
    "empty, as a shard may be": (lambda a: setattr(a.lora_A, "data", torch.empty(0)), "empty"),
    "meta": (lambda a: a.to("meta"), "meta"),
    "no tensor": (lambda a: a.register_state_dict_post_hook(lambda m, s, *_: s.update(lora_A=3)), "tensor"),
    "without a config": (lambda a: setattr(a, "config", {"rank": float("nan")}), "JSON"),
}


@pytest.mark.mutants
@pytest.mark.parametrize(("spoil", "message"), UNSOUND.values(), ids=list(UNSOUND))
def test_what_could_not_be_loaded_again_does_not_replace_what_can(spoil, message, path):
    peftlib.save(model_of(1), path)
    before = contents(path.parent)
    model = model_of(2)
    ((_, _, adapter),) = peftlib.adapters(model)
    spoil(adapter)
    with pytest.raises((AdapterError, ValueError), match=message):
        peftlib.save(model, path)
    assert contents(path.parent) == before


def test_eight_bit_floats_are_checked_too(path):
    """torch has no isfinite for them."""
    model = linears(1, 64)
    peftlib.inject(model, "0", Full, params="bias")
    ((_, _, adapter),) = peftlib.adapters(model)
    adapter.own.bias = nn.Parameter(torch.ones(64).to(torch.float8_e4m3fn), requires_grad=False)
    peftlib.save(model, path)
    with refused(None, "torch.float8_e4m3fn", "torch.float32"):
        peftlib.load(linears(1, 64), path, strict=False)
    adapter.own.bias = nn.Parameter(torch.full((64,), float("nan")).to(torch.float8_e4m3fn), requires_grad=False)
    with refused(None, "NaN"):
        peftlib.save(model, path)


def test_threads_that_save_to_one_path_leave_one_of_their_files(path):
    models = [model_of(value) for value in range(4)]
    failures: list[BaseException] = []

    def saves(model: Any) -> None:
        try:
            for _ in range(20):
                peftlib.save(model, path)
                peftlib.read_header(path)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=saves, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert os.listdir(path.parent) == [path.name]
    other = linears(1, 64)
    peftlib.load(other, path, strict=False)
    (value,) = {float(p.detach().mean()) for p in peftlib.parameters(other)}
    assert value in range(4)


def test_an_interrupt_while_saving_leaves_the_old_file(path, monkeypatch):
    peftlib.save(model_of(1), path)
    before = contents(path.parent)
    monkeypatch.setattr(os, "fsync", lambda _: signal.raise_signal(signal.SIGINT))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs behind
    try:
        with pytest.raises(KeyboardInterrupt):
            peftlib.save(model_of(2), path)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert contents(path.parent) == before

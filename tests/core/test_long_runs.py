"""Long runs: however often adapters come, act, fold, travel and go, nothing is left behind."""

import copy
import gc
import os
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftlib
from peftlib import Bottleneck, DoRA, Full, LoRA
from support.helpers import Gain, Offset, base_bits, chain, linears, moved, network, tokens


def cycle(model: Any, path: Path) -> None:
    """One life of three names: each public verb once."""
    peftlib.inject(model, ["q_proj", "head"], LoRA, rank=2, name="a")
    peftlib.inject(model, "norm", Full, name="a")
    peftlib.inject(model, "v_proj", DoRA, rank=2, name="b")
    peftlib.inject(model, "v_proj", Gain, name="b")
    peftlib.inject(model, "q_proj", Offset, name="c")
    peftlib.inject(model, "v_proj", Bottleneck, width=2, name="c")
    optimizer = torch.optim.SGD(peftlib.parameters(model), lr=0.01)
    model(tokens()).square().mean().backward()
    optimizer.step()
    with peftlib.activate(model, "c"), torch.no_grad():
        model(tokens())
    with peftlib.train_only(model, "b"):
        pass
    face = peftlib.view(model, "a")
    with torch.no_grad():
        face(tokens())
    del face
    peftlib.activate(model, "a", "b")
    with peftlib.merged(model):
        pass
    peftlib.merge(model, "a", backup="cpu")
    peftlib.unmerge(model)
    for _ in peftlib.merged_state_dict(model, "b"):
        pass
    peftlib.save(model, path, "a")
    peftlib.read_header(path)
    peftlib.eject(model, "a")
    peftlib.load(model, path)
    with pytest.raises(peftlib.AdapterError):
        peftlib.load(model, path)
    str(peftlib.summary(model))
    copy.deepcopy(model)
    peftlib.eject(model)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0


def mapped_files(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path)) if sys.platform == "linux" else 0


def hooks(model: nn.Module) -> int:
    return sum(len(slot) for m in model.modules() for key, slot in vars(m).items() if "hook" in key and slot)


def alive(kind: type) -> int:
    """`isinstance` would ask objects of others for their class, and some of those warn."""
    return sum(issubclass(type(item), kind) for item in gc.get_objects())


def own() -> int:
    """Objects of classes of peftlib: adapters, what the hosts of a model share, what is kept for each view."""
    return sum(str(type(item).__module__).startswith("peftlib") for item in gc.get_objects())


def counts(model: nn.Module, path: Path) -> dict[str, int]:
    gc.collect()
    return {
        "objects": len(gc.get_objects()),
        "tensors": alive(torch.Tensor),
        "modules": alive(nn.Module),
        "classes": sum(issubclass(type(item), type) and issubclass(item, nn.Module) for item in gc.get_objects()),
        "files": open_files(),
        "maps": mapped_files(path),
        "hooks": hooks(model),
        "peftlib's own": own(),
    }


def run(cycles: int, path: Path) -> None:
    model = network(layers=1)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    weights = base_bits(model)
    for _ in range(10):  # caches fill
        cycle(model, path)
    before, memory = counts(model, path), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(cycles):
        cycle(model, path)
    after = counts(model, path)
    grown = {key: after[key] - before[key] for key in before if after[key] > before[key]}
    assert grown.pop("objects", 0) <= 50, "a leak of one object a cycle would be more"
    assert grown == {}
    assert base_bits(model) == weights
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory  # KiB
    print(f"{cycles} cycles: the peak of memory rose by {rise} KiB; objects {before['objects']} -> {after['objects']}")
    assert rise < 32 * 1024


def test_a_hundred_cycles_leave_nothing(tmp_path):
    run(100, tmp_path / "adapter.safetensors")


@pytest.mark.slow
def test_ten_thousand_cycles_leave_nothing(tmp_path):
    run(10_000, tmp_path / "adapter.safetensors")


def test_saving_leaves_nothing_though_a_folder_on_the_path_of_modules_changes_meanwhile(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    model = linears()
    peftlib.inject(model, "0", LoRA, rank=2)

    def saved(times: range) -> int:
        for at in times:
            os.utime(tmp_path, (at, at))
            peftlib.save(model, tmp_path / "adapter.safetensors")
        gc.collect()
        return len(gc.get_objects())

    before = saved(range(1, 4))
    assert saved(range(4, 34)) - before < 30, "a leak of one object a save would be more"


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_cycles_of_a_compiled_model_compile_nothing_anew():
    """Activation is plain data that is guarded on: each choice has one graph, however often it comes back."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        model = chain(nn.Linear(4, 4), nn.Linear(4, 4))
        peftlib.inject(model, "0", LoRA, rank=2, name="a")
        peftlib.inject(model, "1", Full, name="b")
        moved(model)
        compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
        x = torch.ones(2, 4)

        def round_of_choices() -> None:
            for names in ((), ("a",), ("b",), ("a", "b")):
                peftlib.activate(model, *names)
                with torch.no_grad():
                    compiled(x)
            with peftlib.merged(model), torch.no_grad():
                compiled(x)

        round_of_choices()
        first = graphs()
        assert 0 < first <= 5
        for _ in range(50):
            round_of_choices()
        assert graphs() == first
    finally:
        torch._dynamo.reset()


def test_a_model_that_is_thrown_away_with_its_adapters_is_freed():
    gc.collect()
    before = own()
    for _ in range(20):
        model = network()
        peftlib.inject(model, nn.Linear, LoRA)
        face = peftlib.view(model)
        peftlib.merged_state_dict(model)
        del model, face
    gc.collect()
    assert own() == before

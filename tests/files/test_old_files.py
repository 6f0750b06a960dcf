"""Files that version 0.1.0 wrote still load to the bit, and a pickle names nothing that a move inside would break."""

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftlib

FOLDER = Path(__file__).parent / "version_0_1_0"
WRITTEN = sorted(path.stem for path in FOLDER.glob("*.safetensors") if path.stem not in ("base", "outputs"))


class Model(nn.Module):
    """The base of these files; its weights are in `base.safetensors`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(torch.tanh(self.linear(self.norm(x))))


def base() -> Any:
    model = Model().eval()
    model.load_state_dict(load_file(FOLDER / "base.safetensors"))
    return model


def tensors_by_key(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{host}.{key}": adapter.state_dict()[inner]
        for host, _, adapter in peftlib.adapters(model)
        for key, inner in adapter.file_keys().items()
    }


def test_there_is_a_file_of_each_adapter_type():
    kinds = {
        config["kind"] for name in WRITTEN for config in peftlib.read_header(FOLDER / f"{name}.safetensors")["configs"]
    }
    assert kinds == {"LoRA", "DoRA", "IA3", "Bottleneck", "Prefix", "Prompt", "Full"}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_of_version_0_1_0_loads_to_the_bit(name, tmp_path):
    model, path = base(), FOLDER / f"{name}.safetensors"
    peftlib.load(model, path)
    written, found = load_file(path), tensors_by_key(model)
    assert written.keys() == found.keys()
    assert all(torch.equal(written[key], found[key]) for key in written)

    with torch.no_grad():
        output = model(torch.arange(10).view(2, 5))
    # The same operations, perhaps by another BLAS: fp32's epsilon, times the sums of up to 24 terms in ten layers.
    torch.testing.assert_close(output, load_file(FOLDER / "outputs.safetensors")[name], rtol=3e-5, atol=3e-5)

    peftlib.save(model, tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == written.keys()
    assert all(torch.equal(written[key], again[key]) for key in written)


class Recording(pickle.Unpickler):
    """Loads, and notes every name that the pickle asks for."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.asked: set[tuple[str, str]] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.asked.add((module, name))
        return super().find_class(module, name)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_pickle_names_what_is_ours_in_the_package_itself(name):
    model = base()
    peftlib.load(model, FOLDER / f"{name}.safetensors")
    unpickler = Recording(pickle.dumps(model))
    again = unpickler.load()
    assert {module for module, _ in unpickler.asked if module.split(".")[0] == "peftlib"} == {"peftlib"}
    tokens = torch.arange(10).view(2, 5)
    assert torch.equal(again(tokens), model(tokens))
    with (
        peftlib.merged(again, "default") if name not in ("bottleneck", "prefix", "prompt") else peftlib.activate(again)
    ):
        again(tokens)

"""What HF peft's files cannot hold, and what is not understood in them, is refused by name; other readers' limits."""

import json
import re
from typing import Any

import helpers
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_hf import CLOSE, Around, Experts, Net, assert_same, moved, quiet
from torch import Tensor, nn

import peftlib
from peftlib import AdapterError, DoRA, Full, LoRA, hf


def seeded(make: Any) -> Any:
    torch.manual_seed(1)
    return make().eval()


def around(layer: Any) -> Any:
    return seeded(lambda: Around(layer()))


def small() -> Any:
    return peft.LoraConfig(r=2, target_modules=["layer"])


@pytest.fixture
def saved(tmp_path) -> Any:
    """A small LoRA on `layer`, as peft writes it."""
    with quiet():
        peft.get_peft_model(around(lambda: nn.Linear(5, 3)), small()).save_pretrained(str(tmp_path))
    return tmp_path


def refused(act: Any, model: Any, message: str) -> None:
    before = helpers.snapshot(model)
    with pytest.raises(AdapterError) as caught:
        act(model)
    assert re.fullmatch(message, str(caught.value), re.DOTALL), str(caught.value)
    assert helpers.changes(before, model) == []


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown kind": ({"peft_type": "LOHA"}, r".*: peft_type 'LOHA' has no counterpart here \(there is .*\)\. .*"),
    "a kind that is no name": ({"peft_type": 3}, r".*: peft_type '3' has no counterpart here .*"),
    "an unknown key": ({"new_trick": True}, r".*: new_trick=True is not understood, and leaving it .*"),
    "a known variant": ({"kasa_config": {"beta": 1}}, r".*: kasa_config=\{'beta': 1\} is not understood, .*"),
    "layers twice": ({"layer_replication": [[0, 1]]}, r".*: layer_replication=\[\[0, 1\]\] is not understood, .*"),
    "a rank of text": ({"r": "8"}, r".*: r is '8', expected a whole number of at least 1\. Correct it\."),
    "a rank of zero": ({"r": 0}, r".*: r is 0, expected .*"),
    "a rank that is true": ({"r": True}, r".*: r is True, expected .*"),
    "another rank": ({"r": 3}, r".*layer\.lora_A\.weight has shape \[2, 5\], expected \[3, 5\]\. .*"),
    "a negative alpha": ({"lora_alpha": -1}, r".*alpha=-1.*"),
    "dropout of one": ({"lora_dropout": 1}, r".*: lora_dropout is 1, expected a probability below 1\. .*"),
    "modules in a dict": ({"target_modules": {"layer": 1}}, r".*: target_modules is .*, expected a list .*"),
    "no modules": ({"target_modules": None}, r"target_modules is missing, .* Name them\."),
    "no expression": ({"target_modules": "("}, r"'\(' is no regular expression \(.*\)\. Correct the configuration\."),
    "other modules": ({"target_modules": ["head"]}, r".*head\.lora_A\.weight is missing\. .*"),
    "no module": ({"target_modules": ["nowhere"]}, r".*layer\.lora_[AB]\.weight.*: not understood, .*"),
    "patterns that are no dict": ({"rank_pattern": [1]}, r".*: rank_pattern is \[1\], expected ranks by name\. .*"),
    "a moved base": ({"init_lora_weights": "olora"}, r".*: init_lora_weights='olora' moved the base weights, .*"),
    "a random base": ({"init_lora_weights": "pissa_niter_4"}, r".*: init_lora_weights='pissa_niter_4' moved .*"),
    "tokens of another module": ({"trainable_token_indices": {"nowhere": [1]}}, r".*no module is called nowhere\. .*"),
    "tokens of a linear": ({"trainable_token_indices": {"head": [1]}}, r"head: trainable_token_indices is for .*"),
    "negative tokens": ({"trainable_token_indices": [-1]}, r".*: trainable_token_indices is \[-1\], expected .*"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_that_is_not_understood(change, message, saved):
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(lambda model: hf.load(model, saved), around(lambda: nn.Linear(5, 3)), message)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, '{"r": NaN}', '{"r": 2, "r": 3}', '{"r": 1e999}'])
def test_a_file_that_is_no_configuration(text, saved):
    (saved / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=re.escape(str(saved / "adapter_config.json"))):
        hf.load(around(lambda: nn.Linear(5, 3)), saved)


def test_pickled_weights_are_not_read(saved):
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    message = (
        rf"{re.escape(str(saved))}: adapter_model\.bin is a pickle, which could run code\. Save it as safetensors\."
    )
    refused(lambda model: hf.load(model, saved), around(lambda: nn.Linear(5, 3)), message)


def test_files_that_are_not_there_are_os_errors(tmp_path, saved):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (saved / name).unlink()
        with pytest.raises(FileNotFoundError):
            hf.load(around(lambda: nn.Linear(5, 3)), saved)


def test_integers_in_place_of_weights(saved):
    path = saved / "adapter_model.safetensors"
    save_file({key: tensor.to(torch.int32) for key, tensor in load_file(path).items()}, path)
    refused(lambda m: hf.load(m, saved), around(lambda: nn.Linear(5, 3)), r".* is torch\.int32, expected .*")


def test_a_name_that_is_taken(saved):
    model = around(lambda: nn.Linear(5, 3))
    hf.load(model, saved)
    refused(lambda m: hf.load(m, saved), model, r'(.*: )?layer: "default" has a LoRA with .* already\. .*')
    assert hf.load(model, saved, "second") == ["layer"]


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


LAYERS: dict[str, tuple[Any, str]] = {
    "a forward of its own": (lambda: Scaled(5, 3), "has a forward of its own: peft adds the pair beside it"),
    "dilation": (lambda: nn.Conv1d(4, 6, 3, dilation=2), r"peft ignores the dilation \(2,\)"),
    "reflected edges": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="reflect"), "peft pads with zeros"),
    "max_norm": (lambda: nn.Embedding(9, 6, max_norm=1.0), "peft renormalises its own factor"),
    "a transposed convolution": (lambda: nn.ConvTranspose1d(4, 6, 3), "peft has no ConvTranspose1d"),
    "a recurrent layer": (lambda: nn.GRU(4, 5), "peft cannot adapt this weight of GRU"),
    "a bilinear layer": (lambda: nn.Bilinear(4, 5, 3), "peft cannot adapt this weight of Bilinear"),
    "a bag": (lambda: nn.EmbeddingBag(9, 6), "peft cannot adapt this weight of EmbeddingBag"),
    "separate projections": (
        lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=4), "peft cannot adapt this weight of MultiheadAttention"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "reason"), LAYERS.values(), ids=LAYERS)
def test_a_layer_on_which_peft_computes_something_else(make, reason, tmp_path):
    model = around(make)
    peftlib.inject(model, "layer", LoRA, rank=2)
    refused(lambda m: hf.save(m, tmp_path / "out"), model, rf"layer: \w+\.\w+: .*{reason}.*\. Leave this layer out\.")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [LAYERS["dilation"][0], LAYERS["a forward of its own"][0], LAYERS["max_norm"][0]])
def test_such_a_layer_in_a_file_of_peft(make, tmp_path):
    with quiet():
        peft.get_peft_model(around(make), peft.LoraConfig(r=2, target_modules=["layer"])).save_pretrained(str(tmp_path))
    refused(lambda m: hf.load(m, tmp_path), around(make), r"layer: \w+\.weight: .*\. Leave this layer out\.")
    refused(lambda m: hf.inject(m, {"target_modules": ["layer"]}), around(make), r"layer: \w+\.weight: .*")


def put(*calls: tuple[Any, Any, dict[str, Any]], make: Any = Net) -> Any:
    def made() -> Any:
        model = seeded(make)
        for targets, kind, config in calls:
            peftlib.inject(model, targets, kind, **config)
        return model

    return made


def attention(**config: Any) -> Any:
    make = lambda: Around(nn.MultiheadAttention(8, 2))  # noqa: E731
    return put(("layer", LoRA, {"rank": 2}), ("out_proj", LoRA, {"rank": 2, **config}), make=make)


MIXTURES: dict[str, tuple[Any, str]] = {
    "LoRA and DoRA": (put(("up", LoRA, {}), ("down", DoRA, {})), r"DoRA and LoRA under one name: .*"),
    "LoRA and IA3": (put(("up", LoRA, {}), ("down", peftlib.IA3, {})), r"LoRA beside IA3 has no place .*"),
    "two dropouts": (put(("up", LoRA, {"dropout": 0.1}), ("down", LoRA, {})), r"dropout: the layers have .*"),
    "a weight alone": (put(("up", LoRA, {}), ("head", Full, {"params": "weight"})), r"head\.weight: peft saves .*"),
    "a pair inside a copy": (put(("layers.1", Full, {}), ("1.up", LoRA, {}), make=lambda: Boxes()),
                             r"layers\.1\.up: inside a module that is saved whole \(modules_to_save\), .*"),
    "a copy around a pair": (put(("embed_tokens", LoRA, {}), ("embed_tokens", Full, {})),
                             r"embed_tokens\.weight: Full lies around the pair on this weight and replaces it\. .*"),
    "a root": (put(("", Full, {}), make=lambda: nn.Linear(2, 2)), r"the root: peft saves named modules alone\. .*"),
    "a root with a pair": (put((nn.Linear, LoRA, {}), make=lambda: nn.Linear(2, 2)), r"the root: peft puts .*"),
    "names that end alike": (put(("up", LoRA, {}), (lambda n, m: n == "layers.0.down", Full, {}), make=lambda: Alike()),
                             r".*peft saves every module whose name ends like .*"),
    "two ranks in an attention": (attention(rank=3), r"layer: in_proj and out_proj have different ranks .*"),
    "two scales in an attention": (attention(alpha=3), r"layer: in_proj and out_proj have different ranks or .*"),
    "dropout beside parameters": (
        put(("shared", LoRA, {"dropout": 0.1}), ("layer", LoRA, {"param": "up"}), make=lambda: Around(Experts())),
        r"dropout=0\.1: peft refuses dropout beside target_parameters \(layer\.up\)\. .*"),
    "an unknown kind": (
        put(("up", LoRA, {}), ("down", helpers.Offset, {})), r".*: a file of LoRA has no place for Offset\. .*"),
}  # fmt: skip


class Box(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(2, 2), nn.LayerNorm(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.up(x))


class Boxes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Box(), Box()])


class Alike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(2, 2), "down": nn.Linear(2, 2)})])
        self.more_layers = nn.ModuleList([nn.ModuleDict({"down": nn.Linear(2, 2)})])


@pytest.mark.parametrize(("make", "message"), MIXTURES.values(), ids=MIXTURES)
def test_mixtures_that_one_file_of_peft_cannot_hold(make, message, tmp_path):
    refused(lambda model: hf.save(model, tmp_path / "out"), make(), message)
    assert not (tmp_path / "out").exists()


def test_an_unknown_target_or_name(tmp_path):
    model = put(("up", LoRA, {}))()
    refused(lambda m: hf.save(m, tmp_path, target="sglang"), model, r"target='sglang' is none of 'peft', .*")
    refused(lambda m: hf.save(m, tmp_path, "other"), model, r".* has no adapter named 'other'\. .*")


def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    model = put(("up", LoRA, {}))()
    hf.save(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    helpers.moved(model)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("peftlib._hf.write_tensors", fail)
    with pytest.raises(OSError, match="No space left"):
        hf.save(model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


# Groups: peft's A sees all channels, the shared A here those of one group.


def grouped() -> Any:
    return around(lambda: nn.Conv2d(4, 6, 3, groups=2))


def test_a_grouped_convolution_s_pair_is_one_of_peft_s(tmp_path):
    model, x = grouped(), torch.randn(2, 4, 7, 7)
    peftlib.inject(model, "layer", LoRA, rank=3, alpha=5)
    helpers.moved(model)
    hf.save(model, tmp_path)
    with quiet():
        loaded = peft.PeftModel.from_pretrained(grouped(), str(tmp_path))
    assert_same(loaded(x), model(x))
    again = grouped()
    hf.load(again, tmp_path)
    ((*_, ours),), ((*_, theirs),) = peftlib.adapters(model), peftlib.adapters(again)
    assert helpers.same_bits(ours.lora_A, theirs.lora_A)
    assert helpers.same_bits(ours.lora_B, theirs.lora_B)
    assert ours.scale == theirs.scale


def test_slices_that_differ_from_group_to_group_get_a_rank_of_their_own(tmp_path):
    with quiet():
        model = peft.get_peft_model(grouped(), peft.LoraConfig(r=4, target_modules=["layer"], use_rslora=True))
        moved(p for p in model.parameters() if p.requires_grad)
        with torch.no_grad():
            A = model.base_model.model.layer.lora_A["default"].weight
            A[:2, 2:], A[2:, :2] = 0, 0
        model.eval().save_pretrained(str(tmp_path))
    ours, x = grouped(), torch.randn(2, 4, 7, 7)
    hf.load(ours, tmp_path)
    assert_same(ours(x), model(x))
    ((*_, adapter),) = peftlib.adapters(ours)
    assert adapter.rank == 4


def test_slices_that_mix_the_groups_are_refused(tmp_path):
    with quiet():
        peft.get_peft_model(grouped(), peft.LoraConfig(r=4, target_modules=["layer"])).save_pretrained(str(tmp_path))
    message = (
        r".*: layer: lora_A mixes the channels of the 2 groups, which no weight of a grouped convolution does\. .*"
    )
    refused(lambda model: hf.load(model, tmp_path), grouped(), message)
    refused(lambda model: hf.inject(model, {"r": 3, "target_modules": ["layer"]}), grouped(), r"layer: r=3 is no .*")


# Readers that know one rank and one scale.


@pytest.mark.parametrize("target", ["vllm", "llama.cpp"])
def test_what_differs_goes_into_B_for_readers_of_one_scale(target, tmp_path):
    model = put(
        ("up", LoRA, {"rank": 3, "alpha": 5}), ("down", LoRA, {"rank": 2, "alpha": 7, "rank_stabilized": True})
    )()
    helpers.moved(model)
    hf.save(model, tmp_path, target=target)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert (said["r"], said["lora_alpha"], said["use_rslora"]) == (3, 3, False)
    assert said["rank_pattern"] == said["alpha_pattern"] == {}
    assert said["target_modules"] == ["down", "up"]
    for host, _, adapter in peftlib.adapters(model):
        A, B = (tensors[f"base_model.model.{host}.lora_{letter}.weight"].double() for letter in "AB")
        assert A.shape[0] == B.shape[1] == 3
        dense = adapter.scale * adapter.lora_B.double() @ adapter.lora_A.double()
        assert (B @ A - dense).abs().max() <= CLOSE * dense.abs().max()


@pytest.mark.parametrize("target", ["vllm", "llama.cpp"])
def test_what_is_alike_is_written_as_it_is(target, tmp_path):
    model = helpers.moved(put(("up", LoRA, {"rank": 2, "alpha": 7}))())
    hf.save(model, tmp_path / "plain")
    hf.save(model, tmp_path / "served", target=target)
    plain, served = (tmp_path / name / "adapter_model.safetensors" for name in ("plain", "served"))
    assert plain.read_bytes() == served.read_bytes()


SERVED: dict[str, Any] = {
    "a copy": put(("up", LoRA, {}), ("head", Full, {})),
    "a bias": put(("up", LoRA, {}), ("up", Full, {"params": "bias"})),
    "rows": put(("up", LoRA, {}), ("embed_tokens", Full, {"rows": [1]})),
    "DoRA": put(("up", DoRA, {})),
    "an embedding": put(("embed_tokens", LoRA, {})),
    "a convolution": put(("layer", LoRA, {}), make=lambda: Around(nn.Conv1d(2, 2, 3))),
    "a stack": put(("layer", LoRA, {"param": "up"}), make=lambda: Around(Experts())),
    "an attention": attention(),
    "IA3": put(("up", peftlib.IA3, {})),
}


@pytest.mark.parametrize("target", ["vllm", "llama.cpp"])
@pytest.mark.parametrize("make", SERVED.values(), ids=SERVED)
def test_what_a_reader_cannot_serve_is_refused(make, target, tmp_path):
    refused(lambda model: hf.save(model, tmp_path / "out", target=target), make(), rf".*({target}|vLLM).*\..*")
    assert not (tmp_path / "out").exists()

"""Files of kohya, diffusers, loralib and torchtune: keys and scales written by hand, outputs against dense weights."""

import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftlib
from peftlib import exchange
from support import helpers
from support.ecosystem import feature
from support.refusals import refused

CLOSE = 1e-6


class Unet(nn.Module):
    """Names with underscores, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 4, 3, padding=1)
        self.down_blocks = nn.ModuleList(nn.ModuleDict({"to_q": nn.Linear(4, 6)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x).mean((2, 3))
        return torch.stack([block["to_q"](x) for block in self.down_blocks]).sum(0)


class Pipeline(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unet = Unet()
        self.text_encoder = nn.Sequential(nn.Linear(5, 5))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.unet(x).sum() + self.text_encoder(y).sum()


def pair(rank: int, *shape: int) -> tuple[Tensor, Tensor]:
    out, inputs, *kernel = shape
    return torch.randn(rank, inputs, *kernel) / 2, torch.randn(out, rank, *[1] * len(kernel)) / 2


@torch.no_grad()
def changed(model: Any, name: str, A: Tensor, B: Tensor, scale: float) -> Any:
    """W + s B A, in float64, in place."""
    weight = model.double().get_parameter(f"{name}.weight")
    weight += scale * (B.double().flatten(1) @ A.double().flatten(1)).view_as(weight)
    return model


def image() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 5, 5)


def assert_dense(model: Any, dense: Any, *inputs: Tensor) -> None:
    found, expected = model(*inputs), dense(*(each.double() for each in inputs))
    assert (found.double() - expected).abs().max() <= CLOSE * max(1, expected.abs().max())


def kohya() -> tuple[dict[str, Tensor], Any]:
    """Two ranks, two alphas, one of them unsaid; and what the weights then are."""
    torch.manual_seed(2)
    conv, first, second = pair(2, 4, 3, 3, 3), pair(3, 6, 4), pair(4, 6, 4)
    tensors = {
        "lora_unet_conv_in.lora_down.weight": conv[0],
        "lora_unet_conv_in.lora_up.weight": conv[1],
        "lora_unet_conv_in.alpha": torch.tensor(1.0),
        "lora_unet_down_blocks_0_to_q.lora_down.weight": first[0][..., None, None],
        "lora_unet_down_blocks_0_to_q.lora_up.weight": first[1][..., None, None],
        "lora_unet_down_blocks_0_to_q.alpha": torch.tensor(6.0),
        "lora_unet_down_blocks_1_to_q.lora_down.weight": second[0],
        "lora_unet_down_blocks_1_to_q.lora_up.weight": second[1],
    }
    dense = changed(helpers.seeded(Unet), "conv_in", *conv, 1 / 2)
    dense = changed(dense, "down_blocks.0.to_q", *first, 6 / 3)
    return tensors, changed(dense, "down_blocks.1.to_q", *second, 1.0)


@feature("kohya: keys and alphas", "LoRA")
def test_kohya_s_keys_and_alphas(tmp_path):
    tensors, dense = kohya()
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path, {"ss_network_dim": "4"})
    model = helpers.seeded(Unet)
    assert exchange.load(model, path, "kohya") == ["conv_in", "down_blocks.0.to_q", "down_blocks.1.to_q"]
    assert_dense(model, dense, image())


@feature("diffusers: read, with metadata and without", "LoRA")
def test_diffusers_says_its_configuration_in_the_metadata(tmp_path):
    torch.manual_seed(2)
    first, second = pair(4, 6, 4), pair(2, 6, 4)
    tensors = {
        f"unet.down_blocks.{n}.to_q.lora_{letter}.weight": factor
        for n, factors in enumerate((first, second))
        for letter, factor in zip("AB", factors, strict=True)
    }
    said = {"r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"down_blocks.1.to_q": 2},
            "target_modules": ["to_q"], "peft_type": "LORA"}  # fmt: skip
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in said.items()})})
    model = helpers.seeded(Unet)
    exchange.load(model, path, "diffusers")
    dense = changed(helpers.seeded(Unet), "down_blocks.0.to_q", *first, 8 / 4**0.5)
    assert_dense(model, changed(dense, "down_blocks.1.to_q", *second, 8 / 2**0.5), image())


@feature("diffusers: read, with metadata and without", "LoRA")
def test_diffusers_without_metadata_has_alpha_in_keys_or_the_rank(tmp_path):
    torch.manual_seed(2)
    first, second = pair(4, 6, 4), pair(2, 6, 4)
    tensors = {
        "transformer.0.to_q.lora_A.weight": first[0],
        "transformer.0.to_q.lora_B.weight": first[1],
        "transformer.0.to_q.alpha": torch.tensor([2.0]),
        "transformer.1.to_q.lora.down.weight": second[0],
        "transformer.1.to_q.lora.up.weight": second[1],
    }
    model = helpers.seeded(Unet)
    hosts = exchange.load(model, tensors, "diffusers", components={"transformer": "down_blocks"})
    assert hosts == ["down_blocks.0.to_q", "down_blocks.1.to_q"]
    dense = changed(helpers.seeded(Unet), "down_blocks.0.to_q", *first, 2 / 4)
    assert_dense(model, changed(dense, "down_blocks.1.to_q", *second, 1.0), image())


@feature("loralib and torchtune: read", "LoRA")
@pytest.mark.parametrize(("layout", "keys"), [("loralib", ("lora_A", "lora_B")),
                                              ("torchtune", ("lora_a.weight", "lora_b.weight"))])  # fmt: skip
def test_loralib_and_torchtune_are_told_alpha(layout, keys):
    torch.manual_seed(2)
    A, B = pair(3, 6, 4)
    model = helpers.seeded(Unet)
    stem = "down_blocks.1.to_q"
    exchange.load(model, {f"{stem}.{keys[0]}": A, f"{stem}.{keys[1]}": B}, layout, alpha=6)
    assert_dense(model, changed(helpers.seeded(Unet), stem, A, B, 2.0), image())


@feature("loralib and torchtune: read", "LoRA")
def test_loralib_s_embedding_is_a_pair_of_plain_tensors():
    torch.manual_seed(2)
    A, B, tokens = torch.randn(2, 9), torch.randn(5, 2), torch.arange(9)
    model = helpers.seeded(lambda: nn.Sequential(nn.Embedding(9, 5)))
    base = model(tokens)
    exchange.load(model, {"0.lora_A": A, "0.lora_B": B}, "loralib", alpha=1)
    expected = base.double() + 0.5 * (B.double() @ A.double()).T
    assert (model(tokens).double() - expected).abs().max() <= CLOSE * expected.abs().max()


@feature("loralib and torchtune: read", "DoRA")
def test_torchtune_s_magnitude_is_a_dora():
    torch.manual_seed(2)
    A, B = pair(3, 6, 4)
    magnitude, stem, model = torch.rand(6) + 0.5, "down_blocks.1.to_q", helpers.seeded(Unet)
    tensors = {f"{stem}.lora_a.weight": A, f"{stem}.lora_b.weight": B, f"{stem}.magnitude": magnitude}
    exchange.load(model, tensors, "torchtune", alpha=6)
    dense = changed(helpers.seeded(Unet), stem, A, B, 2.0)
    with torch.no_grad():
        weight = dense.get_parameter(f"{stem}.weight")
        weight *= (magnitude.double() / weight.norm(dim=1))[:, None]
    assert_dense(model, dense, image())


def trained(make: Any = Pipeline) -> Any:
    model = helpers.seeded(make)
    peftlib.inject(model, "to_q", peftlib.LoRA, rank=2, alpha=3)
    peftlib.inject(model, ["conv_in", "text_encoder.0"], peftlib.LoRA, rank=3, alpha=5, rank_stabilized=True)
    return helpers.moved(model)


@pytest.mark.parametrize(("layout", "names"), [
    ("kohya", {"lora_unet": "unet", "lora_te": "text_encoder"}),
    ("diffusers", {"unet": "unet", "text_encoder": "text_encoder"}),
])  # fmt: skip
def test_what_is_written_comes_back_bit_by_bit(layout, names, tmp_path):
    model, path = trained(), tmp_path / "lora.safetensors"
    exchange.save(model, path, layout, components=names)
    again = helpers.seeded(Pipeline)
    exchange.load(again, path, layout, components=names)
    torch.manual_seed(3)
    inputs = image(), torch.randn(2, 5)
    assert torch.allclose(again(*inputs), model(*inputs), rtol=CLOSE, atol=0)
    for (_, _, ours), (_, _, theirs) in zip(peftlib.adapters(model), peftlib.adapters(again), strict=True):
        assert helpers.same_bits(ours.lora_A, theirs.lora_A)
        assert helpers.same_bits(ours.lora_B, theirs.lora_B)
        assert abs(ours.scale - theirs.scale) <= 2**-23 * ours.scale  # kohya keeps alpha in float32


def test_the_files_are_those_of_the_tools(tmp_path):
    model, path = trained(), tmp_path / "lora.safetensors"
    exchange.save(model, path, "kohya", components={"lora_unet": "unet", "lora_te": "text_encoder"})
    found = load_file(path)
    assert {key.partition(".")[0] for key in found} == {
        "lora_unet_conv_in", "lora_unet_down_blocks_0_to_q", "lora_unet_down_blocks_1_to_q", "lora_te_0",
    }  # fmt: skip
    assert found["lora_unet_conv_in.alpha"].item() == pytest.approx(5 * 3**0.5, rel=1e-6)
    assert found["lora_unet_conv_in.lora_down.weight"].shape == (3, 3, 3, 3)
    exchange.save(model, path, "diffusers", components={"unet": "unet", "text_encoder": "text_encoder"})
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])
    assert said["unet.target_modules"] == ["conv_in", "to_q"]
    assert said["text_encoder.r"] == 3


def linear() -> Any:
    return helpers.seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))


GOOD = {"lora_unet_0.lora_down.weight": torch.ones(2, 4), "lora_unet_0.lora_up.weight": torch.ones(3, 2)}
REFUSED: dict[str, tuple[dict[str, Tensor], str, tuple[str, ...]]] = {
    "a kind of another name": ({**GOOD, "lora_unet_0.hada_w1_a": torch.ones(2)}, "kohya",
                               ("lora_unet_0.hada_w1_a",)),
    "a module that is not there": ({"lora_unet_7.alpha": torch.tensor(1.0)}, "kohya",
                                   ("lora_unet_7.alpha", "module")),
    "another component": ({**GOOD, "lora_te_0.alpha": torch.tensor(1.0)}, "kohya",
                          ("lora_te_0.alpha", "components")),
    "no component": ({"x": torch.ones(1)}, "kohya", ("source", "'lora_unet'")),
    "half a pair": ({"lora_unet_0.lora_down.weight": torch.ones(2, 4)}, "kohya",
                    ("source", "missing")),
    "another shape": ({**GOOD, "lora_unet_0.lora_up.weight": torch.ones(5, 2)}, "kohya",
                      ("lora_unet_0.lora_up.weight", "[5, 2]", "[3, 2]")),
    "no number": ({**GOOD, "lora_unet_0.alpha": torch.tensor(float("nan"))}, "kohya",
                  ("lora_unet_0.alpha", "finite")),
    "infinity": ({**GOOD, "lora_unet_0.lora_up.weight": torch.full((3, 2), torch.inf)}, "kohya",
                 ("NaN",)),
    "no alpha": ({"0.lora_A": torch.ones(2, 4), "0.lora_B": torch.ones(3, 2)}, "loralib",
                 ("source", "loralib", "alpha")),
    "an unknown layout": (GOOD, "lycoris", ("layout='lycoris'", "'kohya'")),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "layout", "names"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_understood_is_refused_by_name(tensors, layout, names):
    model = linear()
    with refused(model, *names):
        exchange.load(model, tensors, layout)


def test_a_component_that_no_name_covers_is_not_left_out_in_silence(tmp_path):
    with refused(None, "text_encoder.0", "components"):
        exchange.save(trained(), tmp_path / "lora.safetensors", "kohya", components={"lora_unet": "unet"})
    assert not [*tmp_path.iterdir()]


def grouped() -> Any:
    return helpers.seeded(lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)))


def test_the_groups_of_a_convolution_have_no_place_in_kohya_s_file(tmp_path):
    tensors = {
        "lora_unet_0.lora_down.weight": torch.ones(2, 2, 3, 3),
        "lora_unet_0.lora_up.weight": torch.ones(6, 2, 1, 1),
    }
    with refused(None, "0", "kohya", "groups"):
        exchange.load(grouped(), tensors, "kohya")
    model = grouped()
    peftlib.inject(model, "0", peftlib.LoRA, rank=2)
    with refused(None, "0", "kohya", "ungrouped"):
        exchange.save(model, tmp_path / "lora.safetensors", "kohya", components={"lora_unet": ""})


@pytest.mark.parametrize("said", ["[1]", "3", "null"])
def test_metadata_of_diffusers_that_are_no_object(said, tmp_path):
    path = tmp_path / "lora.safetensors"
    model = trained()
    exchange.save(model, path, "diffusers", components={"unet": "unet", "text_encoder": "text_encoder"})
    save_file(load_file(path), path, {"lora_adapter_metadata": said})
    with refused(None, "lora_adapter_metadata", "JSON"):
        exchange.load(
            helpers.seeded(Pipeline), path, "diffusers", components={"unet": "unet", "text_encoder": "text_encoder"}
        )


def test_a_component_is_left_out_only_when_asked():
    model = linear()
    tensors = {**GOOD, "lora_te_0.alpha": torch.tensor(1.0)}
    assert exchange.load(model, tensors, "kohya", components={"lora_unet": "", "lora_te": None}) == ["0"]


def test_an_alpha_that_the_file_says_is_not_said_again():
    model = linear()
    with refused(model, "kohya", "alpha"):
        exchange.load(model, GOOD, "kohya", alpha=2)


def test_names_that_kohya_cannot_tell_apart_are_refused(tmp_path):
    model = nn.Module()
    model.a = nn.Module()
    model.a.b, model.a_b = nn.Linear(2, 2), nn.Linear(2, 2)
    with refused(None, "lora_unet_a_b.alpha", "a.b", "a_b"):
        exchange.load(model, {"lora_unet_a_b.alpha": torch.tensor(1.0)}, "kohya")
    peftlib.inject(model, nn.Linear, peftlib.LoRA, rank=1)
    with refused(None, "kohya", "lora_unet_a_b"):
        exchange.save(model, tmp_path / "lora.safetensors", "kohya")


@pytest.mark.parametrize(("inject", "layout", "names"), [
    (lambda m: peftlib.inject(m, "1", peftlib.Full), "kohya", ("kohya",)),
    (lambda m: peftlib.inject(m, "1", peftlib.Full), "diffusers", ("diffusers",)),
    (lambda m: peftlib.inject(m, "0", peftlib.DoRA, name="d"), "kohya", ("kohya",)),
    (lambda m: peftlib.inject(m, "0", peftlib.IA3), "kohya", ("LoRA", "IA3")),
])  # fmt: skip
def test_what_a_tool_cannot_hold_is_not_written(inject, layout, names, tmp_path):
    model = linear()
    peftlib.inject(model, "0", peftlib.LoRA, rank=1)
    inject(model)
    name = "d" if any(name == "d" for _, name, _ in peftlib.adapters(model)) else "default"
    with refused(model, *names):
        exchange.save(model, tmp_path / "lora.safetensors", layout, name)
    assert list(tmp_path.iterdir()) == []

"""What HF peft's files cannot hold, and what is not understood in them, is refused by name; other readers' limits."""

import json
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftlib
from peftlib import DoRA, Full, LoRA, hf
from support import helpers, refusals
from support.peft_models import CLOSE, Around, Experts, Net, assert_same, quiet, shifted


def around(layer: Any) -> Any:
    return helpers.seeded(lambda: Around(layer()), 1)


def small() -> Any:
    return peft.LoraConfig(r=2, target_modules=["layer"])


@pytest.fixture
def saved(tmp_path) -> Any:
    """A small LoRA on `layer`, as peft writes it."""
    with quiet():
        peft.get_peft_model(around(lambda: nn.Linear(5, 3)), small()).save_pretrained(str(tmp_path))
    return tmp_path


def refused(act: Any, model: Any, names: tuple[str, ...]) -> None:
    with refusals.refused(model, *names):
        act(model)


CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "an unknown kind": ({"peft_type": "LOHA"}, ("peft_type 'LOHA'",)),
    "a kind that is no name": ({"peft_type": 3}, ("peft_type '3'",)),
    "an unknown key": ({"new_trick": True}, ("new_trick=True",)),
    "a known variant": ({"kasa_config": {"beta": 1}}, ("kasa_config={'beta': 1}",)),
    "layers twice": ({"layer_replication": [[0, 1]]}, ("layer_replication=[[0, 1]]",)),
    "a rank of text": ({"r": "8"}, ("r is '8'",)),
    "a rank of zero": ({"r": 0}, ("r is 0",)),
    "a rank that is true": ({"r": True}, ("r is True",)),
    "another rank": ({"r": 3}, ("base_model.model.layer.lora_A.weight", "[2, 5]", "[3, 5]")),
    "a negative alpha": ({"lora_alpha": -1}, ("alpha=-1",)),
    "dropout of one": ({"lora_dropout": 1}, ("lora_dropout is 1",)),
    "modules in a dict": ({"target_modules": {"layer": 1}}, ("target_modules", "{'layer': 1}")),
    "no modules": ({"target_modules": None}, ("target_modules", "missing")),
    "no expression": ({"target_modules": "("}, ("'('", "regular expression")),
    "other modules": ({"target_modules": ["head"]}, ("base_model.model.head.lora_A.weight", "missing")),
    "no module": ({"target_modules": ["nowhere"]}, ("base_model.model.layer.lora_A.weight",)),
    "patterns that are no dict": ({"rank_pattern": [1]}, ("rank_pattern is [1]",)),
    "a moved base": ({"init_lora_weights": "corda"}, ("init_lora_weights='corda'",)),
    "a random base": ({"init_lora_weights": "pissa_niter_4"}, ("init_lora_weights='pissa_niter_4'",)),
    "tokens of another module": ({"trainable_token_indices": {"nowhere": [1]}}, ("nowhere",)),
    "tokens of a linear": ({"trainable_token_indices": {"head": [1]}}, ("head", "trainable_token_indices")),
    "negative tokens": ({"trainable_token_indices": [-1]}, ("trainable_token_indices is [-1]",)),
}  # fmt: skip


@pytest.mark.parametrize(("change", "names"), CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_that_is_not_understood(change, names, saved):
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(lambda model: hf.load(model, saved), around(lambda: nn.Linear(5, 3)), names)


class Numbered(nn.Linear):
    """Numbered as the attention modules of transformers are."""

    layer_idx = 0

    def __init__(self) -> None:
        super().__init__(3, 3)


FACTORS: dict[str, Any] = {"peft_type": "IA3", "feedforward_modules": []}
FRESH: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "(IA)³ without sides": (
        lambda: around(lambda: nn.Linear(5, 3)), {"peft_type": "IA3", "target_modules": ["layer"]},
        ("config", "feedforward_modules", "missing")),
    "(IA)³ on a norm": (
        lambda: around(lambda: nn.LayerNorm(5)), {**FACTORS, "target_modules": ["layer"]},
        ("layer", "LayerNorm", "(IA)³")),
    "(IA)³ on a forward of its own": (
        lambda: around(lambda: Scaled(5, 3)), {**FACTORS, "target_modules": ["layer"]},
        ("layer", "Scaled", "forward")),
    "(IA)³ on what is read and not called": (
        lambda: around(lambda: nn.MultiheadAttention(8, 2)), {**FACTORS, "target_modules": ["out_proj"]},
        ("layer.out_proj", "factor")),
    "LoRA on what is read and not called": (
        lambda: around(lambda: nn.MultiheadAttention(8, 2)), {"target_modules": ["out_proj"]},
        ("layer.out_proj", "'layer'")),
    "prefixes of no length": (
        lambda: around(lambda: nn.Linear(5, 3)), {"peft_type": "PREFIX_TUNING"}, ("Around", "prefix")),
    "prefixes of an encoder and a decoder": (
        lambda: around(Numbered), {"peft_type": "PREFIX_TUNING"},
        ("config", "prefixes", "length")),
    "prefixes through a perceptron": (
        lambda: around(Numbered), {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2, "prefix_projection": True},
        ("config", "prefix_projection")),
    "a prompt of no length": (
        lambda: around(lambda: nn.Linear(5, 3)), {"peft_type": "PROMPT_TUNING"},
        ("config", "prompt", "length")),
    "a prompt of an encoder": (
        lambda: around(lambda: nn.Linear(5, 3)), {"peft_type": "P_TUNING", "num_virtual_tokens": 2},
        ("config", "P_TUNING")),
    "no module": (
        lambda: around(lambda: nn.Linear(5, 3)), {"target_modules": ["nowhere"]},
        ("config", "target_modules=['nowhere']")),
    "an unknown start": (
        lambda: around(lambda: nn.Linear(5, 3)), {"target_modules": ["layer"], "init_lora_weights": "eva"},
        ("config", "init_lora_weights='eva'")),
    "pissa on a convolution": (
        lambda: around(lambda: nn.Conv1d(4, 6, 3)), {"target_modules": ["layer"], "init_lora_weights": "pissa"},
        ("layer", "init_lora_weights='pissa'", "Linear")),
    "a module and its parameter": (
        lambda: around(lambda: nn.Linear(5, 3)), {"target_modules": ["layer"], "target_parameters": ["layer.weight"]},
        ("layer", "target_modules", "target_parameters")),
    "a module without a weight": (
        lambda: around(lambda: nn.Dropout()), {"target_modules": ["layer"]},
        ("layer", "Dropout")),
    "a rank beyond the singular values": (
        lambda: around(lambda: nn.Linear(5, 3)), {"r": 4, "target_modules": ["layer"], "init_lora_weights": "pissa"},
        ("layer", "rank=4", "[3, 5]", "3")),
}  # fmt: skip


@pytest.mark.parametrize(("make", "config", "names"), FRESH.values(), ids=FRESH)
def test_a_configuration_that_cannot_begin_here(make, config, names):
    refused(lambda model: hf.inject(model, config), make(), names)


@pytest.mark.parametrize(("exclude", "left"), [("layer", "head"), (".*ad", "layer"), (["layer"], "head")], ids=str)
def test_what_is_excluded_is_left_out(exclude, left):
    model = around(lambda: nn.Linear(5, 3))
    assert hf.inject(model, {"target_modules": "layer|head", "exclude_modules": exclude}) == [left]


def test_the_head_of_a_classifier_is_no_target_of_all_linear():
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.score = nn.Linear(5, 3), nn.Linear(3, 2)

        def get_output_embeddings(self) -> None:
            """As transformers says of a model without a head of words."""

    config = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}
    model = Classifier()
    assert hf.inject(model, config) == ["layer", "score"]
    assert [type(part) for _, _, part in peftlib.adapters(model)] == [LoRA, Full]  # for the task, peft trains it whole
    assert hf.inject(Classifier(), {"target_modules": "all-linear"}) == ["layer", "score"]


def test_a_rank_is_shared_by_the_groups_of_a_convolution():
    model = grouped()
    hf.inject(model, {"r": 4, "target_modules": ["layer"]})
    ((*_, adapter),) = peftlib.adapters(model)
    assert adapter.rank == 2


def with_file(folder: Any, config: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


FRONT = {"num_virtual_tokens": 2, "token_dim": 4, "num_attention_heads": 2, "num_layers": 1}


def test_vectors_in_front_of_what_is_no_model_of_transformers(tmp_path):
    folder = with_file(tmp_path, {"peft_type": "PROMPT_TUNING", **FRONT}, {"prompt_embeddings": torch.zeros(2, 4)})
    names = ("Around", "prompts", "transformers")
    refused(lambda model: hf.load(model, folder), around(lambda: nn.Linear(5, 3)), names)


@pytest.mark.parametrize("change", [{"num_layers": 2}, {"token_dim": 3}, {"num_attention_heads": None}], ids=str)
def test_prefixes_of_a_model_of_another_size(change, tmp_path):
    config = {"peft_type": "PREFIX_TUNING", **FRONT, **change}
    folder = with_file(tmp_path, config, {"prompt_embeddings": torch.zeros(2, 8)})
    names = ("token_dim", "num_layers", "1")
    refused(lambda model: hf.load(model, folder), around(Numbered), names)


def test_a_learned_bias_beside_dora(saved):
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_bias": True, "use_dora": True}))
    names = ("layer", "lora_bias", "lora_bias=False")
    refused(lambda model: hf.load(model, saved), around(lambda: nn.Linear(5, 3)), names)


def test_a_copy_that_is_there_twice_and_differs(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["layer"], modules_to_save=["head"])
    with quiet():
        peft.get_peft_model(around(lambda: nn.Linear(5, 3)), config).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    again = "base_model.model.head.modules_to_save.weight"
    save_file({**load_file(path), again: torch.zeros(2, 3)}, path)
    names = (again, "base_model.model.head.weight")
    refused(lambda model: hf.load(model, tmp_path), around(lambda: nn.Linear(5, 3)), names)


def test_a_weight_that_no_configuration_asks_for(saved):
    path = saved / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.head.weight": torch.zeros(2, 3)}, path)
    names = ("base_model.model.head.weight",)
    refused(lambda model: hf.load(model, saved), around(lambda: nn.Linear(5, 3)), names)


def test_half_an_attention_comes_back_as_half(tmp_path):
    """peft adapts both halves, so the other one is written as a pair of zeros."""
    model, x = put(("layer", LoRA, {"rank": 2}), make=lambda: Around(nn.MultiheadAttention(8, 2)))(), torch.randn(3, 8)
    helpers.moved(model)
    hf.save(model, tmp_path)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(around(lambda: nn.MultiheadAttention(8, 2)), str(tmp_path))
    assert_same(theirs(x, x, x), model(x, x, x))
    again = around(lambda: nn.MultiheadAttention(8, 2))
    hf.load(again, tmp_path)
    assert len(list(peftlib.adapters(again))) == 1
    assert helpers.same_bits(again(x, x, x), model(x, x, x))


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, '{"r": NaN}', '{"r": 2, "r": 3}', '{"r": 1e999}'])
def test_a_file_that_is_no_configuration(text, saved):
    (saved / "adapter_config.json").write_text(text)
    refused(lambda m: hf.load(m, saved), around(lambda: nn.Linear(5, 3)), (str(saved / "adapter_config.json"),))


def test_pickled_weights_are_not_read(saved):
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    names = (str(saved), "adapter_model.bin", "pickle")
    refused(lambda model: hf.load(model, saved), around(lambda: nn.Linear(5, 3)), names)


def test_files_that_are_not_there_are_os_errors(tmp_path, saved):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (saved / name).unlink()
        with pytest.raises(FileNotFoundError):
            hf.load(around(lambda: nn.Linear(5, 3)), saved)


def test_integers_in_place_of_weights(saved):
    path = saved / "adapter_model.safetensors"
    save_file({key: tensor.to(torch.int32) for key, tensor in load_file(path).items()}, path)
    refused(lambda m: hf.load(m, saved), around(lambda: nn.Linear(5, 3)), ("torch.int32",))


def test_a_name_that_is_taken(saved):
    model = around(lambda: nn.Linear(5, 3))
    hf.load(model, saved)
    refused(lambda m: hf.load(m, saved), model, ("layer", '"default"', "LoRA"))
    assert hf.load(model, saved, "second") == ["layer"]


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Shifted(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Blurred(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


class Bent(nn.Module):
    """Somebody's own, with a weight of any shape."""

    is_transposed = True

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.sum()


LAYERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a forward of its own": (lambda: Scaled(5, 3), ("forward",)),
    "a lookup of its own": (lambda: Shifted(9, 6), ("Shifted", "forward")),
    "a convolution of its own": (lambda: Blurred(4, 6, 3), ("Blurred", "forward")),
    "four dimensions": (lambda: Bent(2, 3, 4, 5), ("(2, 3, 4, 5)",)),
    "one transposed matrix": (lambda: Bent(1, 4, 5), ("stack", "one")),
    "dilation": (lambda: nn.Conv1d(4, 6, 3, dilation=2), ("dilation (2,)",)),
    "reflected edges": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="reflect"), ("zeros",)),
    "max_norm": (lambda: nn.Embedding(9, 6, max_norm=1.0), ("max_norm",)),
    "a transposed convolution": (lambda: nn.ConvTranspose1d(4, 6, 3), ("ConvTranspose1d",)),
    "a recurrent layer": (lambda: nn.GRU(4, 5), ("GRU",)),
    "a bilinear layer": (lambda: nn.Bilinear(4, 5, 3), ("Bilinear",)),
    "a bag": (lambda: nn.EmbeddingBag(9, 6), ("EmbeddingBag",)),
    "separate projections": (
        lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=4), ("MultiheadAttention",)
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "reason"), LAYERS.values(), ids=LAYERS)
def test_a_layer_on_which_peft_computes_something_else(make, reason, tmp_path):
    model = around(make)
    peftlib.inject(model, "layer", LoRA, rank=2)
    refused(lambda m: hf.save(m, tmp_path / "out"), model, ("layer", *reason))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [LAYERS["dilation"][0], LAYERS["a forward of its own"][0], LAYERS["max_norm"][0]])
def test_such_a_layer_in_a_file_of_peft(make, tmp_path):
    with quiet():
        peft.get_peft_model(around(make), peft.LoraConfig(r=2, target_modules=["layer"])).save_pretrained(str(tmp_path))
    refused(lambda m: hf.load(m, tmp_path), around(make), ("layer",))
    refused(lambda m: hf.inject(m, {"target_modules": ["layer"]}), around(make), ("layer",))


def put(*calls: tuple[Any, Any, dict[str, Any]], make: Any = Net) -> Any:
    def made() -> Any:
        model = helpers.seeded(make, 1)
        for targets, kind, config in calls:
            peftlib.inject(model, targets, kind, **config)
        return model

    return made


def attention(**config: Any) -> Any:
    make = lambda: Around(nn.MultiheadAttention(8, 2))  # noqa: E731
    return put(("layer", LoRA, {"rank": 2}), ("out_proj", LoRA, {"rank": 2, **config}), make=make)


MIXTURES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "LoRA and DoRA": (put(("up", LoRA, {}), ("down", DoRA, {})), ("DoRA", "LoRA")),
    "LoRA and IA3": (put(("up", LoRA, {}), ("down", peftlib.IA3, {})), ("LoRA", "IA3")),
    "two dropouts": (put(("up", LoRA, {"dropout": 0.1}), ("down", LoRA, {})), ("dropout",)),
    "a weight alone": (put(("up", LoRA, {}), ("head", Full, {"params": "weight"})), ("head.weight", "peft")),
    "a pair inside a copy": (put(("layers.1", Full, {}), ("1.up", LoRA, {}), make=lambda: Boxes()),
                             ("layers.1.up", "modules_to_save")),
    "a copy around a pair": (put(("embed_tokens", LoRA, {}), ("embed_tokens", Full, {})),
                             ("embed_tokens.weight", "Full")),
    "a root": (put(("", Full, {}), make=lambda: nn.Linear(2, 2)), ("the root", "peft", "modules")),
    "a root with a pair": (put((nn.Linear, LoRA, {}), make=lambda: nn.Linear(2, 2)), ("the root", "peft")),
    "names that end alike": (put(("up", LoRA, {}), (lambda n, m: n == "layers.0.down", Full, {}), make=lambda: Alike()),
                             ("peft", "module")),
    "two ranks in an attention": (attention(rank=3), ("layer", "in_proj", "out_proj")),
    "two scales in an attention": (attention(alpha=3), ("layer", "in_proj", "out_proj")),
    "dropout beside parameters": (
        put(("shared", LoRA, {"dropout": 0.1}), ("layer", LoRA, {"param": "up"}), make=lambda: Around(Experts())),
        ("dropout=0.1", "target_parameters", "layer.up")),
    "(IA)³ and LoRA": (put(("up", peftlib.IA3, {}), ("down", LoRA, {})), ("LoRA", "IA3")),
    "(IA)³ and a bias": (put(("up", peftlib.IA3, {}), ("down", Full, {"params": "bias"})),
                         ("peft", "bias", "(IA)³")),
    "a prompt of an embedding": (put(("embed_tokens", peftlib.Prompt, {"length": 2})),
                                 ("peft's", "prompt")),
    "rows of a parameter": (put(("layer", Full, {"rows": [1], "params": "gate"}), make=lambda: Around(Experts())),
                            ("layer", "rows", "Full")),
    "one parameter of two": (
        put((lambda n, m: n == "layer", LoRA, {"param": "up"}), make=lambda: Twice()),
        ("again.layer.up", "parameter", "LoRA")),
    "DoRA on a grouped convolution": (
        put(("layer", DoRA, {"rank": 2}), make=lambda: Around(nn.Conv2d(4, 6, 3, groups=2))),
        ("layer", "DoRA")),
    "an unknown kind": (
        put(("up", LoRA, {}), ("down", helpers.Offset, {})), ("LoRA", "Offset")),
}  # fmt: skip


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.again = Experts(), nn.ModuleDict({"layer": Experts()})


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


@pytest.mark.parametrize(("make", "names"), MIXTURES.values(), ids=MIXTURES)
def test_mixtures_that_one_file_of_peft_cannot_hold(make, names, tmp_path):
    refused(lambda model: hf.save(model, tmp_path / "out"), make(), names)
    assert not (tmp_path / "out").exists()


def test_an_unknown_target_or_name(tmp_path):
    model = put(("up", LoRA, {}))()
    refused(lambda m: hf.save(m, tmp_path, target="axolotl"), model, ("target='axolotl'", "'peft'"))
    refused(lambda m: hf.save(m, tmp_path, "other"), model, ("Net", "'other'"))


def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    model = put(("up", LoRA, {}))()
    hf.save(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    helpers.moved(model)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors, "serialize_file", fail)
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
        shifted(p for p in model.parameters() if p.requires_grad)
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
    names = ("layer", "lora_A", "2")
    refused(lambda model: hf.load(model, tmp_path), grouped(), names)
    refused(lambda model: hf.inject(model, {"r": 3, "target_modules": ["layer"]}), grouped(), ("layer", "r=3"))


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
    refused(lambda model: hf.save(model, tmp_path / "out", target=target), make(), ())
    assert not (tmp_path / "out").exists()

"""HF peft's files: peft itself loads what is written here, and what it writes is loaded here, to the same outputs."""

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftlib
from peftlib import hf
from support import helpers
from support.ecosystem import feature
from support.peft_models import Around, Experts, Net, assert_same, quiet, shifted
from support.refusals import refused

# Both compute in float32, in another order of additions: a few roundings (2**-24 each) of the largest output.


class ScaledEmbedding(nn.Embedding):
    """As Gemma's: the class says its factor, and peft reads it."""

    def __init__(self) -> None:
        super().__init__(9, 6)
        self.embed_scale = torch.tensor(2.5)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


@dataclass(frozen=True)
class Case:
    """A model, its input, what peft's configuration says, and whether a file goes there and back bit by bit."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    config: dict[str, Any] = field(default_factory=dict)
    same_bits: bool = True
    kind: Any = peft.LoraConfig


def _layer(name: str, make: Callable[[], nn.Module], *shape: int, **config: Any) -> Case:
    flags = {key: config.pop(key) for key in ("same_bits",) if key in config}
    return Case(
        name, lambda: Around(make()), lambda: (torch.randn(*shape),), {"target_modules": ["layer"]} | config, **flags
    )


def _tokens(name: str, make: Callable[[], nn.Module], **config: Any) -> Case:
    return Case(name, make, lambda: (torch.randint(0, 9, (3, 4)),), config)


def _attention(name: str, **config: Any) -> Case:
    make = lambda: Around(nn.MultiheadAttention(8, 2, batch_first=True))  # noqa: E731
    return Case(name, make, lambda: (torch.randn(2, 3, 8),) * 3, {"target_modules": ["layer"]} | config)


def _experts(name: str, *parameters: str, transposed: bool = False, **config: Any) -> Case:
    named = {"target_modules": [], "target_parameters": [f"layer.{each}" for each in parameters]}
    return Case(name, lambda: Around(Experts(transposed)), lambda: (torch.randn(7, 4),), named | config)


def _ia3(name: str, make: Callable[[], nn.Module], *shape: int, **config: Any) -> Case:
    named = {"target_modules": ["layer"], "feedforward_modules": []} | config
    return Case(name, lambda: Around(make()), lambda: (torch.randn(*shape),), named, kind=peft.IA3Config)


LORA = [
    _layer("linear", lambda: nn.Linear(5, 3), 4, 5),
    _layer("linear-rank-stabilised", lambda: nn.Linear(5, 3), 4, 5, use_rslora=True),
    _layer("linear-own-bias", lambda: nn.Linear(5, 3), 4, 5, bias="lora_only"),
    _layer("linear-lora-bias", lambda: nn.Linear(5, 3), 4, 5, lora_bias=True, same_bits=False),
    _layer("linear-both-biases", lambda: nn.Linear(5, 3), 4, 5, lora_bias=True, bias="all", same_bits=False),
    _layer("linear-pissa", lambda: nn.Linear(6, 7), 4, 6, init_lora_weights="pissa", same_bits=False),
    _layer("linear-dora", lambda: nn.Linear(5, 3), 4, 5, use_dora=True),
    _layer("linear-dora-stabilised", lambda: nn.Linear(5, 3), 4, 5, use_dora=True, use_rslora=True),
    _layer("conv1d", lambda: nn.Conv1d(4, 6, 3, padding=1), 2, 4, 9),
    _layer("conv2d", lambda: nn.Conv2d(4, 6, (3, 2), stride=2), 2, 4, 9, 8),
    _layer("conv2d-one-pixel", lambda: nn.Conv2d(4, 6, 1, dilation=2), 2, 4, 5, 5),
    _layer("conv2d-dora", lambda: nn.Conv2d(4, 6, 3, padding="same"), 2, 4, 9, 8, use_dora=True),
    _layer("conv3d", lambda: nn.Conv3d(2, 4, 2), 2, 2, 4, 3, 5),
    _layer("conv3d-dora", lambda: nn.Conv3d(2, 4, 2), 2, 2, 4, 3, 5, use_dora=True),
    _layer("hf-conv1d", lambda: Conv1D(6, 4), 3, 4, fan_in_fan_out=True),
    _layer("hf-conv1d-dora", lambda: Conv1D(6, 4), 3, 4, fan_in_fan_out=True, use_dora=True),
    _tokens("embedding", lambda: Around(nn.Embedding(9, 6, padding_idx=2)), target_modules=["layer"]),
    _tokens("embedding-dora", lambda: Around(nn.Embedding(9, 6)), target_modules=["layer"], use_dora=True),
    _tokens("embedding-scaled", lambda: Around(ScaledEmbedding()), target_modules=["layer"]),
    _attention("attention"),
    _attention("attention-biases", bias="all"),
    _experts("stack", "up"),
    _experts("two-stacks", "up", "down"),
    _experts("stacks-and-matrix", "up", "down", "gate", rank_pattern={"gate": 2}, alpha_pattern={"down": 3}),
    _experts("stacks-transposed", "up", "down", transposed=True),
    _experts("stacks-around-a-layer", "up", "down", target_modules=["shared"], bias="lora_only"),
    _tokens("patterns", Net, target_modules=["up", "down"], rank_pattern={r"layers\.1\.up": 2, "down": 3},
            alpha_pattern={"^layers.0.up": 11}),
    _tokens("patterns-stabilised", Net, target_modules=["up"], rank_pattern={"1.up": 2}, use_rslora=True),
    _tokens("some-layers", Net, target_modules=["up"], layers_to_transform=[0, 2], layers_pattern="layers"),
    _tokens("expression", Net, target_modules=r"layers\.[01]\.(up|down)", exclude_modules=["0.down"]),
    _tokens("all-linear", Net, target_modules="all-linear", modules_to_save=["head"]),
    _tokens("kept-modules", Net, target_modules=["embed_tokens", "2.up"], modules_to_save=["norm", "head"]),
    _tokens("every-bias", Net, target_modules=["up"], bias="all"),
    _tokens("every-bias-and-head", Net, target_modules=["up"], bias="all", modules_to_save=["head"]),
]  # fmt: skip
IA3 = [
    _ia3("ia3", lambda: nn.Linear(5, 3), 4, 5),
    _ia3("ia3-input", lambda: nn.Linear(5, 3), 4, 5, feedforward_modules=["layer"]),
    _ia3("ia3-conv2d", lambda: nn.Conv2d(4, 6, 3), 2, 4, 5, 5),
    _ia3("ia3-conv3d-input", lambda: nn.Conv3d(4, 6, 2, groups=2), 2, 4, 5, 3, 3, feedforward_modules=["layer"]),
    _ia3("ia3-hf-conv1d", lambda: Conv1D(6, 4), 3, 4, fan_in_fan_out=True),
    _ia3("ia3-hf-conv1d-input", lambda: Conv1D(6, 4), 3, 4, fan_in_fan_out=True, feedforward_modules=["layer"]),
    Case("ia3-net", Net, lambda: (torch.randint(0, 9, (3, 4)),),
         {"target_modules": ["up", "down"], "feedforward_modules": ["down"], "modules_to_save": ["head"]},
         kind=peft.IA3Config),
]  # fmt: skip
CASES = LORA + IA3


def kinds_of(case: Case) -> set[str]:
    """What the parts of its adapter are called here."""
    own = "IA3" if case.kind is peft.IA3Config else "DoRA" if case.config.get("use_dora") else "LoRA"
    kept = case.config.get("modules_to_save") or case.config.get("bias")
    return {own, "Full"} if kept else {own}


def rows_of(case: Case) -> list[Any]:
    """The rows of the matrix that the case is of, by its name."""
    kinds, name = kinds_of(case), case.name.removeprefix("ia3-")
    rows = {
        r"linear|ia3$|input$": feature("HF peft: Linear", *kinds),
        r"conv[123]d": feature("HF peft: Conv1d, Conv2d, Conv3d", *kinds),
        r"embedding": feature("HF peft: Embedding", *kinds),
        r"hf-conv1d": feature("HF peft: the Conv1D of transformers", *kinds),
        r"attention": feature("HF peft: MultiheadAttention", *kinds),
        r"stack|two-stacks": feature("HF peft: target_parameters, as of mixtures of experts", *kinds),
        r".*stabilised": feature("HF peft: rank-stabilized", *kinds),
        r"patterns|some|expression|all-linear|stacks-and": feature("HF peft: patterns of ranks, alphas, names", *kinds),
        r".*bias": feature("HF peft: learned biases", *kinds),
        r"all-linear|kept|.*head|net": feature("HF peft: modules_to_save", *kinds),
    }
    return [row for pattern, row in rows.items() if re.match(pattern, name)]


every_case = pytest.mark.parametrize("case", [pytest.param(case, id=case.name, marks=rows_of(case)) for case in CASES])


def base_of(case: Case) -> nn.Module:
    torch.manual_seed(1)
    return case.make().eval()


def inputs_of(case: Case) -> tuple[Any, ...]:
    torch.manual_seed(2)
    return case.inputs()


def theirs(case: Case) -> Any:
    """peft's own model, trained a little."""
    sizes = {"r": 4, "lora_alpha": 6} if case.kind is peft.LoraConfig else {}
    with quiet():
        model = peft.get_peft_model(base_of(case), case.kind(**sizes, **case.config))
    shifted(parameter for parameter in model.parameters() if parameter.requires_grad)
    return model.eval()


def saved_by_peft(case: Case, folder: Any) -> Any:
    model = theirs(case)
    with quiet():
        model.save_pretrained(folder)
    return model


@pytest.fixture
def folder(tmp_path) -> Any:
    return tmp_path / "adapter"


@every_case
def test_what_peft_saves_is_loaded_and_computes_the_same(case, folder):
    inputs, model = inputs_of(case), saved_by_peft(case, folder)
    ours, base = base_of(case), base_of(case)
    hf.load(ours, folder)
    assert_same(ours(*inputs), model(*inputs))
    assert (ours(*inputs) - base(*inputs)).abs().max() > 1e-3
    peftlib.eject(ours)
    assert torch.equal(ours(*inputs), base(*inputs))


@every_case
def test_peft_loads_what_is_saved_here_without_a_warning_and_computes_the_same(case, folder, tmp_path):
    inputs, model = inputs_of(case), saved_by_peft(case, folder)
    ours = base_of(case)
    hf.load(ours, folder)
    hf.save(ours, tmp_path / "again")
    with warnings.catch_warnings():
        if case.name == "stacks-and-matrix":  # peft looks among modules alone, and then follows the pattern
            warnings.filterwarnings(
                "ignore", "The following (rank|alpha)_pattern keys did not match any targeted module"
            )
        loaded = peft.PeftModel.from_pretrained(base_of(case), str(tmp_path / "again"))
    assert_same(loaded(*inputs), ours(*inputs))
    assert_same(loaded(*inputs), model(*inputs))


@every_case
def test_there_and_back_no_bit_of_a_tensor_changes(case, folder, tmp_path):
    saved_by_peft(case, folder)
    ours = base_of(case)
    hf.load(ours, folder)
    hf.save(ours, tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    first = {k: t for k, t in load_file(folder / "adapter_model.safetensors").items() if not unused(k)}
    if not case.same_bits:
        return
    assert again.keys() == first.keys()
    assert all(helpers.same_bits(again[key], first[key]) for key in first)
    hf.load(base_of(case), tmp_path / "again")


def unused(key: str) -> bool:
    """With bias="all" peft writes the biases of its wrapper too, the one that is not in use among them."""
    return bool(re.search(r"\.(original_module|modules_to_save)\.", key))


@every_case
def test_a_configuration_works_unchanged(case, folder):
    """As many trainable numbers as peft has, and what is then saved has peft's keys and shapes."""
    sizes = {"r": 4, "lora_alpha": 6} if case.kind is peft.LoraConfig else {}
    kind = {"peft_type": "LORA" if case.kind is peft.LoraConfig else "IA3"}
    model, ours, base = theirs(case), base_of(case), base_of(case)
    hf.inject(ours, {**kind, **sizes, **case.config})
    inputs = inputs_of(case)
    assert_same(ours(*inputs), base(*inputs))
    expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
    extra = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "lora_B.default.bias" in n)
    doubled = extra if case.config.get("bias") else 0  # both biases of a layer are one here
    assert sum(p.numel() for p in peftlib.parameters(ours)) == expected - doubled
    with quiet():
        model.save_pretrained(folder)
    assert hf.load(base_of(case), folder) == list(dict.fromkeys(host for host, _, _ in peftlib.adapters(ours)))


@every_case
def test_a_model_that_lacks_a_layer_is_left_alone(case, folder):
    saved_by_peft(case, folder)
    other = nn.Sequential(nn.Linear(2, 2))
    with refused(other):
        hf.load(other, folder)


@every_case
def test_each_missing_or_foreign_tensor_is_named(case, folder):
    saved_by_peft(case, folder)
    path = folder / "adapter_model.safetensors"
    whole = load_file(path)
    learned = r"base_layer\.bias|model\.(layer|layers\.\d\.\w+|norm|head)\.bias"  # peft looks for none of these
    keys = [key for key in whole if not unused(key) and not re.search(f"({learned})$", key)]
    for key in keys:
        save_file({other: tensor for other, tensor in whole.items() if other != key}, path)
        assert_refused(case, folder, (str(path), key))
        save_file({**whole, key: torch.zeros(2, 9, 7)}, path)
        assert_refused(case, folder, (str(path), key, "[2, 9, 7]"))
        save_file({**whole, key: torch.full_like(whole[key], float("nan"))}, path)
        assert_refused(case, folder, ("NaN",))
    save_file({**whole, "base_model.model.layer.hada_w1_a": torch.zeros(2)}, path)
    assert_refused(case, folder, ("base_model.model.layer.hada_w1_a",))


def assert_refused(case: Case, folder: Any, names: tuple[str, ...]) -> None:
    model = base_of(case)
    with refused(model, *names):
        hf.load(model, folder)


def test_each_case_is_of_a_row_of_the_matrix():
    assert all(rows_of(case) for case in CASES)


def test_every_key_of_a_saved_configuration_is_known_to_peft(folder):
    for case in CASES:
        ours = base_of(case)
        sizes = {"peft_type": "LORA", "r": 4} if case.kind is peft.LoraConfig else {"peft_type": "IA3"}
        hf.inject(ours, {**sizes, **case.config})
        hf.save(ours, folder)
        found = json.loads((folder / "adapter_config.json").read_text())
        assert found.keys() <= {field.name for field in case.kind.__dataclass_fields__.values()}

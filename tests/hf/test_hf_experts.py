"""Files of experts: each layout there and back, and beside what its tool makes of it; refused where it could be two."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftlib
from peftlib import LoRA, hf
from support.helpers import moved, seeded
from support.mixtures import MODELS, TARGETS, logits, mixture
from support.peft_models import quiet
from support.refusals import refused

PEFT_LAYOUTS = ["peft", "peft-0.19.0", "peft-0.18", "unsloth"]
KEYED = ["per-expert", "automodel", "sglang"]
CONCATENATED = [name for name in MODELS if name not in ("gpt_oss", "llama4")]
CELLS = [(name, layout) for layout in PEFT_LAYOUTS for name in MODELS]
CELLS += [(name, layout) for layout in KEYED for name in CONCATENATED]
FACTORS = ("lora_A", "lora_B")


def adapted(name: str, rank: int = 3, alpha: float = 4.0) -> Any:
    model = mixture(name, "eager")
    peftlib.inject(model, TARGETS.get(name, "mlp.experts"), LoRA, rank=rank, alpha=alpha)
    peftlib.inject(model, "o_proj", LoRA, rank=rank, alpha=alpha)
    moved(model)
    return model


def stacks(model: Any) -> dict[str, Any]:
    return {f"{host}.{part.param}": part for host, _, part in peftlib.adapters(model) if part.param != "weight"}


def changes(model: Any) -> dict[str, Tensor]:
    """What is added to each weight, in float64."""
    return {
        f"{host}.{part.param}": part.scale * part.lora_B.double() @ part.lora_A.double()
        for host, _, part in peftlib.adapters(model)
    }


def rewritten(folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> Path:
    """The files, changed by hand."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


# What each tool adds to the parameter of a stack, from its own sources: of HF peft 0.21.2, 0.19.0 and 0.18.1
# `ParamWrapper.get_delta_weight`, of Unsloth 2026.8.10 `_canonical_lora_weights_for_grouped_mm`, of Automodel 0.7.0
# `GroupedExpertsLoRA` and `_convert_lora_expert_to_hf`, of SGLang 0.5.23 `normalize_gate_up_proj` and its memory pool.

Files = dict[str, Tensor]


def of_peft(sides: Callable[[bool], str], columns: str = "ore") -> Any:
    def change(files: Files, name: str, leaf: str, experts: int, is_transposed: bool) -> Tensor:
        path = f"base_model.model.{name}{'.base_layer' if leaf == 'gate_up_proj' else ''}"
        A, B = (files[f"{path}.{factor}.weight"].double() for factor in FACTORS)
        A = A.view(experts, -1, A.shape[1])
        B = B.view(len(B), *((experts, -1) if columns == "oer" else (-1, experts)))
        return torch.einsum(f"{columns}, eri -> {sides(is_transposed)}", B, A)

    return change


def of_each(files: Files, name: str, leaf: str, experts: int, is_transposed: bool) -> Tensor:
    """W of an expert in transformers 4 is that of an `nn.Linear`; gate and up are rows of one in version 5."""
    short = any(".w1." in key for key in files)
    parts = {"gate_up_proj": ("w1", "w3") if short else ("gate_proj", "up_proj")}.get(
        leaf, ("w2",) if short else ("down_proj",)
    )
    name = name.replace(".mlp.", ".block_sparse_moe.") if short else name
    return torch.stack([
        torch.cat([product(files, f"base_model.model.{name}.{expert}.{part}") for part in parts])
        for expert in range(experts)
    ])  # fmt: skip


def product(files: Files, stem: str) -> Tensor:
    return files[f"{stem}.lora_B.weight"].double() @ files[f"{stem}.lora_A.weight"].double()


def of_automodel(files: Files, name: str, leaf: str, experts: int, is_transposed: bool) -> Tensor:
    """x @ A @ B, on weights [experts, in, out]."""
    stem = f"base_model.model.{name}.lora_{'down' if leaf == 'down_proj' else 'gate_and_up'}"
    return (files[f"{stem}_A"].double() @ files[f"{stem}_B"].double()).mT


def of_sglang(files: Files, name: str, leaf: str, experts: int, is_transposed: bool) -> Tensor:
    return product(files, f"base_model.model.{name}.{leaf}")


TOOLS: dict[str, Any] = {
    "peft": of_peft(lambda is_transposed: "eio" if is_transposed else "eoi"),
    "peft-0.19.0": of_peft(lambda is_transposed: "eoi" if is_transposed else "eio"),
    "peft-0.18": of_peft(lambda _: "eio"),
    "unsloth": of_peft(lambda is_transposed: "eio" if is_transposed else "eoi", "oer"),
    "per-expert": of_each,
    "automodel": of_automodel,
    "sglang": of_sglang,
}


@pytest.mark.parametrize(("name", "layout"), CELLS)
def test_each_layout_is_what_its_tool_reads_and_comes_back_without_a_difference(name, layout, tmp_path):
    model = adapted(name)
    hf.save(model, tmp_path, target=layout)
    files, expected = load_file(tmp_path / "adapter_model.safetensors"), changes(model)
    for key in stacks(model):
        host, _, leaf = key.rpartition(".")
        owner = model.get_submodule(host)
        is_transposed = getattr(owner, "is_transposed", False)
        found = 4 / 3 * TOOLS[layout](files, host, leaf, 4, is_transposed)
        assert (found - expected[key]).abs().max() <= 1e-14
    again = mixture(name, "eager")
    hf.load(again, tmp_path, layout=layout)
    assert changes(again).keys() == expected.keys()
    assert all(torch.equal(changes(again)[key], expected[key]) for key in expected)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("layout", KEYED)
def test_keys_of_experts_say_themselves_in_which_layout_they_are(layout, tmp_path):
    model, again = adapted("qwen3"), mixture("qwen3", "eager")
    hf.save(model, tmp_path, target=layout)
    hf.load(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


# HF peft itself.


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "deepseek", "glm4"])  # it drops those of Qwen2-MoE (0.21.2)
def test_peft_reads_a_pair_for_each_expert_as_it_is_meant(name, tmp_path):
    model = adapted(name)
    hf.save(model, tmp_path, target="per-expert")
    with quiet():
        theirs = peft.PeftModel.from_pretrained(mixture(name, "eager"), str(tmp_path))
    assert (logits(theirs) - logits(model)).abs().max() <= 1e-12


OLD = sorted(path for path in (Path(__file__).parent / "old_peft").iterdir() if path.is_dir())


class Experts(nn.Module):
    def __init__(self, is_transposed: bool, up: tuple[int, ...] = (3, 8, 4), **names: tuple[int, ...]) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up = (up[0], up[2], up[1]) if is_transposed else up
        for leaf, shape in {"up": up, "square": (3, 4, 4), **names}.items():
            self.register_parameter(leaf, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ti,eio->to", x, self.square)


def own(is_transposed: bool = False, **names: tuple[int, ...]) -> Any:
    return seeded(lambda: nn.ModuleDict({"layer": Experts(is_transposed, **names)}))


@pytest.mark.parametrize("folder", OLD, ids=lambda folder: folder.name)
@pytest.mark.parametrize("is_said", [True, False])
def test_what_an_older_peft_saved_is_read_as_it_meant_it_and_written_as_it_wrote_it(folder, is_said, tmp_path):
    version = folder.name.split("_")[0]
    layout = "peft-0.18" if version == "0.18.1" else "peft-0.19.0"
    model = own(folder.name.endswith("transposed"))
    hf.load(model, folder, layout=layout if is_said else None)
    expected = load_file(folder / "changes.safetensors")
    assert len(expected) == 2
    for key, change in changes(model).items():
        assert (change - expected[key]).abs().max() <= 1e-6
    hf.save(model, tmp_path, target=layout)
    before, after = (load_file(each / "adapter_model.safetensors") for each in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_version"] == version


# What could be read in two ways.


def of_own(layout: str, tmp_path: Path) -> tuple[Any, Path]:
    model = own()
    peftlib.inject(model, "layer", LoRA, param="square", rank=2)
    moved(model)
    hf.save(model, tmp_path, target=layout)
    return model, tmp_path


@pytest.mark.parametrize("layout", PEFT_LAYOUTS)
def test_a_square_expert_of_an_unknown_writer_is_refused_until_the_layout_is_said(layout, tmp_path):
    model, folder = of_own(layout, tmp_path)
    rewritten(folder, lambda config, _: config.pop("peft_version"))
    again = own()
    if layout != "unsloth":
        with refused(again, "layer.square", "square", 'layout="peft"'):
            hf.load(again, folder)
        hf.load(again, folder, layout=layout)
        assert torch.equal(changes(again)["layer.square"], changes(model)["layer.square"])
    with refused(own(), "layer.square", "square"):
        hf.load(own(), folder, layout="unsloth")  # which of its sides is unknown to Unsloth too


def unmarked(config: dict[str, Any], _: Any) -> None:
    config.pop("lora_B_layout", None)
    config["auto_mapping"] = {"unsloth_fixed": True}


@pytest.mark.parametrize("layout", ["peft", "unsloth"])
def test_a_file_of_unsloth_that_does_not_say_the_order_of_its_columns_is_refused_until_it_is_said(layout, tmp_path):
    model, again = adapted("mixtral"), mixture("mixtral", "eager")
    hf.save(model, tmp_path, target=layout)
    rewritten(tmp_path, unmarked)
    with refused(again, "model.layers.0.mlp.experts.down_proj", 'layout="unsloth"'):
        hf.load(again, tmp_path)
    hf.load(again, tmp_path, layout=layout)
    assert torch.equal(logits(again), logits(model))


def test_with_one_column_for_each_expert_there_is_no_order_to_say(tmp_path):
    model, again = adapted("mixtral", rank=1), mixture("mixtral", "eager")
    hf.save(model, tmp_path, target="unsloth")
    hf.load(again, rewritten(tmp_path, unmarked))
    assert torch.equal(logits(again), logits(model))


def by_parameter(config: dict[str, Any]) -> None:
    order = config.pop("lora_B_layout", "rank_major")
    names = ("gate_up_proj", "down_proj")
    config["unsloth_fused_expert_lora"] = {"parameters": {name: {"lora_B_layout": order} for name in names}}


def in_the_mapping(config: dict[str, Any]) -> None:
    config["auto_mapping"] = {"unsloth_fixed": True, "lora_B_layout": config.pop("lora_B_layout", "rank_major")}


@pytest.mark.parametrize("say", [by_parameter, in_the_mapping])
@pytest.mark.parametrize("layout", ["peft", "unsloth"])
def test_unsloth_may_say_the_order_of_its_columns_in_three_places(say, layout, tmp_path):
    model, again = adapted("mixtral"), mixture("mixtral", "eager")
    hf.save(model, tmp_path, target=layout)
    hf.load(again, rewritten(tmp_path, lambda config, _: say(config)))
    assert torch.equal(logits(again), logits(model))


def test_an_order_that_is_none_is_refused(tmp_path):
    hf.save(adapted("mixtral"), tmp_path)
    rewritten(tmp_path, lambda config, _: config.update(lora_B_layout="by_luck"))
    again = mixture("mixtral", "eager")
    with refused(again, "model.layers.0.mlp.experts.down_proj", "'by_luck'", "'rank_major'"):
        hf.load(again, tmp_path)


def test_a_stack_that_is_there_in_two_layouts_is_refused(tmp_path):
    model, again = adapted("qwen3"), mixture("qwen3", "eager")
    for layout in KEYED:
        hf.save(model, tmp_path / layout, target=layout)
    more = load_file(tmp_path / "sglang" / "adapter_model.safetensors")
    rewritten(tmp_path / "automodel", lambda _, tensors: tensors.update(more))
    with refused(again, "model.layers.0.mlp.experts.down_proj", "two layouts"):
        hf.load(again, tmp_path / "automodel")
    with refused(again, "layout='per-expert'"):
        hf.load(again, tmp_path / "sglang", layout="per-expert")
    with refused(again, "not understood"):
        hf.load(again, tmp_path / "sglang", layout="peft")
    with refused(again, "layout='axolotl'", "'sglang'"):
        hf.load(again, tmp_path / "sglang", layout="axolotl")


# A pair for each expert, as it was trained on a model of transformers 4.


def of_version_4(name: str, folder: Path, **more: Any) -> Path:
    """Gate and up have each an A of their own."""
    model = adapted(name)
    hf.save(model, folder, target="per-expert")

    def drawn(config: dict[str, Any], tensors: Files) -> None:
        torch.manual_seed(7)
        for key, tensor in tensors.items():
            tensors[key] = torch.randn(tensor.shape) / 4
        config.update(more)

    return rewritten(folder, drawn)


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}], ids=["plain", "stabilized"])
@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_a_gate_and_an_up_with_an_a_of_their_own_become_one_pair_of_both_ranks(name, more, tmp_path):
    folder, again = of_version_4(name, tmp_path, **more), mixture(name, "eager")
    hf.load(again, folder)
    files, scale = load_file(folder / "adapter_model.safetensors"), 4 / (3**0.5 if more else 3)
    for key, part in stacks(again).items():
        host, _, leaf = key.rpartition(".")
        expected = scale * of_each(files, host, leaf, 4, False)
        assert (changes(again)[key] - expected).abs().max() <= 1e-14
        assert part.rank == (6 if leaf == "gate_up_proj" else 3)
    if not more:  # its conversion scales a root of the rank as if it were twice as large (0.21.2)
        with quiet():
            theirs = peft.PeftModel.from_pretrained(mixture(name, "eager"), str(folder))
        assert (logits(theirs) - logits(again)).abs().max() <= 1e-12


def test_patterns_name_the_experts_as_the_file_does(tmp_path):
    def named(config: dict[str, Any], _: Files) -> None:
        config["alpha_pattern"] = {rf"block_sparse_moe\.experts\.\d+\.w{part}": 8 for part in (1, 3)}

    model, again = adapted("mixtral"), mixture("mixtral", "eager")
    hf.save(model, tmp_path, target="per-expert")
    hf.load(again, rewritten(tmp_path, named))
    for key, expected in changes(model).items():
        times = 2 if key.endswith("gate_up_proj") else 1
        assert (changes(again)[key] - times * expected).abs().max() <= 1e-14


@pytest.mark.parametrize(
    "target", [["w1", "w2", "w3", "gate"], r".*block_sparse_moe\.(gate|experts\.\d+\.w\d)", None], ids=str
)
def test_a_router_is_found_under_its_name_in_transformers_4(target, tmp_path):
    model, again = mixture("mixtral", "eager"), mixture("mixtral", "eager")
    peftlib.inject(model, "mlp.experts", LoRA, rank=3, alpha=4.0)
    peftlib.inject(model, "mlp.gate", LoRA, rank=3, alpha=4.0, name="router")
    peftlib.activate(moved(model), "default", "router")
    hf.save(model, tmp_path, target="per-expert")
    hf.save(model, tmp_path / "router", "router")
    routers = load_file(tmp_path / "router" / "adapter_model.safetensors")
    assert all(value.count_nonzero() for value in routers.values())

    def named(config: dict[str, Any], tensors: Files) -> None:
        tensors.update({key.replace(".mlp.", ".block_sparse_moe."): value for key, value in routers.items()})
        gates = [f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(2)]
        config["target_modules"] = target or [*config["target_modules"], *gates]

    hf.load(again, rewritten(tmp_path, named))
    assert (logits(again) - logits(model)).abs().max() <= 1e-12
    if isinstance(target, list):
        with quiet():
            theirs = peft.PeftModel.from_pretrained(mixture("mixtral", "eager"), str(tmp_path))
        assert (logits(theirs) - logits(model)).abs().max() <= 1e-12


EXPERT = "base_model.model.model.layers.1.mlp.experts.2"
UNREADABLE: dict[str, tuple[str, Callable[[dict[str, Any], Files], Any], tuple[str, ...]]] = {
    "an expert is missing": (
        "per-expert", lambda _, t: t.pop(f"{EXPERT}.up_proj.lora_B.weight"), (f"{EXPERT}.up_proj.lora_B.weight",)),
    "a projection is missing": (
        "per-expert", lambda _, t: [t.pop(key) for key in list(t) if ".up_proj." in key],
        ("base_model.model.model.layers.0.mlp.experts.0.up_proj.lora_A.weight",)),
    "an expert too many": (
        "per-expert",
        lambda _, t: t.update({f"{EXPERT[:-1]}4.up_proj.lora_A.weight": torch.ones(3, 16)}),
        (f"{EXPERT[:-1]}4.up_proj.lora_A.weight",)),
    "another width": (
        "per-expert", lambda _, t: t.update({f"{EXPERT}.up_proj.lora_A.weight": torch.ones(3, 15)}), ("[3, 15]",)),
    "ranks that differ": (
        "per-expert", lambda c, _: c.update(rank_pattern={"experts.2.up_proj": 2}),
        ("model.layers.0.mlp.experts.gate_up_proj", "ranks")),
    "scales that differ": (
        "per-expert", lambda c, _: c.update(alpha_pattern={"gate_proj": 2}),
        ("model.layers.0.mlp.experts.gate_up_proj", "alphas")),
    "DoRA": ("per-expert", lambda c, _: c.update(use_dora=True), ("use_dora",)),
    "biases": ("sglang", lambda c, _: c.update(lora_bias=True), ("lora_bias",)),
    "values out of the base": ("automodel", lambda c, _: c.update(init_lora_weights="pissa"), ("'pissa'",)),
    "a rank that is not said": ("automodel", lambda c, _: c.update(r=2), ("[4, 16, 3]", "[4, 16, 2]")),
    "some of the experts": (
        "sglang",
        lambda _, t: t.update({f"{EXPERT[:-2]}.down_proj.lora_A.weight": torch.ones(2, 3, 16)}),
        ("[2, 3, 16]", "[4, 3, 16]")),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "change", "names"), UNREADABLE.values(), ids=UNREADABLE)
def test_experts_that_are_not_understood_are_refused_by_name(layout, change, names, tmp_path):
    hf.save(adapted("qwen3"), tmp_path, target=layout)
    again = mixture("qwen3", "eager")
    with refused(again, *names):
        hf.load(again, rewritten(tmp_path, change))


# One factor for all experts, on the outer side.


def test_a_factor_that_all_experts_share_is_read_for_each(tmp_path):
    def shared(_: Any, tensors: Files) -> None:
        for key, tensor in tensors.items():
            if key.endswith(("gate_up_proj.lora_A.weight", "experts.down_proj.lora_B.weight")):
                tensors[key] = tensor[:1]

    hf.save(adapted("qwen3"), tmp_path, target="sglang")
    again = mixture("qwen3", "eager")
    hf.load(again, rewritten(tmp_path, shared))
    files = load_file(tmp_path / "adapter_model.safetensors")
    for key in stacks(again):
        host, _, leaf = key.rpartition(".")
        expected = 4 / 3 * of_sglang(files, host, leaf, 4, False)
        assert (changes(again)[key] - expected).abs().max() <= 1e-14


def test_a_gate_and_an_up_in_stacks_of_their_own_are_read_as_one(tmp_path):
    def apart(_: Any, tensors: Files) -> None:
        for key in [key for key in tensors if "gate_up_proj" in key]:
            tensor = tensors.pop(key)
            halves = tensor.chunk(2, 1) if "lora_B" in key else (tensor, tensor)
            for part, half in zip(("gate_proj", "up_proj"), halves, strict=True):
                tensors[key.replace("gate_up_proj", part)] = half.clone()

    model, again = adapted("qwen3"), mixture("qwen3", "eager")
    hf.save(model, tmp_path, target="sglang")
    hf.load(again, rewritten(tmp_path, apart))
    assert torch.equal(logits(again), logits(model))


# What a reader of a layout cannot have.


def two_ranks() -> Any:
    model = mixture("qwen3", "eager")
    peftlib.inject(model, "layers.0.mlp.experts", LoRA, rank=2)
    peftlib.inject(model, "layers.1.mlp.experts", LoRA, rank=3)
    return model


def beside(kind: Any, target: str, name: str = "qwen3", **config: Any) -> Callable[[], Any]:
    def make() -> Any:
        model = mixture(name, "eager")
        peftlib.inject(model, "mlp.experts", LoRA, rank=2)
        peftlib.inject(model, target, kind, **config)
        return model

    return make


def of_one_s_own() -> Any:
    model = own()
    peftlib.inject(model, "layer", LoRA, param="square", rank=2)
    return model


FIRST, SECOND = (f"model.layers.{layer}.mlp.experts" for layer in range(2))
UNWRITABLE: dict[str, tuple[Callable[[], Any], list[str], tuple[str, ...]]] = {
    "gate and up in turns": (lambda: adapted("gpt_oss"), KEYED, (f"{FIRST}.gate_up_proj", "GptOssExperts")),
    "a side that is not said": (lambda: adapted("llama4"), KEYED, ("Llama4TextExperts", "is_transposed")),
    "another name": (of_one_s_own, KEYED, ("layer.square", "Experts")),
    "two ranks": (two_ranks, KEYED, (f"{SECOND}.down_proj", f"{FIRST}.down_proj", "rank")),
    "a router of another name": (
        beside(LoRA, "mlp.gate", "mixtral", rank=2),
        ["per-expert"],
        ("model.layers.0.mlp.gate.weight", "transformers 4"),
    ),
    "a scale beside": (beside(LoRA, "o_proj", rank=2, alpha=3.0), ["automodel", "sglang"], ("scale",)),
    "DoRA beside": (beside(peftlib.DoRA, "o_proj", rank=2), ["automodel", "sglang"], ("DoRA",)),
    "an embedding beside": (beside(LoRA, "embed_tokens", rank=2), ["automodel", "sglang"], ("Embedding",)),
    "a copy beside": (beside(peftlib.Full, "norm"), ["automodel", "sglang"], ("copies",)),
    "experts": (lambda: adapted("qwen3"), ["vllm", "llama.cpp"], (f"{FIRST}.gate_up_proj", "Qwen3MoeExperts")),
}
REFUSED = [pytest.param(make, layout, names, id=f"{what}, {layout}")
           for what, (make, layouts, names) in UNWRITABLE.items() for layout in layouts]  # fmt: skip


@pytest.mark.parametrize(("make", "layout", "names"), REFUSED)
def test_what_a_reader_cannot_have_is_refused_by_name(make, layout, names, tmp_path):
    model = make()
    with refused(model, *names):
        hf.save(model, tmp_path / "out", target=layout)
    assert not (tmp_path / "out").exists()


def test_ranks_beside_the_experts_are_said_by_pattern(tmp_path):
    model, again = beside(LoRA, "o_proj", rank=5, alpha=3.0, rank_stabilized=True)(), mixture("qwen3", "eager")
    moved(model)
    hf.save(model, tmp_path, target="per-expert")
    hf.load(again, tmp_path)
    assert (logits(again) - logits(model)).abs().max() <= 1e-12
    with quiet():
        theirs = peft.PeftModel.from_pretrained(mixture("qwen3", "eager"), str(tmp_path))
    assert (logits(theirs) - logits(model)).abs().max() <= 1e-12


@pytest.mark.parametrize("layout", ["automodel", "sglang"])
def test_a_scale_over_the_root_of_the_rank_is_said_as_one_over_the_rank(layout, tmp_path):
    model, again = mixture("qwen3", "eager"), mixture("qwen3", "eager")
    peftlib.inject(model, "mlp.experts", LoRA, rank=4, alpha=3.0, rank_stabilized=True)
    moved(model)
    hf.save(model, tmp_path, target=layout)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 6
    hf.load(again, tmp_path)
    assert torch.equal(logits(again), logits(model))

"""What people guess who know another library: refused by name, with what it is called here, and nothing changed."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import peftlib
from peftlib import AdapterError, Bottleneck, DoRA, Full, LoRA, Prefix, Prompt, schedules
from support.helpers import chain, linears, network
from support.refusals import refused

KEYWORDS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "r": (LoRA, {"r": 8}, "rank="),
    "r of DoRA": (DoRA, {"r": 8}, "rank="),
    "lora_alpha": (LoRA, {"lora_alpha": 16}, "alpha="),
    "lora_dropout": (LoRA, {"lora_dropout": 0.1}, "dropout="),
    "use_rslora": (LoRA, {"use_rslora": True}, "rank_stabilized="),
    "init_lora_weights": (LoRA, {"init_lora_weights": "pissa"}, "init="),
    "target_parameters": (LoRA, {"target_parameters": ["weight"]}, "param="),
    "target_modules": (LoRA, {"target_modules": ["0"]}, "inject(model, targets, kind)"),
    "modules_to_save": (LoRA, {"modules_to_save": ["1"]}, "peftlib.Full"),
    "use_dora": (LoRA, {"use_dora": True}, "peftlib.DoRA"),
    "adapter_name": (LoRA, {"adapter_name": "a"}, "name="),
    "rank_pattern": (LoRA, {"rank_pattern": {}}, "inject"),
    "task_type": (LoRA, {"task_type": "CAUSAL_LM"}, "Leave it out"),
    "a typing error": (LoRA, {"rnak": 8}, "rank="),
    "bottleneck": (Bottleneck, {"bottleneck": 64}, "width="),
    "adapter_size": (Bottleneck, {"adapter_size": 64}, "width="),
    "reduction_factor": (Bottleneck, {"reduction_factor": 16}, "reduction="),
    "non_linearity": (Bottleneck, {"non_linearity": "relu"}, "activation="),
    "r of Bottleneck": (Bottleneck, {"r": 8}, "LoRA"),
    "num_virtual_tokens": (Prefix, {"num_virtual_tokens": 20}, "length="),
    "prompt_tuning_init": (Prompt, {"prompt_tuning_init": "TEXT"}, "init="),
    "trainable_token_indices": (Full, {"trainable_token_indices": [1]}, "rows="),
    "what nobody has": (LoRA, {"zzz": 1}, "Correct it"),
}


@pytest.mark.parametrize("act", [peftlib.inject, peftlib.plan])
@pytest.mark.parametrize(("kind", "config", "meant"), KEYWORDS.values(), ids=KEYWORDS)
def test_a_keyword_of_another_library_is_told_what_it_is_called_here(kind, config, meant, act):
    model = linears()
    with refused(model, kind.__name__, *config) as error:
        act(model, "0", kind, **config)
    assert meant in str(error.value).rpartition("). ")[2]


def test_an_adapter_type_that_takes_any_keyword_is_given_it():
    class Anything(peftlib.Adapter):
        def __init__(self, host: Any, **rest: Any) -> None:
            super().__init__()
            self.offset = nn.Parameter(torch.zeros(4))
            self.rest = rest

        def forward(self, host: Any, call: Any, *args: Any, **kwargs: Any) -> Any:
            return call(*args, **kwargs) + self.offset

    model = linears()
    peftlib.inject(model, "0", Anything, r=8)
    (found,) = [adapter for _, _, adapter in peftlib.adapters(model)]
    assert found.config == {"r": 8}


# ---- the adapter type


class Config:
    peft_type = "LORA"


@pytest.mark.parametrize(
    ("kind", "meant"),
    [("lora", "peftlib.LoRA"), ("IA3", "peftlib.IA3"), (Config(), "peftlib.hf.inject")],
    ids=["lora", "IA3", "a configuration"],
)
def test_what_is_no_class_is_told_which_class_it_is(kind, meant):
    model = linears()
    with refused(model, "kind") as error:
        peftlib.inject(model, "0", kind)
    assert meant in str(error.value)


def test_an_instance_is_no_adapter_type():
    adapter: Any = LoRA(nn.Linear(4, 4), rank=2)
    model = linears()
    with refused(model, "kind", "peftlib.LoRA"):
        peftlib.inject(model, "0", adapter)


@pytest.mark.parametrize("kind", [LoRA, DoRA, Bottleneck, Full])
def test_an_adapter_is_not_made_without_a_module(kind):
    with refused(None, kind.__name__, "peftlib.inject"):
        kind(rank=8)


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_a_class_says_its_keywords_all_the_same(kind):
    assert [*inspect.signature(kind).parameters][:3] == ["host", "rank", "alpha"]
    assert kind(host=nn.Linear(4, 4), rank=2).rank == 2


# ---- targets


def named(targets: Any, model: Any = None, **options: Any) -> list[str]:
    rows = peftlib.plan(network() if model is None else model, targets, LoRA, rank=2, **options).rows
    return [row.host for row in rows]


def test_all_linear_is_a_type_and_a_head_to_leave_out():
    model = network()
    for word in ("all-linear", "all_linear"):
        with refused(model, "targets", word, "torch.nn.Linear", "head"):
            peftlib.inject(model, word, LoRA)
    assert "head" not in named(nn.Linear, exclude="head")


@pytest.mark.parametrize(
    "pattern", [r".*\.(q|v)_proj", "layers.*(q_proj|v_proj)$", re.compile(r"layers\.\d+\.q_proj")], ids=str
)
def test_a_regular_expression_is_told_from_a_glob(pattern):
    model = network()
    with refused(model, "targets", "re.fullmatch"):
        peftlib.inject(model, pattern, LoRA)
    as_predicate = named(lambda name, module: re.fullmatch(pattern, name) is not None)
    assert "layers.0.q_proj" in as_predicate


def test_a_module_is_told_its_name():
    model = network()
    for targets in (model.layers[1].q_proj, [model.layers[1].q_proj]):
        with refused(model, "targets", "layers.1.q_proj"):
            peftlib.inject(model, targets, LoRA)
    with refused(model, "targets", "Linear", "not in this model"):
        peftlib.inject(model, nn.Linear(2, 2), LoRA)  # pyright: ignore[reportArgumentType]
    with refused(model, "targets", "^"):
        peftlib.inject(model, model, LoRA)


def test_the_class_of_a_model_is_told_what_is_inside():
    model = network()
    with refused(model, "the root", "Network", "Embedding", "Linear"):
        peftlib.inject(model, type(model), LoRA)


def test_a_name_is_anchored_at_the_root():
    def block() -> Any:
        return nn.ModuleDict({"conv1": nn.Linear(4, 4), "block": nn.ModuleDict({"conv1": nn.Linear(4, 4)})})

    model = chain()
    model.add_module("conv1", nn.Linear(4, 4))
    model.add_module("block", block())
    assert named("conv1", model) == ["conv1", "block.conv1", "block.block.conv1"]
    assert named("^conv1", model) == ["conv1"]
    assert named("^block.conv?", model) == ["block.conv1"]
    assert named("conv1", model, exclude="^conv1") == ["block.conv1", "block.block.conv1"]
    assert named("^", nn.Linear(4, 4)) == [""]
    with refused(model, "targets", "^vonc1", "conv1"):
        named("^vonc1", model)


def test_a_rank_above_the_smaller_side_is_refused_and_the_limit_itself_is_not():
    model = chain(nn.Linear(16, 3), nn.Conv2d(2, 40, 3), nn.Embedding(5, 30))
    for name, limit in (("0", 3), ("1", 18), ("2", 5)):
        for kind in (LoRA, DoRA):
            with refused(model, name, f"rank={limit + 1}", f"rank<={limit}"):
                peftlib.inject(model, name, kind, rank=limit + 1)
    assert [row.host for row in peftlib.plan(model, "1", LoRA, rank=18).rows] == ["1"]
    peftlib.inject(model, "0", LoRA, rank=3)
    peftlib.inject(model, "2", LoRA)  # the default is no choice of the user's


# ---- the model


def test_a_compiled_model_is_adapted_before():
    model = linears()
    compiled: Any = torch.compile(model, backend="eager")
    for act in (peftlib.inject, peftlib.plan):
        with refused(model, act.__name__, "torch.compile"):
            act(compiled, "0", LoRA, rank=2)


# ---- names of adapters


@pytest.mark.parametrize("act", [peftlib.activate, peftlib.train_only, peftlib.merge, peftlib.view])
@pytest.mark.parametrize("wrong", [["default"], ("default",), LoRA, 3], ids=str)
def test_a_list_is_no_name(act, wrong):
    model = linears()
    peftlib.inject(model, "0", LoRA, rank=2)
    with refused(model) as error:
        act(model, wrong)
    assert "activate(model, 'default')" in str(error.value)


# ---- training


def groups() -> Any:
    return peftlib.layer_groups(linears(3))


@pytest.mark.parametrize(
    ("schedule", "meant"),
    [(100, "every(100)"), ([50, 300], "milestones([50, 300])"), ("linear", "peftlib.schedules"), (None, "every")],
    ids=str,
)
def test_what_is_no_schedule_is_told_which_one_it_is(schedule, meant):
    with pytest.raises(AdapterError) as error:
        peftlib.GradualUnfreezing(groups(), schedule)
    assert meant in str(error.value)


@pytest.mark.parametrize("act", [lambda it: peftlib.GradualUnfreezing(it, schedules.every(1)),
                                 lambda it: peftlib.discriminative_lr(it, 1e-3)])  # fmt: skip
def test_a_model_is_no_layer_groups(act):
    model = linears()
    for wrong in (model, [*model.parameters()], [*model.children()]):
        with refused(model) as error:
            act(wrong)
        assert "layer_groups(model)" in str(error.value)


def test_a_plateau_without_a_metric_is_refused():
    unfreezing = peftlib.GradualUnfreezing(groups(), schedules.plateau(1))
    with refused(None, "step", "step(metric)"):
        unfreezing.step()
    for metric in (1.0, 1.0):
        unfreezing.step(metric)
    assert unfreezing.unfrozen == ["1", "2"]


def test_an_optimizer_that_has_no_adapter_is_found():
    model = linears()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    peftlib.inject(model, ["0", "1"], LoRA, rank=2)
    late = torch.optim.SGD(peftlib.parameters(model), lr=0.1)
    half = torch.optim.SGD([p for _, _, adapter in peftlib.adapters(model) for p in [adapter.lora_A]], lr=0.1)  # pyright: ignore
    x = torch.randn(3, 4)
    assert peftlib.verify(model, x)
    assert peftlib.verify(model, x, optimizer=late)
    for optimizer, absent in ((early, ["lora_A", "lora_B"]), (half, ["lora_B"])):
        found = peftlib.verify(model, x, optimizer=optimizer)
        assert len(found.problems) == 2
        for problem, host in zip(found.problems, "01", strict=True):
            assert f"on {host}" in problem
            assert [key for key in ("lora_A", "lora_B") if key in problem] == absent


# ---- files of other tools


def test_files_of_other_tools_are_told_how_to_load_them(tmp_path):
    model = linears()
    directory = tmp_path / "peft"
    peftlib.inject(model, "0", LoRA, rank=2)
    peftlib.hf.save(model, directory)
    peftlib.eject(model)
    for path in (directory, directory / "adapter_model.safetensors"):
        with refused(model, str(path)) as error:
            peftlib.load(model, path)
        assert "peftlib.hf.load" in str(error.value)
    with pytest.raises(IsADirectoryError):
        peftlib.load(model, tmp_path)
    assert peftlib.hf.load(model, directory) == ["0"]


@pytest.mark.parametrize(
    ("key", "layout"),
    [
        ("lora_unet_0.lora_down.weight", '"kohya"'),
        ("unet.0.lora_A.weight", '"diffusers"'),
        ("unet.0.lora.down.weight", '"diffusers"'),
        ("0.lora_a.weight", '"torchtune"'),
        ("0.lora_A", '"loralib"'),
        ("0.weight", "the tool that wrote it"),
    ],
)
def test_the_layout_of_a_file_is_known_by_its_names(key, layout, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file({key: torch.ones(2, 4)}, path)
    with refused(None, str(path)) as error:
        peftlib.load(linears(), path)
    assert layout in str(error.value)


def test_a_name_on_the_hub_is_told_to_be_downloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = network()
    with refused(model, "org/name") as error:
        peftlib.hf.load(model, "org/name")
    assert "snapshot_download('org/name')" in str(error.value)
    Path("org").mkdir()
    for path in ("org/name", str(tmp_path / "org" / "name"), "gone"):  # a folder that was mistyped
        with pytest.raises(FileNotFoundError):
            peftlib.hf.load(model, path)

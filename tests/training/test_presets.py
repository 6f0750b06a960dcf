"""Every row of the table of presets does what it says, on the page's own model."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftlib
from support.helpers import changes, moved, snapshot
from support.pages import blocks
from support.refusals import refused

PAGE = Path(__file__).parents[2] / "docs" / "presets.md"
ROW = re.compile(r"^\| (?!method|-)(.+?) \| (`.+?`) \|(.*)\|$", re.MULTILINE)
ROWS: dict[str, list[str]] = {row[1]: re.findall(r"`(.+?)`", row[2]) for row in ROW.finditer(PAGE.read_text())}

WIDTH, INNER, HEADS, HEAD_DIM, LAYERS = 32, 128, 4, 8, 2
Shapes = dict[str, tuple[int, ...]]


def pairs(hosts: dict[str, tuple[int, int]], rank: int, also: Callable[[int], Shapes] = lambda out: {}) -> Shapes:
    """The parameters of low-rank pairs, by what ends their names; hosts give (out, in)."""
    found: Shapes = {}
    for host, (out, inputs) in hosts.items():
        own = {"lora_A": (rank, inputs), "lora_B": (out, rank), **also(out)}
        found |= {f"{host}.{key}": shape for key, shape in own.items()}
    return found


def bottleneck(host: str, width: int) -> Shapes:
    shapes = {"down_weight": (width, WIDTH), "down_bias": (width,), "up_weight": (WIDTH, width), "up_bias": (WIDTH,)}
    return {f"{host}.{key}": shape for key, shape in shapes.items()}


def perceptron(width: int) -> Shapes:
    out = HEADS * 2 * HEAD_DIM
    shapes = {
        "embedding": (30, width), "hidden_weight": (width, width), "hidden_bias": (width,),
        "output_weight": (out, width), "output_bias": (out,),
    }  # fmt: skip
    return {f"attention.{key}": shape for key, shape in shapes.items()}


SQUARE = {f"attention.{name}_proj": (WIDTH, WIDTH) for name in ("q", "k", "v", "out")}
QV = {name: SQUARE[name] for name in ("attention.q_proj", "attention.v_proj")}
ALL = {**SQUARE, "mlp.up": (INNER, WIDTH), "mlp.down": (WIDTH, INNER)}
NORMS = {f"{norm}.own.{leaf}": (WIDTH,) for norm in ("norm1", "norm2") for leaf in ("weight", "bias")}
PREFIX = {f"attention.prefix_{what}": (HEADS, 10, HEAD_DIM) for what in ("key", "value")}
BIASES = {f"{host}.own.bias": (out,) for host, (out, _) in ALL.items()}

# What trains in each block, by the papers: host, parameter, shape.
IN_A_BLOCK: dict[str, Shapes] = {
    "LoRA": pairs(QV, 8),
    "rsLoRA": pairs(ALL, 16),
    "PiSSA": pairs(ALL, 8),
    "DoRA": pairs(ALL, 8, lambda out: {"magnitude": (out,)}),
    "LoRA-FA": {key: shape for key, shape in pairs(SQUARE, 8).items() if key.endswith("lora_B")},
    "LoRA+": pairs(SQUARE, 8),
    "adapters of Houlsby": bottleneck("attention", 2) | bottleneck("mlp", 2) | NORMS,
    "adapters of Pfeiffer": bottleneck("mlp", 2),
    "parallel adapters": bottleneck("mlp", 512),
    "prefix tuning": perceptron(512),
    "MAM": perceptron(512) | bottleneck("mlp", 512),
    "UniPELT": pairs(QV, 8) | PREFIX | {"attention.gate": (HEADS, 1, 1)} | bottleneck("mlp", 2) | {"mlp.scale": (1,)},
    "(IA)³": {"attention.k_proj.factor": (WIDTH,), "attention.v_proj.factor": (WIDTH,), "mlp.down.factor": (INNER,)},
    "BitFit": BIASES | {key: shape for key, shape in NORMS.items() if key.endswith("bias")},
    "LayerNorm tuning": NORMS,
}
ELSEWHERE: dict[str, Shapes] = {"BitFit": {"head.own.bias": (3,)}}
every_row = pytest.mark.parametrize("method", IN_A_BLOCK)


def fresh() -> dict[str, Any]:
    """What the page has defined where its table stands."""
    namespace: dict[str, Any] = {"__name__": "presets"}
    torch.manual_seed(0)
    exec(blocks(PAGE)[0][2], namespace)
    return namespace


def calls_of(method: str) -> list[str]:
    (calls,) = [calls for row, calls in ROWS.items() if row.startswith(f"{method} ")]
    return calls


def adapted(method: str) -> dict[str, Any]:
    namespace = fresh()
    for call in calls_of(method):
        exec(call, namespace)
    return namespace


def tokens() -> Tensor:
    return torch.arange(14).view(2, 7) % 50


def trained(model: Any) -> Shapes:
    names = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    return {re.sub(r"\.adapters\.[^.]+", "", name): shape for name, shape in names.items()}


def test_every_row_is_tested():
    found = [next(method for method in IN_A_BLOCK if row.startswith(f"{method} ")) for row in ROWS]
    assert sorted(found) == sorted(IN_A_BLOCK)


@every_row
def test_a_preset_trains_what_its_paper_trains(method):
    expected = {f"blocks.{n}.{key}": shape for n in range(LAYERS) for key, shape in IN_A_BLOCK[method].items()}
    assert trained(adapted(method)["model"]) == expected | ELSEWHERE.get(method, {})


@every_row
def test_a_preset_starts_from_the_base_and_learns(method):
    model, base = adapted(method)["model"], fresh()["model"]
    if method not in ("prefix tuning", "MAM"):  # an ungated prefix acts from the start
        assert torch.allclose(model(tokens()), base(tokens()), rtol=0, atol=1e-5)
    whole = snapshot(model)
    assert peftlib.verify(model, tokens()).problems == ()
    assert changes(whole, model) == []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(peftlib.parameters(model), lr=0.01)
    for _ in range(2):
        model(tokens()).square().sum().backward()
        optimizer.step()
    moving = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moving == {name for name, p in model.named_parameters() if p.requires_grad}


@every_row
def test_a_preset_is_saved_and_loaded_as_one_adapter(method, tmp_path):
    model, other = adapted(method)["model"], fresh()["model"]
    moved(model)
    peftlib.save(model, tmp_path / "adapter.safetensors")
    peftlib.load(other, tmp_path / "adapter.safetensors")
    assert torch.equal(model(tokens()), other(tokens()))


def test_lora_plus_has_two_rates():
    namespace = adapted("LoRA+")
    groups = {group["name"]: group for group in namespace["optimizer"].param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == {"rest": 1e-4, "lora_B": 16e-4}
    by_group = {name: {id(p) for p in group["params"]} for name, group in groups.items()}
    own = dict(namespace["model"].named_parameters())
    for name, p in own.items():
        assert (id(p) in by_group["lora_B"]) == name.endswith("lora_B")
        assert (id(p) in by_group["rest"]) == name.endswith("lora_A")


def test_lora_plus_takes_one_name_and_what_trains():
    model = fresh()["model"]
    peftlib.inject(model, "q_proj", peftlib.DoRA, rank=2, name="one")
    peftlib.inject(model, "v_proj", peftlib.LoRA, rank=2, name="two")
    rest, faster = peftlib.lora_plus_groups(model, 0.1, name="one")
    assert (len(rest["params"]), len(faster["params"])) == (2 * LAYERS, LAYERS)
    for _, _, part in peftlib.adapters(model, "two"):
        part.lora_A.requires_grad_(False)
    (faster,) = peftlib.lora_plus_groups(model, 0.1, name="two")
    assert faster["name"] == "lora_B"
    assert faster["lr"] == 0.1 * 16


def test_lora_plus_refuses_what_would_train_nothing_faster():
    model = fresh()["model"]
    with refused(model, "Transformer", "peftlib.inject(model, ...)"):
        peftlib.lora_plus_groups(model, 0.1)
    peftlib.inject(model, "head", peftlib.Full)
    with refused(model, "Transformer", "lora_B", "LoRA"):
        peftlib.lora_plus_groups(model, 0.1)
    for wrong in ({"lr": 0.0}, {"lr": 0.1, "ratio": float("nan")}, {"lr": -1.0}):
        with refused(model, "lora_plus_groups"):
            peftlib.lora_plus_groups(model, **wrong)


def test_a_frozen_A_keeps_no_input_for_backward():
    """LoRA-FA's point: beside the base, the pair keeps [tokens, rank] alone."""
    model = torch.nn.Sequential(torch.nn.Linear(512, 512))
    peftlib.inject(model, "0", peftlib.LoRA, rank=4)
    x, kept = torch.randn(256, 512), []
    next(part for _, _, part in peftlib.adapters(model)).lora_A.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    assert x.data_ptr() not in [t.data_ptr() for t in kept]


def test_the_page_says_what_has_to_be_said_again(tmp_path):
    """After LoRA-FA's file is loaded, and after train_only, A trains again: the page's remark."""
    model, other = adapted("LoRA-FA")["model"], fresh()["model"]
    peftlib.save(model, tmp_path / "adapter.safetensors")
    peftlib.load(other, tmp_path / "adapter.safetensors")
    assert trained(other) == trained(adapted("LoRA")["model"]) | trained(other)
    peftlib.train_only(model, "default")
    assert any(name.endswith("lora_A") for name in trained(model))
    assert "after `load` or `train_only`" in PAGE.read_text()

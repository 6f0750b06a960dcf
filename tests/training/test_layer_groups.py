"""Layer groups: every trainable parameter in exactly one, from input to output; and the learning rates by depth."""

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import peftlib
from peftlib import Full, LoRA, SlantedTriangular, discriminative_lr, layer_groups
from support.helpers import chain, linears, network
from support.refusals import refused

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50}


def names(groups: Any) -> list[str]:
    return [group.name for group in groups]


def require_each_once(model: nn.Module, groups: Any) -> None:
    found = [(name, p) for group in groups for name, p in group.parameters.items()]
    expected = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(found) == len(expected)
    assert all(expected[name] is p for name, p in found)


def hugging(model: str, config: str, **keywords: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = getattr(transformers, config)(**keywords)
        return getattr(transformers, model)(made)


MODELS = {
    "BERT": (
        lambda: hugging("BertForSequenceClassification", "BertConfig", **SMALL),
        ["bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1", "above bert.encoder.layer.1"],
    ),
    "GPT-2": (
        lambda: hugging("GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=2, n_head=2, vocab_size=50),
        ["below transformer.h.0", "transformer.h.0", "transformer.h.1", "transformer.ln_f"],
    ),
    "Llama": (
        lambda: hugging("LlamaForCausalLM", "LlamaConfig", **SMALL),
        ["model.embed_tokens", "model.layers.0", "model.layers.1", "above model.layers.1"],
    ),
    "a mixture of experts": (
        lambda: hugging("MixtralForCausalLM", "MixtralConfig", **SMALL, num_key_value_heads=2),
        ["model.embed_tokens", "model.layers.0", "model.layers.1", "above model.layers.1"],
    ),
    "T5, an encoder and a decoder": (
        lambda: hugging(
            "T5ForConditionalGeneration",
            "T5Config",
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=2,
            num_heads=2,
            vocab_size=50,
        ),
        [
            "shared",
            *("encoder.block.0", "encoder.block.1", "encoder.final_layer_norm"),
            *("decoder.block.0", "decoder.block.1", "decoder.final_layer_norm"),
        ],
    ),
    "ViT": (
        lambda: hugging(
            "ViTForImageClassification", "ViTConfig", **{**SMALL, "vocab_size": 1}, image_size=8, patch_size=4
        ),
        ["vit.embeddings", "vit.layers.0", "vit.layers.1", "above vit.layers.1"],
    ),
    "ResNet": (
        lambda: hugging(
            "ResNetForImageClassification", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2]
        ),
        ["resnet.embedder.embedder", "resnet.encoder.stages.0", "resnet.encoder.stages.1", "classifier.1"],
    ),
    "a chain of layers": (lambda: linears(3), ["0", "1", "2"]),
    "with activations between": (lambda: chain(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()), ["0", "2"]),
    "the network of these tests": (network, ["embedding", "layers.0", "layers.1", "head"]),
}


@pytest.mark.parametrize(("make", "expected"), MODELS.values(), ids=MODELS)
def test_stacks_are_found(make, expected):
    model = make()
    groups = layer_groups(model)
    assert names(groups) == expected
    require_each_once(model, groups)
    for group in groups:
        inside = [name for name, m in group.statistics.items() if m is model.get_submodule(name)]
        assert len(inside) == len(group.statistics)
    statistics = [name for name, m in model.named_modules() if getattr(m, "running_mean", None) is not None]
    assert [name for group in groups for name in group.statistics] == statistics


def test_a_stack_of_blocks_goes_before_a_stack_of_layers():
    model: Any = nn.ModuleDict({"blocks": nn.ModuleList(linears(2) for _ in range(3)), "heads": linears(2)})
    assert names(layer_groups(model)) == [f"blocks.{at}" for at in range(3)] + ["heads"]


@pytest.mark.parametrize("kind", [LoRA, Full])
def test_adapters_belong_to_their_block_and_change_no_group(kind):
    model = network(layers=3)
    peftlib.inject(model, ["layers.1.q_proj", "embedding", "head"], kind)
    groups = layer_groups(model)
    assert names(groups) == ["embedding", "layers.1", "head"], "a group that trains nothing is left out"
    require_each_once(model, groups)
    model.requires_grad_(True)
    groups = layer_groups(model)
    assert names(groups) == ["embedding", "layers.0", "layers.1", "layers.2", "head"]
    require_each_once(model, groups)
    assert any(".adapters." in name for name in groups[2].parameters)


def test_a_head_of_two_adapted_layers_is_no_stack_of_blocks():
    model: Any = nn.ModuleDict({"blocks": nn.ModuleList(linears(2) for _ in range(2)), "head": linears(2)})
    peftlib.inject(model, "head.*", LoRA, rank=2, freeze=False)
    assert names(layer_groups(model)) == ["blocks.0", "blocks.1", "head"]


def test_a_shared_parameter_is_in_the_group_of_its_first_name():
    model = network()
    model.head = nn.Linear(8, 11, bias=False)
    model.head.weight = model.embedding.weight
    groups = layer_groups(model)
    assert names(groups) == ["embedding", "layers.0", "layers.1"]
    require_each_once(model, groups)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, ["embedding … head"]),
        (2, ["embedding … layers.1", "layers.2 … head"]),
        (3, ["embedding … layers.0", "layers.1 … layers.2", "head"]),
        (5, ["embedding", "layers.0", "layers.1", "layers.2", "head"]),
    ],
)
def test_a_count_joins_neighbours(count, expected):
    model = network(layers=3)
    groups = layer_groups(model, by=count)
    assert names(groups) == expected
    require_each_once(model, groups)


def test_targets_name_modules_types_and_parameters():
    model = network()
    groups = layer_groups(model, by=["embedding", ["layers.0", "layers.1.*_proj"], "layers.1.norm.*", "head"])
    assert [sorted({name.rpartition(".")[0] for name in group.parameters}) for group in groups] == [
        ["embedding"],
        ["layers.0.norm", "layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj"],
        ["layers.1.norm"],
        ["head"],
    ]
    require_each_once(model, groups)
    assert names(layer_groups(model, by=[nn.Embedding, nn.LayerNorm, nn.Linear])) == [
        "Embedding",
        "LayerNorm",
        "Linear",
    ]


def test_targets_may_leave_frozen_parameters_out():
    model = network()
    model.embedding.requires_grad_(False)
    require_each_once(model, layer_groups(model, by=["layers", "head"]))


def test_a_depth_sorts_and_joins():
    model = network()
    groups = layer_groups(model, by=lambda name, p: {"embedding": 9, "layers": 1, "head": 1}[name.split(".")[0]])
    assert names(groups) == ["depth 1", "depth 9"]
    assert list(groups[1].parameters) == ["embedding.weight"]
    above = layer_groups(model, by=lambda name, p: name.startswith("head"))
    assert [list(group.parameters)[-1] for group in above] == ["layers.1.v_proj.weight", "head.bias"]


def test_statistics_without_parameters_go_with_what_comes_before():
    model = chain(*(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False)) for _ in range(2)))
    assert [list(group.statistics) for group in layer_groups(model)] == [["0.1"], ["1.1"]]


REFUSALS = {
    "no stack": (
        lambda: layer_groups(chain(nn.Linear(4, 4), nn.LayerNorm(4))),
        ("layer_groups", "Sequential", "by="),
    ),
    "a stack of two types": (
        lambda: layer_groups(nn.ModuleList([network().layers[0], nn.TransformerEncoderLayer(4, 2, 4)])),
        ("the root", "Layer", "TransformerEncoderLayer", "by="),
    ),
    "nothing that trains": (
        lambda: layer_groups(network().requires_grad_(False)),
        ("layer_groups", "Network", "requires_grad"),
    ),
    "what is left over": (
        lambda: layer_groups(network(), by=["embedding", "layers"]),
        ("layer_groups", "head.weight", "head.bias", "requires_grad=False"),
    ),
    "much that is left over": (
        lambda: layer_groups(network(), by=["head"]),
        ("layer_groups", "embedding.weight", "7"),
    ),
    "one in two groups": (
        lambda: layer_groups(network(), by=["embedding", "layers", ["head", "layers.1.norm"]]),
        ("layers.1.norm.weight", "'layers'", "'head, layers.1.norm'"),
    ),
    "a target that is not there": (
        lambda: layer_groups(network(), by=["embeding", "layers", "head"]),
        ("targets", "'embeding'", "'embedding'"),
    ),
    "more groups than blocks": (
        lambda: layer_groups(network(), by=5),
        ("by=5", "4"),
    ),
    "a depth of none": (
        lambda: layer_groups(network(), by=lambda name, p: None),
        ("layer_groups", "None", "embedding.weight"),
    ),
    "no group for the rates": (lambda: discriminative_lr([], 0.1), ("discriminative_lr", "group")),
    "a rate of zero": (
        lambda: discriminative_lr(layer_groups(network()), 0.0),
        ("discriminative_lr", "lr=0.0"),
    ),
    "a decay of zero": (
        lambda: discriminative_lr(layer_groups(network()), 0.1, decay=0),
        ("discriminative_lr", "decay=0"),
    ),
    "a triangle without a rise": (
        lambda: SlantedTriangular(torch.optim.SGD(network().parameters()), total_steps=9),
        ("SlantedTriangular", "0.1", "9"),
    ),
    "a triangle upside down": (
        lambda: SlantedTriangular(torch.optim.SGD(network().parameters()), total_steps=90, ratio=0.5),
        ("SlantedTriangular", "ratio=0.5"),
    ),
}


@pytest.mark.parametrize(("act", "names"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(act, names):
    with refused(None, *names):
        act()


@pytest.mark.parametrize("by", ["layers", 1.5, True])
def test_a_wrong_argument_is_a_type_error(by):
    with pytest.raises(TypeError, match=r"^by: expected a number, a list of targets, or depth"):
        layer_groups(network(), by=by)


# ---- learning rates


def test_rates_fall_by_depth():
    groups = layer_groups(network(layers=3))
    found = discriminative_lr(groups, 0.1)
    assert [group["name"] for group in found] == names(groups)
    assert [group["lr"] for group in found] == pytest.approx([0.1 / 2.6**4, 0.1 / 2.6**3, 0.1 / 2.6**2, 0.1 / 2.6, 0.1])
    for group, expected in zip(found, groups, strict=True):
        assert all(a is b for a, b in zip(group["params"], expected.parameters.values(), strict=True))
        assert set(group) == {"params", "lr", "name"}
    assert {group["lr"] for group in discriminative_lr(groups, 0.1, decay=1)} == {0.1}


def test_weight_decay_spares_norms_and_biases_if_asked():
    model = network()
    optimizer = torch.optim.AdamW(discriminative_lr(layer_groups(model), 0.1, weight_decay=0.3))
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        spared = name.endswith("bias") or ".norm." in name
        assert decay[p] == (0.0 if spared else 0.3), name
    titles = [group["name"] for group in optimizer.param_groups]
    assert len(set(titles)) == len(titles)
    assert "head, no weight decay" in titles


def test_a_parameter_may_have_a_factor_of_its_own():
    model = network()
    peftlib.inject(model, ["q_proj", "v_proj"], LoRA, rank=2)
    found = discriminative_lr(
        layer_groups(model), 0.1, decay=2, times=lambda name, p: 16 if name.endswith("lora_B") else 1
    )
    rates = {id(p): group["lr"] for group in found for p in group["params"]}
    for name, p in model.named_parameters():
        if ".adapters." in name:
            depth = 0 if name.startswith("layers.1") else 1
            assert rates[id(p)] == pytest.approx(0.1 / 2**depth * (16 if "lora_B" in name else 1)), name
    assert "layers.1, times 16" in [group["name"] for group in found]


def slanted(t: int, total: int, cut_frac: float, ratio: float) -> float:
    """Howard and Ruder's equation 3, as the paper writes it."""
    cut = int(total * cut_frac)
    p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / cut_frac - 1))
    return (1 + p * (ratio - 1)) / ratio


@pytest.mark.parametrize(("total", "cut_frac", "ratio"), [(100, 0.1, 32), (40, 0.5, 8), (30, 0.2, 1)])
def test_the_slanted_triangle_is_the_papers(total, cut_frac, ratio):
    def made() -> Any:
        parameters = [nn.Parameter(torch.ones(1)) for _ in range(2)]
        return torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(parameters, (0.4, 0.1), strict=True)])

    optimizer, twin = made(), made()
    scheduler = SlantedTriangular(optimizer, total, cut_frac, ratio)
    reference = LambdaLR(twin, lambda t: slanted(t, total, cut_frac, ratio))
    seen = []
    for _ in range(total + 1):
        seen.append(optimizer.param_groups[0]["lr"])
        assert scheduler.get_last_lr() == pytest.approx(reference.get_last_lr(), rel=1e-12, abs=1e-15)
        for each in (optimizer, scheduler, twin, reference):
            each.step()
    assert max(seen) == pytest.approx(0.4)
    assert seen.index(max(seen)) == (int(total * cut_frac) if ratio > 1 else 0)
    assert seen[0] == pytest.approx(0.4 / ratio)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(0.4 / ratio), "after the last step it stays"


def test_a_triangle_that_is_loaded_goes_on():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.4)
    scheduler = SlantedTriangular(optimizer, 50)
    rates, state = [], ({}, {})
    for _ in range(40):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr())
        if len(rates) == 17:
            state = optimizer.state_dict(), scheduler.state_dict()
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.4)
    resumed = SlantedTriangular(other, 50)
    other.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    for expected in rates[17:]:
        other.step()
        resumed.step()
        assert resumed.get_last_lr() == expected

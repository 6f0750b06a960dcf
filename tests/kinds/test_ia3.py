"""IA3: whose features are scaled, alike live and merged, and what is refused."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import peftlib
from peftlib import IA3
from support.hosts import Around
from support.refusals import refused


def factor_of(model: nn.Module) -> Any:
    ((_, _, adapter),) = peftlib.adapters(model)
    return adapter.factor


def around(host: nn.Module, **config: Any) -> nn.Module:
    """With factors around one, of either sign."""
    model = Around(host)
    peftlib.inject(model, "host", IA3, **config)
    with torch.no_grad():
        factor_of(model).add_(torch.randn_like(factor_of(model)))
    return model


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-12


# The equation

HOSTS: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "linear": (lambda: nn.Linear(6, 8), (2, 5, 6), -1),
    "hf-conv1d": (lambda: Conv1D(8, 6), (2, 5, 6), -1),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1, groups=2), (2, 6, 9), 1),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, stride=2), (2, 6, 9, 7), 1),
    "conv3d": (lambda: nn.Conv3d(6, 8, 2, bias=False), (2, 6, 3, 4, 3), 1),
    "transposed1d": (lambda: nn.ConvTranspose1d(6, 8, 3, stride=2), (2, 6, 5), 1),
    "transposed2d-grouped": (lambda: nn.ConvTranspose2d(6, 8, 3, groups=2), (2, 6, 4, 4), 1),
}


@pytest.mark.parametrize("on", ["output", "input"])
@pytest.mark.parametrize(("make", "shape", "axis"), HOSTS.values(), ids=HOSTS)
def test_each_feature_is_scaled_live_and_merged(make, shape, axis, on):
    host, x = make().double(), torch.randn(shape, dtype=torch.float64)
    bare = make().double()
    bare.load_state_dict(host.state_dict())
    model = around(host, on=on)

    def scaled(tensor: Tensor) -> Tensor:
        return (tensor.movedim(axis, -1) * factor_of(model)).movedim(-1, axis)

    expected = scaled(bare(x)) if on == "output" else bare(scaled(x))
    assert_close(model(x), expected)
    with peftlib.merged(model), torch.no_grad():
        assert_close(model(x), expected)


@pytest.mark.parametrize("name", ["input", "x"])
def test_an_input_given_by_its_name_is_scaled_too(name):
    host, x = (nn.Linear(6, 8), torch.randn(2, 6)) if name == "input" else (Conv1D(8, 6), torch.randn(2, 6))
    model = around(host, on="input")
    assert torch.equal(model.host(**{name: x}), model(x))


NORMS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "layer-norm": (lambda: nn.LayerNorm((3, 6)), (2, 3, 6)),
    "rms-norm": (lambda: nn.RMSNorm(6), (2, 3, 6)),
    "group-norm": (lambda: nn.GroupNorm(2, 6), (2, 6, 5)),
    "batch-norm": (lambda: nn.BatchNorm2d(6).eval(), (2, 6, 3, 4)),
    "embedding": (lambda: nn.Embedding(9, 6), ()),
    "bag": (lambda: nn.EmbeddingBag(9, 6), ()),
}


@pytest.mark.parametrize(("make", "shape"), NORMS.values(), ids=NORMS)
def test_norms_and_embeddings_are_scaled_live_and_merged(make, shape):
    host = make().double()
    x = torch.randn(shape, dtype=torch.float64) if shape else torch.tensor([[1, 2, 3], [0, 8, 1]])
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.copy_(torch.randn_like(parameter))
        before = host(x)
    model = around(host)
    factor = factor_of(model)
    by_channel = isinstance(host, (nn.GroupNorm, nn.BatchNorm2d))
    expected = (before.movedim(1, -1) * factor).movedim(-1, 1) if by_channel else before * factor
    assert_close(model(x), expected)
    with peftlib.merged(model), torch.no_grad():
        assert_close(model(x), expected)


@pytest.mark.parametrize("kdim", [None, 5])
def test_in_attention_keys_and_values_are_scaled(kdim):
    """softmax(q (l_k ⊙ k)ᵀ / √d) (l_v ⊙ v), by hand."""
    torch.manual_seed(1)
    host = nn.MultiheadAttention(6, 2, kdim=kdim, vdim=kdim, batch_first=True).double()
    nn.init.normal_(host.in_proj_bias)
    model = around(host)
    keys, values = factor_of(model).detach().chunk(2)
    query = torch.randn(2, 4, 6, dtype=torch.float64)
    context = torch.randn(2, 5, kdim or 6, dtype=torch.float64)
    packed = host.in_proj_weight
    projections = (
        packed.chunk(3) if packed is not None else (host.q_proj_weight, host.k_proj_weight, host.v_proj_weight)
    )
    q, k, v = (
        F.linear(x, weight, bias)
        for x, weight, bias in zip((query, context, context), projections, host.in_proj_bias.chunk(3), strict=True)
    )
    heads = [tensor.unflatten(-1, (2, 3)).transpose(1, 2) for tensor in (q, k * keys, v * values)]
    shares = (heads[0] @ heads[1].mT / 3**0.5).softmax(-1)
    expected = host.out_proj((shares @ heads[2]).transpose(1, 2).flatten(2))
    assert_close(model(query, context, context)[0], expected)
    with peftlib.merged(model), torch.no_grad():
        assert_close(model(query, context, context)[0], expected)


@pytest.mark.parametrize("first", ["lora", "ia3"])
def test_around_and_inside_lora_live_and_merged_agree(first):
    model, x = nn.Sequential(nn.Linear(6, 8)).double(), torch.randn(5, 6, dtype=torch.float64)
    put = {
        "lora": lambda: peftlib.inject(model, "0", peftlib.LoRA, rank=2, name="lora"),
        "ia3": lambda: peftlib.inject(model, "0", IA3, name="ia3"),
    }
    for name in (first, *(put.keys() - {first})):
        put[name]()
    with torch.no_grad():
        for parameter in peftlib.parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    live = model(x)
    with peftlib.merged(model), torch.no_grad():
        assert_close(model(x), live)


# Precision, memory, devices


def test_beside_half_precision_a_small_change_of_the_factor_is_not_lost():
    """bfloat16 has no number between 1 and 1.0078: a factor rounded to it would be 1. Rounded once, in the product,
    1.003 moves those outputs that it carries over half a unit: about four in ten."""
    host = nn.Linear(16, 16).bfloat16()
    x = torch.randn(200, 16).bfloat16()
    before = host(x)
    model = around(host)
    with torch.no_grad():
        factor_of(model).fill_(1.003)
    after = model(x)
    assert (factor_of(model).dtype, after.dtype) == (torch.float32, torch.bfloat16)
    assert 0.2 < (after != before).float().mean() < 0.8
    assert torch.equal(after, (before.float() * 1.003).bfloat16())


def test_backward_keeps_the_features_and_no_wider_copy_of_them():
    model = around(nn.Linear(16, 16, bias=False).bfloat16())
    x, kept = torch.randn(200, 16).bfloat16(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(x)
    assert sum(tensor.numel() * tensor.element_size() for tensor in kept) <= 200 * 16 * 2 + 16 * 4


def test_reset_parameters_makes_it_one():
    with torch.device("meta"):
        model = Around(nn.Linear(5, 4))
    peftlib.inject(model, "host", IA3)
    model.to_empty(device="cpu")
    ((_, _, adapter),) = peftlib.adapters(model)
    adapter.reset_parameters()
    assert torch.equal(adapter.factor, torch.ones(4))


def test_the_recipe_of_the_paper_is_three_calls():
    """l_k and l_v on keys and values, l_ff on the inputs of the second feed-forward layer: d + d + d_ff numbers."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        before = layer(x)
    peftlib.inject(layer, "self_attn", IA3)
    peftlib.inject(layer, "linear2", IA3, on="input")
    assert sum(p.numel() for p in peftlib.parameters(layer)) == 8 + 8 + 12
    assert torch.allclose(layer(x), before, atol=1e-6)
    with torch.no_grad():
        for parameter in peftlib.parameters(layer):
            parameter.add_(torch.randn_like(parameter))
        live = layer(x)
    with peftlib.merged(layer), torch.no_grad():
        assert torch.allclose(layer(x), live, atol=1e-5)


# Refusals

REFUSED: dict[str, tuple[nn.Module, dict[str, Any], tuple[str, ...]]] = {
    "another side": (nn.Linear(4, 6), {"on": "both"}, ("on='both'", "'output'", "'input'")),
    "a recurrent host": (
        nn.LSTM(4, 6),
        {},
        ("LSTM", "Linear"),
    ),
    "the input of a norm": (
        nn.LayerNorm(6),
        {"on": "input"},
        ('on="input"', "LayerNorm", 'on="output"'),
    ),
    "a norm without weights": (
        nn.LayerNorm(6, elementwise_affine=False),
        {},
        ("LayerNorm", "affine"),
    ),
    "a dtype that is none": (
        nn.Linear(4, 6),
        {"dtype": "int8"},
        ("dtype", "'int8'"),
    ),
}


@pytest.mark.parametrize(("host", "config", "names"), REFUSED.values(), ids=REFUSED)
def test_hosts_and_configurations_that_are_refused(host, config, names):
    with refused(None, "host", "IA3", *names):
        around(host, **config)


def test_a_child_that_attention_reads_is_scaled_from_the_attention(tmp_path):
    torch.manual_seed(0)
    base = Around(nn.MultiheadAttention(6, 2, batch_first=True)).double()
    nn.init.normal_(base.host.out_proj.bias)
    model, x = copy.deepcopy(base), torch.randn(2, 4, 6, dtype=torch.float64)
    assert peftlib.inject(model, "out_proj", IA3) == ["host"]
    factor = factor_of(model)
    nn.init.normal_(factor)
    expected = base(x, x, x)[0] * factor
    assert_close(model(x, x, x)[0], expected)
    model(x, x, x)[0].sum().backward()
    assert_close(factor.grad, base(x, x, x)[0].sum((0, 1)))
    peftlib.save(model, tmp_path / "factor.safetensors")
    with peftlib.merged(model), torch.no_grad():
        assert_close(model(x, x, x)[0], expected)
    peftlib.load(base, tmp_path / "factor.safetensors")
    assert torch.equal(base(x, x, x)[0], model(x, x, x)[0])


def test_a_packed_weight_is_scaled_live_and_refused_at_merge():
    class Packed(nn.Linear):
        """As quantised layers are: whole numbers in the place of the weight, and a forward of its own."""

        def __init__(self) -> None:
            super().__init__(4, 6, bias=False)
            self.weight = nn.Parameter(torch.ones(6, 4, dtype=torch.int8), requires_grad=False)

        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.weight.to(input.dtype))

    model, x = around(Packed()), torch.randn(3, 4)
    assert torch.allclose(model(x), x.sum(1, keepdim=True) * factor_of(model))
    with refused(model, "host.weight", "torch.int8"):
        peftlib.merge(model)

"""Bottleneck on hosts of every form: where its sizes come from, what it changes in an output, and what it refuses."""

import collections
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.pytorch_utils import Conv1D

import peftlib
from peftlib import Bottleneck
from support import reference
from support.helpers import moved
from support.hosts import Around, without_fast_path
from support.refusals import refused


def adapter_of(model: nn.Module) -> Any:
    ((_, _, adapter),) = peftlib.adapters(model)
    return adapter


def around(host: nn.Module, move: bool = True, **config: Any) -> nn.Module:
    model = Around(host)
    peftlib.inject(model, "host", Bottleneck, **{"width": 3, **config})
    return moved(model) if move else model


# Where the size comes from


class Named(nn.Module):
    """A block that says how wide it is by an attribute, or by a configuration of its own or of a child."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Config:
    hidden_size = 6


class OtherNorm(nn.Module):
    """A norm of another library: a vector of weights is all that is known of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


LAYER = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)
SIZES: dict[str, tuple[nn.Module, tuple[int | None, int, int]]] = {
    "linear": (nn.Linear(4, 6), (4, 6, -1)),
    "bilinear": (nn.Bilinear(4, 5, 6), (4, 6, -1)),
    "hf-conv1d": (Conv1D(6, 4), (4, 6, -1)),
    "conv1d": (nn.Conv1d(4, 6, 1), (4, 6, -2)),
    "conv3d": (nn.Conv3d(4, 6, 1), (4, 6, -4)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, 1), (4, 6, -3)),
    "batch-norm": (nn.BatchNorm2d(6), (6, 6, 1)),
    "group-norm": (nn.GroupNorm(2, 6), (6, 6, 1)),
    "instance-norm": (nn.InstanceNorm2d(6), (6, 6, -3)),
    "layer-norm": (nn.LayerNorm((3, 6)), (6, 6, -1)),
    "rms-norm": (nn.RMSNorm(6), (6, 6, -1)),
    "attention": (nn.MultiheadAttention(6, 2), (6, 6, -1)),
    "encoder-layer": (LAYER, (6, 6, -1)),
    "encoder": (nn.TransformerEncoder(LAYER, 1), (6, 6, -1)),
    "decoder-layer": (nn.TransformerDecoderLayer(6, 2, 12), (6, 6, -1)),
    "lstm": (nn.LSTM(4, 3, bidirectional=True), (4, 6, -1)),
    "lstm-projected": (nn.LSTM(4, 7, proj_size=6), (4, 6, -1)),
    "gru-cell": (nn.GRUCell(4, 6), (4, 6, -1)),
    "sequential": (nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.GELU()), (4, 6, -1)),
    "sequential-conv": (nn.Sequential(nn.Conv2d(4, 6, 1), nn.MaxPool2d(1)), (4, 6, -3)),
    "attribute": (Named(embed_dim=6), (6, 6, -1)),
    "config": (Named(config=Config()), (6, 6, -1)),
    "config-inside": (Named(attention=Named(config=Config())), (6, 6, -1)),
    "other-norm": (OtherNorm(), (6, 6, -1)),
}


def test_the_size_of_a_module_does_not_come_from_an_adapter_that_is_there_already():
    """A module of a class that is not known, whose own vector says how wide it is."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    model = nn.Sequential(Scaled())
    for name in ("first", "second"):
        peftlib.inject(model, "0", Bottleneck, width=3, name=name)
    assert [part.get_parameter("up_weight").shape for *_, part in peftlib.adapters(model)] == [(4, 3), (4, 3)]
    assert model(torch.ones(2, 4)).shape == (2, 4)


@pytest.mark.parametrize(("host", "sizes"), SIZES.values(), ids=SIZES)
def test_the_size_comes_from_the_host(host, sizes):
    inputs, outputs, axis = sizes
    for position, reads in (("after", outputs), ("parallel", inputs)):
        adapter = Bottleneck(host, width=3, position=position)
        assert adapter.down_weight.shape == (3, reads)
        assert adapter.up_weight.shape == (outputs, 3)
        assert adapter.features[2] == axis


@pytest.mark.parametrize(("size", "reduction", "width"), [(64, 16, 4), (8, 16, 1), (50, 3, 16), (10, 2.5, 4)])
def test_the_width_is_the_size_over_the_reduction(size, reduction, width):
    assert Bottleneck(nn.Linear(3, size), reduction=reduction).down_weight.shape == (width, size)
    assert Bottleneck(nn.Linear(3, size), reduction=reduction, width=7).down_weight.shape == (7, size)


def test_dim_and_axis_serve_where_the_host_does_not_say():
    block = nn.Sequential(collections.OrderedDict(conv=nn.Conv2d(3, 5, 3, padding=1), unknown=Named()))
    model = Around(block)
    peftlib.inject(model, "host", Bottleneck, dim=5, axis=1, width=2)
    moved(model)
    x = torch.randn(2, 3, 4, 4)
    y = block.unknown(block.conv(x))
    own = dict(adapter_of(model).named_parameters())
    expected = reference.bottleneck(adapter_of(model).config, own, y, x, 1)
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_after_a_convolution_the_result_is_laid_out_as_before():
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 4, 5).contiguous(memory_format=layout)
        host = nn.Conv2d(3, 8, 1).to(memory_format=layout)
        before = host(x)
        assert around(host, move=False)(x).stride() == before.stride()


# What of an output is changed


class Pair(NamedTuple):
    states: Tensor
    weights: Tensor


class Gives(nn.Linear):
    """A linear layer that returns its result inside something."""

    def __init__(self, wrap: Any) -> None:
        super().__init__(4, 6)
        self.wrap = wrap

    def forward(self, input: Tensor) -> Any:
        return self.wrap(super().forward(input))


REST = torch.randn(2)
WRAPS: dict[str, tuple[Any, Any]] = {
    "tensor": (lambda y: y, lambda out: (out,)),
    "tuple": (lambda y: (y, REST), tuple),
    "list": (lambda y: [y, REST], tuple),
    "named tuple": (lambda y: Pair(y, REST), tuple),
    "tuple in a tuple": (lambda y: ((y, REST), REST), lambda out: (*out[0], out[1])),
    "dict": (lambda y: {"weights": None, "states": y, "rest": REST}, lambda out: (out["states"], out["rest"])),
    "dict by name": (
        lambda y: {"rest": REST, "last_hidden_state": y},
        lambda out: (out["last_hidden_state"], out["rest"]),
    ),
    "ordered dict": (lambda y: collections.OrderedDict(y=y, rest=REST), lambda out: tuple(out.values())),
    "model output": (
        lambda y: BaseModelOutputWithPast(last_hidden_state=y, hidden_states=(REST,)),
        lambda out: (out.last_hidden_state, *out.hidden_states),
    ),
}


@pytest.mark.parametrize("position", ["after", "parallel"])
@pytest.mark.parametrize(("wrap", "unwrap"), WRAPS.values(), ids=WRAPS)
def test_the_hidden_states_change_and_the_rest_passes_through(wrap, unwrap, position):
    host = Gives(wrap)
    x = torch.randn(5, 4)
    y = nn.Linear.forward(host, x)
    model = around(host, position=position)
    adapter, output = adapter_of(model), model(x)
    found, *rest = unwrap(output)
    expected = reference.bottleneck(adapter.config, dict(adapter.named_parameters()), y, x, -1)
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, y, atol=1e-2)
    assert all(tensor is REST for tensor in rest)
    assert type(output) is type(wrap(y))


def test_a_model_output_stays_one_under_every_name():
    output = around(Gives(WRAPS["model output"][0]))(torch.randn(5, 4))
    assert output[0] is output["last_hidden_state"] is output.last_hidden_state
    assert list(output) == ["last_hidden_state", "hidden_states"]


@pytest.mark.parametrize("name", ["tensor", "tuple", "dict", "model output"])
def test_compiled_it_is_one_graph(name):
    model, (_, unwrap) = around(Gives(WRAPS[name][0])), WRAPS[name]
    x = torch.randn(5, 4)
    try:
        found = unwrap(torch.compile(model, fullgraph=True, backend="aot_eager")(x))
    finally:
        torch._dynamo.reset()
    assert torch.allclose(found[0], unwrap(model(x))[0], atol=1e-6)


def test_packed_sequences_are_adapted_step_by_step():
    lstm, lengths = nn.LSTM(4, 5, batch_first=True), torch.tensor([6, 3])
    x = torch.randn(2, 6, 4)
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
    model = around(lstm)
    found, _ = nn.utils.rnn.pad_packed_sequence(model(packed)[0], batch_first=True)
    expected = model(x)[0]
    assert torch.allclose(found[0], expected[0], atol=1e-6)
    assert torch.allclose(found[1, :3], expected[1, :3], atol=1e-6)


class Block(nn.Module):
    """As transformers' attention is called: with keywords, of which the first is no matter of order."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.embed_dim = 6

    def forward(self, hidden_states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, None]:
        return self.linear(hidden_states) * (1.0 if mask is None else mask), None


def test_in_parallel_it_reads_the_first_argument_by_position_or_by_name():
    block, x, mask = Block(), torch.randn(5, 6), torch.rand(5, 1)
    y = block(x, mask)[0]
    model = around(block, position="parallel")
    adapter = adapter_of(model)
    expected = reference.bottleneck(adapter.config, dict(adapter.named_parameters()), y, x, -1)
    assert torch.allclose(model(x, mask)[0], expected, atol=1e-6)
    assert torch.allclose(model(mask=mask, hidden_states=x)[0], expected, atol=1e-6)


# The equation's switches


def test_without_the_residual_the_host_gives_only_what_the_bottleneck_gives():
    model = around(nn.Linear(4, 6), residual=False, scale=0.5, move=False)
    x = torch.randn(5, 4)
    adapter = adapter_of(model)
    with peftlib.activate(model):
        y = model(x)
    expected = reference.bottleneck(adapter.config, dict(adapter.named_parameters()), y, x, -1) - y
    assert torch.allclose(model(x), expected, atol=1e-6)
    assert model(x).abs().max() > 0.01


SETTINGS = [
    {"norm": norm, "position": position, "activation": activation, "scale": scale}
    for norm in ("none", "before", "after")
    for position in ("after", "parallel")
    for activation, scale in (("gelu", "learned"), ("relu", 4.0), ("identity", 0.1))
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "-".join(map(str, setting.values())))
def test_as_inserted_it_changes_nothing_and_everything_in_it_can_learn(setting):
    torch.manual_seed(3)
    model = around(nn.Linear(6, 8), move=False, **setting)
    x = torch.randn(40, 6)
    with peftlib.activate(model):
        before = model(x)
    assert torch.equal(model(x), before)
    assert peftlib.verify(model, x).problems == ()
    optimizer = torch.optim.SGD(list(peftlib.parameters(model)), lr=0.1)
    moves = {name: p.detach().clone() for name, p in adapter_of(model).named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(moves[name], p) for name, p in adapter_of(model).named_parameters())


def test_a_norm_after_does_not_jump_at_the_first_step():
    """LayerNorm of a small u has the size of 1: with `up` at zero and the norm's weight at one, a step of 1e-3 in `up`
    would move the output by about 1; here a step of 1e-3 anywhere moves it by about 1e-3."""
    model = around(nn.Linear(6, 8), move=False, norm="after")
    x = torch.randn(40, 6)
    before = model(x)
    with torch.no_grad():
        for parameter in peftlib.parameters(model):
            parameter.add_(1e-3 * torch.randn_like(parameter).sign())
    assert (model(x) - before).abs().max() < 0.01


# torch's fast paths


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # torch's own, of the base
@pytest.mark.parametrize("target", ["layers.0", "self_attn", "linear1", "linear2", "norm1", "dropout2", ""])
def test_the_fast_path_does_not_skip_it(target):
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation="gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    needs = {"dim": 8} if target == "dropout2" else {}
    x = torch.randn(3, 5, 8)
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    chosen = (lambda name, _: name == "") if target == "" else target
    peftlib.inject(model, chosen, Bottleneck, width=3, **needs)
    moved(model)
    for more in ({}, {"src_key_padding_mask": padding}):
        with torch.no_grad():
            fast = model(x, **more)
            with without_fast_path():
                slow = model(x, **more)
        seen = ~padding if more else slice(None)
        assert torch.allclose(fast[seen], slow[seen], atol=1e-5)
        with peftlib.activate(model), torch.no_grad():
            assert not torch.allclose(fast[seen], model(x, **more)[seen], atol=1e-2)


# Dtypes and devices


def test_beside_half_precision_the_parameters_are_float32_and_the_output_is_the_host_s():
    model = around(nn.Linear(6, 8).bfloat16())
    assert {p.dtype for p in peftlib.parameters(model)} == {torch.float32}
    assert model(torch.randn(2, 6).bfloat16()).dtype == torch.bfloat16
    model = around(nn.Linear(6, 8).bfloat16(), dtype="bfloat16")
    assert {p.dtype for p in peftlib.parameters(model)} == {torch.bfloat16}


def test_a_host_without_parameters_is_one_too():
    model = around(nn.GELU(), dim=6)
    assert model(torch.randn(2, 6)).shape == (2, 6)


def test_reset_parameters_draws_what_inject_would_have_drawn():
    with torch.device("meta"):
        model = Around(nn.Linear(5, 4))
    peftlib.inject(model, "host", Bottleneck, width=3, norm="after", scale="learned")
    assert all(p.is_meta for p in peftlib.parameters(model))
    model.to_empty(device="cpu")
    torch.manual_seed(7)
    adapter_of(model).reset_parameters()
    torch.manual_seed(7)
    twin = around(nn.Linear(5, 4), move=False, norm="after", scale="learned")
    torch.manual_seed(7)
    adapter_of(twin).reset_parameters()
    for one, other in zip(peftlib.parameters(model), peftlib.parameters(twin), strict=True):
        assert torch.equal(one, other)


# Refusals

CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "width": ({"width": 0}, ("width=0",)),
    "dim": ({"dim": 2.5}, ("dim=2.5",)),
    "reduction": ({"width": None, "reduction": 0.5}, ("reduction=0.5",)),
    "activation": ({"activation": "elu"}, ("activation='elu'", "'relu'")),
    "position": ({"position": "before"}, ("position='before'", "'after'", "'parallel'")),
    "norm": ({"norm": True}, ("norm=True", "'none'", "'before'", "'after'")),
    "scale": ({"scale": 0}, ("scale=0", '"learned"')),
    "scale by name": ({"scale": "big"}, ("scale='big'",)),
    "dropout": ({"dropout": 1.0}, ("dropout=1.0",)),
    "residual": ({"residual": 1}, ("residual=1",)),
    "no residual in parallel": (
        {"position": "parallel", "residual": False},
        ("residual=False", "parallel"),
    ),
}


@pytest.mark.parametrize(("config", "names"), CONFIGS.values(), ids=CONFIGS)
def test_configurations_out_of_range_are_refused(config, names):
    with refused(None, "host", "Bottleneck", *names):
        around(nn.Linear(4, 6), **config)


HOSTS: dict[str, tuple[nn.Module, dict[str, Any], tuple[str, ...]]] = {
    "of unknown size": (
        Named(),
        {},
        ("Named", "dim="),
    ),
    "without a floating-point input": (
        nn.Embedding(9, 6),
        {"position": "parallel"},
        ("Embedding", 'position="after"'),
    ),
    "with other places": (
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        {"position": "parallel"},
        ("Conv2d", 'position="after"'),
    ),
}


@pytest.mark.parametrize(("host", "config", "names"), HOSTS.values(), ids=HOSTS)
def test_hosts_that_it_cannot_adapt_are_refused(host, config, names):
    with refused(None, "host", "Bottleneck", *names):
        around(host, **config)


CALLS: dict[str, tuple[nn.Module, dict[str, Any], Any, tuple[str, ...]]] = {
    "another size": (
        Named(),
        {"dim": 5},
        torch.randn(2, 6),
        ("Bottleneck", "5", "[2, 6]", "dim=", "axis="),
    ),
    "other places": (
        nn.Sequential(nn.Conv1d(4, 4, 1), nn.MaxPool1d(2)),
        {"position": "parallel"},
        torch.randn(2, 4, 6),
        ("[2, 4, 6]", "[2, 4, 3]", 'position="after"'),
    ),
    "no hidden states": (Gives(lambda y: y.argmax()), {}, torch.randn(2, 4), ("torch.int64",)),
    "nothing": (
        Gives(lambda y: None),
        {},
        torch.randn(2, 4),
        ("NoneType",),
    ),
    "a dict without tensors": (
        Gives(lambda y: {"loss": 1.0}),
        {},
        torch.randn(2, 4),
        ("dict", "loss"),
    ),
    "whole numbers in parallel": (
        Named(embed_dim=6),
        {"position": "parallel"},
        torch.ones(2, 6, dtype=torch.int64),
        ("torch.int64",),
    ),
}


@pytest.mark.parametrize(("host", "config", "x", "names"), CALLS.values(), ids=CALLS)
def test_calls_that_do_not_fit_are_refused(host, config, x, names):
    model = around(host, **config)
    with refused(model, *names):
        model(x)


def test_a_host_that_is_called_without_its_first_argument_is_refused():
    class Defaults(Named):
        def forward(self, x: Tensor | None = None) -> Tensor:
            return torch.ones(2, 6)

    model = around(Defaults(embed_dim=6), position="parallel")
    with refused(model, "NoneType", "'x'", 'position="after"'):
        model()


def test_it_has_no_weight_form_and_merge_says_so():
    model = around(nn.Linear(4, 6))
    with refused(model, "host", "merge", '"default"', "Bottleneck"):
        peftlib.merge(model)

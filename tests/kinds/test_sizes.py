"""A bottleneck finds the size of what it adapts: by a call on the meta device, by the parts, by the configuration."""

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlib
from peftlib import AdapterError, Bottleneck
from support.refusals import refused


class Mlp(nn.Module):
    """As in timm: it has layers, and no word of how wide it is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Output(nn.Module):
    """As in BERT: it needs what it adds to."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(inputs, width), nn.LayerNorm(width)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.norm(self.dense(hidden_states) + input_tensor)


class ConvNeXt(nn.Module):
    """Channels first outside, and last inside, where all but one of its layers are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class Patches(nn.Module):
    """Of images of one size: channels first come in, tokens come out."""

    def __init__(self, width: int, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.projection = nn.Conv2d(3, width, 4, stride=4)
        self.first = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.shape[-1] != self.image_size:
            raise ValueError(f"an image of {self.image_size} pixels")
        tokens = self.projection(pixels).flatten(2).transpose(1, 2)
        return torch.cat([self.first.expand(len(tokens), -1, -1), tokens], 1)


class Stage(nn.Module):
    """As in Swin: of a model whose configuration knows the last stage alone, and called with more than it can guess."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(hidden_size=8 * width)
        self.block, self.reduction = Mlp(width), nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, sides: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        high, wide = sides
        return self.reduction(self.block(x)), (high, wide)


class Experts(nn.Module):
    """Its last layer weighs the experts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.shared_gate = nn.Linear(width, width), nn.Linear(width, 1)

    def forward(self, x: Tensor, mask: dict[str, Tensor]) -> Tensor:
        return self.down(x) * self.shared_gate(x).sigmoid() * mask["of tokens"]


IMAGE, TOKENS = torch.randn(2, 12, 6, 5), torch.randn(2, 5, 12)
HOSTS: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {
    "MLP": (Mlp(12), (TOKENS,)),
    "MLP of channels last": (Mlp(12), (torch.randn(2, 4, 3, 12),)),
    "scale": (Scale(12), (TOKENS,)),
    "output": (Output(12, 12), (TOKENS, TOKENS)),
    "output of another size": (Output(12, 20), (TOKENS, torch.randn(2, 5, 20))),
    "ConvNeXt": (ConvNeXt(12), (IMAGE,)),
    "patches": (Patches(12, 16), (torch.randn(2, 3, 16, 16),)),
    "stage": (Stage(12), (TOKENS, (5, 1))),
    "experts": (Experts(12), (TOKENS, {"of tokens": torch.ones(2, 5, 1)})),
    "Sequential": (nn.Sequential(nn.Conv2d(12, 6, 1), ConvNeXt(6), nn.ReLU()), (IMAGE,)),
}


@pytest.mark.parametrize(("host", "inputs"), HOSTS.values(), ids=HOSTS)
def test_a_bottleneck_finds_size_and_axis(host, inputs):
    model = nn.ModuleDict({"host": host})
    before = host(*inputs)
    peftlib.inject(model, "host", Bottleneck, width=3)
    _same(host(*inputs), before)
    for parameter in peftlib.parameters(model):
        nn.init.normal_(parameter)
    now = host(*inputs)
    now, before = (each[0] if isinstance(each, tuple) else each for each in (now, before))
    assert now.shape == before.shape
    assert not torch.allclose(now, before)
    peftlib.eject(model)


def _same(now: Any, before: Any) -> None:
    now, before = (each[0] if isinstance(each, tuple) else each for each in (now, before))
    assert torch.equal(now, before)


@pytest.mark.parametrize("name", ["MLP", "ConvNeXt", "scale"])
def test_in_parallel_too(name):
    host, inputs = HOSTS[name]
    model = nn.ModuleDict({"host": host})
    before = host(*inputs)
    peftlib.inject(model, "host", Bottleneck, width=3, position="parallel")
    assert torch.equal(host(*inputs), before)
    peftlib.eject(model)


def test_what_is_found_is_found_again_in_a_file(tmp_path):
    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"host": ConvNeXt(12)})

    model, other = made(), made()
    peftlib.inject(model, "host", Bottleneck, width=3)
    for parameter in peftlib.parameters(model):
        nn.init.normal_(parameter)
    peftlib.save(model, tmp_path / "a.safetensors")
    peftlib.load(other, tmp_path / "a.safetensors")
    assert torch.equal(other.get_submodule("host")(IMAGE), model.get_submodule("host")(IMAGE))


class Watched(Mlp):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.seen: list[torch.Size] = []
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x.shape)
        return super().forward(x + torch.randn(()))


def test_nobody_learns_of_the_call():
    """No hook of the user's, no buffer, no list, no random number."""
    host = Watched(12)
    called: list[Any] = []
    host.register_forward_hook(lambda *_: called.append(1))
    host.fc1.register_forward_pre_hook(lambda *_: called.append(2))
    model = nn.ModuleDict({"host": host})
    state = torch.get_rng_state()
    peftlib.plan(model, "host", Bottleneck, width=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert (host.seen, called, host.calls.item()) == ([], [], 0)
    assert host.training
    assert len(host._forward_hooks) == 1


class Silent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Uncopied(Mlp):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("this holds a socket")


def test_where_nothing_is_found_the_size_is_asked_for():
    model = nn.ModuleDict({"host": Silent(), "other": nn.Linear(2, 2)})
    with refused(model, "host", "Silent"):
        peftlib.inject(model, "host", Bottleneck)
    peftlib.inject(model, "host", Bottleneck, dim=12)


def test_a_module_that_cannot_be_copied_is_known_by_its_parts():
    model = nn.ModuleDict({"host": Uncopied(12)})
    peftlib.inject(model, "host", Bottleneck, width=3)
    assert model.get_submodule("host")(TOKENS).shape == TOKENS.shape


def test_a_size_that_is_wrong_all_the_same_is_refused_in_the_call():
    class Odd(Experts):
        def forward(self, x: Tensor, mask: dict[str, Tensor]) -> Tensor:
            return torch.cat([super().forward(x, mask)] * 2, -1)

    model = nn.ModuleDict({"host": Odd(12)})
    peftlib.inject(model, "host", Bottleneck, width=3)
    with pytest.raises(AdapterError, match="dim="):
        model.get_submodule("host")(TOKENS, {"of tokens": torch.ones(2, 5, 1)})


def test_blocks_of_transformers_say_how_wide_they_are():
    from transformers import BertConfig, GPT2Config, T5Config
    from transformers.models.bert.modeling_bert import BertOutput, BertSelfOutput
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
    from transformers.models.t5.modeling_t5 import T5DenseActDense

    bert = BertConfig(hidden_size=12, num_attention_heads=2, intermediate_size=20)
    t5 = T5Config(d_model=12, d_ff=20, num_heads=2, d_kv=6)
    hosts: list[tuple[nn.Module, tuple[Tensor, ...]]] = [
        (GPT2MLP(20, GPT2Config(n_embd=12, n_head=2)), (TOKENS,)),
        (BertSelfOutput(bert), (TOKENS, TOKENS)),
        (BertOutput(bert), (torch.randn(2, 5, 20), TOKENS)),
        (T5DenseActDense(t5), (TOKENS,)),
    ]
    for host, inputs in hosts:
        model = nn.ModuleDict({"host": host}).eval()
        before = host(*inputs)
        peftlib.inject(model, "host", Bottleneck, width=3)
        assert torch.equal(host(*inputs), before)


@pytest.mark.parametrize(("host", "inputs"), HOSTS.values(), ids=HOSTS)
def test_adapters_that_are_there_already_do_not_count(host, inputs):
    model = nn.ModuleDict({"host": host})
    peftlib.inject(model, "host", Bottleneck, width=3, norm="after", name="first")
    peftlib.inject(model, "host", Bottleneck, width=3, name="second")
    first, second = (adapter for _, _, adapter in peftlib.adapters(model))
    assert second.up_weight.shape == first.up_weight.shape
    host(*inputs)
    peftlib.eject(model)

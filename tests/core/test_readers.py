"""Children whose weights a module around them reads without calling them: adapted from there, once, or refused."""

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import peftlib
from peftlib import IA3, AdapterError, Bottleneck, DoRA, Full, LoRA
from support.helpers import Gain, base_bits, changes, snapshot

WIDTH = 6


def projected(layer: Any, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


class Base(nn.Module):
    """One child that is called, and what a subclass reads."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(WIDTH, WIDTH)
        self.fc: Any = nn.Linear(WIDTH, WIDTH)
        self.other: Any = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(self.read(x))

    def read(self, x: Tensor) -> Tensor:
        return projected(self.other, projected(self.fc, x))


class Passed(Base):
    def read(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight, self.fc.bias) @ self.other.weight


class Joined(Base):
    def read(self, x: Tensor) -> Tensor:
        weight = torch.cat([self.fc.weight, self.other.weight])
        return F.linear(x, weight, torch.cat((self.fc.bias, self.other.bias))).unflatten(-1, (2, WIDTH)).sum(-2)


class Named(Base):
    def read(self, x: Tensor) -> Tensor:
        fc, weight = self.fc, self.other.weight
        return F.linear(x, fc.weight) @ weight


class Chosen(Base):
    def read(self, x: Tensor) -> Tensor:
        weight = self.fc.weight if x.dim() < 9 else self.called.weight
        return F.linear(F.linear(x, weight), (y := self.other).weight) + y.bias


class Got(Base):
    @property
    def kernel(self) -> Tensor:
        return self.fc.weight

    def head(self) -> nn.Module:
        return self.other

    def read(self, x: Tensor) -> Tensor:
        return x @ self.kernel.T @ self.head().weight


class Inherited(Passed):
    def read(self, x: Tensor) -> Tensor:
        return super().read(x).tanh()


class Handed(Base):
    def read(self, x: Tensor) -> Tensor:
        def inner(layer: Any, y: Tensor) -> Tensor:
            return y @ layer.weight

        return inner(self.fc, self.step(layer=self.other, x=x))

    @staticmethod
    def step(x: Tensor, layer: Any) -> Tensor:
        return projected(x=x, layer=layer)


class Both(Base):
    """Called and read: one adapter acts in both places, once in each."""

    def read(self, x: Tensor) -> Tensor:
        return self.fc(x) @ self.fc.weight + self.other(x) @ self.other.weight.T


class Tied(Base):
    def read(self, x: Tensor) -> Tensor:
        return F.linear(self.fc(x).relu(), self.fc.weight.t()) + projected(self.other, x)


class Listed(Base):
    def __init__(self) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.by_name: Any = nn.ModuleDict({"a": nn.Linear(WIDTH, WIDTH)})

    def read(self, x: Tensor) -> Tensor:
        x = projected(self.other, F.linear(x, self.fc.weight)) @ self.by_name["a"].weight
        for index, layer in enumerate(self.layers):
            x = x + F.linear(x, layer.weight, layer.bias) / (index + 1)
        return x + sum(x @ one.weight for one in reversed(self.layers[:2]))


class Zipped(Base):
    def __init__(self) -> None:
        super().__init__()
        self.left: Any = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.right: Any = nn.ModuleDict({key: nn.Linear(WIDTH, WIDTH) for key in "ab"})

    def read(self, x: Tensor) -> Tensor:
        for one, (_, other) in zip(self.left, self.right.items(), strict=True):
            x = x @ one.weight + x @ getattr(other, "weight")  # noqa: B009
        return x @ torch.stack([layer.weight for layer in (self.fc, self.other)]).sum(0)


class Deep(Base):
    """The grandparent reads what the parent calls."""

    def __init__(self) -> None:
        super().__init__()
        self.block: Any = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))

    def read(self, x: Tensor) -> Tensor:
        return super().read(self.block(x) @ self.block[0].weight)


class Attending(nn.Linear):
    def attend(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Asked(Base):
    """The child's own method reads it, which is not its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = Attending(WIDTH, WIDTH)

    def read(self, x: Tensor) -> Tensor:
        return projected(self.other, self.fc.attend(x))


class Shared(Base):
    """One child under two parents: the first calls it, the second reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.first: Any = nn.Sequential(self.fc)
        self.second: Any = Passed()
        self.second.fc = self.fc

    def read(self, x: Tensor) -> Tensor:
        return projected(self.other, self.first(x)) + self.second(x)


NETS: list[type[Base]] = [
    Base, Passed, Joined, Named, Chosen, Got, Inherited, Handed, Both, Tied, Listed, Zipped, Deep, Asked, Shared
]  # fmt: skip
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (LoRA, {"rank": 2, "alpha": 6}),
    "dora": (DoRA, {"rank": 2}),
    "ia3": (IA3, {}),
    "full": (Full, {"params": "weight"}),
}
every_net = pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
every_kind = pytest.mark.parametrize(("kind", "config"), KINDS.values(), ids=KINDS)


def made(net: Callable[[], nn.Module]) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    return net().double(), torch.randn(2, 5, WIDTH, dtype=torch.float64)


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in peftlib.parameters(model):
            parameter.add_(torch.randn_like(parameter) / 3)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


@every_net
@every_kind
def test_every_adapter_acts_live_as_merged_and_leaves_no_trace(net, kind, config, tmp_path):
    model, x = made(net)
    base, before, frozen = model(x), snapshot(model), copy.deepcopy(model)
    peftlib.inject(model, nn.Linear, kind, **config)
    assert_close(model(x), base)
    moved(model)
    live = model(x)
    assert (live - base).abs().max() > 1e-3
    verification = peftlib.verify(model, x)
    assert verification, str(verification)
    peftlib.save(model, tmp_path / "adapter.safetensors")
    with peftlib.merged(model), torch.no_grad():
        assert_close(model(x), live)
    peftlib.load(frozen, tmp_path / "adapter.safetensors")
    assert torch.equal(frozen(x), live)
    with peftlib.activate(model):
        assert torch.equal(model(x), base)
    peftlib.eject(model)
    assert not changes(before, model)


@every_net
def test_lora_computes_with_the_sum_of_weight_and_product_in_each_place(net):
    model, x = made(net)
    plain = copy.deepcopy(model)
    peftlib.inject(model, nn.Linear, LoRA, rank=2, alpha=6)
    moved(model)
    for host_name, _, adapter in peftlib.adapters(model):
        found: Any = adapter
        path = f"{host_name}.{found.param}".lstrip(".").rpartition(".")[0]
        with torch.no_grad():
            plain.get_submodule(path).weight.add_(3 * found.lora_B @ found.lora_A)
    assert_close(model(x), plain(x))


@every_net
def test_each_linear_gets_one_adapter(net):
    model, _ = made(net)
    peftlib.inject(model, nn.Linear, LoRA, rank=2)
    linears = {id(module) for module in model.modules() if isinstance(module, nn.Linear)}
    adapters: Any = [(model.get_submodule(host_name), adapter) for host_name, _, adapter in peftlib.adapters(model)]
    owners = [host.get_submodule(adapter.param.rpartition(".")[0]) for host, adapter in adapters]
    assert {id(owner) for owner in owners} == linears
    assert len(owners) == len(linears)


@every_net
def test_the_gradients_are_those_of_the_summed_weight(net):
    model, x = made(net)
    peftlib.inject(model, nn.Linear, LoRA, rank=2, dtype="float64")
    moved(model)
    parameters = [*peftlib.parameters(model)]
    directions = [torch.randn_like(parameter) for parameter in parameters]
    gradients = torch.autograd.grad(model(x).sin().sum(), parameters)
    slope = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True))
    step = 1e-6

    def shifted(by: float) -> float:
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=by)
            value = model(x).sin().sum().item()
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.sub_(direction, alpha=by)
        return value

    assert abs((shifted(step) - shifted(-step)) / (2 * step) - slope) <= 1e-5 * abs(slope)


def test_hosts_are_the_innermost_modules_around_all_that_uses_the_child():
    hosts = {net.__name__: peftlib.inject(made(net)[0], ["fc", "0"], LoRA, rank=2) for net in (Deep, Shared)}
    assert hosts == {"Deep": [""], "Shared": [""]}
    nested: Any = nn.Sequential(Passed(), nn.Linear(WIDTH, WIDTH))
    assert peftlib.inject(nested, nn.Linear, LoRA, rank=2) == ["0", "0.called", "1"]


# ---- what only asks for a dtype, a device or a shape


class Direct(Base):
    """The child is called, and asked for everything but its values."""

    def __init__(self) -> None:
        super().__init__()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.fc.weight)

    def tie_weights(self) -> None:
        self.other.weight = self.fc.weight

    def _init_weights(self) -> None:
        self.fc.weight.data.normal_()


class AskedDtype(Direct):
    def read(self, x: Tensor) -> Tensor:
        return self.fc(x.to(self.fc.weight.dtype).to(device=self.fc.weight.device))


class AskedShape(Direct):
    def read(self, x: Tensor) -> Tensor:
        width, _ = self.fc.weight.shape
        return self.fc(x[..., :width]) * (self.fc.weight.size(0) / self.fc.weight.dim()) * self.fc.weight.numel()


class AskedByName(Direct):
    def read(self, x: Tensor) -> Tensor:
        weight = self.fc.weight
        if weight.dtype != x.dtype and not weight.is_cuda and weight.requires_grad:
            x = x.to(weight)
        return self.fc(x)


class AskedWhether(Direct):
    def read(self, x: Tensor) -> Tensor:
        bias = x.new_zeros(()) if self.fc.bias is None else torch.zeros_like(self.fc.bias)
        return self.fc(x) + bias * isinstance(self.fc.weight, Tensor) * hasattr(self.fc, "weight")


class AskedOfAll(Direct):
    def read(self, x: Tensor) -> Tensor:
        for layer in (self.fc, self.other):
            x = layer(x.type_as(layer.weight)) * layer.weight.new_ones(1)
        return x


@pytest.mark.parametrize("net", [AskedDtype, AskedShape, AskedByName, AskedWhether, AskedOfAll])
def test_a_child_that_is_only_asked_for_its_metadata_is_adapted_itself(net):
    model, x = made(net)
    assert peftlib.inject(model, "fc", LoRA, rank=2, dropout=0.1) == ["fc"]
    assert peftlib.verify(model, x)


# ---- each layer type


class Kernels(nn.Module):
    """A depthwise and a transposed convolution and embeddings, of which their values are read."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise: Any = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, padding=1)
        self.transposed: Any = nn.ConvTranspose1d(WIDTH, 8, 3, groups=2)
        self.positions: Any = nn.Embedding(5, WIDTH)
        self.norm: Any = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x + self.positions.weight, (WIDTH,), self.norm.weight, self.norm.bias)
        depthwise = self.depthwise
        y = F.conv1d(x.mT, depthwise.weight.squeeze(1)[:, None], depthwise.bias, padding=1, groups=WIDTH)
        return F.conv_transpose1d(y, self.transposed.weight, self.transposed.bias, groups=2)


@pytest.mark.parametrize("target", ["depthwise", "transposed", "positions", "norm"])
@every_kind
def test_each_layer_type_keeps_its_layout(target, kind, config, tmp_path):
    if target == "norm" and kind in (LoRA, DoRA):
        with pytest.raises(AdapterError, match="norm"):
            peftlib.inject(Kernels(), target, kind, **config)
        return
    model, x = made(Kernels)
    base, fresh = model(x), copy.deepcopy(model)
    assert peftlib.inject(model, target, kind, **config) == [""]
    assert_close(model(x), base)
    moved(model)
    live = model(x)
    assert (live - base).abs().max() > 1e-3
    assert peftlib.verify(model, x)
    direct = copy.deepcopy(fresh)
    alone = direct.get_submodule(target)
    peftlib.inject(alone, lambda name, _: not name, kind, **config)
    for mine, same in zip(peftlib.parameters(model), peftlib.parameters(alone), strict=True):
        same.data.copy_(mine.data)  # the child by itself, merged, is the reference
    peftlib.eject(alone, merge=True)
    assert_close(direct(x), live)
    peftlib.save(model, tmp_path / "adapter.safetensors")
    peftlib.load(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(fresh(x), live)


# ---- what lies around a child that is read


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part: Any = Base()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) @ self.part.called.weight


@pytest.mark.parametrize("params", [None, "called.weight"])
def test_copies_of_a_whole_module_reach_who_reads_inside_it(params):
    model, x = made(Block)
    assert peftlib.inject(model, "part", Full, params=params) == [""]
    moved(model)
    live = model(x)
    with peftlib.merged(model), torch.no_grad():
        assert_close(model(x), live)


class Positioned(nn.Module):
    """Calls its embeddings, and reads the positions that they keep."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings: Any = nn.Linear(WIDTH, WIDTH)
        self.embeddings.register_buffer("positions", torch.arange(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.embeddings(x)[..., self.embeddings.positions.flip(0)]


def test_positions_that_are_read_are_no_weight_that_an_adapter_would_change():
    model = nn.Sequential(Positioned())
    assert peftlib.inject(model, "0.embeddings", Bottleneck, width=2) == ["0.embeddings"]
    assert peftlib.verify(model, torch.randn(2, WIDTH)).problems == ()


def test_a_kind_around_a_whole_module_stays_there():
    model, _ = made(Block)
    assert peftlib.inject(model, "part", Bottleneck, width=2, dim=WIDTH) == ["part"]


def test_an_adapter_on_the_reader_and_one_on_what_it_reads_nest():
    model, x = made(Passed)
    peftlib.inject(model, "fc", LoRA, rank=2, name="inner")
    peftlib.inject(model, lambda name, _: not name, Full, name="outer", params="fc.*")
    peftlib.inject(model, "fc", DoRA, rank=2, name="last")
    peftlib.activate(model, "inner", "outer", "last")
    moved(model)
    live = model(x)
    with peftlib.merged(model), torch.no_grad():
        assert_close(model(x), live)


def test_a_forward_that_was_put_on_the_module_itself_is_read():
    def forward(self: Any, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight)

    model, x = made(AskedDtype)
    model.forward = types.MethodType(forward, model)
    assert peftlib.inject(model, "fc", LoRA, rank=2) == [""]
    moved(model)
    live = model(x)
    with peftlib.merged(model), torch.no_grad():
        assert_close(model(x), live)


def test_a_forward_that_was_replaced_on_the_class_is_read_anew(monkeypatch):
    class Patched(AskedDtype):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    assert peftlib.inject(Patched(), "fc", LoRA, rank=2) == ["fc"]
    monkeypatch.setattr(Patched, "forward", Passed.forward)
    monkeypatch.setattr(Patched, "read", Passed.read)
    assert peftlib.inject(Patched(), "fc", LoRA, rank=2) == [""]


def test_what_has_no_source_is_taken_to_call_and_verify_names_what_did_not_run():
    namespace: dict[str, Any] = {"Base": Base}
    exec("class Hidden(Base):\n def forward(self, x):\n  return x @ self.fc.weight + self.other(x)", namespace)
    model, x = made(namespace["Hidden"])
    assert peftlib.inject(model, ["fc", "other"], LoRA, rank=2) == ["fc", "other"]
    (problem,) = peftlib.verify(model, x).problems
    assert "fc" in problem


# ---- refusals


class Changing(Base):
    def read(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.fc.weight.mul_(0.5)
        return self.fc(x) + self.other(x)


def parametrized() -> nn.Module:
    model = Passed()
    parametrizations.weight_norm(model.fc)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, dict[str, Any], str]] = {
    "no merged weight": (Passed, Bottleneck, {"width": 2}, "Bottleneck"),
    "a kind of one's own without a path": (Passed, Gain, {}, "Gain"),
    "a parametrized weight": (parametrized, LoRA, {}, r"fc\.weight"),
    "a parametrized weight, scaled": (parametrized, IA3, {}, r"fc\.weight"),
    "a weight that changes in place": (Changing, LoRA, {}, r"fc: Changing .*mul_"),
}


@pytest.mark.parametrize(("make", "kind", "config", "named"), REFUSED.values(), ids=REFUSED)
def test_what_would_not_act_is_refused(make, kind, config, named):
    model, _ = made(make)
    before, bits = snapshot(model), base_bits(model)
    with pytest.raises(AdapterError, match=named):
        peftlib.inject(model, "fc", kind, **config)
    assert not changes(before, model)
    assert base_bits(model) == bits


def test_dropout_acts_on_the_input_that_a_reading_shows():
    """The mean over n masks is the output without dropout, off by at most 6 standard errors of that mean."""
    model, x = made(Passed)
    peftlib.inject(model, "fc", LoRA, rank=2, dropout=0.4)
    moved(model)
    expected = model.eval()(x).detach()
    model.train()
    draws = torch.stack([model(x).detach() for _ in range(1000)])
    assert (draws[0] - draws[1]).abs().max() > 0.01
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - expected).abs() <= 6 * error + 1e-12).all()

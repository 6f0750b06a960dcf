"""The laws of each kind on whole models of the zoo."""

import copy
import functools
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import peftlib
from support import reference
from support.ecosystem import feature
from support.helpers import moved
from support.hosts import statistics_held, without_fast_path
from support.zoo import BY_NAME, ZOO, Animal


@dataclass(frozen=True)
class Row:
    """How a kind is put into a model. `silent`: inserting changes no bit; `absent`: the models that it is not for."""

    name: str
    kind: type[peftlib.Adapter]
    targets: Callable[[Animal], Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    silent: bool = True
    absent: tuple[str, ...] = ()


def weights(animal: Animal) -> Any:
    return animal.linears


def whole(animal: Animal) -> Any:
    """Without what only the weight form of a parent reaches."""
    return [name for name in animal.linears if name != "out_proj"] if animal.fast_path else animal.linears


def blocks(animal: Animal) -> Any:
    return animal.blocks


def attention(animal: Animal) -> Any:
    return animal.attention


def prompted(animal: Animal) -> Any:
    """The model itself where it takes masks, and returns a row for each token; a language model of one's own."""
    if animal.name == "grouped-query":
        return animal.embedding
    return type(animal.make()) if animal.name in ("llama", "qwen3", "gemma2", "gpt2") else None


def head(animal: Animal) -> Any:
    return animal.head


ROWS = [
    Row("lora", peftlib.LoRA, weights, {"rank": 2}),
    Row("dora", peftlib.DoRA, weights, {"rank": 2}),
    Row("ia3", peftlib.IA3, whole),
    Row("full", peftlib.Full, head),
    Row("bottleneck", peftlib.Bottleneck, blocks, {"width": 3}),
    Row("parallel", peftlib.Bottleneck, blocks, {"width": 3, "position": "parallel", "norm": "before"},
        absent=("cnn", "vit")),
    Row("prefix", peftlib.Prefix, attention, {"length": 3}, silent=False),
    Row("prefix-gated", peftlib.Prefix, attention, {"length": 3, "gate": True}),
    Row("prefix-perceptron", peftlib.Prefix, attention, {"length": 3, "reparametrize": 4}, silent=False),
    Row("prompt", peftlib.Prompt, prompted, {"length": 3}, silent=False),
]  # fmt: skip
CELLS = [(row, animal) for row in ROWS for animal in ZOO if row.targets(animal) and animal.name not in row.absent]


def marks(row: Row, animal: Animal) -> Any:
    own = feature("all properties of a type: Llama, Qwen3, Gemma 2, GPT-2; BERT, T5, ViT, Whisper", row.kind.__name__)
    return own if type(animal.make()).__module__.startswith("transformers.") else ()


each = pytest.mark.parametrize(
    ("row", "animal"), [pytest.param(*cell, id=f"{cell[0].name}-{cell[1].name}", marks=marks(*cell)) for cell in CELLS]
)


def put(model: nn.Module, row: Row, animal: Animal, **more: Any) -> list[str]:
    config = {**row.config, **animal.needs.get(row.kind.__name__, {}), **more}
    return peftlib.inject(model, row.targets(animal), row.kind, **config)


def adapted(row: Row, animal: Animal, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = animal.make(dtype)
    torch.manual_seed(4)
    put(model, row, animal)
    return moved(model, size=0.2)


def outputs(model: nn.Module, animal: Animal, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    found = tree_leaves(model(**animal.inputs(dtype)))
    return [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@torch.no_grad()
def plain(model: nn.Module, animal: Animal, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return outputs(model, animal, dtype)


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) > 0 and all(map(torch.equal, found, expected))


def bits(model: nn.Module) -> dict[str, bytes]:
    state = {key: tensor for key, tensor in model.state_dict().items() if "adapters." not in key}
    return {key: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for key, tensor in state.items()}


def loss(found: list[Tensor]) -> Tensor:
    torch.manual_seed(5)
    return torch.stack([(tensor * torch.randn(tensor.shape).to(tensor)).sum() for tensor in found]).sum()


@each
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_inserting_changes_no_bit_where_that_is_promised(row, animal, training):
    model = animal.make().train(training)
    put(model, row, animal)
    bases = [statistics_held(animal.make().train(training)).requires_grad_(trains) for trains in (False, True)]
    with without_fast_path():
        found = outputs(model, animal)
        # torch picks some kernels by whether weights train
        assert any(same(found, outputs(base, animal)) for base in bases) == row.silent


@each
def test_switched_off_and_ejected_the_model_is_the_base_to_the_bit(row, animal):
    base, model = animal.make().requires_grad_(False), animal.make()
    before, keys = bits(model), list(model.state_dict())
    put(model, row, animal)
    moved(model, size=0.2)
    with_adapter = plain(model, animal)
    with peftlib.activate(model):
        assert same(plain(model, animal), plain(base, animal))
    assert not same(with_adapter, plain(base, animal))
    assert same(plain(model, animal), with_adapter)
    peftlib.eject(model)
    assert same(plain(model, animal), plain(base, animal))
    assert (bits(model), list(model.state_dict())) == (before, keys)
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]


@each
def test_only_adapters_train(row, animal):
    model = adapted(row, animal)
    before, own = bits(model), list(peftlib.parameters(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss(outputs(model, animal)).backward()
        optimizer.step()
    reached = {id(p) for p in model.parameters() if p.grad is not None and p.grad.any()}
    assert reached <= {id(p) for p in own}
    assert len(reached) >= 0.9 * len(own)  # what a model does not read, such as the bias of keys, learns nothing
    assert bits(model) == before
    assert not peftlib.verify(model, **animal.inputs()).problems


@each
def test_saved_and_loaded_the_output_is_identical(row, animal, tmp_path):
    model, fresh = adapted(row, animal), animal.make()
    peftlib.save(model, tmp_path / "adapter.safetensors")
    peftlib.load(fresh, tmp_path / "adapter.safetensors")
    assert same(plain(fresh, animal), plain(model, animal))


@each
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_clone_is_identical_and_independent(row, animal, clone):
    model = adapted(row, animal)
    expected = plain(model, animal)
    other = clone(model)
    assert same(plain(other, animal), expected)
    moved(other, size=0.2)
    assert not same(plain(other, animal), expected)
    assert same(plain(model, animal), expected)


@each
def test_live_and_merged_agree_in_float64(row, animal):
    """1e-10 of the largest value is some 1e5 roundings of float64."""
    model = adapted(row, animal, torch.float64)
    if row.kind.fold is peftlib.Adapter.fold:
        with pytest.raises(peftlib.AdapterError, match=row.kind.__name__):
            peftlib.merge(model)
        return
    live = plain(model, animal, torch.float64)
    with peftlib.merged(model):
        assert_close(plain(model, animal, torch.float64), live)


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-10 * max(1.0, other.abs().max().item())


# Dense references


def beside(config: Any, own: dict[str, Tensor], axis: int, module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
    """What the module gives, with the bottleneck written by hand."""
    x = args[0] if args else kwargs["hidden_states"]
    if isinstance(out, Tensor):
        return reference.bottleneck(config, own, out, x, axis)
    if isinstance(out, tuple):
        return (reference.bottleneck(config, own, out[0], x, axis), *out[1:])
    changed = copy.copy(out)
    changed["last_hidden_state"] = reference.bottleneck(config, own, out["last_hidden_state"], x, axis)
    return changed


BOTTLENECKS = [cell for cell in CELLS if cell[0].kind is peftlib.Bottleneck]


@pytest.mark.parametrize(
    ("row", "animal"), [pytest.param(*cell, id=f"{cell[0].name}-{cell[1].name}") for cell in BOTTLENECKS]
)
def test_bottlenecks_equal_hand_written_ones_in_float64(row, animal):
    model, base = adapted(row, animal, torch.float64), animal.make(torch.float64)
    leaves: list[Tensor] = []
    for at, _, part in peftlib.adapters(model):
        own = {key: p.detach().clone().requires_grad_() for key, p in part.named_parameters()}
        leaves += own.values()
        channels_first = isinstance(base.get_submodule(at), (nn.Conv1d, nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm))
        axis = 1 if channels_first else -1
        hook = functools.partial(beside, part.config, own, axis)
        base.get_submodule(at).register_forward_hook(hook, with_kwargs=True)
    with without_fast_path():
        found, expected = outputs(model, animal, torch.float64), outputs(base, animal, torch.float64)
    assert_close(found, expected)
    gradients = torch.autograd.grad(loss(found), list(peftlib.parameters(model)), materialize_grads=True)
    assert_close(list(gradients), list(torch.autograd.grad(loss(expected), leaves, materialize_grads=True)))


@pytest.mark.parametrize("name", ["mlp", "cnn", "grouped-query", "llama", "gpt2", "vit"])
@pytest.mark.parametrize("on", ["output", "input"])
def test_ia3_equals_dense_weights_in_float64(name, on):
    animal = BY_NAME[name]
    model, base = animal.make(torch.float64), animal.make(torch.float64)
    put(model, Row("ia3", peftlib.IA3, whole), animal, on=on)
    moved(model, size=0.2)
    leaves: list[Tensor] = []
    values: dict[str, Tensor] = {}
    for at, _, part in peftlib.adapters(model):
        factor, host = part.factor.detach().clone().requires_grad_(), base.get_submodule(at)
        leaves.append(factor)
        layout = "columns" if name == "gpt2" else "rows"
        groups = getattr(host, "groups", 1)
        values[f"{at}.weight"] = reference.scaled(layout, factor, host.weight.detach(), on, groups)
        if on == "output" and host.bias is not None:
            values[f"{at}.bias"] = host.bias.detach() * factor
    expected = torch.func.functional_call(base, values, (), animal.inputs(torch.float64))
    expected = [leaf for leaf in tree_leaves(expected) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    found = outputs(model, animal, torch.float64)
    assert_close(found, expected)
    gradients = torch.autograd.grad(loss(found), list(peftlib.parameters(model)))
    assert_close(list(gradients), list(torch.autograd.grad(loss(expected), leaves)))

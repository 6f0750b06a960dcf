"""The configurations that HF peft tries on small models of its own: each goes through a file and through inject."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftlib import hf
from support import helpers
from support.peft_models import assert_same, quiet, shifted
from support.refusals import refused


class Around(nn.Module):
    """Named layers around one, and a linear head."""

    def __init__(self, name: str, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.first = name
        self.add_module(name, layer)
        self.lin0 = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.get_submodule(self.first)
        y = layer(x, x, x)[0] if self.first == "mha" else layer(x)
        return self.lin0(y.movedim(1, -1) if y.dim() > 3 else y)


class Perceptron(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20, bias=bias)
        self.lin1 = nn.Linear(20, 20, bias=bias)
        self.lin2 = nn.Linear(20, 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(self.lin1(self.lin0(x).relu()).relu())


class Model:
    """How to make it, what it takes, and what is targeted in it."""

    def __init__(self, make: Callable[[], nn.Module], inputs: Callable[[], Tensor], *targets: Any) -> None:
        self.make, self.inputs, self.targets = make, inputs, targets

    def seeded(self) -> Any:
        torch.manual_seed(0)
        return self.make().eval()


def named(name: str, make: Callable[[], nn.Module], width: int, *shape: int) -> Model:
    return Model(lambda: Around(name, make(), width), lambda: torch.randn(shape), [name, "lin0"])


MODELS = {
    "perceptron": Model(Perceptron, lambda: torch.randn(3, 10), ["lin0"], "lin0", ["lin0", "lin2"], r".*lin[01]"),
    "no biases": Model(lambda: Perceptron(False), lambda: torch.randn(3, 10), ["lin1"], ["lin0", "lin1"]),
    "embedding": Model(lambda: Around("emb", nn.Embedding(10, 5), 5), lambda: torch.randint(0, 10, (3, 4)), ["emb"],
                       ["emb", "lin0"]),
    "hf conv1d": named("conv1d", lambda: Conv1D(6, 5), 6, 3, 5),
    "conv1d": named("conv1d", lambda: nn.Conv1d(4, 6, 3, padding=1), 9, 2, 4, 9),
    "conv2d": named("conv2d", lambda: nn.Conv2d(4, 6, 3), 6, 2, 4, 5, 5),
    "conv2d of one pixel": named("conv2d", lambda: nn.Conv2d(4, 6, 1, bias=False), 6, 2, 4, 5, 5),
    "conv3d": named("conv3d", lambda: nn.Conv3d(2, 4, 2), 4, 2, 2, 4, 3, 3),
    "attention": named("mha", lambda: nn.MultiheadAttention(8, 2), 8, 3, 2, 8),
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha and dropout": {"lora_alpha": 32, "lora_dropout": 0.1},
    "stabilised": {"use_rslora": True},
    "dora": {"use_dora": True},
    "random dora": {"use_dora": True, "init_lora_weights": False},
    "head": {"modules_to_save": ["lin0"]},
    "own bias": {"bias": "lora_only"},
    "every bias": {"bias": "all"},
    "bias of B": {"lora_bias": True},
    "patterns": {"rank_pattern": {"lin0": 2, "conv2d": 3}, "alpha_pattern": {"lin.": 3}},
    "gaussian": {"init_lora_weights": "gaussian"},
    "random": {"init_lora_weights": False},
    "pissa": {"init_lora_weights": "pissa", "r": 2},
    "olora": {"init_lora_weights": "olora", "r": 2},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 2},
    "rows": {"trainable_token_indices": {"emb": [0, 3]}},
    "less": {"exclude_modules": ["lin1"]},
}


def peft_has(name: str, what: str, targets: Any) -> bool:
    """What peft refuses, or cannot run, is no configuration of its."""
    if what == "rows":
        return name == "embedding" and "emb" not in targets
    if what == "head":
        return targets not in (["lin0"], "lin0")
    of_weight = what in ("pissa", "olora", "orthogonal")
    if name in ("perceptron", "no biases"):
        return what != "less" or targets != ["lin1"]
    if name == "embedding":
        return what != "bias of B"
    if name == "attention":
        return what not in ("dora", "random dora", "bias of B") and not of_weight
    return not of_weight


LORA = [
    pytest.param(model, {"target_modules": targets, "r": 4, **more}, peft.LoraConfig, id=f"{name}-{at}-{what}")
    for name, model in MODELS.items()
    for at, targets in enumerate(model.targets)
    for what, more in MORE.items()
    if peft_has(name, what, targets)
]
IA3 = [
    pytest.param(model, {"target_modules": targets, "feedforward_modules": inputs, **more}, peft.IA3Config,
                 id=f"{name}-{at}-{len(inputs)}-{len(more)}")
    for name, model in MODELS.items()
    if name in ("perceptron", "hf conv1d", "conv2d", "conv3d")
    for (at, targets), more in itertools.product(enumerate(model.targets), ({}, {"modules_to_save": ["lin1"]}))
    if isinstance(targets, list)
    for inputs in ([], targets[:1], targets)
]  # fmt: skip


def inputs_of(model: Model) -> Tensor:
    torch.manual_seed(2)
    return model.inputs()


def of_peft(model: Model, config: Any) -> Any:
    """peft's model, moved as training would."""
    torch.manual_seed(1)
    with quiet():
        theirs = peft.get_peft_model(model.seeded(), copy.deepcopy(config))
    shifted(parameter for parameter in theirs.parameters() if parameter.requires_grad)
    return theirs.eval()


def read_by_peft(model: Model, folder: Any) -> Any:
    with quiet():
        return peft.PeftModel.from_pretrained(model.seeded(), str(folder)).eval()


@pytest.mark.parametrize(("model", "keys", "kind"), [*LORA, *IA3])
def test_what_peft_tries_computes_the_same_through_files_and_through_inject(model, keys, kind, tmp_path):
    with quiet():
        config = kind(**keys)
        theirs, x = of_peft(model, config), inputs_of(model)
        theirs.save_pretrained(str(tmp_path / "theirs"))
    loaded, fresh = model.seeded(), model.seeded()
    hf.load(loaded, tmp_path / "theirs")
    assert_same(loaded(x), theirs(x))
    hf.save(loaded, tmp_path / "back")
    assert_same(read_by_peft(model, tmp_path / "back")(x), theirs(x))
    hf.inject(fresh, config)
    if keys.get("init_lora_weights") is not False:
        assert_same(fresh(x), model.seeded()(x))
    helpers.moved(fresh)
    hf.save(fresh, tmp_path / "ours")
    assert_same(read_by_peft(model, tmp_path / "ours")(x), fresh(x))


@pytest.mark.parametrize(
    "trained_by",
    [
        {"velora_config": peft.VeloraConfig(num_groups=2)},
        {"velora_config": peft.VeloraConfig(num_groups=2, init_type="random")},
        {"monteclora_config": peft.MontecloraConfig(num_samples=2)},
        {"use_bdlora": BdLoraConfig(target_modules_bd_a=["lin0"], target_modules_bd_b=["lin1"], nblocks=2)},
    ],
    ids=str,
)
def test_a_variant_that_is_a_lora_is_read_and_not_begun(trained_by, tmp_path):
    model = MODELS["perceptron"]
    config = peft.LoraConfig(target_modules=["lin0", "lin1"], r=4, **trained_by)
    theirs, x = of_peft(model, config), inputs_of(model)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    loaded, fresh = model.seeded(), model.seeded()
    hf.load(loaded, tmp_path / "theirs")
    assert_same(loaded(x), theirs(x))
    hf.save(loaded, tmp_path / "back")
    assert_same(read_by_peft(model, tmp_path / "back")(x), theirs(x))
    with refused(fresh, *trained_by):
        hf.inject(fresh, config)

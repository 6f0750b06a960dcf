"""A mixture of experts: forward and backward of one layer of Qwen3-MoE, LoRA of rank 4 on its stacks of experts"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peftlib

TESTS = "tests/kinds/test_experts.py"
STACKS = ("gate_up_proj", "down_proj")
EXPERTS = [32, 128]
IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]


class WholeLoRA(peftlib.LoRA):
    """W + sBA made anew in every call."""

    lazy = ()


def mixture(experts: int, implementation: str) -> Any:
    import transformers as tf

    torch.manual_seed(0)
    sizes: Any = {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    config = tf.Qwen3MoeConfig(
        **sizes, vocab_size=97, num_hidden_layers=1, num_experts=experts, num_experts_per_tok=4,
        moe_intermediate_size=128, intermediate_size=96, decoder_sparse_step=1,
    )  # fmt: skip
    model = tf.Qwen3MoeForCausalLM(config).eval().requires_grad_(False)
    model.set_experts_implementation(implementation)
    return model


def with_peftlib(model: nn.Module, kind: type[peftlib.Adapter]) -> nn.Module:
    peftlib.inject(model, "mlp.experts", kind, rank=4)
    return model


def with_peft(model: Any) -> nn.Module:
    import peft

    names = [f"mlp.experts.{name}" for name in STACKS]
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_parameters=names, target_modules=[]))


def contenders(experts: int, implementation: str) -> dict[str, Callable[[], Any]]:
    tokens = torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(1))
    base = mixture(experts, implementation)
    models = {
        "peftlib": with_peftlib(mixture(experts, implementation), peftlib.LoRA),
        "peftlib, whole": with_peftlib(mixture(experts, implementation), WholeLoRA),
        "HF peft": with_peft(mixture(experts, implementation)),
    }
    return {"base forward": lambda: base(tokens), **{name: step(model, tokens) for name, model in models.items()}}


def step(model: nn.Module, tokens: Tensor) -> Callable[[], Any]:
    leaves = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in leaves:
            nn.init.normal_(p, std=0.1)
    return lambda: torch.autograd.grad(model(tokens).logits.square().mean(), leaves)


class Made(TorchDispatchMode):
    """Bytes of the storages that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        found = func(*args, **kwargs or {})
        for each in tree_leaves(found):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in known:
                self.bytes += each.untyped_storage().nbytes()
        return found


def made(run: Callable[[], Any]) -> int:
    run()
    with Made() as counted:
        run()
    return counted.bytes


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("experts", EXPERTS)
def bench_experts_bytes(record, experts: int, implementation: str) -> None:
    stack = experts * 3 * 128 * 256 * 4
    found = {name: made(run) for name, run in contenders(experts, implementation).items()}
    own = found.pop("base forward")
    percent = {name: 100 * (value - own) / stack for name, value in found.items()}
    record(
        f"made for the adapter in a step, {experts} experts by {implementation}", percent,
        unit="% of the stacks", note=f"the stacks are {stack / 1e6:.1f} MB",
    )  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("experts", EXPERTS)
def bench_experts_step(contest, experts: int, implementation: str) -> None:
    contest(
        f"a step, {experts} experts by {implementation}", contenders(experts, implementation), tests=TESTS, rounds=9
    )

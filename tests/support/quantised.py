"""Quantised bases: how each library packs a linear layer, and the values that it says it packed."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_, to_nf4
from torchao.quantization.granularity import PerGroup

from support.ecosystem import COLUMNS

WIDTH = 128  # torchao's NF4 copies itself only where it has whole blocks of 64 × 256 values
HAS_BFLOAT16_KERNEL = bool(has_avx512bf16())


@dataclass(frozen=True)
class Base:
    """A way to quantise an `nn.Linear`, which gives the layer to put in its place; the values that the library itself
    reads from such a layer; and whether the library can pickle it."""

    name: str
    pack: Callable[[nn.Linear], nn.Module]
    values: Callable[[Any], Tensor]
    pickles: bool = True

    def of(self, model: nn.Module, pattern: str = "") -> Any:
        """The model with every linear layer quantised whose name has the pattern."""
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and pattern in name:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, self.pack(module).train(module.training))
        return model.requires_grad_(False)


def by_torchao(config: Any) -> Callable[[nn.Linear], nn.Module]:
    def pack(layer: nn.Linear) -> nn.Module:
        quantize_(layer, config)
        return layer

    return pack


def _nf4(layer: nn.Linear) -> nn.Module:
    layer.weight = nn.Parameter(to_nf4(layer.weight.detach()), requires_grad=False)
    return layer


def _loaded(packed: nn.Module, layer: nn.Linear) -> nn.Module:
    packed.load_state_dict(layer.state_dict())
    return packed.to("cpu")  # here it quantises


def _8bit(layer: nn.Linear) -> nn.Module:
    sizes = layer.in_features, layer.out_features, layer.bias is not None
    return _loaded(Linear8bitLt(*sizes, has_fp16_weights=False), layer)


def four_bits(quant_type: str, trains: bool = True, **config: Any) -> Callable[[nn.Linear], nn.Module]:
    def pack(layer: nn.Linear) -> nn.Module:
        sizes = layer.in_features, layer.out_features, layer.bias is not None
        packed: Any = Linear4bit(*sizes, quant_type=quant_type, **{"compute_dtype": torch.float32, **config})
        if trains:
            packed.support_avx512bf16_for_cpu = False  # else it does not train any more after a pass in eval mode
        return _loaded(packed, layer)

    return pack


def _8bit_values(layer: Any) -> Tensor:
    held = layer.weight if layer.state.CB is None else layer.state  # they move at the first call
    return held.CB.double() * held.SCB.double()[:, None] / 127


def _4bit_values(layer: Any) -> Tensor:
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


BASES = [
    Base("torchao int8 weight-only", by_torchao(Int8WeightOnlyConfig(set_inductor_config=False)),
         lambda layer: layer.weight.dequantize(), pickles=False),
    Base("torchao int4 weight-only", by_torchao(IntxWeightOnlyConfig(torch.int4, PerGroup(32))),
         lambda layer: layer.weight.dequantize(), pickles=False),
    Base("torchao NF4", _nf4, lambda layer: layer.weight.get_original_weight()),
    Base("bitsandbytes 8-bit", _8bit, _8bit_values),
    Base("bitsandbytes 4-bit NF4, doubly quantized", four_bits("nf4"), _4bit_values),
    Base("bitsandbytes 4-bit FP4", four_bits("fp4", compress_statistics=False), _4bit_values),
]  # fmt: skip
BY_NAME = {base.name: base for base in BASES}


def chain(dtype: torch.dtype = torch.float32) -> Any:
    """Two linear layers and what is between them, not yet quantised."""
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).to(dtype)


def llama() -> Any:
    """A small Llama whose projections are all as wide as the libraries' blocks need."""
    config = hf.LlamaConfig(
        vocab_size=37, hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, initializer_range=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        return hf.LlamaForCausalLM(config)


# Every kind where it goes in the Llama: LoRA, DoRA and IA3 on quantised layers, the others around them.
KINDS = [
    dataclasses.replace(column, config={**column.config, "dim": WIDTH}) if "dim" in column.config else column
    for column in COLUMNS
]

"""Prefix tuning in the files of HF peft: all layers' keys and values in one tensor, their positions counted."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .._core.host import base_type
from .._core.inject import Part
from .._errors import AdapterError
from ..kinds.prefix import Prefix
from .config import Config
from .modules import Modules
from .modules_to_save import Found, Tensors
from .refusals import class_of
from .tensors import FileTensors

KEY = "prompt_embeddings"

Turn = Callable[[Tensor], Tensor]


def prefix_parts(modules: Modules, config: Config, tensors: FileTensors | None, where: str) -> list[Part]:
    """With the file's keys and values, or fresh."""
    layers, length = attentions_of(modules), config["num_virtual_tokens"]
    if length is None or (config["num_transformer_submodules"] or 1) != 1:
        raise AdapterError(f"{where}: prefixes of an encoder and a decoder at once, or of no length. Correct it.")
    if tensors is None:
        if config["prefix_projection"]:
            raise AdapterError(
                f"{where}: prefix_projection: peft's MLP is one for all layers, here each layer has its own. "
                "Use peftlib.inject with reparametrize."
            )
        return [Part(name, host, Prefix, {"length": length}) for name, host in layers]
    heads, dim = _sizes(config, len(layers), where)
    flat = tensors.take(KEY, (length, len(layers) * 2 * heads * dim))
    tensors.require_all_taken()
    pairs = rearrange(flat, "t (layer pair h d) -> layer pair h t d", layer=len(layers), pair=2, h=heads)
    keywords = {"length": length, "heads": heads, "head_dim": dim}
    return [
        Part(name, host, Prefix, keywords, {"prefix_key": turned(modules, host, key, -length), "prefix_value": value})
        for (name, host), (key, value) in zip(layers, pairs, strict=True)
    ]


def _sizes(config: Config, layers: int, where: str) -> tuple[int, int]:
    width, heads = config["token_dim"], config["num_attention_heads"]
    if width is None or heads is None or width % heads or config["num_layers"] != layers:
        raise AdapterError(
            f"{where}: token_dim={width}, num_attention_heads={heads}, num_layers={config['num_layers']} are not those "
            f"of this model of {layers} attention layers. Load it onto its own base."
        )
    return heads, width // heads


def attentions_of(modules: Modules) -> list[tuple[str, nn.Module]]:
    """The attention modules of a transformers decoder, by their `layer_idx`."""
    numbered = [(name, module) for name, module in modules.by_name.items() if _number(module) is not None]
    inner = [(n, m) for n, m in numbered if not any(other.startswith(f"{n}.") for other, _ in numbered)]
    layers = sorted(inner, key=lambda one: _number(one[1]) or 0)
    if not layers or [_number(module) for _, module in layers] != list(range(len(layers))):
        raise AdapterError(
            f"{class_of(modules.model)}: peft puts a prefix into the cache of each layer of a transformers decoder, "
            "and this model does not number its attention modules (layer_idx) from 0 on, once each. Use peftlib.inject."
        )
    return layers


def _number(module: nn.Module) -> int | None:
    number = getattr(module, "layer_idx", None)
    return number if type(number) is int else None


def turned(modules: Modules, host: nn.Module, key: Tensor, by: int) -> Tensor:
    """peft's prefix takes the first positions, so that each token's own position is later by its length, and its keys
    are not rotated. Here tokens keep their positions: the difference is one rotation of the keys."""
    turn = _rotation(modules, host, abs(by), backwards=by < 0)
    back = _rotation(modules, host, abs(by), backwards=by >= 0)
    result = turn(key)
    if not torch.allclose(back(result), key, rtol=1e-4, atol=1e-5 * float(key.abs().max())):
        raise AdapterError(f"{class_of(host)}: its rotation of keys cannot be undone. Train the prefix here.")
    return result


def _rotation(modules: Modules, host: nn.Module, position: int, backwards: bool) -> Turn:
    """By the model's own rotary embedding."""
    rotary = next((m for name, m in modules.by_name.items() if name.endswith("rotary_emb")), None)
    apply: Any = getattr(sys.modules.get(base_type(type(host)).__module__), "apply_rotary_pos_emb", None)
    if rotary is None or apply is None or getattr(host, "sliding_window", None) is not None:
        raise AdapterError(
            f"{class_of(modules.model)}: peft's prefix moves the positions of all tokens, which is a rotation of its "
            "keys only where all attention is rotary and unbounded. Train the prefix here."
        )
    place = torch.tensor([[position]], device=next(host.parameters()).device)
    try:
        cos, sin = rotary(torch.zeros(1, dtype=torch.float32, device=place.device), place)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{type(rotary).__name__} is called in a way of its own ({error}). Train it here.") from None
    size = (cos.square() + sin.square()).sqrt()
    cos, sin = (each.cpu() / size.cpu() for each in (cos, -sin if backwards else sin))
    return lambda key: apply(key[None], key[None], cos, sin)[1][0]


def prefix_files(modules: Modules, found: Found) -> tuple[Config, Tensors]:
    """The configuration and the tensor."""
    layers, by_host = attentions_of(modules), {id(host): adapter for host, adapter in found}
    prefixes = [by_host.get(id(host)) for _, host in layers]
    whole = [each for each in prefixes if isinstance(each, Prefix) and each.gate is None]
    kinds = {(each.length, each.heads, each.head_dim, each.value_dim) for each in whole}
    if len(whole) != len(layers) or len(found) != len(layers) or len(kinds) != 1:
        raise AdapterError(
            f"{class_of(modules.model)}: peft's file holds one prefix without gate for each of the {len(layers)} "
            "attention layers, all of one length and size, and nothing beside. Adapt all alike; save the rest apart."
        )
    ((length, heads, dim, value_dim),) = kinds
    if value_dim != dim:
        raise AdapterError(f"values of {value_dim} numbers beside keys of {dim}: peft has one size. Save it here.")
    pairs = [_pair(modules, host, prefix) for (_, host), prefix in zip(layers, whole, strict=True)]
    config: Config = {
        "peft_type": "PREFIX_TUNING", "inference_mode": True, "num_virtual_tokens": length, "token_dim": heads * dim,
        "num_attention_heads": heads, "num_layers": len(layers), "num_transformer_submodules": 1,
        "encoder_hidden_size": heads * dim, "prefix_projection": False,
    }  # fmt: skip
    return config, {KEY: rearrange(pairs, "layer pair h t d -> t (layer pair h d)")}


def _pair(modules: Modules, host: nn.Module, prefix: Prefix) -> Tensor:
    key, value = (each.detach().float().cpu() for each in prefix.keys_and_values())
    return torch.stack([turned(modules, host, key, prefix.length), value])

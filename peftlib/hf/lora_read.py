"""From the tensors of a LoRA of HF peft to adapters here: each key has a meaning, or the file is refused."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._core.foreign import reader_of
from .._core.inject import Part
from .._core.override import weight_of
from .._core.walk import candidates
from .._errors import AdapterError
from ..kinds._low_rank import low_rank_branch_of
from ..kinds.dora import DoRA
from ..kinds.full import Full
from ..kinds.lora import LoRA
from .config import Config
from .lora_layouts import Looked, is_linear, magnitude_shape
from .lora_sites import PREFIX, Site, Sites, sites_of
from .targets import modules_kept
from .tensors import FileTensors
from .token_rows import token_parts

MAGNITUDE = "lora_magnitude_vector"

_MOVES_THE_BASE = ("olora", "corda", "loftq", "lora_ga", "pissa_niter")


def lora_parts(model: nn.Module, config: Config, tensors: FileTensors) -> list[Part]:
    """What replaces weights comes first, so that it lies inside and the pairs act on it."""
    require_known_start(config, tensors.where)
    sites = sites_of(model, config)
    kept = kept_parts(model, config, sites, tensors)
    pairs = [part for site in sites.pairs for part in _pair(site, config, tensors)]
    replaced = [*_replaced(model, sites, tensors), *token_parts(model, config, sites, tensors)]
    tensors.require_all_taken()
    return sorted([*kept, *replaced, *pairs], key=lambda part: part.kind is not Full)


def require_known_start(config: Config, where: str) -> None:
    start = str(config["init_lora_weights"]).lower()
    if start.startswith(_MOVES_THE_BASE):
        raise AdapterError(
            f"{where}: init_lora_weights={start!r} moved the base weights, and nothing here says by how much. Save it "
            "in peft with path_initial_model_for_weight_conversion, which makes it a plain LoRA."
        )


def _pair(site: Site, config: Config, tensors: FileTensors) -> Iterator[Part]:
    shapes = site.layout.shapes(site.rank)
    keys = [f"{PREFIX}{site.path}.{name}" for name in site.layout.names]
    A, B = (tensors.take(key, shape) for key, shape in zip(keys, shapes, strict=True))
    if config["lora_bias"]:
        yield _bias_of_pair(site, config, tensors)
    if isinstance(site.host, nn.MultiheadAttention) and not A.count_nonzero() and not B.count_nonzero():
        return  # how a half that is not adapted is written: peft always adapts both
    try:
        own_A, own_B = site.layout.read(A, B)
    except AdapterError as error:
        raise AdapterError(f"{tensors.where}: {site.key}: {error}") from None
    keywords, kind = keywords_of(site, config, site.layout.rank_of(own_A)), DoRA if config["use_dora"] else LoRA
    found = {"lora_A": own_A, "lora_B": own_B}
    if kind is DoRA:
        found["magnitude"] = _magnitude(site, tensors)
    if keywords["init"] == "pissa":
        fresh = LoRA(site.host, **keywords)
        found |= {"initial_A": fresh.initial_A, "initial_B": fresh.initial_B}
    prefix = "" if site.param == "weight" else f"{site.param}."
    yield Part(site.host_name, site.host, kind, keywords, {prefix + key: value for key, value in found.items()})


def keywords_of(site: Site, config: Config, rank: int) -> dict[str, Any]:
    """The keywords of the LoRA here that has rank `rank` and the scale of the site."""
    stabilized, alpha = config["use_rslora"], site.alpha * site.layout.times
    if rank != site.rank:
        alpha, stabilized = alpha * rank / (math.sqrt(site.rank) if stabilized else site.rank), False
    drops = low_rank_branch_of(site.host, site.param) is not None and not isinstance(site.layout, Looked)
    return {
        "rank": rank,
        "alpha": alpha,
        "rank_stabilized": stabilized,
        "dropout": config["lora_dropout"] if drops else 0.0,
        "init": "pissa" if _starts_principal(site, config) else "kaiming",
        "param": site.param,
    }


def _starts_principal(site: Site, config: Config) -> bool:
    if str(config["init_lora_weights"]).lower() != "pissa" or isinstance(site.layout, Looked):
        return False
    if site.param != "weight" or not is_linear(site.layout) or config["use_dora"]:
        raise AdapterError(
            f"{site.key}: init_lora_weights='pissa' is for Linear layers and plain LoRA. Narrow the targets."
        )
    return True


def _magnitude(site: Site, tensors: FileTensors) -> Tensor:
    stem = f"{PREFIX}{site.path}.{MAGNITUDE}"
    key = f"{stem}.weight" if f"{stem}.weight" in tensors.left else stem
    return tensors.take(key, magnitude_shape(site.layout, site.host, site.param)).flatten()


def _bias_of_pair(site: Site, config: Config, tensors: FileTensors) -> Part:
    """peft scales the bias of its B: together with the layer's own, it is a bias."""
    bias = getattr(site.host, "bias", None)
    if config["use_dora"] or site.param != "weight" or not isinstance(bias, Tensor):
        raise AdapterError(
            f"{tensors.where}: {site.key}: lora_bias, where the layer has no bias of its own to hold it. "
            "Train it with lora_bias=False."
        )
    learned = f"{PREFIX}{site.path}.base_layer.bias"
    own = tensors.take(learned, bias.shape) if learned in tensors.left else bias.detach()
    scale = site.alpha / (math.sqrt(site.rank) if config["use_rslora"] else site.rank)
    extra = tensors.take(f"{PREFIX}{site.path}.lora_B.bias", bias.shape)
    return Part(site.host_name, site.host, Full, {"params": ["bias"]}, {"bias": own + scale * extra.to(own)})


def kept_parts(model: nn.Module, config: Config, sites: Sites, tensors: FileTensors) -> list[Part]:
    """`modules_to_save`: whole modules."""
    by_name = dict(candidates(model))
    return [_kept(model, name, by_name[name], sites, tensors) for name in modules_kept(model, config)]


def _kept(model: nn.Module, name: str, module: nn.Module, sites: Sites, tensors: FileTensors) -> Part:
    fresh, (*_, inner) = fresh_copy(model, name, module), reader_of(model, name, module)
    aliases = Full(fresh.host, **fresh.config).aliases
    found: dict[str, Tensor] = {}
    for first, names in aliases.items():
        for alias in names:
            leaf = alias.removeprefix(f"{inner}.") if inner else alias
            found.setdefault(
                first, _kept_tensor(f"{PREFIX}{sites.path(name)}", leaf, weight_of(fresh.host, first), tensors)
            )
    return fresh._replace(tensors=found)


def _kept_tensor(stem: str, leaf: str, weight: Tensor, tensors: FileTensors) -> Tensor:
    value = tensors.take(f"{stem}.{leaf}", weight.shape)
    original, again = f"{stem}.original_module.{leaf}", f"{stem}.modules_to_save.{leaf}"
    if original in tensors.left:  # with bias="all" peft writes the bias that is not in use too
        tensors.take(original, weight.shape)
    if again in tensors.left and not torch.equal(tensors.take(again, weight.shape), value):
        raise AdapterError(f"{tensors.where}: {again} is not {stem}.{leaf}. Save it again from its model.")
    return value


def fresh_copy(model: nn.Module, name: str, module: nn.Module, params: Any = None) -> Part:
    host_name, host, inner = reader_of(model, name, module)
    (keywords,) = Full.split(host, inner, {} if params is None else {"params": [params]})
    return Part(host_name, host, Full, keywords)


def _replaced(model: nn.Module, sites: Sites, tensors: FileTensors) -> Iterator[Part]:
    """Learned biases, and the embeddings that peft writes along; those that are the base's own say nothing."""
    for name, module in candidates(model):
        for leaf, weight in module.named_parameters(recurse=False):
            key = f"{PREFIX}{sites.path(name)}.{leaf}" if name else f"{PREFIX}{leaf}"
            if key not in tensors.left or leaf not in ("weight", "bias"):
                continue
            if leaf == "weight" and not _is_embedding(model, module):
                continue
            value = tensors.take(key, weight.shape)
            if leaf == "bias" or not torch.equal(value.to(weight), weight):
                host_name, host, inner = reader_of(model, name, module)
                param = f"{inner}.{leaf}".lstrip(".")
                yield Part(host_name, host, Full, {"params": [param]}, {param: value})


def _is_embedding(model: nn.Module, module: nn.Module) -> bool:
    head_of: Any = getattr(model, "get_output_embeddings", None)
    return isinstance(module, nn.Embedding) or (head_of is not None and head_of() is module)

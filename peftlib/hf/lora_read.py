"""From the tensors of a LoRA of HF peft to adapters here: each key has a meaning, or the file is refused."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._core.inject import Part
from .._core.override import weight_of
from .._errors import AdapterError
from ..kinds._weight_layout import is_transposed_linear
from ..kinds.full import Full
from .config import TRAINED_BY, Config
from .experts import read_experts
from .lora_bias import SUFFIX, OutputBias
from .lora_layouts import Looked, Shape, Stacked, is_linear, magnitude_shape
from .lora_pairs import MAGNITUDE, Start, begun_part, filled_part
from .lora_sites import PREFIX, Site, Sites, scale_of, sites_of
from .modules import Modules
from .stacks import Writer
from .targets import modules_kept
from .tensors import FileTensors
from .ties import input_embedding, tied_to, with_ties
from .token_rows import token_parts

_MOVES_THE_BASE = ("corda", "loftq", "lora_ga", "pissa_niter")
_STARTS = {
    "true": "kaiming", "false": "random", "gaussian": "gaussian", "pissa": "pissa", "olora": "olora",
    "orthogonal": "orthogonal",
}  # fmt: skip
_FOR_LINEAR = ("pissa", "olora", "orthogonal")


def lora_parts(modules: Modules, config: Config, tensors: FileTensors, layout: str | None = None) -> list[Part]:
    """What replaces weights comes first, so that it lies inside and the pairs act on it."""
    _require_known_start(config, tensors.where)
    config = with_ties(modules, config)
    apart = read_experts(modules, config, tensors, layout)
    pairs = [_filled(site, config, tensors, A, B) for site, A, B in apart]
    sites = sites_of(modules, config)
    kept = kept_parts(modules, config, sites, tensors)
    pairs += [part for site in sites.pairs for part in _pair(site, config, tensors, layout)]
    replaced = [*_replaced(modules, sites, tensors), *token_parts(modules, config, sites, tensors)]
    for key, inside in TRAINED_BY.items():
        if config.get(key):
            tensors.leave(inside)
    tensors.require_all_taken()
    return sorted([*kept, *replaced, *pairs], key=lambda part: part.kind is not Full)


def fresh_lora(modules: Modules, config: Config, where: str) -> list[Part]:
    """The same adapters before any training."""
    _require_known_start(config, where)
    trained_by = next((key for key in (*TRAINED_BY, "use_bdlora") if config.get(key)), None)
    if trained_by:
        raise AdapterError(
            f"{where}: {trained_by} is a way to train that has no counterpart here. Remove it, or train in peft and "
            "load what it saves."
        )
    start = str(config["init_lora_weights"]).lower()
    if start not in _STARTS:
        raise AdapterError(
            f"{where}: init_lora_weights={start!r} has no counterpart here (there is one for "
            f"{', '.join(_STARTS)}). Change it, or start in peft and load what it saves."
        )
    config = with_ties(modules, config)
    sites = sites_of(modules, config)
    _require_no_tied_pairs(modules, config, sites, where)
    kept = kept_parts(modules, config, sites, None)
    biases = [fresh_copy(modules, name, "bias") for name in _with_bias(modules, config, sites)]
    tokens = token_parts(modules, config, sites, None)
    pairs = [part for site in sites.pairs for part in _fresh_pair(site, config)]
    return [*kept, *biases, *tokens, *pairs]


def _require_no_tied_pairs(modules: Modules, config: Config, sites: Sites, where: str) -> None:
    tied = [name for name in tied_to(modules, input_embedding(modules)) if name in sites.depths]
    if config["ensure_weight_tying"] and tied:
        raise AdapterError(
            f"{where}: ensure_weight_tying: a pair of its own for {tied[0]} would not stay equal to the embedding's. "
            "Leave it to the embedding alone, or use modules_to_save."
        )


def _fresh_pair(site: Site, config: Config) -> Iterator[Part]:
    try:
        if config["use_dora"]:
            magnitude_shape(site.layout, site.host, site.param)
        if config["lora_bias"] and not _has_bias(site, config):
            yield _output_bias(site)
        yield begun_part(site, _start(site, config))
    except AdapterError as error:
        raise AdapterError(f"{site.key}: {error}") from None


def _with_bias(modules: Modules, config: Config, sites: Sites) -> Iterator[str]:
    """`bias` "lora_only": of the adapted layers; "all": of every layer. `lora_bias` says the first in other words."""
    wanted = config["bias"] if config["bias"] != "none" else "lora_only" if config["lora_bias"] else "none"
    if wanted == "none":
        return
    inside = tuple(f"{name}." for name in modules_kept(modules, config))
    for name, module in modules.by_name.items():
        has = module._parameters.get("bias") is not None
        if has and (wanted == "all" or name in sites.depths) and not f"{name}.".startswith(inside):
            yield name


def _start(site: Site, config: Config) -> Start:
    said = str(config["init_lora_weights"]).lower()
    start = _STARTS.get(said, "kaiming")
    if start in _FOR_LINEAR and isinstance(site.layout, Looked):
        start = "kaiming"
    plain = site.param == "weight" and is_linear(site.layout) and not config["use_dora"]
    if start in _FOR_LINEAR and (not plain or (start == "olora" and is_transposed_linear(site.host))):
        raise AdapterError(f"init_lora_weights={said!r} is for Linear layers and plain LoRA. Narrow the targets.")
    return Start(config["use_rslora"], config["use_dora"], config["lora_dropout"], start)


def _require_known_start(config: Config, where: str) -> None:
    start = str(config["init_lora_weights"]).lower()
    if start.startswith(_MOVES_THE_BASE):
        raise AdapterError(
            f"{where}: init_lora_weights={start!r} moved the base weights, and nothing here says by how much. Save it "
            "in peft with path_initial_model_for_weight_conversion, which makes it a plain LoRA."
        )


def _pair(site: Site, config: Config, tensors: FileTensors, layout: str | None) -> Iterator[Part]:
    site = _as_written(site, config, tensors, layout)
    shapes = site.layout.shapes(site.rank)
    keys = [f"{PREFIX}{site.path}.{name}" for name in site.layout.names]
    A, B = (_whole(tensors, key, shape, config) for key, shape in zip(keys, shapes, strict=True))
    if config["lora_bias"]:
        yield _bias_of_pair(site, config, tensors)
    if isinstance(site.host, nn.MultiheadAttention) and not A.count_nonzero() and not B.count_nonzero():
        return  # how a half that is not adapted is written: peft always adapts both
    yield _filled(site, config, tensors, A, B, _magnitude(site, tensors) if config["use_dora"] else None)


def _whole(tensors: FileTensors, key: str, shape: Shape, config: Config) -> Tensor:
    """BD-LoRA writes the blocks of a block-diagonal factor under one another."""
    blocks = (config["use_bdlora"] or {}).get("nblocks", 1)
    narrow = (shape[0], shape[1] // blocks)
    if blocks == 1 or tensors.shapes.get(key) != list(narrow) or any(size % blocks for size in shape):
        return tensors.take(key, shape)
    return torch.block_diag(*tensors.take(key, narrow).chunk(blocks))


def _filled(
    site: Site, config: Config, tensors: FileTensors, A: Tensor, B: Tensor, magnitude: Tensor | None = None
) -> Part:
    try:
        return filled_part(site, _start(site, config), A, B, magnitude)
    except AdapterError as error:
        raise AdapterError(f"{tensors.where}: {site.key}: {error}") from None


def _as_written(site: Site, config: Config, tensors: FileTensors, layout: str | None) -> Site:
    """The stacks of experts in the layout of who wrote the file."""
    stack = site.layout
    if not isinstance(stack, Stacked):
        return site
    found = tuple(tensors.shapes.get(f"{PREFIX}{site.path}.{stack.names[0]}", ()))
    try:
        return site._replace(layout=Writer(config, layout).reading(stack, site.rank, found, site.at[1]))
    except AdapterError as error:
        raise AdapterError(f"{tensors.where}: {site.key}: {error}") from None


def _magnitude(site: Site, tensors: FileTensors) -> Tensor:
    stem = f"{PREFIX}{site.path}.{MAGNITUDE}"
    key = f"{stem}.weight" if f"{stem}.weight" in tensors.left else stem
    return tensors.take(key, magnitude_shape(site.layout, site.host, site.param))


def _has_bias(site: Site, config: Config) -> bool:
    if config["use_dora"] or site.param != "weight" or isinstance(site.layout, Looked):
        raise AdapterError("lora_bias is for plain LoRA on Linear and convolutions. Use lora_bias=False.")
    return isinstance(getattr(site.host, "bias", None), Tensor)


def _output_bias(site: Site) -> Part:
    return Part(site.host_name, site.host, OutputBias, {})


def _bias_of_pair(site: Site, config: Config, tensors: FileTensors) -> Part:
    """peft scales the bias of its B: together with the layer's own, it is a bias."""
    try:
        has_bias = _has_bias(site, config)
    except AdapterError as error:
        raise AdapterError(f"{tensors.where}: {site.key}: {error}") from None
    _, (out, *_) = site.layout.shapes(site.rank)
    extra = tensors.take(f"{PREFIX}{site.path}.{SUFFIX}", (out,))
    extra = scale_of(site.alpha, site.rank, config["use_rslora"]) * extra
    if not has_bias:
        return _output_bias(site)._replace(tensors={"bias": extra})
    bias: Any = site.host.bias
    learned = f"{PREFIX}{site.path}.base_layer.bias"
    own = tensors.take(learned, bias.shape) if learned in tensors.left else bias.detach()
    return Part(site.host_name, site.host, Full, {"params": ["bias"]}, {"bias": own + extra.to(own)})


def kept_parts(
    modules: Modules, config: Config, sites: Sites, tensors: FileTensors | None, prefix: str = PREFIX
) -> list[Part]:
    """`modules_to_save`: whole modules, with the file's tensors, or fresh."""
    names = modules_kept(modules, config)
    adapted = sorted(each for each in sites.depths if f"{each}.".startswith(tuple(f"{name}." for name in names)))
    if adapted:
        raise AdapterError(
            f"{adapted[0]}: it is adapted and trained whole (modules_to_save) at once, which peft refuses. Name it "
            "once."
        )
    if tensors is None:
        return [fresh_copy(modules, name) for name in names]
    return [_kept(modules, name, f"{prefix}{sites.path(name)}", tensors) for name in names]


def _kept(modules: Modules, name: str, stem: str, tensors: FileTensors) -> Part:
    fresh, inner = fresh_copy(modules, name), modules.place(name, whole=True).inner
    aliases = Full(fresh.host, **fresh.config).aliases
    found: dict[str, Tensor] = {}
    for first, names in aliases.items():
        for alias in names:
            leaf = alias.removeprefix(f"{inner}.") if inner else alias
            found.setdefault(first, _kept_tensor(stem, leaf, weight_of(fresh.host, first), tensors))
    return fresh._replace(tensors=found)


def _kept_tensor(stem: str, leaf: str, weight: Tensor, tensors: FileTensors) -> Tensor:
    value = tensors.take(f"{stem}.{leaf}", weight.shape)
    original, again = f"{stem}.original_module.{leaf}", f"{stem}.modules_to_save.{leaf}"
    if original in tensors.left:  # with bias="all" peft writes the bias that is not in use too
        tensors.take(original, weight.shape)
    if again in tensors.left and not torch.equal(tensors.take(again, weight.shape), value):
        raise AdapterError(f"{tensors.where}: {again} is not {stem}.{leaf}. Save it again from its model.")
    return value


def fresh_copy(modules: Modules, name: str, params: Any = None) -> Part:
    host_name, host, inner, _ = modules.place(name, whole=params is None)
    (keywords,) = Full.split(host, inner, {} if params is None else {"params": [params]})
    return Part(host_name, host, Full, keywords)


def _replaced(modules: Modules, sites: Sites, tensors: FileTensors) -> Iterator[Part]:
    """Learned biases, and the embeddings that peft writes along; those that are the base's own say nothing."""
    for name, module in modules.by_name.items():
        for leaf, weight in module.named_parameters(recurse=False):
            key = f"{PREFIX}{sites.path(name)}.{leaf}" if name else f"{PREFIX}{leaf}"
            if key not in tensors.left or leaf not in ("weight", "bias"):
                continue
            if leaf == "weight" and not _is_embedding(modules.model, module):
                continue
            value = tensors.take(key, weight.shape)
            if leaf == "bias" or not torch.equal(value.to(weight), weight):
                host_name, host, inner, _ = modules.place(name)
                param = f"{inner}.{leaf}".lstrip(".")
                yield Part(host_name, host, Full, {"params": [param]}, {param: value})


def _is_embedding(model: nn.Module, module: nn.Module) -> bool:
    head_of: Any = getattr(model, "get_output_embeddings", None)
    return isinstance(module, nn.Embedding) or (head_of is not None and head_of() is module)

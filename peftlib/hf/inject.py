"""Fresh adapters as a configuration of HF peft asks for them."""

from collections.abc import Iterator

from torch import nn

from .._core.inject import Part
from .._core.walk import candidates
from .._errors import AdapterError
from ..kinds.dora import DoRA
from ..kinds.lora import LoRA
from .config import Config
from .lora_layouts import magnitude_shape
from .lora_read import fresh_copy, keywords_of, require_known_start
from .lora_sites import Site, Sites, sites_of
from .targets import modules_kept
from .token_rows import token_parts

_STARTS = {"true": "kaiming", "gaussian": "gaussian", "pissa": "pissa"}


def fresh_lora(model: nn.Module, config: Config, where: str) -> list[Part]:
    require_known_start(config, where)
    start = str(config["init_lora_weights"]).lower()
    if start not in _STARTS:
        raise AdapterError(
            f"{where}: init_lora_weights={start!r} has no counterpart here (there is one for true, gaussian, pissa). "
            "Change it, or start in peft and load what it saves."
        )
    sites, by_name = sites_of(model, config), dict(candidates(model))
    whole = modules_kept(model, config)
    kept = [fresh_copy(model, name, by_name[name]) for name in whole]
    biases = [fresh_copy(model, name, by_name[name], "bias") for name in _with_bias(by_name, whole, config, sites)]
    tokens = token_parts(model, config, sites, None)
    return [*kept, *biases, *tokens, *(_pair(site, config, _STARTS[start]) for site in sites.pairs)]


def _pair(site: Site, config: Config, start: str) -> Part:
    try:
        rank = site.layout.rank_here(site.rank)
        if config["use_dora"]:
            magnitude_shape(site.layout, site.host, site.param)
    except AdapterError as error:
        raise AdapterError(f"{site.key}: {error}") from None
    keywords = keywords_of(site, config, rank)
    if keywords["init"] != "pissa":
        keywords["init"] = start if start != "pissa" else "kaiming"
    return Part(site.host_name, site.host, DoRA if config["use_dora"] else LoRA, keywords)


def _with_bias(by_name: dict[str, nn.Module], whole: list[str], config: Config, sites: Sites) -> Iterator[str]:
    """`bias` "lora_only": of the adapted layers; "all": of every layer. `lora_bias` says the first in other words."""
    wanted = config["bias"] if config["bias"] != "none" else "lora_only" if config["lora_bias"] else "none"
    if wanted == "none":
        return
    inside = tuple(f"{name}." for name in whole)
    for name, module in by_name.items():
        has = module._parameters.get("bias") is not None
        if has and (wanted == "all" or name in sites.depths) and not f"{name}.".startswith(inside):
            yield name

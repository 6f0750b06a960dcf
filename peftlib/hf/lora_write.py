"""From adapters here to the configuration and the tensors of a LoRA of HF peft."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .._core.adapter import Adapter
from .._core.override import weight_of
from .._core.walk import candidates
from .._errors import AdapterError
from ..kinds.dora import DoRA
from ..kinds.full import Full
from ..kinds.lora import LoRA
from .config import Config
from .lora_export import Pair, described, pair_of, served
from .lora_read import MAGNITUDE
from .lora_sites import PREFIX, Sites, sites_of
from .modules_to_save import Copies, Found, Own, Tensors, copies_of, kept_tensors, require_exactly_kept
from .targets import module_target, parameters_named
from .token_rows import rows_of, token_config, token_tensors


def lora_files(model: nn.Module, found: Found, target: str) -> tuple[Config, Tensors]:
    """The configuration and the tensors by their keys."""
    names = {id(module): module_name for module_name, module in candidates(model)}
    pairs = {pair.at: pair for host, each in found if (pair := _pair(names, host, each))}
    rows = {one[0]: one[1:] for host, each in found if (one := rows_of(names, host, each))}
    copies = [(host, each) for host, each in found if rows_of(names, host, each) is None]
    own, kept = copies_of(names, copies, {pair.module for pair in pairs.values()})
    if target != "peft":
        _require_served(target, [*kept, *rows, *map(".".join, own)])
        pairs = served(pairs, target)
    config = _config(model, list(pairs.values()), kept) | {"trainable_token_indices": token_config(model, rows)}
    sites = sites_of(model, config)
    tensors = _pair_tensors(sites, pairs) | _own_tensors(sites, own) | kept_tensors(sites, kept)
    return {**config, "bias": _bias(own, sites)}, tensors | token_tensors(sites, rows, config)


def _pair(names: dict[int, str], host: nn.Module, adapter: Adapter) -> Pair | None:
    if isinstance(adapter, LoRA) and type(adapter) in (LoRA, DoRA):
        return pair_of(names, host, adapter)
    if type(adapter) is Full:
        return None
    raise AdapterError(
        f"{names[id(host)] or 'the root'}: a file of LoRA has no place for {type(adapter).__name__}. "
        "Save it under a name of its own, or with peftlib.save."
    )


def _config(model: nn.Module, pairs: list[Pair], kept: Copies) -> Config:
    config: Config = {
        "peft_type": "LORA",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_bias": False,
        "exclude_modules": None,
        "modules_to_save": sorted(kept) or None,
        **described(pairs),
    }
    config["target_modules"] = module_target(model, config, [pair.module for pair in pairs if pair.by_module])
    require_exactly_kept(model, config, kept)
    named = {f"{at}.{leaf}" for at, leaves in parameters_named(model, config).items() for leaf in leaves}
    also = sorted(named - set(config["target_parameters"] or ()))
    if also:
        raise AdapterError(
            f"{', '.join(also[:4])}: peft adapts every parameter whose name ends like the chosen ones, this one too. "
            "Put LoRA on it as well."
        )
    return config


def _pair_tensors(sites: Sites, pairs: dict[tuple[str, str], Pair]) -> Tensors:
    tensors: Tensors = {}
    for site in sites.pairs:
        pair = pairs.get((site.host_name, site.param))
        A, B = (pair.A, pair.B) if pair else _zeros(site)
        tensors |= dict(zip((f"{PREFIX}{site.path}.{name}" for name in site.layout.names), (A, B), strict=True))
        if pair and pair.magnitude is not None:
            tensors[f"{PREFIX}{site.path}.{MAGNITUDE}"] = pair.magnitude
    return tensors


def _zeros(site: Any) -> Iterator[Tensor]:
    """peft adapts both halves of an attention: the other one gets a pair of zeros."""
    weight = weight_of(site.host, site.param)
    return (weight.new_zeros(shape) for shape in site.layout.shapes(site.rank))


def _own_tensors(sites: Sites, own: Own) -> Tensors:
    return {f"{PREFIX}{sites.path(name)}.{leaf}": value for (name, leaf), value in own.items()}


def _bias(own: Own, sites: Sites) -> str:
    names = {name for name, leaf in own if leaf == "bias"}
    if not names:
        return "none"
    return "lora_only" if names <= sites.depths.keys() else "all"


def _require_served(target: str, copied: list[str]) -> None:
    if copied:
        raise AdapterError(f"{', '.join(copied[:4])}: {target} serves low-rank pairs alone, no copies. Merge instead.")

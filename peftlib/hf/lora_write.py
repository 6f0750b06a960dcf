"""From adapters here to the configuration and the tensors of a LoRA of HF peft."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._core.adapter import Adapter
from .._core.override import owner_of, weight_of
from .._core.walk import candidates
from .._errors import AdapterError
from ..kinds._low_rank import low_rank_branch_of
from ..kinds._weight_layout import is_transposed_linear
from ..kinds.dora import DoRA
from ..kinds.full import Full
from ..kinds.lora import LoRA
from .config import Config, plain
from .lora_layouts import Layout, Looked, is_linear, layout_of, magnitude_shape
from .lora_read import MAGNITUDE
from .lora_sites import PREFIX, Sites, sites_of
from .modules_to_save import Copies, Found, Own, Tensors, copies_of, kept_tensors, require_exactly_kept
from .refusals import is_module_target
from .targets import exact_patterns, module_target, parameters_named
from .token_rows import rows_of, token_config, token_tensors


class Pair(NamedTuple):
    """`module` is its name in the model, `at` with the weight's name in it; `key` is what patterns match; rank and
    scale are those in the file."""

    module: str
    at: tuple[str, str]
    key: str
    host: nn.Module
    param: str
    layout: Layout
    A: Tensor
    B: Tensor
    magnitude: Tensor | None
    rank: int
    alpha: float
    stabilized: bool
    dropout: float | None

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.stabilized else self.rank)

    @property
    def by_module(self) -> bool:
        return is_module_target(self.host, self.param)


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


_SERVED = {
    "vllm": "vLLM serves pairs of Linear layers alone",
    "llama.cpp": "llama.cpp converts pairs of matrices alone",
}


def pair_of(names: dict[int, str], host: nn.Module, adapter: LoRA) -> Pair:
    owner, leaf = owner_of(host, adapter.param)
    of_attention = isinstance(host, nn.MultiheadAttention) and is_module_target(host, adapter.param)
    module = names[id(host if of_attention else owner)]
    try:
        layout = layout_of(host, adapter.param)
        magnitude = _magnitude(layout, host, adapter)
    except AdapterError as error:
        raise AdapterError(f"{module or 'the root'}: {error}") from None
    if not module:
        raise AdapterError("the root: peft puts adapters into named modules alone. Wrap the model in a module.")
    A, B, rank = adapter.lora_A.detach(), adapter.lora_B.detach(), adapter.rank
    if adapter.init == "pissa":
        A, B, rank = _as_change(adapter, layout), torch.cat([B, -adapter.initial_B], layout.rank_dim + 1), 2 * rank
    there = layout.rank_there(rank)
    kept = there == adapter.rank
    alpha = (adapter.config["alpha"] if kept else adapter.scale * there) / layout.times
    stabilized = kept and adapter.config["rank_stabilized"]
    by_module = is_module_target(host, adapter.param)
    drops = by_module and low_rank_branch_of(host, adapter.param) is not None and not isinstance(layout, Looked)
    return Pair(
        module, (module, adapter.param if of_attention else leaf),
        module if by_module else f"{module}.{leaf}", host, adapter.param, layout, *layout.write(A, B),
        magnitude, there, alpha, stabilized, adapter.dropout if drops else None,
    )  # fmt: skip


def _as_change(adapter: LoRA, layout: Layout) -> Tensor:
    """What trained since the start, BA less its first value, is a pair of twice the rank."""
    return torch.cat([adapter.lora_A.detach(), adapter.initial_A], layout.rank_dim)


def _magnitude(layout: Layout, host: nn.Module, adapter: LoRA) -> Tensor | None:
    if not isinstance(adapter, DoRA):
        return None
    return adapter.magnitude.detach().reshape(magnitude_shape(layout, host, adapter.param))


def described(pairs: Collection[Pair]) -> Config:
    """What the configuration says of the pairs: ranks and scales, with patterns where they differ, and flags."""
    stabilized = bool(pairs) and all(pair.stabilized for pair in pairs)
    alphas = {p.key: p.alpha if p.stabilized == stabilized else p.scale * p.rank for p in pairs}
    ranks = {pair.key: pair.rank for pair in pairs}
    for pair in pairs:
        _require_one_for_both(pair, ranks, alphas, stabilized)
    by_parameter = [pair.key for pair in pairs if not pair.by_module]  # peft warns of a pattern that is for these alone
    rank, alpha = (_most({k: of[k] for k in by_parameter} or of) for of in (ranks, alphas))
    return {
        "r": rank or 8,
        "lora_alpha": plain(alpha or 8),
        "rank_pattern": exact_patterns(ranks, rank),
        "alpha_pattern": {key: plain(value) for key, value in exact_patterns(alphas, alpha).items()},
        "use_rslora": stabilized,
        "use_dora": _all_or_none([pair.magnitude is not None for pair in pairs]),
        "lora_dropout": _dropout(pairs),
        "fan_in_fan_out": any(is_transposed_linear(pair.host) for pair in pairs),
        "target_parameters": sorted(pair.key for pair in pairs if not pair.by_module) or None,
    }


def _most(of: dict[str, Any]) -> Any:
    return Counter(of.values()).most_common(1)[0][0] if of else None


def _require_one_for_both(pair: Pair, ranks: dict[str, int], alphas: dict[str, float], stabilized: bool) -> None:
    """peft adapts both halves of an attention, with one rank and one alpha."""
    alpha = pair.alpha if pair.stabilized == stabilized else pair.scale * pair.rank
    if ranks[pair.key] != pair.rank or alphas[pair.key] != alpha:
        raise AdapterError(
            f"{pair.key}: in_proj and out_proj have different ranks or scales, and peft has one for both. "
            "Adapt them with the same rank and alpha."
        )


def _all_or_none(flags: list[bool]) -> bool:
    if len(set(flags)) > 1:
        raise AdapterError("DoRA and LoRA under one name: peft has one kind for all layers. Save them under two names.")
    return any(flags)


def _dropout(pairs: Iterable[Pair]) -> float:
    found = sorted({pair.dropout for pair in pairs if pair.dropout is not None})
    if len(found) > 1:
        raise AdapterError(f"dropout: the layers have {found}, and peft has one for all. Use one, or several names.")
    by_parameter = [pair.key for pair in pairs if not pair.by_module]
    if any(found) and by_parameter:
        raise AdapterError(
            f"dropout={found[0]}: peft refuses dropout beside target_parameters ({by_parameter[0]}). Use dropout=0."
        )
    return found[0] if found else 0.0


def served(pairs: dict[Any, Pair], target: str) -> dict[Any, Pair]:
    """With one rank and one scale for all, as these tools read them: what differs goes into B."""
    for pair in pairs.values():
        if not is_linear(pair.layout) or not pair.by_module or isinstance(pair.host, nn.MultiheadAttention):
            raise AdapterError(f"{pair.key}: {_SERVED[target]}, not {type(pair.host).__name__}. Merge it instead.")
        if pair.magnitude is not None:
            raise AdapterError(f"{pair.key}: {target} has no DoRA. Merge it instead.")
    if len({(pair.rank, pair.scale) for pair in pairs.values()}) < 2 and not any(p.stabilized for p in pairs.values()):
        return pairs
    rank = max(pair.rank for pair in pairs.values())
    return {at: _baked(pair, rank) for at, pair in pairs.items()}


def _baked(pair: Pair, rank: int) -> Pair:
    A, B = (tensor.new_zeros(shape) for tensor, shape in zip((pair.A, pair.B), pair.layout.shapes(rank), strict=True))
    A[: pair.rank], B[:, : pair.rank] = pair.A, pair.scale * pair.B
    return pair._replace(A=A, B=B, rank=rank, alpha=rank, stabilized=False)

"""From adapters here to the configuration and the tensors of a LoRA of HF peft."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from .._core.override import owner_of, weight_of
from .._errors import AdapterError
from ..kinds._weight_layout import is_transposed_linear
from .config import Config, plain
from .experts import experts_written, require_no_other_name, require_one_rank_and_scale
from .lora_bias import SUFFIX, OutputBias
from .lora_layouts import Stacked, is_linear
from .lora_pairs import MAGNITUDE, Pair, pairs_of
from .lora_sites import PREFIX, Sites, sites_of
from .modules import Modules
from .modules_to_save import Copies, Found, Own, Tensors, copies_of, kept_tensors, require_exactly_kept, with_heads
from .refusals import class_of
from .stacks import BY_EXPERT, ORDER, VERSIONS, written_as
from .targets import NOTHING, exact_patterns, module_target, parameters_named
from .token_rows import rows_of, token_config, token_tensors

Pairs = dict[Any, Pair]  # by the module's name and the weight's in it


def lora_files(modules: Modules, found: Found, target: str = "peft", task: str | None = None) -> tuple[Config, Tensors]:
    """The configuration and the tensors by their keys."""
    pairs = {pair.at: pair for pair in pairs_of(modules, found)}
    rows = {one[0]: one[1:] for host, each in found if (one := rows_of(modules, host, each))}
    copies = [(host, each) for host, each in found if rows_of(modules, host, each) is None]
    own, kept = copies_of(modules, copies, {pair.module for pair in pairs.values()})
    kept = with_heads(modules, task, kept, [pair.module for pair in pairs.values()])
    biases = _learned_biases(modules, found)
    if target in _ONE_SCALE:
        _require_served(target, [*kept, *rows, *biases, *map(".".join, own)])
    pairs, stacks = _for_target(pairs, target)
    config = _config(modules, list(pairs.values()), kept, stacks)
    config |= {"trainable_token_indices": token_config(modules, rows)}
    sites = sites_of(modules, config)
    tensors = _pair_tensors(sites, pairs) | _own_tensors(sites, own) | kept_tensors(sites, kept)
    tensors |= _bias_tensors(sites, pairs, biases) | token_tensors(sites, rows, config)
    config |= {"bias": _bias(own, sites), "lora_bias": bool(biases)}
    return _with_experts(config, tensors, pairs.values(), stacks, target)


def _for_target(pairs: Pairs, target: str) -> tuple[Pairs, list[Pair]]:
    """The pairs as the target has them, and, apart, those of experts that it has under keys of their own."""
    if target in _SERVED:
        return served(pairs, target), []
    if target in VERSIONS:
        return {at: _laid_out(pair, target) for at, pair in pairs.items()}, []
    one_scale = target in _ONE_SCALE
    if one_scale:
        pairs = {at: pair._replace(alpha=pair.scale * pair.rank, stabilized=False) for at, pair in pairs.items()}
    stacks = [pair for pair in pairs.values() if isinstance(pair.layout, Stacked)]
    others = {at: pair for at, pair in pairs.items() if not isinstance(pair.layout, Stacked)}
    if one_scale:
        _require_linear(others.values(), target)
    require_one_rank_and_scale(list(pairs.values()) if one_scale else stacks, target)
    require_no_other_name(stacks, list(others.values()), target)
    return others, stacks


def _laid_out(pair: Pair, target: str) -> Pair:
    if not isinstance(pair.layout, Stacked) or target == "peft":
        return pair
    A, B = written_as(pair.layout, target).write(*pair.layout.read(pair.A, pair.B))
    return pair._replace(A=A, B=B)


def _with_experts(
    config: Config, tensors: Tensors, pairs: Collection[Pair], stacks: list[Pair], target: str
) -> tuple[Config, Tensors]:
    if target == "unsloth":
        config = {**config, ORDER: BY_EXPERT}
    if not stacks:
        return config, tensors
    names, own = experts_written(stacks, target)
    named: Any = config["target_modules"]
    if isinstance(named, str):
        named = [] if named == NOTHING else [pair.module for pair in pairs if pair.by_module]
    return {**config, "target_modules": [*named, *names]}, tensors | own


def _config(modules: Modules, pairs: list[Pair], kept: Copies, stacks: list[Pair]) -> Config:
    config: Config = {
        "peft_type": "LORA",
        "inference_mode": True,
        "init_lora_weights": True,
        "exclude_modules": None,
        "modules_to_save": sorted(kept) or None,
        **described(pairs, stacks),
    }
    config["target_modules"] = module_target(modules, config, [pair.module for pair in pairs if pair.by_module])
    require_exactly_kept(modules, config, kept)
    named = {f"{at}.{leaf}" for at, leaves in parameters_named(modules, config).items() for leaf in leaves}
    also = sorted(named - set(config["target_parameters"] or ()))
    if also:
        raise AdapterError(
            f"{', '.join(also[:4])}: peft adapts every parameter whose name ends like the chosen ones, this one too. "
            "Put LoRA on it as well."
        )
    return config


def _pair_tensors(sites: Sites, pairs: Pairs) -> Tensors:
    tensors: Tensors = {}
    for site in sites.pairs:
        pair = pairs.get(site.at)
        A, B = (pair.A, pair.B) if pair else _zeros(site)
        tensors |= dict(zip((f"{PREFIX}{site.path}.{name}" for name in site.layout.names), (A, B), strict=True))
        if pair and pair.magnitude is not None:
            tensors[f"{PREFIX}{site.path}.{MAGNITUDE}"] = pair.magnitude
    return tensors


def _zeros(site: Any) -> Iterator[Tensor]:
    """peft adapts both halves of an attention: the other one gets a pair of zeros."""
    weight = weight_of(site.host, site.param)
    return (weight.new_zeros(shape) for shape in site.layout.shapes(site.rank))


def _learned_biases(modules: Modules, found: Found) -> dict[str, Tensor]:
    return {modules.name_of[id(host)]: one.bias.detach() for host, one in found if isinstance(one, OutputBias)}


def _bias_tensors(sites: Sites, pairs: Pairs, biases: dict[str, Tensor]) -> Tensors:
    """peft scales the bias of B, and has one for every pair or for none."""
    if not biases:
        return {}
    alone = sorted(biases.keys() - {pair.module for pair in pairs.values()})
    other = [p.key for p in pairs.values() if p.magnitude is not None or p.param != "weight" or not p.by_module]
    if alone or other:
        raise AdapterError(
            f"{(alone or other)[0]}: peft has lora_bias beside plain LoRA on modules alone. Save it under another name."
        )
    tensors: Tensors = {}
    for site in sites.pairs:
        pair = pairs[site.at]
        none = pair.B.new_zeros(len(pair.B))
        tensors[f"{PREFIX}{site.path}.{SUFFIX}"] = biases.get(pair.module, none) / pair.scale
    return tensors


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
_ONE_SCALE = (*_SERVED, "sglang", "automodel")


def described(pairs: Collection[Pair], stacks: Collection[Pair] = ()) -> Config:
    """What the configuration says of the pairs: ranks and scales, with patterns where they differ, and flags. Those of
    `stacks` are not in it by name: what it says of all is theirs."""
    every = [*pairs, *stacks]
    stabilized = bool(every) and all(pair.stabilized for pair in every)
    alphas = {p.key: p.alpha if p.stabilized == stabilized else p.scale * p.rank for p in every}
    ranks = {pair.key: pair.rank for pair in every}
    for pair in pairs:
        _require_one_for_both(pair, ranks, alphas, stabilized)
    by_parameter = [
        pair.key for pair in stacks or pairs if not pair.by_module
    ]  # peft warns of a pattern that is for these alone
    rank, alpha = (_most({k: of[k] for k in by_parameter} or of) for of in (ranks, alphas))
    return {
        "r": rank or 8,
        "lora_alpha": plain(alpha or 8),
        "rank_pattern": exact_patterns(ranks, rank),
        "alpha_pattern": {key: plain(value) for key, value in exact_patterns(alphas, alpha).items()},
        "use_rslora": stabilized,
        "use_dora": _all_or_none([pair.magnitude is not None for pair in every]),
        "lora_dropout": _dropout(pairs),
        "fan_in_fan_out": any(is_transposed_linear(owner_of(pair.host, pair.param)[0]) for pair in pairs),
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


def served(pairs: Pairs, target: str) -> Pairs:
    """With one rank and one scale for all, as these tools read them: what differs goes into B."""
    _require_linear(pairs.values(), target)
    if len({(pair.rank, pair.scale) for pair in pairs.values()}) < 2 and not any(p.stabilized for p in pairs.values()):
        return pairs
    rank = max(pair.rank for pair in pairs.values())
    return {at: _baked(pair, rank) for at, pair in pairs.items()}


def _require_linear(pairs: Iterable[Pair], target: str) -> None:
    for pair in pairs:
        if not is_linear(pair.layout) or not pair.by_module or isinstance(pair.host, nn.MultiheadAttention):
            said = _SERVED.get(target, f"{target} has pairs of Linear layers and of experts alone")
            raise AdapterError(f"{pair.key}: {said}, not {class_of(pair.host)}. Merge it instead.")
        if pair.magnitude is not None:
            raise AdapterError(f"{pair.key}: {target} has no DoRA. Merge it instead.")


def _baked(pair: Pair, rank: int) -> Pair:
    A, B = (tensor.new_zeros(shape) for tensor, shape in zip((pair.A, pair.B), pair.layout.shapes(rank), strict=True))
    A[: pair.rank], B[:, : pair.rank] = pair.A, pair.scale * pair.B
    return pair._replace(A=A, B=B, rank=rank, alpha=rank, stabilized=False)

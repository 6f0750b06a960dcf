"""Tiny configurations: from the defaults of any configuration class, by rules on the names of its numbers."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

VOCABULARY = 96


@dataclass(frozen=True)
class Recipe:
    """`width` features in `heads` heads; 0 divides every width by `divisor`, which keeps what divides what."""

    name: str
    width: int = 32
    heads: int = 4
    groups: int = 2
    image: int = 32
    patch: int = 8
    depth: int = 2
    divisor: int = 1
    filled: bool = False  # what is None by default has a value, where a name is known

    @property
    def head(self) -> int:
        return self.width // self.heads


RECIPES = [
    Recipe("uniform"),
    Recipe("one group", groups=4, image=64, patch=16),
    Recipe("wide heads", width=64, heads=2, groups=2, image=64, patch=16, depth=4),
    Recipe("an eighth", width=0, image=64, patch=16, divisor=8),
    Recipe("a quarter, large image", width=0, image=224, patch=32, divisor=4, depth=4),
    Recipe("shallow", width=0, image=224, patch=32),
    Recipe("nothing left out", filled=True),
]

Rule = tuple[str, Callable[[Any, Recipe], Any]]


def _bounded(limit: int) -> Callable[[Any, Recipe], Any]:
    return lambda value, recipe: min(value, limit)


def _width(factor: int) -> Callable[[Any, Recipe], Any]:
    def sized(value: int, recipe: Recipe) -> int:
        if not recipe.width:
            return value if value < 4 * recipe.divisor else max(4, value // recipe.divisor)
        return factor * recipe.width if value > 4 else value

    return sized


def _heads(kind: str) -> Callable[[Any, Recipe], Any]:
    return lambda value, recipe: min(value, getattr(recipe, kind)) if recipe.width else value


def _head_width(value: int, recipe: Recipe) -> int:
    return recipe.head if recipe.width else max(4, value // recipe.divisor)


def _kept(value: int, recipe: Recipe) -> int:
    return value


_WIDE = (
    r"(hidden|embed|embedding|emb|proj|projection|model|output|feature|fusion|channels?|attn|encoder|decoder|conv|latent"
    r"|lru|visual_feat|resampler)_?(size|dim|width|sizes|dims)?$|^d_model$|^n_embd$|^dim$|_dim$|_channels$"
)
# The first rule whose pattern is found in a name gives the number. What no rule knows stays.
RULES: list[Rule] = [
    (r"vocab", _bounded(VOCABULARY)),
    (r"^num_(labels|mel_bins|channels|feat_extract_layers)|kernel|stride|dilation|window_size$", _kept),
    (r"^num_.*(points|levels)$", _kept),
    (r"chunk_size$", _bounded(8)),
    (r"^rescale_every$", lambda v, r: 1),  # RWKV's, which a small model would never come to
    (r"^num_pos_feats$", lambda v, r: r.width // 2 or v),
    (r"^image_embedding_size$", lambda v, r: r.image // r.patch),
    (r"(image|img|crop|resolution|input_resolution|pretrain_image)_?size$|^resolution$", lambda v, r: min(v, r.image)),
    (r"patch_size$", lambda v, r: min(v, r.patch)),
    (r"(max_|n_)(.*_)?(position|positions|ctx|length|len)|max_pos|max_.*_positions", _bounded(128)),
    (r"experts_per_tok|moe_topk|moe_top_k|num_experts_per|^moe_k$", _bounded(2)),
    (r"^attn_layer_period$", _bounded(2)),  # of Jamba, with the next: its second layer is an attention
    (r"^attn_layer_offset$", _bounded(1)),
    (r"^n_group$|topk_group|num_expert_group", _bounded(1)),
    (r"(num|n|routed|local).*experts$|^num_experts|moe_num_experts", _bounded(4)),
    (r"first_k_dense|dense_layers", _bounded(1)),
    (r"lora_rank|time_step_rank|state_size|d_state|mamba_(d_head|head_?dim)", _bounded(8)),
    (r"mamba_(n_|num_)?heads", lambda v, r: 2 * r.width // 8 or v),  # twice the width, in heads of 8
    (r"^n_groups$|mamba_n_?groups", _bounded(1)),
    (r"(kv|key_value)_.*heads?$|kv_heads", _heads("groups")),
    (r"(^|_)n?u?m?_?(attention_)?heads$|^n_head$", _heads("heads")),
    (r"^attention_hidden_size$", _width(2)),  # Zamba's: two streams
    (r"^attention_head_dim$", lambda v, r: 2 * r.head or v),
    (r"^qk_head_dim$", lambda v, r: 2 * _head_width(v, r) if r.width else _head_width(v, r)),  # with and without rope
    (r"head_(dim|size)$|^dim_head$|^d_kv$|d_head$", _head_width),
    (r"(^|_)(layers?|depth|blocks)$|^n_layer$|^layers$|layers?_num$", lambda v, r: min(v, r.depth)),
    (r"num_queries|num_latents|query_tokens|n_latents", _bounded(8)),
    (r"intermediate|ffn|mlp_dim|d_ff|feed_?forward", _width(2)),
    (_WIDE, _width(1)),
]
_DEPTHS = r"^depths?$|layers$|^num_.*blocks|blocks_per_stage|numb_of_layers"
_NEEDED = {
    "vocab_size": VOCABULARY,
    "prediction_length": 8,
    "attn_layer_indices": [1],
}  # of None by default, where a model cannot do without
_FILLS: dict[str, Callable[[Recipe], Any]] = {
    "head_dim": lambda r: r.head,
    "num_key_value_heads": lambda r: r.groups,
    "n_routed_experts": lambda r: 4,
    "n_shared_experts": lambda r: 1,
    "num_experts": lambda r: 4,
    "num_local_experts": lambda r: 4,
    "num_experts_per_tok": lambda r: 2,
    "n_group": lambda r: 1,
    "topk_group": lambda r: 1,
    "first_k_dense_replace": lambda r: 1,
    "moe_intermediate_size": lambda r: 2 * r.width,
    "shared_expert_intermediate_size": lambda r: 2 * r.width,
    "layer_types": lambda r: ["full_attention"] * r.depth,
    "pad_token_id": lambda r: 0,
}
_TOKENS = (
    r"(token|bos|eos|pad|start|end|mask|sep|cls|image|video|audio)_(ids?|index)$|_token_(id|index)s?$|fixing_codes$"
)


def tiny(cls: type[PreTrainedConfig], recipe: Recipe, **more: Any) -> PreTrainedConfig:
    """A configuration of the class; the sizes of the configurations inside it follow the same recipe."""
    return cls(**_arguments(cls(), recipe), **more)


def _arguments(config: PreTrainedConfig, recipe: Recipe) -> dict[str, Any]:
    given = dict(_changes(config, recipe))
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if isinstance(kinds, (list, tuple)) and kinds:
        given.update(_layers(config, list(kinds), recipe))
    return given


def _layers(config: Any, kinds: list[str], recipe: Recipe) -> dict[str, Any]:
    """One layer of each type, where types of layers are listed, and other lists as long as that one as short."""
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    rest = [i for i in range(len(kinds)) if i not in first][: max(0, recipe.depth - len(first))]
    chosen = sorted([*first, *rest])
    lists = {key: value for key, value in vars(config).items() if isinstance(value, (list, tuple))}
    short = {key: [value[i] for i in chosen] for key, value in lists.items() if len(value) == len(kinds)}
    if set(kinds) == {"linear_attention"}:  # a cache asks for an attention too
        short = {key: ["linear_attention", "full_attention"] for key in short}
    count = {"num_hidden_layers": len(chosen)} if hasattr(config, "num_hidden_layers") else {}
    return {**short, **count}


def _changes(config: PreTrainedConfig, recipe: Recipe) -> Iterator[tuple[str, Any]]:
    ids = iter(range(VOCABULARY - 2, 0, -1))
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield name, type(value)(**_arguments(value, recipe))
        elif value is None and name in _NEEDED:
            yield name, _NEEDED[name]
        elif value is None and recipe.filled and name in _FILLS:
            yield name, _FILLS[name](recipe)
        elif isinstance(value, bool) or value is None or name.startswith("_"):
            continue
        elif re.search(_TOKENS, name):
            yield from _token(name, value, ids)
        elif isinstance(value, int):
            yield from _changed(name, value, _by_rule(name, value, recipe))
        elif isinstance(value, (list, tuple)):
            yield from _changed(name, value, _list(name, value, recipe))
        elif isinstance(value, dict):
            yield from _changed(name, value, _dictionary(config, value, recipe))


def _changed(name: str, value: Any, now: Any) -> Iterator[tuple[str, Any]]:
    if now != value:
        yield name, now


def _token(name: str, value: Any, ids: Iterator[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, int) and value >= VOCABULARY - 20:
        yield name, next(ids)
    elif isinstance(value, (list, tuple)):
        yield name, [min(one, VOCABULARY - 1) if isinstance(one, int) else one for one in value]


def _by_rule(name: str, value: int, recipe: Recipe) -> Any:
    rule = next((rule for pattern, rule in RULES if re.search(pattern, name)), _kept)
    return rule(value, recipe) if value > 0 else value


def _list(name: str, value: Any, recipe: Recipe) -> Any:
    """Depths become one; widths grow from stage to stage still, and so are divided."""
    if not value or not all(type(one) is int for one in value):
        return value
    if name == "attention_window":
        return [8 for _ in value][: recipe.depth]
    if re.search(_DEPTHS, name):
        return [1 for _ in value]
    if re.search(r"hidden_sizes|embed_dims|channels|^conv_dim|tdnn_dim|neck_hidden|^dims$|_dims$|dim_per_stage", name):
        divisor = recipe.divisor if recipe.divisor > 1 else 8
        return [one if one < 4 * divisor else max(8, one // divisor) for one in value]
    if re.search(r"image_size|img_size|crop_size", name):
        return [min(one, recipe.image) for one in value]
    if re.search(r"patch_size$", name):
        return [min(one, recipe.patch) for one in value]
    return value


def _dictionary(config: Any, value: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Sections of a rotary embedding fill half a head."""
    known = "mrope_section" in (getattr(config, "ignore_keys_at_rope_validation", None) or ())
    sections = value.get("mrope_section") or ([1, 1, 1] if known and "rope_theta" in value else [])
    if not sections or not recipe.width:
        return value
    half = int(recipe.head * value.get("partial_rotary_factor", 1)) // 2
    share = half // len(sections)
    return {**value, "mrope_section": [half - share * (len(sections) - 1), *[share] * (len(sections) - 1)]}

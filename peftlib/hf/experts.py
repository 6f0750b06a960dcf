"""Experts under keys of their own: a pair for each expert, or stacks of pairs, read and written."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from .._core.override import owner_of
from .._errors import AdapterError
from .config import Config
from .lora_layouts import Stacked, turned
from .lora_pairs import Pair
from .lora_sites import PREFIX, Site, site_of
from .modules import Modules
from .refusals import class_of
from .targets import Patterns
from .tensors import FileTensors

# What transformers 4 called the parts of a stack, [gate; up] one after the other.
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
_SHORT = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_SAY_SHORT = ("mixtral", "minimax", "minimax_m2", "phimoe", "lfm2_moe")  # the model_types that say it so
_OLD_PARENT, _PARENT = ".block_sparse_moe.", ".mlp."
_HAVE_OLD_PARENT = ("mixtral", "minimax", "minimax_m2", "phimoe")
_AUTOMODEL = {"gate_up_proj": "gate_and_up", "up_proj": "gate_and_up", "down_proj": "down"}

Factors = tuple[Tensor, Tensor]  # A [experts, rank, in] and B [experts, out, rank]


class Experts(NamedTuple):
    """A stack of a model, and the names of its parts here: one, or gate and up."""

    name: str
    leaf: str
    stack: Stacked
    model_type: str | None

    @property
    def number(self) -> int:
        return self.stack.shape[0]

    @property
    def sides(self) -> tuple[int, int]:
        """in and out"""
        _, *sides = self.stack.shape
        out, inputs = sides[:: -1 if self.stack.is_transposed else 1]
        return inputs, out

    @property
    def old_name(self) -> str:
        name = f"{self.name}."
        return (name.replace(_PARENT, _OLD_PARENT) if self.model_type in _HAVE_OLD_PARENT else name)[:-1]

    def old_parts(self) -> list[str]:
        parts = _PARTS[self.leaf]
        return [_SHORT[part] for part in parts] if self.model_type in _SAY_SHORT else list(parts)


Read = tuple[Site, Tensor, Tensor]
Keys = Callable[[Experts, str], Any]


def old_names(modules: Modules) -> dict[str, str]:
    """What parents of experts were called in transformers 4, as a mapping of keys."""
    inside = any(_OLD_PARENT in f"{name}." for name in modules.names)
    return {} if inside else {re.escape(_OLD_PARENT): _PARENT}


def with_names_of_today(config: Config, names: Mapping[str, str]) -> Config:
    """The targets under the names by which the keys are looked up."""
    said = config.get("target_modules")
    if not names or not said:
        return config
    (now,) = names.values()
    old = _OLD_PARENT.strip("."), now.strip(".")
    return {
        **config,
        "target_modules": said.replace(*old) if isinstance(said, str) else [t.replace(*old) for t in said],
    }


def read_experts(modules: Modules, config: Config, tensors: FileTensors, layout: str | None) -> Iterator[Read]:
    """The pairs of the stacks whose keys are in the file, each in the layout that these keys say, as peft's."""
    chosen = [each for each in _READERS if layout in (None, each)]
    found = [(each, *hit) for each in chosen for hit in _found(modules, tensors, each)]
    if layout in _READERS and not found:
        raise AdapterError(f"{tensors.where}: no key of experts is in layout={layout!r}. Leave layout out.")
    twice = sorted({one[1:3] for one in found if sum(one[1:3] == other[1:3] for other in found) > 1})
    if twice:
        raise AdapterError(
            f"{tensors.where}: {'.'.join(twice[0])} is there in two layouts. Pass layout= to choose one."
        )
    for each, name, leaf in found:
        yield _read(modules, config, tensors, each, name, leaf)


def _read(modules: Modules, config: Config, tensors: FileTensors, layout: str, name: str, leaf: str) -> Read:
    try:
        _require_plain(config)
        experts = _experts(modules, name, leaf)
        names, (A, B) = _READERS[layout](experts, config, tensors)
        rank, alpha = _rank_and_alpha(config, [tensors.own_name(each) for each in names])
        site = site_of(modules, name, name, leaf, rank, alpha)
        return site._replace(key=f"{name}.{leaf}"), *_as_peft(experts.stack, A, B)
    except AdapterError as error:
        at = f"{tensors.where}: {name}.{leaf}"
        raise error if tensors.where in str(error) else AdapterError(f"{at}: {error}") from None


def _found(modules: Modules, tensors: FileTensors, layout: str) -> list[tuple[str, str]]:
    """The stacks that keys of this layout name."""
    hits = dict.fromkeys(hit for key in tensors.left if (hit := _stack_named(modules, tensors, key, layout)))
    return list(hits)


_EACH = re.compile(r"(.+)\.\d+\.(\w+)\.lora_[AB]\.weight")
_GROUPED = re.compile(r"(.+)\.lora_(gate_and_up|down)_[AB]")
_APART = re.compile(r"(.+)\.(\w+)\.lora_[AB]\.weight")


def _stack_named(modules: Modules, tensors: FileTensors, key: str, layout: str) -> tuple[str, str] | None:
    pattern = {"per-expert": _EACH, "automodel": _GROUPED, "sglang": _APART}[layout]
    match = pattern.fullmatch(key.removeprefix(PREFIX))
    if match is None or (layout == "sglang" and len(tensors.shapes[key]) != 3):
        return None
    name, part = match.groups()
    host = modules.by_name.get(name)
    if host is None:
        return None
    names = {"gate_and_up": ("gate_up_proj", "up_proj"), "down": ("down_proj",)}.get(part) or _leaves(part)
    leaf = next((each for each in names if getattr(host, each, None) is not None), None)
    weight = getattr(host, leaf, None) if leaf else None
    return (name, leaf) if leaf and isinstance(weight, Tensor) and weight.dim() == 3 else None


def _leaves(part: str) -> list[str]:
    long = next((name for name, short in _SHORT.items() if short == part), part)
    return [leaf for leaf, parts in _PARTS.items() if long in parts or leaf == long]


def _experts(modules: Modules, name: str, leaf: str) -> Experts:
    site = site_of(modules, name, name, leaf)
    return experts_of(name, leaf, site.host, site.param, site.layout)


def experts_of(name: str, leaf: str, host: nn.Module, param: str, layout: Any) -> Experts:
    """Refused where it is not known what is in and what out, or which of its rows are the gate's."""
    owner: Any = owner_of(host, param)[0]
    if leaf not in _PARTS or not isinstance(layout, Stacked) or not hasattr(owner, "is_transposed"):
        raise AdapterError(
            f"{class_of(owner)} does not say which side of its experts is the input's (is_transposed), as those of "
            "transformers do. Use a layout of peft."
        )
    if leaf == "gate_up_proj" and not getattr(owner, "is_concatenated", False):
        raise AdapterError(f"{class_of(owner)} does not have its gate before its up. Use a layout of peft.")
    config = getattr(owner, "config", None)
    return Experts(name, leaf, layout, getattr(config, "model_type", None))


def _require_plain(config: Config) -> None:
    told = [name for name in ("use_dora", "lora_bias") if config[name]]
    if told:
        raise AdapterError(f"{told[0]} has no place for experts. Load it with HF peft.")


def _rank_and_alpha(config: Config, names: Sequence[str]) -> tuple[int, float]:
    """One for all experts of a stack, and for gate and up."""
    ranks, alphas = (
        Patterns(config["rank_pattern"], config["r"]),
        Patterns(config["alpha_pattern"], config["lora_alpha"]),
    )
    found = sorted({(ranks.value(name), alphas.value(name)) for name in names})
    if len(found) > 1:
        raise AdapterError(
            f"its experts have different ranks and alphas, {found[0]} and {found[1]}, and a stack has one. Merge it in "
            "the tool that made it."
        )
    return found[0]


def _as_peft(stack: Stacked, A: Tensor, B: Tensor) -> Factors:
    return stack.write(*(turned((A, B)) if stack.is_transposed else (A, B)))


def _plainly(pair: Pair) -> Factors:
    """A [experts, rank, in] and B [experts, out, rank] of a pair in the layout of peft."""
    stack: Any = pair.layout
    A, B = stack.read(pair.A, pair.B)
    return turned((A, B)) if stack.is_transposed else (A, B)


# Reading.

Found = tuple[list[str], Factors]


def _read_each(experts: Experts, config: Config, tensors: FileTensors) -> Found:
    parts = _parts_in(tensors, f"{PREFIX}{experts.name}.0.{{}}.lora_A.weight", experts.leaf)
    names = [f"{experts.name}.{expert}.{part}" for part in parts for expert in range(experts.number)]
    rank, _ = _rank_and_alpha(config, [tensors.own_name(name) for name in names])
    inputs, out = experts.sides
    A, B = (
        torch.stack([tensors.take(f"{PREFIX}{name}.lora_{factor}.weight", shape) for name in names])
        for factor, shape in (("A", (rank, inputs)), ("B", (out // len(parts), rank)))
    )
    return names, _together(A, B, len(parts))


def _parts_in(tensors: FileTensors, key: str, leaf: str) -> list[str]:
    """By the names that this file has."""
    short = [_SHORT[part] for part in _PARTS[leaf]]
    return short if any(key.format(part) in tensors.left for part in short) else list(_PARTS[leaf])


def _together(A: Tensor, B: Tensor, parts: int) -> Factors:
    """Of gate and up one pair: with the A that both have, or with the A of each and zeros in B beside its own."""
    As, Bs = (rearrange(each, "(p e) ... -> p e ...", p=parts) for each in (A, B))
    if all(torch.equal(As[0], each) for each in As):
        return As[0], rearrange(Bs, "p e o r -> e (p o) r").contiguous()
    apart = Bs.new_zeros(*Bs.shape[:3], parts, Bs.shape[3])
    for part in range(parts):
        apart[part, :, :, part] = Bs[part]
    return rearrange(As, "p e r i -> e (p r) i").contiguous(), rearrange(
        apart, "p e o q r -> e (p o) (q r)"
    ).contiguous()


def _read_grouped(experts: Experts, config: Config, tensors: FileTensors) -> Found:
    inputs, out = experts.sides
    rank, stem = config["r"], f"{PREFIX}{experts.name}.lora_{_AUTOMODEL[experts.leaf]}"
    A = tensors.take(f"{stem}_A", (experts.number, inputs, rank))
    B = tensors.take(f"{stem}_B", (experts.number, rank, out))
    return [experts.name], (rearrange(A, "e i r -> e r i").contiguous(), rearrange(B, "e r o -> e o r").contiguous())


def _read_apart(experts: Experts, config: Config, tensors: FileTensors) -> Found:
    """A factor that all experts share is written once."""
    whole = f"{PREFIX}{experts.name}.{experts.leaf}.lora_A.weight" in tensors.left
    parts = [experts.leaf] if whole else list(_PARTS[experts.leaf])
    names = [f"{experts.name}.{part}" for part in parts]
    rank, _ = _rank_and_alpha(config, [tensors.own_name(name) for name in names])
    inputs, out = experts.sides
    A, B = (
        torch.cat(
            [_shared(tensors, f"{PREFIX}{name}.lora_{factor}.weight", (experts.number, *sides)) for name in names]
        )
        for factor, sides in (("A", (rank, inputs)), ("B", (out // len(parts), rank)))
    )
    return names, _together(A, B, len(parts))


def _shared(tensors: FileTensors, key: str, shape: tuple[int, ...]) -> Tensor:
    one = tensors.shapes.get(key, [0])[:1] == [1]
    return tensors.take(key, (1, *shape[1:]) if one else shape).expand(shape)


_READERS: Mapping[str, Callable[[Experts, Config, FileTensors], Found]] = {
    "per-expert": _read_each,
    "automodel": _read_grouped,
    "sglang": _read_apart,
}
LAYOUTS = tuple(_READERS)

# Writing.

Written = dict[str, Tensor]


def experts_written(pairs: Sequence[Pair], layout: str) -> tuple[list[str], Written]:
    """What `target_modules` names, and the tensors."""
    stacks = [_of_pair(pair) for pair in pairs]
    names, tensors = list[str](), Written()
    for experts, pair in zip(stacks, pairs, strict=True):
        A, B = _plainly(pair)
        tensors |= _WRITERS[layout](experts, A, B)
        names += _names_apart(experts) if layout == "sglang" else _names_of_each(experts)
    return names, tensors


def _of_pair(pair: Pair) -> Experts:
    try:
        return experts_of(pair.module, pair.at[1], pair.host, pair.param, pair.layout)
    except AdapterError as error:
        raise AdapterError(f"{pair.key}: {error}") from None


def _names_of_each(experts: Experts) -> list[str]:
    return [f"{experts.old_name}.{expert}.{part}" for expert in range(experts.number) for part in experts.old_parts()]


def _names_apart(experts: Experts) -> list[str]:
    return [f"{experts.name}.{experts.leaf}"]


def _write_each(experts: Experts, A: Tensor, B: Tensor) -> Written:
    """Gate and up have both the same A, and each its rows of B."""
    tensors, parts = Written(), experts.old_parts()
    for part, rows in zip(parts, B.chunk(len(parts), 1), strict=True):
        for expert in range(experts.number):
            stem = f"{PREFIX}{experts.old_name}.{expert}.{part}"
            tensors |= {f"{stem}.lora_A.weight": A[expert], f"{stem}.lora_B.weight": rows[expert]}
    return tensors


def _write_grouped(experts: Experts, A: Tensor, B: Tensor) -> Written:
    stem = f"{PREFIX}{experts.name}.lora_{_AUTOMODEL[experts.leaf]}"
    return {f"{stem}_A": rearrange(A, "e r i -> e i r"), f"{stem}_B": rearrange(B, "e o r -> e r o")}


def _write_apart(experts: Experts, A: Tensor, B: Tensor) -> Written:
    stem = f"{PREFIX}{experts.name}.{experts.leaf}"
    return {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}


_WRITERS: Mapping[str, Callable[[Experts, Tensor, Tensor], Written]] = {
    "per-expert": _write_each,
    "automodel": _write_grouped,
    "sglang": _write_apart,
}


def require_no_other_name(stacks: Sequence[Pair], others: Sequence[Pair], layout: str) -> None:
    """What is beside experts whose parent had another name in transformers 4 would be looked for there."""
    if layout != "per-expert":
        return
    old = [f"{one.name.rpartition('.')[0]}." for one in map(_of_pair, stacks) if one.old_name != one.name]
    beside = next((pair.key for pair in others if pair.module.startswith(tuple(old))), None)
    if beside is not None:
        raise AdapterError(
            f"{beside}: it had another name in transformers 4, which peft does not know here. Save it under a name of "
            "its own."
        )


def require_one_rank_and_scale(pairs: Sequence[Pair], layout: str) -> None:
    found = {(pair.rank, pair.scale): pair.key for pair in pairs}
    if len(found) > 1:
        first, second = list(found.values())[:2]
        raise AdapterError(
            f"{second}: its rank or scale is not that of {first}, and the layout {layout!r} has one for all. Adapt "
            "them with the same rank and alpha."
        )

"""What HF peft ties: the modules that share the weight of the input embedding, and what is trained on them."""

from typing import Any

from .._core.inject import Part
from ..kinds.full import Full
from .config import Config
from .modules import Modules
from .targets import named_by, one_of

_EMBEDDINGS = ("embed_tokens", "lm_head")  # the names by which peft knows that a tied weight is meant


def input_embedding(modules: Modules) -> str | None:
    embedding_of: Any = getattr(modules.model, "get_input_embeddings", None)
    return modules.name_of.get(id(embedding_of())) if embedding_of else None


def tied_to(modules: Modules, name: str | None) -> list[str]:
    """Modules that share the weight of the input embedding, where the model's configuration says that it is tied."""
    config = getattr(modules.model, "config", None)
    if not name or name != input_embedding(modules) or not getattr(config, "tie_word_embeddings", False):
        return []
    weight = modules.by_name[name]._parameters["weight"]
    named = modules.by_name.items()
    return [other for other, module in named if other != name and module._parameters.get("weight") is weight]


def with_ties(modules: Modules, config: Config) -> Config:
    """`ensure_weight_tying`: whoever names one of the tied modules names all."""
    embedding = input_embedding(modules)
    all_tied = [embedding, *tied_to(modules, embedding)]
    if not config["ensure_weight_tying"] or len(all_tied) == 1:
        return config
    kept, target = config["modules_to_save"] or (), config["target_modules"]
    if _names_embedding(kept):
        return {**config, "modules_to_save": [*kept, *all_tied]}
    if isinstance(target, str) and any(map(named_by(target), _EMBEDDINGS)):
        return {**config, "target_modules": f"(?:{target})|{one_of(filter(None, all_tied))}"}
    if not isinstance(target, str) and _names_embedding(target or ()):
        return {**config, "target_modules": [*target, *all_tied]}
    return config


def _names_embedding(named: Any) -> bool:
    return any(name.rpartition(".")[2] in _EMBEDDINGS for name in named)


def shared(modules: Modules, config: Config, parts: list[Part]) -> list[tuple[Part, Part]]:
    """Copies of a tied weight that are one parameter for both modules: the first part lends it to the second. peft
    does so with rows of tokens, and where `ensure_weight_tying` says so with whole weights."""
    ties = config.get("ensure_weight_tying", False)
    copies = {part.host_name: part for part in parts if part.kind is Full and (ties or part.config.get("rows"))}
    pairs = ((name, other) for name in copies for other in tied_to(modules, name) if other in copies)
    return [(copies[name], copies[other]) for name, other in pairs if copies[name].config == copies[other].config]

"""Which modules and parameters of a model an HF peft configuration names."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from .._core.walk import candidates
from .._errors import AdapterError
from ..kinds._weight_layout import is_transposed_linear
from .config import Config

ALL_LINEAR = "all-linear"
NOTHING = "dummy-target-modules"  # peft's own word for a configuration that adapts no module
_CLASSIFIERS = ("score", "classifier")


def modules_named(model: nn.Module, config: Config) -> list[str]:
    """`target_modules` less `exclude_modules` and what is inside `modules_to_save`, in the model's order."""
    names = [name for name, _ in candidates(model) if name]
    target = config["target_modules"]
    if target == NOTHING or (target is None and config.get("target_parameters")):
        return []
    if target is None:
        raise AdapterError("target_modules is missing, and there is no list of defaults by model here. Name them.")
    if isinstance(target, str) and target.lower() == ALL_LINEAR:
        target = _all_linear(model, config)
    return [name for name in names if not _excluded(config, name) and _hit(config, target, name)]


def _hit(config: Config, target: Any, name: str) -> bool:
    if isinstance(target, str):
        return whole_match(target, name)
    if name in target:
        return True
    if not name.endswith(tuple(f".{each}" for each in target)):
        return False
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    number = _layer_number(config.get("layers_pattern"), name)
    return number in ([layers] if isinstance(layers, int) else layers)


def _layer_number(patterns: Any, name: str) -> int | None:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    ways = [rf"(?:^|.*?\.){each}\.(?P<at>\d+)\." for each in patterns or ()] or [r".*?\.[^.]*\.(?P<at>\d+)\."]
    found = next(filter(None, (_match(way, name) for way in ways)), None)
    return int(found["at"]) if found else None


def _excluded(config: Config, name: str) -> bool:
    exclude = config["exclude_modules"]
    if isinstance(exclude, str) and exclude and whole_match(exclude, name):
        return True
    if exclude and not isinstance(exclude, str) and (name in exclude or name.endswith(tuple(f".{e}" for e in exclude))):
        return True
    return any(_match(rf"(^|.*\.){each}($|\..*)", name) for each in config["modules_to_save"] or ())


def _all_linear(model: nn.Module, config: Config) -> list[str]:
    found = {name: m for name, m in candidates(model) if isinstance(m, nn.Linear) or is_transposed_linear(m)}
    head_of: Any = getattr(model, "get_output_embeddings", None)
    head = head_of() if head_of else None
    if head_of and head is None and config.get("task_type") == "SEQ_CLS":
        heads = (getattr(model, name, None) for name in _CLASSIFIERS)
        head = next((each for each in heads if each is not None), None)
    return [name for name, module in found.items() if module is not head]


def parameters_named(model: nn.Module, config: Config) -> dict[str, list[str]]:
    """`target_parameters`: for each module that owns some, its parameters, in the order in which peft nests them."""
    targets = sorted(set(config.get("target_parameters") or ()))
    found: dict[str, list[str]] = {}
    for name, module in candidates(model):
        for leaf, _ in module.named_parameters(recurse=False):
            key = f"{name}.{leaf}"
            if key in targets or key.endswith(tuple(f".{each}" for each in targets)):
                found.setdefault(name, []).append(leaf)
    return found


def modules_kept(model: nn.Module, config: Config) -> list[str]:
    """`modules_to_save`: every module whose name ends so."""
    ends = tuple(config["modules_to_save"] or ())
    return [name for name, _ in candidates(model) if name and ends and name.endswith(ends)]


def pattern_value(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that matches the whole name or a dotted suffix of it."""
    for pattern, value in (patterns or {}).items():
        if _match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def exact_patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Patterns that give each of these names its value, and no other name."""
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != default}


def module_target(model: nn.Module, config: Config, names: Iterable[str]) -> Any:
    """The shortest `target_modules` that names exactly these: by last part, in full, or as a regular expression."""
    wanted = set(names)
    if not wanted:
        return [] if config.get("target_parameters") else NOTHING
    leaves = sorted({name.rpartition(".")[2] for name in wanted})
    expression = "|".join(re.escape(name) for name in sorted(wanted))
    for target in (leaves, sorted(wanted), f"({expression})"):
        if set(modules_named(model, {**config, "target_modules": target})) == wanted:
            return target
    inside = sorted(name for name in wanted if _excluded(config, name))
    raise AdapterError(
        f"{', '.join(inside[:4])}: inside a module that is saved whole (modules_to_save), where peft adapts nothing. "
        "Adapt the one or the other."
    )


def _match(pattern: str, name: str, how: Callable[..., Any] = re.match) -> re.Match[str] | None:
    try:
        return how(pattern, name)
    except re.error as error:
        raise AdapterError(f"{pattern!r} is no regular expression ({error}). Correct the configuration.") from None


def whole_match(pattern: str, name: str) -> bool:
    return _match(pattern, name, re.fullmatch) is not None

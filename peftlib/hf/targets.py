"""Which modules and parameters of a model an HF peft configuration names."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from .._errors import AdapterError
from ..kinds._weight_layout import is_transposed_linear
from .config import Config
from .modules import Modules

PREFIX = "base_model.model."  # before the name of a module, in each key
ALL_LINEAR = "all-linear"
NOTHING = "dummy-target-modules"  # peft's own word for a configuration that adapts no module
_CLASSIFIERS = ("score", "classifier")
_PLAIN = re.compile(r"[\w.]+")

Test = Callable[[str], bool]


def modules_named(modules: Modules, config: Config) -> list[str]:
    """`target_modules` less `exclude_modules` and what is inside `modules_to_save`, in the model's order."""
    target = config["target_modules"]
    if target == NOTHING or (target is None and config.get("target_parameters")):
        return []
    if target is None:
        raise AdapterError("target_modules is missing, and there is no list of defaults by model here. Name them.")
    if isinstance(target, str) and target.lower() == ALL_LINEAR:
        target = _all_linear(modules, config)
    hit, excluded = _target_test(config, target), _excluded_test(config)
    return [name for name in modules.names if hit(name) and not excluded(name)]


def named_by(named: Any) -> Test:
    """A string is a regular expression of whole names; a list has names and their ends. A look-up for each end of a
    name, not a comparison with each entry, so that a list of all modules costs no more than a walk."""
    if isinstance(named, str):
        matches = compiled(named).fullmatch
        return lambda name: matches(name) is not None
    wanted = set(named)
    return lambda name: any(end in wanted for end in _ends(name))


def _ends(name: str) -> Iterator[str]:
    """`a.b.c`, `b.c`, `c`."""
    while name:
        yield name
        name = name.partition(".")[2]


def _target_test(config: Config, target: Any) -> Test:
    hit, layers = named_by(target), config.get("layers_to_transform")
    if isinstance(target, str) or layers is None or layers == []:
        return hit
    exact, numbers = set(target), [layers] if isinstance(layers, int) else layers
    patterns = config.get("layers_pattern") or ()
    patterns = [patterns] if isinstance(patterns, str) else patterns
    ways = [compiled(rf"(?:^|.*?\.){each}\.(?P<at>\d+)\.") for each in patterns]
    ways = ways or [compiled(r".*?\.[^.]*\.(?P<at>\d+)\.")]
    return lambda name: name in exact or (hit(name) and _layer_number(ways, name) in numbers)


def _layer_number(ways: list[re.Pattern[str]], name: str) -> int | None:
    found = next(filter(None, (way.match(name) for way in ways)), None)
    return int(found["at"]) if found else None


def _excluded_test(config: Config) -> Test:
    excluded = named_by(config["exclude_modules"] or ())
    inside = [compiled(rf"(^|.*\.){each}($|\..*)").match for each in config["modules_to_save"] or ()]
    return lambda name: excluded(name) or any(matches(name) for matches in inside)


def _all_linear(modules: Modules, config: Config) -> list[str]:
    head_of: Any = getattr(modules.model, "get_output_embeddings", None)
    head = head_of() if head_of else None
    if head_of and head is None and config.get("task_type") == "SEQ_CLS":
        heads = (getattr(modules.model, name, None) for name in _CLASSIFIERS)
        head = next((each for each in heads if each is not None), None)
    linear = (name for name, m in modules.by_name.items() if isinstance(m, nn.Linear) or is_transposed_linear(m))
    return [name for name in linear if modules.by_name[name] is not head]


def parameters_named(modules: Modules, config: Config) -> dict[str, list[str]]:
    """`target_parameters`: for each module that owns some, its parameters, in the order in which peft nests them."""
    hit = named_by(config.get("target_parameters") or ())
    found: dict[str, list[str]] = {}
    for name, module in modules.by_name.items():
        for leaf, _ in module.named_parameters(recurse=False):
            if hit(f"{name}.{leaf}"):
                found.setdefault(name, []).append(leaf)
    return found


def modules_kept(modules: Modules, config: Config) -> list[str]:
    """`modules_to_save`: every module whose name ends so."""
    ends = tuple(config["modules_to_save"] or ())
    return [name for name in modules.names if ends and name.endswith(ends)]


class Patterns:
    """`rank_pattern` and `alpha_pattern`: the first pattern that matches the whole name or a dotted suffix counts.

    There may be one for each module. So those that are names are looked up: `^` and a name escaped in `whole`; letters
    and dots in `ends`, by their length and the places of their dots, since a dot stands for any character: put dots
    there into the end of a name, and it is the pattern. Only what is left is tried in turn."""

    def __init__(self, values: Mapping[str, Any], default: Any) -> None:
        self.values = [*values.values(), default]
        self.whole: dict[str, int] = {}
        self.ends: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self.others: list[tuple[int, re.Pattern[str]]] = []
        for at, pattern in enumerate(values):
            name = re.sub(r"\\(.)", r"\1", pattern.removeprefix("^"))
            if pattern == _exactly(name):
                self.whole[name] = at
            elif _PLAIN.fullmatch(pattern):
                dots = tuple(place for place, letter in enumerate(pattern) if letter == ".")
                self.ends.setdefault(len(pattern), {}).setdefault(dots, {})[pattern] = at
            else:
                self.others.append((at, compiled(rf"(.*\.)?({pattern})$")))

    def value(self, name: str) -> Any:
        first = min(self._looked_up(name), default=len(self.values) - 1)
        return self.values[next((at for at, other in self.others if at < first and other.match(name)), first)]

    def _looked_up(self, name: str) -> Iterator[int]:
        if name in self.whole:
            yield self.whole[name]
        for end in _ends(name):
            for dots, patterns in self.ends.get(len(end), {}).items():
                dotted = "".join("." if place in dots else letter for place, letter in enumerate(end))
                if dotted in patterns:
                    yield patterns[dotted]


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}"


def exact_patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Patterns that give each of these names its value, and no other name."""
    return {_exactly(name): value for name, value in values.items() if value != default}


def module_target(modules: Modules, config: Config, names: Iterable[str]) -> Any:
    """The shortest `target_modules` that names exactly these: by last part, in full, or as a regular expression."""
    wanted = set(names)
    if not wanted:
        return [] if config.get("target_parameters") else NOTHING
    leaves = sorted({name.rpartition(".")[2] for name in wanted})
    for target in (leaves, sorted(wanted), one_of(sorted(wanted))):
        if set(modules_named(modules, {**config, "target_modules": target})) == wanted:
            return target
    inside = sorted(filter(_excluded_test(config), wanted))
    raise AdapterError(
        f"{', '.join(inside[:4])}: inside a module that is saved whole (modules_to_save), where peft adapts nothing. "
        "Adapt the one or the other."
    )


def one_of(names: Iterable[str]) -> str:
    """The regular expression of exactly these names."""
    return f"({'|'.join(map(re.escape, names))})"


def compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise AdapterError(f"{pattern!r} is no regular expression ({error}). Correct the configuration.") from None

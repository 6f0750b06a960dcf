"""Layer groups: the trainable parameters of a model in an ordered list of groups, from input to output."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .._core.adapter import Adapter
from .._core.sharded import settle
from .._core.targets import Targets, select
from .._errors import AdapterError

# What a schedule governs trains sooner or later, frozen or not at the moment. The value is a weak reference to it.
SCHEDULED: Any = WeakTensorKeyDictionary()

Depth = Callable[[str, nn.Parameter], Any]


_models: weakref.WeakKeyDictionary["LayerGroup", "weakref.ref[nn.Module]"] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """Parameters that freeze and unfreeze together, by name, and the modules whose running statistics go with them."""

    name: str
    parameters: dict[str, nn.Parameter]
    statistics: dict[str, nn.Module]

    def tensors(self) -> dict[str, Tensor]:
        """All that training changes: the parameters and the running statistics."""
        modules = self.statistics.items()
        running = {f"{name}.{leaf}": b for name, module in modules for leaf, b in module.named_buffers(recurse=False)}
        return {**self.parameters, **running}

    def __repr__(self) -> str:
        return f"LayerGroup({self.name!r}, {sum(p.numel() for p in self.parameters.values()):,})"


def settle_groups(groups: Sequence[LayerGroup]) -> None:
    """The parameters of a group are those that the optimizer has: in a sharded model too these must be registered."""
    found = {_models[group]() for group in groups if group in _models}
    for model in filter(None, found):
        settle(model)


def require_groups(where: str, groups: Any) -> None:
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, LayerGroup) for group in groups):
        found = type(groups).__name__ if not isinstance(groups, (list, tuple)) else "a list of other things"
        raise AdapterError(f"{where}: expected layer groups, found {found}. Pass those of layer_groups(model).")
    if not groups:
        raise AdapterError(f"{where}: there is no group. Pass those of layer_groups(model).")


def require_apart(groups: Sequence[LayerGroup]) -> None:
    """Each parameter is in one group, and trains."""
    owner: dict[int, str] = {}
    for group in groups:
        for name, p in group.parameters.items():
            if id(p) in owner:
                raise AdapterError(f"{name} is in two groups, {owner[id(p)]!r} and {group.name!r}. Take it out of one.")
            owner[id(p)] = group.name
            if not trains(p):
                raise AdapterError(
                    f"{name} in group {group.name!r} does not require a gradient. Call layer_groups again, after "
                    "whatever froze it."
                )


def require_all(groups: Sequence[LayerGroup], optimizer: Any) -> None:
    """The optimizer has every parameter of every group."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    lacking = [name for group in groups for name, p in group.parameters.items() if id(p) not in known]
    if lacking:
        more = f" and {len(lacking) - 4} more" if len(lacking) > 4 else ""
        raise AdapterError(
            f"{type(optimizer).__name__} lacks {', '.join(lacking[:4])}{more}, which would never train. Give it all "
            "groups from the start: discriminative_lr(groups, lr)."
        )


def layer_groups(model: nn.Module, by: int | Sequence[Targets] | Depth | None = None) -> list[LayerGroup]:
    """The trainable parameters of a model in groups, from input to output: what schedules and learning rates go by.

    Each parameter that requires a gradient is in exactly one group, a shared one under its first name; adapters belong
    to the block that they are in. A group without any is left out. What a `GradualUnfreezing` holds frozen counts as
    trainable. Found by itself, a group is one block of a stack (a `ModuleList` or `Sequential` of equal types), what
    the model registers before the first stack, between two, or after the last; inside a block no stack is looked for.

    Args:
        model: any module; nothing of it changes.
        by: default, found by itself; or how many groups, each of neighbours among those found; or for each group the
            modules (as for `inject`) or parameters (globs) that it has; or `depth(name, parameter)`, whose equal
            values make a group, and whose order is theirs.

    Returns:
        list[LayerGroup]: each with `name`, `parameters` by name, and `statistics`: its modules with running statistics.

    Raises:
        AdapterError: no stack to go by, a target that matches nothing, a parameter that is left over or in two groups,
            more groups than there are blocks, nothing trainable.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Transformer(16, 2, 2, 1, 16, batch_first=True).encoder
        >>> peftlib.layer_groups(model)
        [LayerGroup('layers.0', 1,696), LayerGroup('layers.1', 1,696), LayerGroup('norm', 32)]
        >>> peftlib.layer_groups(model, by=["layers.0", ["layers.1", "norm"]])
        [LayerGroup('layers.0', 1,696), LayerGroup('layers.1, norm', 1,728)]
    """
    settle(model)
    groups = _grouped(model, by)
    _models.update(dict.fromkeys(groups, weakref.ref(model)))
    return groups


def _grouped(model: nn.Module, by: int | Sequence[Targets] | Depth | None) -> list[LayerGroup]:
    if not any(trains(p) for p in model.parameters()):
        raise AdapterError(
            f"layer_groups: {type(model).__name__} has no parameter that requires a gradient. Set requires_grad, or "
            "inject an adapter first."
        )
    if by is None or (isinstance(by, int) and not isinstance(by, bool)):
        groups = _collected(model, by_stacks(model))
        return groups if by is None else _joined(groups, by)
    if callable(by):
        return _collected(model, _by_depth(model, by))
    if isinstance(by, Sequence) and not isinstance(by, str):
        return _collected(model, _by_targets(model, by))
    raise TypeError(f"by: expected a number, a list of targets, or depth(name, parameter), found {by!r}")


def trains(parameter: nn.Parameter) -> bool:
    """Now, or when its turn comes in a schedule."""
    return parameter.requires_grad or parameter in SCHEDULED


def _collected(model: nn.Module, group_of: dict[str, str]) -> list[LayerGroup]:
    """Groups in the order of `group_of`'s values, which must name one for every trainable parameter."""
    groups = {name: LayerGroup(name, {}, {}) for name in dict.fromkeys(group_of.values())}
    for name, p in model.named_parameters():
        if trains(p):
            groups[group_of[name]].parameters[name] = p
    for name, module, near in _with_statistics(model, group_of):
        groups[group_of[near]].statistics[name] = module
    return [group for group in groups.values() if group.parameters]


def _with_statistics(model: nn.Module, group_of: dict[str, str]) -> Iterator[tuple[str, nn.Module, str]]:
    """Modules with running statistics, and the parameter whose group is theirs: their own, or the last one before."""
    before = next(iter(group_of))
    for prefix, module in model.named_modules():
        own = [name for leaf in module._parameters if (name := f"{prefix}.{leaf}".lstrip(".")) in group_of]
        before = own[-1] if own else before
        if getattr(module, "running_mean", None) is not None:
            yield prefix, module, before


def _joined(groups: list[LayerGroup], count: int) -> list[LayerGroup]:
    if not 1 <= count <= len(groups):
        raise AdapterError(
            f"by={count}: {len(groups)} groups were found. Ask for 1 to {len(groups)}, or name them by targets."
        )
    cuts = [-(-len(groups) * n // count) for n in range(count + 1)]
    return [_union(groups[start:end]) for start, end in pairwise(cuts)]


def _union(groups: list[LayerGroup]) -> LayerGroup:
    name = groups[0].name if len(groups) == 1 else f"{groups[0].name} … {groups[-1].name}"
    parameters = {key: p for group in groups for key, p in group.parameters.items()}
    return LayerGroup(name, parameters, {key: m for group in groups for key, m in group.statistics.items()})


def _by_targets(model: nn.Module, by: Sequence[Targets]) -> dict[str, str]:
    first = {id(p): name for name, p in model.named_parameters()}
    group_of: dict[str, str] = {}
    for targets in by:
        title = ", ".join(map(_title, targets if isinstance(targets, (list, tuple)) else [targets]))
        for name in dict.fromkeys(first[id(p)] for p in _matched(model, targets)):
            if name in group_of:
                raise AdapterError(f"{name} is in two groups, {group_of[name]!r} and {title!r}. Narrow one of the two.")
            group_of[name] = title
    left = [name for name, p in model.named_parameters() if trains(p) and name not in group_of]
    if left:
        more = f" and {len(left) - 4} more" if len(left) > 4 else ""
        raise AdapterError(
            f"layer_groups: {', '.join(left[:4])}{more} in no group. Name them too, or set requires_grad=False."
        )
    return group_of


def _matched(model: nn.Module, targets: Targets) -> Iterator[nn.Parameter]:
    named: list[Any] = [*model.named_modules(remove_duplicate=False)]
    globs = all(isinstance(target, str) for target in (targets if isinstance(targets, (list, tuple)) else [targets]))
    named += model.named_parameters() if globs else ()
    for _, found in select(named, targets):
        yield from [found] if isinstance(found, nn.Parameter) else found.parameters()


def _title(target: Any) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", repr(target))


def _by_depth(model: nn.Module, depth: Depth) -> dict[str, str]:
    depths = {name: depth(name, p) for name, p in model.named_parameters()}
    left = [name for name, p in model.named_parameters() if depths[name] is None and trains(p)]
    if left:
        raise AdapterError(f"layer_groups: depth gave None for {left[0]}. Give every trainable parameter a depth.")
    known = {name: at for name, at in depths.items() if at is not None}
    return {name: f"depth {known[name]}" for name in sorted(known, key=known.__getitem__)}


def by_stacks(model: nn.Module) -> dict[str, str]:
    """The group of every parameter, by name, in the order in which the model registers them."""
    stacks = list(_stacks("", model, _is_block)) or list(_stacks("", model, _has_weights))
    if not stacks:
        raise AdapterError(
            f"layer_groups: {type(model).__name__} has no stack of blocks (a ModuleList or Sequential of equal types). "
            "Pass by=, a list of targets from input to output."
        )
    stack_of = {block: at for at, stack in enumerate(stacks) for block in stack}
    places: dict[str, str | int] = {}  # a block, or how many stacks came before
    passed = 0
    for name, _ in model.named_parameters():
        block = next((block for block in stack_of if name.startswith(f"{block}.")), None)
        passed = passed if block is None else stack_of[block] + 1
        places[name] = passed if block is None else block
    titles = {
        at: _shared_name([name for name, place in places.items() if place == at], f"{where} {block}", [*stack_of])
        for at, (where, block) in enumerate([("below", stacks[0][0]), *(("above", stack[-1]) for stack in stacks)])
    }
    return {name: titles[place] if isinstance(place, int) else place for name, place in places.items()}


def _stacks(name: str, module: nn.Module, fits: Callable[[nn.Module], bool]) -> Iterator[list[str]]:
    """The names of the blocks of every outermost stack."""
    children = {child: inner for child, inner in module.named_children() if _has_weights(inner)}
    if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(children) > 1 and all(map(fits, children.values())):
        kinds = {_own_type(child) for child in children.values()}
        if len(kinds) == 1:
            yield [f"{name}.{child}".lstrip(".") for child in children]
            return
        if isinstance(module, nn.ModuleList):
            raise AdapterError(
                f"{name or 'the root'}: a ModuleList of {', '.join(sorted(kind.__name__ for kind in kinds))}, so it "
                "does not say what comes after what. Pass by=, a list of targets from input to output."
            )
    for child, inner in children.items():
        yield from _stacks(f"{name}.{child}".lstrip("."), inner, fits)


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _is_block(module: nn.Module) -> bool:
    """Whether it is made of modules with weights; an adapter does not make a layer a block."""
    adapters = {id(inner) for each in module.modules() if isinstance(each, Adapter) for inner in each.modules()}
    inside = [each for each in module.modules() if each is not module and id(each) not in adapters]
    return any(each._parameters for each in inside)


def _own_type(module: nn.Module) -> type:
    """Adapters and FSDP2 put a subclass on a module, named after its class; not every block of a stack may have one."""
    cls = type(module)
    while len(cls.__bases__) == 2 and cls.__name__.endswith(cls.__bases__[1].__name__):
        cls = cls.__bases__[1]
    return cls


def _shared_name(names: list[str], otherwise: str, blocks: list[str]) -> str:
    """The module that holds them all, if it holds no block."""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, columns))
    holds_a_block = not shared or any(f"{block}.".startswith(f"{shared}.") for block in blocks)
    return otherwise if holds_a_block else shared

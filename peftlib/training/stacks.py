"""Stacks of equal blocks, which say what comes after what in a model."""

from collections.abc import Callable, Iterator
from itertools import takewhile

from torch import nn

from .._core.adapter import Adapter
from .._errors import AdapterError


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
        at: _title([name for name, place in places.items() if place == at], f"{where} {block}", [*stack_of])
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


def _title(names: list[str], otherwise: str, blocks: list[str]) -> str:
    """The module that holds them all, if it holds no block."""
    columns = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, columns))
    holds_a_block = not shared or any(f"{block}.".startswith(f"{shared}.") for block in blocks)
    return otherwise if holds_a_block else shared

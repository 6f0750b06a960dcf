"""Routing: each row of a batch goes through adapters of its own."""

import weakref
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import Tensor, nn

from .._errors import AdapterError
from .activate import Undo, choose
from .host import adapters_of, is_host
from .row_groups import Names, Rows, may_mix_rows
from .sharded import every_module
from .walk import require, require_one_copy

M = TypeVar("M", bound=nn.Module)
Choice = str | None | Names


def route(
    model: M,
    rows: Sequence[Choice] | Mapping[Choice, int] | Tensor,
    *,
    names: Sequence[Choice] | None = None,
    dim: int = 0,
) -> Undo[M]:
    r"""Sends each row of a batch through adapters of its own, in one pass, in training and in use.

    .. math:: y_i = \mathrm{model}_{a(i)}(x_i)

    Each row's result is what it would be if its adapters were active alone, and so are each adapter's gradients, of the
    losses of its rows; an adapter without rows gets None. No adapter has a weight meanwhile. Like `activate` it acts at
    once, on every call with as many rows, until the block ends or `activate` or `route` is called again. It costs one
    bare walk over the modules. Under `torch.compile`, LoRA on linear layers has one graph for every assignment of rows
    to the same adapters, and without gradients to any; other adapters for each number of rows that each of them has.

    A module's rows are those of the first tensor that it is called with: as many as `rows`, or a whole multiple of
    which each row has its share together (tokens flattened, beams). Other tensors with as many along `dim` are cut as
    well, all else goes to every row. A merged model is unmerged, and merged again when the block ends.

    Args:
        model: a model with adapters.
        rows: for each row a name, None (the base alone), or a tuple of names (their effects summed); or how many rows
            in turn each of these has; or a tensor of indices into `names`, -1 for the base.
        names: what the indices of a tensor stand for.
        dim: the dimension of the batch, from the front.

    Returns:
        A context manager whose exit brings the previous choice back; using it is optional.

    Raises:
        AdapterError: an absent name, no rows, two copies of one weight for a row, a norm in training that mixes rows;
            and in a call, another number of rows, or a module whose arguments or results cannot be told apart by rows.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> for name in ("first", "second"):
        ...     _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2, name=name)
        >>> with peftlib.route(model, ["second", None, "first"]):
        ...     y = model(torch.ones(3, 4))
    """
    of = names_by_row(rows, names)
    chosen = tuple(dict.fromkeys(name for own in of for name in own))
    selection = require(model, chosen)
    for own in dict.fromkeys(of):
        require_one_copy(model, own, "route")
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 0:
        raise AdapterError(f"route: dim={dim!r} is counted from the front, from 0. Pass dim=0, say.")
    found = Rows(of, dim)
    found.root = weakref.ref(model)
    modules = every_module(model)  # an adapter may have a norm of its own
    found.norms = tuple(weakref.ref(module) for module in modules if may_mix_rows(module))
    found.require_apart()
    for host in filter(is_host, modules):  # here, and not in the first call, where torch.compile would see it done
        found.groups(tuple(adapters_of(host)))
    return choose(model, selection, chosen, {}, found)


def names_by_row(rows: object, names: Sequence[Choice] | None) -> tuple[Names, ...]:
    if isinstance(rows, Tensor):
        return _by_index(rows, names)
    if names is not None:
        raise TypeError("names: it says what the indices of a tensor stand for, and rows is no tensor")
    if isinstance(rows, Mapping):
        return _some([names for choice, count in rows.items() for names in [_names(choice)] * _count(choice, count)])
    if isinstance(rows, str) or not isinstance(rows, Sequence):
        raise TypeError(f"rows: expected a list of names, a mapping or a tensor, found {type(rows).__name__}")
    return _some([_names(choice) for choice in rows])


def _by_index(rows: Tensor, names: Sequence[Choice] | None) -> tuple[Names, ...]:
    if names is None or rows.dim() != 1 or rows.is_floating_point() or rows.is_complex():
        raise TypeError("rows: a tensor holds whole numbers, one a row, and names= says what each of them stands for")
    known = [*map(_names, names), ()]
    found: list[int] = rows.tolist()
    for index in found:
        if not -1 <= index < len(names):
            raise AdapterError(f"route: index {index} stands for none of {len(names)} names. Use -1 for the base.")
    return _some([known[index] for index in found])


def _names(choice: object) -> Names:
    if choice is None:
        return ()
    if isinstance(choice, str):
        return (choice,)
    if isinstance(choice, tuple) and all(isinstance(name, str) for name in choice):
        return tuple(dict.fromkeys(choice))
    raise TypeError(f"rows: a row has a name, a tuple of names, or None, not {choice!r}")


def _count(choice: object, count: object) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise AdapterError(f"route: {choice!r} has {count!r} rows. Give it a whole number, from 0.")
    return count


def _some(of: list[Names]) -> tuple[Names, ...]:
    if not of:
        raise AdapterError("route: there are no rows. Name the adapters of one row at least, or call activate.")
    return tuple(of)

"""One batch for several trials: their batches joined by rows on the way in, the output cut by rows on the way out."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .._core.row_layout import is_for_all
from .._errors import AdapterError

_PLAIN = (bool, int, float, complex, str, type(None))


class Call(NamedTuple):
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Joined(NamedTuple):
    """The call for all trials, the rows of each, and how many positions a row has, if its first tensor says so."""

    call: Call
    rows: dict[str, int]
    positions: int


def as_call(batch: Any, kwargs: Mapping[str, Any]) -> Call:
    """A tuple or list holds a model's arguments, a mapping its keywords, anything else is its one argument."""
    if isinstance(batch, Mapping):
        return Call((), {**batch, **kwargs})
    return Call(tuple(batch) if isinstance(batch, (tuple, list)) else (batch,), dict(kwargs))


def joined(calls: Mapping[str, Call]) -> Joined:
    """A batch's rows are along the first dimension of its first tensor, and of other tensors with as many entries
    there; all else goes to every row, and must then be the same for all trials."""
    flat = {name: tree_flatten(tuple(call)) for name, call in calls.items()}
    first, (_, structure) = next(iter(flat.items()))
    for name, (_, other) in flat.items():
        if other != structure:
            raise _refusal(name, f"its batch is built otherwise than that of {first!r}", "Give all the same arguments")
    rows = {name: _rows_of(name, leaves) for name, (leaves, _) in flat.items()}
    keys = _keys(structure)
    columns = zip(keys, *(leaves for leaves, _ in flat.values()), strict=True)
    together = [_join(key, dict(zip(calls, column, strict=True)), rows) for key, *column in columns]
    tensor = next(leaf for leaf in together if isinstance(leaf, Tensor))
    return Joined(Call(*tree_unflatten(together, structure)), rows, tensor.shape[1] if tensor.dim() > 1 else 1)


def cut(output: Any, rows: Mapping[str, int], positions: int) -> dict[str, Any]:
    """What the model gave, for each trial; a row may have an entry for each of its positions (logits of flattened
    tokens)."""
    leaves, structure = tree_flatten(output)
    total = sum(rows.values())
    shares = [_share(leaf, total, positions, output) for leaf in leaves]
    found, start = {}, 0
    for name, count in rows.items():
        own = [
            leaf if share is None else leaf.narrow(0, start * share, count * share)
            for leaf, share in zip(leaves, shares, strict=True)
        ]
        found[name], start = tree_unflatten(own, structure), start + count
    return found


def _rows_of(name: str, leaves: Sequence[Any]) -> int:
    tensor = next((leaf for leaf in leaves if isinstance(leaf, Tensor)), None)
    if tensor is None or not tensor.dim() or not tensor.shape[0]:
        found = "no tensor" if tensor is None else f"a tensor of shape {list(tensor.shape)}"
        raise _refusal(name, f"its batch begins with {found}, which has no rows", "Put the rows in dimension 0")
    return tensor.shape[0]


def _keys(structure: TreeSpec) -> list[str]:
    """For each leaf the keyword that it belongs to, or nothing."""
    args, kwargs = structure.children()
    named = zip(kwargs.context, kwargs.children(), strict=True)
    return [""] * args.num_leaves + [key for key, inside in named for _ in range(inside.num_leaves)]


def _join(key: str, leaves: Mapping[str, Any], rows: Mapping[str, int]) -> Any:
    first, value = next(iter(leaves.items()))
    if not all(_has_rows(key, leaf, rows[name]) for name, leaf in leaves.items()):
        for name, leaf in leaves.items():
            if not _is_same(leaf, value):
                raise _refusal(
                    name,
                    f"{key or 'an argument'} has no rows and is not that of {first!r}",
                    "Give what has no rows to all alike, or train these trials apart",
                )
        return value
    for name, leaf in leaves.items():
        if leaf.shape[1:] != value.shape[1:] or leaf.dtype != value.dtype:
            found = f"{leaf.dtype} {list(leaf.shape)}, and that of {first!r} {value.dtype} {list(value.shape)}"
            raise _refusal(name, f"{key or 'a tensor'} is {found}", "Pad to one length, so that rows lie beside rows")
    return value if len(leaves) == 1 else torch.cat([*leaves.values()])


def _has_rows(key: str, leaf: Any, rows: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == rows and not is_for_all(key, leaf)


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    return one is other or (type(one) is type(other) and isinstance(one, _PLAIN) and one == other)


def _share(leaf: Any, total: int, positions: int, output: Any) -> int | None:
    if isinstance(leaf, _PLAIN):
        return None
    if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] in (total, total * positions):
        return leaf.shape[0] // total
    key = next((f" in {key!r}" for key, value in output.items() if value is leaf), "") if _is_mapping(output) else ""
    found = f"a tensor of shape {list(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
    raise AdapterError(
        f"Trials: the model returned {found}{key}, which cannot be cut into {total} rows. Compute losses from each "
        "trial's own logits, not in the model (pass no labels), and return no cache (use_cache=False)."
    )


def _is_mapping(output: Any) -> bool:
    return isinstance(output, Mapping)


def _refusal(name: str, found: str, advice: str) -> AdapterError:
    return AdapterError(f"trial {name!r}: {found}. {advice}.")

"""Which adapters each row of a batch goes through, and the rows sorted by what a host's adapters make of them."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import AdapterError

Names = tuple[str, ...]


class Rows:
    """The adapters of each row: plain data, made once, that `torch.compile` can guard on.

    `within` says of a thread that is inside a host's call for one group which rows these are: a host that runs inside
    that call sees them alone. `inside` holds the ids of such hosts, `plans` what each host has worked out once."""

    def __init__(self, of: tuple[Names, ...], dim: int) -> None:
        self.of, self.dim = of, dim
        self.within: dict[int, Rows] = {}
        self.inside: set[int] = set()
        self.root: weakref.ref[nn.Module] | None = None
        self.norms: tuple[weakref.ref[nn.Module], ...] = ()
        self.plans: dict[int, Any] = {}
        self._groups: dict[Names, Groups] = {}

    def groups(self, keys: Names) -> "Groups":
        """The rows by what a host with these keys of adapters makes of them."""
        if keys not in self._groups:
            known = tuple(dict.fromkeys(key.partition(":")[0] for key in keys))
            self._groups[keys] = Groups(self, known)
        return self._groups[keys]

    def __getstate__(self) -> dict[str, Any]:
        """A copy of one layer must not bring the model with it, nor the calls that other threads are in."""
        return Rows(self.of, self.dim).__dict__

    def require_apart(self) -> None:
        """Asked at each call: a norm that stood still may train by now."""
        for reference in self.norms:
            norm = reference()
            if norm is not None and mixes_rows(norm):
                raise AdapterError(
                    f"route: {self.name_of(norm)} normalises over all rows, so no row's result is what it would be "
                    "alone. Call eval() on it, or run each adapter's rows by themselves."
                )

    def name_of(self, module: nn.Module) -> str:
        """The qualified name and the type of a module, for messages."""
        model = None if self.root is None else self.root()
        named = () if model is None else model.named_modules()
        name = next((name for name, other in named if other is module), "")
        found = next((cls.__name__ for cls in type(module).__mro__ if not cls.__name__.startswith("Adapted")), "")
        return f"{name} ({found})" if name else found


def mixes_rows(module: nn.Module) -> bool:
    """Whether this is a norm whose statistics are, or become, those of all rows together."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.training or module.running_mean is None
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return module.training and module.track_running_stats
    return False


def may_mix_rows(module: nn.Module) -> bool:
    return isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm))


class RowTable:
    """Which of these choices each row goes through, as `torch.compile` sees it: the choices are the graph's, in an
    order of their own, and the rows are data, [rows]."""

    def __init__(self, by_row: list[Names], choices: set[Names]) -> None:
        self.choices = tuple(sorted(choices))
        self.index = torch.tensor([self.choices.index(names) for names in by_row])
        self.size = len(by_row)


class Group:
    """Rows that go through the same adapters of a host."""

    def __init__(self, names: Names, rows: Rows) -> None:
        self.names, self.rows, self.count = names, rows, len(rows.of)


class Groups:
    """The groups of one host, each with its rows in the batch's order. `order` sorts the batch by group, and `back`
    undoes that; both are None where the batch is sorted. `used` is the table of what the rows go through, `known` that
    of the base, each adapter, and what else they go through, which is the same for nearly every batch."""

    def __init__(self, rows: Rows, known: Names) -> None:
        by_row = [tuple(name for name in known if name in names) for names in rows.of]
        at: dict[Names, list[int]] = {}
        for row, names in enumerate(by_row):
            at.setdefault(names, []).append(row)
        if any(own != list(range(own[0], own[0] + len(own))) for own in at.values()):
            at = dict(sorted(at.items()))  # they are moved anyhow: compiled, one graph for all that differ in order
        alone = len(at) == 1
        self.used = RowTable(by_row, {*at})
        self.known = RowTable(by_row, {(), *((name,) for name in known), *at})
        self.dim = rows.dim
        self.each = tuple(
            Group(names, rows if alone else Rows(tuple(rows.of[row] for row in own), rows.dim))
            for names, own in at.items()
        )
        self.size, self.counts = len(rows.of), [group.count for group in self.each]
        order = [row for own in at.values() for row in own]
        self.order = self.back = None
        if order != sorted(order):
            self.order = torch.tensor(order)
            self.back = self.order.argsort()

    def split(self, tensor: Tensor, dim: int) -> list[Tensor]:
        """The rows of each group. Where a row of the batch has several here, they lie together."""
        share = tensor.shape[dim] // self.size
        return list(self.sorted(tensor, dim).split([share * count for count in self.counts], dim))

    def join(self, parts: list[Tensor], dim: int) -> Tensor:
        return self.unsorted(torch.cat(parts, dim), dim)

    def sorted(self, tensor: Tensor, dim: int) -> Tensor:
        return _moved(tensor, dim, self.size, self.order)

    def unsorted(self, tensor: Tensor, dim: int) -> Tensor:
        return _moved(tensor, dim, self.size, self.back)


def _moved(tensor: Tensor, dim: int, size: int, order: Tensor | None) -> Tensor:
    if order is None:
        return tensor
    order = order.to(tensor.device)
    if tensor.shape[dim] == size:
        return tensor.index_select(dim, order)
    return tensor.unflatten(dim, (size, -1)).index_select(dim, order).flatten(dim, dim + 1)

"""Where the rows are in what a host is called with and in what it returns, so that both can be cut and joined by them.

A call's rows are those of its first tensor: the batch's B, or a whole multiple k·B in which the k of each row lie
together. Other tensors with B or k·B entries along the rows' dimension are cut as well; all else is passed whole.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .._errors import AdapterError
from .row_groups import Groups, Rows

Call = tuple[list[Any], dict[str, Any]]

_PLAIN = (bool, int, float, complex, str, type(None), type, torch.dtype, torch.device, torch.layout, slice)
# torch's modules that say by `batch_first` where the rows are, and the arguments that this is said of.
_SEQUENCES = frozenset({"query", "key", "value", "src", "tgt", "memory", "input"})
BATCH_FIRST = (nn.RNNBase, nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
# [queries, keys], the same for all rows; or, in a model of transformers, [positions].
_FOR_ALL = {"attn_mask": 2, "src_mask": 2, "tgt_mask": 2, "memory_mask": 2, "mask": 2, "cache_position": 1}
# [rows·heads, ...], the heads of each row together, whatever the rows of the other arguments are: Bloom's, Falcon's.
_BY_HEAD = frozenset({"alibi"})
_BY_ROW = frozenset({"attention_mask", "position_ids", "input_ids", "token_type_ids", "key_padding_mask"})


def is_for_all(name: str, tensor: Tensor) -> bool:
    """Whether an argument of this name is the same for all rows. torch's `mask` is square; a user's own may be
    [rows, positions]."""
    return tensor.dim() == _FOR_ALL.get(name) and (name != "mask" or tensor.shape[0] == tensor.shape[1])


class Layout:
    """Cuts one call of a host by groups of rows, and joins what came back."""

    def __init__(self, host: Any, groups: Groups, rows: Rows) -> None:
        self.host, self.groups, self.rows = host, groups, rows
        self.share = 1
        self.whole: list[Any] = []

    def split_inputs(self, args: Any, kwargs: Mapping[str, Any], *, objects: bool = False) -> list[Call]:
        """The arguments for each group. With `objects`, what is neither tensor nor plain goes whole to all."""
        known = getattr(type(self.host), "_argument_names", ())  # of a module that has no adapters of its own, none
        names = [*zip(known, args, strict=False)]
        names += [("", value) for value in args[len(names) :]]
        named = [*names, *kwargs.items()]
        primary = self._primary(named)
        by_argument = [self._split_argument(name, value, primary, objects) for name, value in named]
        return [
            (
                [value[i] for value in by_argument[: len(args)]],
                dict(zip(kwargs, (value[i] for value in by_argument[len(args) :]), strict=True)),
            )
            for i in range(len(self.groups.each))
        ]

    def require_one_weight(self) -> None:
        """A lookup with `max_norm` writes to its weight, which the groups behind would start from."""
        if getattr(self.host, "max_norm", None) is not None:
            raise self._refusal(
                "changes its weight in each call (max_norm), so one group's rows would change another's",
                "Adapt another module, or run each adapter's rows by themselves",
            )

    def _primary(self, named: list[tuple[str, Any]]) -> Tensor:
        """The first tensor, which says how many rows there are."""
        for name, value in named:
            for leaf in tree_flatten(value)[0]:
                if isinstance(leaf, Tensor):
                    self.share = self._share_of(leaf, self._dim_of(name))
                    return leaf
        raise self._refusal("was called with no tensor, so there are no rows to tell apart", "Adapt a module inside it")

    def _share_of(self, tensor: Tensor, dim: int) -> int:
        size = self.groups.size
        has_rows = tensor.dim() > dim + tensor.is_floating_point() and not self._is_one_sample(tensor)
        if not has_rows or tensor.shape[dim] % size or not tensor.shape[dim]:
            raise self._refusal(
                f"was called with a tensor of shape {list(tensor.shape)}, whose dimension {dim} is no whole multiple "
                f"of the {size} rows that were routed",
                "Route as many rows as the batch has (dim= says where they are), or leave this module out",
            )
        return tensor.shape[dim] // size

    def _is_one_sample(self, tensor: Tensor) -> bool:
        """torch's modules also take one sample without a dimension for the batch."""
        host = self.host
        if isinstance(host, nn.modules.conv._ConvNd):
            return tensor.dim() == len(host.kernel_size) + 1
        sampled = isinstance(host, BATCH_FIRST) and tensor.dim() == 2
        return sampled or (isinstance(host, nn.EmbeddingBag) and tensor.dim() == 1)

    def _dim_of(self, name: str) -> int:
        if not isinstance(self.host, BATCH_FIRST):
            return self.groups.dim
        if name == "hx":
            return 1
        return int(name in _SEQUENCES and not _is_batch_first(self.host))

    def _split_argument(self, name: str, value: Any, primary: Tensor, objects: bool) -> list[Any]:
        leaves, structure = tree_flatten(value)
        cut = [self._split_leaf(name, leaf, primary, objects) for leaf in leaves]
        return [tree_unflatten([parts[i] for parts in cut], structure) for i in range(len(self.groups.each))]

    def _split_leaf(self, name: str, leaf: Any, primary: Tensor, objects: bool) -> list[Any]:
        dim = self._dim_of(name)
        if isinstance(leaf, Tensor) and (leaf is primary or self._has_rows(name, leaf, dim, primary)):
            return self.groups.split(leaf, dim)
        if not (objects or isinstance(leaf, (Tensor, *_PLAIN)) or callable(leaf)):
            raise self._refusal(
                f"was called with {name or 'an argument'} of type {type(leaf).__name__}, which cannot be cut by rows",
                "Leave it out (of a cache, use_cache=False), or adapt a module inside",
            )
        self.whole.append(leaf)
        return [leaf] * len(self.groups.each)

    def _has_rows(self, name: str, tensor: Tensor, dim: int, primary: Tensor) -> bool:
        if tensor.dim() <= dim or is_for_all(name, tensor):
            return False
        if name in _BY_HEAD and tensor.shape[dim] % self.groups.size == 0:
            return True
        if tensor.shape[dim] not in (self.groups.size, self.share * self.groups.size):
            return False
        if self._is_ambiguous(name, tensor, dim, primary):
            raise self._refusal(
                f"was called with {name or 'a tensor'} of shape {list(tensor.shape)}, where {tensor.shape[dim]} may be "
                "the rows or the positions",
                "Pad to another length, or route another number of rows",
            )
        return True

    def _is_ambiguous(self, name: str, tensor: Tensor, dim: int, primary: Tensor) -> bool:
        """A short tensor beside a sequence of as many positions as there are rows."""
        is_sequence = primary.dim() == 3 or (primary.dim() == 2 and not primary.is_floating_point())
        short = tensor.dim() <= 2 and tensor.shape != primary.shape and name not in _BY_ROW
        return is_sequence and short and primary.shape[1 - dim if dim < 2 else dim] == tensor.shape[dim]

    def split_outputs(self, output: Any) -> list[Any]:
        """What the host gave for all rows, for each group."""
        leaves, structure = tree_flatten(output)
        dims = self._output_dims(output, leaves)
        if not any(map(self._gave_rows, leaves, dims)):
            raise self._refusal("returned nothing with the rows that it was called with", "Adapt a module inside it")
        cut = [
            self.groups.split(leaf, dim) if self._gave_rows(leaf, dim) else [leaf] * len(self.groups.each)
            for leaf, dim in zip(leaves, dims, strict=True)
        ]
        self.whole += [parts[0] for parts in cut if parts[0] is parts[-1]]
        return [tree_unflatten([parts[i] for parts in cut], structure) for i in range(len(self.groups.each))]

    def _gave_rows(self, leaf: Any, dim: int) -> bool:
        sizes = (self.groups.size, self.share * self.groups.size)
        return isinstance(leaf, Tensor) and leaf.dim() > dim and leaf.shape[dim] in sizes

    def join_outputs(self, outputs: list[Any]) -> Any:
        """What the groups gave, as one batch in its own order."""
        flat = [tree_flatten(output) for output in outputs]
        leaves, structure = flat[0]
        if any(other != structure for _, other in flat):
            raise self._refusal("returned other structures for some rows than for others", "Adapt a module inside it")
        dims = self._output_dims(outputs[0], leaves)
        joined = [self._join([found[i] for found, _ in flat], dims[i]) for i in range(len(leaves))]
        return tree_unflatten(joined, structure)

    def _join(self, parts: list[Any], dim: int) -> Any:
        first = parts[0]
        if any(first is item for item in self.whole) and all(part is first for part in parts):
            return first
        if all(isinstance(part, Tensor) and part.dim() > dim for part in parts):
            if len({(*part.shape[:dim], *part.shape[dim + 1 :]) for part in parts}) > 1:
                raise self._refusal(
                    f"returned {' and '.join(str([*part.shape]) for part in parts)} for groups of rows, which lie in "
                    "no common batch",
                    "Route adapters together that lengthen a row alike (a Prompt of one length)",
                )
            shares = {part.shape[dim] / count for part, count in zip(parts, self.groups.counts, strict=True)}
            if len(shares) == 1 and shares <= {1, self.share}:
                return self.groups.join(parts, dim)
            if first.dim() > dim + 1 and all(part.shape[dim] == 1 for part in parts):
                return self.groups.join(self._for_each_row(parts, dim), dim)
        if isinstance(first, _PLAIN) and all(part == first for part in parts):
            return first
        found = f"a tensor of shape {list(first.shape)}" if isinstance(first, Tensor) else type(first).__name__
        raise self._refusal(f"returned {found}, which has no rows to join", "Adapt a module inside it")

    def _for_each_row(self, parts: list[Tensor], dim: int) -> list[Tensor]:
        """What is one for all rows of a group, a bias of positions that a module hands on, is that of each of them."""
        counts = [self.share * count for count in self.groups.counts]
        return [
            part.expand(*part.shape[:dim], n, *part.shape[dim + 1 :]) for part, n in zip(parts, counts, strict=True)
        ]

    def _output_dims(self, output: Any, leaves: list[Any]) -> list[int]:
        """The weights that torch's attention returns have the rows in front, its RNNs' states behind layers."""
        if not isinstance(self.host, BATCH_FIRST):
            return [self.groups.dim] * len(leaves)
        first = int(not _is_batch_first(self.host))
        later = 1 if isinstance(self.host, nn.RNNBase) else 0
        return [first, *[later] * (len(leaves) - 1)]

    def _refusal(self, found: str, advice: str) -> AdapterError:
        return AdapterError(f"route: {self.rows.name_of(self.host)} {found}. {advice}.")


def _is_batch_first(host: Any) -> bool:
    return host.batch_first if hasattr(host, "batch_first") else host.self_attn.batch_first

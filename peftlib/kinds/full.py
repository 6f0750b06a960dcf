"""Full: a host's own trainable copy of its weights."""

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._core.adapter import Adapter, state_of, trainable_dtype
from .._core.host import is_host
from .._core.override import owner_of, weight_of
from .._core.quantized import not_real_as
from .._errors import AdapterError
from ._row_parameters import full_rows

_OWN = "own"


class Full(Adapter):
    r"""The host with a trainable copy of named weights: a task head, a norm, a bias (BitFit, Ben Zaken et al. 2021),
    a whole layer. Switched, merged, saved and ejected like every other adapter.

    .. math:: y = \mathrm{host}_{W'}(x), \qquad W' = W \text{ at the start}

    Persistent buffers among the names are copied too, so the running statistics of a BatchNorm stay with the adapter.
    With `rows`, only these rows are copied and train: new tokens of an embedding, say.

    Args:
        host: the module to adapt, from `inject`.
        params: glob, or list of globs, over the names of the host's parameters and buffers, those of its children
            included ("bias", "*.weight"); default all.
        rows: indices into the first dimension of each chosen weight; default all of it.
        dtype: of the copies of floating-point parameters; default the weight's own, or float32 beside half precision.

    Raises:
        AdapterError: a pattern that matches nothing, a host without weights, weights that are not floating point, or
            rows that are not there, or named twice.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
        >>> peftlib.inject(model, torch.nn.LayerNorm, peftlib.Full)
        ['1']
        >>> peftlib.inject(model, "2", peftlib.Full, params="bias")
        ['2']
    """

    rows: Tensor | None
    covers_children = True

    def __init__(
        self,
        host: nn.Module,
        *,
        params: str | Sequence[str] | None = None,
        rows: Sequence[int] | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.aliases = _chosen(host, params)
        self.replaces = tuple(alias for aliases in self.aliases.values() for alias in aliases) if rows is None else ()
        self.register_buffer("rows", None if rows is None else _rows_of(host, [*self.aliases], rows), persistent=False)
        self.axes = {f"{_OWN}.weight": (0, 1), f"{_OWN}.bias": (0, None)} if rows is None else {}
        self.own = nn.Module()
        for path in self.aliases:
            self._copy(host, path, dtype)

    def _copy(self, host: nn.Module, path: str, dtype: str | torch.dtype | None) -> None:
        _require_read(host, path)
        owner, leaf = _container(self.own, path)
        weight = weight_of(host, path)
        if self.rows is not None:
            weight = nn.Parameter(weight.detach().index_select(0, self.rows))
        if not isinstance(weight, nn.Parameter):
            owner.register_buffer(leaf, weight.detach().clone())
            return
        unreal = not_real_as(*owner_of(host, path))
        if unreal:
            raise AdapterError(f"{type(host).__name__}.{path} is {unreal}, which cannot train. Leave it out of params.")
        copy = torch.empty_like(weight, dtype=trainable_dtype(dtype, weight)).copy_(weight.detach())
        owner.register_parameter(leaf, nn.Parameter(copy))

    def fold(self, host: nn.Module) -> dict[str, Tensor]:
        """The copies, under every name by which the host knows them."""
        return {alias: self._value(host, path) for path, aliases in self.aliases.items() for alias in aliases}

    @classmethod
    def together(cls, host: nn.Module, groups: Any, adapters: Any) -> Any:
        plain = all(type(one) is Full for own in adapters for one in own)
        return full_rows(host, groups, adapters) if plain and groups.dim == 0 else None

    def _value(self, host: nn.Module, path: str) -> Tensor:
        copy = weight_of(self.own, path)
        if self.rows is None:
            return copy
        weight = weight_of(host, path)
        wide = torch.promote_types(weight.dtype, copy.dtype)
        return weight.to(wide).index_copy(0, self.rows, copy.to(wide))

    def takes_weight(self, host: nn.Module) -> bool:
        """Statistics of its own move in training, and what lies between them and the base's would take no note."""
        return not any(True for _ in self.own.buffers())

    @classmethod
    def split(cls, host: nn.Module, inner: str, config: dict[str, Any]) -> list[dict[str, Any]]:
        if not inner:
            return [config]
        params = config.get("params") or "*"
        return [{**config, "params": [f"{inner}.{name}" for name in ([params] if isinstance(params, str) else params)]}]

    def copies(self) -> dict[str, Tensor | None]:
        return {alias: self.rows for aliases in self.aliases.values() for alias in aliases}

    def assigned(self, path: str, value: Any) -> None:
        for first, aliases in self.aliases.items():
            if path in aliases:
                owner, leaf = owner_of(self.own, first)
                owner._buffers[leaf] = value

    def file_keys(self) -> dict[str, str]:
        return {key.removeprefix(f"{_OWN}."): key for key in state_of(self)}


def _rows_of(host: nn.Module, paths: list[str], rows: Sequence[int]) -> Tensor:
    for path in paths:
        weight = weight_of(host, path)
        height = weight.shape[0] if weight.dim() > 1 else 0
        valid = all(type(row) is int and 0 <= row < height for row in rows) and len({*rows}) == len(rows) > 0
        if not valid or not_real_as(*owner_of(host, path)):
            raise AdapterError(
                f"rows={list(rows)[:8]}: {type(host).__name__}.{path} has shape {tuple(weight.shape)}, dtype "
                f"{weight.dtype}. Name rows of a floating-point matrix, each once."
            )
    return torch.tensor(list(rows), device=weight_of(host, paths[0]).device)


def _require_read(host: nn.Module, path: str) -> None:
    """torch's hook-style weight_norm, spectral_norm and pruning compute `weight` before the host's forward begins."""
    computed = path.rpartition("_")[0]
    if isinstance(host.__dict__.get(computed), Tensor):
        raise AdapterError(
            f"{type(host).__name__}.{path}: a hook computes {computed!r} from it before forward, so a copy would not "
            f"act. Use torch.nn.utils.parametrizations, remove the hook, or leave {path!r} out of params."
        )


def _chosen(host: nn.Module, params: str | Sequence[str] | None) -> dict[str, list[str]]:
    """The first name of each chosen tensor, and all its names: a weight tied inside the host is copied once."""
    named = _tensors(host)
    patterns = ["*"] if params is None else [params] if isinstance(params, str) else params
    for pattern in patterns:
        if not fnmatch.filter(named, pattern):
            names = ", ".join(named) or "none"
            raise AdapterError(
                f"params={pattern!r} matches no weight of {type(host).__name__} (it has {names}). Name one of them."
            )
    chosen: dict[str, list[str]] = {}
    first: dict[int, str] = {}
    for name, tensor in named.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            chosen.setdefault(first.setdefault(id(tensor), name), []).append(name)
    return chosen


def _tensors(host: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, under all their names, without those of adapters inside."""
    found: dict[str, Tensor] = {}
    for prefix, module in host.named_modules(remove_duplicate=False):
        if ".adapters." in f".{prefix}." and _in_adapters(host, prefix):
            continue
        own = {
            **module._parameters,
            **{k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set},
        }
        found.update({f"{prefix}.{leaf}".lstrip("."): tensor for leaf, tensor in own.items() if tensor is not None})
    return found


def _in_adapters(host: nn.Module, prefix: str) -> bool:
    names = prefix.split(".")
    return any(name == "adapters" and is_host(host.get_submodule(".".join(names[:i]))) for i, name in enumerate(names))


def _container(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    *parents, leaf = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    return root, leaf

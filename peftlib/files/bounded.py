"""A bound on what torch may allocate while a file's keywords are tried."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .._errors import AdapterError


class Bounded(TorchDispatchMode):
    """Inside, each operation is asked on the meta device for the size of its result before it runs."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        size = 0 if _is_on_meta(args, kwargs) else _size_of_result(func, args, kwargs)
        if size > self.limit:
            raise AdapterError(f"{func} would take {size:,} bytes, and {self.limit:,} are what this file may ask for")
        return func(*args, **kwargs)


def _is_on_meta(args: Any, kwargs: Any) -> bool:
    device = args[0].device if args and isinstance(args[0], Tensor) else kwargs.get("device")
    return device is not None and torch.device(device).type == "meta"


def _size_of_result(func: Any, args: Any, kwargs: Any) -> int:
    made = any(argument.name == "device" for argument in func._schema.arguments)
    kwargs = {**kwargs, "device": torch.device("meta")} if made else kwargs
    try:
        result = func(*tree_map(_shape_only, args), **tree_map(_shape_only, kwargs))
    except (NotImplementedError, RuntimeError):  # it depends on values: `item`, `nonzero`, and others as small
        return 0
    return sum(leaf.untyped_storage().nbytes() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))


def _shape_only(item: Any) -> Any:
    return torch.empty_like(item, device="meta") if isinstance(item, Tensor) else item

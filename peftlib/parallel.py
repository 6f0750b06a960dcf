"""Tensor parallel: adapters placed on the processes as their hosts' weights are."""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from ._core.adapter import Adapter
from ._core.host import adapters_of, is_host, parts
from ._core.sharded import is_sharded, place
from ._errors import AdapterError

Style = TypeVar("Style")


def tensor_parallel(plan: Mapping[str, Style]) -> dict[str, Style]:
    r"""A plan for `torch.distributed.tensor.parallel.parallelize_module`, for a model with adapters in it.

    .. math:: [W_1; W_2]\,x + s\,[B_1; B_2]\,A\,x \text{ by columns}, \qquad
        \textstyle\sum_i W_i x_i + s\,B \sum_i A_i x_i \text{ by rows}

    torch's styles know the weight and the bias of a Linear. Here each style places these, and then the adapters beside
    them: what goes along the outputs or the inputs that are split is split with them (B, A, a magnitude, a factor, a
    copy of the weight), and the rest is whole on every process. The result is that of one process. Inject first.

    Args:
        plan: a style (`ColwiseParallel()`, `RowwiseParallel()`, ...) for each name, as `parallelize_module` takes it.

    Returns:
        dict: the same names and styles; where a module has no adapters, each does what it did.

    Raises:
        AdapterError: when the plan is carried out, a host whose own weights it leaves as they are.

    Example:
        >>> from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
        >>> plan = peftlib.tensor_parallel({"layers.*.up": ColwiseParallel(), "layers.*.down": RowwiseParallel()})
        >>> list(plan)
        ['layers.*.up', 'layers.*.down']
    """
    return {name: _around_adapters(style) for name, style in plan.items()}


def _around_adapters(style: Style) -> Style:
    ours: Any = copy.copy(style)
    ours._apply = functools.partial(_apply, ours._apply)
    return ours


def _apply(theirs: Callable[[nn.Module, Any], nn.Module], module: nn.Module, mesh: Any) -> nn.Module:
    if not is_host(module):
        return theirs(module, mesh)
    children = adapters_of(module)
    del module._modules["adapters"]  # a style would take the adapters' parameters for the host's
    try:
        theirs(module, mesh)
    finally:
        module._modules["adapters"] = children
    for adapter in parts(module):
        _placed(adapter, module, mesh)
    return module


def _placed(adapter: Adapter, host: nn.Module, mesh: Any) -> None:
    weight: Any = getattr(host, "weight", None)
    if not is_sharded(weight):
        raise AdapterError(
            f"tensor_parallel: {type(host).__name__} has adapters, and its weight is on one process. "
            "Give its name a style that splits it, or leave it out of the plan."
        )
    place(adapter, host, mesh, weight.placements)

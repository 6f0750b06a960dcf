"""An autograd function beside other threads."""

from _thread import _count as threads_beside_the_first  # threading.active_count takes a lock
from typing import Any

from torch import Tensor
from torch.autograd import Function


def apply(function: type[Function], *arguments: Any) -> Any:
    """`function.apply`, without the deadlock that torch 2.13 has where another thread reads the same parameter.

    To make the node that adds up a parameter's gradient torch locks the parameter, and then waits for the GIL. Its own
    operations have let go of the GIL before; a function written in Python holds it while it waits for the lock. Where
    the node lives already nobody waits for the GIL, and a view of the parameter keeps it alive: 1 µs each. For where
    gradients flow; elsewhere nothing needs a function.
    """
    if not threads_beside_the_first():
        return function.apply(*arguments)
    views = [each.view_as(each) for each in arguments if isinstance(each, Tensor) and _is_trained_leaf(each)]
    result = function.apply(*arguments)
    del views
    return result


def _is_trained_leaf(tensor: Tensor) -> bool:
    return tensor.requires_grad and tensor.is_leaf

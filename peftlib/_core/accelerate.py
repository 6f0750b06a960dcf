"""The hooks of accelerate: where they keep a module's forward, and its weights while it does not compute."""

import contextlib
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn


def is_bound(function: Any, host: Any, cls: Any) -> bool:
    """Whether this is `host.forward` as the class has it."""
    bound = isinstance(function, types.MethodType) and function.__self__ is host
    return bound and function.__func__ is cls.forward


def place_of_forward(host: Any) -> str | None:
    """The attribute of the host itself under which a hook, or one that is gone, keeps the class's forward.

    Adapters go there, inside the hook: it moves weights and inputs to where the host computes."""
    places = (place for place in ("_old_forward", "forward") if place in host.__dict__)
    return next((place for place in places if is_bound(host.__dict__[place], host, type(host))), None)


def hook_of(module: nn.Module) -> Any:
    return module.__dict__.get("_hf_hook")


@contextlib.contextmanager
def present(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Has the weights that are kept in memory or on disk between calls where they are during one."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            if _offloading(module):
                hook_of(module).pre_forward(module)
                stack.callback(hook_of(module).post_forward, module, None)
        yield


def is_offloaded(host: nn.Module) -> bool:
    return any(_offloading(module) for module in host.modules())


def device_of(host: nn.Module) -> torch.device:
    """Where the host computes."""
    offloading = (hook for module in host.modules() for hook in _offloading(module))
    device = next((hook.execution_device for hook in offloading if hook.execution_device is not None), None)
    if device is None:
        return next((parameter.device for parameter in host.parameters()), torch.device("cpu"))
    return torch.device(device)


def _offloading(module: nn.Module) -> list[Any]:
    hooks = getattr(hook_of(module), "hooks", (hook_of(module),))
    return [hook for hook in hooks if getattr(hook, "offload", False)]

"""What it is for a layer group to be frozen: no gradient, and running statistics that stay frozen."""

import gc
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .._errors import AdapterError
from .layer_groups import LayerGroup


class _InEvalMode:
    """Runs a module in eval mode, whatever `model.train()` said; a hook, because that is called again and again."""

    def __init__(self) -> None:
        self.was: list[bool] = []

    def before(self, module: nn.Module, args: Any) -> None:
        self.was.append(module.training)
        module.training = False

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        module.training = self.was.pop()


class Switch:
    """Freezes and unfreezes one group."""

    def __init__(self, group: LayerGroup, hold_statistics: bool) -> None:
        self.group, self.held = group, list(group.statistics.values()) if hold_statistics else []
        self.handles: list[Any] = []

    def freeze(self) -> None:
        for p in self.group.parameters.values():
            p.requires_grad_(False)
        self.drop_gradients()
        if self.handles:
            return
        for module in self.held:
            mode = _InEvalMode()
            self.handles.append(module.register_forward_pre_hook(mode.before))
            self.handles.append(module.register_forward_hook(mode.after, always_call=True))

    def drop_gradients(self) -> None:
        """An optimizer passes over what has no gradient: no update, no decay, no momentum, no state."""
        for p in self.group.parameters.values():
            p.grad = None

    def unfreeze(self) -> None:
        for p in self.group.parameters.values():
            p.requires_grad_(True)
        for handle in self.handles:
            handle.remove()
        self.handles = []


def require_reduced(groups: Iterable[LayerGroup]) -> None:
    """DDP averages the gradients of what required one when it was made, and of nothing else, without a word."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    scheduled = {id(p) for group in groups for p in group.parameters.values()}
    gc.collect()  # a wrapper that was thrown away may still stand in a cycle
    for wrapper in [each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel)]:
        named = [(name, p) for name, p in wrapper.module.named_parameters() if name not in wrapper.parameters_to_ignore]
        own = [p for _, p in named if p.requires_grad or id(p) in scheduled]
        reduced = wrapper._get_ddp_logging_data().get("num_parameter_tensors", len(own))
        if len(own) > reduced and any(id(p) in scheduled for p in own):
            raise AdapterError(
                f"GradualUnfreezing: DistributedDataParallel averages the gradients of {reduced} parameters and "
                f"{len(own)} will train, because it was made after the rest was frozen. Make it first, with "
                "find_unused_parameters=True, then GradualUnfreezing."
            )

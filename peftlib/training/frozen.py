"""What it is for a layer group to be frozen: no gradient, and running statistics that stay frozen."""

from typing import Any

from torch import nn

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

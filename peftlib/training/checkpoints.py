"""Checkpoints of another library's trainer: what of a model's state dict is a frozen base, and may be left out."""

from typing import Any

from torch import nn

from .._core.host import Adapters
from .layer_groups import trains


def frozen_keys(model: nn.Module) -> set[str]:
    """Keys of the base in `state_dict()`, where none of its parameters trains, sooner or later; else nothing may be
    left out. A wrapper's name in front of the model's own stays."""
    inside = {
        f"{name}." for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, Adapters)
    }
    if not inside or any(trains(p) for name, p in model.named_parameters() if not _is_inside(name, inside)):
        return set()
    return {key for key in model.state_dict() if not _is_inside(key, inside)}


def forgive_frozen_keys(model: nn.Module, found: Any) -> None:
    """As a hook behind `load_state_dict`: a checkpoint that has all of the adapters and nothing of a frozen base."""
    if found.missing_keys and set(found.missing_keys) == frozen_keys(model):
        found.missing_keys.clear()


def _is_inside(key: str, prefixes: set[str]) -> bool:
    parts = key.split(".")
    return any(".".join([*parts[:i], ""]) in prefixes for i in range(1, len(parts)))

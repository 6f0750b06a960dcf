"""HF peft's adapters: its directories read and written, its configurations put into a model; a Trainer's callback."""

from typing import TYPE_CHECKING, Any

from .directory import inject as inject
from .directory import load as load
from .directory import save as save

if TYPE_CHECKING:
    from .trainer import TrainerCallback as TrainerCallback


def __getattr__(name: str) -> Any:
    if name == "TrainerCallback":  # on use: it imports transformers, which takes seconds
        from .trainer import TrainerCallback

        return TrainerCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

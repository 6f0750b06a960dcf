"""The tensors of a foreign file: their shapes at once, their values when asked for, and which are unexplained."""

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from .._errors import AdapterError
from ..files.header import some
from .targets import PREFIX, compiled


def renamed(keys: Iterable[str], mapping: Mapping[str, str], where: str) -> dict[str, str]:
    """The keys of a file under their names of today. Those of prompts, without peft's prefix, have none."""
    ways = [(compiled(pattern), to) for pattern, to in mapping.items()]
    names: dict[str, str] = {}
    for key in keys:
        prefix = PREFIX if key.startswith(PREFIX) else None
        now = key if prefix is None else prefix + _renamed(key.removeprefix(prefix), ways)
        if now in names:
            raise AdapterError(f"{where}: {names[now]} and {key} are both {now} by key_mapping. Correct it.")
        names[now] = key
    return names


def _renamed(key: str, ways: list[tuple[re.Pattern[str], str]]) -> str:
    tried = (pattern.subn(to, key) for pattern, to in ways)
    return next((now for now, times in tried if times), key)


class FileTensors:
    """Each tensor is taken once, in the shape that it must have; what is left over in the end was not understood.
    `names` are the file's own keys, for messages, where they are not the ones by which the tensors are taken."""

    def __init__(
        self,
        shapes: dict[str, list[int]],
        read: Callable[[str], Tensor],
        where: str,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.shapes, self._read, self.where, self._names = shapes, read, where, names or {}
        self.left = dict.fromkeys(shapes)

    def take(self, key: str, shape: tuple[int, ...] | torch.Size) -> Tensor:
        shown = self._names.get(key, key)
        if key not in self.left:
            raise AdapterError(f"{self.where}: {shown} is missing. Save it again from its model.")
        if self.shapes[key] != list(shape):
            raise AdapterError(
                f"{self.where}: {shown} has shape {self.shapes[key]}, expected {list(shape)}. "
                "Load it onto its own base."
            )
        del self.left[key]
        return self._read(key)

    def own_name(self, module: str) -> str:
        """What the file calls a module that has a pair in it."""
        key = f"{PREFIX}{module}.lora_A.weight"
        return self._names.get(key, key).removeprefix(PREFIX).removesuffix(".lora_A.weight")

    def leave(self, inside: str) -> None:
        """What says nothing here."""
        self.left = {key: None for key in self.left if inside not in key}

    def require_all_taken(self) -> None:
        if self.left:
            found = some(sorted(self._names.get(key, key) for key in self.left))
            raise AdapterError(
                f"{self.where}: {found}: not understood, and leaving it out could change the result. Remove it from "
                "the file if it has no effect."
            )

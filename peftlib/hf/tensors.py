"""The tensors of a foreign file: their shapes at once, their values when asked for, and which are unexplained."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .._errors import AdapterError
from ..files.header import some


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

    def require_all_taken(self) -> None:
        if self.left:
            found = some(sorted(self._names.get(key, key) for key in self.left))
            raise AdapterError(
                f"{self.where}: {found}: not understood, and leaving it out could change the result. Remove it from "
                "the file if it has no effect."
            )

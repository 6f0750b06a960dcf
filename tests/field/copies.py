"""Deep copies of one model, many: pickled once, for it is the dictionaries of its modules that take time to copy."""

import copy
import io
import pickle
from typing import Any

from torch import Tensor, nn


class Copies:
    def __init__(self, model: nn.Module) -> None:
        self.model, self.pickled = model, io.BytesIO()
        self.pickler = _Apart(self.pickled)
        try:
            self.pickler.dump(model)
        except Exception:  # a model with a lambda, or one that is parametrized, is no pickle
            self.pickled = None

    def one(self) -> Any:
        if self.pickled is None:
            return copy.deepcopy(self.model)
        self.pickled.seek(0)
        return _Together(self.pickled, self.pickler.apart).load()


class _Apart(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.apart: list[Tensor] = []
        self.places: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        place = self.places.setdefault(id(obj), len(self.apart))
        self.apart += [obj] if place == len(self.apart) else []
        return place


class _Together(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, apart: list[Tensor]) -> None:
        super().__init__(file)
        self.apart = apart
        self.copied: dict[int, Any] = {}  # of all tensors, for some share storage

    def persistent_load(self, pid: int) -> Tensor:
        return copy.deepcopy(self.apart[pid], self.copied)

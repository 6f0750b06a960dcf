"""The modules of a model by name and names by module, looked up once a call."""

from torch import nn

from .._core.readers import Readers
from .._core.readers import Site as Place
from .._core.walk import candidates


class Modules:
    """`by_name` in the model's order, the root as ""; `name_of` by the identity of a module."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.by_name: dict[str, nn.Module] = dict(candidates(model))
        self.name_of = {id(module): name for name, module in self.by_name.items()}
        self.names = [name for name in self.by_name if name]
        self._readers = Readers(candidates(model, aliases=True))

    def place(self, name: str, whole: bool = False) -> Place:
        """Where a module is adapted: at itself, or from what reads its weights (`whole`: or those inside it)."""
        return self._readers.site(name, self.by_name[name], whole)

"""Edited copies of kernel files: a test that passes with one of them would prove nothing."""

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

_numbers = itertools.count()


def mutant(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """A copy of `module`, in the same package, with the one place that says `old` saying `new`."""
    source = Path(module.__file__).read_text()
    if source.count(old) != 1:
        raise ValueError(f"{module.__name__} says {old!r} {source.count(old)} times; a mutation needs one place")
    number = next(_numbers)
    path = folder / f"mutant_{number}.py"  # the interpreter reads a kernel's source again from its file
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"{module.__package__}.mutant_{number}", path)
    copy = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = copy
    spec.loader.exec_module(copy)
    return copy

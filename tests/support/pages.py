"""What a reader sees: the code blocks of a page, and the public names of a package."""

import ast
import re
from pathlib import Path
from types import ModuleType

import peftlib

BLOCK = re.compile(r"^```(python|pycon)[ ]*(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, label: str = "") -> list[tuple[str, int, str]]:
    """Each block of the page with this label after its language: the language, its first line, its text."""
    text = page.read_text()
    return [(m[1], text.count("\n", 0, m.start(3)), m[3]) for m in BLOCK.finditer(text) if m[2] == label]


def all_public_objects() -> dict[str, object]:
    """Those of the package, and of the modules that it imports when they are used."""
    found = public_objects()
    for name in peftlib._ON_USE:
        module = getattr(peftlib, name)
        tree = ast.parse(Path(str(module.__file__)).read_text())
        own = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
        found |= public_objects(module) or {f"{module.__name__}.{one}": getattr(module, one) for one in own}
    return found


def public_objects(module: ModuleType = peftlib) -> dict[str, object]:
    """Qualified name -> object, of what a package exports: `from ._file import name as name`, modules included."""
    found: dict[str, object] = {}
    tree = ast.parse(Path(str(module.__file__)).read_text())
    exported = [
        alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names if alias.asname
    ]
    for name in exported:
        found[f"{module.__name__}.{name}"] = thing = getattr(module, name)
        if isinstance(thing, ModuleType):
            found |= public_objects(thing)
    return found

"""What a reader sees: the code blocks of a page, and the public names of a package."""

import ast
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import peftlib

BLOCK = re.compile(r"^```(python|pycon)[ ]*(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, label: str = "") -> list[tuple[str, int, str]]:
    """Each block of the page with this label after its language: the language, its first line, its text."""
    text = page.read_text()
    return [(m[1], text.count("\n", 0, m.start(3)), m[3]) for m in BLOCK.finditer(text) if m[2] == label]


def names_on_use() -> list[str]:
    """Public names of the modules that the package imports when they are used, read from their sources: some of these
    import another library, which may take seconds."""
    return [f"peftlib.{module}.{name}" for module in peftlib._ON_USE for name in _names_in(_source_of(module))]


def all_names() -> list[str]:
    return [*public_objects(), *names_on_use()]


def named(name: str) -> object:
    return public_objects().get(name) or pkgutil.resolve_name(name)


def _source_of(module: str) -> ast.Module:
    path = Path(str(peftlib.__file__)).with_name(module)
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


def _names_in(tree: ast.Module) -> list[str]:
    """What a source exports again as itself, for type checkers too; else what it defines."""
    again = [each.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for each in node.names]
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    exported = [name for name in again if name and not name.startswith("_")]
    return exported or [name for name in defined if not name.startswith("_")]


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

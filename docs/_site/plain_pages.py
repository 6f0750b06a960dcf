"""Pages as plain Markdown: the reference written out from the docstrings, and the list of all pages, llms.txt."""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parent.parent.parent
_ENTRY = re.compile(r"^::: (\S+)$", re.MULTILINE)


@functools.cache
def _package() -> Any:
    return griffe.load("peftlib", search_paths=[ROOT], docstring_parser="google", allow_inspection=False)


def _found(name: str) -> Any:
    found = _package()[name.removeprefix("peftlib.")]
    return found.final_target if found.is_alias else found


def options(name: str) -> str:
    """The keywords of an adapter type as a table, from its signature and its docstring."""
    sections = _found(name).docstring.parsed
    arguments = next(section.value for section in sections if section.kind is griffe.DocstringSectionKind.parameters)
    rows = [_row(each) for each in arguments if each.name != "host"]
    return "\n".join(["| option | default | |", "|---|---|---|", *rows])


def _row(argument: Any) -> str:
    default = "–" if argument.default == "None" else f"`{argument.default}`"
    meaning = " ".join(argument.description.split()).replace("|", r"\|")
    return f"| `{argument.name}` | {default} | {meaning} |"


def expanded(markdown: str) -> str:
    """A page of the reference with each entry's signature and docstring in it."""
    return _ENTRY.sub(lambda found: _entry(found[1]), markdown)


def _entry(name: str) -> str:
    found = _found(name)
    signature = found.signature() if found.is_function or found.is_class else ""
    return f"## {name}\n\n```python\n{signature or name}\n```\n\n{found.docstring.value}"


def index(nav: list[Any], pages: dict[str, tuple[str, str]], description: str) -> str:
    """A list of all pages in the order of the site, as https://llmstxt.org describes it."""
    return "\n".join(["# peftlib", "", f"> {description}", *_listed(nav, pages, depth=2), ""])


def _listed(nav: list[Any], pages: dict[str, tuple[str, str]], depth: int) -> Iterator[str]:
    for item in nav:
        [(title, below)] = item.items() if isinstance(item, dict) else [(pages[item][0], item)]
        if isinstance(below, list):
            yield from ("", f"{'#' * depth} {title}", "", *_listed(below, pages, depth + 1))
        else:
            yield f"- [{title}]({below})"

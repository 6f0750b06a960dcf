"""Pages of long tables for reading: one section opened at a time, with a filter over the rows of all."""

import re

_FILTER = '<input class="filter" type="search" placeholder="Filter the rows" aria-label="Filter the rows">'


def collapsed(markdown: str) -> str:
    """Each section of a page as a block that opens; the notes stay below their table."""
    head, *sections = re.split(r"^## ", markdown, flags=re.MULTILINE)
    return "\n".join([head, _FILTER, "", *map(_section, sections)])


def _section(text: str) -> str:
    title, _, body = text.partition("\n")
    rows = len(re.findall(r"^(\| [^|]|- )", body, re.MULTILINE))
    indented = "\n".join(f"    {line}".rstrip() for line in body.strip().splitlines())
    return f"??? table \"{title} <span class='count'>{rows}</span>\"\n\n{indented}\n"

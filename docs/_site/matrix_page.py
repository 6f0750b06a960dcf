"""The compatibility matrix for reading: one library opened at a time, with a filter over all rows."""

import re

_HINT = "Filter: FSDP, 4-bit, kohya, generate …"
_FILTER = f'<input class="matrix-filter" type="search" placeholder="{_HINT}" aria-label="Filter the rows">'


def collapsed(markdown: str) -> str:
    """Each section of docs/matrix.md as a block that opens; its notes stay below its table."""
    head, *sections = re.split(r"^## ", markdown, flags=re.MULTILINE)
    return "\n".join([head, _FILTER, "", *map(_section, sections)])


def _section(text: str) -> str:
    title, _, body = text.partition("\n")
    features = len(re.findall(r"^\| [^|]", body, re.MULTILINE))
    indented = "\n".join(f"    {line}".rstrip() for line in body.strip().splitlines())
    return f"??? matrix \"{title} <span class='count'>{features}</span>\"\n\n{indented}\n"

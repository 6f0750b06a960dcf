"""A readable table from rows of plain values, as text and as HTML, in which equal layers share a row."""

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from html import escape
from itertools import groupby
from typing import TypeVar

H = TypeVar("H", bound=Hashable)

_STYLE = "text-align:left;padding:0 1em 0 0"
_WHOLE = ";white-space:nowrap"  # of the name in front


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = [list(map(_cell, row)) for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = _numeric(header, rows)
    lines = ["  ".join(_aligned(*item) for item in zip(row, widths, numeric, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def html_table(header: Sequence[str], rows: Sequence[Sequence[object]], *lines: str) -> str:
    """The same for a notebook, with these lines below; whatever a cell holds is text, never markup."""
    numeric = _numeric(header, rows)
    body = "".join(f"<tr>{_html_cells('td', row, numeric)}</tr>" for row in rows)
    head = f"<thead><tr>{_html_cells('th', header, numeric)}</tr></thead>"
    return f"<table>{head}<tbody>{body}</tbody></table>{html_lines(*lines)}"


def html_lines(*lines: str) -> str:
    return "".join(f"<div>{escape(line)}</div>" for line in lines)


def _html_cells(tag: str, row: Sequence[object], numeric: Sequence[bool]) -> str:
    styles = [_STYLE.replace("left", "right") if right else _STYLE for right in numeric]
    styles[0] += _WHOLE
    return "".join(
        f'<{tag} style="{style}">{escape(_cell(value))}</{tag}>' for value, style in zip(row, styles, strict=True)
    )


def _numeric(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[bool]:
    return [bool(rows) and all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _aligned(text: str, width: int, numeric: bool) -> str:
    return text.rjust(width) if numeric else text.ljust(width)


def size(count: float) -> str:
    """Bytes for people: 4.1 MB."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} GB"


def equal_layers(rows: Iterable[tuple[str, H]]) -> Iterator[tuple[str, int, H]]:
    """Rows whose names differ in numbered components alone, and beside which the same stands, as one row: a name for
    all of them, how many they are, and what stands beside it; in the order of the first ones.

    layers.0.fc and layers.1.fc are layers.[0-1].fc ×2. A name says exactly which are in its row."""
    times: Counter[tuple[str, H]] = Counter()
    alike: dict[tuple[str, H, int], list[str]] = {}
    for name, beside in rows:
        times[name, beside] += 1  # of a name that is there twice, the second is in a row of its own
        alike.setdefault((_pattern(name), beside, times[name, beside]), []).append(name)
    for (_, beside, _), names in alike.items():
        for shared, count in _joined([name.split(".") for name in names]):
            yield shared, count, beside


def equal_lines(lines: Iterable[str]) -> list[str]:
    """Sentences that name a module each, where those of equal layers are one."""
    named = [(line, _NAME.search(line)) for line in lines]
    rows = [(found[0] if found else "", (line[: found.start()], line[found.end() :]) if found else (line, ""))
            for line, found in named]  # fmt: skip
    return [f"{before}{name}{behind}" for name, _, (before, behind) in equal_layers(rows)]


_NAME = re.compile(r"[^\s\"(),:;.]*[^\W\d][^\s\"(),:;.]*(\.[^\s\"(),:;.]+)+")  # a.b.c: dots inside, a letter in front


def _joined(names: list[list[str]]) -> Iterator[tuple[str, int]]:
    columns = [list(dict.fromkeys(parts)) for parts in zip(*names, strict=True)]
    if math.prod(map(len, columns)) == len(names):
        name = ".".join(column[0] if len(column) == 1 else f"[{_ranges(column)}]" for column in columns)
        yield (name if len(names) == 1 else f"{name} ×{len(names)}"), len(names)
        return
    first = next(i for i, column in enumerate(columns) if len(column) > 1)
    for value in columns[first]:
        yield from _joined([parts for parts in names if parts[first] == value])


def _pattern(name: str) -> str:
    """With its numbers left open."""
    return ".".join("#" if _is_number(part) else f"_{part}" for part in name.split("."))


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and str(int(part)) == part


def _ranges(numbers: Sequence[str]) -> str:
    """0, 1, 2, 5 is 0-2,5."""
    ordered = sorted(map(int, numbers))
    runs = [[n for _, n in run] for _, run in groupby(enumerate(ordered), lambda item: item[1] - item[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)

"""The plan of a schedule, as a text and as a picture, before a step is taken."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from .._core.table import html_table, table
from .layer_groups import LayerGroup


class Plan:
    """Which groups train when: `print` it, `save` its picture, or let a notebook show it."""

    def __init__(
        self, title: str, groups: Sequence[LayerGroup], stages: Sequence[set[int]], counts: Sequence[int] | None
    ):
        self.title, self.groups = title, groups
        self.counts = None if counts is None else [0, *counts]  # at which each stage begins
        self.stages = stages if counts is None else stages[: len(counts) + 1]
        self.sizes = [sum(p.numel() for p in group.parameters.values()) for group in groups]

    def __repr__(self) -> str:
        return f"Plan({self.title}: {len(self.groups)} groups, {len(self.stages)} stages)"

    def __str__(self) -> str:
        return f"{self.title}\n{table(*self._table())}"

    def _repr_html_(self) -> str:
        return f"{html_table(*self._table(), self.title)}{self.svg()}"

    def _table(self) -> tuple[list[str], list[list[object]]]:
        rows: list[list[object]] = [
            [self.counts[at] if self.counts else at, self._trains(at), sum(self.sizes[one] for one in stage)]
            for at, stage in enumerate(self.stages)
        ]
        return ["from" if self.counts else "stage", "trains", "parameters"], rows

    def _trains(self, at: int) -> str:
        stage = self.stages[at]
        more = stage - self.stages[at - 1] if at else set()
        if len(more) == 1 and stage > more:
            return f"and {self._names(more)}"
        return "all" if len(stage) == len(self.groups) > 1 else self._names(stage)

    def _names(self, stage: set[int]) -> str:
        return ", ".join(self.groups[one].name for one in sorted(stage, reverse=True))

    def svg(self) -> str:
        """The picture: a row for each group, the top one above, a bar where it trains.

        Returns:
            str: an SVG document.
        """
        starts = list(self.counts or range(len(self.stages)))
        end = starts[-1] + max(1, round(starts[-1] / max(1, len(starts) - 1)))
        left, width, line = 12 + 7 * max(len(group.name) for group in self.groups), 480, 18
        x = [left + 12 + width * start / end for start in [*starts, end]]
        bottom = 24 + line * len(self.groups)
        parts = [f'<text x="12" y="16" font-weight="bold">{escape(self.title)}</text>']
        for row, (one, group) in enumerate(reversed(list(enumerate(self.groups)))):
            y = 24 + line * row
            parts.append(f'<text x="{left}" y="{y + 13}" text-anchor="end">{escape(group.name)}</text>')
            parts.append(f'<rect x="{x[0]}" y="{y + 2}" width="{width}" height="14" fill="#e6e9ec"/>')
            parts += [
                f'<rect x="{x[at]:.1f}" y="{y + 2}" width="{x[at + 1] - x[at]:.1f}" height="14" fill="#30638e"/>'
                for at, stage in enumerate(self.stages)
                if one in stage
            ]
        shown = range(0, len(starts), -(-len(starts) // 12))  # more labels would overlap
        parts += [f'<text x="{x[at]:.1f}" y="{bottom + 14}">{starts[at]}</text>' for at in shown]
        size = f'width="{left + width + 24}" height="{bottom + 24}"'
        style = 'font-family="sans-serif" font-size="12" fill="#222"'
        return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n' + "\n".join(parts) + "\n</svg>\n"

    _repr_svg_ = svg

    def save(self, path: str | Path) -> None:
        """Writes the picture to an SVG file.

        Args:
            path: of the file.
        """
        Path(path).write_text(self.svg(), encoding="utf-8")

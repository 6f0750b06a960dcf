"""The matrix of docs/matrix.md: a pytest plugin that writes what each test marked `feature` found, cell by cell."""

import importlib.metadata
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

KINDS = ("LoRA", "DoRA", "IA3", "Bottleneck", "Prefix", "Prompt", "Full")

# The files that hold features, in the order of the page, and what the page calls each of them.
SECTIONS = {
    "test_ecosystem_torch": "torch",
    "test_ecosystem_distributed": "Distributed training",
    "test_ecosystem_quantised": "Quantized base models",
    "test_zoo": "transformers",
    "test_ecosystem_transformers": "transformers",
    "test_ecosystem_device_map": "A model over several devices, memory and disk",
    "test_ecosystem_training": "Training libraries",
    "test_unfreezing_integrations": "Training libraries",
    "test_ecosystem_sentence_transformers": "sentence-transformers",
    "test_ecosystem_vision": "Vision",
    "test_hf": "Files of HF peft",
    "test_hf_transformers": "Files of HF peft",
    "test_ecosystem_files": "Files of other tools",
    "test_exchange": "Files of other tools",
}
LIBRARIES = {
    "torch": ["torch"],
    "Distributed training": ["torch"],
    "Quantized base models": ["torch", "torchao", "bitsandbytes", "transformers"],
    "transformers": ["torch", "transformers"],
    "A model over several devices, memory and disk": ["torch", "transformers", "accelerate"],
    "Training libraries": ["torch", "pytorch-lightning", "accelerate", "transformers"],
    "sentence-transformers": ["torch", "transformers", "sentence-transformers"],
    "Vision": ["torch", "torchvision", "timm"],
    "Files of HF peft": ["torch", "transformers", "peft"],
    "Files of other tools": ["torch", "transformers", "peft"],
}

PAGE = """# Compatibility matrix

What works with what: each row is a feature of another library, each column an adapter type, each cell the result of
tests with the real library. `make matrix` runs them and writes this page; it fails, and writes nothing, while a cell
is red or empty.

- ✓ works, as the tests of that row say; with a number, one way of it works and another is refused
- ✗ is refused, by an `AdapterError` whose message stands below the table
- – does not apply to this type, for the reason below the table
"""


@dataclass
class Cell:
    """What the tests of one feature found for one kind; `others`: the kinds that the feature says it is of."""

    outcomes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    others: set[str] = field(default_factory=set)

    @property
    def trouble(self) -> str:
        if not self.outcomes:
            return "" if self.others else "no test covers it"
        red = [outcome for outcome in self.outcomes if outcome != "passed"]
        return f"a test {red[0]}" if red else ""

    @property
    def mark(self) -> str:
        """A feature of several tests may work in one way and be refused in another."""
        worked = len(self.outcomes) > len(self.refused) + len(self.absent)
        return "✓" if worked else "✗" if self.refused else "–"

    @property
    def reasons(self) -> list[str]:
        alone = [f"of {', '.join(kind for kind in KINDS if kind in self.others)} alone"]
        return unlike([*self.refused, *self.absent]) if self.outcomes else alone


Matrix = dict[str, dict[str, dict[str, Cell]]]  # section -> feature -> kind


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", metavar="PAGE", help="write the matrix of what the tests found onto this page")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--matrix") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(Path(config.getoption("--matrix"))))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notes on each test which cells it fills: a report, also one from another process, carries that along."""
    for item in items:
        for mark in item.iter_markers("feature"):
            name, *kinds = mark.args
            item.user_properties.append(("feature", [item.path.stem, name, kinds, kinds or kinds_of(item)]))


def kinds_of(item: Any) -> tuple[str, ...]:
    """The kind of the test's own column; what names no kind holds for all of them."""
    column = item.callspec.params.get("column") if hasattr(item, "callspec") else None
    return KINDS if column is None else (column.name,)


class Recorder:
    """Collects the reports, and writes the page when all is known."""

    def __init__(self, page: Path) -> None:
        self.page = page
        self.matrix: Matrix = {section: {} for section in SECTIONS.values()}
        self.trouble: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            note(self.matrix, report.outcome, report.user_properties)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.trouble = list(unknown(self.matrix))
        if self.trouble:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            return
        kept = sections_of(self.page.read_text()) if self.page.exists() else {}
        own = {section: "\n".join(written(section, rows)) for section, rows in self.matrix.items() if rows}
        found = kept | own
        self.page.write_text("\n".join([PAGE, *(found[section] for section in LIBRARIES if section in found)]))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for line in self.trouble:
            terminalreporter.write_line(f"unknown cell: {line}")


def note(matrix: Matrix, outcome: str, properties: Iterable[tuple[str, Any]]) -> None:
    """Enters one test into every cell that it fills."""
    properties = list(properties)
    said = {key: [str(value) for name, value in properties if name == key] for key in ("refused", "not applicable")}
    for name, value in properties:
        if name != "feature":
            continue
        file, feature, alone, kinds = value
        row = matrix[SECTIONS[file]].setdefault(feature, {each: Cell() for each in KINDS})
        for cell in row.values():
            cell.others.update(alone)
        for kind in kinds:
            row[kind].outcomes.append(outcome)
            row[kind].refused += said["refused"]
            row[kind].absent += said["not applicable"]


def unknown(matrix: Matrix) -> Iterator[str]:
    for section, features in matrix.items():
        for feature, row in features.items():
            for kind, cell in row.items():
                if cell.trouble:
                    yield f"{section}: {feature}: {kind}: {cell.trouble}"


def unlike(reasons: list[str]) -> list[str]:
    """One reason of those that differ in numbers alone, as for one layer and another."""
    found: dict[str, str] = {}
    for reason in reasons:
        found.setdefault(re.sub(r"\d+", "", reason), reason)
    return list(found.values())


def sections_of(page: str) -> dict[str, str]:
    """What another run wrote, in an environment of its own perhaps, by section."""
    parts = re.split(r"^(?=## )", page, flags=re.MULTILINE)[1:]
    return {part.splitlines()[0].removeprefix("## "): part for part in parts}


def written(section: str, features: dict[str, dict[str, Cell]]) -> Iterator[str]:
    notes: dict[str, int] = {}
    versions = [f"{name} {version}" for name in LIBRARIES[section] for version in version_of(name)]
    yield f"## {section}\n"
    yield f"Run with {', '.join(versions)}.\n"
    yield f"| | {' | '.join(KINDS)} |"
    yield "|---" * (len(KINDS) + 1) + "|"
    for feature, row in sorted(features.items()):
        cells = [shown(cell, notes) for cell in row.values()]
        yield f"| {feature} | {' | '.join(cells)} |"
    yield ""
    for reason, number in notes.items():
        yield f"{number}. {reason}"
    if notes:
        yield ""


def shown(cell: Cell, notes: dict[str, int]) -> str:
    """The mark, and the numbers of its reasons below the table."""
    numbers = sorted({notes.setdefault(plain(reason), len(notes) + 1) for reason in cell.reasons})
    return cell.mark + "".join(f" <sup>{number}</sup>" for number in numbers)


def plain(reason: str) -> str:
    """On one line, without the folder of the test that said it, and with nothing that Markdown would read."""
    short = re.sub(r"(?<!\w)/(?:[\w.-]+/)+", "", " ".join(reason.split()))
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", short)


def version_of(name: str) -> list[str]:
    try:
        return [importlib.metadata.version(name)]
    except importlib.metadata.PackageNotFoundError:
        return []

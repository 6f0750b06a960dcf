"""The matrix has a row for each feature that tests name, and no cell of it is taken for granted."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from support.ecosystem import COLUMNS
from tools import matrix

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "matrix.md"


def named_features() -> dict[str, set[str]]:
    """Section -> features, read from the sources: importing every library to ask pytest would take half a minute."""
    found: dict[str, set[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        for call in calls:
            if isinstance(call.func, ast.Name) and call.func.id == "feature":
                assert isinstance(call.args[0], ast.Constant), f"{path.name}:{call.lineno}: the name is not a literal"
                assert path.stem in matrix.SECTIONS, f"{path.name} holds features; give it a section in matrix.py"
                found.setdefault(matrix.SECTIONS[path.stem], set()).add(str(call.args[0].value))
    return found


def written_features() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for section, body in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        found[section] = set(re.findall(r"^\| ([^|]+?) \| ", body, re.MULTILINE))
    return found


def test_the_page_has_exactly_the_features_that_tests_name():
    assert written_features() == named_features(), "run `make matrix`"


def test_a_run_of_some_tests_leaves_the_other_sections():
    parts = matrix.sections_of("# Title\n\n## torch\n\n| a |\n## Vision\n\n| b |\n")
    assert parts == {"torch": "## torch\n\n| a |\n", "Vision": "## Vision\n\n| b |\n"}


def test_each_section_says_its_libraries():
    assert list(matrix.LIBRARIES) == list(dict.fromkeys(matrix.SECTIONS.values()))


def test_the_columns_are_the_kinds():
    assert tuple(column.name for column in COLUMNS) == matrix.KINDS


def noted(outcome: str, kinds: tuple[str, ...] = matrix.KINDS, alone: tuple[str, ...] = (), **said: str) -> Any:
    found: matrix.Matrix = {section: {} for section in matrix.SECTIONS.values()}
    reasons = [(key.replace("_", " "), why) for key, why in said.items()]
    matrix.note(found, outcome, [("feature", ["test_ecosystem_torch", "autocast", alone, alone or kinds]), *reasons])
    return found


@pytest.mark.parametrize(("outcome", "kinds", "trouble"), [
    ("passed", matrix.KINDS[1:], "torch: autocast: LoRA: no test covers it"),
    ("failed", matrix.KINDS, "torch: autocast: LoRA: a test failed"),
    ("skipped", matrix.KINDS, "torch: autocast: LoRA: a test skipped"),
])  # fmt: skip
def test_a_cell_that_is_empty_or_red_or_skipped_is_unknown(outcome, kinds, trouble):
    assert next(matrix.unknown(noted(outcome, kinds))) == trouble
    assert not list(matrix.unknown(noted("passed")))


@pytest.mark.parametrize(("said", "mark"), [
    ({}, "✓"),
    ({"refused": "a|b /tmp/x-1/y.txt: *no*"}, "✗ <sup>1</sup>"),
    ({"not_applicable": "why"}, "– <sup>1</sup>"),
])  # fmt: skip
def test_a_reason_stands_below_the_table(said, mark):
    page = "\n".join(matrix.written("torch", noted("passed", **said)["torch"]))
    assert f"| autocast | {' | '.join([mark] * 7)} |" in page
    assert ("1. a\\|b y.txt: \\*no\\*" in page) == ("refused" in said)
    assert ("1. why" in page) == ("not_applicable" in said)


def test_a_feature_of_some_kinds_is_not_applicable_to_the_others():
    found = noted("passed", alone=("DoRA", "LoRA"))
    assert not list(matrix.unknown(found))
    page = "\n".join(matrix.written("torch", found["torch"]))
    assert f"| autocast | ✓ | ✓ |{' – <sup>1</sup> |' * 5}" in page
    assert "1. of LoRA, DoRA alone" in page


def test_what_works_in_one_way_and_is_refused_in_another_says_both():
    found = noted("passed", ("LoRA",))
    matrix.note(found, "passed", [("feature", ["test_ecosystem_torch", "autocast", (), ["LoRA"]]), ("refused", "why")])
    cell = found["torch"]["autocast"]["LoRA"]
    assert (cell.mark, cell.reasons) == ("✓", ["why"])


def test_reasons_that_differ_in_numbers_alone_are_one():
    assert matrix.unlike(["layers.0: no", "other", "layers.1: no"]) == ["layers.0: no", "other"]

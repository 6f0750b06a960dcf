"""Every example that a reader can see runs: README, the pages of docs/, and the docstrings of public names."""

import doctest
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch

import peftlib
from support.pages import all_names, blocks, named

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(autouse=True)
def clean_slate(tmp_path, monkeypatch):
    """Each example has a folder for its files."""
    monkeypatch.chdir(tmp_path)


def run_examples(name: str, examples: list[doctest.DocTest]) -> None:
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for each in examples:
        runner.run(each, out=report.append, clear_globs=False)
    assert runner.failures == 0, name + "\n" + "".join(report)


@pytest.mark.filterwarnings(
    "ignore:.*(treespec|num_workers|`val_dataloader`|sampler|logging interval)"
)  # Lightning's own
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_runs(page):
    namespace: dict[str, object] = {"__name__": "__main__"}  # a kind of one page may be defined anew on another
    for language, line, source in blocks(page):
        if language == "pycon":
            run_examples(
                page.name, [doctest.DocTestParser().get_doctest(source, namespace, page.name, str(page), line)]
            )
            continue
        # The blank lines make a traceback point into the page itself.
        exec(compile("\n" * line + source, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, label="demo")], ids=lambda page: page.name)
def test_a_page_shows_the_demo_as_it_is(page):
    demo = (ROOT / "docs" / "demo.py").read_text()
    for _, line, excerpt in blocks(page, label="demo"):
        shown = excerpt.strip()
        assert shown in demo or textwrap.indent(shown, "    ") in demo, f"{page}:{line + 1} is not in docs/demo.py"


@pytest.mark.parametrize("name", all_names())
def test_the_example_of_a_docstring_runs(name):
    thing = named(name)
    # A module's members are public objects themselves: recursing would run them twice.
    finder = doctest.DocTestFinder(exclude_empty=True, recurse=not isinstance(thing, ModuleType))
    # What a reader takes as given: torch, this package, and the name whose docstring it is.
    given = {"__name__": "__main__", "torch": torch, "peftlib": peftlib, name.rpartition(".")[2]: thing}
    run_examples(name, finder.find(thing, name, globs=given))

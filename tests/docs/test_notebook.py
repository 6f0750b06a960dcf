"""The notebook: what it shows is what a run of it shows, and nothing in it is of the machine that ran it."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def maker() -> Any:
    spec = importlib.util.spec_from_file_location("notebook", ROOT / "docs" / "_site" / "notebook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def committed(maker: Any) -> dict[str, Any]:
    return json.loads(maker.NOTEBOOK.read_text())


def test_the_notebook_is_small_and_names_no_path(maker, committed):
    text = maker.NOTEBOOK.read_text()
    assert len(text) < 120_000
    assert not [
        path
        for path in ("/home", "/root", "/tmp", "/work", "/usr", "C:\\\\")
        if path in maker.without_pictures(committed)
    ]
    assert "Error" not in text


@pytest.mark.parametrize("shown", ["plan", "summary", "verify", "monitor", "plot", "read_header", "activate"])
def test_the_notebook_shows_each_of_these_with_an_output(committed, shown):
    cells = [cell for cell in committed["cells"] if f"peftlib.{shown}" in "".join(cell["source"])]
    assert any(cell["outputs"] for cell in cells)


def test_its_page_has_every_cell_and_its_pictures_as_files(maker, committed):
    page, pictures = maker.page(committed)
    assert page.startswith("# ")
    assert page.count("```python") == sum(cell["cell_type"] == "code" for cell in committed["cells"])
    assert page.count("<table") >= 4
    assert [content[:4] for content in pictures.values()] == [b"\x89PNG"]
    assert all(f"({name})" in page for name in pictures)
    assert "base64" not in page


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_run_of_the_notebook_shows_what_is_committed(maker, committed, tmp_path):
    pytest.importorskip("nbclient")
    again = maker.run_again(maker.NOTEBOOK, tmp_path)
    assert maker.without_pictures(again) == maker.without_pictures(committed)

"""The site: it builds without a warning, fetches nothing, and each link and each public name leads somewhere."""

import ast
import html.parser
import importlib.util
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

from support.pages import names_on_use

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def exported(module: ModuleType) -> list[str]:
    """Names that a package re-exports as themselves, and those that a module defines."""
    body = ast.parse(Path(str(module.__file__)).read_text()).body
    again = [alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names if alias.asname]
    return again or [
        node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]


def public_names() -> set[str]:
    names: set[str] = set()
    for place in (
        "peftlib",
        "peftlib.schedules",
        "peftlib.kernels",
        "peftlib.hf",
        "peftlib.exchange",
        "peftlib.plot",
        "peftlib.lightning",
        "peftlib.search",
    ):
        module = pkgutil.resolve_name(place)
        found = {name for name in exported(module) if not isinstance(getattr(module, name), ModuleType)}
        names |= {f"{place}.{name}" for name in found}
    return names | {*names_on_use()}


def test_every_public_name_has_one_entry_in_the_reference():
    entries = [
        entry for page in (DOCS / "api").glob("*.md") for entry in re.findall(r"^::: (\S+)$", page.read_text(), re.M)
    ]
    assert sorted(entries) == sorted(public_names())


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda page: page.name)
def test_a_page_above_the_site_links_only_what_is_there(page):
    links = [urlsplit(link) for link in LINK.findall(FENCE.sub("", page.read_text()))]
    gone = [link.path for link in links if not link.scheme and link.path and not (page.parent / link.path).exists()]
    assert not gone


def test_the_drawings_are_what_their_code_draws():
    spec = importlib.util.spec_from_file_location("drawings", DOCS / "_site" / "drawings.py")
    assert spec is not None
    assert spec.loader is not None
    drawings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawings)
    drawn = {f"{name}.svg": drawing.svg() for name, drawing in drawings.all_drawings().items()}
    assert drawn == {path.name: path.read_text() for path in drawings.FOLDER.glob("*.svg")}


class Page(html.parser.HTMLParser):
    """What a built page has: anchors, links, and what a browser fetches for it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.anchors.add(named.get("id") or "")
        if tag == "a" and named.get("href"):
            self.links.append(str(named["href"]))
        source = named.get("src") or (named.get("href") if tag == "link" else None)
        if source:
            self.fetched.append(source)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_reading_the_site_fetches_nothing_from_elsewhere(pages):
    for path, page in pages.items():
        assert not [source for source in page.fetched if urlsplit(source).netloc], path


def test_every_link_of_the_site_leads_to_a_page_and_its_anchor(pages):
    for path, page in pages.items():
        for link in map(urlsplit, page.links):
            if link.scheme:
                continue
            target = (path.parent / unquote(link.path)).resolve() if link.path else path
            assert target.exists(), f"{path.name}: {link.path}"
            if link.fragment:
                assert unquote(link.fragment) in pages[target].anchors, f"{path.name}: {link.geturl()}"


def test_each_page_has_its_markdown_beside_it_and_is_in_the_list_for_language_models(site, pages):
    beside = {path.with_suffix(".md") for path in pages}
    listed = {site / name for name in LINK.findall((site / "llms.txt").read_text())}
    assert listed == beside
    assert all(path.read_text().startswith("# ") for path in beside)


def test_equations_are_written_when_the_site_is_built(site):
    reference = (site / "api" / "lora.html").read_text()
    assert reference.count("<math") >= 3
    assert ".. math::" not in reference

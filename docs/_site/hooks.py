"""What the site needs beyond MkDocs: equations, drawings, generated pages, Markdown beside the HTML, llms.txt."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))  # MkDocs loads a hook as a file, not as a package

import drawings
import notebook
import plain_pages
import tables
from mathml import MathML

ROOT = Path(__file__).parent.parent.parent
# Blocks that the tests treat in a way of their own: excerpts of docs/demo.py, and what needs an experiment tracker.
_LABELLED = re.compile(r"^```python (demo|tracked)$", re.MULTILINE)
_DRAWING = re.compile(r"^!\[[^]]*\]\([./]*assets/drawings/(\w+)\.svg\)$", re.MULTILINE)
_OPTIONS = re.compile(r"^<!-- options: (\S+) -->$", re.MULTILINE)

_written: dict[str, tuple[str, str]] = {}  # page -> its title and its Markdown


def on_config(config: Any) -> Any:
    link = ROOT / "peftlib" / "kernels"  # as the installed package has it; `make lint` makes the same link
    if not link.exists():
        link.symlink_to("../kernels")
    config.markdown_extensions.append(MathML())
    config.extra["polyfills"] = ["assets/iframe-worker.js"]
    return config


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, "changelog.md", content=(ROOT / "CHANGELOG.md").read_text()))
    files.append(File.generated(config, "benchmarks.md", content=benchmarks()))
    page, pictures = notebook.page(json.loads(notebook.NOTEBOOK.read_text()))
    for name, content in {"notebook.md": page, **pictures}.items():
        files.append(File.generated(config, name, content=content))
    return files


def benchmarks() -> str:
    """The table of the last `make bench`, with a title and its sections as headings."""
    table = (ROOT / "benchmarks" / "results" / "latest.md").read_text()
    table = re.sub(r"^\*\*(.*)\*\*$", r"## \1", table, flags=re.MULTILINE)
    return f"# Benchmarks\n\nMade by `make bench`. Rows in which a peer is ahead stay in, with the reason.\n\n{table}"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    markdown = _OPTIONS.sub(lambda found: plain_pages.options(found[1]), _LABELLED.sub("```python", markdown))
    _written[page.file.src_uri] = page.title, plain_pages.expanded(markdown)
    if page.file.src_uri in ("matrix.md", "benchmarks.md", "field.md"):
        markdown = tables.collapsed(markdown)
    return _DRAWING.sub(lambda found: f'<div class="drawing">{all_drawings[found[1]].inline()}</div>', markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    beside = Path(page.file.src_uri).name
    return output.replace("</head>", f'<link rel="alternate" type="text/markdown" href="{beside}"></head>', 1)


all_drawings = drawings.all_drawings()


def on_post_build(config: Any) -> None:
    """Each page's Markdown beside its HTML, and a list of all of them for language models."""
    site = Path(config.site_dir)
    for uri, (_, text) in _written.items():
        (site / uri).write_text(text)
    (site / "llms.txt").write_text(plain_pages.index(config.nav, _written, config.site_description))

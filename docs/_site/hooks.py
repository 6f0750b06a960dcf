"""What the site needs beyond MkDocs: equations, generated pages, Markdown beside the HTML, llms.txt."""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))  # MkDocs loads a hook as a file, not as a package

from mathml import MathML

ROOT = Path(__file__).parent.parent.parent
_DEMO = re.compile(r"^```python demo$", re.MULTILINE)  # an excerpt of docs/demo.py, which the tests compare


def on_config(config: Any) -> Any:
    config.markdown_extensions.append(MathML())
    config.extra["polyfills"] = ["assets/iframe-worker.js"]
    return config


def on_files(files: Files, config: Any) -> Files:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    files.append(File.generated(config, "changelog.md", content=changelog))
    files.append(File.generated(config, "benchmarks.md", content=benchmarks()))
    return files


def benchmarks() -> str:
    """The table of the last `make bench`, with a title and its sections as headings."""
    table = (ROOT / "benchmarks" / "results" / "latest.md").read_text()
    table = re.sub(r"^\*\*(.*)\*\*$", r"## \1", table, flags=re.MULTILINE)
    return f"# Benchmarks\n\nMade by `make bench`; losing rows stay in, with the reason.\n\n{table}"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    return _DEMO.sub("```python", markdown)

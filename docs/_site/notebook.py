"""The notebook of the site: run anew with `python docs/_site/notebook.py`, and shown as a page with its outputs."""

import base64
import importlib
import json
import re
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parent.parent / "notebook.ipynb"
_KEPT = ("text/html", "image/png", "text/plain")  # of what a cell shows, the first that it has


def page(notebook: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """Its Markdown, and the pictures in it by their names."""
    blocks: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        blocks.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        blocks += [_shown(output, pictures) for output in cell.get("outputs", ())]
    return "\n\n".join(blocks) + "\n", pictures


def _shown(output: dict[str, Any], pictures: dict[str, bytes]) -> str:
    data = output.get("data", {"text/plain": output.get("text", "")})
    kind = next(kind for kind in _KEPT if kind in data)
    text = "".join(data[kind])
    if kind == "image/png":
        name = f"assets/notebook-{len(pictures)}.png"
        pictures[name] = base64.b64decode(text)
        return f"![what the cell above draws]({name})"
    return f'<div class="cell">{text}</div>' if kind == "text/html" else f"```text\n{text.rstrip()}\n```"


def run_again(path: Path, folder: Path) -> dict[str, Any]:
    """The notebook with the outputs of a run in this folder, and nothing of the machine."""
    nbclient, nbformat = map(importlib.import_module, ("nbclient", "nbformat"))  # of the extra `ecosystem`
    notebook: Any = nbformat.read(path, 4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    notebook["metadata"] = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for cell in notebook["cells"]:
        cell["metadata"] = {}
        for output in cell.get("outputs", ()):
            for key in output.get("data", {}).keys() - {_chosen(output["data"])}:
                del output["data"][key]
            output.get("metadata", {}).clear()
    return json.loads(nbformat.writes(notebook))


def _chosen(data: dict[str, Any]) -> str:
    return next(kind for kind in _KEPT if kind in data)


def without_pictures(notebook: dict[str, Any]) -> str:
    """What two runs must agree in: a picture depends on the fonts that are there."""
    return re.sub(r'"image/png": "[^"]*"', '"image/png": ""', json.dumps(notebook))


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        NOTEBOOK.write_text(json.dumps(run_again(NOTEBOOK, Path(folder)), indent=1, ensure_ascii=False) + "\n")

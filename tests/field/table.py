"""The table of a sweep: right, refused and why, not buildable and why, wrong and which law."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

Record = dict[str, Any]

_INTRODUCTION = """# On models that nobody here wrote

`make field` builds every architecture of transformers from a tiny configuration, every family of timm on small images,
and a shelf of hand-written nets; it puts each adapter type into all modules that it may be for (two of each that are
alike), and holds it to laws that need no knowledge of the model:

- unchanged at the start, in eval and in train mode, to the bit (but for Prefix and Prompt)
- each adapter runs, wherever its module is called or its weight is read; or injecting was refused
- merged equals unmerged, and unmerging brings back every bit
- off equals the base to the bit, and on again what it was
- saved, and loaded into a fresh model: equal to the bit
- cached decoding equals uncached, where the model generates
- after three training steps and eject: the base to the bit, buffers too
- an operation in place on the outputs equals the same out of place, gradients too

A sample runs with the tests (`tests/field/test_field.py`). A run that was stopped goes on where it was; `--retry` runs
once more what was wrong or not built.
"""


def records(path: Path) -> list[Record]:
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path] if path.exists() else []
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def wrong_laws(record: Record) -> dict[str, str]:
    return {law: said for law, said in record.get("laws", {}).items() if said.startswith("wrong")}


def wrongs(path: Path) -> list[Record]:
    return [record for record in records(path) if wrong_laws(record) or "cut" in record]


def summary(found: list[Record]) -> str:
    unbuilt = [record["unbuilt"] for record in found if "unbuilt" in record]
    if unbuilt:
        return f"not built ({unbuilt[0][:100]})"
    wrong = [f"{record['kind']}: {law}" for record in found for law in wrong_laws(record)]
    return ("wrong: " + "; ".join(wrong) if wrong else "right") + (" (cut)" if any("cut" in r for r in found) else "")


def page(path: Path) -> str:
    """The whole page, in Markdown."""
    found = records(path)
    built = [record for record in found if record["kind"]]
    lines = [
        _INTRODUCTION,
        f"Run with torch {torch.__version__}, transformers {transformers.__version__}: "
        f"{len({r['name'] for r in built})} architectures built, "
        f"{len({r['name'] for r in found if 'unbuilt' in r})} not.", "",
        *_kinds(built), *_wrong(found), *_refused(built), *_unbuilt(found), *_built(built),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _kinds(built: list[Record]) -> list[str]:
    """A row a kind: of the architectures, how many it goes into, and of those how many keep every law."""
    lines = [
        "| adapter type | architectures | no place | right | wrong | modules | refused there |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys(record["kind"] for record in built):
        own = [record for record in built if record["kind"] == kind]
        wrong = sum(bool(wrong_laws(record)) for record in own)
        nowhere = sum(not record["hosts"] and not wrong_laws(record) for record in own)
        hosts, refused = sum(record["hosts"] for record in own), sum(len(record["refused"]) for record in own)
        lines.append(
            f"| {kind} | {len(own)} | {nowhere} | {len(own) - wrong - nowhere} | {wrong} | {hosts} | {refused} |"
        )
    return [*lines, ""]


def _wrong(found: list[Record]) -> list[str]:
    """One line for each law and way of breaking it: the adapter types, and the architectures."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in found:
        for law, said in wrong_laws(record).items():
            groups[law, _shape_of(said)].append(record)
        if "cut" in record:
            groups["the limit", record["cut"]].append(record)
    lines = []
    for (law, said), own in sorted(groups.items()):
        kinds, names = ([r[key] for r in own if r[key]] for key in ("kind", "name"))
        lines.append(f"- {law}: {_cell(said)} ({_listed(kinds)}; {len({*names})}: {_listed(names)})")
    return ["## Wrong", "", *(lines or ["Nothing."]), ""]


def _refused(built: list[Record]) -> list[str]:
    counts: Counter[tuple[str, str]] = Counter()
    example: dict[tuple[str, str], str] = {}
    for record in built:
        law_refusals = [said for said in record["laws"].values() if said.startswith("refused")]
        for said in [*record["refused"].values(), *law_refusals, *filter(None, [record["merge"]])]:
            key = record["kind"], _shape_of(said)
            counts[key] += 1
            example.setdefault(key, f"{record['name']}: {said}")
    lines = ["## Refused, and why", "", "| adapter type | times | for example |", "|---|---|---|"]
    rows = [f"| {kind} | {count} | {_cell(example[kind, said])} |" for (kind, said), count in counts.most_common()]
    return [*lines, *rows, ""]


def _unbuilt(found: list[Record]) -> list[str]:
    rows = [f"| {r['name']} | {_cell(r['unbuilt'])} |" for r in found if "unbuilt" in r]
    timm = [] if any(r["name"].startswith("timm/") for r in found) else ["| timm | not installed, or not importable |"]
    return ["## Not built, and why", "", "| architecture | why |", "|---|---|", *rows, *timm, ""]


def _built(built: list[Record]) -> list[str]:
    recipes = {record["name"]: record["recipe"] for record in built}
    return ["## Built, and how", "", ", ".join(f"{name} ({recipe})" for name, recipe in sorted(recipes.items())), ""]


def _shape_of(said: str) -> str:
    """A message without what differs from model to model: names, numbers."""
    numbers = re.sub(r"\b\d+(\.\d+)?(e[-+]?\d+)?\b", "N", said)
    names = r"(?<=into )\S+|(?<=(?:buffer|weight) )\w\S*|(?<=are read: ).*|\b[\w.]*\.[\w.]+\b|'[^']*'|\"[^\"]*\""
    bare = re.sub(names, "…", numbers)
    return re.sub(r"(\w+ …)(, \w+( …)?)*", r"\1", re.sub(r"\b[A-Z]+[a-z]\w*[A-Z]\w*\b", "…", bare))[:160]


def _listed(names: Iterable[str]) -> str:
    unique = list(dict.fromkeys(names))
    return ", ".join(unique[:12]) + (" and more" if len(unique) > 12 else "")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:260]

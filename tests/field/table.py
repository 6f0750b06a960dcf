"""The table of a sweep: right, refused and why, not buildable and why, wrong and which law."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

Record = dict[str, Any]

_INTRODUCTION = """# On models that nobody here wrote

`make field` builds every architecture of transformers from a tiny configuration, every family of timm on small images,
and a shelf of hand-written nets; it puts each adapter type into all modules that it may be for (one of those that are
alike), and holds it to laws that need no knowledge of the model:

- unchanged at the start, in eval and in train mode, to the bit (but for Prefix and Prompt); the bits are those
  of the base with its weights training or not, or with the outputs of the adapted modules laid out without gaps in
  memory, for torch has other kernels for each
- each adapter runs, wherever its module is called or its weight is read; or injecting was refused
- merged equals unmerged; unmerging brings back every bit, and the output
- off equals the base to the bit, and on again what it was
- saved, and loaded into a fresh model: equal to the bit
- cached decoding equals uncached, where the model generates
- after three training steps and eject: the base to the bit, buffers too
- an operation in place on the outputs equals the same out of place, gradients too

A sample runs with the tests (`tests/field/test_field.py`), there with two of those that are alike. A run that was
stopped goes on where it was; `--retry` runs once more what was wrong or not built.
"""

# What a refusal says, in order, and what it is about.
_REFUSALS = [
    ("which would change too", "The weight is tied to another module's: merging would change both"),
    ("computed from other parameters|a hook computes|a hook divides", "The weight is computed from others"),
    ("its weights are not its own|rescale", "The base changes its own weights"),
    ("no attention call was seen", "No attention of a known form is called inside: eager, linear, deformable"),
    ("how many key and value heads|do not fit .* heads|takes 'sinks'", "An attention of other shapes or arguments"),
    ("how many features it gives", "The size of the hidden states cannot be inferred"),
    (
        "beside hidden states of shape|and its module (gave|read)",
        "What is read and what is returned have other shapes than the hidden states",
    ),
    ("no hidden states|none of these is a floating-point", "The module returns no hidden states"),
    ("larger than min", "The rank is larger than the matrix"),
    ("does not know which", "It is not known which weight gives which feature"),
    ("reads the weights? of its child|reads this child's weight", "The parent reads this weight without a call"),
    (
        "and the tokens|puts vectors before|for each token",
        "The model has inputs or outputs of the sequence's length that cannot grow",
    ),
    ("which its input embeddings are|an encoder and a decoder", "Not clear which embeddings are the input's"),
    ("keeps what it made of its weights", "The module keeps in eval mode what it made of its weights"),
    ("past its forward", "The module is also called past its forward, where an adapter would not act"),
    ("in a second embedding", "A second embedding looks the tokens up too"),
    ("is never called", "A container, which is never called"),
    ("torch.complex", "The weight is complex"),
]  # fmt: skip

# Likewise, of what could not be built.
_BARS = [
    ("requires the timm library|backbone is not set", "needs timm"),
    ("requires the .* library|not installed|install", "needs another library"),
    (
        "million parameters|too many parameters",
        "no small configuration was found: too many parameters",
    ),
    ("more than .* seconds|status", "the process met its limit of time or memory"),
    ("no input is known under a name|missing .* required|have to specify|should be", "its inputs could not be found"),
    ("two runs from|not finite|holds no", "its output is random, not finite or no tensor"),
    ("Class validation|ValueError", "its configuration refuses the small sizes"),
]


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


def page(path: Path, known: int) -> str:
    """The whole page, in Markdown; lists stand in blocks that are opened by a click. `known`: how many there are."""
    found = records(path)
    built, unbuilt = [record for record in found if record["kind"]], [r for r in found if "unbuilt" in r]
    versions = ", ".join(sorted({record.get("torch", torch.__version__) for record in found}))
    lines = [
        _INTRODUCTION,
        f"Run with torch {versions} and transformers {transformers.__version__}, on {len({r['name'] for r in found})} "
        f"of {known}: {len({r['name'] for r in built})} were built, {len({r['name'] for r in unbuilt})} not.", "",
        *_kinds(built), *_wrong(found), *_refused(built), *_unbuilt(unbuilt), *_built(built),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _closed(title: str, lines: list[str]) -> list[str]:
    return [f'??? note "{title}"', "", *(f"    {line}".rstrip() for line in lines), ""]


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
    """A row for each reason, the most frequent first."""
    groups: dict[str, list[tuple[Record, str]]] = defaultdict(list)
    for record in built:
        law_refusals = [said for said in record["laws"].values() if said.startswith("refused")]
        for said in [*record["refused"].values(), *law_refusals, *filter(None, [record["merge"]])]:
            groups[_reason(said, _REFUSALS) or _shape_of(said)].append((record, said))
    lines = ["| why | times | adapter types | for example |", "|---|---|---|---|"]
    for why, cases in sorted(groups.items(), key=lambda item: -len(item[1])):
        record, said = min(cases, key=lambda case: len(case[1]))
        kinds = _listed(case["kind"] for case, _ in cases)
        lines.append(f"| {_cell(why)} | {len(cases)} | {kinds} | {record['name']}: {_cell(said)} |")
    times = sum(map(len, groups.values()))
    return ["## Refused, and why", "", *_closed(f"{times} refusals, {len(groups)} reasons", lines)]


def _unbuilt(unbuilt: list[Record]) -> list[str]:
    """A row for each reason, and the architectures."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in unbuilt:
        groups[_reason(record["unbuilt"], _BARS) or "no inputs or sizes were found with which it runs"].append(record)
    lines = ["| why | how many | architectures | for example |", "|---|---|---|---|"]
    for why, own in sorted(groups.items(), key=lambda item: -len(item[1])):
        names = ", ".join(sorted(record["name"] for record in own))
        lines.append(f"| {_cell(why)} | {len(own)} | {names} | {_cell(own[0]['unbuilt'])} |")
    return ["## Not built, and why", "", *_closed(f"{len(unbuilt)} architectures, {len(groups)} reasons", lines)]


def _reason(said: str, classes: list[tuple[str, str]]) -> str | None:
    return next((why for pattern, why in classes if re.search(pattern, said)), None)


def _built(built: list[Record]) -> list[str]:
    recipes: dict[str, set[str]] = defaultdict(set)
    for record in built:
        recipes[record["recipe"].partition(", ")[0]].add(record["name"])
    lines = ["| how | architectures |", "|---|---|"]
    lines += [f"| {recipe} | {', '.join(sorted(names))} |" for recipe, names in sorted(recipes.items())]
    return ["## Built, and how", "", *_closed(f"{sum(map(len, recipes.values()))} architectures", lines)]


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

"""The table of ratios and its picture, from the newest result: `python benchmarks/report.py`."""

import json
import pathlib
import sys
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"
NAMES = ["base", "peftlib", "HF peft", "LyCORIS", "loralib"]


def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [bench["extra_info"] | {"group": bench["group"]} for bench in result["benchmarks"] if bench["extra_info"]]


def ratios(row: dict[str, Any]) -> dict[str, str]:
    """Times as ratios to the frozen base where there is one, else to peftlib; counted values as they are."""
    values = row["values"]
    if row["unit"] == "s":
        unit = values.get("base", values["peftlib"])
        return {name: f"{value / unit:.2f}" for name, value in values.items()}
    return {name: f"{value:.3g}" for name, value in values.items()}


# Why a peer is ahead on time, where the row itself does not say.
WHY = {
    "loralib": "a class of its own stands in the layer's place, with nothing to walk over and nothing to check",
    "HF peft": "it keeps the mask and the dropped input, which peftlib computes again",
}


def remark(row: dict[str, Any]) -> str:
    """Which peer is ahead, if one is, and why; what ran beside them; the row's own note."""
    peers = {name: row["values"][name] for name in NAMES[2:] if name in row["values"]}
    best = min(peers, key=lambda name: peers[name], default=None)
    beside = ", ".join(f"{name} {value}" for name, value in ratios(row).items() if name not in NAMES)
    if best is None or row["values"]["peftlib"] <= peers[best]:
        return "; ".join(filter(None, (beside, row["note"])))
    why = row["note"] or (WHY.get(best, "") if "base" in row["values"] else "")
    return "; ".join(filter(None, (f"{best} is ahead" + (f": {why}" if why else ""), beside)))


def markdown(result: dict[str, Any]) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in result["machine_info"].items())
    lines = [f"Minima of interleaved repeats in one process. {machine}.", ""]
    group = None
    for row in rows_of(result):
        if row["group"] != group:
            group = row["group"]
            lines += ["", f"**{group}**", "", f"| | {' | '.join(NAMES)} | unit | |", "|---" * (len(NAMES) + 3) + "|"]
        unit = row["unit"] if row["unit"] != "s" else "× base" if "base" in row["values"] else "× peftlib"
        shown = ratios(row)
        cells = [shown.get(name, "–") for name in NAMES]
        lines.append(f"| {row['row']} | {' | '.join(cells)} | {unit} | {remark(row)} |")
    return "\n".join(lines)


def picture(result: dict[str, Any], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows_of(result) if "base" in row["values"] and row["unit"] == "s"]
    if not rows:
        return
    figure, axes = pyplot.subplots(figsize=(9, 0.42 * len(rows) + 1.2), layout="constrained")
    for name, marker in zip(NAMES[1:], "osD^", strict=True):
        points = [
            (row["values"][name] / row["values"]["base"], at) for at, row in enumerate(rows) if name in row["values"]
        ]
        axes.scatter(*zip(*points, strict=True), marker=marker, s=70 if name == "peftlib" else 36, label=name, zorder=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["row"] for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("time, as a multiple of the frozen base (left is better)")
    axes.grid(axis="x", which="both", alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=140)


def main() -> None:
    newest = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "latest.json"
    result = json.loads(newest.read_text())
    table = markdown(result)
    newest.with_suffix(".md").write_text(table + "\n")
    picture(result, newest.with_suffix(".png"))
    print(table)


if __name__ == "__main__":
    main()

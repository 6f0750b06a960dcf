"""The tests in environments with the lowest and the newest of each dependency; results are kept, a file for each.

An environment is made in the cache folder, the tests that versions.toml names are run in it, and it is taken away; what
has a result is not run again. This file needs nothing but Python."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWN = "{}.{}".format(*sys.version_info)
Environment = dict[str, Any]
Result = dict[str, Any]


def parts_of(environment: Environment) -> dict[str, Any]:
    """By name; a part may be of some environments alone, and an environment may have some parts alone."""
    return {
        name: part
        for name, part in DATA["parts"].items()
        if environment["name"] in part.get("only", [environment["name"]]) and name in environment.get("only", [name])
    }


def interpreter(version: str) -> str | None:
    """A Python of this version: this one, one on the path, or one of pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [sys.executable, shutil.which(f"python{version}"), *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
    return next((path for path in found if path and _answers(path, version)), None)


def _answers(path: str, version: str) -> bool:
    code = "import sys, venv; print('%d.%d' % sys.version_info[:2])"
    return subprocess.run([path, "-c", code], capture_output=True, text=True).stdout.strip() == version


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> list[str]:
    """All that the tests need, in the bounds that are declared; which version of each, `constraints` says."""
    return [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"], "accelerate", "setuptools"]


def in_bounds(name: str) -> str:
    """The newest is the newest that is declared."""
    lines = {_canonical(re.split(r"[<>=!~; ]", line)[0]): line for line in declared()}
    return lines.get(_canonical(name), name)


def constraints(environment: Environment) -> Iterator[str]:
    pins = environment.get("pins", {})
    loose = {_canonical(name) for name in (*pins, *environment.get("newest", ()), *environment.get("free", ()))}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        if "==" in line and _canonical(line.partition("==")[0]) not in loose:
            yield line
    yield from (f"{name}=={version}" for name, version in pins.items())


def made(environment: Environment, folder: Path) -> Path:
    """The Python of a virtual environment in this folder. What an environment of this Python does not change is read
    from where this Python has it: gigabytes less, and what lies in the environment itself comes first."""
    python = folder / "bin/python"
    if (folder / "made").exists():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([interpreter(environment["python"]) or "python", "-m", "venv", folder], check=True)
    listed = folder / "constraints.txt"
    listed.write_text("\n".join(constraints(environment)) + "\n")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    linked = environment["python"] == OWN
    changed = [*environment.get("pins", ()), *map(in_bounds, environment.get("newest", ())), "setuptools"]
    names = changed if linked else declared()
    subprocess.run([*pip, "--upgrade", "--constraint", listed, *names], check=True)
    if linked:
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "zz_others.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")) + "\n")
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--editable", ROOT], check=True)
    (folder / "made").touch()
    return python


def versions(python: Path) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json, platform, sys; names = sys.argv[1:]\n"
        "print(json.dumps({'python': platform.python_version(), **{name: m.version(name) for name in names}}))"
    )
    return json.loads(subprocess.check_output([python, "-c", code, *DATA["shown"]], text=True))


def tested(python: Path, part: dict[str, Any], folder: Path, workers: int, thin: int) -> Result:
    """Counts of one part, and the names of what failed with the first line of why."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    run = [python, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "tools.share"]
    # The newer family of reports refuses `record_property`, with which the tests fill the compatibility matrix.
    run += ["--one-in", str(part["one_in"] * thin), f"--junitxml={report}", "-o", "junit_family=xunit1"]
    run += ["-n", str(workers)] if workers else []
    own = {"PYTHONPATH": "tests", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*run, *part["paths"]], cwd=ROOT, env={**os.environ, **own}, capture_output=True, text=True)
    (folder / "output.txt").write_text(done.stdout + done.stderr)
    if not report.exists():
        return {"passed": 0, "failed": 0, "skipped": 0, "failures": {"the run": (done.stdout + done.stderr)[-400:]}}
    return counted(report)


def counted(report: Path) -> Result:
    failures, skipped, passed = {}, 0, 0
    for case in ElementTree.parse(report).iter("testcase"):
        why = case.find("failure")
        why = case.find("error") if why is None else why
        if why is not None:
            failures[f"{case.get('classname')}::{case.get('name')}"] = (why.get("message") or "").partition("\n")[0]
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return {"passed": passed, "failed": len(failures), "skipped": skipped, "failures": failures}


def run(environment: Environment, cache: Path, options: argparse.Namespace) -> None:
    """Goes on where an earlier run stopped; the result is written after each part."""
    name = environment["name"]
    if interpreter(environment["python"]) is None:
        print(f"{name}: no Python {environment['python']} here", flush=True)
        return
    result = result_of(environment, cache) or {"parts": {}}
    done = {key for key, counts in result["parts"].items() if not (options.retry and counts["failures"])}
    for key, part in parts_of(environment).items():
        if key in done:
            continue
        python = made(environment, cache / name)
        result["versions"] = versions(python)
        counts = tested(python, part, cache / name, options.workers, options.thin)
        result["parts"][key] = {"one_in": part["one_in"] * options.thin, **counts}
        (cache / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(f"{name}: {key}: {_said(counts)}", flush=True)
    if not options.keep:
        shutil.rmtree(cache / name, ignore_errors=True)


def result_of(environment: Environment, cache: Path) -> Result | None:
    file = cache / f"{environment['name']}.json"
    return json.loads(file.read_text()) if file.exists() else None


def _said(counts: Result) -> str:
    return f"{counts['passed']:,} passed, {counts['failed']} failed, {counts['skipped']} skipped"


def page(cache: Path) -> str:
    """The whole page, in Markdown."""
    results = {environment["name"]: result_of(environment, cache) for environment in DATA["environments"]}
    head = ["environment", "Python", *DATA["shown"], *DATA["parts"]]
    failures = [line for environment in DATA["environments"] for line in _failures(environment, results)]
    lines = [_INTRODUCTION, _parts(), f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [_row(environment, results[environment["name"]], len(head)) for environment in DATA["environments"]]
    found = [result for result in results.values() if result]
    lines += ["", f"{_spans(found)} {_shares(found)}"] if found else []
    lines += ["", "## What failed", "", *failures] if failures else []
    return "\n".join(lines) + "\n"


_INTRODUCTION = """# Versions that are tested

`make versions` runs a share of the tests, always the same ones, with the lowest and the newest of each dependency. In
a cell: passed / failed / skipped. A run that was stopped goes on where it was; a Python that a machine lacks is left to
the workflow of the repository, which has the same environments.

PyTorch starts at 2.13, for `torch.compile`: compiled by earlier ones, an adapter that overrides a weight breaks the
graph (seen with 2.9 and 2.10), or leaves a host whose weight the next compiled call does not find (2.12). transformers
starts at 5.16: in earlier ones, 5.12 among them, T5 attends by itself, where Prefix cannot meet it and refuses it; in
5.4 a Prompt around Mamba fails too. safetensors starts at 0.8, the first whose writer is told where a tensor lies in
memory.
"""


def _parts() -> str:
    lines = [f"- {name}: {', '.join(f'`{path}`' for path in part['paths'])}" for name, part in DATA["parts"].items()]
    return "\n".join(lines) + "\n"


def _failures(environment: Environment, results: dict[str, Result | None]) -> list[str]:
    parts = (results[environment["name"]] or {"parts": {}})["parts"].values()
    return [f"- {environment['says']}: `{test}`: {why}" for part in parts for test, why in part["failures"].items()]


def _row(environment: Environment, result: Result | None, width: int) -> str:
    if result is None:
        cells = [environment["says"], environment["python"], "not run here"]
        return f"| {' | '.join([*cells, *[''] * (width - len(cells))])} |"
    found = [result["versions"][name].partition("+")[0] for name in ("python", *DATA["shown"])]
    own = parts_of(environment)
    counts = [_cell(result["parts"].get(part)) if part in own else "" for part in DATA["parts"]]
    return f"| {' | '.join([environment['says'], *found, *counts])} |"


def _cell(counts: Result | None) -> str:
    return " / ".join(f"{counts[key]:,}" for key in ("passed", "failed", "skipped")) if counts else "not run"


def _spans(results: list[Result]) -> str:
    spans = []
    for name in ("python", *DATA["shown"]):
        found = sorted({result["versions"][name].partition("+")[0] for result in results}, key=_order)
        spans += [f"{name} {' to '.join(dict.fromkeys((found[0], found[-1])))}"] if found else []
    return f"Tested with {', '.join(spans)}; on Linux, without a GPU."


def _shares(results: list[Result]) -> str:
    parts = [(name, counts["one_in"]) for result in results for name, counts in result["parts"].items()]
    least = {name: max(one_in for other, one_in in parts if other == name) for name in dict(parts)}
    return f"At least one test in {', '.join(f'{one_in} of {name}' for name, one_in in least.items())}."


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="environments; default all")
    parser.add_argument("--cache", type=Path, default=ROOT / ".versions", help="delete it to start again")
    parser.add_argument("--workers", type=int, default=2, help="of pytest-xdist; 0 for none")
    parser.add_argument("--thin", type=int, default=1, help="run this many times fewer tests")
    parser.add_argument("--retry", action="store_true", help="once more the parts in which something failed")
    parser.add_argument("--keep", action="store_true", help="the environments too")
    parser.add_argument("--list", action="store_true", help="the names as JSON, and nothing else")
    parser.add_argument("--table", type=Path, help="write the page here")
    options = parser.parse_args()
    names = [environment["name"] for environment in DATA["environments"]]
    if options.list:
        print(json.dumps(names))
        return
    if unknown := set(options.names) - set(names):
        parser.error(f"no environment {', '.join(unknown)}; there are {', '.join(names)}")
    options.cache.mkdir(exist_ok=True)
    for environment in DATA["environments"]:
        if not options.names or environment["name"] in options.names:
            run(environment, options.cache.absolute(), options)
    if options.table:
        options.table.write_text(page(options.cache))
    results = [result_of(e, options.cache) for e in DATA["environments"] if e["name"] in (options.names or names)]
    sys.exit(any(part["failures"] for result in results if result for part in result["parts"].values()))


if __name__ == "__main__":
    main()

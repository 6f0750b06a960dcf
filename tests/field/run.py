"""The sweep: each architecture in a process of its own, with a limit of time and memory; results are kept as lines."""

import argparse
import contextlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import table
import torch
from laws import LAWS, NotHere, Wrong
from placing import KINDS, Case, Kind
from subject import Subject

import peftlib

Record = dict[str, Any]
# What every child would import again, a second or two each.
_LOADED = ("llama", "bert", "vit", "t5", "whisper", "mamba", "clip", "wav2vec2")


def checked(name: str, alike: int = 1) -> Iterator[Record]:
    """One record for each kind, or one that says why the architecture could not be built."""
    try:
        subject = Subject(families.build(name))
        why = subject.usable()
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        yield {"name": name, "kind": None, "unbuilt": why[:400]}
        return
    if why:
        yield {"name": name, "kind": None, "unbuilt": why}
        return
    for kind in KINDS:
        yield {"name": name, "kind": kind.name, "recipe": subject.built.recipe, **_held(subject, kind, alike)}


def _held(subject: Subject, kind: Kind, alike: int) -> Record:
    case = Case(subject, kind, alike=alike)
    try:
        case.settle()
    except Exception as error:
        return {"hosts": 0, "refused": {}, "merge": "", "laws": {"injecting": f"wrong: {_said(error)}"}}
    laws = {law.__name__.replace("_", " "): verdict(law, case) for law in LAWS} if case.hosts else {}
    refused = dict(list(case.refused.items())[:40])
    return {"hosts": len(case.hosts), "refused": refused, "merge": case.merge_refused, "laws": laws}


def verdict(law: Callable[[Case], None], case: Case) -> str:
    try:
        law(case)
    except NotHere as reason:
        return f"- {reason}"
    except Wrong as reason:
        return f"wrong: {reason}"
    except peftlib.AdapterError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"wrong: {_said(error)}"
    return "right"


def _said(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    ours = [
        f for f in traceback.extract_tb(error.__traceback__) if "/peftlib/" in f.filename or "/kernels/" in f.filename
    ]
    via = f", through {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    return f"{type(error).__name__}: {error} (at {Path(place.filename).name}:{place.lineno}{via})"[:600]


def apart(name: str, seconds: int, gigabytes: float) -> list[Record]:
    """`checked` in a child of this process; what it wrote before a limit struck is kept."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(read)
            _work(name, write, seconds, gigabytes)
        finally:  # whatever struck, the child never returns into what its parent was doing
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as lines:
        records = [{**json.loads(line), "torch": torch.__version__} for line in lines if line.endswith("\n")]
    _, status = os.waitpid(child, 0)
    if status:
        struck = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        late = struck in (signal.SIGXCPU, signal.SIGALRM)
        why = f"more than {seconds} seconds" if late else f"the process ended with status {status}"
        records.append({"name": name, "kind": None, "unbuilt" if not records else "cut": why})
    return records


def _work(name: str, write: int, seconds: int, gigabytes: float) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))  # of its own work, however busy the machine is
    signal.alarm(20 * seconds)
    used = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 2**30), used))
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silent, stream)
    torch.set_num_threads(1)
    with os.fdopen(write, "w") as lines:
        for record in checked(name):
            lines.write(json.dumps(record) + "\n")
            lines.flush()
    os._exit(0)


def sweep(names: list[str], cache: Path, seconds: int, gigabytes: float) -> None:
    """Goes on where an earlier run stopped; a line is written for each record at once."""
    done = {record["name"] for record in table.records(cache.parent)}
    for name in (name for name in names if name not in done):
        started = time.monotonic()
        records = apart(name, seconds, gigabytes)
        with cache.open("a") as lines:
            lines.writelines(json.dumps(record) + "\n" for record in records)
        print(f"{name}: {table.summary(records)}, {time.monotonic() - started:.0f} s", flush=True)


def forget(cache: Path, only: str) -> None:
    """Drops the records of what was not built, cut or wrong, so that it is run again."""
    again = {r["name"] for r in table.records(cache) if only in r["name"] and (not r["kind"] or table.wrong_laws(r))}
    for file in cache.glob("*.jsonl"):
        kept = [line for line in file.read_text().splitlines() if json.loads(line)["name"] not in again]
        file.write_text("".join(f"{line}\n" for line in kept))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--cache", type=Path, default=Path(".field"), help="folder of results; delete it to start again"
    )
    parser.add_argument("--only", default="", help="architectures whose name holds this")
    parser.add_argument("--workers", type=int, choices=[1, 2], default=1)
    parser.add_argument("--seconds", type=int, default=60, help="of work, for one architecture")
    parser.add_argument("--gigabytes", type=float, default=10.0, help="of address space for one architecture")
    parser.add_argument("--retry", action="store_true", help="once more what was not built, or wrong")
    parser.add_argument("--table", type=Path, help="write the table here")
    return parser.parse_args()


def main() -> None:
    options = _options()
    options.cache.mkdir(exist_ok=True)
    if options.retry:
        forget(options.cache, options.only)
    _import_ahead()
    done = {record["name"] for record in table.records(options.cache)}
    names = [name for name in families.names() if options.only in name and name not in done]
    children = []
    for worker in range(1, options.workers):
        child = os.fork()
        if not child:
            sweep(
                names[worker :: options.workers], options.cache / f"{worker}.jsonl", options.seconds, options.gigabytes
            )
            os._exit(0)
        children.append(child)
    sweep(names[:: options.workers], options.cache / "0.jsonl", options.seconds, options.gigabytes)
    for child in children:
        os.waitpid(child, 0)
    page = table.page(options.cache, len(families.names()))
    (options.table or options.cache / "table.md").write_text(page)
    sys.exit(bool(table.wrongs(options.cache)))


def _import_ahead() -> None:
    torch.set_num_threads(1)
    for name in _LOADED:
        with contextlib.suppress(RuntimeError):
            families.build(f"hf/{name}")


if __name__ == "__main__":
    main()

"""Runs the suite against each mutation of a source: each must fail a test, or be explained in `mutations.toml`.

`PYTHONPATH=tests python -m tools.mutate peftlib/_core/merge.py` prints what survives. One run of the tests first
finds which of them reach which line, and how long each takes; a mutation then meets those that reach it, the fastest
first, until one fails. It does so in a fork of a process that has collected the tests, where the code of the
functions is exchanged; or, if it lies outside of functions, in a process that has yet to import peftlib. The tests are
those marked `mutants`, or all fast ones of the files given with `--tests`.
"""

import argparse
import dataclasses
import functools
import gc
import importlib.machinery
import itertools
import linecache
import math
import os
import pickle
import re
import resource
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import coverage
import pytest

from tools.mutations import Mutation, mutations

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
PYTEST = [
    *("-p", "no:cacheprovider", "--capture=no", "-qq", "--no-header", "--no-summary", "-m", "not slow"),
    *("-W", "ignore:Module already imported"),  # the heavy libraries, once for all children
]
# The table of laws is kinds by hosts by dtypes: of it the rows of LoRA that say something of adapters themselves.
LAWS = r"dense_float64_reference\[lora.*(fp32|bf16)|test_reset|test_dropout|under_autocast\[|refuses_a_host.*lora"
# After so many seconds a child waits for what never comes; an endless loop ends sooner, by its use of the processor.
PATIENCE = 900
SURVIVED, FAILED, BROKEN = 0, 1, 3


@dataclass
class Reach:
    """What the tests reach: by test its seconds, by source and line the tests that run it."""

    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[Path, dict[int, set[str]]] = field(default_factory=dict)
    most: float = math.inf  # a mutation that only a test beyond it would notice counts as alive
    files: tuple[Path, ...] = ()  # whose tests these are; none: those with a mark

    def tests(self, mutation: Mutation) -> list[str]:
        """Those that run its statement; those that compile, for what runs there is not seen; those that run its
        function, and then anything in its file, for what runs once and is kept was seen in one test only. Of each the
        fastest first, until they take `most` seconds."""
        by_line = self.lines[mutation.source]
        compiled = sorted((test for test in self.seconds if "compiled" in test), key=self.seconds.__getitem__)
        own, around = (self._tests(by_line, lines or ()) for lines in (mutation.lines, mutation.function))
        found = dict.fromkeys([*own, *compiled, *around, *self._tests(by_line, by_line)])
        until = itertools.accumulate(self.seconds[test] for test in found)
        return [test for test, taken in zip(found, until, strict=True) if taken <= self.most]

    def _tests(self, by_line: dict[int, set[str]], lines: Iterable[int]) -> list[str]:
        found: set[str] = set().union(*(by_line.get(line, ()) for line in lines))
        return sorted(found, key=self.seconds.__getitem__)


def measured(items: list[pytest.Item], sources: Iterable[Path]) -> Reach:
    reach = Reach()
    watch = coverage.Coverage(data_file=None, config_file=False, include=[str(source) for source in sources])
    watch.start()
    for item, following in _with_next(items):
        watch.switch_context(item.nodeid)
        start = time.process_time()
        _run(item, following)
        reach.seconds[item.nodeid] = time.process_time() - start
    watch.stop()
    if any(item.session.testsfailed for item in items):
        raise RuntimeError("the tests fail without any mutation: see `make test`")
    for source in sources:
        contexts = watch.get_data().contexts_by_lineno(str(source))
        reach.lines[source] = {line: set(tests) - {""} for line, tests in contexts.items()}
    return reach


def with_new_tests(known: Reach, items: list[pytest.Item], sources: Iterable[Path]) -> Reach:
    if not known.lines.keys() >= set(sources):
        return measured(items, sources)
    new = [item for item in items if item.nodeid not in known.seconds]
    if not new:
        return known
    added = measured(new, known.lines)
    for source, lines in known.lines.items():
        for line, tests in lines.items():
            added.lines[source].setdefault(line, set()).update(tests)
    return Reach({**known.seconds, **added.seconds}, added.lines)


def fails(mutation: Mutation, reach: Reach, items: list[pytest.Item]) -> bool:
    """Whether a test fails; one that takes 20 seconds and 20 times as long as it did ends this process."""
    by_id = {item.nodeid: item for item in items}
    for item, following in _with_next([by_id[test] for test in reach.tests(mutation) if test in by_id]):
        limit = time.process_time() + 20 + 20 * reach.seconds[item.nodeid]
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), resource.RLIM_INFINITY))
        _run(item, following)
        if item.session.testsfailed:
            return True
    return False


def _with_next(items: list[pytest.Item]) -> Iterator[tuple[pytest.Item, pytest.Item | None]]:
    return zip(items, [*items[1:], None], strict=False)


def _run(item: pytest.Item, following: pytest.Item | None) -> None:
    item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)


def _is_chosen(item: pytest.Item) -> bool:
    return item.get_closest_marker("mutants") is not None or (
        item.path.name == "test_laws.py" and re.search(LAWS, item.nodeid) is not None
    )


def _files() -> Iterator[Path]:
    """Those with a test to choose: to collect all would import every library that some test needs."""
    for path in sorted(TESTS.rglob("test_*.py")):
        if path.name == "test_laws.py" or "pytest.mark.mutants" in path.read_text():
            yield path


class Collected:
    """A pytest plugin that hands the tests over in place of running them."""

    def __init__(self, work: Callable[[list[pytest.Item]], object], chooses: bool) -> None:
        self.work, self.chooses = work, chooses
        self.error: Exception | None = None
        self.answer: Any = True  # where a mutation cannot be imported, nothing is collected: it fails

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if _is_chosen(item) or not self.chooses]

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        try:
            self.answer = self.work(session.items)
        except Exception as error:
            self.error = error
        return True


def with_tests(work: Callable[[list[pytest.Item]], object], files: Sequence[Path]) -> Any:
    """What `work` gives for the collected tests."""
    plugin = Collected(work, chooses=not files)
    pytest.main([*PYTEST, *map(str, files or _files())], plugins=[plugin])
    if plugin.error is not None:
        raise plugin.error
    return plugin.answer


def forked(work: Callable[[], bool]) -> int:
    """Starts a child whose exit status is the answer."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    status = FAILED  # an interrupt that goes through a test is a failure of it
    try:
        status = FAILED if work() else SURVIVED
    except Exception:
        traceback.print_exc()
        status = BROKEN
    finally:
        os._exit(status)


def survivors(tasks: Iterable[tuple[int, Callable[[], bool]]], jobs: int) -> Iterator[int]:
    """Runs each task in a child, some at a time, and gives the numbers of those in which no test failed."""
    running: dict[int, tuple[int, float]] = {}
    for number, work in tasks:
        while len(running) >= jobs:
            yield from _ended(running)
        running[forked(lambda work=work: _silently(work))] = number, time.monotonic()
    while running:
        yield from _ended(running)


def _silently(work: Callable[[], bool]) -> bool:
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    os.chdir(tempfile.gettempdir())  # a refusal that no longer refuses may write a file
    return work()


def _ended(running: dict[int, tuple[int, float]]) -> Iterator[int]:
    time.sleep(0.01)
    for child, (number, start) in list(running.items()):
        done, status = os.waitpid(child, os.WNOHANG)
        if not done and time.monotonic() - start > PATIENCE:
            os.killpg(child, signal.SIGKILL)
        if done:
            del running[child]
            if os.WIFEXITED(status) and os.WEXITSTATUS(status) == BROKEN:
                raise RuntimeError(f"the run of mutation {number} broke outside of its tests")
            if status == SURVIVED:
                yield number


def unchanged(source: Path) -> Mutation:
    return Mutation(source, "no change", compile(source.read_text(), str(source), "exec"), None)


def is_exchangeable(mutation: Mutation) -> bool:
    """It runs after import only, and each function takes as many variables from outside as it did."""
    new, old = _codes(mutation.code), _codes(unchanged(mutation.source).code)
    return mutation.lines is not None and all(
        old[key].co_freevars == new[key].co_freevars for key in old.keys() & new.keys()
    )


def functions_by_source() -> dict[Path, list[FunctionType]]:
    found: dict[str, list[FunctionType]] = {}
    for each in gc.get_objects():
        if type(each) is FunctionType:  # isinstance would ask proxies for their class, and some warn
            found.setdefault(each.__code__.co_filename, []).append(each)
    return {Path(name).resolve(): functions for name, functions in found.items()}


def _codes(code: CodeType) -> dict[tuple[str, int], CodeType]:
    inner = [each for each in code.co_consts if isinstance(each, CodeType)]
    return {_key(each): each for each in inner} | {k: c for each in inner for k, c in _codes(each).items()}


def _key(code: CodeType) -> tuple[str, int]:
    return code.co_qualname, code.co_firstlineno


def import_as(mutation: Mutation) -> None:
    """Python's own loader, but for one file."""
    loader = importlib.machinery.SourceFileLoader
    get_code = loader.get_code

    def get(self: Any, fullname: str) -> CodeType | None:
        return mutation.code if os.path.realpath(self.path) == str(mutation.source) else get_code(self, fullname)

    loader.get_code = get


def fails_inside(
    mutation: Mutation, reach: Reach, items: list[pytest.Item], functions: dict[Path, list[FunctionType]]
) -> bool:
    new = _codes(mutation.code)
    for each in functions[mutation.source]:
        each.__code__ = new.get(_key(each.__code__), each.__code__)
    show(mutation)
    return fails(mutation, reach, items)


def show(mutation: Mutation) -> None:
    """To whom reads the source of its function again, as Triton's interpreter does; the others stay where they are."""
    if mutation.function is None:
        return
    lines = mutation.source.read_text().splitlines(keepends=True)
    first, last = mutation.function.start - 1, mutation.function.stop - 1
    text = [line + "\n" for line in mutation.text.splitlines()]
    lines[first:last] = text + ["\n"] * (last - first - len(text))
    linecache.cache[str(mutation.source)] = (len(lines), None, lines, str(mutation.source))


def fails_from_import(mutation: Mutation, reach: Reach) -> bool:
    import_as(mutation)
    return with_tests(functools.partial(fails, mutation, reach), reach.files)


def noted(work: Callable[[list[pytest.Item]], Any], path: Path, files: Sequence[Path]) -> Any:
    """What `work` gives for the collected tests in a child, so that this process imports nothing of peftlib."""
    child = forked(lambda: not with_tests(lambda items: path.write_bytes(pickle.dumps(work(items))), files))
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("the tests could not be collected and run: see `make test`")
    return pickle.loads(path.read_bytes())


def run(
    sources: list[Path], files: tuple[Path, ...], only: str, jobs: int, most: float, reach_path: Path, complete: bool
) -> bool:
    """Prints what survives, by source; says whether anything does, or an explanation has lost its mutation."""
    known = pickle.loads(reach_path.read_bytes()) if reach_path.exists() else Reach()
    found_reach = noted(lambda items: with_new_tests(known, items, sources), reach_path, files)
    reach = dataclasses.replace(found_reach, most=most, files=files)
    found = [each for source in sources for each in mutations(source) if only in each.what]
    reasons = explained()
    tried = [*map(unchanged, sources), *(each for each in found if each.what not in reasons)]
    numbers = range(len(tried))
    inside = [number for number in numbers if number < len(sources) or is_exchangeable(tried[number])]

    def try_inside(items: list[pytest.Item]) -> list[int]:
        functions = functions_by_source()
        gc.freeze()  # a child that walked these would copy them
        tasks = ((n, functools.partial(fails_inside, tried[n], reach, items, functions)) for n in inside)
        return list(tell(survivors(tasks, jobs), tried))

    alive = noted(try_inside, reach_path.with_suffix(".alive"), files)
    outside = sorted(set(numbers) - set(inside))
    tasks = ((n, functools.partial(fails_from_import, tried[n], reach)) for n in outside)
    alive += tell(survivors(tasks, jobs), tried)
    if not set(range(len(sources))) <= set(alive):
        raise RuntimeError("the tests fail in another order without any mutation: see `make test`")
    living = [tried[number] for number in sorted(alive)[len(sources) :]]
    reports = [report(source, found, living, reasons) for source in sources]
    gone = sorted(reasons.keys() - {each.what for each in found}) if complete else []
    print(*(f"EXPLAINS WHAT IS NO MUTATION OF ANY SOURCE {what}" for what in gone), sep="\n")
    return any(reports) or bool(gone)


def tell(alive: Iterator[int], tried: list[Mutation]) -> Iterator[int]:
    """As they come: the whole takes an hour."""
    for number in alive:
        print(f"alive, {number} of {len(tried)}: {tried[number].what}", flush=True)
        yield number


def explained() -> dict[str, str]:
    """Function and mutated code -> why no test can notice it, in whatever file the function is."""
    by_function = tomllib.loads(Path(__file__).with_name("mutations.toml").read_text())
    return {f"{name}: {what}": why for name, reasons in by_function.items() for what, why in reasons.items()}


def report(source: Path, found: list[Mutation], living: list[Mutation], reasons: dict[str, str]) -> bool:
    name = source.relative_to(ROOT)
    all_of_it = [each.what for each in found if each.source == source]
    survive = [each.what for each in living if each.source == source]
    known = sum(what in reasons for what in all_of_it)
    killed = len(all_of_it) - known - len(survive)
    print(*(f"{name} SURVIVES {what}" for what in survive), sep="\n")
    print(f"{name}: {len(all_of_it)} mutations, {killed} killed, {known} explained, {len(survive)} survive", flush=True)
    return bool(survive)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("sources", nargs="+", type=Path)
    arguments.add_argument("--tests", nargs="+", type=Path, default=[], help="files of tests, in place of the marked")
    arguments.add_argument("--only", default="", help="only the mutations whose description contains this")
    arguments.add_argument(
        "--complete",
        action="store_true",
        help="all sources are given: a reason without its mutant fails",
    )
    arguments.add_argument("--jobs", type=int, default=2)
    arguments.add_argument("--most", type=float, default=math.inf, help="seconds of tests for a mutation")
    arguments.add_argument(
        "--reach", type=Path, help="where what the tests reach is kept, and taken from the next time"
    )
    chosen = arguments.parse_args()
    sources = [source.resolve() for source in chosen.sources]
    files = tuple(path.resolve() for path in chosen.tests)
    os.chdir(ROOT)
    import torch
    import transformers

    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        reach = chosen.reach or Path(folder) / "reach"
        sys.exit(run(sources, files, chosen.only, chosen.jobs, chosen.most, reach, chosen.complete))


if __name__ == "__main__":
    main()

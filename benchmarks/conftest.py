"""The contest: contenders run in turn in one process, one thread, and the minimum of each counts."""

import functools
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
AT_LEAST = 2e-3  # seconds a measurement: a clock's resolution and a call's jitter are then below a percent
TOGETHER = 4.0  # seconds of all rounds
SHORT = 5e-2  # seconds of a call: a longer one does not feel with what the caches were filled before

Run = Callable[[], Any]
Contest = Callable[..., None]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def proven(tests: str) -> bool:
    """Whether the tests of an op pass: no speedup of wrong code is printed."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *tests.split()], cwd=ROOT, capture_output=True)
    return done.returncode == 0


@pytest.fixture
def contest(benchmark: Any, request: pytest.FixtureRequest) -> Contest:
    """`contest(row, {"base": run, "peftlib": run, peer: run, ...}, tests=...)` times all and records seconds a call."""

    def hold(row: str, runs: dict[str, Run], *, tests: str, rounds: int | None = None, note: str = "") -> None:
        if not proven(tests):
            pytest.fail(f"{tests}: red, so the speed of this op says nothing. Mend it first.")
        took = {name: _seconds(run) for name, run in runs.items()}
        loops = {name: max(1, round(AT_LEAST / seconds)) for name, seconds in took.items()}
        best = dict.fromkeys(runs, float("inf"))
        repeats = rounds is None  # else a call may use up what the next one needs

        def measure(name: str) -> None:
            if repeats and took[name] < SHORT:
                runs[name]()  # the caches are full of the contender before
            started = time.perf_counter()
            for _ in range(loops[name]):
                runs[name]()
            best[name] = min(best[name], (time.perf_counter() - started) / loops[name])

        def others() -> None:
            for name in runs:
                if name != "peftlib":
                    measure(name)

        def enough() -> int:
            """The minimum of a few runs is their noise: as many rounds as take some seconds, 30 at least."""
            started = time.perf_counter()
            others()
            measure("peftlib")
            return max(30, round(TOGETHER / (time.perf_counter() - started)))

        benchmark.group = request.module.__doc__.split("\n")[0]
        benchmark.pedantic(measure, args=("peftlib",), setup=others, rounds=rounds or enough(), iterations=1)
        benchmark.extra_info.update(row=row, unit="s", values=best, note=note)

    return hold


def _seconds(run: Run) -> float:
    run()  # warm
    started = time.perf_counter()
    run()
    return max(1e-7, time.perf_counter() - started)


@pytest.fixture
def record(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """`record(row, {"peftlib": value, peer: value}, unit=...)` puts what is counted, not timed, into the same table."""

    def keep(row: str, values: dict[str, float], *, unit: str, note: str = "") -> None:
        benchmark.group = request.module.__doc__.split("\n")[0]
        benchmark.pedantic(lambda: None, rounds=1)
        benchmark.extra_info.update(row=row, unit=unit, values=values, note=note)

    return keep


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Facts that change a ratio, and nothing that names the machine."""
    processor = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "unknown")
    machine_info.clear()
    machine_info.update(processor=processor, threads=1, python=platform.python_version(), **_versions())


def _cpuinfo() -> list[str]:
    path = pathlib.Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "peftlib", "peft", "lycoris_lora", "loralib")}

"""`python benchmarks/gpu_check.py`: tests the kernels compiled on this machine's GPU, then times them.

Nothing is timed while a test fails. Tests and table end in `--minutes`, of which the tests may take half: the rest is
dealt out over the questions, and over the lines of each; a line whose time is up has fewer rounds, one at least.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

TESTS = Path(__file__).resolve().parent.parent / "tests" / "kernels"
FILES = ("test_kernels_triton.py", "test_kernels_grouped.py")
ADAPTERS = 8
WARM = 3  # rounds that do not count

T = TypeVar("T")


class Problem(NamedTuple):
    """Tokens, in, out, rank, and the device and dtype of all tensors."""

    M: int
    K: int
    N: int
    rank: int
    device: str
    dtype: torch.dtype


class Row(NamedTuple):
    """One line of the table: what was timed beside what, both in µs, in how many rounds, and the bytes to move."""

    name: str
    ours: float
    beside: str
    theirs: float
    rounds: int
    bytes: int


class Trial(NamedTuple):
    """One line before it is timed; `elements` are those that must pass through memory."""

    name: str
    ours: Callable
    beside: str
    theirs: Callable
    elements: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tests, then the table; the exit status is 0 if both went through."""
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu_check.py", description=__doc__)
    for name, value in (("tokens", 8192), ("in", 4096), ("out", 4096), ("rank", 16), ("repeats", 30)):
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"default {value}")
    parser.add_argument("--minutes", type=float, default=10.0, help="of tests and table together; default 10")
    parser.add_argument("--interpret", action="store_true", help="on the CPU in the interpreter; times mean nothing")
    given = vars(parser.parse_args(arguments))
    refusal = _refusal(given["interpret"])
    if refusal:
        print(refusal, file=sys.stderr)
        return 2
    device, end = "cpu" if given["interpret"] else "cuda", time.monotonic() + 60 * given["minutes"]
    wrong = _wrong(30 * given["minutes"]) if device == "cuda" else None
    if wrong:
        print(f"{wrong}, so nothing is timed.", file=sys.stderr)
        return 1
    problem = Problem(given["tokens"], given["in"], given["out"], given["rank"], device, torch.bfloat16)
    print(heading(problem))
    for (question, trials), until in _dealt_out(list(QUESTIONS.items()), end):
        print(f"\n{question}")
        for trial, stop in _dealt_out(trials(problem), until):
            print(line(timed(trial, given["repeats"], problem, stop)), flush=True)
    return 0


def _wrong(seconds: float) -> str | None:
    """What the tests found: a kernel is known to be right only where all of them ran and passed."""
    tests = [sys.executable, "-m", "pytest", "-q", *(str(TESTS / name) for name in FILES)]
    try:
        failed = subprocess.run(tests, check=False, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return f"The tests did not end in {seconds:.0f} s (--minutes gives them more)"
    return "A kernel is wrong on this device" if failed else None


def _dealt_out(items: Sequence[T], end: float) -> Iterator[tuple[T, float]]:
    """Each item and when it is to end: what is left until `end`, in equal parts. What one leaves, the next ones get."""
    for left, item in zip(range(len(items), 0, -1), items, strict=True):
        now = time.monotonic()
        yield item, now + (end - now) / left


def _refusal(interpret: bool) -> str | None:
    if find_spec("triton") is None:
        return "gpu_check: Triton is not installed, so there are no kernels to check. Install it: pip install triton."
    if interpret:
        return None
    if not torch.cuda.is_available():
        return "gpu_check: PyTorch finds no CUDA or ROCm GPU. Run it on a machine with one, or give --interpret."
    if not TESTS.exists():
        return f"gpu_check: {TESTS} is not there. Run it from a checkout that is whole."
    return None


def _normal(problem: Problem, *shape: int) -> Tensor:
    return torch.randn(shape, device=problem.device, dtype=problem.dtype)


def of_the_base(problem: Problem) -> list[Trial]:
    """What the order of operations rests on: a GEMM that accumulates should cost what one that overwrites costs."""
    M, K, N = problem[:3]
    x, W, out = _normal(problem, M, K), _normal(problem, N, K), _normal(problem, M, N)
    return [
        Trial(
            "GEMM, beta 1", lambda: out.addmm_(x, W.t()), "GEMM, beta 0", lambda: torch.mm(x, W.t(), out=out), M * N
        )
    ]  # fmt: skip


def of_the_kernels(problem: Problem) -> list[Trial]:
    """Each kernel beside what PyTorch does in its place."""
    from peftlib.kernels import philox
    from peftlib.kernels.lora import triton as kernels

    M, K, N, rank, *_ = problem
    x, dY, h = _normal(problem, M, K), _normal(problem, M, N), _normal(problem, M, rank)
    A, B, seed = _normal(problem, rank, K), _normal(problem, N, rank), philox.new_seed(x.device)

    def backward_x_in_pytorch() -> None:
        keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(0.9)
        (h @ A).mul_(keep)
        torch.mm(h.t(), x * keep)

    return [
        Trial("shrink, p = 0", lambda: kernels.shrink(x, A, 0.5, 0.0, None), "x Aᵀ", lambda: x @ A.t(), M * K),
        Trial(
            "shrink, p = 0.1", lambda: kernels.shrink(x, A, 0.5, 0.1, seed),
            "dropout, x Aᵀ", lambda: F.dropout(x, 0.1) @ A.t(), M * K,
        ),
        Trial(
            "backward_x, p = 0.1", lambda: kernels.backward_x(x, h, A, 0.1, seed),
            "mask, g A, gᵀ x̂", backward_x_in_pytorch, 2 * M * K,
        ),
        Trial(
            "expand", lambda: kernels.expand(dY, h, B, 0.5, None),
            "addmm", lambda: torch.addmm(dY, h, B.t(), alpha=0.5), 2 * M * N,
        ),
    ]  # fmt: skip


def of_one_read(problem: Problem) -> list[Trial]:
    """From which rank on the partial sums of `backward_y` cost more than a second read of dY."""
    from peftlib.kernels.lora import triton as kernels

    M, _, N, *_ = problem
    trials, dY = [], _normal(problem, M, N)
    for rank in (8, 16, 32, 64):
        B, h = _normal(problem, N, rank), _normal(problem, M, rank)
        trials.append(
            Trial(
                f"backward_y, rank {rank}", lambda B=B, h=h: kernels.backward_y(dY, B, h, 0.5),
                "two GEMMs", lambda B=B, h=h: (dY @ B, dY.t() @ h), M * N,
            )
        )  # fmt: skip
    return trials


def of_a_shared_input(problem: Problem) -> list[Trial]:
    """Whether q, k and v should share one shrink: one read of x, and one draw of its mask, in place of three."""
    from peftlib.kernels import philox
    from peftlib.kernels.lora import triton as kernels

    M, K, _, rank, *_ = problem
    x, A = _normal(problem, M, K), [_normal(problem, rank, K) for _ in range(3)]
    together, seed = torch.cat(A), philox.new_seed(x.device)

    def trial(p: float) -> Trial:
        return Trial(
            f"one shrink, p = {p:g}", lambda: kernels.shrink(x, together, 0.5, p, seed),
            "three shrinks", lambda: [kernels.shrink(x, one, 0.5, p, seed) for one in A], M * K,
        )  # fmt: skip

    return [trial(0.0), trial(0.1)]


def of_many_adapters(problem: Problem) -> list[Trial]:
    """What more adapters in one batch cost: beside one adapter on all rows, and beside one after another."""
    from peftlib.kernels import Segments, lora_linear, lora_linear_rows

    def trials(tokens: int, trains: bool) -> list[Trial]:
        _, K, N, rank, device, dtype = problem
        own = max(1, tokens // ADAPTERS)
        x, W = _normal(problem, ADAPTERS, own, K).requires_grad_(trains), _normal(problem, N, K)
        pairs = [(_normal(problem, rank, K), _normal(problem, N, rank)) for _ in range(ADAPTERS)]
        factors = [factor.requires_grad_(trains) for pair in pairs for factor in pair]
        segments, dY = (
            Segments((1,) * ADAPTERS, (0.5,) * ADAPTERS),
            torch.ones(ADAPTERS, own, N, device=device, dtype=dtype),
        )

        def done(y: Tensor, given: Tensor) -> None:
            if trains:
                torch.autograd.grad(y, [x, *factors], given, allow_unused=True)

        def apart() -> None:
            for at, pair in enumerate(pairs):
                done(lora_linear(x[at], W, None, *pair, 0.5), dY[at])

        def routed() -> None:
            done(lora_linear_rows(x, W, None, pairs, segments), dY)

        name, elements = f"{ADAPTERS} adapters, {'step' if trains else 'use'}", ADAPTERS * own * (2 * K + N)
        return [
            Trial(name, routed, "one adapter", lambda: done(lora_linear(x, W, None, *pairs[0], 0.5), dY), elements),
            Trial(name, routed, "one by one", apart, elements),
        ]

    return [*trials(problem.M, True), *trials(ADAPTERS, False)]


def of_a_step(problem: Problem) -> list[Trial]:
    """What is left of the overhead in a whole layer, its launches and casts among it."""
    from peftlib.kernels import lora_linear

    _, K, N, rank, device, _ = problem

    def trial(M: int, p: float) -> Trial:
        x, dY, W = _normal(problem, M, K).requires_grad_(), _normal(problem, M, N), _normal(problem, N, K)
        A, B = (torch.randn(size, device=device).requires_grad_() for size in ((rank, K), (N, rank)))

        def step() -> None:  # forward and backward, as a training step
            y = lora_linear(x, W, None, A, B, 0.5, p, training=True)
            torch.autograd.grad(y, (x, A, B), dY)

        def frozen_step() -> None:
            torch.autograd.grad(F.linear(x, W), x, dY)

        return Trial(f"step of {M}, p = {p:g}", step, "frozen linear", frozen_step, 2 * M * K + M * N)

    few = max(1, problem.M // 64)
    return [trial(tokens, p) for tokens in (problem.M, few) for p in (0.0, 0.1)]


def of_the_bottleneck(problem: Problem) -> list[Trial]:
    """Whether its forward pass in one launch is worth a kernel."""
    from peftlib.kernels import bottleneck

    M, K, *_ = problem
    width, x = 64, _normal(problem, M, K)
    own = (_normal(problem, width, K), _normal(problem, width), _normal(problem, K, width), _normal(problem, K))

    def in_pytorch() -> None:
        F.linear(F.gelu(F.linear(x, *own[:2])), *own[2:]).add_(x)

    return [Trial("bottleneck", lambda: bottleneck(x, *own, residual=x), "four calls", in_pytorch, 2 * M * K)]


QUESTIONS: dict[str, Callable[[Problem], list[Trial]]] = {
    "Does a GEMM that accumulates cost more than one that overwrites?": of_the_base,
    "Which kernels are worth their launch?": of_the_kernels,
    "Up to which rank is one read of dY the cheaper?": of_one_read,
    "Should projections that share x share a shrink?": of_a_shared_input,
    "What do more adapters in one batch cost?": of_many_adapters,
    "Is the bottleneck worth a kernel?": of_the_bottleneck,
    "What does a layer cost above the frozen one?": of_a_step,
}


def timed(trial: Trial, repeats: int, problem: Problem, stop: float) -> Row:
    (ours, theirs), rounds = _times((trial.ours, trial.theirs), repeats, problem.device, stop)
    return Row(trial.name, ours, trial.beside, theirs, rounds, trial.elements * problem.dtype.itemsize)


def _times(functions: Sequence[Callable], repeats: int, device: str, stop: float) -> tuple[list[float], int]:
    """Medians in µs and their rounds, the functions in turn, so that a slow moment of the machine falls on all."""
    seen: list[list[float]] = [[] for _ in functions]
    for _ in range(WARM + repeats):
        for function, times in zip(functions, seen, strict=True):
            times.append(_time(function, device))
        if time.monotonic() > stop:
            break
    rounds = max(1, len(seen[0]) - WARM)  # the first calls compile and warm up
    return [statistics.median(times[-rounds:]) for times in seen], rounds


def _time(function: Callable, device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e6
    # 256 MB written before each call: no operand of the last one is still in a cache
    torch.empty(2**26, device=device).zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def heading(problem: Problem) -> str:
    """The device, the versions, the problem, and the names of the columns."""
    on_gpu = problem.device == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else "CPU, in the interpreter: these times mean nothing"
    return "\n".join(
        [
            f"{name}; torch {torch.__version__}, triton {version('triton')}",
            f"{problem.M} tokens, {problem.K} -> {problem.N}, rank {problem.rank}, {problem.dtype}; medians in µs",
            f"{'':22} {'µs':>9} {'GB/s':>7}   {'beside':16} {'µs':>9} {'ratio':>6} {'rounds':>6}",
        ]
    )


def line(row: Row) -> str:
    rate, ratio = row.bytes / row.ours / 1e3, row.ours / row.theirs
    return f"{row.name:22} {row.ours:9.1f} {rate:7.0f}   {row.beside:16} {row.theirs:9.1f} {ratio:6.2f} {row.rounds:6}"


if __name__ == "__main__":
    sys.exit(main())

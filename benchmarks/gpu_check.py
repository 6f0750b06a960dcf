"""`python benchmarks/gpu_check.py`: tests the kernels compiled on this machine's GPU, then times them.

Nothing is timed while a test fails.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

TESTS = Path(__file__).resolve().parent.parent / "tests" / "kernels" / "test_kernels_triton.py"


class Problem(NamedTuple):
    """Tokens, in, out, rank, and the device and dtype of all tensors."""

    M: int
    K: int
    N: int
    rank: int
    device: str
    dtype: torch.dtype


class Row(NamedTuple):
    """One line of the table: what was timed beside what, both in µs, and the memory time of the bytes it must move."""

    name: str
    ours: float
    beside: str
    theirs: float
    bytes: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the tests, then the table; the exit status is 0 if both went through."""
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu_check.py", description=__doc__)
    for name, value in (("tokens", 8192), ("in", 4096), ("out", 4096), ("rank", 16), ("repeats", 30)):
        parser.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"default {value}")
    parser.add_argument("--interpret", action="store_true", help="on the CPU in the interpreter; times mean nothing")
    given = vars(parser.parse_args(arguments))
    refusal = _refusal(given["interpret"])
    if refusal:
        print(refusal, file=sys.stderr)
        return 2
    device = "cpu" if given["interpret"] else "cuda"
    if device == "cuda" and subprocess.run([sys.executable, "-m", "pytest", "-q", str(TESTS)], check=False).returncode:
        print("A kernel is wrong on this device, so nothing is timed.", file=sys.stderr)
        return 1
    problem = Problem(given["tokens"], given["in"], given["out"], given["rank"], device, torch.bfloat16)
    print(table(problem, rows(problem, given["repeats"])))
    return 0


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


def rows(problem: Problem, repeats: int) -> list[Row]:
    """Times each op beside what PyTorch would do in its place."""
    from peftlib.kernels import lora_linear, philox
    from peftlib.kernels.lora import triton as kernels

    M, K, N, rank, device, dtype = problem

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x, dY, h, out = normal(M, K), normal(M, N), normal(M, rank), normal(M, N)
    A, B, W = normal(rank, K), normal(N, rank), normal(N, K)
    seed = philox.new_seed(x.device)

    def row(name: str, ours: Callable, beside: str, theirs: Callable, elements: int) -> Row:
        mine, other = _times((ours, theirs), repeats, device)
        return Row(name, mine, beside, other, elements * dtype.itemsize)

    x_in, A_in, B_in = (tensor.clone().requires_grad_() for tensor in (x, A, B))

    def step(p: float) -> None:  # forward and backward, as a training step
        y = lora_linear(x_in, W, None, A_in, B_in, 0.5, p, training=True)
        torch.autograd.grad(y, (x_in, A_in, B_in), dY)

    def frozen_step() -> None:
        torch.autograd.grad(F.linear(x_in, W), x_in, dY)

    def backward_x_in_pytorch() -> None:
        keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(0.9)
        (h @ A).mul_(keep)
        torch.mm(h.t(), x * keep)

    return [
        row("GEMM, beta 1", lambda: out.addmm_(x, W.t()), "GEMM, beta 0", lambda: torch.mm(x, W.t(), out=out), M * N),
        row("shrink, p = 0", lambda: kernels.shrink(x, A, 0.5, 0.0, None), "x Aᵀ", lambda: x @ A.t(), M * K),
        row(
            "shrink, p = 0.1", lambda: kernels.shrink(x, A, 0.5, 0.1, seed),
            "dropout, x Aᵀ", lambda: F.dropout(x, 0.1) @ A.t(), M * K,
        ),
        row(
            "backward_x, p = 0.1", lambda: kernels.backward_x(x, h, A, 0.1, seed),
            "mask, g A, gᵀ x̂", backward_x_in_pytorch, 2 * M * K,
        ),
        row(
            "backward_y", lambda: kernels.backward_y(dY, B, h, 0.5),
            "two GEMMs", lambda: (dY @ B, dY.t() @ h), M * N,
        ),
        row(
            "expand", lambda: kernels.expand(dY, h, B, 0.5, None),
            "addmm", lambda: torch.addmm(dY, h, B.t(), alpha=0.5), 2 * M * N,
        ),
        row("step, p = 0", lambda: step(0.0), "frozen linear", frozen_step, 2 * M * K + M * N),
        row("step, p = 0.1", lambda: step(0.1), "frozen linear", frozen_step, 2 * M * K + M * N),
    ]  # fmt: skip


def _times(functions: Sequence[Callable], repeats: int, device: str) -> list[float]:
    """Medians in µs, the functions in turn, so that a slow moment of the machine falls on all."""
    seen: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 3):
        for function, times in zip(functions, seen, strict=True):
            elapsed = _time(function, device)
            if repeat >= 3:  # the first calls compile and warm up
                times.append(elapsed)
    return [statistics.median(times) for times in seen]


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


def table(problem: Problem, timed: list[Row]) -> str:
    """The rows as text, under the device's name."""
    on_gpu = problem.device == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else "CPU, in the interpreter: these times mean nothing"
    lines = [
        f"{name}; torch {torch.__version__}, triton {version('triton')}",
        f"{problem.M} tokens, {problem.K} -> {problem.N}, rank {problem.rank}, {problem.dtype}; medians in µs",
        f"{'':20} {'µs':>9} {'GB/s':>7}   {'beside':16} {'µs':>9} {'ratio':>6}",
    ]
    for row in timed:
        rate, ratio = row.bytes / row.ours / 1e3, row.ours / row.theirs
        lines.append(f"{row.name:20} {row.ours:9.1f} {rate:7.0f}   {row.beside:16} {row.theirs:9.1f} {ratio:6.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

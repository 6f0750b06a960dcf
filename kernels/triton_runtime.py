"""Where a kernel runs: compiled on its tensors' GPU, or interpreted on the CPU."""

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from . import mode
from .tiles import MI300X, Tile
from .triton_interpret import interpret


def launches(x: Tensor) -> bool:
    """Whether kernels, rather than their twins in PyTorch, work on `x`: PEFTLIB_KERNELS is 0, 1 or interpret."""
    return x.is_cuda if mode.MODE == "1" else mode.interprets() and x.device.type == "cpu"


def launch(
    kernel: JITFunction, grid: tuple[int, ...], first: Tensor, *rest: object, tile: Tile, **constants: object
) -> None:
    """Launches over `grid`, on the device of the first argument."""
    if first.device.type == "cpu":
        interpret(kernel, grid, first, *rest, **constants)
        return
    with torch.cuda.device(first.device):
        kernel[grid](first, *rest, **constants, num_warps=tile.warps, num_stages=tile.stages)


def capability(x: Tensor) -> tuple[int, int]:
    """Of the device of `x`; where there is none, that of an H100, so that tracing and the interpreter have a table."""
    if torch.version.hip is not None:
        return MI300X
    return torch.cuda.get_device_capability(x.device) if x.is_cuda and torch.cuda.is_available() else (9, 0)

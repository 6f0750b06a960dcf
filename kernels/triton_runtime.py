"""What every kernel shares: its launch, the dropout mask in registers, and the split-K partial sums.

A launch runs compiled on the GPU of its tensors, or in the interpreter on CPU tensors.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from .tiles import Tile, blocks, fit
from .triton_interpret import interpret

OPTIONS = {"enable_fp_fusion": True}  # of every launch; Triton 3.9 warns where it is left to a default


def launch(
    kernel: JITFunction, grid: tuple[int, ...], first: Tensor, *rest: object, tile: Tile, **constants: object
) -> None:
    """Launches over `grid`, on the device of the first argument."""
    if first.device.type == "cpu":
        interpret(kernel, grid, first, *rest, **constants)
        return
    with torch.cuda.device(first.device):
        kernel[grid](first, *rest, **constants, num_warps=tile.warps, num_stages=tile.stages, **OPTIONS)


@torch.compiler.assume_constant_result
def has_tiles(device: torch.device, dtype: torch.dtype) -> bool:
    """`tiles.fit`, a constant for a compiler. (Its decorator is too heavy for `import peftlib`.)"""
    return fit(device, dtype)


@torch.compiler.assume_constant_result
def trusted_in_graph(asked: Callable[..., bool], *what: object) -> bool:
    """What `asked` says while a graph is traced; the kernels that it tries are no part of the graph."""
    return asked(*what)


def rows_of(matrix: Tensor) -> Tensor:
    """With columns side by side, as 16-byte loads need; rows may lie anywhere, all on one place too."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


# Split-K: where one wave of programs does not fill the device, the loop of a sum is dealt out to several programs. Each
# writes a float32 partial sum of its own, and a second launch adds them in the order of their numbers: no atomics, so
# every run gives the same bits. One part alone is the result, in its own dtype.


def partial_sums(count: int, result: Tensor) -> Tensor:
    """Room for `count` float32 parts of `result`; for one part, the result itself, which then needs no adding."""
    return result[None] if count == 1 else result.new_empty(count, *result.shape, dtype=torch.float32)


def added(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of what `partial_sums` made room for, once all programs have written."""
    if parts.shape[0] == 1:
        return parts[0]
    result = torch.empty_like(parts[0], dtype=dtype)
    tile = Tile(1, 1024, 4, 1)
    grid = (blocks(result.numel(), tile.columns),)
    launch(sum_kernel, grid, parts, result, result.numel(), parts.shape[0], BLOCK=tile.columns, tile=tile)
    return result


@triton.jit(do_not_specialize=["count"])
def sum_kernel(parts, out, length, count, BLOCK: tl.constexpr):
    # int64 from the first product on: splits · M · rank elements pass 2³¹ before memory is full
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(count):
        total += tl.load(parts + tl.cast(part, tl.int64) * length + at, mask=inside, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def keep_super_block(seed, rows, super_blocks, block, threshold):
    """Which of the 256 columns of super-block `block` survive in each of `rows`; bool [rows, 256].

    The bits are those of `philox.py`, whatever the tile: the counter is made of row and column alone. The lanes stay in
    the thread that drew them: [rows, 32] words, joined to [rows, 32, 2, 2, 2], are the columns 32·lane + t once the
    three lane axes stand in front of t.
    """
    calls = tl.arange(0, 32)  # four words each, [rows, 32]
    counter = (rows.to(tl.int64) * super_blocks + block)[:, None] * 32 + calls[None, :]
    w0, w1, w2, w3 = tl.randint4x(seed, counter)  # pyright: ignore[reportGeneralTypeIssues]
    first = tl.join(_lanes(w0, threshold), _lanes(w1, threshold))  # [rows, 32, half, word]
    second = tl.join(_lanes(w2, threshold), _lanes(w3, threshold))
    keep = tl.permute(tl.join(first, second), (0, 4, 3, 2, 1))
    return tl.reshape(keep, (rows.shape[0], 256))


@triton.jit
def _lanes(word, threshold):
    low = (word & 0xFFFF).to(tl.int32) >= threshold
    high = (word >> 16).to(tl.int32) >= threshold
    return tl.join(low, high)

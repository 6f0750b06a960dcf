"""Tile shapes by problem and device, each with why; a table in place of `@triton.autotune`, which needs a driver.

Registers and shared memory are those of an ahead-of-time compile at rank 16 in bfloat16, which
`tests/kernels/test_kernels_compile.py` repeats and holds to no spill. No choice here has been timed on a GPU.
"""

from dataclasses import dataclass

import torch

from .philox import SUPER_BLOCK

MAX_RANK = 64

MI300X = (9, 4)  # stands for gfx942, the one AMD device that tiles were chosen for

# Multiprocessors, so that one wave of programs fills the device: A100, H100, B200, MI300X. Others count as an A100.
_PROCESSORS = {(8, 0): 108, (9, 0): 132, (10, 0): 148, MI300X: 304}

# (rows, warps, stages) of `shrink` with dropout, at ranks to 16, 32 and 64. The mask takes registers, the more the
# higher the rank: these are the largest tiles that did not spill. A warp that holds whole super-blocks draws each
# number once (19 to 23 instructions an element); where only 8 warps, or 16 rows on 2, fit, twice (38 to 40).
_DROPOUT_SHRINK = {
    8: ((64, 4, 2), (16, 2, 2), (16, 4, 2)),  # 195, 194, 168 registers
    9: ((64, 4, 2), (64, 4, 2), (64, 8, 2)),  # 190, 201, 193
    10: ((32, 2, 2), (16, 1, 2), (64, 8, 2)),  # 191, 179, 184
    12: ((32, 2, 2), (64, 8, 2), (16, 4, 2)),  # sm_120: 194, 148; at rank 64 the wider tile spills
    MI300X: ((64, 4, 1), (64, 4, 1), (64, 4, 1)),  # 119, 286, 232 of 512
}


def capability(device: torch.device) -> tuple[int, int]:
    """What the tiles of `device` go by. Where there is no GPU, that of an H100, so that tracing for another machine and
    the interpreter have a table."""
    if torch.version.hip is not None:
        return MI300X
    return torch.cuda.get_device_capability(device) if _is_there(device) else (9, 0)


def fit(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tiles were chosen for `device` and `dtype`: NVIDIA from sm_80 on, which has bfloat16 units, and of AMD
    gfx942. Float32 only there: NVIDIA's matrix units would round its products, and without them the kernels that a step
    runs spill up to 30,000 bytes a thread on each of sm_80 to sm_120."""
    if not _is_there(device):
        return True  # it traces for another machine
    if torch.version.hip is not None:  # gcnArchName has features behind the name: gfx942:sramecc+:xnack-
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0] == "gfx942"
    return torch.cuda.get_device_capability(device) >= (8, 0) and dtype != torch.float32


def _is_there(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available()


@dataclass(frozen=True)
class Tile:
    """What one program covers at a time, and over how many programs the loop is dealt."""

    rows: int
    columns: int
    warps: int
    stages: int
    splits: int = 1


def blocks(length: int, size: int) -> int:
    """How many blocks of `size` cover `length`."""
    return -(-length // size)


def block_rank(rank: int, least: int) -> int:
    """The power of two that holds `rank`, and is no less than a matrix instruction takes."""
    return max(least, 1 << (rank - 1).bit_length())


def least_width(capability: tuple[int, int]) -> int:
    """Of a matrix instruction's second operand: with 8, AMD's compiler falls back to plain arithmetic, 496 registers.
    (As the contraction, a rank always needs 16.)"""
    return 16 if capability == MI300X else 8


def shrink(M: int, K: int, rank: int, dropout: bool, capability: tuple[int, int]) -> Tile:
    """x̂ Aᵀ: a program owns rows and walks K, so that its sums stay in registers."""
    columns = SUPER_BLOCK
    if dropout:
        rows, warps, stages = _dropout_shrink(capability)[0 if rank <= 16 else 1 if rank <= 32 else 2]
    elif M <= 16:  # a decoding step: the least matrix tile; at rank 64, 128 columns spill on sm_90 and sm_100
        rows, columns, warps, stages = 16, 64, 4, 3
    elif capability == MI300X:  # a third stage holds 64 KiB and more in float32
        rows, columns, warps, stages = 64, 128, 4, 2
    elif capability < (9, 0):  # 128 columns spill one register at 3 stages and more; 64: 56 registers, 30 KiB
        rows, columns, warps, stages = 64, 64, 4, 4
    else:  # 48 registers, 60 KiB
        rows, columns, warps, stages = 64, 128, 4, 3
    return Tile(rows, columns, warps, stages, _splits(blocks(M, rows), blocks(K, columns), 1, capability))


def _dropout_shrink(capability: tuple[int, int]) -> tuple[tuple[int, int, int], ...]:
    return _DROPOUT_SHRINK[
        MI300X if capability == MI300X else capability[0] if capability[0] in _DROPOUT_SHRINK else 10
    ]


def backward_x(M: int, K: int, rank: int, dropout: bool, capability: tuple[int, int]) -> Tile:
    """dX and dA: a program owns one super-block of columns and walks rows; dA stays in registers.

    32 rows at 4 warps: 225 registers and 40 KiB, two programs a multiprocessor; 64 rows spill on sm_90. A rank of 32
    spills at 4 warps, so there are 8, and each number is drawn twice. There, 2 stages spill a register or two on
    sm_90 without dropout at rank 32, and on sm_100 at rank 64.
    """
    warps = 4 if rank <= 16 else 8
    stages = 1 if rank > 32 and capability >= (10, 0) else 2 if dropout or warps == 4 else 3
    return Tile(32, SUPER_BLOCK, warps, stages, _splits(blocks(K, SUPER_BLOCK), blocks(M, 32), 2, capability))


def backward_x_only(M: int, K: int, rank: int, capability: tuple[int, int]) -> Tile:
    """dX alone; at 2 stages sm_100 spills a register at rank 8."""
    splits = _splits(blocks(K, SUPER_BLOCK), blocks(M, 32), 2, capability)
    return Tile(32, SUPER_BLOCK, 4 if rank <= 16 else 8, 3, splits)


def backward_y(M: int, N: int, rank: int, capability: tuple[int, int]) -> Tile:
    """g and dB: a program owns 256 columns and walks rows; dB stays in registers, g is a partial sum a column block.

    Partial sums cost 8·rank·M·N·(1/256 + splits/M) bytes beside the 2·M·N of dY: 0.3 of it at rank 16, where a second
    read would cost 1. Hence one wave, and as few splits as fill it. 32 rows, 4 warps: 78 registers, 46 KiB.
    """
    stages = 2 if capability == MI300X else 3  # 70 KiB in float32, of 64
    warps = 4 if rank <= 32 or capability == MI300X else 8
    if rank > 16 and capability in ((8, 6), (8, 9)):
        warps, stages = 8, 2  # 134 registers, 38 KiB; at 4 warps 11 bytes spill where no sum is split
    return Tile(32, 256, warps, stages, _splits(blocks(N, 256), blocks(M, 32), 1, capability))


def expand() -> Tile:
    """y + h Bᵀ: one read and one write of y, 16 bytes a thread; 64 × 128 at 4 warps takes 162 registers and 8 KiB."""
    return Tile(64, 128, 4, 1)


def grouped_rows(M: int) -> int:
    """The rows of a block whose rows share an adapter: few where a batch is small, so that few of them are idle; and no
    more than the backward kernels have registers for."""
    return 16 if M <= 256 else 32


def grouped_items(width: int, blocks_of_rows: int, waves: int, capability: tuple[int, int]) -> int:
    """Into how many parts the sums over all rows are dealt."""
    return _splits(blocks(width, 256), blocks_of_rows, waves, capability)


def grouped_shrink(
    blocks_of_rows: int, K: int, rank: int, rows: int, dropout: bool, capability: tuple[int, int]
) -> Tile:
    """As `shrink`, on blocks of `rows` rows, with as many elements a thread."""
    columns, warps, stages = 128, 4, 3
    if dropout:
        above, warps, stages = _dropout_shrink(capability)[0 if rank <= 16 else 1 if rank <= 32 else 2]
        columns, warps = SUPER_BLOCK, max(1, warps * rows // above)
        if rank > 16 and capability in ((9, 0), (10, 0)):  # with half the warps 50 to 114 bytes spill
            warps *= 2
            if capability == ((9, 0) if rank <= 32 else (10, 0)):  # at 2 they spill, at rank 32 with Triton 3.8 alone
                stages = 1
    return Tile(rows, columns, warps, stages, _splits(blocks_of_rows, blocks(K, columns), 1, capability))


def grouped_expand(rows: int) -> Tile:
    """As `expand`; of 16 rows 4 warps spill 12 bytes at rank 32 on sm_90."""
    return Tile(rows, 128, 2 if rows < 32 else 4, 1)


def grouped_backward_y(rank: int, rows: int, capability: tuple[int, int]) -> Tile:
    """As `backward_y`; over how many programs the rows are dealt is the table's."""
    alone = backward_y(rows, 256, rank, capability)
    return Tile(rows, alone.columns, alone.warps, alone.stages)


def grouped_backward_x(rank: int, rows: int, dropout: bool, capability: tuple[int, int]) -> Tile:
    """As `backward_x`."""
    alone = backward_x(rows, SUPER_BLOCK, rank, dropout, capability)
    stages = None
    if rank > 32:  # at 2, 2 and 1: 38, 38, 25 spill
        stages = {(8, 6): 1, (8, 9): 1, (10, 0): 2}.get(capability)
    if dropout and rank == 1 and rows < 32 and capability == (9, 0):  # at 2, 11 bytes spill; at 1, 168 registers
        stages = 1
    return Tile(rows, alone.columns, alone.warps, stages or alone.stages)


def bottleneck(width: int, element_size: int, capability: tuple[int, int]) -> Tile:
    """A program owns rows: what it reads of x it reads once, and z stays in registers between the two products."""
    stages = 2 if capability == MI300X or element_size == 4 else 3
    return Tile(64, 64 if width > 32 or element_size == 4 else 128, 4, stages)


def backward_y_pays(rank: int) -> bool:
    """Whether its partial sums, 8·rank/256 bytes an element and some for the splits, cost less than the 2 they save."""
    return rank <= 32


def tile_of(op: str, M: int, width: int, rank: int, dropout: bool, capability: tuple[int, int], rows: int = 0) -> Tile:
    """The tile of any op, by its name, for M rows of `width`; `rows` of a block where the op is a grouped one."""
    if op == "grouped_shrink":
        return grouped_shrink(blocks(M, rows), width, rank, rows, dropout, capability)
    if op == "grouped_expand_":
        return grouped_expand(rows)
    if op == "grouped_backward_y":
        return grouped_backward_y(rank, rows, capability)
    if op == "grouped_backward_x":
        return grouped_backward_x(rank, rows, dropout, capability)
    if op == "shrink":
        return shrink(M, width, rank, dropout, capability)
    if op == "backward_x":
        return backward_x(M, width, rank, dropout, capability)
    if op == "backward_x_only":
        return backward_x_only(M, width, rank, capability)
    return backward_y(M, width, rank, capability) if op == "backward_y" else expand()


def _splits(programs: int, steps: int, waves: int, capability: tuple[int, int]) -> int:
    wanted = waves * _PROCESSORS.get(capability, 108) // max(programs, 1)
    return max(1, min(steps, wanted))

"""The counter-based dropout mask of the kernels: every bit of it from (seed, row, column), in torch as in Triton.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", 2011). One call gives four
words, so eight lanes of 16 bits. A row is cut into super-blocks of 256 columns, and call t of a super-block gives

    lane j  ->  column 256·block + 32·j + t,      counter = (row·ceil(columns / 256) + block)·32 + t

An element is kept where lane >= round(p·65536), so p is honoured to 1/131072, and what is kept is scaled by
65536 / (65536 - threshold), the inverse of the exact probability. No tile shape enters: any kernel, and this file,
gives the same bits.
"""

from typing import Any

import torch
from torch import Tensor

CALLS = 32
LANES = 8
SUPER_BLOCK = CALLS * LANES

Words = Any  # a torch.Tensor of int64, or a numpy array: the rounds are plain operators, and serve both

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def threshold(p: float) -> int:
    """The lane value under which an element is dropped; 65536, which no lane reaches, drops everything."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout is a probability between 0 and 1, not {p}")
    return round(p * 65536)


def kept_scale(p: float) -> float:
    """What a kept element is multiplied by; 0 where nothing is kept, as in `torch.nn.functional.dropout`."""
    left = 65536 - threshold(p)
    return 65536 / left if left else 0.0


def philox(counter: Words, seed: Words) -> tuple[Words, Words, Words, Words]:
    """Four 32-bit words, in int64, for each 64-bit counter."""
    return philox_rounds((counter & _LOW, (counter >> 32) & _LOW, counter & 0, counter & 0), (seed, seed >> 32))


def philox_rounds(
    state: tuple[Words, Words, Words, Words], key: tuple[Words, Words]
) -> tuple[Words, Words, Words, Words]:
    """Ten rounds; int64 products wrap modulo 2^64, of which the two halves are read by shift and mask."""
    c0, c1, c2, c3 = state
    k0, k1 = key
    for _ in range(10):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((second >> 32) ^ c1 ^ k0) & _LOW
        c2 = ((first >> 32) ^ c3 ^ k1) & _LOW
        c1, c3 = second & _LOW, first & _LOW
        k0, k1 = k0 + _WEYL[0] & _LOW, k1 + _WEYL[1] & _LOW
    return c0, c1, c2, c3


def keep_mask(rows: int, columns: int, p: float, seed: Tensor) -> Tensor:
    """Which elements of a [rows, columns] input are kept; bool, on the device of `seed` (int64, one element)."""
    blocks = -(-columns // SUPER_BLOCK)
    counter = torch.arange(rows * blocks * CALLS, device=seed.device).view(rows, blocks, 1, CALLS)
    lanes = torch.cat([half for word in philox(counter, seed) for half in (word & 0xFFFF, word >> 16)], dim=2)
    return (lanes >= threshold(p)).view(rows, blocks * SUPER_BLOCK)[:, :columns]


def new_seed(device: torch.device) -> Tensor:
    """A seed from the device's default generator, left on the device: nothing waits for it, and a checkpoint or a CUDA
    graph that restores the generator gets the same mask again."""
    return torch.randint(0, 2**63 - 1, (1,), device=device)


def draw_seed(x: Tensor) -> Tensor:
    """The seed of a mask that kernels draw in their registers, on the device of `x`."""
    return new_seed(x.device)


def keep_mask_of(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """The mask of `x` as the plain form multiplies with it: the kernels divide by the share that their 16 bits keep,
    the plain form by 1 - p."""
    kept = keep_mask(x.shape[0], x.shape[1], dropout, seed)
    return kept.to(x.dtype) * (kept_scale(dropout) * (1.0 - dropout))

"""The CPU's dropout mask: regenerated from one key a row and one a column, so that backward keeps no mask.

Four neighbours of row i get the word w = row_key[i] · column_key[j] mod 2³², w += w >> 16, and each byte of it decides
one of them. The keys are odd and come from torch's generator, so three words are independent, and four unless they are
the corners of a rectangle; even there, over all pairs of rows and all pairs of columns of a 512×2048 mask, the overlap
varies as it does for the Mersenne twister's own bytes (ratio of variances within 0.995 and 1.005).

Why not torch's own: 512×512 elements on one core take `bernoulli_` 1222 µs, the twister's bytes 87 (serial, however
many cores) and this 50. Why not keep the mask: at one byte an element four blocks of d=512 and 512 tokens would keep
10.5 MB beside the 25.6 MB of x, at one bit 1.3 MB and two more passes; the keys are 0.1 MB.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

_LANES = 4  # elements that one 32-bit word decides


def drop(x: Tensor, dropout: float, keep: Tensor | None = None) -> Tensor:
    """drop(x): `keep` is a mask already drawn; without one, torch draws it."""
    if keep is None:
        return F.dropout(x, dropout) if dropout else x
    return x * keep.to(x.dtype) * survivors_scale(dropout)


def survivors_scale(dropout: float) -> float:
    """1/(1-p), and 0 where nothing survives."""
    return 1.0 / (1.0 - dropout) if dropout < 1.0 else 0.0


def draw_seed(x: Tensor) -> Tensor:
    """Draws the keys of a mask for `x` [rows, columns] from torch's generator: int32, one a row, one for 4 columns."""
    keys = x.shape[0] + (x.shape[1] + _LANES - 1) // _LANES
    # Without bounds random_() never sets the top bit, which would leave every eighth byte in half of its range.
    words = torch.empty((keys + 1) // 2, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    return words.view(torch.int32).bitwise_or_(1)


def draw_small(x: Tensor, dropout: float) -> Tensor:
    """Draws a mask for a small `x` [rows, columns] in one piece: where calls cost more than bytes, two beat ten."""
    rows, columns = x.shape
    words = torch.empty(rows, (columns + 3) // 4, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    lanes = words.view(torch.int16).ge_(min(round(dropout * 65536), 65535) - 32768)
    return lanes if lanes.shape[1] == columns else lanes[:, :columns]


class KeepMask:
    """Which elements of an input of `shape` [rows, columns] survive a dropout of probability `dropout`, block by block.

    The blocks of up to `block` rows are written over one another: use one before you ask for the next.
    """

    def __init__(self, seed: Tensor, shape: tuple[int, int], dropout: float, block: int) -> None:
        rows, self.columns = shape
        width = (self.columns + _LANES - 1) // _LANES
        self.row_key, self.column_key = seed[:rows].unsqueeze(1), seed[rows : rows + width]
        # A byte ends at 255/256, so look for the rarer of dropping and keeping.
        self.seeks_dropped = dropout <= 0.5
        self.limit = _limit(self.row_key, dropout if self.seeks_dropped else 1.0 - dropout)
        self.words = torch.empty(min(block, rows), width, dtype=torch.int32, device=seed.device)
        self.shifted = torch.empty_like(self.words)

    def rows(self, rows: slice) -> Tensor:
        """Gives the mask of `rows`: int8 of zeros and ones, [rows, columns]."""
        row_key, limit = self.row_key[rows], self.limit[rows]
        words, shifted = self.words[: row_key.shape[0]], self.shifted[: row_key.shape[0]]
        torch.mul(row_key, self.column_key, out=words)
        words += torch.bitwise_right_shift(words, 16, out=shifted)
        lanes = words.view(torch.int8)
        # In place the comparison keeps one dtype: int8 into bool is not vectorised, 102 µs for 512×512 against 11.
        return (lanes.ge_(limit) if self.seeks_dropped else lanes.lt_(limit))[:, : self.columns]


def _limit(row_key: Tensor, probability: float) -> Tensor:
    # A byte resolves 1/256. Each row rounds 256·probability up or down by 16 bits of its own key, so that the rate is
    # right to 2⁻¹⁶ on average; through it two elements of a row are correlated by at most 2⁻¹⁸/(p(1-p)).
    offset = (1 << 15) + round(probability * (1 << 24)) - (1 << 23)
    return ((row_key >> 16) + offset >> 16).to(torch.int8)

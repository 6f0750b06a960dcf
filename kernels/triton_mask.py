"""The dropout mask of `philox.py` on the device: 256 columns from 32 Philox calls a row."""

import triton
import triton.language as tl


@triton.jit
def keep_super_block(seed, rows, super_blocks, block, threshold):
    """Which of the 256 columns of super-block `block` survive in each of `rows`; bool [rows, 256].

    The lanes stay in the thread that drew them: [rows, 32] words, joined to [rows, 32, 2, 2, 2], are the columns
    32·lane + t once the three lane axes stand in front of t.
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

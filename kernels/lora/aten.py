"""The steps of LoRA in ATen: its skinny GEMMs in the orientation that is fast, in blocks of rows that stay in cache.

M tokens, K in, N out. A rank-r GEMM can take ten times as long the other way round, hence the transposes. Where a half
precision is only emulated, blocks go to float32 and back, never a whole [M, K].
"""

import platform
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from ..dropout import KeepMask, survivors_scale
from ..dropout import draw_seed as draw_seed


def shrink(x: Tensor, lora_A: Tensor, scale: float, dropout: float, seed: Tensor | None) -> Tensor:
    """hs = scale·drop(x) Aᵀ, [M, rank]."""
    dtype = gemm_dtype(x)
    skinny = (lora_A * (scale * survivors_scale(dropout))).to(dtype)
    if seed is None and dtype == x.dtype:
        return project(x, skinny)
    block = _block_rows(x, skinny.shape[0])
    mask = None if seed is None else KeepMask(seed, _shape(x), dropout, block)
    scratch = torch.empty(min(block, x.shape[0]), x.shape[1], dtype=dtype, device=x.device)
    h = torch.empty(skinny.shape[0], x.shape[0], dtype=dtype, device=x.device).t()
    for rows in _row_blocks(x.shape[0], block):
        part = scratch[: h[rows].shape[0]]
        h[rows] = project(part.copy_(x[rows]) if mask is None else part.copy_(mask.rows(rows)).mul_(x[rows]), skinny)
    return h.to(x.dtype)


def expand(y: Tensor, h: Tensor, lora_B: Tensor) -> Tensor:
    """y + h Bᵀ, [M, out]."""
    return torch.addmm(y, h, lora_B.to(y.dtype).t()) if gemm_dtype(y) == y.dtype else expand_(y.clone(), h, lora_B)


def expand_(y: Tensor, h: Tensor, lora_B: Tensor) -> Tensor:
    """y += h Bᵀ in place, [M, out]."""
    dtype = gemm_dtype(y)
    skinny = lora_B.to(dtype).t()
    if dtype == y.dtype:
        return y.addmm_(h, skinny)
    for rows in _row_blocks(y.shape[0], _block_rows(y, h.shape[1])):
        y[rows] = torch.addmm(y[rows].to(dtype), h[rows].to(dtype), skinny)
    return y


def backward_y(
    dY: Tensor, lora_B: Tensor, h: Tensor | None, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """g = scale·dY B, [M, rank], as `gemm_dtype`, and dB = dYᵀ h, [out, rank], in `dtype`, left out without h."""
    dtype = gemm_dtype(dY)
    # B stands [out, rank]; one small transpose lets the GEMM run at 35 µs in place of 61 (512×512, rank 8).
    skinny = (lora_B.t() * scale).to(dtype).contiguous()
    block = _block_rows(dY, skinny.shape[0])
    if dtype == dY.dtype and dY.shape[0] <= block:
        return project(dY, skinny), None if h is None else _outer(h, dY).t().to(dtype)
    # One read of dY for both: 512×2048 that no cache holds take 553 µs in blocks of 1 MB, 590 of half of it, 820 whole.
    g = torch.empty(skinny.shape[0], dY.shape[0], dtype=dtype, device=dY.device).t()
    dB = None if h is None else torch.zeros(skinny.shape, dtype=_sum_dtype(dtype), device=dY.device)
    for rows in _row_blocks(dY.shape[0], block):
        part = dY[rows].to(dtype)
        g[rows] = project(part, skinny)
        if h is not None and dB is not None:
            _add_outer(dB, h[rows].to(dtype), part)
    return g, None if dB is None else dB.t().to(dtype)


def backward_x(
    x: Tensor | None, g: Tensor, lora_A: Tensor, dropout: float, seed: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """dX = drop'(g A), [M, in], in g's dtype, and dA = gᵀ drop(x), [rank, in], in `dtype`, left out without x."""
    skinny, g = lora_A.to(g.dtype), g * survivors_scale(dropout)
    shape = g.shape[0], lora_A.shape[1]
    dX = torch.empty(shape, dtype=g.dtype, device=g.device)
    dA = None if x is None else torch.zeros(skinny.shape, dtype=_sum_dtype(g.dtype), device=g.device)
    block = _block_rows(dX, skinny.shape[0])
    mask, scratch = KeepMask(seed, shape, dropout, block), torch.empty_like(dX[:block])
    for rows in _row_blocks(shape[0], block):
        part = dX[rows]
        keep = scratch[: part.shape[0]].copy_(mask.rows(rows))
        torch.mm(g[rows], skinny, out=part).mul_(keep)
        if x is not None and dA is not None:
            _add_outer(dA, g[rows], keep.mul_(x[rows]))
    return dX, None if dA is None else dA.to(dtype)


def backward_A(x: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """dA = gᵀ x, [rank, in], in `dtype`, without dropout."""
    if x.dtype == g.dtype:
        return _outer(g, x).to(dtype)
    dA = torch.zeros(g.shape[1], x.shape[1], dtype=g.dtype, device=g.device)
    for rows in _row_blocks(x.shape[0], _block_rows(x, g.shape[1])):
        _add_outer(dA, g[rows], x[rows].to(g.dtype))
    return dA.to(dtype)


def keep_mask(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    """The mask of `x` in one piece, ones and zeros in the dtype of x."""
    return KeepMask(seed, _shape(x), dropout, x.shape[0]).rows(slice(0, x.shape[0])).to(x.dtype)


def gemm_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a GEMM on `x` runs: float32 where this CPU would only emulate a half precision."""
    if x.element_size() >= 4 or x.device.type != "cpu" or _has_native(x.dtype):
        return x.dtype
    return torch.float32


@cache
def _has_native(dtype: torch.dtype) -> bool:
    # Where it is missing, a bf16 GEMM takes 8 (x Wᵀ) to 87 (dY W) times as long as going to float32 and back.
    probe = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    try:
        runs = bool(getattr(torch.ops.mkldnn, probe)())
    except (AttributeError, RuntimeError):
        return False
    if dtype == torch.bfloat16 and platform.machine() in ("x86_64", "AMD64"):
        # oneDNN says yes on plain AVX-512 too, and emulates: 11.6 ms a step there, 0.44 native (256 tokens, 512×512).
        return runs and torch.cpu._is_avx512_bf16_supported()
    return runs


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    # Sums over blocks would round once a block in a half precision.
    return torch.promote_types(dtype, torch.float32)


def project(x: Tensor, skinny: Tensor) -> Tensor:
    """x skinnyᵀ, [M, rank], of x [M, K] and a factor [rank, K]."""
    # MKL runs 512×512 by rank 8 in 35 µs this way round and in 61 the other; above rank 8 and in half precision the
    # plain way is the faster (rank 16: 54 against 79; bf16: 25, 45). More than 2 MB of x at once can lose the gain.
    if skinny.shape[0] > 8 or x.element_size() < 4 or not x.is_cpu:
        return torch.mm(x, skinny.t())
    if x.numel() <= 1 << 19:
        return torch.mm(skinny, x.t()).t()
    h = torch.empty(skinny.shape[0], x.shape[0], dtype=x.dtype)
    for rows in _row_blocks(x.shape[0], max(1, (1 << 19) // x.shape[1])):
        torch.mm(skinny, x[rows].t(), out=h[:, rows])
    return h.t()


def _outer(h: Tensor, x: Tensor) -> Tensor:  # [M, rank], [M, K] -> [rank, K]
    # As hᵀ x 25 µs, as (xᵀ h)ᵀ 67 (512×512, rank 8).
    return torch.mm(h.t(), x)


def _add_outer(total: Tensor, h: Tensor, x: Tensor) -> None:  # [rank, K], which may be wider, [M, rank], [M, K]
    if total.dtype == x.dtype:
        total.addmm_(h.t(), x)
    else:
        total += _outer(h, x)


def _shape(x: Tensor) -> tuple[int, int]:
    return x.shape[0], x.shape[1]


def _block_rows(x: Tensor, rank: int) -> int:
    # A skinny GEMM packs its factor anew for each block, so the larger the rank the larger the block that pays: 2¹⁵
    # elements a rank. In µs, of 512×2048 that no cache holds: `shrink` with dropout at rank 64 takes 5710 in blocks of
    # 2¹⁶, 4400 of 2¹⁸, 3920 of 2²¹; its backward at rank 8 takes 6470, 4980, 7010. A GPU pays by the launch.
    return max(1, (min(max(rank, 8), 64) << 15) // x.shape[1]) if x.device.type == "cpu" else x.shape[0]


def _row_blocks(rows: int, block: int) -> Iterator[slice]:
    return (slice(start, start + block) for start in range(0, rows, block))

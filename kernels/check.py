"""The first use of a kernel on a GPU is compared with PyTorch; where they differ, PyTorch is used and the user is told.

Compilers are part of the result: wrong code for Hopper has been seen by others, on machines their authors had not.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .grouped import block_table
from .lora import reference as twins
from .lora import triton as launchers

_trusted: dict[tuple, bool] = {}


def is_trusted(op: str, like: Tensor, factor: Tensor, dropout: bool) -> bool:
    """Whether `op` gave its twin's result on this device for this dtype, rank and mask; tried once, then remembered."""
    rank = factor.shape[-1] if op in ("backward_y", "expand", "grouped_expand") else factor.shape[-2]
    rows = 9 if like.shape[0] <= 16 else 80  # as `tiles` takes few rows for itself; 80 are more than one block
    key = (op, like.device, like.dtype, factor.dtype, rank, rows, dropout)
    if key not in _trusted:
        if like.is_cuda and torch.cuda.is_current_stream_capturing():
            return True  # a graph can hold no comparison; the warm-up before its capture made one
        _trusted[key] = _agrees(op, like, factor, rank, rows, dropout)
    return _trusted[key]


def _agrees(op: str, like: Tensor, factor: Tensor, rank: int, rows: int, dropout: bool) -> bool:
    arguments = _sample(op, like, factor, rank, rows, 0.25 if dropout else 0.0)
    try:
        got, expected = _call(launchers, op, arguments), _call(twins, op, arguments)
    except Exception as error:  # whatever a compiler, a driver or a device raises, training goes on without it
        found = f"failed: {error}"
    else:
        error = max(_error(a, b) for a, b in zip(got, expected, strict=True))
        if error <= _allowed(like.dtype):
            return True
        found = f"differs from PyTorch by {error:.1e} of the largest value"
    warnings.warn(
        f"the Triton kernel {op} for {like.dtype} at rank {rank} on {like.device} {found}; PyTorch is used in its "
        "place. PEFTLIB_KERNELS=0 silences this; please report it with your GPU and Triton version.",
        stacklevel=2,
    )
    return False


def _call(module: object, op: str, arguments: tuple) -> tuple[Tensor, ...]:
    function: Callable[..., Tensor | tuple[Tensor, ...]] = getattr(module, op)
    result = function(*arguments)
    return result if isinstance(result, tuple) else (result,)


def _sample(op: str, like: Tensor, factor: Tensor, rank: int, rows: int, p: float) -> tuple:
    # 336 columns: more than one block, the last one partly filled, every row at 16 bytes as in a model
    generator = torch.Generator(like.device).manual_seed(0)  # the user's own stream of numbers is not touched

    def normal(*shape: int, dtype: torch.dtype = like.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=like.device, dtype=torch.float32).to(dtype)

    wide, thin = normal(rows, 336), normal(rows, rank)
    A, B = normal(rank, 336, dtype=factor.dtype), normal(336, rank, dtype=factor.dtype)
    seed = torch.tensor([20240607], device=like.device) if p else None
    halves = torch.arange(rows, device=like.device) * 2 // rows
    grouped = block_table(halves, 16), 16
    return {
        "shrink": (wide, A, 0.5, p, seed),
        "backward_x": (wide, thin, A, p, seed),
        "backward_y": (wide, B, thin, 0.5),
        "expand": (wide, thin, B, 0.5, None),
        "grouped_shrink": (wide, torch.stack([A, -A]), torch.ones(2, device=like.device), *grouped),
        "grouped_expand": (wide, thin, torch.stack([B, -B]), *grouped),
    }[op]


def _error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).nan_to_num(nan=torch.inf).item()


def _allowed(dtype: torch.dtype) -> float:
    """Two units in the last place of the largest value: both sides round once from float32 sums of at most 336 terms,
    whose own error, 336 · 6e-8, counts for float32 only."""
    return max(2 * torch.finfo(dtype).eps, 336 * torch.finfo(torch.float32).eps)

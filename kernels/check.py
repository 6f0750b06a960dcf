"""The self-check: a kernel's first use is compared with float64; where it is wrong, ATen runs and the user is told.

Compilers are part of the result: wrong code for Hopper has been seen by others, on machines their authors had not.

Each element is held against the error that its own sum may have. The exact value is the kernel's reference in float64,
from the very inputs, so no TF32 has a part in it. A sum of n products in float32 is off by at most n units of 2⁻²³ of
the sum of the sizes of its terms (the reference of the inputs' absolute values); the result is rounded once to its
dtype, by half a unit of itself. Anything beyond that is not rounding.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .bottleneck.reference import ACTIVATIONS
from .grouped import reference as grouped
from .grouped.blocks import blocks_of
from .lora import reference
from .tiles import Tile

Expected = tuple[Tensor, Tensor]  # the exact value in float64, and what the sums before the last rounding may be off by

ROWS = 80  # more than one block of rows, the last one partly filled


def agrees(
    op: str,
    launch: Callable[..., Tensor | tuple[Tensor, ...]],
    device: torch.device,
    dtype: torch.dtype,
    factor_dtype: torch.dtype,
    rank: int,
    aligned: bool,
    dropout: bool,
    tile: Tile,
) -> bool:
    """Whether `launch`, which computes `op` with `tile`, is right; warns if it is not, or if it fails."""
    width = 336 if aligned else 333  # more than one block, the last one partly filled
    normal, p = normal_like(device, dtype), 0.25 if dropout else 0.0
    if op.startswith("grouped"):
        arguments = _grouped_sample(op, normal, factor_dtype, rank, width, p, tile.rows)
    else:
        arguments = _sample(op, normal, factor_dtype, rank, width, p)
    expected = partial(_expected, op, arguments, dtype, rank, width)
    written = arguments[0].clone() if op.endswith("_") else arguments[0]
    run = partial(launch, written, *arguments[1:], tile=tile)
    return holds(f"{op} for {dtype} at rank {rank} on {device}", run, expected)


def bottleneck_agrees(
    launch: Callable[..., tuple[Tensor, Tensor]], device: torch.device, dtype: torch.dtype, width: int, activation: str
) -> bool:
    """The same of the bottleneck's kernel, whose activation stands between two sums."""
    normal = normal_like(device, dtype)
    x = normal(ROWS, 336)
    own = normal(width, 336) / 16, normal(width), normal(336, width), normal(336)
    kept: list[Tensor] = []

    def run() -> tuple[Tensor, ...]:
        out, z = launch(x, *own, x, activation)
        kept.append(z)
        return out, z

    label = f"bottleneck for {dtype} at width {width} on {device}"
    return holds(label, run, lambda: _expected_bottleneck(x, own, kept[0], activation))


def holds(label: str, run: Callable[[], Tensor | tuple[Tensor, ...]], expected: Callable[[], list[Expected]]) -> bool:
    """Whether what `run` gives is what is expected, element by element; the user is told if not."""
    try:
        result = run()
        got = result if isinstance(result, tuple) else (result,)
        excess = max(_excess(one, *other) for one, other in zip(got, expected(), strict=True))
    except Exception as error:  # whatever a compiler, a driver or a device raises, training goes on without it
        found = f"failed: {error}"
    else:
        if excess <= 1.0:
            return True
        found = f"differs from PyTorch: an element is off by {excess:.1e} times what rounding explains"
    warnings.warn(
        f"the Triton kernel {label} {found}; PyTorch is used in its place. PEFTLIB_KERNELS=0 silences this; please "
        "report it with your GPU and Triton version.",
        stacklevel=2,
    )
    return False


def normal_like(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)  # the user's own stream of numbers is not touched

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    return normal


def _sample(
    op: str, normal: Callable[..., Tensor], factor_dtype: torch.dtype, rank: int, width: int, p: float
) -> tuple:
    wide, hidden = normal(ROWS, width), normal(ROWS, rank)
    A, B = normal(rank, width, dtype=factor_dtype), normal(width, rank, dtype=factor_dtype)
    seed = torch.tensor([20240607], device=wide.device) if p else None
    return {
        "shrink": (wide, A, 0.5, p, seed),
        "backward_x": (wide, hidden, A, p, seed),
        "backward_x_only": (hidden, A, p, seed),
        "backward_y": (wide, B, hidden, 0.5),
        "expand": (wide, hidden, B),
    }[op]


def _grouped_sample(
    op: str, normal: Callable[..., Tensor], factor_dtype: torch.dtype, rank: int, width: int, p: float, rows: int
) -> tuple:
    """Two adapters, the first in two runs and of several items, and rows of none between."""
    wide, hidden = normal(ROWS, width), normal(ROWS, rank)
    A, B = normal(2, rank, width, dtype=factor_dtype), normal(2, width, rank, dtype=factor_dtype)
    device = wide.device
    blocks = blocks_of([(0, ROWS // 2), (-1, 3), (1, ROWS // 4), (0, ROWS // 4 - 3)], 2, rows, 4, device)
    scales = torch.tensor([0.5, -2.0], device=device)
    masks = grouped.Masks.of((p, p / 2), torch.tensor([20240607, 1], device=device)) if p else None
    return {
        "grouped_shrink": (wide, A, scales, blocks, masks),
        "grouped_expand_": (wide, hidden, B, blocks),
        "grouped_backward_y": (wide, B, hidden, scales, blocks),
        "grouped_backward_x": (wide, hidden, A, blocks, masks),
    }[op]


def _expected(op: str, arguments: tuple, dtype: torch.dtype, rank: int, width: int) -> list[Expected]:
    exact = _referred(op, *(_wide(argument, dtype) for argument in arguments))
    sizes = _referred(op, *(_size(_wide(argument, dtype)) for argument in arguments))
    along = {"shrink": [width], "backward_x": [rank, ROWS], "backward_y": [width, ROWS]}
    terms = along.get(op.removeprefix("grouped_"), [rank])
    return [(e, (n + 2) * _UNIT * size) for e, size, n in zip(exact, sizes, terms, strict=True)]


_UNIT = torch.finfo(torch.float32).eps


def _referred(op: str, *arguments: object) -> tuple[Tensor, ...]:
    function = getattr(grouped if op.startswith("grouped") else reference, op)
    result = function(*arguments, 1.0, None) if op == "expand" else function(*arguments)
    return result if isinstance(result, tuple) else (result,)


def _wide(argument: object, dtype: torch.dtype) -> object:
    """Rounded as a kernel rounds a factor, and then exact."""
    if isinstance(argument, Tensor) and argument.is_floating_point():
        return argument.to(dtype).double()
    return argument


def _size(argument: object) -> object:
    return argument.abs() if isinstance(argument, Tensor) and argument.is_floating_point() else argument


def _expected_bottleneck(x: Tensor, own: tuple[Tensor, ...], z: Tensor, activation: str) -> list[Expected]:
    """Of z, and of the result for the z that was stored: its activation is off by 8 float32 units (of 1 for tanh, which
    is a difference from 1) and rounded once to the dtype, and |up| carries that on."""
    down, down_bias, up, up_bias, x = (tensor.double() for tensor in (*own, x))
    width, tiny = up.shape[1], torch.finfo(z.dtype).tiny
    exact_z, size_z = x @ down.t() + down_bias, x.abs() @ down.abs().t() + down_bias.abs()
    z = z.double()
    h = ACTIVATIONS[activation](z)
    own_size = torch.ones_like(h) if activation == "tanh" else z.abs()
    h_off = torch.finfo(own[0].dtype).eps / 2 * h.abs() + 8 * _UNIT * (h.abs() + own_size) + tiny
    exact, size = h @ up.t() + up_bias + x, h.abs() @ up.abs().t() + up_bias.abs() + x.abs()
    return [
        (exact, h_off @ up.abs().t() + (width + 3) * _UNIT * size),
        (exact_z, (x.shape[1] + 2) * _UNIT * size_z),
    ]


def _excess(got: Tensor, exact: Tensor, off: Tensor) -> float:
    """By how many times what is allowed the worst element is off; NaN counts as infinity."""
    precision = torch.finfo(got.dtype)
    allowed = precision.eps / 2 * exact.abs() + off + precision.tiny  # float16 underflows gradually
    return ((got.double() - exact).abs() / allowed).max().nan_to_num(nan=math.inf).item()

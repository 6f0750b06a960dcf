"""The dispatcher: which path runs, by device, dtype, size, gradients and what the first-use check said of a kernel.

`README.md` has the table. The functions of each operation ask here and nowhere else, and enter their autograd function
through `apply`.
"""

import dataclasses
import os
from _thread import _count as threads_beside_the_first  # threading.active_count takes a lock
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_any_autocast_enabled, _is_tracing
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import Function, forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

from . import check, tiles
from .lora import aten
from .lora.aten import gemm_dtype

# 0 no kernel, 1 kernels on a GPU, interpret all on the CPU. Looked up in os.environ at each call it would cost a small
# step 5 of its 95 µs.
MODE = os.environ.get("PEFTLIB_KERNELS", "1")
# There are platforms without a Triton wheel; looking for one here, not at the first step, imports nothing.
_HAS_TRITON = find_spec("triton") is not None

_unsafe_view = torch.ops.aten._unsafe_view.default
_DENSE = frozenset((Tensor, Parameter))
_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Up to so many elements of x and y a step is bound by dispatch overhead, not by memory: with dropout one of 256 tokens,
# 256 to 256, takes 1046 µs with its mask drawn in one piece and kept, 1359 with a mask made again from its seed.
_SMALL_WITH_DROPOUT = 1 << 18
_SMALL = 1 << 16


def interprets() -> bool:
    """Whether the kernels are to run in the interpreter, whatever else would be the faster on a CPU."""
    return MODE == "interpret"


def launches(x: Tensor) -> bool:
    """Whether kernels run on the device of `x` at all."""
    return _HAS_TRITON and (x.is_cuda if MODE == "1" else interprets() and x.device.type == "cpu")


def as_own_tensor(result: Tensor, shape: Sequence[int]) -> Tensor:
    """The same memory under another shape, and no view: torch refuses an in-place operation on a view that an autograd
    function returned, and what follows a layer may well be one (`nn.ReLU(inplace=True)`)."""
    return _unsafe_view(result, shape)


# ---------------------------------------------------------------- plain ops, autograd function, or neither


def is_transformed() -> bool:
    """Whether each operation is recorded or given another meaning: torch.compile, torch.func, forward-mode AD and
    torch.jit.trace, which would keep the sizes that Python computed."""
    return is_compiling() or _are_functorch_transforms_active() or _has_tangents() or _is_tracing()


def _has_tangents() -> bool:
    return forward_ad._current_level >= 0


def is_traced(x: Tensor, other: Tensor) -> bool:
    """Whether only plain ops serve: where they are transformed, and for tensor subclasses."""
    return is_transformed() or type(x) not in _DENSE or type(other) not in _DENSE


def is_compiled_on_cpu(x: Tensor) -> bool:
    """Whether `x` will be multiplied by the CPU's GEMMs, whose orientation torch.compile keeps as it was traced."""
    return is_compiling() and x.is_cpu


def is_differentiated(dY: Tensor) -> bool:
    """Whether a backward pass must be plain ops: under create_graph it is differentiated in its turn, under
    is_grads_batched it is mapped, at a level of forward-mode AD it has tangents."""
    if torch.is_grad_enabled() or is_legacy_batchedtensor(dY):
        return True
    return _are_functorch_transforms_active() or _has_tangents()


def is_dense(x: Tensor, weight: Tensor, dropout: float) -> bool:
    """Whether `lora_linear` runs in the fewest calls (`lora/small.py`): on a CPU, without dropout at any size.

    On the meta device too, where a forward is run to learn what it keeps."""
    if (
        x.dim() < 2
        or not (x.is_cpu or x.is_meta)
        or x.dtype != weight.dtype
        or not x.is_contiguous()
        or _is_any_autocast_enabled()
    ):
        return False
    if x.element_size() >= 4 and not dropout:
        return not interprets()
    return is_small(x, weight.shape[0], dropout)


def is_small(x: Tensor, out: int, dropout: float) -> bool:
    """Whether overhead, not memory, decides; and a mask drawn in one piece and kept is the faster."""
    if x.dim() < 2 or x.is_cuda or not x.is_contiguous() or gemm_dtype(x) != x.dtype or interprets():
        return False
    elements = x.numel() // x.shape[-1] * (x.shape[-1] + out)
    return elements <= (_SMALL_WITH_DROPOUT if dropout else _SMALL)


def apply(function: type[Function], *arguments: Any) -> Any:
    """`function.apply`, without the deadlock that torch 2.13 has where another thread reads the same parameter.

    To make the node that adds up a parameter's gradient torch locks the parameter, and then waits for the GIL. Its own
    operations have let go of the GIL before; a function written in Python holds it while it waits for the lock. Where
    the node lives already nobody waits for the GIL, and a view of the parameter keeps it alive: 1 µs each. For where
    gradients flow; elsewhere nothing needs a function.
    """
    if not threads_beside_the_first():
        return function.apply(*arguments)
    views = [each.view_as(each) for each in arguments if isinstance(each, Tensor) and _is_trained_leaf(each)]
    result = function.apply(*arguments)
    del views
    return result


def _is_trained_leaf(tensor: Tensor) -> bool:
    return tensor.requires_grad and tensor.is_leaf


def has_autocast(x: Tensor) -> bool:
    """Whether autocast is on where `x` lives; on the meta device there is none, and torch raises when it is asked."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Inside, every cast is written out: autocast would cast operands again, and keep the casts."""
    return torch.autocast(x.device.type, enabled=False) if has_autocast(x) else nullcontext()


# ---------------------------------------------------------------- the steps of LoRA: ATen, or a kernel


class Steps(Protocol):
    """The steps of a LoRA layer; `lora/aten.py`, which is one such, says what each gives."""

    def draw_seed(self, x: Tensor) -> Tensor: ...
    def keep_mask(self, x: Tensor, dropout: float, seed: Tensor) -> Tensor: ...
    def shrink(self, x: Tensor, lora_A: Tensor, scale: float, dropout: float, seed: Tensor | None) -> Tensor: ...
    def expand(self, y: Tensor, h: Tensor, lora_B: Tensor) -> Tensor: ...
    def expand_(self, y: Tensor, h: Tensor, lora_B: Tensor) -> Tensor: ...
    def backward_y(
        self, dY: Tensor, lora_B: Tensor, h: Tensor | None, scale: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]: ...
    def backward_x(
        self, x: Tensor | None, g: Tensor, lora_A: Tensor, dropout: float, seed: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]: ...
    def backward_A(self, x: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor: ...


def lora_steps(x: Tensor, lora_A: Tensor, lora_B: Tensor, dropout: float) -> tuple[Steps, Tensor, Tensor]:
    """Picks the steps for x [tokens, in]: with kernels on a GPU that has them, or under PEFTLIB_KERNELS=interpret.

    With the factors as those steps take them in forward and backward: cast once here for a GPU, where each cast is a
    launch; on a CPU each step casts for itself, in the same pass that scales.
    """
    if not takes_kernels(x, lora_A, lora_B):
        return aten, lora_A, lora_B
    steps = KernelSteps(x, lora_A, dropout)
    # Without dropout ATen scales A before it rounds it: one rounding, where a cast first would make it two.
    return steps, lora_A.to(x.dtype) if steps.draws else lora_A, lora_B.to(x.dtype)


def takes_kernels(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether the kernels take these: half, bfloat16 or float32; factors in x's dtype or float32; rank up to 64; on a
    device that has tiles for the dtype."""
    if not launches(x) or x.numel() == 0 or x.dtype not in _KERNEL_DTYPES:
        return False
    if not {lora_A.dtype, lora_B.dtype} <= {x.dtype, torch.float32} or not lora_A.shape[0] <= tiles.MAX_RANK:
        return False
    from .triton_runtime import has_tiles

    return has_tiles(x.device, x.dtype)


class KernelSteps:
    """The steps on a GPU: a kernel where it moves fewer bytes than ATen and its first use was right, else ATen.

    With dropout `shrink` and `backward_x` must draw one mask, so either both are kernels or neither is; that is decided
    here, before a seed is drawn. The others are decided when they are called.
    """

    def __init__(self, x: Tensor, lora_A: Tensor, dropout: float) -> None:
        from .lora import triton as kernels

        self.kernels, (rank, width) = kernels, lora_A.shape
        self.draws = dropout > 0 and all(
            is_trusted(op, x.device, x.dtype, lora_A.dtype, x.shape[0], width, rank, dropout=True)
            for op in ("shrink", "backward_x")
        )

    def draw_seed(self, x: Tensor) -> Tensor:
        return (self.kernels if self.draws else aten).draw_seed(x)

    def keep_mask(self, x: Tensor, dropout: float, seed: Tensor) -> Tensor:
        return self.kernels.keep_mask_of(x, dropout, seed) if self.draws else aten.keep_mask(x, dropout, seed)

    def shrink(self, x: Tensor, lora_A: Tensor, scale: float, dropout: float, seed: Tensor | None) -> Tensor:
        # Without dropout both read x once. With it ATen writes a mask and a dropped x and reads them: 2.5 times x more.
        return (self.kernels if self.draws else aten).shrink(x, lora_A, scale, dropout, seed)

    def expand(self, y: Tensor, h: Tensor, lora_B: Tensor) -> Tensor:
        # `addmm` copies y before it accumulates, 4 passes over it; the kernel needs 2.
        (width, rank), dtype = lora_B.shape, lora_B.dtype
        trusted = is_trusted("expand", y.device, y.dtype, dtype, y.shape[0], width, rank)
        return (self.kernels if trusted else aten).expand(y, h, lora_B)

    def expand_(self, y: Tensor, h: Tensor, lora_B: Tensor) -> Tensor:
        return aten.expand_(y, h, lora_B)  # cuBLAS accumulates in place: it reads and writes y once, as a kernel would

    def backward_y(
        self, dY: Tensor, lora_B: Tensor, h: Tensor | None, scale: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        width, rank = lora_B.shape
        if h is None or not tiles.backward_y_pays(rank):
            return aten.backward_y(dY, lora_B, h, scale, dtype)
        trusted = is_trusted("backward_y", dY.device, dY.dtype, dtype, dY.shape[0], width, rank)
        return (self.kernels if trusted else aten).backward_y(dY, lora_B, h, scale, dtype)

    def backward_x(
        self, x: Tensor | None, g: Tensor, lora_A: Tensor, dropout: float, seed: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        if not self.draws:
            return aten.backward_x(x, g, lora_A, dropout, seed, dtype)
        if x is None:
            return self.kernels.backward_x_only(g, lora_A, dropout, seed), None
        return self.kernels.backward_x(x, g, lora_A, dropout, seed, dtype)

    def backward_A(self, x: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
        return aten.backward_A(x, g, dtype)


def grouped_kernels(x: Tensor, factors: Sequence[Tensor], dropping: bool) -> Any | None:
    """The kernels for rows of many pairs, or None where they do not take these or one of them was found wrong. That
    each binary is right is asked for sums that are split and not split: how many blocks there will be depends on how
    the rows lie."""
    if not all(takes_kernels(x, *pair) for pair in zip(factors[::2], factors[1::2], strict=True)):
        return None
    from .grouped import triton as kernels

    (out, _), K = factors[1].shape, x.shape[-1]
    tokens, rank = x.numel() // K, max(factor.shape[0] for factor in factors[::2])
    rows = tiles.grouped_rows(tokens)
    widths = {"grouped_backward_y": out, "grouped_expand_": out, "grouped_backward_x": K, "grouped_shrink": K}
    trusted = all(
        is_trusted(op, x.device, x.dtype, x.dtype, M, width, rank, dropping, rows)
        for op, width in widths.items()
        for M in (1, 1 << 20)
    )
    return kernels if trusted else None


def draws_in_graph(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether torch.compile gets the operator that draws the mask in a kernel, in place of plain ops."""
    if not is_compiling() or not takes_kernels(x, lora_A, lora_B):
        return False
    from .triton_runtime import trusted_in_graph

    return trusted_in_graph(_draws_at_any_size, x.device, x.dtype, lora_A.dtype, *lora_A.shape)


def _draws_at_any_size(
    device: torch.device, dtype: torch.dtype, factor_dtype: torch.dtype, rank: int, width: int
) -> bool:
    """Asked while a graph is traced, when the number of tokens is not known."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return True  # it traces for another machine
    return all(
        is_trusted(op, device, dtype, factor_dtype, M, width, rank, dropout=True)
        for op in ("shrink", "backward_x")
        for M in (1 << 13, 16)  # a batch that fills a device, and few tokens
    )


# ---------------------------------------------------------------- the bottleneck


def bottleneck_kernel(x: Tensor, down: Tensor, up: Tensor, activation: str) -> Callable[..., Any] | None:
    """The forward pass in one launch, or None where it does not take these or was found wrong."""
    if not takes_kernels(x, down, up):
        return None
    from .bottleneck.triton import forward

    key = ("bottleneck", x.device, x.dtype, down.shape[0], activation)
    return forward if _remembered(key, lambda: check.bottleneck_agrees(forward, *key[1:])) else None


# ---------------------------------------------------------------- which kernels were found right

_trusted: dict[tuple, bool] = {}


def is_trusted(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    factor_dtype: torch.dtype,
    M: int,
    width: int,
    rank: int,
    dropout: bool = False,
    rows: int = 0,
) -> bool:
    """Whether the kernel of `op` is used for M rows of `width` in `dtype`: its first use is compared, then remembered.

    What is compared, and so the key, is the very binary that will run: by its tile, by whether its sums are split, and
    by whether rows begin at multiples of 16 elements, which the compiler makes wide loads from.
    """
    tile = tiles.tile_of(op, M, width, rank, dropout, tiles.capability(device), rows)
    tile = dataclasses.replace(tile, splits=min(tile.splits, 2))
    key = (op, device, dtype, factor_dtype, rank, width % 16 == 0, dropout, tile)
    return _remembered(key, lambda: check.agrees(op, _launch_of(op), *key[1:]))


def _remembered(key: tuple, agrees: Callable[[], bool]) -> bool:
    if key not in _trusted:
        if key[1].type == "cuda" and torch.cuda.is_current_stream_capturing():
            return True  # a graph can hold no comparison; the warm-up before its capture made one
        _trusted[key] = agrees()
    return _trusted[key]


def _launch_of(op: str) -> Callable[..., Any]:
    if op.startswith("grouped"):
        from .grouped import triton as kernels
    else:
        from .lora import triton as kernels
    return getattr(kernels, op)

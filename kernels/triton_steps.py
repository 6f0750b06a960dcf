"""The steps of the hot path on a GPU, called as `aten` is: Triton where it moves fewer bytes, else ATen."""

from torch import Tensor
from torch.nn import functional as F

from . import philox, tiles
from . import triton_operators as triton_ops
from .lora import aten
from .lora.aten import backward_A as backward_A

# cuBLAS accumulates in place: it reads and writes y once, as a kernel would
from .lora.aten import expand_ as expand_
from .triton_operators import supported as supported


def draw_seed(x: Tensor) -> Tensor:
    return philox.new_seed(x.device)


def keep_mask(x: Tensor, dropout: float, seed: Tensor) -> Tensor:
    kept = philox.keep_mask(x.shape[0], x.shape[1], dropout, seed)
    # The kernels divide by the share that their 16 bits keep, the plain form by 1 - p.
    return kept.to(x.dtype) * (philox.kept_scale(dropout) * (1.0 - dropout))


def shrink(x: Tensor, lora_A: Tensor, scale: float, dropout: float, seed: Tensor | None) -> Tensor:
    # Without dropout both read x once. With it ATen writes a mask and a dropped x and reads them: 2.5 times x more.
    if seed is None:
        return aten.shrink(x, lora_A, scale, dropout, seed)
    return triton_ops.shrink(x, lora_A, scale, dropout, seed)


def expand(y: Tensor, h: Tensor, lora_B: Tensor) -> Tensor:
    # `addmm` copies y before it accumulates, 4 passes over it; the kernel needs 2.
    return triton_ops.expand(y, h, lora_B, 1.0, None)


def backward_y(dY: Tensor, lora_B: Tensor, h: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
    if h is None or not tiles.backward_y_pays(lora_B.shape[1]):
        return aten.backward_y(dY, lora_B, h, scale)
    return triton_ops.backward_y(dY, lora_B, h, scale)


def backward_x(
    x: Tensor | None,
    g: Tensor,
    lora_A: Tensor,
    dropout: float,
    seed: Tensor,
    shape: tuple[int, int],  # noqa: ARG001  (of x, which `aten` needs where there is none)
) -> tuple[Tensor, Tensor | None]:
    if x is None:
        return triton_ops.backward_x_only(g, lora_A, dropout, seed), None
    return triton_ops.backward_x(x, g, lora_A, dropout, seed)


def lora_term(x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float) -> Tensor:
    """s·drop(x) Aᵀ Bᵀ in operators whose gradients are registered, for a graph that is traced."""
    x2 = x.reshape(-1, x.shape[-1])
    hs = triton_ops.shrink(x2, lora_A, scale, dropout, draw_seed(x2))
    return F.linear(hs, lora_B.to(x.dtype)).view(*x.shape[:-1], lora_B.shape[0])

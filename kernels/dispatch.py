"""Which implementation runs the steps of the hot path: ATen, or Triton where the tensors allow it."""

from typing import Protocol

from torch import Tensor
from torch.compiler import is_compiling

from . import reference
from .lora import aten
from .mode import may_run_triton


class Steps(Protocol):
    """A module of steps; `aten` says what each gives."""

    def draw_seed(self, x: Tensor) -> Tensor: ...
    def keep_mask(self, x: Tensor, dropout: float, seed: Tensor) -> Tensor: ...
    def shrink(self, x: Tensor, lora_A: Tensor, scale: float, dropout: float, seed: Tensor | None) -> Tensor: ...
    def expand(self, y: Tensor, h: Tensor, lora_B: Tensor) -> Tensor: ...
    def expand_(self, y: Tensor, h: Tensor, lora_B: Tensor) -> Tensor: ...
    def backward_y(
        self, dY: Tensor, lora_B: Tensor, h: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor | None]: ...
    def backward_x(
        self, x: Tensor | None, g: Tensor, lora_A: Tensor, dropout: float, seed: Tensor, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None]: ...
    def backward_A(self, x: Tensor, g: Tensor) -> Tensor: ...


def steps_for(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Steps:
    """Picks the steps for x [tokens, in]: Triton's on a GPU that has them, or under PEFTLIB_KERNELS=interpret."""
    if may_run_triton(x):
        from . import triton_steps

        if triton_steps.supported(x, lora_A, lora_B):
            return triton_steps
    return aten


def traced_term(x: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, dropout: float) -> Tensor:
    """s·drop(x) Aᵀ Bᵀ for torch.compile: with dropout on a GPU the operator, which keeps x and a seed for backward,
    where a compiled plain form keeps the dropped x and its mask. Without dropout the plain form keeps no more."""
    if dropout and is_compiling() and may_run_triton(x):
        from . import triton_steps

        if triton_steps.supported(x, lora_A, lora_B):
            return triton_steps.lora_term(x, lora_A, lora_B, scale, dropout)
    return reference.lora_term(x, lora_A, lora_B, scale, dropout)

"""A function of a dropped input that keeps the input itself: the mask is drawn again from its seed, not kept."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from .dispatch import apply, as_own_tensor, has_autocast, is_transformed
from .dropout import draw_seed, survivors_scale
from .lora.aten import keep_mask


def dropped(of: Callable[..., Tensor], x: Tensor, *weights: Tensor, dropout: float) -> Tensor:
    """Applies a function to a dropped input, and keeps neither the mask nor the dropped input for backward.

    of(drop(x), *weights)

    Backward draws the mask again from its seed and computes `of` again, so it is for what is cheap beside the base: a
    skinny GEMM. On a 3×3 convolution of 64 channels, 8 images of 28×28, a pair of rank 8 keeps 1.6 MB so, and
    plain ops 5.0.

    Example:
        >>> x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3, requires_grad=True)
        >>> dropped(torch.nn.functional.conv2d, x, weight, dropout=0.1).shape
        torch.Size([2, 4, 6, 6])

    Args:
        of: gives one tensor from the dropped x and the weights, and reads nothing else that requires a gradient.
        x: [..., columns].
        *weights: what `of` gets behind x.
        dropout: the probability that an element of x is dropped, in [0, 1]; the others are scaled by 1/(1-p).

    Returns:
        What `of` returns.
    """
    if not dropout:
        return of(x, *weights)
    if is_transformed():
        return of(F.dropout(x, dropout), *weights)
    seed = draw_seed(planes_of(x))
    if not torch.is_grad_enabled():
        return _of_dropped(of, dropout, seed, x, *weights)
    return apply(_Dropped, of, dropout, seed, x, *weights)


class _Dropped(Function):
    @staticmethod
    def forward(
        ctx: Any, of: Callable[..., Tensor], dropout: float, seed: Tensor, x: Tensor, *weights: Tensor
    ) -> Tensor:
        ctx.save_for_backward(seed, x, *weights)
        ctx.of, ctx.dropout, ctx.autocast = of, dropout, _autocast(x)
        with torch.autocast(**ctx.autocast):
            y = _of_dropped(of, dropout, seed, x, *weights)
        return as_own_tensor(y, y.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        seed, *inputs = ctx.saved_tensors
        again = torch.is_grad_enabled()  # under create_graph the gradient is differentiated in its turn
        needed = ctx.needs_input_grad[3:]
        if not again:
            inputs = [tensor.detach().requires_grad_(need) for tensor, need in zip(inputs, needed, strict=True)]
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            y = _of_dropped(ctx.of, ctx.dropout, seed, *inputs)
        wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, grad_outputs, create_graph=again))
        return None, None, None, *(next(found) if need else None for need in needed)


def _autocast(x: Tensor) -> dict[str, Any]:
    """Without the cache: it would hold casts that were made here without gradient, and a later pass would take them."""
    if not has_autocast(x):
        return {"device_type": "cpu" if x.is_meta else x.device.type, "enabled": False}
    device = x.device.type
    return {"device_type": device, "dtype": torch.get_autocast_dtype(device), "cache_enabled": False}


def _of_dropped(of: Callable[..., Tensor], dropout: float, seed: Tensor, x: Tensor, *weights: Tensor) -> Tensor:
    keep = keep_mask(planes_of(x), dropout, seed).mul_(survivors_scale(dropout)).view(x.shape)
    return of(x * keep, *weights)


def planes_of(x: Tensor) -> Tensor:
    """[..., columns] as the matrix that a mask is drawn for; an image's planes are rows, since a row takes a key."""
    return x.detach().reshape(x.shape[0] * x.shape[1], -1) if x.dim() > 3 else x.detach().reshape(-1, x.shape[-1])

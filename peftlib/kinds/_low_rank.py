"""The low-rank branch of each layer type: A and B act on its input, without a matrix of the weight's size."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core.host import base_type
from .._core.override import owner_of
from .._core.quantized import quantized_as
from .._errors import AdapterError
from ._weight_layout import _CONVS, _TRANSPOSED, is_transposed_linear

Branch = Callable[..., Tensor]


def _own_forward(host: nn.Module) -> Any:
    cls: Any = base_type(type(host))
    return cls.forward


def is_plain_linear(host: nn.Module) -> bool:
    """A stock Linear over an ordinary tensor: no quantized subclass that must run through its own forward."""
    if not isinstance(host, nn.Linear) or _own_forward(host) is not nn.Linear.forward:
        return False
    return type(host.weight) in (Tensor, nn.Parameter) and host.weight.is_floating_point()


def is_plain_convolution(host: Any) -> bool:
    """A stock convolution of one group, padded with a number of zeros. Asked at each call: they are attributes."""
    stock = next((conv for conv in _CONVS if isinstance(host, conv)), None)
    if stock is None or base_type(type(host))._conv_forward is not stock._conv_forward:
        return False
    return host.groups == 1 and host.padding_mode == "zeros" and not isinstance(host.padding, str)


def low_rank_branch_of(host: nn.Module, path: str) -> Branch | None:
    """The low-rank call on this host; None where only the merged weight is exact.

    A subclass with a forward of its own may do more than the stock layer, so there the weights speak."""
    if path != "weight":
        return None
    if is_transposed_linear(host) or (isinstance(host, nn.Linear) and quantized_as(host, path)):
        return linear_branch
    forward = _own_forward(host)
    for stock, term in _BRANCH_OF:
        if isinstance(host, stock) and forward is stock.forward:
            return None if _bends_lookup(host) else term
    return None


def _bends_lookup(host: nn.Module) -> bool:
    """Embeddings whose result is not linear in the weight, or whose gradient is rescaled."""
    lookup = isinstance(host, (nn.Embedding, nn.EmbeddingBag))
    return lookup and (host.max_norm is not None or host.scale_grad_by_freq or getattr(host, "mode", "sum") == "max")


def linear_branch(_: nn.Module, A: Tensor, B: Tensor, input: Tensor) -> Tensor:
    return F.linear(F.linear(input, A), B)


def _conv_branch(host: Any, A: Tensor, B: Tensor, input: Tensor) -> Tensor:
    shared_A = A.repeat(host.groups, *[1] * (A.dim() - 1))  # [groups * rank, in/groups, *kernel]
    return _convolve(host._conv_forward(input, shared_A, None), B, host.groups)


def _transposed_branch(host: Any, A: Tensor, B: Tensor, input: Tensor, output_size: list[int] | None = None) -> Tensor:
    groups, kernel = host.groups, [1] * (A.dim() - 2)
    by_group = A.view(A.shape[0], groups, -1).transpose(0, 1).reshape(groups * A.shape[0], -1, *kernel)
    h = _convolve(input, by_group, groups)
    transpose = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}[A.dim()]
    padding = host._output_padding(
        input, output_size, host.stride, host.padding, host.kernel_size, len(kernel), host.dilation
    )
    return transpose(h, B.repeat(groups, 1, *kernel), None, host.stride, host.padding, padding, groups, host.dilation)


def _convolve(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.dim()]
    return convolve(x, weight, groups=groups)


def embedding_branch(host: Any, A: Tensor, B: Tensor, input: Tensor) -> Tensor:
    term = F.linear(F.embedding(input, A.t(), host.padding_idx), B)
    if host.padding_idx is None:
        return term
    return torch.where((input == host.padding_idx).unsqueeze(-1), term.detach(), term)  # as W's row, it does not learn


def _bag_branch(
    host: Any, A: Tensor, B: Tensor, input: Tensor, offsets: Any = None, per_sample_weights: Any = None
) -> Tensor:
    if per_sample_weights is not None:
        per_sample_weights = per_sample_weights.to(A.dtype)
    h = F.embedding_bag(
        input, A.t().contiguous(), offsets, mode=host.mode, per_sample_weights=per_sample_weights,
        include_last_offset=host.include_last_offset, padding_idx=host.padding_idx,
    )  # fmt: skip
    return F.linear(h, B)


_BRANCH_OF: tuple[tuple[type[nn.Module], Branch], ...] = (
    (nn.Linear, linear_branch),
    *((conv, _conv_branch) for conv in _CONVS),
    *((conv, _transposed_branch) for conv in _TRANSPOSED),
    (nn.Embedding, embedding_branch),
    (nn.EmbeddingBag, _bag_branch),
)

BRANCHES = tuple(dict.fromkeys(branch for _, branch in _BRANCH_OF))


def require_overridable(host: nn.Module, path: str) -> None:
    """Only the merged weight is left on this host, so it must read a floating-point tensor that can be overridden."""
    owner, leaf = owner_of(host, path)
    weight = getattr(owner, leaf)
    if owner is not host and leaf not in (*owner._parameters, *owner._buffers):
        raise AdapterError(
            f"{type(host).__name__}.{path} is computed from other tensors at each reading, and {type(host).__name__} "
            "reads it without calling its child. Remove the parametrization first, or exclude it."
        )
    if not weight.is_floating_point():
        raise AdapterError(
            f"{type(host).__name__}.{path} is {weight.dtype}, not floating point, and only a Linear can be adapted "
            "around a packed weight. Exclude it, or dequantize it."
        )

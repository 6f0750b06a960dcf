"""The bias that HF peft trains with `lora_bias` beside a layer that has none of its own."""

from typing import Any

import torch
from torch import Tensor, nn

from .._core.adapter import Adapter, trainable_dtype
from .._errors import AdapterError
from ..kinds._features import features_of

SUFFIX = "lora_B.bias"  # in a file


class OutputBias(Adapter):
    r"""A learned bias after a layer without one. It has no weight that it could be merged into.

    .. math:: y + b

    Args:
        host: a Linear, or a convolution, from `inject`.
        dtype: of b; default that of the host's weight, or float32 beside half precision.

    Raises:
        AdapterError: a host that does not say how many features it gives.
    """

    def __init__(self, host: nn.Module, *, dtype: str | torch.dtype | None = None) -> None:
        super().__init__()
        like, features = next(host.parameters()), features_of(host)
        if features.outputs is None:
            raise AdapterError(f"{type(host).__name__}: cannot infer its output features. Leave it out of lora_bias.")
        self.after = -1 - features.axis  # dimensions behind that of the features
        self.bias = nn.Parameter(torch.zeros(features.outputs, device=like.device, dtype=trainable_dtype(dtype, like)))

    def forward(self, host: nn.Module, call: Any, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = call(*args, **kwargs)
        return y + self.bias.to(y.dtype).reshape(-1, *[1] * self.after)

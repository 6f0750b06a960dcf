"""LoRA+: the two factors of a low-rank pair train at two learning rates."""

import math
from typing import Any

from torch import nn

from .._core.walk import adapters, require
from .._errors import AdapterError


def lora_plus_groups(model: nn.Module, lr: float, ratio: float = 16.0, name: str | None = None) -> list[dict[str, Any]]:
    r"""Parameter groups for an optimizer in which every B learns faster than the rest (Hayou et al. 2024).

    .. math:: \eta_B = \lambda\,\eta, \qquad \lambda = 16

    The paper finds that one rate for both factors is too low for B in wide models, and that 16 is a good ratio; the
    best rate for the rest is then often lower than without it.

    Args:
        model: a model with low-rank adapters, `LoRA` or `DoRA`.
        lr: η, of all adapter parameters but the `lora_B`.
        ratio: λ, by what the rate of the `lora_B` is multiplied.
        name: only the adapters of this name; default all.

    Returns:
        list[dict[str, Any]]: with "params", "lr" and "name", for the optimizer's first argument. What does not require
        a gradient is in neither group.

    Raises:
        AdapterError: no adapter, none with a `lora_B` that trains, a rate or ratio that is not positive.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2)
        >>> optimizer = torch.optim.AdamW(peftlib.lora_plus_groups(model, lr=0.25, ratio=16))
        >>> [(group["name"], group["lr"]) for group in optimizer.param_groups]
        [('rest', 0.25), ('lora_B', 4.0)]
    """
    for what, value in (("lr", lr), ("ratio", ratio)):
        if isinstance(value, bool) or not 0 < value < math.inf:
            raise AdapterError(f"lora_plus_groups: {what}={value!r} is not a positive number. Pass {what}=1e-4, say.")
    require(model, () if name is None else (name,))
    faster: dict[int, nn.Parameter] = {}
    rest: dict[int, nn.Parameter] = {}
    for _, _, adapter in adapters(model, name):
        for key, parameter in adapter.named_parameters():
            if parameter.requires_grad:
                (faster if key == "lora_B" else rest)[id(parameter)] = parameter
    if not faster:
        raise AdapterError(
            f"lora_plus_groups: no adapter of {type(model).__name__} has a lora_B that trains. Put LoRA or DoRA in "
            "first, or give peftlib.parameters(model) to the optimizer."
        )
    groups = [("rest", lr, rest), ("lora_B", lr * ratio, faster)]
    return [{"params": list(found.values()), "lr": rate, "name": what} for what, rate, found in groups if found]

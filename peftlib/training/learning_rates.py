"""Learning rates by depth and over time: discriminative fine-tuning, and the slanted triangle."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from .._checks import require_at_least, require_positive
from .._core.walk import adapters, require
from .._errors import AdapterError
from .layer_groups import LayerGroup, require_groups


def discriminative_lr(
    groups: Sequence[LayerGroup],
    lr: float,
    decay: float = 2.6,
    *,
    weight_decay: float | None = None,
    times: Callable[[str, torch.nn.Parameter], float] | None = None,
) -> list[dict[str, Any]]:
    r"""Parameter groups for an optimizer: the deeper a layer group lies, the lower its learning rate
    (Howard and Ruder 2018).

    .. math:: \eta_l = \eta \cdot \text{decay}^{-l}, \qquad l = 0 \text{ for the top group}

    Args:
        groups: from `layer_groups`, from input to output.
        lr: η, of the top group.
        decay: by what the rate is divided from one group to the next below; 1 for the same rate everywhere.
        weight_decay: for matrices; norms, biases and whatever else has fewer than two dimensions get none. Default:
            the optimizer's own for all.
        times: `times(name, parameter)`, a factor of its own for a parameter's rate: LoRA+ (Hayou et al. 2024) is
            `lambda name, p: 16 if name.endswith("lora_B") else 1`.

    Returns:
        list[dict[str, Any]]: with "params", "lr" and "name", and "weight_decay" if it was asked for.

    Raises:
        AdapterError: no group, a rate or a decay that is not positive.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> groups = peftlib.layer_groups(model)
        >>> optimizer = torch.optim.SGD(peftlib.discriminative_lr(groups, lr=2.6), momentum=0.9)
        >>> [(group["name"], group["lr"]) for group in optimizer.param_groups]
        [('0', 1.0), ('1', 2.6)]
    """
    require_groups("discriminative_lr", groups)
    for name, value in (("lr", lr), ("decay", decay)):
        require_positive(name, value, say=2.6, where="discriminative_lr")
    found: dict[tuple[int, float, bool], dict[str, Any]] = {}
    for depth, group in zip(reversed(range(len(groups))), groups, strict=True):
        for name, p in group.parameters.items():
            factor, decays = (times(name, p) if times else 1.0), p.dim() >= 2
            key = depth, factor, weight_decay is None or decays
            if key not in found:
                title = [group.name, f"times {factor:g}" if factor != 1 else "", "" if key[2] else "no weight decay"]
                found[key] = {"params": [], "lr": lr * decay**-depth * factor, "name": ", ".join(filter(None, title))}
                if weight_decay is not None:
                    found[key]["weight_decay"] = weight_decay if decays else 0.0
            found[key]["params"].append(p)
    return list(found.values())


class SlantedTriangular(LRScheduler):
    r"""A short steep rise and a long fall of the learning rate (Howard and Ruder 2018).

    .. math:: \eta_t = \eta_{\max} \frac{1 + p\,(\text{ratio} - 1)}{\text{ratio}}, \qquad
        p = \begin{cases} t / \text{cut} & t < \text{cut} \\
        1 - \frac{t - \text{cut}}{\text{cut}\,(1/\text{cut\_frac} - 1)} & \text{else} \end{cases}, \qquad
        \text{cut} = \lfloor T \cdot \text{cut\_frac} \rfloor

    After T steps the rate stays where it ended.

    Args:
        optimizer: whose rates, each group's own, are the maxima.
        total_steps: T.
        cut_frac: the share of the steps in which the rate rises.
        ratio: the highest rate over the lowest.
        last_epoch: the step to go on from; default -1, from the start.

    Raises:
        AdapterError: fewer than one step of rise, a share outside (0, 1), a ratio below 1.

    Example:
        >>> import torch, peftlib
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=3.2)
        >>> scheduler = peftlib.SlantedTriangular(optimizer, total_steps=100)
        >>> round(optimizer.param_groups[0]["lr"], 2)
        0.1
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        cut_frac: float = 0.1,
        ratio: float = 32.0,
        last_epoch: int = -1,
    ) -> None:
        if not 0 < cut_frac < 1 or int(total_steps * cut_frac) < 1:
            raise AdapterError(
                f"SlantedTriangular: {cut_frac!r} of {total_steps} steps is no rise. Pass a share in (0, 1) that gives "
                "at least one step."
            )
        require_at_least(1, "ratio", ratio, say=32, where="SlantedTriangular")
        self.cut, self.cut_frac, self.ratio = int(total_steps * cut_frac), cut_frac, ratio
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[Any]:
        """The closed form at `last_epoch`: exact after a resume.

        Returns:
            list[Any]: a rate for each group.
        """
        t, cut = self.last_epoch, self.cut
        p = t / cut if t < cut else max(0.0, 1 - (t - cut) / (cut * (1 / self.cut_frac - 1)))
        return [rate * (1 + p * (self.ratio - 1)) / self.ratio for rate in self.base_lrs]


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
        require_positive(what, value, say=1e-4, where="lora_plus_groups")
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

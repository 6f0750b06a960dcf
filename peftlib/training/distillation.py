"""A loss term that holds what the model says near what its base says, with no second model in memory."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import require_positive
from .._core.activate import activate
from .._core.walk import in_eval_mode, require, require_unmerged
from .._errors import AdapterError


def logits_of(output: Any) -> Tensor:
    """The tensor itself, or the field `logits` that language models return."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    raise AdapterError(
        f"distill: the model gave a {type(output).__name__}, which has no logits. Pass output=, a function that "
        "takes what the model gives and returns the logits."
    )


def distill(
    model: nn.Module,
    given: Any,
    *inputs: Any,
    temperature: float = 2.0,
    mask: Tensor | None = None,
    teacher: Sequence[str] = (),
    output: Callable[[Any], Tensor] = logits_of,
    **keywords: Any,
) -> Tensor:
    r"""The divergence of the adapted model's prediction from its own base's (Hinton et al. 2015; Li and Hoiem 2017).

    .. math:: T^2 \; \mathrm{KL}\bigl(\mathrm{softmax}(z^0 / T) \,\Vert\, \mathrm{softmax}(z / T)\bigr)

    The base is the model with its adapters off, so it costs a forward pass and no memory of its own. It runs in eval
    mode, without gradients; modes and selection are afterwards as before.

    Args:
        model: a model with adapters.
        given: what the model gave for these inputs, so that it need not run twice.
        *inputs: what the model was called with.
        temperature: T, above 0; the higher, the more the small probabilities count.
        mask: the positions that count, of the logits' shape without the last dimension; default all.
        teacher: adapters that stay on in the base, such as those of an earlier task; default none.
        output: finds the logits z [..., classes] in what the model gives; default itself, or its `logits`.
        **keywords: what the model was called with.

    Returns:
        Tensor: a scalar in float32 or wider, the mean over the positions that count.

    Raises:
        AdapterError: a model without adapters, a merged one, no logits, logits of two shapes, a mask that counts
            nothing, a temperature that is not positive.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2)
        >>> x = torch.ones(2, 4)
        >>> z = model(x)
        >>> loss = z.square().mean() + 0.5 * peftlib.distill(model, z, x)
    """
    require_positive("temperature", temperature, say=2, where="distill")
    require_unmerged(require(model, teacher), "distill")
    with torch.no_grad(), activate(model, *teacher), in_eval_mode(model):
        z0 = output(model(*inputs, **keywords))
    z = output(given)
    if z.shape != z0.shape:
        raise AdapterError(
            f"distill: what was given has the shape {tuple(z.shape)}, and the base gives {tuple(z0.shape)}. "
            "Pass the same inputs to both."
        )
    wide = torch.promote_types(z.dtype, torch.float32)
    log_p, log_p0 = (F.log_softmax(each.to(wide) / temperature, -1) for each in (z, z0))
    impossible = log_p0.exp() == 0  # to the base, as a masked class is: its term is 0, where -inf - -inf would be NaN
    log_p, log_p0 = (each.masked_fill(impossible, 0.0) for each in (log_p, log_p0))
    divergence = F.kl_div(log_p, log_p0, reduction="none", log_target=True).masked_fill(impossible, 0.0).sum(-1)
    return temperature**2 * _mean(divergence, mask)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    if mask.shape != values.shape or not mask.any():
        raise AdapterError(
            f"distill: the mask of shape {tuple(mask.shape)} counts {int(mask.bool().sum())} of {tuple(values.shape)} "
            "positions. Pass one of that shape with a position that counts."
        )
    return values.where(mask.bool(), 0).sum() / mask.bool().sum()

"""One backward for several trials, and a gate: one whose loss or gradients are not finite takes no step."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .._errors import AdapterError
from .trial import Trial


def step_finite(trials: Mapping[str, Trial], losses: Mapping[str, Tensor]) -> dict[str, str]:
    """Steps each trial by its loss, and says of those that took none what was wrong.

    A loss that is no number is left out of the sum, and the gradients of one trial reach no other's parameters."""
    _require_losses(trials, losses)
    troubles = {name: f"its loss is {value}" for name, value in _values(losses).items() if not _is_finite(value)}
    stepping = [trial for name, trial in trials.items() if name not in troubles]
    if not stepping:
        return troubles
    torch.autograd.backward([losses[trial.name] for trial in stepping])
    norms = {trial.name: trial.norm_of_gradients() for trial in stepping}
    values = _values(norms)
    for trial in stepping:
        # Of large gradients the norm is infinite too, and they are as they should be.
        if _is_finite(values[trial.name]) or trial.has_finite_gradients():
            trial.update(norms[trial.name])
        else:
            troubles[trial.name] = "a gradient is not finite"
    return troubles


def _values(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """One transfer for all, where they are on another device."""
    device = next(iter(scalars.values())).device
    together = torch.stack([scalar.detach().to(device, torch.float64) for scalar in scalars.values()])
    return dict(zip(scalars, together.tolist(), strict=True))


def _is_finite(value: float) -> bool:
    return value - value == 0


def _require_losses(trials: Mapping[str, Trial], losses: Mapping[str, Tensor]) -> None:
    if not losses:
        raise AdapterError("Trials.step: there is no loss. Pass one for each trial that ran.")
    for name, loss in losses.items():
        if trials[name].stopped is not None:
            raise AdapterError(f"Trials.step: {name!r} has stopped: {trials[name].stopped}. Leave its loss out.")
        if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
            found = f"a tensor of shape {[*loss.shape]}" if isinstance(loss, Tensor) else type(loss).__name__
            more = " without gradient" if isinstance(loss, Tensor) and not loss.requires_grad else ""
            raise AdapterError(
                f"Trials.step: the loss of {name!r} is {found}{more}. Pass a scalar that was computed from its output."
            )

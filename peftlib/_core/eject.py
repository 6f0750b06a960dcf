"""Taking adapters out of a model: without a trace, or folded into it for good."""

from typing import Literal, overload

from torch import nn

from .._errors import AdapterError
from .dequantize import dequantize_linears
from .foreign import fast_paths_around
from .freeze import held_modules, unfreeze_base
from .host import Selection, all_or_nothing, detach, parts, require_on_top, take
from .inject import require_changeable
from .lost import forget_lost
from .merge import forget_backups, unmerge
from .merge import merge as fold_in
from .sharded import leave_units, settle
from .walk import base_modules, hosts, require, require_no_views


@overload
def eject(
    model: nn.Module, name: str | None = None, *, merge: bool = False, dequantize: Literal[False] = False
) -> None: ...


@overload
def eject(
    model: nn.Module, name: str | None = None, *, merge: Literal[True], dequantize: Literal[True]
) -> dict[str, float]: ...


def eject(
    model: nn.Module, name: str | None = None, *, merge: bool = False, dequantize: bool = False
) -> dict[str, float] | None:
    r"""Takes adapters out without a trace: class, attributes, state-dict keys and `requires_grad` are as they were.

    With `dequantize` each quantized linear layer that the merged adapters are on becomes an `nn.Linear` in float32 that
    holds the weight with which it computes. The result says how far each of them then is from the live one:

    .. math:: \frac{\lVert Y_{\mathrm{merged}} - Y_{\mathrm{live}} \rVert_F}{\lVert Y_{\mathrm{live}} \rVert_F}
        \quad\text{for 64 standard normal inputs}

    Args:
        model: a model with adapters.
        name: the adapter to take out; default all of them.
        merge: first fold it (default: the active ones) into the base, for good.
        dequantize: with `merge`, also into quantized linear layers, whose quantized weight cannot hold the result.

    Returns:
        With `dequantize`, the relative error of each layer that was quantized, by name; else None.

    Raises:
        AdapterError: an absent name, a merged model without `merge=True`, a class that something put above the
            adapted one, a live view, `dequantize` without `merge`, or on a layer that runs another forward than its
            class's; and what `merge` refuses.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = peftlib.inject(model, "0", peftlib.LoRA, rank=2)
        >>> peftlib.eject(model)
        >>> type(model[0]) is torch.nn.Linear
        True
    """
    settle(model)
    if not merge and not any(True for _ in hosts(model)) and forget_lost(model, name):
        unfreeze_base(model, keep_buffers=True)
        return None
    selection = require(model, () if name is None else (name,))
    if dequantize:
        return _eject_dequantized(model, name, merge)
    if not merge:
        require_changeable(model, "eject")
        _take_out(model, name, keep_buffers=selection.reloaded)
        return None
    folded_before = _fold_for_good(model, selection, name)
    try:
        with all_or_nothing(model):  # the copies are among what it brings back, so that unmerge finds them
            _take_out(model, name, keep_buffers=True)
            selection.active = tuple(other for other in selection.active_before_merge if other in selection.count)
            before = selection.weights_before_merge
            selection.weights = {other: before[other] for other in selection.active if other in before}
            selection.merged, selection.weights_before_merge = (), {}
            forget_backups(model)
    except BaseException:
        if not folded_before:
            unmerge(model)
        raise
    return None


def _eject_dequantized(model: nn.Module, name: str | None, merge: bool) -> dict[str, float]:
    if not merge:
        raise AdapterError(
            "eject: dequantize=True without merge=True would only make the base larger. Pass both, or neither."
        )
    require_changeable(model, "eject")
    names = require(model).active if name is None else (name,)
    with all_or_nothing(model):
        probes = dequantize_linears(model, names)
        fold_in(model, *names)
        try:
            errors = {host_name: probe.error() for host_name, probe in probes.items()}
            eject(model, name, merge=True)
        except BaseException:
            unmerge(model)
            raise
    return errors


def _fold_for_good(model: nn.Module, selection: Selection, name: str | None) -> bool:
    """Whether the model was merged already."""
    names = () if name is None else (name,)
    if not selection.merged:
        fold_in(model, *names)
        return False
    require_no_views(selection, "eject")
    if names and selection.merged != names:
        raise AdapterError(f"eject: {', '.join(selection.merged)} is merged, not {name!r} alone. Call unmerge first.")
    return True


def _take_out(model: nn.Module, name: str | None, *, keep_buffers: bool) -> None:
    leaving = [(host, adapter) for _, host in hosts(model) for adapter in parts(host, name and (name,))]
    with all_or_nothing(model):
        for host, adapter in leaving:
            take(host, adapter)
        adapted = {id(host) for _, host in hosts(model) if parts(host)}
        needed = adapted | {id(around) for around in fast_paths_around(base_modules(model), adapted)}
        if adapted:
            needed |= {id(module) for module in held_modules(model)}
        for host_name, host in [*hosts(model)]:
            if id(host) not in needed:
                require_on_top(host_name, host)
                detach(host)
        if not adapted:
            unfreeze_base(model, keep_buffers=keep_buffers)
        forget_lost(model, name)
        leave_units(model)

"""Adapters as values: a weighted sum of several, or one in the form of LoRA, put into the model beside them."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .._checks import require_one_of, require_probability, require_whole_number
from .._core.adapter import Adapter
from .._core.lost import require_all_there
from .._core.randomness import require_seed
from .._core.rename import require_new
from .._core.walk import base_modules
from .._core.weights import chosen
from .._errors import AdapterError
from ..files.parts import install_parts
from ..kinds.lora import LoRA
from .changes import Change, changes_of
from .methods import Term, dropped_and_rescaled, summed, trimmed_and_elected
from .result import parts_of

_METHODS: dict[str, tuple[str, ...]] = {  # what each must be given, and may be
    "exact": (),
    "svd": ("rank!",),
    "ties": ("density!", "rank"),
    "dare": ("density!", "rank", "seed"),
}


def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    *,
    name: str,
    method: str = "exact",
    rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
) -> dict[str, float]:
    r"""Makes one adapter of several, of mixed ranks and types, and puts it beside them, switched off.

    .. math:: \Delta W = \sum_i w_i\, \Delta W_i, \qquad \Delta W_i = s_i B_i A_i \text{, or what else the type makes of
        } W \text{, less } W

    "exact" puts the factors of LoRA in a row, so the rank is the sum of the ranks and nothing is lost; what is no
    product of factors becomes a copy (`Full`). "svd" is the nearest product of a rank. "ties" (Yadav et al. 2023) keeps
    of each w ΔW the largest elements, elects a sign for each, and takes the mean of those that have it. "dare" (Yu et
    al. 2023) drops elements at random and enlarges the rest, then adds. Each weight is taken by itself, and biases and
    other vectors, which have no rank, are copied. Adding up B and A apart, as HF peft's "linear" does, gives another
    matrix: (√w₁B₁ + √w₂B₂)(√w₁A₁ + √w₂A₂).

    Args:
        model: a model with adapters.
        weights: of each adapter, on top of its own scale; negative to subtract.
        name: of the new adapter.
        method: "exact", "svd", "ties" or "dare".
        rank: for "svd", and for "ties" and "dare", whose result is a whole matrix: the largest rank that is kept.
            Without it these two give copies.
        density: for "ties" the share of elements that is kept, for "dare" the probability of keeping one, in (0, 1].
        seed: for "dare"; default from torch's generator.

    Returns:
        dict[str, float]: by the weight's name, ‖ΔW − what was put in‖/‖ΔW‖ before it is rounded to the adapter's dtype:
        0 without a rank.

    Raises:
        AdapterError: an absent or taken name, no adapter, an argument that the method lacks or does not take, a type
            without a merged weight, what `merge` refuses of a type other than LoRA, a merged or routed model, a live
            view. The model is as it was.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> for name, rank in (("first", 1), ("second", 2)):
        ...     _ = peftlib.inject(model, "0", peftlib.LoRA, rank=rank, name=name)
        >>> peftlib.combine(model, {"first": 0.7, "second": -0.3}, name="both")
        {'0.weight': 0.0}
        >>> _ = peftlib.activate(model, "both")
    """
    _require_arguments(method, rank, density, seed)
    choice = chosen((weights,), "combine")
    require_new(model, name, choice.named, "combine")
    require_all_there(model, "combine")
    if not choice.names:
        raise AdapterError("combine: no adapter has a weight other than 0. Name one of the model's with a weight.")
    own = choice.weights or {}
    by_weight: dict[Any, list[Term]] = {}
    for each in choice.names:
        weight = own[each].item() if each in own else 1.0
        for change in changes_of(model, each, "combine"):
            by_weight.setdefault(change.site.key, []).append(Term(each, weight, change))
    made = (_combined(terms, method, density, seed) for terms in by_weight.values())
    return _put_in(model, made, rank, name, "combine")


def convert(model: nn.Module, old: str, kind: type[Adapter], *, rank: int, name: str) -> dict[str, float]:
    r"""Puts beside an adapter that can be merged the nearest LoRA of a rank, switched off.

    .. math:: B A = \sum_{k \le r} \sigma_k u_k v_k^\top, \qquad \Delta W = U \Sigma V^\top

    Args:
        model: a model with adapters.
        old: an adapter of any types with a merged weight.
        kind: `LoRA`.
        rank: the largest that is kept; a matrix, or a product of factors, that has less gives as much as it has.
        name: of the new adapter; what it changes of vectors (biases, norms) is a copy (`Full`) in it.

    Returns:
        dict[str, float]: by the weight's name, ‖ΔW − B A‖/‖ΔW‖ in the Frobenius norm, before it is rounded.

    Raises:
        AdapterError: another kind than `LoRA`, and what `combine` refuses. The model is as it was.

    Example:
        >>> import torch, peftlib
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = peftlib.inject(model, "0", peftlib.DoRA, rank=2, name="dora")
        >>> errors = peftlib.convert(model, "dora", peftlib.LoRA, rank=4, name="lora")
        >>> errors["0.weight"] < 1e-6
        True
    """
    if kind is not LoRA:
        found = getattr(kind, "__name__", repr(kind))
        raise AdapterError(f"convert: {found} is not what a change of a weight is converted to. Pass peftlib.LoRA.")
    return combine(model, {old: 1.0}, name=name, method="svd", rank=rank)


def _combined(terms: list[Term], method: str, density: float | None, seed: int | None) -> Change:
    if method == "ties" and density is not None:
        return trimmed_and_elected(terms, density)
    if method == "dare" and density is not None:
        return dropped_and_rescaled(terms, density, seed)
    return summed(terms)


def _put_in(model: nn.Module, made: Any, rank: int | None, name: str, doing: str) -> dict[str, float]:
    parts, errors = parts_of(made, rank)
    install_parts(model, parts, name, doing, base_modules(model), freeze=False, active=False)
    return errors


def _require_arguments(method: str, rank: object, density: Any, seed: object) -> None:
    require_one_of(_METHODS, "method", method, where="combine")
    known = _METHODS[method]
    for argument, value, say in (("rank", rank, 8), ("density", density, 0.2), ("seed", seed, 0)):
        if value is None and f"{argument}!" in known:
            raise AdapterError(f'combine: method="{method}" needs {argument}=. Pass {argument}={say}, say.')
        if value is not None and argument not in known and f"{argument}!" not in known:
            raise AdapterError(f'combine: {argument}={value!r} has no meaning for method="{method}". Leave it out.')
    if rank is not None:
        require_whole_number("rank", rank, say=8, where="combine")
    if density is not None and density != 1:
        require_probability("density", density, say=0.2, where="combine")
        if density == 0:
            raise AdapterError("combine: density=0 keeps nothing. Pass density=0.2, say.")
    if seed is not None:
        require_seed(seed)

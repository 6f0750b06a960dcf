"""Products with a lazy weight: the base's product, and the low-rank one beside it on the way through the rank."""

import string
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._core.lazy_weight import RULES, LazyWeight, Step
from ..kernels import lora_linear
from ..kernels.dispatch import is_transformed


def rule_for(*names: str) -> Callable[[Any], Any]:
    """Registers a rule for what torch has under these names: functions and methods alike."""

    def register(rule: Any) -> Any:
        for name in names:
            for place in (torch, Tensor, F):
                if hasattr(place, name):
                    RULES[getattr(place, name)] = rule
        return rule

    return register


def is_right_of(x: Any, weight: Any) -> bool:
    return isinstance(weight, LazyWeight) and isinstance(x, Tensor) and not isinstance(x, LazyWeight)


def added(y: Tensor, weight: LazyWeight, x: Tensor, near: Step, far: Step, *others: Tensor) -> Tensor:
    """y plus what each change makes of x. In place where it may be: y is new, and no product keeps what it gave."""
    add = torch.add if is_transformed() else Tensor.add_
    for change in weight.changes:
        y = add(y, change.of(x, near, far, *others).to(y.dtype))
    return y


@rule_for("linear")
def _linear(linear: Any, input: Any, weight: Any, bias: Any = None) -> Any:
    if not is_right_of(input, weight) or weight.stack or not weight.is_matrix:
        return NotImplemented
    first, *others = weight.changes
    if len(first.pairs) > 1 or type(weight.base) not in (Tensor, nn.Parameter) or isinstance(first.scale, Tensor):
        y = linear(input, weight.base, bias)
        return added(y, weight, input, lambda x, L, R: linear(x, R), lambda h, L, R: linear(h, L))
    ((B, A),) = first.pairs
    y = lora_linear(input, weight.base, bias, A, B, first.scale, first.dropout, True)
    for change in others:
        y = torch.add(y, change.of(input, lambda x, L, R: linear(x, R), lambda h, L, R: linear(h, L)))
    return y


@rule_for("matmul", "mm", "bmm")
def _matmul(product: Any, input: Any, other: Any) -> Any:
    if is_right_of(input, other):
        if not other.is_matrix or input.dim() == 1 < other.stack + 1:
            return NotImplemented
        y = product(input, other.base)
        return added(y, other, input, lambda x, L, R: product(x, L), lambda h, L, R: product(h, R))
    if not is_right_of(other, input) or not input.is_matrix or other.dim() == 1 < input.stack + 1:
        return NotImplemented
    y = product(input.base, other)
    return added(y, input, other, lambda x, L, R: product(R, x), lambda h, L, R: product(L, h))


RULES[Tensor.__rmatmul__] = lambda _, self, other: _matmul(torch.matmul, other, self)


@rule_for("addmm", "baddbmm")
def _addmm(product: Any, input: Any, first: Any, second: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    multiply = torch.bmm if product in (torch.baddbmm, Tensor.baddbmm) else torch.mm
    lazy, x = (second, first) if is_right_of(first, second) else (first, second)
    if isinstance(input, LazyWeight) or not is_right_of(x, lazy) or not lazy.is_matrix:
        return NotImplemented
    if lazy is second:
        y = product(input, x, lazy.base, beta=beta, alpha=alpha)
        return added(y, lazy, x, lambda x, L, R: alpha * multiply(x, L), lambda h, L, R: multiply(h, R))
    y = product(input, lazy.base, x, beta=beta, alpha=alpha)
    return added(y, lazy, x, lambda x, L, R: alpha * multiply(R, x), lambda h, L, R: multiply(L, h))


@rule_for("_grouped_mm")  # which `torch.nn.functional.grouped_mm` calls
def _grouped(product: Any, mat_a: Any, mat_b: Any, *rest: Any, **options: Any) -> Any:
    if not is_right_of(mat_a, mat_b) or not mat_b.is_matrix or mat_b.dim() != 3:
        return NotImplemented
    offs = rest[0] if rest else options.get("offs")
    y = product(mat_a, mat_b.base, *rest, **options)
    return added(
        y, mat_b, mat_a,
        lambda x, L, R: product(x, _aligned(L), offs=offs),
        lambda h, L, R: product(h, _aligned(R.transpose(-2, -1)).transpose(-2, -1), offs=offs),
    )  # fmt: skip


# What transformers calls where torch's own does not run: compiled in float32, on some devices.
RULES["transformers::grouped_mm_fallback"] = _grouped


def _aligned(factor: Tensor) -> Tensor:
    """[..., rank] with zeros behind: grouped products ask for rows of whole 16 bytes."""
    missing = -factor.shape[-1] % (16 // factor.element_size())
    return F.pad(factor, (0, missing)) if missing else factor


@rule_for("bilinear")
def _bilinear(bilinear: Any, input1: Any, input2: Any, weight: Any, bias: Any = None) -> Any:
    if not is_right_of(input1, weight) or weight.stack or any(change.dropout for change in weight.changes):
        return NotImplemented
    y = bilinear(input1, input2, weight.base, bias)
    return added(y, weight, input1, lambda x, L, R: bilinear(x, input2, R), lambda h, L, R: F.linear(h, L))


@rule_for("einsum")
def _einsum(einsum: Any, equation: Any, *operands: Any) -> Any:
    lazy = [place for place, each in enumerate(operands) if isinstance(each, LazyWeight)]
    if not isinstance(equation, str) or len(lazy) != 1:
        return NotImplemented
    place = lazy[0]
    weight, others = operands[place], [*operands[:place], *operands[place + 1 :]]
    plan = _einsum_plan(equation, place, weight.stack, len(operands))
    if plan is None or (plan.has_two_inputs and any(change.dropout for change in weight.changes)):
        return NotImplemented
    x, others = others[plan.meets], [*others[: plan.meets], *others[plan.meets + 1 :]]
    y = einsum(equation, *operands[:place], weight.base, *operands[place + 1 :])
    return added(
        y, weight, x,
        lambda x, L, R: einsum(plan.first, x, R if plan.meets_right else L),
        lambda h, L, R, *others: einsum(plan.second, *others, h, L if plan.meets_right else R),
        *others,
    )  # fmt: skip


class _Plan(NamedTuple):
    """Which of the other operands meets a factor, R or L, by the first equation; the second one does the rest."""

    meets: int
    meets_right: bool
    first: str
    second: str
    has_two_inputs: bool


def _einsum_plan(equation: str, place: int, stack: int, count: int) -> _Plan | None:
    """None where the weight is not summed over: the result is of its size itself."""
    terms, output = _terms_of(equation)
    own = terms[place] if len(terms) == count else _DOTS
    if _DOTS in own or len(set(own)) != len(own):
        return None
    others, rank = [*terms[:place], *terms[place + 1 :]], _unused(equation)
    batch, row, rest = own[:stack], own[stack : stack + 1], own[stack + 1 :]
    left, right = batch + row + rank, batch + rank + rest
    for meets_right, summed, near, far in ((True, rest, right, left), (False, row, left, right)):
        for index, term in enumerate(others):
            if all(letter in term and letter not in output for letter in summed):
                beside = [*others[:index], *others[index + 1 :]]
                through = _kept(term + near, "".join([*beside, far, output]))
                equations = _joined([term, near], through), _joined([*beside, through, far], output)
                shared = any(letter in each for letter in summed for each in beside)
                return _Plan(index, meets_right, *equations, shared)
    return None


_DOTS = "."  # for the "..." of an equation, so that each sign is one dimension or all these


def _unused(equation: str) -> str:
    return next(letter for letter in string.ascii_letters if letter not in equation)


def _kept(letters: str, needed: str) -> str:
    return "".join(letter for letter in dict.fromkeys(letters) if letter == _DOTS or letter in needed)


def _joined(terms: list[str], output: str) -> str:
    return f"{','.join(terms)}->{output}".replace(_DOTS, "...")


def _terms_of(equation: str) -> tuple[list[str], str]:
    inputs, arrow, output = equation.replace(" ", "").replace("...", _DOTS).partition("->")
    if arrow:
        return inputs.split(","), output
    letters = inputs.replace(",", "")
    once = "".join(sorted(letter for letter in letters if letter != _DOTS and letters.count(letter) == 1))
    return inputs.split(","), (_DOTS if _DOTS in letters else "") + once

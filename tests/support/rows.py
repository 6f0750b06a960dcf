"""What is asked of every way in which rows go through adapters of their own."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import peftlib


def same_with_gradients(run: Callable[[], Tensor], expected: Tensor, operands: Sequence[Tensor]) -> None:
    """To 1e-12, and without gradients to the bit what it is with them."""
    found = run()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    given = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, operands, given), torch.autograd.grad(expected, operands, given), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(run(), found)


def first_and_second(y: Tensor, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of a sum of squares, and those of the sum of their squares."""
    first = torch.autograd.grad(y.square().sum(), operands, create_graph=True)
    return *first, *torch.autograd.grad(sum(gradient.square().sum() for gradient in first), operands)


def batched_as_one_by_one(y: Tensor, operands: Sequence[Tensor]) -> None:
    """The gradients of several outputs, by one call, are those of each by itself."""
    given = torch.randn(3, *y.shape, dtype=y.dtype)
    together = torch.autograd.grad(y, operands, given, is_grads_batched=True, retain_graph=True)
    alone = [torch.autograd.grad(y, operands, each, retain_graph=True) for each in given]
    for one, others in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(one, torch.stack(others), rtol=0, atol=1e-12)


def nan_stays_in_its_rows(model: Any, rows: Sequence[Any], call: Callable[[], Tensor], name: str) -> None:
    """An adapter that holds NaN changes no bit of the outputs and gradients of the others."""
    others = [row for row, choice in enumerate(rows) if choice != name]
    kept = [p for _, found, adapter in peftlib.adapters(model) if found != name for p in adapter.parameters()]

    def run() -> tuple[Tensor, ...]:
        with peftlib.route(model, rows):
            y = call()
        return y, *torch.autograd.grad(y[others].square().sum(), kept)

    before = run()
    for parameter in peftlib.parameters(model, name):
        parameter.data.fill_(math.nan)
    after = run()
    assert after[0].isnan().any()
    for one, other in zip((before[0][others], *before[1:]), (after[0][others], *after[1:]), strict=True):
        assert torch.equal(one, other)

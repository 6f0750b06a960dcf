"""Rows with prefixes of their own length in models of transformers: one attention call, each row as it is alone."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import peftlib
from peftlib import Prefix
from support.rows import nan_stays_in_its_rows

LENGTHS = {"a": 2, "b": 4, "c": 3}
ROWS: dict[str, list[Any]] = {
    "of other lengths": ["b", "a", "c", "a", "b", "b", "c"],
    "and of none": ["b", None, "a", "c", None, "a", "b"],
    "of one length": ["a", "a", None, "a", "a", "a", "a"],
}
LAYERS = 2


def model_of(attention: str = "sdpa", dtype: torch.dtype = torch.float64, **config: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.GPTNeoXModel(
        transformers.GPTNeoXConfig(
            vocab_size=31, hidden_size=16, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=12,
            max_position_embeddings=32, attn_implementation=attention,
        )
    ).to(dtype).eval()  # fmt: skip
    for name, length in LENGTHS.items():
        peftlib.inject(model, "*.attention", Prefix, length=length, name=name, **config)
    for parameter in peftlib.parameters(model):
        parameter.data.add_(torch.randn_like(parameter) * 0.5)
        parameter.requires_grad_()
    return model


def given(rows: list[Any], padded: bool) -> dict[str, Tensor]:
    """Left-padded where there is a prefix: eager attention in float64 gives nan for what sees nothing."""
    tokens, mask = torch.randint(0, 31, (len(rows), 6)), torch.ones(len(rows), 6, dtype=torch.long)
    for row, choice in enumerate(rows):
        mask[row, : row % 4 if choice else 0] = 0
    return {"input_ids": tokens, "attention_mask": mask} if padded else {"input_ids": tokens}


def run(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs, use_cache=False).last_hidden_state


def alone(model: Any, inputs: dict[str, Tensor], rows: list[Any]) -> Tensor:
    parts = []
    for row, choice in enumerate(rows):
        with peftlib.activate(model, *([] if choice is None else [choice])):
            parts.append(run(model, {key: value[row : row + 1] for key, value in inputs.items()}))
    return torch.cat(parts)


class Calls(TorchFunctionMode):
    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("which", ROWS)
def test_outputs_and_gradients_are_those_of_each_row_alone(which, attention, padded):
    model, rows = model_of(attention), ROWS[which]
    inputs, learned = given(rows, padded), [*peftlib.parameters(model)]
    expected = alone(model, inputs, rows)
    with peftlib.route(model, rows):
        found = run(model, inputs)
    seen = inputs.get("attention_mask", torch.ones(len(rows), 6))[..., None].bool()
    torch.testing.assert_close(found * seen, expected * seen, rtol=0, atol=1e-12)
    weights = torch.randn_like(found) * seen
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), learned, allow_unused=True),
        torch.autograd.grad((expected * weights).sum(), learned, allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("which", ROWS)
def test_all_rows_share_one_attention_call(which):
    model, rows = model_of(), ROWS[which]
    with torch.no_grad(), peftlib.route(model, rows), Calls() as calls:
        run(model, given(rows, True))
    assert calls.count == LAYERS


def test_beams_of_one_row_lie_together():
    model, rows = model_of(), ROWS["and of none"]
    inputs = given(2 * rows, False)
    with torch.no_grad():
        with peftlib.route(model, rows):
            found = run(model, inputs)
        expected = alone(model, inputs, [choice for choice in rows for _ in range(2)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("which", ["of other lengths", "and of none"])
def test_what_is_not_finite_in_one_prefix_changes_no_bit_of_another_s_rows(which):
    model, rows = model_of(), ROWS[which]
    inputs = given(rows, False)
    nan_stays_in_its_rows(model, rows, lambda: run(model, inputs), "b")


def test_with_a_gate_or_two_prefixes_each_group_runs_by_itself():
    rows: list[Any] = ["b", ("a", "c"), None, "a"]
    for config in ({}, {"gate": True}):
        model = model_of(**config)
        inputs = given(rows, False)
        with peftlib.route(model, rows):
            found = run(model, inputs)
        for row, choice in enumerate(rows):
            with peftlib.activate(model, *((choice,) if isinstance(choice, str) else choice or ())):
                expected = run(model, {key: value[row : row + 1] for key, value in inputs.items()})
            torch.testing.assert_close(found[row : row + 1], expected, rtol=0, atol=1e-12)


def test_heads_that_do_not_fit_are_refused_as_alone():
    model = model_of(heads=3, head_dim=4)
    with pytest.raises(peftlib.AdapterError, match="heads="), peftlib.activate(model, "a"):
        run(model, given(["a"], False))
    with pytest.raises(peftlib.AdapterError, match="heads="), peftlib.route(model, ["a", "b"]):
        run(model, given(["a", "b"], False))


def test_in_half_precision_each_row_is_as_near_as_alone():
    rows = ROWS["of other lengths"]
    model, inputs = model_of(dtype=torch.bfloat16), given(rows, False)
    with torch.no_grad():
        with peftlib.route(model, rows):
            found = run(model, inputs)
        expected = alone(model, inputs, rows)
    scale = expected.abs().max().item()
    assert (found - expected).abs().max().item() <= 8 * torch.finfo(torch.bfloat16).eps * scale


def test_compiled_without_a_break_rows_give_the_same():
    model, rows = model_of(), ROWS["and of none"]
    inputs = given(rows, False)
    with peftlib.route(model, rows), torch.no_grad():
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(run(compiled, inputs), run(model, inputs), rtol=0, atol=1e-12)

"""Hosts that few models have: embeddings that write to their weight, complex weights, outputs laid out otherwise."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftlib
from peftlib import IA3, Bottleneck, DoRA, Full, LoRA, Prompt
from support.refusals import refused

TOKENS = torch.tensor([[1, 2, 3], [1, 5, 1]])


def embedding(cls: Any = nn.Embedding, **options: Any) -> Any:
    torch.manual_seed(0)
    return nn.ModuleDict({"host": cls(7, 4, **options)})


def drawn(model: nn.Module) -> None:
    torch.manual_seed(1)
    for parameter in peftlib.parameters(model):
        nn.init.normal_(parameter)


def gradients(model: nn.Module) -> list[Tensor]:
    found = [parameter.grad for parameter in peftlib.parameters(model)]
    assert None not in found
    return [gradient.to_dense() for gradient in found if gradient is not None]


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoRA": (LoRA, {"rank": 2}),
    "DoRA": (DoRA, {"rank": 2}),
    "IA3": (IA3, {}),
    "Full": (Full, {}),
    "rows": (Full, {"rows": [1, 5]}),
}
EMBEDDINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sparse": {"sparse": True},
    "renormalized": {"max_norm": 1.0},
    "sparse and renormalized": {"sparse": True, "max_norm": 1.0},
}


@pytest.mark.parametrize(("kind", "config"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("options", EMBEDDINGS.values(), ids=EMBEDDINGS)
@pytest.mark.parametrize("cls", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_computes_with_a_folded_weight_and_moves_none(cls, options, kind, config):
    model = embedding(cls, **options)
    host = model["host"]
    peftlib.inject(model, "host", kind, **config)
    drawn(model)
    (adapter,) = [adapter for _, _, adapter in peftlib.adapters(model)]
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    weight = adapter.fold(host)["weight"].detach().clone().requires_grad_()
    dense = {**options, "sparse": False}
    reference = cls(7, 4, **dense)
    with torch.no_grad():
        reference.weight.copy_(weight)
    y = host(TOKENS)
    with torch.no_grad():
        host(TOKENS)
    assert all(torch.equal(p, before[name]) for name, p in adapter.named_parameters())
    expected = reference(TOKENS)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    wanted = torch.autograd.grad(adapter.fold(host)["weight"], [*adapter.parameters()], reference.weight.grad)
    for found, right in zip(gradients(model), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", [nn.Embedding, nn.EmbeddingBag])
def test_a_copy_of_a_sparse_embedding_has_a_sparse_gradient(cls):
    """For which it was made sparse: an optimizer of sparse gradients moves the rows that were looked up alone."""
    model = embedding(cls, sparse=True)
    peftlib.inject(model, "host", Full)
    (copy,) = peftlib.parameters(model)
    start = copy.detach().clone()
    optimizer = torch.optim.SparseAdam([copy], lr=0.1)
    model["host"](TOKENS).square().sum().backward()
    assert copy.grad is not None
    assert copy.grad.is_sparse
    optimizer.step()
    moved = (copy != start).any(1)
    assert moved.nonzero().flatten().tolist() == [1, 2, 3, 5]


# ---- complex weights


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_complex_weight_gets_complex_factors(init, dropout):
    torch.manual_seed(0)
    host = nn.Linear(6, 5, dtype=torch.complex128)
    model = nn.Sequential(host)
    x = torch.randn(3, 6, dtype=torch.complex128)
    before = model(x)
    peftlib.inject(model, "0", LoRA, rank=2, alpha=3, init=init, dropout=dropout)
    (adapter,) = [adapter for _, _, adapter in peftlib.adapters(model)]
    assert adapter.lora_A.dtype == adapter.lora_B.dtype == torch.complex128
    assert adapter.lora_A.imag.abs().max() > 0
    assert torch.equal(model(x), before)
    drawn(model)
    model.eval()
    expected = F.linear(x, host.weight + 1.5 * adapter.lora_B @ adapter.lora_A, host.bias)
    torch.testing.assert_close(model(x), expected)
    with peftlib.merged(model):
        torch.testing.assert_close(model(x), expected)
    assert torch.autograd.gradcheck(lambda *_: model(x), (adapter.lora_A, adapter.lora_B))
    model.train()

    def dropped(*_: Tensor) -> Tensor:
        torch.manual_seed(2)
        return model(x)

    assert torch.autograd.gradcheck(dropped, (adapter.lora_A, adapter.lora_B))


@pytest.mark.parametrize("tokens", [3, 512])
def test_the_gradients_of_complex_factors_are_those_of_plain_operations(tokens):
    """Of many tokens too, for which real numbers have a backward pass of their own."""
    torch.manual_seed(0)
    host = nn.Linear(256, 256, dtype=torch.complex64)
    model = nn.Sequential(host)
    peftlib.inject(model, "0", LoRA, rank=8)
    drawn(model)
    (adapter,) = [adapter for _, _, adapter in peftlib.adapters(model)]
    x = torch.randn(tokens, 256, dtype=torch.complex64, requires_grad=True)
    own = [x, adapter.lora_A, adapter.lora_B]
    expected = F.linear(x, host.weight, host.bias) + F.linear(F.linear(x, adapter.lora_A), adapter.lora_B)
    dY = torch.randn_like(expected)
    for found, wanted in zip(
        torch.autograd.grad(model(x), own, dY), torch.autograd.grad(expected, own, dY), strict=True
    ):
        torch.testing.assert_close(found, wanted)


def test_complex_rows_are_orthonormal_and_of_the_variance_of_real_ones():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 300, dtype=torch.complex64))
    rows: dict[str, Tensor] = {}
    for init in ("orthogonal", "kaiming", "gaussian"):
        peftlib.inject(model, "0", LoRA, rank=200, init=init, name=init)
        (rows[init],) = [adapter.lora_A.detach() for _, _, adapter in peftlib.adapters(model, init)]
    torch.testing.assert_close(rows["orthogonal"] @ rows["orthogonal"].mH, torch.eye(200, dtype=torch.complex64))
    assert rows["kaiming"].abs().square().mean().item() == pytest.approx(1 / 3 / 400, rel=0.05)
    assert rows["gaussian"].abs().square().mean().item() == pytest.approx(1 / 200**2, rel=0.05)


def test_a_complex_adapter_is_saved_and_loaded(tmp_path):
    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64))

    model, other, x = made(), made(), torch.randn(2, 4, dtype=torch.complex64)
    peftlib.inject(model, "0", LoRA, rank=2)
    drawn(model)
    peftlib.save(model, tmp_path / "a.safetensors")
    peftlib.load(other, tmp_path / "a.safetensors")
    assert torch.equal(other(x), model(x))


# ---- the first argument by its name


@pytest.mark.parametrize("kind", [LoRA, DoRA, IA3, Full, Bottleneck])
def test_conv1d_of_transformers_is_called_by_keyword(kind):
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(6, 4))
    peftlib.inject(model, "0", kind)
    drawn(model)
    x = torch.randn(2, 3, 4)
    assert torch.equal(model[0](x=x), model[0](x))


# ---- the layout of what a bottleneck gives


@pytest.mark.parametrize("position", ["after", "parallel"])
def test_the_sum_is_laid_out_as_what_the_host_gives(position):
    """A dropout behind it draws by memory, and a GEMM rounds by layout."""
    torch.manual_seed(0)
    host = nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(False)  # a GEMM may round otherwise with it
    model = nn.ModuleDict({"host": host})
    x = torch.randn(2, 5, 8)
    before = host(x, x, x)[0]
    peftlib.inject(model, "host", Bottleneck, width=2, position=position)
    after = host(x, x, x)[0]
    assert after.stride() == before.stride()
    assert torch.equal(after, before)
    torch.manual_seed(3)
    dropped = F.dropout(before)
    torch.manual_seed(3)
    assert torch.equal(F.dropout(after), dropped)


@pytest.mark.parametrize("norm", ["none", "before", "after"])
def test_a_sum_of_another_layout_has_the_same_values_and_gradients(norm):
    class Turned(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).transpose(0, 1).contiguous().transpose(0, 1)

    found: dict[type, list[Tensor]] = {}
    for cls in (nn.Linear, Turned):
        torch.manual_seed(0)
        model = nn.Sequential(cls(4, 6).double())
        peftlib.inject(model, "0", Bottleneck, width=3, norm=norm)
        drawn(model)
        x = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
        y = model(x)
        assert y.is_contiguous() == (cls is nn.Linear)
        found[cls] = [y, *torch.autograd.grad(y.square().sum(), [x, *peftlib.parameters(model)])]
    for plain, turned in zip(found[nn.Linear], found[Turned], strict=True):
        torch.testing.assert_close(turned, plain)


# ---- a model that does not know its embeddings


def test_a_prompt_is_refused_on_a_model_that_does_not_know_its_embeddings():
    class Unknowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def get_input_embeddings(self) -> nn.Module:
            raise NotImplementedError("not auto-handled")

        def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Any:
            return inputs_embeds

    model = nn.ModuleDict({"model": Unknowing()})
    for act in (peftlib.inject, peftlib.plan):
        with refused(model, "model", "Unknowing"):
            act(model, "model", Prompt)

"""Mixtures of experts of transformers: LoRA on the stacks, through each way in which a model runs its experts."""

import operator
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Int8Params, Params4bit
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchao.quantization import Int8Tensor
from torchao.quantization.granularity import PerRow

import peftlib
from support.mixtures import MODELS, TARGETS, logits, mixture, tokens
from support.refusals import refused

EXPERTS = ["eager", "grouped_mm", "batched_mm"]
CELLS = [(name, how) for name in MODELS for how in (EXPERTS if name != "llama4" else ["eager"])]
every_cell = pytest.mark.parametrize(("name", "how"), CELLS)


def adapted(name: str, how: str, dtype: torch.dtype = torch.float64, **lora: Any) -> Any:
    model = mixture(name, how, dtype)
    peftlib.inject(model, TARGETS.get(name, "mlp.experts"), peftlib.LoRA, rank=4, alpha=2.0, **lora)
    moved(model)
    return model


def dense(name: str, model: Any) -> Tensor:
    """Of the same mixture in float64, whose experts' loop reads W + s·B·A as a plain tensor."""
    plain = mixture(name, "eager")
    for host, _, each in peftlib.adapters(model):
        part: Any = each
        owner = plain.get_submodule(host)
        weight = owner._parameters.pop(part.param).detach() + 0.5 * part.lora_B.double() @ part.lora_A.double()
        setattr(owner, part.param, weight)
    return logits(plain)


def gradients(output: Tensor, model: Any) -> list[Tensor]:
    torch.manual_seed(3)
    given = torch.randn(output.shape, dtype=torch.float64)
    return list(torch.autograd.grad(output, list(peftlib.parameters(model)), given.to(output.dtype)))


def assert_close(found: Any, expected: Any, limit: float) -> None:
    for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert (one.double() - other.double()).abs().max() <= limit * max(1.0, other.abs().max().item())


@pytest.fixture
def any_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's grouped product has no float64; transformers' own, for where torch's does not run, has."""
    monkeypatch.setattr("transformers.integrations.moe._can_use_grouped_mm", lambda *_: False)


@every_cell
@pytest.mark.usefixtures("any_dtype")
def test_outputs_gradients_and_merged_weights_equal_dense_float64(name, how):
    model = adapted(name, how)
    found, expected = logits(model), dense(name, model)
    assert_close(found, expected, 1e-10)
    assert_close(gradients(found, model), gradients(expected, model), 1e-10)
    verified = peftlib.verify(model, tokens())
    assert verified, str(verified)
    assert not verified.materialized
    with peftlib.merged(model):
        assert_close(logits(model), expected, 1e-10)


@pytest.mark.parametrize(("name", "how"), [cell for cell in CELLS if cell[0] in ("qwen3", "gpt_oss", "llama4")])
@pytest.mark.usefixtures("any_dtype")
def test_dora_equals_dense_float64_and_makes_no_stack(name, how):
    model = mixture(name, how)
    peftlib.inject(model, TARGETS.get(name, "mlp.experts"), peftlib.DoRA, rank=4, alpha=2.0)
    base = logits(mixture(name, how))
    assert_close(logits(model), base, 1e-12)
    with torch.no_grad():
        for p in peftlib.parameters(model):
            p.mul_(1 + torch.rand(p.shape) / 4).add_(torch.randn(p.shape) / 8)
    plain = mixture(name, "eager")
    for host, _, each in peftlib.adapters(model):
        part: Any = each
        owner = plain.get_submodule(host)
        weight = owner._parameters.pop(part.param).detach() + 0.5 * part.lora_B @ part.lora_A
        gain = part.magnitude / torch.linalg.vector_norm(weight.detach(), dim=-1)
        setattr(owner, part.param, gain.unsqueeze(-1) * weight)
    found, expected = logits(model), logits(plain)
    assert_close(found, expected, 1e-10)
    assert_close(gradients(found, model), gradients(expected, model), 1e-10)
    assert not peftlib.verify(model, tokens()).materialized
    with peftlib.merged(model):
        assert_close(logits(model), expected, 1e-10)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "llama4"])
def test_torch_s_own_grouped_product_agrees(name):
    model = adapted(name, "grouped_mm", torch.float32)
    found, expected = logits(model), dense(name, model)
    assert_close(found, expected, 1e-4)  # the router's choice is the same; a thousand roundings of float32
    assert_close(gradients(found, model), gradients(expected, model), 1e-4)
    assert not peftlib.verify(model, tokens()).materialized


@every_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_no_bit(name, how, dtype):
    model = mixture(name, how, dtype)
    base = logits(model)
    peftlib.inject(model, TARGETS.get(name, "mlp.experts"), peftlib.LoRA, rank=3, dropout=0.2)
    assert torch.equal(logits(model), base)
    model.train()
    peftlib.eject(model)
    assert torch.equal(logits(model.eval()), base)


@pytest.mark.parametrize("name", MODELS)
def test_the_stacks_of_a_mixture_are_found_and_param_narrows(name):
    target = TARGETS.get(name, "mlp.experts")
    model = adapted(name, "eager")
    assert {part.param for _, _, part in peftlib.adapters(model)} == {"gate_up_proj", "down_proj"}
    narrow = mixture(name, "eager")
    peftlib.inject(narrow, target, peftlib.LoRA, param="down_proj")
    assert {part.param for _, _, part in peftlib.adapters(narrow)} == {"down_proj"}


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["qwen3", "gpt_oss"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiled_in_one_graph_no_stack_is_made(name, how, dropout, fresh_dynamo):
    model = adapted(name, how, torch.float32, dropout=dropout)
    experts = model.get_submodule("model.layers.1.mlp.experts")
    shapes = {tuple(p.shape) for _, p in experts.named_parameters(recurse=False) if p.dim() == 3}
    made: list[Any] = []

    def look(graph: Any, inputs: Any) -> Any:
        values = [node.meta.get("example_value") for node in graph.graph.nodes if node.target in ADDS]
        made.extend(value for value in values if isinstance(value, Tensor) and tuple(value.shape) in shapes)
        return graph

    compiled = torch.compile(experts.train(), fullgraph=True, backend=look)
    x, index = torch.randn(6, 16), torch.randint(0, 4, (6, 2))
    share = torch.rand(6, 2)
    results = []
    for run in (experts, compiled):
        torch.manual_seed(5)
        output = run(x, index, share)
        results.append([output, *torch.autograd.grad(output.square().sum(), list(peftlib.parameters(experts)))])
    assert not made
    if not dropout:  # a traced mask is drawn in another order
        assert_close(results[1], results[0], 1e-5)


ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}


class Quantized(nn.Module):
    """A loop over experts that torchao has packed into int8."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        packed = Int8Tensor.from_hp(torch.randn(4, 64, 32), granularity=PerRow())
        self.experts = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([nn.functional.linear(x, self.experts[expert]) for expert in range(4)])


def test_beside_quantized_experts_the_pairs_train_and_the_codes_stay():
    model: Any = Quantized()
    codes, x = model.experts.qdata.clone(), torch.randn(5, 32)
    base = model(x)
    peftlib.inject(model, Quantized, peftlib.LoRA, rank=2, alpha=4.0)
    assert torch.equal(model(x), base)
    A, B = moved(model)
    y = model(x)
    torch.testing.assert_close(y, base + 2.0 * x @ (B @ A).transpose(1, 2), rtol=1e-4, atol=1e-4)
    y.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in (A, B))
    assert torch.equal(model.experts.qdata, codes)
    with pytest.raises(peftlib.AdapterError, match="experts"):
        peftlib.merge(model)


def test_stacks_that_bitsandbytes_has_quantized_are_found_and_adapted_beside_their_codes():
    model = mixture("qwen3", "eager", torch.float32)
    experts = [model.get_submodule(f"model.layers.{layer}.mlp.experts") for layer in range(2)]
    for each in experts:
        for param in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(each, param, quant_type="nf4")
    codes = [p.clone() for each in experts for p in each.parameters()]
    values = {f"model.layers.{i}.mlp.experts.{param}": getattr(each, param).double()
              for i, each in enumerate(experts) for param in ("gate_up_proj", "down_proj")}  # fmt: skip
    peftlib.inject(model, "mlp.experts", peftlib.LoRA, rank=4, alpha=2.0)
    moved(model)
    plain = mixture("qwen3", "eager")
    for host, _, each in peftlib.adapters(model):
        part: Any = each
        weight = values[f"{host}.{part.param}"] + 0.5 * part.lora_B.detach().double() @ part.lora_A.detach().double()
        with torch.no_grad():
            plain.get_submodule(host).get_parameter(part.param).copy_(weight)
    found = logits(model)
    assert_close(found, logits(plain), 1e-4)  # the router's choice is the same; a thousand roundings of float32
    assert not peftlib.verify(model, tokens()).materialized
    found.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in peftlib.parameters(model))
    assert all(
        torch.equal(one, p)
        for one, p in zip(codes, (p for each in experts for p in each.parameters() if not p.requires_grad), strict=True)
    )
    with refused(model, "model.layers.0.mlp.experts.gate_up_proj"):
        peftlib.merge(model)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("pack", [Params4bit, Int8Params])
def test_a_stack_packed_into_whole_numbers_is_refused_by_its_dtype(pack, rank):
    model: Any = Quantized()
    model.experts = pack(torch.randn(4, 32, 32).half(), requires_grad=False).to("cpu")
    dtype = str(model.experts.dtype)
    with refused(model, "Quantized.experts", dtype):
        peftlib.inject(model, Quantized, peftlib.LoRA, param="experts", rank=rank)


def test_where_quantized_experts_would_be_made_whole_the_function_is_named():
    class Flat(Quantized):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.experts.flatten(0, 1).t()

    model = Flat()
    peftlib.inject(model, Flat, peftlib.LoRA, rank=2)
    with pytest.raises(peftlib.AdapterError, match=r"experts .* flatten"):
        model(torch.randn(5, 32))


def moved(model: nn.Module) -> list[nn.Parameter]:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in peftlib.parameters(model):
            p.copy_(torch.randn(p.shape) / 4)
    return list(peftlib.parameters(model))

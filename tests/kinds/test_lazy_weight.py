"""A weight that LoRA changes and never makes: each function that has a rule, and what happens to the others."""

import copy
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peftlib
from peftlib._core.lazy_weight import RULES as WITH_A_RULE
from support import reference

E, OUT, IN, TOKENS = 3, 8, 4, 5
OFFSETS = [2, 2, 5]  # the second of three experts gets no token
Read = Callable[[Any, Tensor], Any]
GROUPED: Any = vars(torch)["_grouped_mm"]  # what versions of torch before 2.10 have alone


class Reader(nn.Module):
    """Reads its weights as the case says: a stack of matrices and a matrix."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(E, OUT, IN))
        self.weight = nn.Parameter(torch.randn(OUT, IN))
        self.read = read

    def forward(self, x: Tensor) -> Any:
        return self.read(self, x)


def adapted(read: Read, dtype: torch.dtype = torch.float64, names: tuple[str, ...] = ("default",), **lora: Any) -> Any:
    """A reader with moved LoRA on both of its weights, under each name."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(Reader(read)).to(dtype)
    for name in names:
        peftlib.inject(model, "0", peftlib.LoRA, param=["stack", "weight"], rank=2, alpha=3.0, name=name, **lora)
    return moved(model)


def moved(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in peftlib.parameters(model):
            p.copy_(torch.randn(p.shape) / 2)
    return model


def dense(model: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """The same module with plain weights, W + Σ s·B·A by hand, that are not leaves."""
    plain: Any = model[0]
    weights = {name: plain.get_parameter(name).detach() for name in ("stack", "weight")}
    for _, _, each in peftlib.adapters(model):
        part: Any = each
        delta = part.lora_B @ part.lora_A
        if part.init == "pissa":
            delta = delta - part.initial_B @ part.initial_A
        weights[part.param] = weights[part.param] + 1.5 * delta
    reader = Reader(plain.read)
    for name, weight in weights.items():
        del reader._parameters[name]
        setattr(reader, name, weight)
    return reader, weights


def gradients(output: Any, model: Any, x: Tensor) -> list[Tensor | None]:
    outputs = [each for each in tree_leaves(output) if each.requires_grad]
    torch.manual_seed(2)
    given = [torch.randn_like(each) for each in outputs]
    return list(torch.autograd.grad(outputs, [*peftlib.parameters(model), x], given, allow_unused=True))


def assert_equal(found: Any, expected: Any, name: str = "") -> None:
    limit = LIMITS.get(name, 1e-10)
    for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.shape == other.shape
            assert (one - other).abs().max() <= limit * max(1.0, other.abs().max().item())


def stacked(x: Tensor) -> Tensor:
    """[E, tokens, in], each expert its own."""
    return torch.stack([x, x.cos(), x.sin()])


def out_of(x: Tensor) -> Tensor:
    """[tokens, out]: what is multiplied with rows."""
    return x @ torch.linspace(-1, 1, IN * OUT, dtype=x.dtype).view(IN, OUT)


def of_some_tokens(x: Tensor, stack: Any) -> Tensor:
    """Of a token that no offset covers torch leaves the row, and its gradient, as it found the memory: none is read."""
    uncovered = torch.cat([x[:-1], torch.zeros_like(x[-1:])])
    return GROUPED(uncovered, stack, offs=offsets() - 1)[:-1]


def offsets() -> Tensor:
    return torch.tensor(OFFSETS, dtype=torch.int32)


PRODUCTS: dict[str, Read] = {
    "linear": lambda m, x: F.linear(x, m.weight),
    "linear with a bias": lambda m, x: F.linear(x, m.weight, torch.arange(OUT, dtype=x.dtype)),
    "linear of a keyword": lambda m, x: F.linear(input=x, weight=m.weight, bias=None),
    "matmul": lambda m, x: torch.matmul(out_of(x), m.weight),
    "matmul from the left": lambda m, x: torch.matmul(m.weight, x.t()),
    "matmul of a vector": lambda m, x: torch.matmul(m.weight, x[0]),
    "matmul by the operator": lambda m, x: x @ m.weight.t(),
    "matmul of a batch": lambda m, x: stacked(x) @ m.stack.transpose(1, 2),
    "matmul broadcast over the stack": lambda m, x: x @ m.stack.mT,
    "mm": lambda m, x: torch.mm(out_of(x), m.weight),
    "mm as a method": lambda m, x: m.weight.mm(x.t()),
    "bmm": lambda m, x: torch.bmm(stacked(out_of(x)), m.stack),
    "bmm from the left": lambda m, x: torch.bmm(m.stack, stacked(x).transpose(1, 2)),
    "addmm": lambda m, x: torch.addmm(x, out_of(x), m.weight, beta=0.5, alpha=2.0),
    "addmm from the left": lambda m, x: torch.addmm(x.new_ones(OUT, TOKENS), m.weight, x.t(), alpha=-1.0),
    "baddbmm": lambda m, x: torch.baddbmm(stacked(x), stacked(out_of(x)), m.stack, beta=2.0, alpha=0.5),
    "grouped_mm": lambda m, x: F.grouped_mm(x.float(), m.stack.float().mT, offs=offsets()).double(),
    "grouped_mm of a batch": lambda m, x: F.grouped_mm(stacked(x).float(), m.stack.float().mT).double(),
    "_grouped_mm": lambda m, x: GROUPED(x.float(), m.stack.float().mT, offs=offsets()).double(),
    "einsum with rows": lambda m, x: torch.einsum("to,oi->ti", out_of(x), m.weight),
    "einsum with columns": lambda m, x: torch.einsum("oi,ti->to", m.weight, x),
    "einsum with a stack": lambda m, x: torch.einsum("ti,eoi->teo", x, m.stack),
    "einsum of three": lambda m, x: torch.einsum("te,eoi,ti->to", x[:, :E].softmax(-1), m.stack, x),
    "einsum with dots": lambda m, x: torch.einsum("...i,oi->...o", stacked(x), m.weight),
    "einsum that says no output": lambda m, x: torch.einsum("ti,oi", x, m.weight),
    "einsum of a batch": lambda m, x: torch.einsum("eti, eoi -> eto", stacked(x), m.stack),
    "einsum to a sum": lambda m, x: torch.einsum("ti,eoi->", x, m.stack),
}
VIEWS: dict[str, Read] = {
    "one expert": lambda m, x: F.linear(x, m.stack[1]),
    "one expert, counted from the end": lambda m, x: F.linear(x, m.stack[-1]),
    "one expert by a tensor": lambda m, x: F.linear(x, m.stack[torch.tensor(2)]),
    "the same expert twice": lambda m, x: F.linear(x, m.stack[1]) * F.linear(x, m.stack[1]),
    "experts by numbers": lambda m, x: torch.bmm(m.stack[torch.tensor([2, 0, 2, 1, 2])], x.unsqueeze(-1)),
    "experts by a list": lambda m, x: x @ m.stack[[0, 2]].mT,
    "experts by a mask": lambda m, x: x @ m.stack[torch.tensor([True, False, True])].mT,
    "experts by a slice": lambda m, x: x @ m.stack[1:].mT,
    "rows of all": lambda m, x: x @ m.stack[:, :2].mT,
    "rows and columns": lambda m, x: x[:, 1:3] @ m.stack[1, 2:, 1:3].t(),
    "columns behind dots": lambda m, x: x[:, :2] @ m.stack[..., :2].mT,
    "rows of a matrix": lambda m, x: F.linear(x, m.weight[2:4]),
    "rows by their numbers": lambda m, x: x + m.weight[torch.tensor([1, 1, 0, 5, 2])],
    "a grid of rows": lambda m, x: x + m.weight[torch.tensor([[1, 1, 0, 5, 2], [0, 0, 0, 1, 2]])],
    "chunks of rows": lambda m, x: [F.linear(x, part) for part in m.weight.chunk(2)],
    "chunks of columns": lambda m, x: [x[:, :2] @ part.t() for part in m.weight.chunk(2, dim=-1)],
    "chunks of a stack's rows": lambda m, x: [x @ part.mT for part in torch.chunk(m.stack, 2, dim=1)],
    "a split of experts": lambda m, x: [x @ part.mT for part in m.stack.split([1, 2])],
    "a split of rows": lambda m, x: [F.linear(x, part) for part in torch.split(m.weight, 4)],
    "a tensor_split": lambda m, x: [x @ part.mT for part in torch.tensor_split(m.stack, 2, dim=0)],
    "unbind": lambda m, x: [F.linear(x, each) for each in m.stack.unbind()],
    "a loop over the stack": lambda m, x: [F.linear(x, each) for each in m.stack],
    "select": lambda m, x: F.linear(x, m.stack.select(0, 2)),
    "narrow": lambda m, x: F.linear(x, m.weight.narrow(0, 1, 3)),
    "narrow columns": lambda m, x: x[:, :3] @ torch.narrow(m.stack, 2, 1, 3).mT,
    "index_select": lambda m, x: x @ m.stack.index_select(0, torch.tensor([2, 2])).mT,
    "transpose of a matrix": lambda m, x: x @ m.weight.transpose(0, 1),
    "swapaxes": lambda m, x: x @ torch.swapaxes(m.stack, 1, 2),
    "swapdims": lambda m, x: x @ m.stack.swapdims(-1, -2),
    "T": lambda m, x: x @ m.weight.T,
    "permute": lambda m, x: x @ m.stack.permute(0, 2, 1),
    "permute by a list": lambda m, x: x @ torch.permute(m.stack, [0, 2, 1]),
    "a transpose there and back": lambda m, x: x @ m.stack.mT.transpose(1, 2).mT,
    "view": lambda m, x: x @ m.stack.view(1, E, OUT, IN).mT,
    "reshape": lambda m, x: x @ m.stack.reshape(E, 1, OUT, IN).mT[:, 0],
    "contiguous": lambda m, x: x @ m.stack.contiguous().mT.contiguous(),
    "to": lambda m, x: F.linear(x, m.weight.to(x.dtype).to(x)),
    "a cast": lambda m, x: F.linear(x.float(), m.weight.float()).double(),
    "half": lambda m, x: F.linear(x.half(), m.weight.half()).double(),
    "bfloat16": lambda m, x: F.linear(x.bfloat16(), m.weight.bfloat16()).double(),
    "double and cpu": lambda m, x: F.linear(x.double(), m.weight.float().double().cpu()),
    "type_as": lambda m, x: F.linear(x, m.weight.type_as(x)),
    "detach": lambda m, x: F.linear(x, m.weight.detach()) + F.linear(x, m.weight),
    "embedding": lambda m, x: x + F.embedding(torch.tensor([1, 1, 0, 5, 2]), m.weight),
    "embedding with padding": lambda m, x: x + F.embedding(torch.tensor([1, 1, 0, 5, 2]), m.weight, padding_idx=1),
}
RULES = PRODUCTS | VIEWS
FLOAT32 = {
    "a cast",
    "double and cpu",
    "grouped_mm",
    "grouped_mm of a batch",
    "_grouped_mm",
    "grouped_mm by rows",
    "grouped_mm of some tokens",
}  # torch has no other grouped product
LIMITS = dict.fromkeys(FLOAT32, 1e-5) | {"half": 1e-2, "bfloat16": 8e-2}  # a hundred roundings, and ten


def case(read: Read, **lora: Any) -> tuple[Any, Tensor]:
    model = adapted(read, **lora)
    return model, torch.randn(TOKENS, IN, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("name", RULES)
def test_a_function_with_a_rule_equals_the_dense_weight_and_never_makes_it(name):
    model, x = case(RULES[name])
    reader, _ = dense(model)
    found, expected = model(x), reader(x)
    assert_equal(found, expected, name)
    assert_equal(gradients(found, model, x), gradients(expected, model, x), name)
    assert not peftlib.verify(model, x).materialized


@pytest.mark.parametrize("name", RULES)
def test_a_function_with_a_rule_sums_two_adapters_of_which_one_started_from_singular_vectors(name):
    model = adapted(RULES[name])
    peftlib.inject(model, "0", peftlib.LoRA, param=["stack", "weight"], rank=2, alpha=3.0, name="other", init="pissa")
    peftlib.activate(moved(model), "default", "other")
    x = torch.randn(TOKENS, IN, dtype=torch.float64, requires_grad=True)
    reader, _ = dense(model)
    found, expected = model(x), reader(x)
    assert_equal(found, expected, name)
    assert_equal(gradients(found, model, x), gradients(expected, model, x), name)
    assert not peftlib.verify(model, x).materialized


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fresh_adapter_changes_no_bit(name, dtype, init):
    torch.manual_seed(0)
    model: Any = nn.Sequential(Reader(RULES[name])).to(dtype)
    x = torch.randn(TOKENS, IN, dtype=dtype, requires_grad=True)
    base = model(x)
    peftlib.inject(model, "0", peftlib.LoRA, param=["stack", "weight"], rank=2, init=init)
    for one, other in zip(tree_leaves(model(x)), tree_leaves(base), strict=True):
        assert torch.equal(one, other)


# A gain beside it: DoRA on the stack

WITHOUT_A_GAIN = {
    "baddbmm", "einsum with a stack", "einsum of three", "einsum of a batch", "einsum to a sum", "rows of all",
    "rows and columns", "columns behind dots", "chunks of a stack's rows", "a split of experts", "a tensor_split",
    "select", "narrow columns", "index_select", "swapaxes", "swapdims", "permute", "permute by a list", "view",
    "reshape", "matmul of a vector", "grouped_mm of a batch", "linear of the weight", "an expert with another",
    "grouped_mm of the weight", "rows of an expert by their numbers", "rows of an expert", "rows by a mask",
    "unbind of rows", "unbind of an expert", "rows before experts",
}  # fmt: skip
ON_STACKS = {name: read for name, read in RULES.items() if "stack" in read.__code__.co_names} | {
    "mT": lambda m, x: x @ m.stack[2].mT,
    "T of an expert": lambda m, x: x @ m.stack[2].T,
    "t": lambda m, x: torch.mm(x, m.stack[2].t()),
    "transpose": lambda m, x: x @ m.stack.transpose(-1, -2),
    "linear of a transpose": lambda m, x: F.linear(out_of(x), m.stack[2].t()),
    "linear with a bias": lambda m, x: F.linear(x, m.stack[2], torch.arange(OUT, dtype=x.dtype)),
    "matmul from the left": lambda m, x: m.stack[2] @ x.t(),
    "matmul from the left of a transpose": lambda m, x: m.stack[2].t() @ out_of(x).t(),
    "matmul of a vector": lambda m, x: (m.stack @ x[0], out_of(x)[0] @ m.stack),
    "a cast of a stack": lambda m, x: (x.float() @ m.stack.float().mT).double(),
    "select": lambda m, x: F.linear(x, m.stack.select(0, 2)),
    "linear of the weight": lambda m, x: F.linear(m.stack[1], x),
    "an expert with another": lambda m, x: x @ (m.stack[0].t() @ m.stack[1]).t(),
    "grouped_mm by rows": lambda m, x: GROUPED(out_of(x).float(), m.stack.float(), offs=offsets()).double(),
    "grouped_mm of the weight": lambda m, x: GROUPED(m.stack[1].float(), stacked(x)[:, :4].float(), offs=BOTH).double(),
    "grouped_mm of some tokens": lambda m, x: of_some_tokens(x.float(), m.stack.float().mT).double(),
    "rows of an expert by their numbers": lambda m, x: x + m.stack[1][torch.tensor([1, 1, 0, 5, 2])],
    "rows of an expert": lambda m, x: x @ m.stack[1][2:4].t(),
    "rows before experts": lambda m, x: x.sum() * m.stack.transpose(0, 1),
    "a cast by a keyword": lambda m, x: F.linear(x.float(), m.stack[1].to(dtype=torch.float32)).double(),
    "unbind of rows": lambda m, x: [x @ each.t() for each in m.stack.unbind(1)],
    "unbind of an expert": lambda m, x: [x @ each for each in m.stack[1].unbind()],
    "unbind counted from the end": lambda m, x: [F.linear(x, each) for each in m.stack.unbind(-3)],
    "rows by a mask": lambda m, x: x.sum() * m.stack[torch.arange(E * OUT).view(E, OUT) > 3],
}
BOTH = torch.tensor([3, 3, OUT], dtype=torch.int32)


def gained(read: Read) -> tuple[Any, Any, Tensor]:
    """DoRA on the stack, and the same module with the stack that it stands for, its norms constant."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(Reader(read)).double()
    x = torch.randn(TOKENS, IN, dtype=torch.float64, requires_grad=True)
    peftlib.inject(model, "0", peftlib.DoRA, param="stack", rank=2, alpha=3.0)
    A, B, magnitude = peftlib.parameters(moved(model))
    stack = model[0].stack.detach() + 1.5 * B @ A
    reader: Any = Reader(read)
    reader._parameters.clear()
    norms = torch.linalg.vector_norm(stack.detach(), dim=-1)
    reader.stack, reader.weight = (magnitude / norms).unsqueeze(-1) * stack, model[0].weight.detach()
    return model, reader, x


@pytest.mark.parametrize("name", ON_STACKS)
def test_a_gain_of_rows_equals_the_dense_weight(name):
    model, reader, x = gained(ON_STACKS[name])
    found, expected = model(x), reader(x)
    limits = name if name in LIMITS else "a cast" if "cast" in name else ""
    assert_equal(found, expected, limits)
    assert_equal(gradients(found, model, x), gradients(expected, model, x), limits)
    assert bool(peftlib.verify(model, x).materialized) == (name in WITHOUT_A_GAIN)


# The table of them in the docs


def short(function: Any) -> str:
    """linear, __getitem__, mT: of a function, a method, a property, or of an operator by its own name."""
    if isinstance(function, str):
        return function
    name = function.__name__
    return (resolve_name(function) or name).split(".")[-2] if name == "__get__" else name


def documented() -> set[str]:
    text = (Path(__file__).parents[2] / "docs" / "experts.md").read_text()
    table = text.split("The functions that have a rule", 1)[1].split("\n\n")[1]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


class Called(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(not isinstance(each, nn.Parameter) and type(each) is not Tensor for each in types):
            self.names.add(short(func))
        return func(*args, **kwargs or {})


def test_the_table_in_the_docs_has_each_function_that_has_a_rule():
    assert documented() == {short(function) for function in WITH_A_RULE}


def test_each_function_of_the_table_has_a_case_here():
    with Called() as called:
        for read in RULES.values():
            model, x = case(read)
            model(x)
        for make, shape, _ in LAYERS.values():
            model = nn.Sequential(make())
            peftlib.inject(model, "0", peftlib.LoRA, rank=2)
            model(torch.randn(shape))
    # `cuda` is `cpu` on another machine; the others are of traced weights, of torch's layer, and of transformers
    elsewhere = {"cuda", "__rmatmul__", "bilinear", "transformers::grouped_mm_fallback"}
    assert documented() - called.names == elsewhere


# Without a rule


def past_functions(run: Callable[[], Tensor]) -> Tensor:
    """As from C++, below torch's functions."""
    with torch._C.DisableTorchFunctionSubclass():
        return run()


WHOLE: dict[str, tuple[Read, str]] = {
    "a product of elements": (lambda m, x: F.linear(x, m.weight * 2), "mul"),
    "a power": (lambda m, x: F.linear(x, m.weight**2), "pow"),
    "a norm": (lambda m, x: x * m.weight.norm(), "norm"),
    "joined weights": (lambda m, x: F.linear(x, torch.cat([m.weight, m.weight])), "cat"),
    "a column": (lambda m, x: x + m.weight[:, 1].sum(), "getitem"),
    "a flat view": (lambda m, x: x @ m.stack.view(E * OUT, IN).T, "view"),
    "an outer product": (lambda m, x: torch.einsum("t,oi->toi", x[:, 0], m.weight), "einsum 't,oi->toi'"),
    "elements, not rows": (lambda m, x: torch.einsum("ti,ti->ti", x[:1].expand(OUT, IN), m.weight), "einsum"),
    "the weight with itself": (lambda m, x: F.linear(x, m.weight @ m.weight.t() @ m.weight), "matmul"),
    "a computed property": (lambda m, x: x @ m.weight.H, "H"),
    "an operator of torch": (lambda m, x: torch.ops.aten.mm.default(x, m.weight.t()), "mm"),
    "an operator from C++ with a keyword": (
        lambda m, x: x @ past_functions(lambda: torch.add(m.weight, 1.0, alpha=2.0)).t(),
        "add",
    ),
    "a map over the stack": (lambda m, x: torch.vmap(lambda w: x @ w.T)(m.stack), ""),
    "a change in place": (lambda m, x: (m.weight.mul_(2), F.linear(x, m.weight))[1], "mul_"),
    "an entry set": (lambda m, x: (m.weight.__setitem__(0, 1.0), F.linear(x, m.weight))[1], "setitem"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_function_without_a_rule_gets_the_whole_weight_and_is_named(name):
    read, function = WHOLE[name]
    model, x = case(read)
    reader, _ = dense(model)
    found, expected = model(x), reader(x)
    assert_equal(found, expected)
    assert_equal(gradients(found, model, x), gradients(expected, model, x))
    verified = peftlib.verify(model, x)
    assert any(function in line and " on 0." in line for line in verified.materialized)
    assert all(line in str(verified) for line in verified.materialized)


@pytest.mark.parametrize("name", ["a power", "joined weights", "a flat view", "an outer product"])
def test_the_whole_weight_is_less_what_started_from_singular_vectors(name):
    read, _ = WHOLE[name]
    model = adapted(read)
    peftlib.inject(model, "0", peftlib.LoRA, param=["stack", "weight"], rank=2, alpha=3.0, name="other", init="pissa")
    peftlib.activate(moved(model), "default", "other")
    x = torch.randn(TOKENS, IN, dtype=torch.float64, requires_grad=True)
    reader, _ = dense(model)
    found, expected = model(x), reader(x)
    assert_equal(found, expected)
    assert_equal(gradients(found, model, x), gradients(expected, model, x))


def test_the_gradient_past_torch_s_functions_is_less_what_started_from_singular_vectors():
    model = adapted(lambda m, x: Product.apply(x, m.weight))
    peftlib.inject(model, "0", peftlib.LoRA, param="weight", rank=2, alpha=3.0, name="other", init="pissa")
    peftlib.activate(moved(model), "default", "other")
    x = torch.randn(TOKENS, IN, dtype=torch.float64, requires_grad=True)
    reader, _ = dense(model)
    found, expected = model(x), reader(x)
    assert_equal(found, expected)
    assert_equal(gradients(found, model, x), gradients(expected, model, x))


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
def test_the_whole_weight_is_made_in_full_precision_under_autocast_and_of_half_precision_factors(factors):
    model = adapted(lambda m, x: m.weight * 2, torch.float32)
    part: Any = next(part.to(factors) for _, _, part in peftlib.adapters(model) if part.param == "weight")
    A, B = part.lora_A.detach().float(), part.lora_B.detach().float()
    expected = 2 * (model[0].weight + 1.5 * B @ A)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(torch.ones(1))
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= 1e-5


def test_the_whole_kernel_of_a_convolution_is_made_over_all_its_taps():
    class Doubled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return F.conv2d(input, self.weight * 2, self.bias)

    model: Any = nn.Sequential(Doubled(4, 6, (3, 2))).double()
    plain, x = copy.deepcopy(model), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    peftlib.inject(model, "0", peftlib.LoRA, rank=2, alpha=3.0)
    A, B = peftlib.parameters(moved(model))
    with torch.no_grad():
        plain[0].weight += 1.5 * reference.rows(A, B, plain[0].weight)
    assert_equal(model(x), plain(x))
    assert "mul" in str(peftlib.verify(model, x).materialized)


def facts(weight: Any) -> dict[str, Any]:
    """What a module may ask of a weight without reading a value."""
    return {
        "shape": tuple(weight.shape), "sizes": tuple(weight.size()), "rows": weight.size(dim=-2), "length": len(weight),
        "dimensions": (weight.dim(), weight.ndim), "elements": (weight.numel(), torch.numel(weight)),
        "strides": weight.stride(), "dtype": weight.dtype, "device": weight.device, "layout": weight.layout,
        "contiguous": weight.is_contiguous(), "floating": torch.is_floating_point(weight) and not weight.is_complex(),
        "element": (weight.element_size(), weight.itemsize), "on": (weight.is_cuda, weight.is_meta),
        "is a tensor": isinstance(weight, Tensor),
    }  # fmt: skip


@pytest.mark.parametrize("pick", [lambda m: m.stack, lambda m: m.weight, lambda m: m.stack[0].mT])
def test_what_a_weight_is_can_be_asked_without_making_it(pick):
    told: list[Any] = []

    def read(m: Any, x: Tensor) -> Tensor:
        told.append(facts(pick(m)))
        return x * pick(m).shape[-1] + F.linear(x, m.weight).sum()

    model, x = case(read)
    assert not peftlib.verify(model, x).materialized
    base = Reader(read).double()
    base(x)
    assert all(each == told[-1] for each in told[:-1])


def test_a_weight_requires_a_gradient_where_its_factors_do():
    told: list[bool] = []
    model, x = case(lambda m, x: told.append(m.weight.requires_grad) or F.linear(x, m.weight))
    model(x)
    peftlib.train_only(model)
    model(x)
    assert told == [True, False]


# Dropout


def mask(model: Any, x: Tensor) -> Tensor:
    """What dropout leaves of an input of ones: with W = 0 and B·A the identity the output is the dropped input."""
    probe = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in probe.named_parameters():
            p.zero_() if "lora" not in name else p.copy_(torch.eye(*p.shape[-2:]).expand(p.shape))
    torch.manual_seed(3)
    return probe(torch.ones_like(x)).detach()


SQUARE: dict[str, tuple[Read, bool]] = {
    "linear": (lambda m, x: F.linear(x, m.weight), False),
    "matmul": (lambda m, x: x @ m.weight, True),
    "mm": (lambda m, x: torch.mm(x, m.weight.t()), False),
    "addmm": (lambda m, x: torch.addmm(torch.zeros_like(x), x, m.weight), True),
    "einsum": (lambda m, x: torch.einsum("ti,oi->to", x, m.weight), False),
}


@pytest.mark.parametrize("name", SQUARE)
def test_dropout_acts_on_the_input_of_the_low_rank_product(name):
    read, turned = SQUARE[name]
    torch.manual_seed(0)
    model: Any = nn.Sequential(Square(read)).double()
    peftlib.inject(model, "0", peftlib.LoRA, param="weight", rank=4, alpha=4.0, dropout=0.4)
    moved(model)
    x = torch.randn(TOKENS, 4, dtype=torch.float64, requires_grad=True)
    kept = mask(model, x)
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    torch.manual_seed(3)
    found = model(x)
    A, B = peftlib.parameters(model)
    W, delta = model[0].get_parameter("weight"), B @ A
    expected = (x @ W + (kept * x) @ delta) if turned else (x @ W.t() + (kept * x) @ delta.t())
    assert_equal(found, expected)
    assert_equal(gradients(found, model, x), gradients(expected, model, x))
    assert_equal(model.eval()(x), x @ (W + delta) if turned else x @ (W + delta).t())


class Square(nn.Module):
    def __init__(self, read: Read) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, x)


@pytest.mark.parametrize("name", ["a product of elements", "a norm", "joined weights", "an outer product"])
def test_dropout_is_refused_at_a_call_that_has_no_input_to_drop_from(name):
    read, function = WHOLE[name]
    model, x = case(read, dropout=0.3)
    with pytest.raises(peftlib.AdapterError, match=function):
        model(x)
    reader, _ = dense(model)
    assert_equal(model.eval()(x), reader(x))


@pytest.mark.parametrize("name", ["rows by their numbers", "embedding"])
def test_dropout_is_refused_where_rows_are_looked_up(name):
    model, x = case(VIEWS[name], dropout=0.3)
    with pytest.raises(peftlib.AdapterError, match="dropout"):
        model(x)


def test_dropout_between_shares_and_experts_gives_both_their_gradients():
    """The mask is drawn again in backward; the shares, that come from elsewhere, have a gradient there too."""
    spread = "te,teh,eoh->to"
    model, x = case(lambda m, x: torch.einsum(spread, m.shares, x[:, None].expand(-1, E, -1), m.stack), dropout=0.4)
    model[0].shares = torch.randn(TOKENS, E, dtype=torch.float64, requires_grad=True)
    inputs = [model[0].shares, x, *(p for n, p in model.named_parameters() if "lora" in n)][:4]

    def run() -> Tensor:
        torch.manual_seed(3)
        return model(x).square().sum()

    found = torch.autograd.grad(run(), inputs, allow_unused=True)
    for leaf, gradient in zip(inputs, found, strict=True):
        step = torch.randn_like(leaf) * 1e-6
        with torch.no_grad():
            leaf += step
            ahead = run()
            leaf -= 2 * step
            behind = run()
            leaf += step
        assert (ahead - behind).item() / 2 == pytest.approx((gradient * step).sum().item(), rel=1e-5)


def test_a_second_derivative_past_torch_s_functions_is_refused():
    model, x = case(lambda m, x: Product.apply(x, m.weight))
    (first, *_) = torch.autograd.grad(model(x).square().sum(), list(peftlib.parameters(model))[2:], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_dropout_is_refused_between_two_inputs():
    model, x = case(lambda m, x: torch.einsum("ti,ti,oi->to", x, x, m.weight), dropout=0.3)
    with pytest.raises(peftlib.AdapterError, match="einsum"):
        model(x)


# What goes past torch's functions


class Product(torch.autograd.Function):
    """A product of someone else, with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad_outputs[0] @ weight, grad_outputs[0].t() @ x


class Products(torch.autograd.Function):
    """The same with each matrix of a stack."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: Tensor) -> Tensor:
        ctx.save_for_backward(x, stack)
        return x @ stack.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        x, stack = ctx.saved_tensors
        return (grad_outputs[0] @ stack).sum(0), grad_outputs[0].transpose(1, 2) @ x


def test_the_gradient_of_a_function_of_someone_else_reaches_the_factors():
    model, x = case(lambda m, x: Product.apply(x, m.weight))
    reader, _ = dense(model)
    found, expected = model(x), reader(x)
    assert_equal(found, expected)
    assert_equal(gradients(found, model, x), gradients(expected, model, x))


@pytest.mark.parametrize("frozen", [(), ("magnitude",), ("lora_A",), ("lora_A", "lora_B")], ids=str)
def test_the_gradient_of_a_function_of_someone_else_reaches_the_gain_and_the_factors(frozen):
    model, reader, x = gained(lambda m, x: Products.apply(x, m.stack))
    found, expected = model(x), reader(x)
    assert_equal(found, expected)
    trained = [p for name, p in model.named_parameters() if "adapters" in name and not name.endswith(frozen or "none")]
    given = torch.randn_like(found)
    expected = torch.autograd.grad(expected, [*trained, x], given)
    for p in model.parameters():
        p.requires_grad_(any(p is each for each in trained))
    assert_equal(torch.autograd.grad(model(x), [*trained, x], given), expected)


def test_a_base_that_trains_beside_a_gain_gets_its_gradient_through_it():
    """Past torch's functions and by them alike."""
    model, _, x = gained(lambda m, x: x @ m.stack[1].mT + Products.apply(x, m.stack)[1])
    model[0].stack.requires_grad_()
    norms = torch.linalg.vector_norm(model[0].stack.detach() + 1.5 * torch.matmul(*parts_of(model)), dim=-1)
    gain = (list(peftlib.parameters(model))[2] / norms)[1].detach()
    (found,) = torch.autograd.grad(model(x).sum(), [model[0].stack])
    assert_equal(found[1], 2 * gain.unsqueeze(-1) * x.detach().sum(0))
    assert not found[0].count_nonzero()


def parts_of(model: Any) -> tuple[Tensor, Tensor]:
    A, B, _ = (p.detach() for p in peftlib.parameters(model))
    return B, A


def test_a_part_in_a_function_of_someone_else_is_refused_while_it_trains():
    """Its gradient would end there; without training it is right."""
    model, x = case(lambda m, x: Product.apply(x, m.stack[1]) + F.linear(x, m.stack[0]))
    with pytest.raises(peftlib.AdapterError, match="stack"):
        model(x)
    reader, _ = dense(model)
    with torch.no_grad():
        assert_equal(model(x), reader(x))
    peftlib.train_only(model)
    assert_equal(model(x), reader(x))


def test_a_change_in_place_is_gone_after_the_call():
    model, x = case(lambda m, x: (m.weight.mul_(2), F.linear(x, m.weight))[1])
    assert torch.equal(model(x), model(x))


# Beside the rest of torch and of peftlib


def test_other_adapters_around_it_read_the_changed_weight():
    model, x = case(lambda m, x: torch.einsum("ti,eoi->teo", x, m.stack) + F.linear(x, m.weight)[:, None])
    peftlib.inject(model, "0", peftlib.DoRA, param="stack", rank=2, name="direction")
    peftlib.inject(model, "0", peftlib.LoRA, param="stack", rank=2, name="more", alpha=3.0)
    peftlib.activate(moved(model), "default", "direction", "more")
    live = model(x)
    live.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in peftlib.parameters(model))
    with peftlib.merged(model):
        assert_equal(live, model(x))


@pytest.mark.parametrize("name", ["one expert", "bmm", "matmul from the left", "linear of a transpose"])
def test_a_gain_beside_half_precision_gives_half_precision(name):
    model, reader, x = gained(ON_STACKS[name])
    model[0].bfloat16()
    for _, _, part in peftlib.adapters(model):
        part.float()
    y = model(x.detach().bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.double() - reader(x)).abs().max() <= 0.1 * y.abs().max()  # eight roundings


def test_half_of_a_gain_s_effect_is_half_of_the_change():
    model, reader, x = gained(lambda m, x: x @ m.stack[1].mT)
    full = reader(x)
    with peftlib.activate(model):
        base = model(x)
    peftlib.activate(model, {"default": 0.5})
    assert_equal(model(x), (base + full) / 2)
    assert_equal(gradients(model(x), model, x), gradients((base + full) / 2, model, x))


def test_an_adapter_around_a_gain_gets_its_whole_and_is_named():
    model, reader, x = gained(lambda m, x: torch.einsum("ti,eoi->teo", x, m.stack))
    peftlib.inject(model, "0", peftlib.LoRA, param="stack", rank=2, name="more", alpha=3.0)
    peftlib.activate(model, "default", "more")
    assert_equal(model(x), reader(x))
    moved(model)
    live = model(x)
    live.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in peftlib.parameters(model))
    with peftlib.merged(model):
        assert_equal(live, model(x))
    assert any("LoRA" in line for line in peftlib.verify(model, x).materialized)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_equal_gradients(reentrant):
    model, x = case(
        lambda m, x: torch.tanh(F.linear(x, m.weight)) @ m.stack[1] + x @ m.stack[0].t() @ m.weight, dropout=0.2
    )
    results = []
    for run in (model, lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)):
        torch.manual_seed(4)
        x.grad = None
        model.zero_grad()
        run(x).square().sum().backward()
        results.append([p.grad.clone() for p in [*peftlib.parameters(model), x]])
    assert_equal(*results)


def test_autocast_computes_in_its_dtype_and_keeps_the_factors_own():
    model, _ = case(lambda m, x: torch.bmm(F.linear(x, m.weight).expand(E, TOKENS, OUT), m.stack))
    model.float()
    x = torch.randn(TOKENS, IN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model(x), rtol=0.1, atol=0.1)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.abs().max() > 0 for p in peftlib.parameters(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_beside_half_precision_the_factors_stay_float32(dtype):
    model = adapted(lambda m, x: (x @ m.stack.mT).sum(0) + F.linear(x, m.weight[:]), dtype)
    assert {p.dtype for p in peftlib.parameters(model)} == {torch.float32}
    x = torch.randn(TOKENS, IN, dtype=dtype)
    reader, _ = dense(copy.deepcopy(model).double())
    y = model(x)
    assert y.dtype == dtype
    assert (y.double() - reader(x.double())).abs().max() <= 8 * torch.finfo(dtype).eps * y.abs().max()  # 8 roundings


def test_transforms_of_torch_func_are_equal():
    model, x = case(lambda m, x: torch.tanh(x @ m.stack[1].t()) @ m.weight)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(trained: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters | trained, (x[None],)).square().sum()

    trained = {name: p for name, p in parameters.items() if "lora" in name}
    apart = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, x.detach())
    for row in range(TOKENS):
        model.zero_grad()
        model(x[row : row + 1]).square().sum().backward()
        assert_equal([g[row] for g in apart.values()], [model.get_parameter(name).grad for name in apart])


def test_a_second_derivative_is_right():
    model, x = case(lambda m, x: torch.tanh(x @ m.stack[1].t()) @ m.weight)
    reader, _ = dense(model)
    curvatures = []
    for run in (model, reader):
        (first,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        curvatures.append(torch.autograd.grad(first.square().sum(), list(peftlib.parameters(model))))
    assert_equal(*curvatures)


class Bytes(TorchDispatchMode):
    """What is made: the sizes of new storages, the largest of them, and their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        found = func(*args, **kwargs or {})
        new = [each.untyped_storage() for each in tree_leaves(found) if isinstance(each, Tensor)]
        self.sizes += [each.nbytes() for each in new if each.data_ptr() not in known]
        return found


@pytest.mark.parametrize("name", ["a loop", "grouped", "a batch"])
def test_a_step_makes_less_than_the_stack_of_experts(name):
    """Beside the base's own: the loop reads every expert, and its gradients are one stack of each factor."""
    reads: dict[str, Read] = {
        "a loop": lambda m, x: torch.stack([F.linear(x, m.stack[e]) for e in range(16)]),
        "grouped": lambda m, x: F.grouped_mm(x, m.stack.mT, offs=torch.arange(1, 17, dtype=torch.int32)),
        "a batch": lambda m, x: torch.bmm(x.expand(16, 16, 128), m.stack.mT),
    }
    model: Any = nn.Sequential(Experts(reads[name]))
    x = torch.randn(16, 128)
    made = []
    for adapt in (False, True):
        if adapt:
            peftlib.inject(model, "0", peftlib.LoRA, param="stack", rank=2)
            moved(model)
        with Bytes() as counted:
            y = model(x)
            torch.autograd.grad(y.square().sum(), list(peftlib.parameters(model))) if adapt else None
        made.append(counted.sizes)
    stack = 16 * 128 * 128 * 4
    assert max(made[1]) < stack / 2
    assert sum(made[1]) - sum(made[0]) < stack


class Experts(nn.Module):
    def __init__(self, read: Read) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(16, 128, 128), requires_grad=False)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, x)


def test_threads_run_and_train_each_through_its_own_view():
    names = ("one", "two", "three", "four")
    model = adapted(lambda m, x: torch.einsum("ti,eoi->to", x, m.stack) + F.linear(x, m.stack[1]), names=names)
    x = torch.randn(TOKENS, IN, dtype=torch.float64)
    views = {name: peftlib.view(model, name) for name in names}
    parts = [(name, part) for _, name, part in peftlib.adapters(model) if part.config["param"] == "stack"]
    own = {name: list(part.parameters()) for name, part in parts}

    def step(name: str) -> list[Tensor]:
        y = views[name](x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), own[name])]

    expected = {name: step(name) for name in names}
    with ThreadPoolExecutor(len(names)) as pool:
        for name, results in zip(names, pool.map(lambda name: [step(name) for _ in range(100)], names), strict=True):
            for found in results:
                assert all(torch.equal(one, other) for one, other in zip(found, expected[name], strict=True))


def test_a_call_leaves_nothing_behind():
    model, x = case(lambda m, x: torch.einsum("ti,eoi->to", x, m.stack) + F.linear(x, m.weight[:]))
    before = dict(vars(model[0]))
    model(x)
    assert vars(model[0]) == before
    assert type(model[0].stack) is nn.Parameter


# Layers


def own(stock: Any) -> Any:
    """A layer with a forward of its own, that may do more than the stock one: LoRA changes the weight that it reads."""
    return type("Own" + stock.__name__, (stock,), {"forward": lambda self, *given: stock.forward(self, *given) * 2})


LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...], Any]] = {
    "conv1d": (lambda: own(nn.Conv1d)(4, 6, 3, padding=1), (2, 4, 9), reference.rows),
    "conv2d, groups": (lambda: own(nn.Conv2d)(4, 6, (3, 2), stride=2, groups=2), (2, 4, 7, 8), reference.rows),
    "conv2d, reflected": (
        lambda: own(nn.Conv2d)(4, 6, 3, padding=1, padding_mode="reflect", bias=False),
        (4, 5, 6),
        reference.rows,
    ),
    "conv3d": (lambda: own(nn.Conv3d)(2, 4, 2, padding="same", dilation=2), (2, 2, 4, 5, 3), reference.rows),
    "transposed1d": (lambda: own(nn.ConvTranspose1d)(4, 6, 3, stride=2), (2, 4, 5), reference.transposed_kernel),
    "transposed2d, groups": (
        lambda: own(nn.ConvTranspose2d)(4, 6, (3, 2), stride=2, groups=2, output_padding=1),
        (2, 4, 4, 3),
        reference.transposed_kernel,
    ),
    "transposed3d": (
        lambda: own(nn.ConvTranspose3d)(2, 4, 2, bias=False),
        (2, 2, 3, 2, 3),
        reference.transposed_kernel,
    ),
    "linear": (lambda: own(nn.Linear)(4, 6), (3, 4), reference.rows),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_with_a_forward_of_its_own_runs_without_its_weight_made(name):
    make, shape, layout = LAYERS[name]
    torch.manual_seed(0)
    model: Any = nn.Sequential(make()).double()
    plain = copy.deepcopy(model)
    peftlib.inject(model, "0", peftlib.LoRA, rank=2, alpha=3.0)
    A, B = peftlib.parameters(moved(model))
    weight = plain[0]._parameters.pop("weight")
    plain[0].weight = weight.detach() + 1.5 * layout(A, B, weight)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    found, expected = model(x), plain(x)
    assert_equal(found, expected)
    assert_equal(gradients(found, model, x), gradients(expected, model, x))
    assert not peftlib.verify(model, x).materialized


def test_a_bilinear_layer_runs_without_its_weight_made():
    model: Any = nn.Sequential(nn.Bilinear(4, 5, 3))
    peftlib.inject(model, "0", peftlib.LoRA, rank=2)
    assert not peftlib.verify(model[0], torch.randn(6, 4), torch.randn(6, 5)).materialized


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.LSTM(4, 4), (3, 2, 4)),
        (lambda: nn.GRUCell(4, 4), (2, 4)),
        (lambda: nn.TransformerEncoderLayer(4, 2, 4, batch_first=True).self_attn, (3, 2, 4)),
    ],
)
def test_layers_that_are_one_function_get_the_whole_weight_and_are_named(make, shape):
    layer = make()
    peftlib.inject(layer, type(layer), peftlib.LoRA, rank=2)
    inputs = [torch.randn(*shape)] * (3 if isinstance(layer, nn.MultiheadAttention) else 1)
    told = peftlib.verify(layer, *inputs).materialized
    assert told
    assert all(type(layer).__name__.removeprefix("Adapted") in line for line in told)


def test_kernels_of_others_get_the_whole_weight_and_are_named():
    """They read it past torch's functions."""
    model, x = case(lambda m, x: x @ m.stack[1].t())
    model[0].config = SimpleNamespace(_experts_implementation="fastest")
    reader, _ = dense(model)
    assert_equal(model(x), reader(x))
    (line, *_) = peftlib.verify(model, x).materialized
    assert "fastest" in line
    peftlib.inject(model, "0", peftlib.LoRA, param="stack", dropout=0.1, name="dropped")
    peftlib.activate(model, "dropped")
    with pytest.raises(peftlib.AdapterError, match="stack"):
        model(x)

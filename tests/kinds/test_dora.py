"""DoRA: its norm, what it keeps and makes, what may change around it, and HF peft's layers beside it."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

import peftlib
from peftlib.kernels import dora_norm
from support.helpers import Offset, chain, moved
from support.refusals import refused

WIDE = torch.float64


def dora_of(model: nn.Module, name: str | None = None) -> Any:
    return next(part for _, _, part in peftlib.adapters(model, name) if isinstance(part, peftlib.DoRA))


def dora(host: nn.Module, seed: int = 0, **config: Any) -> Any:
    """The host in a chain, with a DoRA that training seems to have moved."""
    model = chain(host)
    peftlib.inject(model, "0", peftlib.DoRA, **{"rank": 3, "alpha": 4.5, **config})
    torch.manual_seed(seed)
    return moved(model)


def direction(weight: Tensor, part: Any) -> Tensor:
    return weight + part.scale * part.lora_B @ part.lora_A


def decomposed(weight: Tensor, part: Any) -> Tensor:
    """The paper's equations 5 and 11: m V/‖V‖ by rows, the norm a constant."""
    V = direction(weight, part)
    return part.magnitude[:, None] * V / V.detach().square().sum(1, keepdim=True).sqrt()


def assert_same_function(found: Tensor, expected: Tensor, leaves: list[Tensor], limit: float = 1e-10) -> None:
    """Outputs and gradients."""
    cotangent = torch.randn_like(expected)
    pairs = zip(
        [found, *torch.autograd.grad(found, leaves, cotangent)],
        [expected, *torch.autograd.grad(expected, leaves, cotangent)],
        strict=True,
    )
    for one, other in pairs:
        assert (one - other).abs().max() <= limit * max(1.0, other.abs().max().item())


# ---- the norm

SHAPES = [(1, 1, 1), (5, 3, 2), (17, 33, 8), (600, 331, 3), (331, 600, 1)]


def factors(*shape: int, batch: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    out, inputs, rank = shape
    made = (torch.randn(*batch, out, inputs), torch.randn(*batch, rank, inputs), torch.randn(*batch, out, rank))
    return made[0], made[1] / inputs**0.5, made[2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_norm_is_that_of_the_dense_matrix(shape, transposed, dtype):
    """Sums of K + rank² products in the wide dtype, whose relative error is a few eps·√K; 64 eps at K = 600."""
    weight, A, B = factors(*shape)
    weight = (weight.T.contiguous().T if transposed else weight).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    found = dora_norm(weight, A.to(wide), B.to(wide), 0.7)
    exact = torch.linalg.vector_norm(weight.double() + 0.7 * B.double() @ A.double(), dim=-1)
    assert found.dtype == wide
    assert ((found.double() - exact).abs() <= 64 * torch.finfo(wide).eps * (weight.double().norm(dim=1) + exact)).all()


def test_the_norm_of_a_stack_is_the_norm_of_each_matrix():
    for dtype in (torch.float32, torch.bfloat16):
        weight, A, B = factors(40, 900, 2, batch=(3,))
        weight = weight.to(dtype)
        alone = [dora_norm(*each, 0.3) for each in zip(weight, A, B, strict=True)]
        assert torch.allclose(dora_norm(weight, A, B, 0.3), torch.stack(alone), rtol=1e-5)


def test_a_norm_that_cancels_to_nothing_is_no_nan():
    weight = torch.randn(6, 2)
    norm = dora_norm(weight, torch.eye(2), -weight, 1.0)
    assert norm.isfinite().all()
    assert (norm <= 1e-3 * weight.norm(dim=1)).all()


def test_the_norm_is_the_same_under_autocast():
    weight, A, B = factors(17, 33, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dora_norm(weight, A, B, 0.7), dora_norm(weight, A, B, 0.7).float())
        found = dora_norm(weight, A, B, 0.7)
    assert torch.equal(found, dora_norm(weight, A, B, 0.7))


# ---- the equation


@pytest.mark.parametrize("bias", [True, False])
def test_on_a_linear_it_is_the_equation_of_the_paper(bias):
    model = dora(nn.Linear(7, 5, bias=bias).to(WIDE))
    part, x = dora_of(model), torch.randn(4, 3, 7, dtype=WIDE, requires_grad=True)
    expected = F.linear(x, decomposed(model[0].weight, part), model[0].bias)
    assert_same_function(model(x), expected, [x, part.magnitude, part.lora_A, part.lora_B])


def test_a_base_that_trains_too_gets_the_gradient_of_the_equation():
    model = dora(nn.Linear(7, 5).to(WIDE))
    part, x = dora_of(model), torch.randn(4, 7, dtype=WIDE, requires_grad=True)
    model[0].requires_grad_(True)
    expected = F.linear(x, decomposed(model[0].weight, part), model[0].bias)
    assert_same_function(model(x), expected, [x, *model.parameters()])


def test_second_derivatives_are_those_of_the_equation():
    model = dora(nn.Linear(3, 3).to(WIDE))
    part, x = dora_of(model), torch.randn(4, 3, dtype=WIDE, requires_grad=True)
    leaves = [x, part.magnitude, part.lora_A, part.lora_B]

    def curvature(y: Tensor) -> Tensor:
        slopes = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        return torch.stack([slope.square().sum() for slope in slopes]).sum()

    expected = F.linear(x, decomposed(model[0].weight, part), model[0].bias)
    for one, other in zip(
        torch.autograd.grad(curvature(model(x)), leaves), torch.autograd.grad(curvature(expected), leaves), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_the_magnitude_alone_sets_the_row_norms():
    model = dora(nn.Linear(7, 5).to(WIDE))
    with peftlib.merged(model):
        assert torch.allclose(model[0].weight.norm(dim=1), dora_of(model).magnitude.abs(), rtol=1e-12)


def test_dropout_acts_on_the_input_of_A_alone():
    """One row, W = (1 1), s·B·A = (1 1), m = ‖V‖: the output is 2 plus what survives, each entry 0 or 1/(1-p)."""
    model = chain(nn.Linear(2, 1, bias=False))
    peftlib.inject(model, "0", peftlib.DoRA, rank=1, alpha=1, dropout=0.5)
    part, x = dora_of(model), torch.ones(500, 2, requires_grad=True)
    with torch.no_grad():
        for each in (model[0].weight, part.lora_A, part.lora_B):
            each.fill_(1.0)
        part.magnitude.fill_(8**0.5)
    y = model.train()(x)
    assert torch.allclose(y.unique(), torch.tensor([2.0, 4.0, 6.0]))
    (slope,) = torch.autograd.grad(y.sum(), x)  # 1 + the mask that ran, over 1-p
    assert torch.allclose(slope.sum(1, keepdim=True), y.detach())
    assert torch.allclose(model.eval()(x), torch.tensor(4.0))


# ---- a row of zeros


@pytest.mark.parametrize(
    "make",
    [lambda: nn.Linear(6, 4), lambda: nn.Conv2d(4, 4, 3), lambda: nn.ConvTranspose1d(4, 4, 2), lambda: nn.GRU(6, 4)],
    ids=["linear", "conv", "transposed", "weight-form"],
)
def test_zero_weights_start_exact_and_learn(make):
    torch.manual_seed(0)
    base = make()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.zero_()
    model = chain(copy.deepcopy(base))
    peftlib.inject(model, "0", peftlib.DoRA, rank=2)
    x = torch.randn(3, 4, 9, 9) if isinstance(base, nn.Conv2d) else torch.randn(3, 4, 6)
    given = model(x)
    assert torch.equal(tree_leaves(given)[0], tree_leaves(base(x))[0])
    optimizer = torch.optim.SGD(peftlib.parameters(model), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        y = tree_leaves(model(x))[0]
        (y - 1).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in peftlib.parameters(model))
        optimizer.step()
    for _, _, part in peftlib.adapters(model):
        assert all(p.grad.any() for p in part.parameters() if part.param != "weight_hh_l0")


# ---- what may change around it


def test_a_base_that_changes_is_never_out_of_date():
    """In every way in which one can: what the norm is of is W as it is now."""
    model = chain(nn.Linear(6, 4).to(WIDE))
    peftlib.inject(model, "0", peftlib.LoRA, rank=2, name="first")
    peftlib.inject(model, "0", peftlib.DoRA, rank=2, name="second")
    moved(model)
    part, x = dora_of(model), torch.randn(5, 6, dtype=WIDE)

    def is_right() -> bool:
        return torch.allclose(model(x), F.linear(x, decomposed(model[0].weight, part), model[0].bias), atol=1e-12)

    peftlib.activate(model, "second")
    assert is_right()
    before = model[0].weight.clone()
    peftlib.eject(model, "first", merge=True)
    assert not torch.equal(model[0].weight, before)
    peftlib.activate(model, "second")
    assert is_right()
    model[0].weight.data.mul_(3.0)
    assert is_right()
    model[0].weight.data = torch.randn(4, 6, dtype=WIDE)
    assert is_right()
    model.load_state_dict({"0.weight": before, "0.bias": model[0].bias}, strict=False)
    assert is_right()
    assert torch.allclose(copy.deepcopy(model)(x), model(x))


def test_adapted_on_meta_it_starts_from_the_real_weight():
    with torch.device("meta"):
        model = chain(nn.Linear(6, 4), nn.ConvTranspose2d(4, 6, 3, groups=2))
    peftlib.inject(model, ["0", "1"], peftlib.DoRA, rank=2)
    model.to_empty(device="cpu")
    base = chain(nn.Linear(6, 4), nn.ConvTranspose2d(4, 6, 3, groups=2))
    model.load_state_dict(base.state_dict(), strict=False)
    for host, (_, _, part) in zip(model, peftlib.adapters(model), strict=True):
        before = part.magnitude
        part.reset_parameters(host)
        assert part.magnitude is before
    x = torch.randn(2, 6)
    assert torch.equal(model[0](x), base[0](x))
    assert torch.equal(model[1](x.view(1, 4, 3, 1)), base[1](x.view(1, 4, 3, 1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_as_a_whole_it_is_still_the_base_to_half_precision(dtype):
    base = nn.Linear(64, 48)
    model = chain(copy.deepcopy(base))
    peftlib.inject(model, "0", peftlib.DoRA, rank=2)
    x = torch.randn(9, 64, dtype=dtype)
    expected = base.to(dtype)(x)
    # m and the norm of the rounded W are each rounded once more: two half units, and one for the product.
    assert ((model.to(dtype)(x) - expected).abs() <= 2 * torch.finfo(dtype).eps * expected.abs().max()).all()


def nested(*names: str) -> Callable[[dict[str, Any], Tensor], Tensor]:
    """W as these adapters leave it, one after the other, by hand."""
    change = {
        "lora": lambda part, weight: direction(weight, part),
        "full": lambda part, weight: part.own.weight,
        "dora": lambda part, weight: decomposed(weight, part),
        "outer": lambda part, weight: decomposed(weight, part),
    }

    def weight_of(parts: dict[str, Any], weight: Tensor) -> Tensor:
        for name in names:
            weight = change[name](parts[name], weight)
        return weight

    return weight_of


KIND = {"lora": peftlib.LoRA, "full": peftlib.Full, "dora": peftlib.DoRA, "outer": peftlib.DoRA}
NESTS = [("lora", "dora"), ("dora", "lora"), ("full", "dora"), ("dora", "outer"), ("lora", "dora", "outer", "full")]


@pytest.mark.parametrize("names", NESTS, ids="-".join)
@pytest.mark.parametrize("with_call_form", [False, True])
def test_nested_the_norm_is_that_of_the_weight_that_the_inner_ones_gave(names, with_call_form):
    model = chain(nn.Linear(6, 4).to(WIDE))
    if with_call_form:
        peftlib.inject(model, "0", Offset, name="offset")
    for name in names:
        config = {"params": "weight"} if name == "full" else {"rank": 2, "alpha": 3}
        peftlib.inject(model, "0", KIND[name], name=name, **config)
    moved(model.to(WIDE))
    parts = {name: part for _, name, part in peftlib.adapters(model)}
    x = torch.randn(5, 6, dtype=WIDE, requires_grad=True)
    expected = F.linear(x, nested(*names)(parts, model[0].weight), model[0].bias)
    if with_call_form:
        expected = expected + parts["offset"].offset
    acting = names[names.index("full") :] if "full" in names else names  # Full covers what is inside it
    leaves = [p for name in acting for p in parts[name].parameters()]
    assert_same_function(model(x), expected, [x, *leaves])
    if not with_call_form:
        with peftlib.merged(model):
            assert torch.allclose(model(x), expected, atol=1e-12)


def test_with_another_inside_dropout_still_drops():
    model = chain(nn.Linear(6, 4))
    peftlib.inject(model, "0", peftlib.LoRA, rank=2, name="inside")
    peftlib.inject(model, "0", peftlib.DoRA, rank=2, dropout=0.5, name="outside")
    moved(model)
    x = torch.randn(5, 6)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


# ---- what it makes and keeps

# Larger than the blocks in which a half-precision weight is read.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(280, 290), lambda: torch.randn(2, 3, 280)),
    "hf-conv1d": (lambda: Conv1D(290, 280), lambda: torch.randn(2, 3, 280)),
    "conv2d": (lambda: nn.Conv2d(64, 60, 5), lambda: torch.randn(1, 64, 6, 6)),
    "conv2d-grouped": (lambda: nn.Conv2d(64, 60, 7, groups=2), lambda: torch.randn(1, 64, 8, 8)),
    "transposed": (lambda: nn.ConvTranspose1d(128, 160, 9, groups=2), lambda: torch.randn(1, 128, 2)),
    "embedding": (lambda: nn.Embedding(900, 80, padding_idx=3), lambda: torch.randint(0, 900, (2, 7))),
    "bag": (lambda: nn.EmbeddingBag(900, 80), lambda: torch.randint(0, 900, (2, 7))),
}


class Makes(TorchDispatchMode):
    """The sizes of all tensors that operators make; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        found = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(found) if isinstance(t, Tensor)]
        self.sizes += [t.numel() for t in made if t.untyped_storage().data_ptr() not in given]
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_no_tensor_of_the_weights_size_is_made_in_training(name, dtype):
    make, inputs = MODELS[name]
    model = dora(make().to(dtype), rank=2).train()
    x = inputs()
    x = x.to(dtype).requires_grad_() if x.is_floating_point() else x
    with Makes() as makes:
        model(x).sum().backward()
    assert len(makes.sizes) > 20
    assert max(makes.sizes) < model[0].weight.numel()


def peak_bytes(step: Callable[[], object]) -> int:
    """The largest sum of what torch's allocator gave and took, temporaries inside operators included."""
    with profile(profile_memory=True) as profiled:
        step()
    found: Any = profiled.profiler
    events = [event for event in found.kineto_results.events() if event.name() == "[memory]"]
    total = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return highest


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes kept for backward beyond the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}
    alive: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x)
    return sum(size for address, size in found.items() if address not in own)


def hf_dora(host: nn.Module, dropout: float = 0.0) -> Any:
    config = peft.LoraConfig(r=3, lora_alpha=4.5, target_modules=["0"], use_dora=True, lora_dropout=dropout)
    return peft.get_peft_model(chain(host), config).train()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_step_on_4096_by_4096_allocates_less_than_the_weight(dropout):
    model = dora(nn.Linear(4096, 4096), dropout=dropout).train()
    x = torch.randn(512, 4096, requires_grad=True)
    weight = 4 * 4096 * 4096
    assert peak_bytes(lambda: model(x).sum().backward()) < 0.7 * weight
    # x, V x + b and rank-sized rest: each of the two is 512 by 4096.
    assert kept(model, x) < 2.05 * 4 * x.numel()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_hf_peft_allocates_and_keeps_a_multiple(dropout):
    ours, theirs = dora(nn.Linear(512, 512), dropout=dropout).train(), hf_dora(nn.Linear(512, 512), dropout)
    x = torch.randn(128, 512, requires_grad=True)
    assert kept(theirs, x) > 2 * kept(ours, x)
    assert peak_bytes(lambda: theirs(x).sum().backward()) > 1.5 * peak_bytes(lambda: ours(x).sum().backward())


# ---- HF peft's own layers


def _copied(theirs: Any, ours: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Puts our values into HF peft's parameters, which have other shapes on some hosts, and gives the pairs."""
    layer, part = theirs.base_model.model[0], dora_of(ours)
    lookup = isinstance(part.form, type) and part.form.looks_up
    A = layer.lora_embedding_A["default"] if lookup else layer.lora_A["default"].weight
    B = layer.lora_embedding_B["default"] if lookup else layer.lora_B["default"].weight
    pairs = [(A, part.lora_A), (B, part.lora_B), (layer.lora_magnitude_vector["default"].weight, part.magnitude)]
    for other, own in pairs:
        with torch.no_grad():
            other.copy_(own.view(other.shape))
        yield other, own


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: nn.Linear(7, 5), lambda: torch.randn(4, 7)),
        (lambda: nn.Conv2d(4, 6, 3, stride=2), lambda: torch.randn(2, 4, 7, 7)),
        (lambda: nn.Embedding(9, 6), lambda: torch.randint(0, 9, (3, 4))),
    ],
    ids=["linear", "conv2d", "embedding"],
)
def test_hf_peft_gives_the_same_outputs_and_gradients(make, inputs):
    torch.manual_seed(3)
    base, x = make(), inputs()
    ours, theirs = dora(copy.deepcopy(base)).to(WIDE), hf_dora(copy.deepcopy(base)).to(WIDE)
    pairs = list(_copied(theirs, ours))
    x = x.to(WIDE) if x.is_floating_point() else x
    y, other = ours(x), theirs(x)
    assert torch.allclose(y, other, atol=1e-12)
    cotangent = torch.randn_like(y)
    found = torch.autograd.grad(y, [own for _, own in pairs], cotangent)
    expected = torch.autograd.grad(other, [theirs_ for theirs_, _ in pairs], cotangent)
    for one, two in zip(found, expected, strict=True):
        assert torch.allclose(one, two.view(one.shape), atol=1e-12)


# ---- refusals


def test_principal_vectors_are_refused():
    with refused(None, "0", "DoRA", 'init="pissa"', "LoRA"):
        peftlib.inject(chain(nn.Linear(4, 4)), "0", peftlib.DoRA, init="pissa")


def test_a_packed_weight_is_refused():
    model = chain(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with refused(model, "0", "DoRA", "Linear.weight", "torch.int8", "LoRA"):
        peftlib.inject(model, "0", peftlib.DoRA, rank=2)


def test_starting_again_needs_the_host():
    model = dora(nn.Linear(4, 4))
    with refused(model, "DoRA", "reset_parameters(host)"):
        dora_of(model).reset_parameters()

"""Prefix against attention written by hand in float64, on each way in which a module attends."""

import contextlib
import copy
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import peftlib
from peftlib import Prefix
from support.dense_attention import Own, as_heads, by_hand, dense, flash_by_hand, flex_uncompiled, use
from support.helpers import checkpoint_activations
from support.refusals import refused
from support.zoo import BY_NAME, ZOO, GroupedQueryAttention

pytestmark = [  # torch's own, where flex_attention is traced and not compiled
    pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

DIGITS = 1e-10
LENGTH = 3
either_gate = pytest.mark.parametrize("gate", [False, True], ids=["joint", "gated"])


@torch.no_grad()
def set_at_random(model: nn.Module, seed: int = 5) -> None:
    """Adapter parameters as after training: no gate is zero, no key small."""
    torch.manual_seed(seed)
    for parameter in peftlib.parameters(model):
        parameter.copy_(torch.randn(parameter.shape).to(parameter))


def put(model: nn.Module, targets: Any, **config: Any) -> None:
    peftlib.inject(model, targets, Prefix, **{"length": LENGTH, **config})
    set_at_random(model)


def copies(model: nn.Module) -> dict[str, Own]:
    """Leaves of their own for the reference, by the host's name."""
    found = {}
    for at, _, part in peftlib.adapters(model):
        leaves = [p.detach().clone().requires_grad_() for p in part.parameters()]
        names = [name for name, _ in part.named_parameters()]
        by_name = dict(zip(names, leaves, strict=True))
        found[at] = Own(by_name["prefix_key"], by_name["prefix_value"], by_name.get("gate"))
    return found


def leaves(owned: dict[str, Own]) -> list[Tensor]:
    return [t for own in owned.values() for t in (own.key, own.value, own.gate) if t is not None]


def trained(model: nn.Module) -> list[Tensor]:
    order = ("prefix_key", "prefix_value", "gate")
    parts = [dict(part.named_parameters()) for _, _, part in peftlib.adapters(model)]
    return [part[name] for part in parts for name in order if name in part]


def assert_equal(found: Tensor, own: list[Tensor], expected: Tensor, by_hand_own: list[Tensor]) -> None:
    """Outputs, and gradients of a random projection of them."""
    torch.manual_seed(9)
    toward = torch.randn(expected.shape, dtype=expected.dtype)
    gradients = torch.autograd.grad((found * toward).sum(), own)
    exact = torch.autograd.grad((expected * toward).sum(), by_hand_own)
    assert (found - expected).abs().max() <= DIGITS * max(1.0, expected.abs().max().item())
    for one, other in zip(gradients, exact, strict=True):
        assert other.abs().max() > 0
        assert (one - other).abs().max() <= DIGITS * max(1.0, other.abs().max().item())


# torch's function, called by a module of one's own


class Core(nn.Module):
    """Attention without weights of its own."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **keywords)


def blind(rows: int, keys: int, *lead: int) -> Tensor:
    torch.manual_seed(8)
    mask = torch.rand(*lead, rows, keys) > 0.4
    mask[..., 0] = True
    return mask


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)


def causal(rows: int, keys: int) -> Tensor:
    return torch.ones(rows, keys, dtype=torch.bool).tril()


# Query heads, key heads, queries, keys, value_dim; the keywords of the call; the same mask, to be added.
CALLS: dict[str, tuple[tuple[int, ...], dict[str, Any], Tensor | None]] = {
    "full": ((4, 4, 5, 5, 6), {}, None),
    "scale": ((4, 4, 5, 5, 6), {"scale": 0.3}, None),
    "value_dim": ((4, 4, 5, 5, 7), {}, None),
    "cross": ((4, 4, 5, 8, 6), {}, None),
    "causal": ((4, 4, 5, 5, 6), {"is_causal": True}, additive(causal(5, 5))),
    "causal, more keys": ((4, 4, 4, 7, 6), {"is_causal": True}, additive(causal(4, 7))),
    "causal, more queries": ((4, 4, 7, 4, 6), {"is_causal": True}, additive(causal(7, 4))),
    "one query": ((4, 4, 1, 7, 6), {}, None),
    "boolean": ((4, 4, 5, 8, 6), {"attn_mask": blind(5, 8)}, additive(blind(5, 8))),
    "boolean by head": ((4, 4, 5, 8, 6), {"attn_mask": blind(5, 8, 2, 4)}, additive(blind(5, 8, 2, 4))),
    "boolean by row": ((4, 4, 5, 8, 6), {"attn_mask": blind(1, 8, 2, 1)}, additive(blind(1, 8, 2, 1))),
    "additive": ((4, 4, 5, 8, 6), {"attn_mask": additive(blind(5, 8))}, additive(blind(5, 8))),
    "additive, one for all keys": (
        (4, 4, 5, 8, 6),
        {"attn_mask": torch.tensor([[0.7]]).double()},
        torch.tensor([[0.7]]).double().expand(5, 8),
    ),
    "grouped": ((4, 2, 5, 5, 6), {"enable_gqa": True}, None),
    "grouped, causal": ((4, 2, 5, 5, 6), {"enable_gqa": True, "is_causal": True}, additive(causal(5, 5))),
    "one key head": ((4, 1, 5, 8, 6), {"enable_gqa": True, "attn_mask": blind(5, 8)}, additive(blind(5, 8))),
}


@either_gate
@pytest.mark.parametrize("name", CALLS)
def test_a_call_of_torch_s_function_equals_the_reference(name, gate):
    (heads, key_heads, queries, keys, value_dim), keywords, mask = CALLS[name]
    core = Core(key_heads, 6)
    put(core, Core, gate=gate, value_dim=value_dim, dtype="float64")
    torch.manual_seed(1)
    shapes = ((2, heads, queries, 6), (2, key_heads, keys, 6), (2, key_heads, keys, value_dim))
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    own = copies(core)
    expected, _ = dense(*inputs, own[""], mask, keywords.get("scale"))
    assert_equal(core(*inputs, **keywords), [*trained(core), *inputs], expected, [*leaves(own), *inputs])


@either_gate
@pytest.mark.parametrize("layout", ["heads repeated", "heads in the batch", "five dimensions", "one head"])
def test_the_prefix_finds_its_heads_in_other_layouts(layout, gate):
    heads = 1 if layout == "one head" else 2
    core = Core(heads, 6)
    put(core, Core, gate=gate, dtype="float64")
    own = copies(core)
    torch.manual_seed(1)
    q, k, v = (torch.randn(3, 4 if layout == "heads repeated" else heads, 5, 6).double() for _ in range(3))
    expected, _ = dense(q, k, v, own[""])
    if layout == "heads repeated":
        k, v = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
        expected, _ = dense(q, k, v, Own(*(t if t is None else t.repeat_interleave(2, 0) for t in leaves_of(own[""]))))
    if layout == "heads in the batch":
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        expected = expected.flatten(0, 1)
    if layout == "five dimensions":
        q, k, v, expected = (x[:, None] for x in (q, k, v, expected))
    if layout == "one head":
        q, k, v, expected = (x[0, 0] for x in (q, k, v, expected))
    assert_equal(core(q, k, v), trained(core), expected, leaves(own))


def leaves_of(own: Own) -> tuple[Tensor, Tensor, Tensor | None]:
    return own.key, own.value, own.gate


class FlexAttention(GroupedQueryAttention):
    """The same module around flex_attention; `how` says what is masked or added."""

    def __init__(self, how: str, attend: Callable[..., Tensor] = flex_attention) -> None:
        super().__init__()
        self.how, self.attend = how, attend

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.project(x)
        size = x.shape[1]
        blocks = None
        if self.how == "causal":
            blocks = create_block_mask(lambda b, h, i, j: i >= j, None, None, size, size, device="cpu")
        if self.how == "documents":
            of = torch.arange(size) // 3
            blocks = create_block_mask(lambda b, h, i, j: of[i] == of[j], None, None, size, size, device="cpu")
        score = (lambda s, b, h, i, j: s - 0.25 * (i - j)) if self.how == "slope" else None
        return self.join(self.attend(q, k, v, score_mod=score, block_mask=blocks, enable_gqa=True))

    def project(self, x: Tensor) -> list[Tensor]:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        return [proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for proj in projections]

    def join(self, y: Tensor) -> Tensor:
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def mask(self, size: int) -> Tensor | None:
        at = torch.arange(size)
        ahead, documents = at - at[:, None], at // 3
        return {
            "all": None,
            "causal": additive(ahead <= 0),
            "documents": additive(documents == documents[:, None]),
            "slope": 0.25 * ahead.double(),
        }[self.how]


@pytest.fixture
def backward_on_cpu(monkeypatch):
    """torch refuses a backward of flex_attention on a CPU for its compiled kernels, which do not run here."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda query, key, value: None)


@either_gate
@pytest.mark.parametrize("size", [7, 150])
@pytest.mark.parametrize("how", ["all", "causal", "documents", "slope"])
def test_flex_attention_equals_the_reference(how, size, gate, backward_on_cpu):
    torch.manual_seed(1)
    model = FlexAttention(how).double()
    put(model, FlexAttention, gate=gate, length=130 if size == 150 else LENGTH)
    x, own = torch.randn(2, size, 16, dtype=torch.float64, requires_grad=True), copies(model)
    y, _ = dense(*model.project(x), own[""], model.mask(size))
    assert_equal(model(x), [*trained(model), x], model.join(y), [*leaves(own), x])


class BlocksSeen(TorchFunctionMode):
    """Around a call: the block mask that flex_attention gets in the end."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "flex_attention":
            self.flat = args[4]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("length", [1, 16, 20])
@pytest.mark.parametrize("size", [48, 70])
def test_the_blocks_are_those_that_torch_would_make_of_the_longer_mask(size, length):
    """Where kernels skip blocks, and where they ask no mask: no uncompiled call reads either."""
    edge = -(-length // 16) * 16

    def longer(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j < length) | ((j >= edge) & (i >= j - edge))

    given = create_block_mask(lambda b, h, i, j: i >= j, 2, None, size, size, device="cpu", BLOCK_SIZE=16)
    model = FlexAttention("all", lambda *qkv, **named: flex_attention(*qkv, **{**named, "block_mask": given}))
    put(model, FlexAttention, length=length)
    with BlocksSeen() as seen, torch.no_grad():
        model(torch.randn(2, size, 16))
    moved = BlockMask(seen.flat[:2], *seen.flat[2:10], seen.flat[-3:-1], seen.flat[-1])
    made = create_block_mask(longer, 2, None, size, edge + size, device="cpu", BLOCK_SIZE=16)
    assert moved.shape == made.shape
    assert torch.equal(moved.to_dense(), made.to_dense())
    rows = made.full_kv_num_blocks.numel()
    for one, first in ((moved, 0), (made, edge // 16)):  # ours masks the prefix's own blocks, torch may not
        for row in range(rows):
            count = one.full_kv_num_blocks.flatten()[row]
            full = one.full_kv_indices.flatten(0, 2)[row][:count]
            exact = made.full_kv_indices.flatten(0, 2)[row][: made.full_kv_num_blocks.flatten()[row]]
            assert set(full.tolist()) - set(range(first)) == set(exact.tolist()) - set(range(edge // 16))
    assert moved.q_indices.shape == made.q_indices.shape


def test_flex_attention_that_is_compiled_inside_the_host_equals_the_reference():
    torch._dynamo.reset()
    torch.manual_seed(1)
    model = FlexAttention("causal", torch.compile(flex_attention, backend="aot_eager", fullgraph=True)).double()
    put(model, FlexAttention)
    own = copies(model)
    for size in (7, 7, 9):
        x = torch.randn(2, size, 16, dtype=torch.float64)
        y, _ = dense(*model.project(x), own[""], model.mask(size))
        assert_equal(model(x), trained(model), model.join(y), leaves(own))


# MultiheadAttention


def multihead(module: Any, query: Tensor, key: Tensor, value: Tensor, own: Own | None, mask: Any = None) -> Any:
    """[tokens, batch, width] in and out; what `add_bias_kv` and `add_zero_attn` add comes last."""
    heads, width = module.num_heads, module.embed_dim
    packed = module.in_proj_weight is not None
    separate = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    weights = module.in_proj_weight.split(width) if packed else separate
    biases = module.in_proj_bias.split(width) if module.in_proj_bias is not None else (None, None, None)
    q, k, v = (as_heads(x, w, b, heads) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    for more in ((module.bias_k, module.bias_v), (0, 0) if module.add_zero_attn else (None, None)):
        if more[0] is None:
            continue
        rows = [torch.zeros_like(k[:, :, :1]) + (m if isinstance(m, int) else _row(m, heads)) for m in more]
        k, v = torch.cat([k, rows[0]], 2), torch.cat([v, rows[1]], 2)
        mask = mask if mask is None else F.pad(mask, (0, 1))
    y, shares = dense(q, k, v, own, mask)
    return module.out_proj(y.permute(2, 0, 1, 3).flatten(2)), shares


def _row(bias: Tensor, heads: int) -> Tensor:
    return bias.view(1, heads, 1, -1)


PADDED = torch.tensor([[0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()
AHEAD = ~causal(5, 6)
FLOATS = torch.linspace(-1, 1, 30, dtype=torch.float64).view(5, 6)


@torch.no_grad()
def biased(model: nn.Module) -> Any:
    """torch's biases start at zero, which would hide one that is added twice."""
    for name, parameter in model.named_parameters():
        if "bias" in name:
            parameter.normal_()
    return model


# How the module is made, its keywords in the call, the mask by hand [batch, heads, 5, 6].
MULTIHEADS: dict[str, tuple[dict[str, Any], dict[str, Any], Tensor | None]] = {
    "plain": ({}, {}, None),
    "no bias": ({"bias": False}, {}, None),
    "own widths": ({"kdim": 7, "vdim": 9}, {}, None),
    "padding": ({}, {"key_padding_mask": PADDED}, additive(~PADDED)[:, None, None]),
    "mask": ({}, {"attn_mask": AHEAD}, additive(~AHEAD)),
    "added": ({}, {"attn_mask": FLOATS}, FLOATS),
    "by head": ({}, {"attn_mask": ~blind(5, 6, 8)}, additive(blind(5, 6, 8)).view(2, 4, 5, 6)),
    "causal": ({}, {"attn_mask": AHEAD, "is_causal": True}, additive(~AHEAD)),
    "both": ({}, {"attn_mask": AHEAD, "key_padding_mask": PADDED}, additive(~AHEAD) + additive(~PADDED)[:, None, None]),
    "extra keys": ({"add_bias_kv": True, "add_zero_attn": True}, {}, None),
    "extra keys, masks": (
        {"add_bias_kv": True, "add_zero_attn": True},
        {"attn_mask": AHEAD, "key_padding_mask": PADDED},
        additive(~AHEAD) + additive(~PADDED)[:, None, None],
    ),
}


@either_gate
@pytest.mark.parametrize("weights", ["none", "mean", "heads"])
@pytest.mark.parametrize("name", MULTIHEADS)
def test_multihead_attention_equals_the_reference(name, weights, gate):
    made, keywords, mask = MULTIHEADS[name]
    torch.manual_seed(1)
    module = biased(nn.MultiheadAttention(8, 4, **made).double())
    put(module, nn.MultiheadAttention, gate=gate)
    sizes = ((5, 8), (6, made.get("kdim", 8)), (6, made.get("vdim", 8)))
    inputs = [torch.randn(rows, 2, width, dtype=torch.float64, requires_grad=True) for rows, width in sizes]
    own = copies(module)
    expected, shares = multihead(module, *inputs, own[""], mask)
    how = {"need_weights": weights != "none", "average_attn_weights": weights == "mean"}
    found, found_shares = module(*inputs, **how, **keywords)
    assert_equal(found, [*trained(module), *inputs], expected, [*leaves(own), *inputs])
    if weights == "none":
        assert found_shares is None
    else:
        exact = shares.mean(1) if weights == "mean" else shares
        assert found_shares.shape == exact.shape
        assert (found_shares - exact).abs().max() <= DIGITS


@either_gate
@pytest.mark.parametrize("how", ["batch first", "unbatched", "eval"])
def test_multihead_attention_in_other_layouts_equals_the_reference(how, gate):
    torch.manual_seed(1)
    made = nn.MultiheadAttention(8, 4, batch_first=how != "unbatched", add_bias_kv=how == "unbatched")
    module = biased(made.double())
    put(module.eval() if how == "eval" else module, nn.MultiheadAttention, gate=gate)
    x, own = torch.randn(5, 1 if how == "unbatched" else 2, 8, dtype=torch.float64), copies(module)
    expected = multihead(module, x, x, x, own[""])[0]
    given = x[:, 0] if how == "unbatched" else x.transpose(0, 1)
    if how == "eval":  # where the fused kernel for the base would run
        with torch.inference_mode():
            found = module(given, given, given)[0]
        assert (found.transpose(0, 1) - expected).abs().max() <= DIGITS
    found = module(given, given, given)[0]
    found = found[:, None] if how == "unbatched" else found.transpose(0, 1)
    assert_equal(found, trained(module), expected, leaves(own))


class ByHand(nn.Module):
    """Stands where a MultiheadAttention stood in torch's own layers."""

    batch_first = True
    _qkv_same_embed_dim = False

    def __init__(self, module: nn.Module, own: Own, padding: Tensor | None = None) -> None:
        super().__init__()
        self.module, self.own, self.padding = module, own, padding

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **keywords: Any) -> Any:
        ignored = keywords.get("key_padding_mask")
        mask = keywords.get("attn_mask")
        if ignored is not None:
            ignored = ignored if ignored.is_floating_point() else additive(~ignored)
            mask = ignored[:, None, None] + (0 if mask is None else mask)
        inputs = (x.transpose(0, 1) for x in (query, key, value))
        return multihead(self.module, *inputs, self.own, mask)[0].transpose(0, 1), None


LAYERS = {
    "encoder": lambda: nn.TransformerEncoder(_layer(nn.TransformerEncoderLayer), 2),
    "decoder": lambda: nn.TransformerDecoder(_layer(nn.TransformerDecoderLayer), 2),
}


def _layer(kind: Any) -> nn.Module:
    return kind(8, 4, 12, dropout=0.0, batch_first=True, activation="gelu")


@either_gate
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", LAYERS)
def test_torch_s_transformer_layers_equal_the_reference(name, padded, training, gate):
    torch.manual_seed(1)
    base = biased(LAYERS[name]()).double().train(training)
    model = copy.deepcopy(base)
    put(model, nn.MultiheadAttention, gate=gate)
    own = copies(model)
    for at, one in own.items():
        base.set_submodule(at, ByHand(base.get_submodule(at), one))
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    inputs = [x] if name == "encoder" else [x, torch.randn(2, 4, 8, dtype=torch.float64)]
    keywords = {"src_key_padding_mask" if name == "encoder" else "tgt_key_padding_mask": PADDED} if padded else {}
    if name == "decoder":
        keywords["tgt_mask"] = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
        keywords["tgt_is_causal"] = True
        if padded:
            keywords["tgt_key_padding_mask"] = additive(~PADDED)
    with without_fast_path():
        expected = base(*inputs, **keywords)
    assert_equal(model(*inputs, **keywords), trained(model), expected, leaves(own))
    with torch.inference_mode():
        assert (model(*inputs, **keywords) - expected).abs().max() <= DIGITS


@contextlib.contextmanager
def without_fast_path() -> Any:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


# The zoo


TRANSFORMERS = [a for a in ZOO if a.attention is not None and a.name not in ("encoder", "grouped-query")]
IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flex_attention")


def attending(model: Any, implementation: str, monkeypatch: Any) -> Any:
    use(model, implementation)
    if implementation == "flash_attention_2":
        return flash_by_hand(monkeypatch)
    return flex_uncompiled(monkeypatch) if implementation == "flex_attention" else contextlib.nullcontext()


def supported(animal: Any, implementation: str) -> bool:
    flags = {"sdpa": "sdpa", "flash_attention_2": "flash_attn", "flex_attention": "flex_attn"}
    return implementation == "eager" or getattr(animal.make(), f"_supports_{flags[implementation]}")


@pytest.fixture
def wide_softmax(monkeypatch):
    """Eager functions of transformers compute their softmax in float32, whatever the model's dtype."""
    monkeypatch.setattr(F, "softmax", lambda scores, dim, dtype=None: scores.softmax(dim))


def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Of the tokens that are not padding: what a model gives for padding depends on the implementation."""
    found = model(**inputs).logits
    mask = inputs.get("attention_mask")
    return found[mask.bool()] if mask is not None and found.shape[:2] == mask.shape else found


def cells() -> Iterator[Any]:
    """Tracing flex_attention costs seconds: one model at each commit."""
    for animal, implementation in itertools.product(TRANSFORMERS, IMPLEMENTATIONS):
        slow = implementation == "flex_attention" and animal.name != "gemma2"
        marks = pytest.mark.slow if slow else ()
        yield pytest.param(animal, implementation, id=f"{animal.name}-{implementation}", marks=marks)


@either_gate
@pytest.mark.parametrize(("animal", "implementation"), [*cells()])
def test_every_implementation_of_transformers_equals_the_reference(
    animal, implementation, gate, monkeypatch, backward_on_cpu, wide_softmax
):
    if not supported(animal, implementation):
        pytest.skip("transformers does not offer it")
    model, inputs = animal.make(torch.float64), animal.inputs(torch.float64)
    if animal.name == "t5" and implementation == "flex_attention":  # which fails by itself on more rows than one
        inputs = {key: value[:1] if isinstance(value, Tensor) else value for key, value in inputs.items()}
    put(model, animal.attention, gate=gate)
    own = copies(model)
    with by_hand(animal.make(torch.float64), own) as base:
        expected = logits(base, inputs)
    with attending(model, implementation, monkeypatch):
        if animal.name == "gemma2" and implementation == "flash_attention_2" and not gate:
            with refused(None, "flash", "4", "7"):
                model(**inputs)
            use_windows(model, 7)
            use_windows(base, 7)
            with by_hand(base, own):
                expected = logits(base, inputs)
        assert_equal(logits(model, inputs), trained(model), expected, leaves(own))


def use_windows(model: Any, size: int) -> None:
    model.config.sliding_window = size
    for module in model.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window = size


# Generation


GENERATING = [a for a in TRANSFORMERS if a.generates]


@either_gate
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("animal", GENERATING, ids=lambda animal: animal.name)
def test_generating_with_and_without_a_cache_gives_the_same_tokens(
    animal, implementation, gate, monkeypatch, wide_softmax
):
    if not supported(animal, implementation):
        pytest.skip("transformers does not offer it")
    model, inputs = animal.make(torch.float64), animal.inputs(torch.float64)
    for key in ("use_cache", "decoder_input_ids"):
        inputs.pop(key, None)
    if animal.name == "gemma2" and implementation == "flash_attention_2":
        use_windows(model, 100)
    how = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with attending(model, implementation, monkeypatch):
        base = model.generate(**inputs, **how, use_cache=False)
        put(model, animal.attention, gate=gate)
        without = model.generate(**inputs, **how, use_cache=False)
        cached = model.generate(**inputs, **how, use_cache=True)
    assert torch.equal(cached.sequences, without.sequences)
    for one, other in zip(cached.logits, without.logits, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-9)
    assert not torch.equal(without.logits[0], base.logits[0])


def test_rows_padded_on_the_left_give_what_each_gives_alone():
    animal = BY_NAME["llama"]
    model, inputs = animal.make(torch.float64), animal.inputs(torch.float64)
    put(model, animal.attention)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    together = model(**inputs, position_ids=positions).logits
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        alone = model(input_ids=inputs["input_ids"][row][mask][None], use_cache=False).logits[0]
        assert (together[row][mask] - alone).abs().max() <= DIGITS


# The ways in which a call runs


def gradients(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    found = model(**inputs)
    found = found if isinstance(found, Tensor) else found.logits
    model.zero_grad()
    found.square().sum().backward()
    return [p.grad for p in peftlib.parameters(model) if p.grad is not None]


@either_gate
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_checkpointing_a_transformers_model_gives_the_same_gradients(
    name, reentrant, implementation, gate, wide_softmax
):
    animal = BY_NAME[name]
    model, inputs = animal.make(torch.float64).train(), animal.inputs(torch.float64)
    use(model, implementation)
    put(model, animal.attention, gate=gate)
    model.get_input_embeddings().weight.requires_grad_(True)  # reentrant checkpoints ask for an input that tracks
    expected = gradients(model, inputs)
    assert len(expected) == len(list(peftlib.parameters(model)))
    checkpoint_activations(model, use_reentrant=reentrant)
    for one, other in zip(gradients(model, inputs), expected, strict=True):
        assert (one - other).abs().max() <= DIGITS * max(1.0, other.abs().max().item())


class Inside(nn.Module):
    """A host that checkpoints its own attention."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.attention, self.reentrant = GroupedQueryAttention(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.attention, x, use_reentrant=self.reentrant)


def test_a_checkpoint_inside_the_host_never_goes_wrong_in_silence():
    x = torch.randn(2, 5, 16, requires_grad=True)
    model = Inside(reentrant=True)
    put(model, Inside)
    with refused(None, "Inside", "gradients"):
        model(x)
    model = Inside(reentrant=False)
    put(model, Inside)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        model(x).sum().backward()
    model = Inside(reentrant=True)
    put(model, "attention")
    model(x).sum().backward()
    assert all(p.grad.any() for p in peftlib.parameters(model))


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@either_gate
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["grouped-query", "encoder", "llama", "gpt2"])
def test_compiled_whole_the_results_are_the_same(name, implementation, gate, fresh_dynamo, wide_softmax):
    animal = BY_NAME[name]
    model, inputs = animal.make(torch.float64), animal.inputs(torch.float64)
    if name in ("grouped-query", "encoder") and implementation == "eager":
        pytest.skip("no transformers model")
    use(model, implementation)
    put(model, animal.attention, gate=gate)
    expected = gradients(model, inputs)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model.forward = torch.compile(model.forward, fullgraph=True, backend=counter)
    for _ in range(2):
        for one, other in zip(gradients(model, inputs), expected, strict=True):
            assert (one - other).abs().max() <= DIGITS * max(1.0, other.abs().max().item())
        assert counter.frame_count == 1


@either_gate
def test_dropout_of_the_attention_drops_from_the_prefix_too(gate):
    """Dropout is torch's own: with keys that all weigh the same and values of 1, the mean over draws is 1, or with a
    gate 1 + tanh(gate), and a draw differs from it. A mean of n draws deviates by √(p/(1-p)/(n·keys)): allow 6."""
    rate, draws = 0.4, 4000
    core = Core(1, 2)
    put(core, Core, gate=gate)
    with torch.no_grad():
        for _, _, part in peftlib.adapters(core):
            part.prefix_key.zero_()
            part.prefix_value.fill_(1.0)
    x = torch.zeros(draws, 1, 1, 2)
    found = core(x, x, torch.ones(draws, 1, 1, 2), dropout_p=rate)[..., 0]
    more = core_gate(core) if gate else 0.0
    keys = 1 if gate else 1 + LENGTH
    assert abs(found.mean().item() - 1 - more) <= 6 * (rate / (1 - rate) / (draws * keys)) ** 0.5
    assert len(found.unique()) == keys + 1


def core_gate(core: nn.Module) -> float:
    return next(part for _, _, part in peftlib.adapters(core)).gate.tanh().item()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_two_adapters_stand_one_in_front_of_the_other(implementation, wide_softmax):
    """In one softmax their order is nothing: as one prefix of both lengths."""
    animal = BY_NAME["llama"]
    model, inputs = animal.make(torch.float64), animal.inputs(torch.float64)
    use(model, implementation)
    for name, length in (("one", 2), ("two", 3)):
        peftlib.inject(model, animal.attention, Prefix, name=name, length=length)
    set_at_random(model)
    joined, parts = animal.make(torch.float64), {}
    use(joined, implementation)
    put(joined, animal.attention, length=5)
    for at, _, part in peftlib.adapters(model):
        parts.setdefault(at, []).append(part.keys_and_values())
    with torch.no_grad():
        for at, _, part in peftlib.adapters(joined):
            part.prefix_key.copy_(torch.cat([key for key, _ in parts[at]], 1))
            part.prefix_value.copy_(torch.cat([value for _, value in parts[at]], 1))
    assert (model(**inputs).logits - joined(**inputs).logits).abs().max() <= DIGITS


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_threads_hold_their_own_prefixes(implementation):
    animal = BY_NAME["llama"]
    model, inputs = animal.make(), animal.inputs()
    use(model, implementation)
    for name in ("one", "two"):
        peftlib.inject(model, animal.attention, Prefix, name=name)
    set_at_random(model)
    faces = {name: peftlib.view(model, name) for name in ("one", "two")}
    with torch.no_grad():
        expected = {name: face(**inputs).logits for name, face in faces.items()}
    wrong = []

    def run(name: str) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(faces[name](**inputs).logits, expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in faces]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_host_s_config_is_its_own_again_after_each_call_and_each_failure():
    model = BY_NAME["llama"].make()
    use(model, "eager")
    put(model, "layers.0.self_attn", heads=3)
    host, config = model.model.layers[0].self_attn, model.config
    with refused(None, "3", "4", "heads="):
        model(**BY_NAME["llama"].inputs())
    assert host.__dict__["config"] is config


# What it starts from


def test_given_tokens_it_starts_from_their_keys_and_values():
    """With the first tokens' own keys as prefix, tokens that attend to them twice: as if those were there twice."""
    animal = BY_NAME["llama"]
    for implementation in ("eager", "sdpa"):
        model, inputs = animal.make(torch.float64), animal.inputs(torch.float64)
        use(model, implementation)
        peftlib.inject(model, "layers.0.self_attn", Prefix, length=LENGTH)
        seen = {}
        attention = model.model.layers[0].self_attn
        hooks = [
            getattr(attention, name).register_forward_hook(functools.partial(record, seen, name))
            for name in ("k_proj", "v_proj")
        ]
        Prefix.start_from(model, **inputs)
        for hook in hooks:
            hook.remove()
        part = next(part for _, _, part in peftlib.adapters(model))
        values = seen["v_proj"][0].view(7, 2, 4).transpose(0, 1)[:, :LENGTH]
        assert torch.equal(part.prefix_value, values)
        first = seen["k_proj"][0, 0].view(2, 4)  # at position 0 the rotation is none
        assert torch.equal(part.prefix_key[:, 0], first)
        assert not torch.equal(part.prefix_key[:, 1], seen["k_proj"][0, 1].view(2, 4))
        assert "_front" not in part.__dict__


def record(seen: dict[str, Tensor], name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
    seen[name] = output.detach()


def test_starting_from_tokens_leaves_one_more_prefix_of_the_host_alone():
    model = GroupedQueryAttention()
    put(model, GroupedQueryAttention, name="other")
    put(model, GroupedQueryAttention, name="default")
    before = [p.clone() for p in peftlib.parameters(model, "other")]
    Prefix.start_from(model, torch.randn(1, 5, 16))
    assert all(map(torch.equal, peftlib.parameters(model, "other"), before))
    assert peftlib.adapters(model, "other")


# The perceptron


def test_a_reparametrized_prefix_is_the_output_of_its_perceptron():
    torch.manual_seed(1)
    model = GroupedQueryAttention().double()
    peftlib.inject(model, GroupedQueryAttention, Prefix, length=LENGTH, reparametrize=5)
    set_at_random(model)
    part = next(part for _, _, part in peftlib.adapters(model))
    leaves = {name: p.detach().clone().requires_grad_() for name, p in part.named_parameters()}
    hidden = torch.tanh(leaves["embedding"] @ leaves["hidden_weight"].T + leaves["hidden_bias"])
    flat = (hidden @ leaves["output_weight"].T + leaves["output_bias"]).view(LENGTH, 2, 8).transpose(0, 1)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (model.q_proj, model.k_proj, model.v_proj))
    y, _ = dense(q, k, v, Own(flat[..., :4], flat[..., 4:]), additive(causal(5, 5)))
    expected = model.o_proj(y.transpose(1, 2).flatten(2))
    assert_equal(model(x), list(part.parameters()), expected, list(leaves.values()))


@either_gate
def test_flattened_it_computes_the_same_in_a_smaller_file(gate, tmp_path):
    model, x = GroupedQueryAttention(), torch.randn(2, 5, 16)
    peftlib.inject(model, GroupedQueryAttention, Prefix, reparametrize=32, gate=gate)
    set_at_random(model)
    peftlib.save(model, tmp_path / "whole.safetensors")
    with torch.no_grad():
        expected = model(x)
        for _, _, part in peftlib.adapters(model):
            part.flatten()
            part.flatten()
        assert torch.equal(model(x), expected)
        peftlib.save(model, tmp_path / "flat.safetensors")
        for name in ("whole", "flat"):
            peftlib.eject(model)
            peftlib.load(model, tmp_path / f"{name}.safetensors")
            assert torch.equal(model(x), expected)
    sizes = [sum(p.numel() for p in peftlib.parameters(model)), (tmp_path / "whole.safetensors").stat().st_size]
    assert sizes[0] == 2 * 10 * 4 * 2 + (2 if gate else 0)
    assert (tmp_path / "flat.safetensors").stat().st_size < sizes[1]


# Refusals


class Silent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim = 2, 4

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1) @ x


def decoder() -> nn.Module:
    return _layer(nn.TransformerDecoderLayer)


def called(*shapes: tuple[int, ...]) -> Callable[[nn.Module], Any]:
    return lambda model: model(*(torch.randn(shape) for shape in shapes))


CALLED = {
    "no attention": (Silent, {}, called((2, 3, 4)), ("Silent",)),
    "two attentions": (decoder, {}, called((2, 3, 8), (2, 3, 8)),
                       ("TransformerDecoderLayer", "one")),
    "other heads": (lambda: Core(3, 4), {}, called(*[(2, 4, 5, 4)] * 3), ("Core", "(2, 4, 5, 4)", "3")),
    "another width": (lambda: Core(2, 4), {}, called(*[(2, 4, 5, 6)] * 3), ("Core", "2", "4")),
    "another value width": (lambda: Core(2, 4), {}, called((2, 2, 5, 4), (2, 2, 5, 4), (2, 2, 5, 3)),
                            ("Core", "2", "4", "heads=", "head_dim=", "value_dim=")),
}  # fmt: skip


@pytest.mark.parametrize(("make", "config", "act", "names"), CALLED.values(), ids=CALLED)
def test_calls_that_are_refused(make, config, act, names):
    model = make()
    put(model, type(model), **config)
    with refused(model, *names):
        act(model)
    peftlib.eject(model)
    if make in (Silent, decoder):
        act(model)


MADE = {
    "length": ({"length": 0}, ("length=0",)),
    "reparametrize": ({"reparametrize": 0}, ("reparametrize=0",)),
    "init": ({"init": "zeros"}, ("init='zeros'", '"normal"')),
    "heads": ({}, ("Linear", "heads=", "head_dim=")),
}


@pytest.mark.parametrize(("config", "names"), MADE.values(), ids=MADE)
def test_configurations_that_are_refused(config, names):
    model = nn.Sequential(nn.Linear(4, 4)) if not config else GroupedQueryAttention()
    with refused(model, *names):
        peftlib.inject(model, "0" if not config else GroupedQueryAttention, Prefix, **config)


def test_too_few_tokens_to_start_from_are_refused():
    model = GroupedQueryAttention()
    peftlib.inject(model, GroupedQueryAttention, Prefix, length=9)
    with refused(model, "start_from", "5", "9"):
        Prefix.start_from(model, torch.randn(1, 5, 16))
    peftlib.eject(model)
    peftlib.inject(model, GroupedQueryAttention, Prefix, length=2, reparametrize=4)
    with refused(model, "start_from", "values"):
        Prefix.start_from(model, torch.randn(1, 5, 16))


def test_it_cannot_be_merged_and_says_so():
    model = GroupedQueryAttention()
    put(model, GroupedQueryAttention)
    with refused(model, "merge", "Prefix"):
        peftlib.merge(model)


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "block_indices"])
def test_keywords_that_may_count_keys_are_refused(name):
    model, inputs = BY_NAME["llama"].make(), BY_NAME["llama"].inputs()
    use(model, "eager")
    put(model, "self_attn")
    with refused(model, "LlamaAttention", f"'{name}'"):
        model(**inputs, **{name: torch.tensor([0, 7])})


def test_packed_sequences_under_flash_attention_are_refused(monkeypatch):
    model = BY_NAME["llama"].make(torch.float64)
    put(model, "self_attn")
    tokens, positions = torch.arange(3, 10)[None], torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    with (
        attending(model, "flash_attention_2", monkeypatch),
        refused(model, "flash", "packed"),
    ):
        model(input_ids=tokens, position_ids=positions, use_cache=False)


def test_a_layer_around_one_attention_is_a_host_too():
    torch.manual_seed(1)
    outer = _layer(nn.TransformerEncoderLayer).double().eval()
    inner = copy.deepcopy(outer)
    put(outer, nn.TransformerEncoderLayer)
    put(inner, "self_attn")
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    assert torch.equal(outer(x), inner(x))
    with torch.inference_mode():
        assert (outer(x) - inner(x)).abs().max() <= DIGITS


def test_a_module_around_an_eager_attention_is_no_host():
    model = BY_NAME["bert"].make()
    use(model, "eager")
    put(model, "layer.0.attention")
    with refused(None, "BertAttention"):
        model(**BY_NAME["bert"].inputs())

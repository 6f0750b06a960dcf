"""The laws, kinds by hosts: one function a law. A new kind is one more row of KINDS."""

import contextlib
import copy
import dataclasses
import functools
import math
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import peftlib
from support import reference
from support.hosts import HOSTS, Around, Host, converted, without_fast_path
from support.refusals import refused

pytestmark = [
    # torch's own, of the base: they say nothing of an adapter.
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning"),
]

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
Leaves = dict[str, Tensor]


def _low_rank_weights(host: Host, host_name: str, config: dict[str, Any], owner: nn.Module, leaves: Leaves) -> Leaves:
    """W + s·B·A by hand, s = alpha/rank, or alpha/√rank; with "pissa" less what the pair was at first."""
    param, rank = config["param"], config["rank"]
    layout = (host.weights or {})[host_name][param]
    scale = config["alpha"] / (rank**0.5 if config["rank_stabilized"] else rank)
    weight = owner.get_parameter(param).detach()
    delta = layout(leaves["lora_A"], leaves["lora_B"], weight)
    if config["init"] == "pissa":
        delta = delta - layout(leaves["initial_A"], leaves["initial_B"], weight)
    return {param: weight + scale * delta}


def _dora_weights(host: Host, host_name: str, config: dict[str, Any], owner: nn.Module, leaves: Leaves) -> Leaves:
    """m ⊙ V/‖V‖ by hand, V = W + s·B·A, the norm a constant in the gradient."""
    ((param, moved),) = _low_rank_weights(host, host_name, config, owner, leaves).items()
    layout, owner = (host.weights or {})[host_name][param], owner.get_submodule(param.rpartition(".")[0])
    norms = reference.row_norms(layout, moved.detach(), getattr(owner, "groups", 1))
    magnitude = leaves["magnitude"]
    if layout is reference.transposed_kernel:
        magnitude = magnitude.view(owner.groups, 1, -1).expand(-1, moved.shape[0] // owner.groups, -1).flatten(0, 1)
        magnitude = magnitude.reshape(*magnitude.shape, *[1] * (moved.dim() - 2))
    else:
        magnitude = magnitude if layout is reference.columns else magnitude.view(norms.shape)
    return {param: magnitude * moved / norms}


def _prefix_beside(config: dict[str, Any], leaves: Leaves, owner: Any, args: Any, kwargs: Any, output: Any) -> Any:
    """What torch's attention gives, and out_proj of tanh(gate)·softmax(q·P_Kᵀ/√d)·P_V, by hand; its shares stay."""
    y, shares = output
    bias = None if owner.in_proj_bias is None else owner.in_proj_bias[: owner.embed_dim]
    weight = owner.q_proj_weight if owner.in_proj_weight is None else owner.in_proj_weight[: owner.embed_dim]
    q = nn.functional.linear(args[0], weight, bias).unflatten(-1, (owner.num_heads, -1)).unsqueeze(-2)
    own = (q @ leaves["prefix_key"].mT / q.shape[-1] ** 0.5).softmax(-1) @ leaves["prefix_value"]
    return y + (own * leaves["gate"].tanh()).flatten(-3) @ owner.out_proj.weight.T, shares


def _own_weights(host: Host, host_name: str, config: dict[str, Any], owner: nn.Module, leaves: Leaves) -> Leaves:
    return {key.removeprefix("own."): value for key, value in leaves.items()}


def _factor_weights(host: Host, host_name: str, config: dict[str, Any], owner: Any, leaves: Leaves) -> Leaves:
    """Rows of W, and b, times l, or columns of W; of attention's projections the rows of keys and values."""
    factor, on, child = leaves["factor"], config["on"], config["child"]
    if isinstance(owner, nn.MultiheadAttention) and not child:
        width = owner.embed_dim
        every = torch.cat([torch.ones_like(factor[:width]), factor])
        found = {"in_proj_weight": every[:, None], "in_proj_bias": every}
        found |= {"k_proj_weight": factor[:width, None], "v_proj_weight": factor[width:, None]}
        named = {name: owner._parameters.get(name) for name in found}
        return {name: p.detach() * found[name] for name, p in named.items() if p is not None}
    layouts = {reference.columns: "columns", reference.transposed_kernel: "transposed"}
    prefix, owner = f"{child}." if child else "", owner.get_submodule(child)
    layout = layouts.get((host.weights or {}).get(host_name, {}).get(f"{prefix}weight"), "rows")
    groups = getattr(owner, "groups", 1)
    found = {f"{prefix}weight": reference.scaled(layout, factor, owner.weight.detach(), on, groups)}
    if on == "output" and getattr(owner, "bias", None) is not None:
        found[f"{prefix}bias"] = owner.bias.detach() * factor
    return found


def _bottleneck_beside(config: dict[str, Any], leaves: Leaves, owner: Any, args: Any, kwargs: Any, output: Any) -> Any:
    """What the host gives, with y + s·f(y), or y + s·f(x), in the place of y, by hand."""
    y, *rest = output if isinstance(output, tuple) else (output,)
    (x, *_) = args or kwargs.values()
    axis = -1 - len(owner.kernel_size) if hasattr(owner, "kernel_size") else -1
    axis = 1 if isinstance(owner, (nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d)) else axis
    changed = reference.bottleneck(config, leaves, y, x, axis)
    return (changed, *rest) if isinstance(output, tuple) else changed


@dataclass(frozen=True)
class Kind:
    """One row: how the kind is put in, and by hand, what each weight then is, or, for a kind without a weight form,
    `beside`: what the host then gives. `refuses` gives what the message names, or nothing."""

    name: str
    kind: type[peftlib.Adapter]
    config: Mapping[str, Any]
    weights: Any  # what gives Leaves, or None
    refuses: Callable[[Host], str]
    beside: Callable[..., Any] | None = None
    random: bool = False
    extra: bool = False
    plain: bool = True
    pins_values: Callable[[Host], bool] = lambda host: True
    roundings: int = 4


def _no_matrix(host: Host) -> str:
    return host.no_lora


def _no_input(host: Host) -> str:
    return host.no_lora or ("" if host.own_input else r"dropout=0\.4")


def _no_input_shown(host: Host) -> str:
    """LoRA's weight is not made, and a product with it shows its input."""
    return "" if host.shows_input else _no_input(host)


def _hooked(host: Host) -> str:
    """A hook computes the weight before the host's forward, so a copy of what it computes from would not act."""
    return "hook.*'weight'" if host.settles else ""


def _lora(name: str, refuses: Callable[[Host], str] = _no_matrix, **config: Any) -> Kind:
    flags = {key: config.pop(key) for key in ("random", "extra") if key in config}
    return Kind(name, peftlib.LoRA, {"rank": 2, "alpha": 3.0, **config}, _low_rank_weights, refuses, **flags)


def _dora(name: str, refuses: Callable[[Host], str] = _no_matrix, **config: Any) -> Kind:
    row = _lora(name, refuses, **config)
    return dataclasses.replace(row, kind=peftlib.DoRA, weights=_dora_weights, roundings=7)


_READ = dict.fromkeys(["attention-out", "children-read"], "child '")
_KEEPING = ("conv1d-grouped-unbatched", "conv2d-reflect")  # of the convolutions: as many places out as in


def _no_features(host: Host) -> str:
    return _READ.get(host.name, "")


def _no_parallel(host: Host) -> str:
    if host.name.startswith(("bag", "embedding", "scaled-embedding", "tied-embedding")):
        return 'position="after"'
    convolves = host.name.startswith(("conv", "transposed", "weight-norm-hook")) and not host.name.endswith("scaled")
    return 'position="after"' if convolves and host.name not in _KEEPING else _no_features(host)


def _no_factor(host: Host) -> str:
    unknown = host.name.startswith(("bilinear", "experts", "raw-matrix", "lstm", "gru", "rnn"))
    return "IA3.*Linear" if unknown else ""


def _no_input_factor(host: Host) -> str:
    lookups_and_norms = (
        "bag", "embedding", "scaled-embedding", "tied-embedding", "children-read", "layer", "rms", "group", "batch"
    )  # fmt: skip
    whole = host.name.startswith(("attention", "encoder")) and host.name not in (
        "attention-out",
        "encoder-eval-linear1",
    )
    inputless = whole or host.name.startswith(lookups_and_norms)
    return 'on="output"' if inputless else _no_factor(host)


def _bottleneck(name: str, refuses: Callable[[Host], str] = _no_features, **config: Any) -> Kind:
    flags = {key: config.pop(key) for key in ("random", "extra") if key in config}
    # It rounds what `down`, the activation and `up` give, and the sum; with a norm also the mean, the deviation, the
    # quotient and its affine map.
    roundings = 8 if "norm" in config else 4
    row = {"width": 3, **config}
    return Kind(name, peftlib.Bottleneck, row, None, refuses, beside=_bottleneck_beside, roundings=roundings, **flags)


def _no_attention(host: Host) -> str:
    heads = "" if host.name.startswith("attention") else "heads="
    return _READ.get(host.name, heads)


KINDS = [
    _lora("lora"),
    _lora("lora-dropout", _no_input_shown, dropout=0.4, random=True),
    _lora("lora-pissa", init="pissa", rank_stabilized=True),
    _lora("lora-gaussian", init="gaussian", rank_stabilized=True, extra=True),
    _lora("lora-orthogonal", init="orthogonal", extra=True),
    _dora("dora"),
    _dora("dora-dropout", _no_input, dropout=0.4, random=True, rank_stabilized=True),
    Kind("ia3", peftlib.IA3, {}, _factor_weights, _no_factor),
    Kind("ia3-input", peftlib.IA3, {"on": "input"}, _factor_weights, _no_input_factor),
    _bottleneck("bottleneck"),
    _bottleneck("bottleneck-parallel", _no_parallel, position="parallel", norm="before", scale=0.5),
    _bottleneck("bottleneck-norm-after", norm="after", scale="learned", activation="silu", extra=True),
    _bottleneck("bottleneck-dropout", dropout=0.4, activation="tanh", random=True, extra=True),
    # Its scores, their softmax, the product with values, and out_proj round, then the gate and the sum.
    Kind("prefix", peftlib.Prefix, {"length": 3, "gate": True}, None, _no_attention, _prefix_beside, roundings=8),
    Kind("full", peftlib.Full, {}, _own_weights, _hooked, plain=False, pins_values=lambda host: host.pins),
]

CELLS = [(kind, host) for kind in KINDS for host in HOSTS]
LEGAL = [(kind, host) for kind, host in CELLS if not kind.refuses(host)]
MAIN = [(kind, host) for kind, host in LEGAL if not kind.extra]
REFUSED = [(kind, host) for kind, host in CELLS if kind.refuses(host)]


def table(cells: list[tuple[Kind, Host]], slow: Callable[[Kind, Host], bool] = lambda kind, host: False) -> Any:
    marks = lambda kind, host: pytest.mark.slow if slow(kind, host) else ()  # noqa: E731
    rows = [pytest.param(kind, host, id=f"{kind.name}-{host.name}", marks=marks(kind, host)) for kind, host in cells]
    return pytest.mark.parametrize(("kind", "host"), rows)


def is_extra(kind: Kind, host: Host) -> bool:
    """A variant of a kind whose arithmetic another row has too."""
    return kind.extra


def put(model: nn.Module, kind: Kind, host: Host, **more: Any) -> list[str]:
    extra = host.lora if issubclass(kind.kind, peftlib.LoRA) else {}
    return peftlib.inject(model, target(kind, host), kind.kind, **{**kind.config, **extra, **more})


def target(kind: Kind, host: Host) -> Any:
    return host.full_target if not issubclass(kind.kind, peftlib.LoRA) and host.full_target is not None else host.target


def adapted(kind: Kind, host: Host, dtype: torch.dtype = torch.float32, move: bool = True) -> nn.Module:
    model = host.model(dtype)
    put(model, kind, host)
    if host.name == "batch-norm" and kind.kind is peftlib.Full:  # its own statistics: in training another function
        model.eval()
    if move:
        randomise(model)
    return model


@torch.no_grad()
def randomise(model: nn.Module, name: str | None = None, seed: int = 3) -> None:
    """Moves every adapter parameter, so that no zero hides a term."""
    torch.manual_seed(seed)
    for parameter in peftlib.parameters(model, name):
        parameter.add_(torch.randn(parameter.shape).to(parameter) * 0.2)


def call(model: nn.Module, host: Host, dtype: torch.dtype = torch.float32, track: bool = False) -> list[Tensor]:
    """All floating-point outputs of the model, whole."""
    arguments, keywords = host.arguments(dtype, track)
    return floating(model(*arguments, **keywords))


def floating(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def plain_call(model: nn.Module, host: Host, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    with torch.no_grad():
        return call(model, host, dtype)


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) > 0 and all(map(torch.equal, found, expected))


def bits(model: nn.Module) -> list[tuple[str, bytes]]:
    """The base's parameters and buffers, to the bit (NaN and the sign of zero included)."""
    return [(key, raw(tensor)) for key, tensor in model.state_dict().items() if "adapters." not in key]


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


# The dense float64 reference


@dataclass
class Result:
    """Outputs and gradients, of the adapters by (host, adapter key) and of the floating-point inputs."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    inputs: list[Tensor] = field(default_factory=list)
    roundings: int = 4

    def items(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((f"output {n}", tensor) for n, tensor in enumerate(self.outputs))
        yield from self.gradients.items()
        yield from ((f"input {n}", tensor) for n, tensor in enumerate(self.inputs))


def cotangents(outputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(4)
    return [torch.randn(tensor.shape).to(tensor) for tensor in outputs]


def live(
    model: nn.Module,
    host: Host,
    dtype: torch.dtype = torch.float32,
    around: Callable[[], Any] = contextlib.nullcontext,
) -> Result:
    """The adapted model's own forward, in a context, and backward outside it, as torch advises for autocast."""
    arguments, keywords = host.arguments(dtype, track=True)
    with around():
        outputs = floating(model(*arguments, **keywords))
    named = {f"{at} {name} {key}": p for at, name, part in peftlib.adapters(model) for key, p in keyed(part)}
    inputs = [leaf for leaf in floating(arguments) if leaf.requires_grad]
    found = torch.autograd.grad(outputs, [*named.values(), *inputs], cotangents(outputs))
    gradients = dict(zip(named, found, strict=False))
    return Result([o.detach() for o in outputs], gradients, list(found[len(named) :]))


def keyed(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters under keys that tell apart several adapters of one host."""
    prefix = getattr(part, "param", "")
    return ((f"{prefix} {key}", parameter) for key, parameter in part.named_parameters())


def dense(
    kind: Kind, host: Host, model: nn.Module, dtype: torch.dtype, wide: torch.dtype, draw: int = 0,
    weight: float = 1.0, **how: Any,
) -> Result:  # fmt: skip
    """The base with weights W' written by hand from the adapters in `model`, of a base in `dtype` run in `wide`; with a
    weight W + w (W' − W) in their place, and y + w (y' − y) of what the kind gives beside its host.

    Its gradients of W' go on to A and B through the hand-written expression alone, in float64. `draw` moves W' by at
    most the half unit that rounding it moves it by."""
    base = host.base(dtype)
    if kind.plain and host.plain:
        host.plain(base)
    base = base.double()
    expressions: Leaves = {}
    leaves: Leaves = {}
    for at, name, part in peftlib.adapters(model):
        own = {key: tensor.detach().double().requires_grad_() for key, tensor in part.named_parameters()}
        leaves |= {f"{at} {name} {key}": own[plain] for (key, _), plain in zip(keyed(part), own, strict=True)}
        fixed = {key: tensor.detach().clone() for key, tensor in part.named_buffers()}
        if kind.weights is None:
            expressions |= {f"{at} {name} {key}": leaf for key, leaf in own.items()}
            continue
        found = kind.weights(host, at, part.config, base.get_submodule(at), own | fixed)
        expressions |= {f"{at}.{path}".lstrip("."): value for path, value in found.items()}
    if kind.weights is not None and weight != 1.0:
        expressions = {name: _between(_named(base, name).detach(), to, weight) for name, to in expressions.items()}
    torch.manual_seed(draw)
    base = base.to(wide)
    apart = {name: jitter(value, wide) if draw else value for name, value in expressions.items()}
    if kind.weights is None:
        folded = {name: value.detach().to(wide).requires_grad_() for name, value in apart.items()}
        stand_beside(kind, base, peftlib.adapters(model), folded, weight)
    else:
        folded = {name: reference.replace(base, name, value) for name, value in apart.items()}
    found = _run_dense(base, host, dtype, wide, expressions, folded, leaves, **how)
    return dataclasses.replace(found, roundings=kind.roundings)


def _named(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def _between(own: Tensor, to: Tensor, weight: float) -> Tensor:
    return own + weight * (to - own)


def stand_beside(kind: Kind, base: nn.Module, adapters: Any, folded: Leaves, weight: float = 1.0) -> None:
    """Changes what each adapted module of the base gives, as the row says it by hand."""
    for at, name, part in adapters:
        leaves = {key: folded[f"{at} {name} {key}"] for key, _ in part.named_parameters()}
        beside: Any = functools.partial(_beside, kind, part.config, leaves, weight)
        base.get_submodule(at).register_forward_hook(beside, with_kwargs=True)


def _beside(kind: Any, config: Any, leaves: Leaves, weight: float, owner: Any, args: Any, kwargs: Any, y: Any) -> Any:
    changed = kind.beside(config, leaves, owner, args, kwargs, y)
    if weight == 1.0:
        return changed
    return tree_map(lambda own, to: to if to is own else _between(own, to, weight), y, changed)


def jitter(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value * (1 + torch.finfo(dtype).eps / 2 * (2 * torch.rand(value.shape).double() - 1))


def dense_rounded(kind: Kind, host: Host, model: nn.Module, dtype: torch.dtype, **how: Any) -> list[Result]:
    return [dense(kind, host, model, dtype, dtype, draw, **how) for draw in (0, 1, 2)]


def _run_dense(
    base: nn.Module, host: Host, dtype: torch.dtype, wide: torch.dtype, expressions: Leaves, folded: Leaves,
    leaves: Leaves, around: Callable[[], Any] = contextlib.nullcontext,
) -> Result:  # fmt: skip
    arguments, keywords = host.arguments(dtype)
    arguments, keywords = converted((arguments, keywords), wide)
    inputs = [leaf.requires_grad_() for leaf in floating(arguments)]
    trained = {name: leaf for name, leaf in folded.items() if leaf.requires_grad}
    with host.base_path(), around():
        outputs = floating(base(*arguments, **keywords))
    given = [tensor.to(outputs[0].dtype) for tensor in cotangents([o.to(dtype) for o in outputs])]
    found = torch.autograd.grad(outputs, [*trained.values(), *inputs], given)
    upstream = [gradient.double() for gradient in found[: len(trained)]]
    chained = torch.autograd.grad([expressions[name] for name in trained], list(leaves.values()), upstream)
    outputs = [tensor.detach() for tensor in outputs]
    return Result(outputs, dict(zip(leaves, chained, strict=True)), list(found[len(trained) :]))


def allowed(exact: Tensor, rounded: list[Tensor], dtype: torch.dtype, roundings: int = 4) -> float:
    """What live may be off by, at the largest element.

    The dense model run in `dtype` is off by E, for it rounds every weight and every operation once; E is the largest of
    a few runs, in which the weights were rounded to either neighbour. Where it rounds once, the low-rank form rounds
    four times (x·A, times B, the cast, the sum), each by at most eps/2 of what it rounds, and errors travel on through
    the same model: 4·E, and 4·eps/2·max|y| for an E that is zero by chance. DoRA rounds three times more: the norm,
    m over it, and the product with that. In float64 there is nothing wider to measure E with: 1e-10 is some 1e5
    roundings."""
    size = exact.abs().max().item() if exact.numel() else 0.0
    if dtype == torch.float64:
        return 1e-10 * max(1.0, size)
    error = max((one.double() - exact).abs().max().item() for one in rounded) if exact.numel() else 0.0
    return roundings * (error + torch.finfo(dtype).eps / 2 * size)


def assert_close(found: Result, exact: Result, rounded: list[Result], dtype: torch.dtype) -> None:
    expected, own = dict(exact.items()), [dict(one.items()) for one in rounded]
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape, name
        off = (tensor.double() - expected[name]).abs().max().item() if tensor.numel() else 0.0
        limit = allowed(expected[name], [one[name] for one in own], dtype, exact.roundings)
        assert off <= limit, f"{name}: off by {off:.3g}, allowed {limit:.3g} at {expected[name].abs().max():.3g}"
    assert set(dict(found.items())) == set(expected) or not found.gradients


@functools.cache
def base_refuses(host: Host, dtype: torch.dtype) -> bool:
    """torch itself has no CPU kernel for this module in this dtype."""
    try:
        outputs = call(host.model(dtype), host, dtype, track=True)
        torch.autograd.backward(outputs, cotangents(outputs))
    except (RuntimeError, NotImplementedError) as error:
        return known(error, "not implemented|expected scalar type")
    return False


def known(error: object, pattern: str) -> bool:
    """Only failures that are torch's own excuse a cell."""
    if not re.search(pattern, str(error)):
        pytest.fail(f"the base itself fails: {error}")
    return True


# The laws


@table(REFUSED)
def test_a_kind_refuses_a_host_that_it_cannot_adapt_and_leaves_it_alone(kind, host):
    model = host.model()
    before = trace(model)
    with pytest.raises(peftlib.AdapterError, match=kind.refuses(host)):
        put(model, kind, host)
    assert trace(model) == before


@table(LEGAL)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_inserting_changes_no_bit_of_the_output(kind, host, training):
    own_statistics = kind.kind is peftlib.Full and "norm" in host.name
    base = host.model().train(training) if own_statistics else host.base(training=training)
    model = host.model().train(training)
    put(model, kind, host)
    with host.base_path():
        found = call(model, host), plain_call(model, host)
        trained = call(base, host), plain_call(base, host)
        base.requires_grad_(False)
        frozen = call(base, host), plain_call(base, host)
        for one, *either in zip(found, trained, frozen, strict=True):
            assert any(same(one, other) for other in either)  # torch picks some kernels by the weights' flags


@table(LEGAL)
def test_the_table_names_every_adapted_weight(kind, host):
    model = host.model()
    names = put(model, kind, host)
    assert set(names) == {at for at, _, _ in peftlib.adapters(model)}
    if issubclass(kind.kind, peftlib.LoRA):
        found = {(at, part.config["param"]) for at, _, part in peftlib.adapters(model)}
        assert found == {(at, param) for at, params in host.weights.items() for param in params}


@table(MAIN)
def test_switched_off_and_ejected_the_output_is_the_base_s_to_the_bit(kind, host):
    base, model = host.base().requires_grad_(False), adapted(kind, host)
    torch.manual_seed(0)
    with_adapter = plain_call(model, host)
    with peftlib.activate(model):
        assert same(plain_call(model, host), plain_call(base, host))
        assert same(call(model, host), call(base, host))
    torch.manual_seed(0)
    if not host.name.endswith("max-norm"):  # the base renormalises its own weights when it runs
        assert kind.random or same(plain_call(model, host), with_adapter)
    assert not same(with_adapter, plain_call(host.base(), host))
    peftlib.eject(model)
    base = host.model().train(model.training)
    assert same(plain_call(model, host), plain_call(base, host))
    assert same(call(model, host), call(base, host))


def trace(model: nn.Module) -> Any:
    """All that a module holds: class, attributes, hooks, children, parameters with their identity and flags, keys."""
    modules = [(name, type(module), id(module), _frozen(module)) for name, module in model.named_modules()]
    flags = [(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)]
    return modules, flags, list(model.state_dict())


def _frozen(module: nn.Module) -> Any:
    return sorted((name, _freeze(value)) for name, value in vars(module).items())


def _freeze(value: Any) -> Any:
    if isinstance(value, dict):
        return [(str(key), _freeze(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [_freeze(item) for item in value]
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return [str(value.dtype), *value.shape, raw(value)]
    return repr(value) if isinstance(value, (int, float, str, bool, type(None))) else str(id(value))


@table(MAIN)
def test_eject_leaves_everything_as_it_was(kind, host, tmp_path):
    model = host.model()
    next(model.parameters()).requires_grad_(False)
    model.register_forward_hook(lambda *_: None)
    for inner in model.children():
        inner.register_forward_pre_hook(lambda *_: None)
    plain_call(model, host)
    before, weights = trace(model), bits(model)
    put(model, kind, host)
    randomise(model)
    live(model, host)
    peftlib.activate(model)  # two copies of one weight are not active together
    put(model, kind, host, name="second", freeze=False)
    randomise(model)
    plain_call(model, host)
    with contextlib.nullcontext() if refuses_merge(kind, host) else peftlib.merged(model, "second"):
        plain_call(model, host)
    peftlib.activate(model, "second")
    peftlib.save(model, tmp_path / "adapter.safetensors", "second")
    peftlib.eject(model, "default")
    peftlib.activate(model)
    peftlib.load(model, tmp_path / "adapter.safetensors", "third")
    peftlib.eject(model)
    if host.settles:
        plain_call(model, host)
    assert trace(model) == before
    assert bits(model) == weights


def refuses_merge(kind: Kind, host: Host) -> str:
    if kind.weights is None:
        return kind.kind.__name__
    return host.no_full_merge if kind.kind is peftlib.Full else host.no_merge


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp64", "fp32", "fp16", "bf16"])
@table(LEGAL, slow=is_extra)
def test_live_merged_and_gradients_equal_the_dense_float64_reference(kind, host, dtype):
    if base_refuses(host, dtype):
        with pytest.raises((RuntimeError, NotImplementedError)):
            live(adapted(kind, host, dtype), host, dtype)
        return
    model = adapted(kind, host, dtype)
    if kind.random:
        for _, _, part in peftlib.adapters(model):
            part.eval()  # the rest stays as it is: in training a BatchNorm is another function
    exact = dense(kind, host, model, dtype, torch.float64)
    rounded = [] if dtype == torch.float64 else dense_rounded(kind, host, model, dtype)
    assert_close(live(model, host, dtype), exact, rounded, dtype)
    assert_close(Result(plain_call(model, host, dtype)), exact, rounded, dtype)
    if not refuses_merge(kind, host):
        with peftlib.merged(model), host.base_path():
            assert_close(Result(plain_call(model, host, dtype)), exact, rounded, dtype)


def refuses_weight(kind: Kind, host: Host) -> bool:
    """Running statistics of its own, which move in training."""
    return kind.kind is peftlib.Full and host.name.startswith("batch-norm")


@table(MAIN)
def test_a_weight_multiplies_what_the_adapter_changes(kind, host):
    """Outputs, gradients and the merged weight, by the dense reference; with 1 it is to the bit what it was, and with
    0 what it is without the adapter."""
    model = adapted(kind, host, torch.float64)
    if refuses_weight(kind, host):
        with refused(model, "default", "Full", "1"):
            peftlib.activate(model, {"default": 0.6})
        return
    for _, _, part in peftlib.adapters(model) if kind.random else ():
        part.eval()
    before = plain_call(model, host, torch.float64)
    with peftlib.activate(model, {"default": -0.6}):
        exact = dense(kind, host, model, torch.float64, torch.float64, weight=-0.6)
        assert_close(live(model, host, torch.float64), exact, [], torch.float64)
        if not refuses_merge(kind, host):
            with peftlib.merged(model), host.base_path():
                assert_close(Result(plain_call(model, host, torch.float64)), exact, [], torch.float64)
    with peftlib.activate(model, {"default": 0}):
        without = plain_call(model, host, torch.float64)
    with peftlib.activate(model):
        assert same(without, plain_call(model, host, torch.float64))
    with peftlib.activate(model, {"default": 1}):
        found = plain_call(model, host, torch.float64)
    assert host.name.endswith("max-norm") or same(found, before)  # the base renormalises its own weights when it runs


def _half(y: Tensor) -> tuple[slice, ...]:
    return (slice(0, max(1, y.shape[0] // 2)),) if y.dim() else ()


# What may follow a layer: the operation in place, and out of place.
FOLLOWED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "mul_": (lambda y: y.mul_(2.0), lambda y: y * 2.0),
    "relu_": (torch.relu_, torch.relu),
    "view": (lambda y: y.view_as(y).add_(1.0), lambda y: y + 1.0),
    "transpose_": (lambda y: y.transpose_(0, -1).mul_(3.0), lambda y: y.transpose(0, -1) * 3.0),
    "slice": (lambda y: _assigned(y), lambda y: _assigned(y.clone())),
}


IN_PLACE = [
    *((name, torch.float64 if name == "transpose_" else torch.float32) for name in FOLLOWED),
    ("mul_", torch.bfloat16),
]


def _assigned(y: Tensor) -> Tensor:
    y[_half(y)] = 0.5
    return y


@table(MAIN)
def test_an_operation_in_place_on_the_output_equals_the_same_out_of_place(kind, host):
    """To the bit; where the gradient has another layout, sums are taken in another order: in float64 1e-12 of them."""
    models = {
        dtype: adapted(kind, host, dtype) for dtype in {each for _, each in IN_PLACE} if not base_refuses(host, dtype)
    }
    for operation, dtype in IN_PLACE:
        if dtype not in models:
            continue
        inside, outside = (followed(models[dtype], host, dtype, follow) for follow in FOLLOWED[operation])
        for one, other in zip(inside, outside, strict=True):
            if one is None or other is None:
                assert one is other
            elif operation == "transpose_":
                assert (one - other).abs().max() <= 1e-12 * max(1.0, other.abs().max())
            else:
                assert same([one], [other]), operation


def followed(model: Any, host: Host, dtype: torch.dtype, follow: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    """The first output with an operation behind it, and the gradients of adapters and inputs."""
    torch.manual_seed(5)
    arguments, keywords = host.arguments(dtype, track=True)
    y = follow(floating(model(*arguments, **keywords))[0])
    inputs = [leaf for leaf in floating(arguments) if leaf.requires_grad]
    leaves = [*peftlib.parameters(model), *inputs]
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangents([y]), allow_unused=True)]


@table(LEGAL, slow=is_extra)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp64", "fp32", "fp16", "bf16"])
def test_a_merged_weight_is_the_dense_one_rounded_once(kind, host, dtype):
    """|merged − W'| ≤ eps/2·|W'| for the one rounding, and for float32 arithmetic (rank + 3)·eps32·(|W| + s|B||A|)
    ≤ 8·eps32·(|W| + |W'| + ...), here with the largest element for the sum; DoRA's norm, its quotient and the product
    with that round as often again."""
    if refuses_merge(kind, host):
        model = adapted(kind, host, dtype)
        before = bits(model)
        with pytest.raises(peftlib.AdapterError, match=refuses_merge(kind, host)):
            peftlib.merge(model)
        assert bits(model) == before
        return
    model = adapted(kind, host, dtype)
    for name, exact in dense_weights(kind, host, model, dtype).items():
        streamed = dict(peftlib.merged_state_dict(model))[name]
        with peftlib.merged(model):
            found = model.state_dict()[name].clone()
            assert torch.equal(found, streamed)
        assert found.dtype == dtype or not found.is_floating_point() or kind.kind is peftlib.Full
        arithmetic = torch.finfo(torch.float32 if dtype != torch.float64 else dtype).eps
        slack = 2 * kind.roundings * arithmetic * exact.abs().max()
        unit = torch.finfo(found.dtype).eps / 2 if found.is_floating_point() else 0.0
        tiny = torch.finfo(found.dtype).smallest_normal * unit if found.is_floating_point() else 0.0
        assert ((found.double() - exact).abs() <= unit * exact.abs() + slack + tiny).all(), name


def dense_weights(kind: Kind, host: Host, model: nn.Module, dtype: torch.dtype) -> Leaves:
    base = host.model(dtype).double()
    found: Leaves = {}
    for at, _, part in peftlib.adapters(model):
        leaves = {key: tensor.detach().double() for key, tensor in part.state_dict().items()}
        weights = kind.weights(host, at, part.config, base.get_submodule(at), leaves)
        found |= {f"{at}.{path}".lstrip("."): value for path, value in weights.items()}
    return found


MERGEABLE = [(kind, host) for kind, host in MAIN if not refuses_merge(kind, host)]


@table(MERGEABLE)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["fp32", "fp16", "bf16"])
def test_unmerge_restores_every_bit(kind, host, dtype):
    model = adapted(kind, host, dtype)
    before = bits(model)
    for cycle, backup in enumerate(("device", "cpu")):
        randomise(model, seed=cycle)
        peftlib.merge(model, backup=backup)
        assert bits(model) != before
        peftlib.unmerge(model)
        assert bits(model) == before


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.weights and not kind.extra], ids=lambda kind: kind.name
)
def test_a_thousand_merges_with_a_moving_adapter_leave_every_bit(kind, dtype):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5), nn.Conv1d(2, 4, 3)).to(dtype)
    peftlib.inject(model, ["0", "1"], kind.kind, **kind.config)
    before = bits(model)
    for cycle in range(1000):
        randomise(model, seed=cycle)
        peftlib.merge(model, backup=("device", "cpu")[cycle % 2])
        peftlib.unmerge(model)
        assert bits(model) == before, cycle


@table(MAIN)
def test_only_adapters_train_and_no_frozen_weight_moves(kind, host):
    model = adapted(kind, host, move=False)
    before = bits(model)
    own = list(peftlib.parameters(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3)
    reached: set[int] = set()
    for _ in range(20):
        optimizer.zero_grad()
        outputs = [tensor for tensor in call(model, host) if tensor.requires_grad]
        torch.autograd.backward(outputs, cotangents(outputs))
        found = {id(p) for p in model.parameters() if p.grad is not None and p.grad.any()}
        assert found <= {id(p) for p in own}
        reached |= found
        optimizer.step()
    assert reached == {id(p) for p in own}
    base = host.base()
    for _ in range(20):  # an embedding with max_norm rescales itself, adapted or not
        call(base, host)
    assert bits(model) in (before, bits(base))


@table(MAIN)
def test_saved_and_loaded_the_output_is_identical(kind, host, tmp_path):
    model, fresh = adapted(kind, host).eval(), host.model()
    peftlib.save(model, tmp_path / "adapter.safetensors")
    peftlib.load(fresh, tmp_path / "adapter.safetensors")
    fresh.eval()
    assert same(plain_call(fresh, host), plain_call(model, host))
    assert {key: raw(t) for key, t in fresh.state_dict().items()} == {k: raw(t) for k, t in model.state_dict().items()}


@table(MAIN)
@pytest.mark.parametrize("wrong", ["values", "shape"])
def test_a_wrong_base_is_refused(kind, host, wrong, tmp_path):
    peftlib.save(adapted(kind, host), tmp_path / "adapter.safetensors")
    other = host.model()
    for name in {at for at, _, _ in peftlib.adapters(adapted(kind, host))}:
        spoil(other.get_submodule(name), wrong)
    before = trace(other)
    if wrong == "values" and not kind.pins_values(host):  # what the adapter replaces may have any value
        assert peftlib.load(other, tmp_path / "adapter.safetensors")
        return
    with pytest.raises(peftlib.AdapterError):
        peftlib.load(other, tmp_path / "adapter.safetensors")
    assert trace(other) == before


@torch.no_grad()
def spoil(host: nn.Module, wrong: str) -> None:
    for module in host.modules():
        for name, parameter in dict(module._parameters).items():
            if parameter is not None:
                larger = torch.cat([parameter, parameter[-1:]])
                setattr(module, name, nn.Parameter(larger if wrong == "shape" else parameter + 1))
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()


def by_deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@table(MAIN)
@pytest.mark.parametrize("clone", [by_deepcopy, by_pickle])
def test_a_clone_is_identical_and_independent(kind, host, clone):
    model = adapted(kind, host).eval()
    if clone is by_pickle and host.no_pickle:
        with pytest.raises(RuntimeError, match=host.no_pickle):
            clone(host.model())
        with pytest.raises(RuntimeError, match=host.no_pickle):
            clone(model)
        return
    expected = plain_call(model, host)
    other = clone(model)
    assert same(plain_call(other, host), expected)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    randomise(other)
    assert not same(plain_call(other, host), expected)
    peftlib.activate(other)
    assert same(plain_call(model, host), expected)
    peftlib.eject(other)
    assert same(plain_call(model, host), expected)
    assert not {t.data_ptr() for t in other.state_dict().values()} & {t.data_ptr() for t in model.state_dict().values()}


@table(MAIN)
def test_checkpointing_gives_equal_gradients(kind, host):
    model = adapted(kind, host)
    torch.manual_seed(5)
    expected = live(Checkpointed(model, recompute=False), host)
    torch.manual_seed(5)
    found = live(Checkpointed(model, recompute=True), host)
    assert dict(found.items()).keys() == dict(expected.items()).keys()
    assert same([t for _, t in found.items()], [t for _, t in expected.items()])


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module, recompute: bool) -> None:
        super().__init__()
        self.model, self.recompute = model, recompute

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        torch.manual_seed(6)
        if not self.recompute:
            return self.model(*args, **kwargs)
        return checkpoint(self.model, *args, use_reentrant=False, **kwargs)


@table(MAIN)
def test_autocast_equals_the_dense_reference(kind, host):
    cast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    model = adapted(kind, host).eval() if kind.random else adapted(kind, host)
    exact = dense(kind, host, model, torch.float32, torch.float64)
    rounded = dense_rounded(kind, host, model, torch.float32, around=cast)
    found = live(model, host, around=cast)
    assert [t.dtype for t in found.outputs] == [t.dtype for t in rounded[0].outputs]
    assert_close(found, exact, rounded, torch.bfloat16)


@table(MAIN)
def test_under_autocast_inserting_changes_no_bit(kind, host):
    base, model = host.base(), adapted(kind, host, move=False)
    with torch.autocast("cpu", torch.bfloat16), host.base_path():
        assert same(call(model, host), call(base, host))


def _differentiated_forward(model: nn.Module, host: Host) -> tuple[list[Tensor], list[Tensor], float, float]:
    """Outputs, their tangents, and for a random cotangent g and tangents t both sides of <g, J t> = <Jᵀ g, t>."""
    arguments, keywords = host.arguments(torch.float64, track=True)
    inputs = [leaf for leaf in floating(arguments) if leaf.requires_grad]
    own = dict(model.named_parameters())
    torch.manual_seed(5)
    tangents = [torch.randn_like(leaf) for leaf in [*inputs, *own.values()]]
    torch.manual_seed(6)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(*pair) for pair in zip([*inputs, *own.values()], tangents, strict=True)]
        given = {id(leaf): dual for leaf, dual in zip(inputs, duals, strict=False)}
        arguments = tree_map(lambda leaf: given.get(id(leaf), leaf), arguments)
        moved = dict(zip(own, duals[len(inputs) :], strict=True))
        outputs = floating(torch.func.functional_call(model, moved, arguments, keywords))
        pairs = [forward_ad.unpack_dual(output) for output in outputs]
        back = torch.autograd.grad(outputs, [*inputs, *own.values()], cotangents(outputs), allow_unused=True)
        back = [None if each is None else forward_ad.unpack_dual(each).primal for each in back]
    forward = math.fsum((g * pair.tangent).sum().item() for g, pair in zip(cotangents(outputs), pairs, strict=True))
    backward = math.fsum((g * t).sum().item() for g, t in zip(back, tangents, strict=True) if g is not None)
    changes: list[Any] = [pair.tangent for pair in pairs]
    return [pair.primal for pair in pairs], changes, forward, backward


# Hosts that torch differentiates forward; in backward these two change the gradient of their table on purpose.
_FORWARD_MODE = ("linear", "conv", "transposed", "embedding", "hf-conv1d", "layer-norm", "experts", "two-names", "tied")
_RESCALED = ("embedding-padding", "embedding-frequency")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own rules; FutureWarning since torch 2.14
@table([(kind, host) for kind, host in MAIN if host.name.startswith(_FORWARD_MODE) and host.name not in _RESCALED])
def test_forward_mode_is_the_transpose_of_backward_mode(kind, host):
    """For the weights of the base too, as if they trained."""
    model = adapted(kind, host, torch.float64).requires_grad_(True)
    outputs, tangents, forward, backward = _differentiated_forward(model, host)
    assert any(tangent.any() for tangent in tangents)
    assert forward == pytest.approx(backward, rel=1e-9)
    if not kind.random:
        for found, expected in zip(outputs, call(model, host, torch.float64), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class _OfOneArgument(nn.Module):
    """A root whose code names its arguments, as torch.fx asks."""

    def __init__(self, model: nn.Module, arguments: int, keywords: Mapping[str, Any]) -> None:
        super().__init__()
        self.model, self.arguments, self.keywords = model, arguments, keywords

    def forward(self, given: Any) -> Any:
        return self.model(*[given[at] for at in range(self.arguments)], **self.keywords)


class _NoLeaves(torch.fx.Tracer):
    """It goes into the modules of torch too, as it goes into those of users."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return False


@table(MAIN)
def test_a_graph_of_fx_gives_the_same_bits(kind, host):
    arguments, keywords = host.arguments()
    root = _OfOneArgument(adapted(kind, host), len(arguments), keywords)
    if host.settles:
        with pytest.raises(peftlib.AdapterError, match=r"model\.host.*hooks"):
            _NoLeaves().trace(root)
        return
    graph = torch.fx.GraphModule(root, _NoLeaves().trace(root))
    found, expected = ([torch.manual_seed(7), floating(each(arguments))][1] for each in (graph, root))
    assert same(found, expected)


def test_a_root_that_is_adapted_itself_is_refused_by_fx_and_serves_inside_another():
    model = nn.Linear(5, 3)
    peftlib.inject(model, nn.Linear, peftlib.LoRA, rank=2)
    with refused(model, "root", "Linear"):
        torch.fx.symbolic_trace(model)
    x = torch.randn(2, 5)
    assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(model))(x), model(x))


_TRACED = ("linear", "conv2d", "transposed2d-grouped", "embedding", "experts")


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")  # torch would rather have torch.export
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of checks that hold for every size
@table([(kind, host) for kind, host in MAIN if host.name in _TRACED])
def test_traced_by_jit_it_serves_other_sizes(kind, host):
    model = adapted(kind, host).eval()
    (x,), _ = host.arguments()
    traced = torch.jit.trace(model, (x,), check_trace=False)
    for given in (x, torch.cat([x, x[:1]]), x[:1]):
        torch.testing.assert_close(traced(given), model(given))


@table(MAIN)
def test_functional_call_and_inference_mode_are_equal(kind, host):
    model = adapted(kind, host).eval()
    expected = plain_call(model, host)
    with torch.inference_mode():
        assert same(call(model, host), expected)
    other = {name: p + 0.1 for name, p in model.named_parameters() if "adapters." in name}
    arguments, keywords = host.arguments()
    with torch.no_grad():
        found = floating(
            torch.func.functional_call(model, other, arguments, keywords, tie_weights=host.name != "two-names")
        )
        # torch's functional_call leaves its own values in a module that has two names, unless told not to tie them
        assert same(plain_call(model, host), expected)
        for name, p in model.named_parameters():
            p.copy_(other.get(name, p))
    assert same(found, plain_call(model, host))
    assert not same(found, expected)


# Dynamo

COMPILED = ["linear", "conv2d-grouped-dilated", "embedding", "attention-both", "experts", "encoder-train"]


def is_sweep(kind: Kind, host: Host) -> bool:
    """Compiling costs a second a cell: a few at each commit."""
    return kind.name not in ("lora", "full", "bottleneck") or host.name not in COMPILED


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True, error_on_recompile=False):
        yield
    torch._dynamo.reset()


def compiles(host: Host) -> bool:
    """Whether torch compiles the base itself in one graph."""
    try:
        with torch.no_grad():
            call(torch.compile(host.model(), fullgraph=True, backend="eager"), host)
    except Exception as error:  # Dynamo raises many kinds
        return not known(type(error), "dynamo|functorch")
    finally:
        torch._dynamo.reset()
    return True


@table(MAIN, slow=is_sweep)
def test_compiled_there_is_one_graph_for_each_combination(kind, host, fresh_dynamo):
    model = adapted(kind, host).eval() if kind.random else adapted(kind, host)
    if not compiles(host):
        with pytest.raises(Exception, match=r"(?i)dynamo|unsupported|graph"):
            call(torch.compile(model, fullgraph=True, backend="eager"), host)
        return
    exact = dense(kind, host, model, torch.float32, torch.float64)
    rounded = dense_rounded(kind, host, model, torch.float32)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    start = copy.deepcopy(model.state_dict())
    with without_fast_path():  # Dynamo traces attention's slow path, which rounds otherwise
        with peftlib.activate(model):
            without = plain_call(model, host)
        for _ in range(2):
            model.load_state_dict(start)  # by itself, an embedding with max_norm rescales its own weight
            assert_close(Result(plain_call(compiled, host)), exact, rounded, torch.float32)
            with peftlib.activate(model):
                assert same(plain_call(compiled, host), without)
            assert counter.frame_count == 2


@table(MAIN, slow=is_sweep)
def test_compiled_gradients_are_equal(kind, host, fresh_dynamo):
    model = adapted(kind, host).eval() if kind.random else adapted(kind, host)
    if not compiles(host):
        return  # the law above has it
    with without_fast_path():  # Dynamo traces attention's slow path, which rounds otherwise
        model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        found = live(model, host)
    exact = dense(kind, host, model, torch.float32, torch.float64)
    rounded = dense_rounded(kind, host, model, torch.float32)
    assert_close(found, exact, rounded, torch.float32)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")  # Inductor's own
@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind.name in ("lora", "full", "bottleneck")], ids=lambda kind: kind.name
)
def test_inductor_agrees(kind, fresh_dynamo):
    host = next(host for host in HOSTS if host.name == "linear")
    model = adapted(kind, host)
    exact = dense(kind, host, model, torch.float32, torch.float64)
    rounded = dense_rounded(kind, host, model, torch.float32)
    model.forward = torch.compile(model.forward, fullgraph=True)
    assert_close(live(model, host), exact, rounded, torch.float32)


def test_equal_blocks_share_one_compiled_graph(fresh_dynamo):
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(6)))
    peftlib.inject(model, nn.Linear, peftlib.LoRA, rank=2)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    for block in model:
        block.compile(backend=counter, fullgraph=True)
    with torch.no_grad():
        model(torch.randn(3, 4))
    assert counter.frame_count == 1


# Laws with a name of their own


def named(name: str) -> tuple[Kind, Host]:
    return KINDS[0], next(host for host in HOSTS if host.name == name)


@pytest.mark.parametrize("name", ["attention-both", "attention-masks", "attention-extra-keys", "attention-eval"])
def test_attention_with_lora_on_in_and_out_projection_equals_float64_to_ten_digits(name):
    kind, host = named(name)
    model = adapted(kind, host, torch.float64)
    exact = dense(kind, host, model, torch.float64, torch.float64)
    found = live(model, host, torch.float64)
    assert len(found.gradients) == 4
    for key, tensor in found.items():
        assert (tensor - dict(exact.items())[key]).abs().max() <= 1e-10, key
    base = call(host.model(torch.float64), host, torch.float64)
    assert (found.outputs[0] - base[0]).abs().max() > 1e-3


def test_dropout_has_the_right_mean_and_scale_and_is_off_in_eval():
    """The term is s·B·A·(m∘x)/(1-p): its mean over masks is the term without dropout, and with x of one 1 and
    A = B = 1, it is exactly 0 or s/(1-p). The mean of n draws has deviation s·√(p/(1-p)/n): allow 6 of them."""
    rate, draws, scale = 0.4, 40_000, 1.5
    model = nn.Sequential(nn.Linear(1, 1, bias=False).requires_grad_(False))
    model[0].weight.zero_()
    peftlib.inject(model, "0", peftlib.LoRA, rank=1, alpha=scale, dropout=rate)
    with torch.no_grad():
        for parameter in peftlib.parameters(model):
            parameter.fill_(1.0)
    found = model(torch.ones(draws, 1)).detach()
    assert torch.allclose(found.unique(), torch.tensor([0.0, scale / (1 - rate)]))
    assert abs(found.mean().item() - scale) <= 6 * scale * (rate / (1 - rate) / draws) ** 0.5
    assert torch.equal(model.eval()(torch.ones(5, 1)), torch.full((5, 1), scale))


def test_dropout_gives_the_gradient_of_the_mask_that_ran():
    """With x = 1 and A = B = 1 the output is s·m/(1-p), and so is d output/d B; a mask drawn anew would not be."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    peftlib.inject(model, "0", peftlib.LoRA, rank=1, alpha=1.5, dropout=0.4)
    adapter = next(adapter for _, _, adapter in peftlib.adapters(model))
    with torch.no_grad():
        adapter.lora_A.fill_(1.0)
        adapter.lora_B.fill_(1.0)
        model[0].weight.zero_()
    for _ in range(30):
        x = torch.ones(7, 1, requires_grad=True)
        output = model(x)
        grads = torch.autograd.grad(output, [adapter.lora_A, adapter.lora_B, x], torch.arange(7.0)[:, None])
        weighted = (output.detach() * torch.arange(7.0)[:, None]).sum()
        assert torch.allclose(grads[0].sum(), weighted)
        assert torch.allclose(grads[1].sum(), weighted)
        assert torch.allclose(grads[2], output.detach() * torch.arange(7.0)[:, None])


@pytest.mark.parametrize("name", ["linear", "conv2d-grouped-dilated", "embedding", "attention-both", "lstm", "experts"])
def test_several_adapters_on_one_host_sum(name):
    kind, host = named(name)
    model = host.model(torch.float64)
    for number, adapter in enumerate(("one", "two", "three")):
        put(model, kind, host, name=adapter)
        randomise(model, adapter, seed=number)
    for active in (("one",), ("two", "three"), ("three", "one", "two")):
        exact = sum_of(kind, host, model, active)
        with peftlib.activate(model, *active):
            assert_close(Result(plain_call(model, host, torch.float64)), exact, [], torch.float64)
        with peftlib.merged(model, *active):
            assert_close(Result(plain_call(model, host, torch.float64)), exact, [], torch.float64)


def sum_of(kind: Kind, host: Host, model: nn.Module, active: tuple[str, ...]) -> Result:
    base, start = host.model(torch.float64), dict(host.model(torch.float64).named_parameters())
    values: Leaves = {}
    for at, name, part in peftlib.adapters(model):
        if name in active:
            leaves = {key: tensor.detach() for key, tensor in part.state_dict().items()}
            for path, value in kind.weights(host, at, part.config, base.get_submodule(at), leaves).items():
                full = f"{at}.{path}".lstrip(".")
                values[full] = values.get(full, start[full].detach()) + value - start[full].detach()
    for full, value in values.items():
        reference.replace(base, full, value)
    return Result(plain_call(base, host, torch.float64))


ORDERS = [(peftlib.Full, peftlib.LoRA), (peftlib.LoRA, peftlib.Full)]


@pytest.mark.parametrize("one_name", [True, False], ids=["one-name", "two-names"])
@pytest.mark.parametrize("kinds", ORDERS, ids=lambda kinds: "-then-".join(kind.__name__ for kind in kinds))
@pytest.mark.parametrize("name", ["linear", "scaled-linear", "attention-both", "lstm", "raw-matrix", "embedding"])
def test_kinds_on_one_host_nest_alike_live_and_merged(name, kinds, one_name):
    host = named(name)[1]
    model = host.model(torch.float64)
    for number, kind in enumerate(kinds):
        more = {"rank": 2, **host.lora} if kind is peftlib.LoRA else {}
        at = host.full_target if kind is peftlib.Full and host.full_target else host.target
        peftlib.inject(model, at, kind, name="one" if one_name else f"number{number}", **more)
        randomise(model, seed=number)
    live_output = Result(plain_call(model, host, torch.float64))
    with peftlib.merged(model):
        merged = Result(plain_call(model, host, torch.float64))
    assert_close(live_output, merged, [], torch.float64)


class Chain(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        for number, part in enumerate(parts):
            self.add_module(str(number), part)

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule("2")(self.get_submodule("1")(self.get_submodule("0")(x)))


@pytest.mark.parametrize("block", [Chain, nn.Sequential])
def test_full_around_a_block_whose_child_has_lora(block):
    torch.manual_seed(1)
    model = Around(block(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).double()
    peftlib.inject(model, "host.2", peftlib.LoRA, rank=2, alpha=3.0, name="inner")
    peftlib.inject(model, "host", peftlib.Full, name="outer")
    randomise(model)
    x = torch.randn(6, 4, dtype=torch.float64)
    parts = {name: part for _, name, part in peftlib.adapters(model)}
    own = {key.removeprefix("own."): tensor.detach() for key, tensor in parts["outer"].named_parameters()}
    delta = 1.5 * parts["inner"].lora_B.detach() @ parts["inner"].lora_A.detach()
    hidden = torch.tanh(x @ own["0.weight"].T + own["0.bias"])
    expected = hidden @ (own["2.weight"] + delta).T + own["2.bias"]
    assert torch.allclose(model(x), expected, rtol=0, atol=1e-12)
    before = bits(model)
    with peftlib.merged(model):
        assert torch.allclose(model(x), expected, rtol=0, atol=1e-12)
    assert bits(model) == before


def test_bias_only_tuning_moves_biases_alone():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    peftlib.inject(model, nn.Linear, peftlib.Full, params="bias")
    assert [tuple(p.shape) for p in peftlib.parameters(model)] == [(5,), (3,)]
    randomise(model)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items() if key.endswith("weight")}
    with peftlib.merged(model):
        assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in weights.items())


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_stay_with_the_adapter(training):
    base, model = nn.Sequential(nn.BatchNorm1d(4)), nn.Sequential(nn.BatchNorm1d(4))
    base.train(training)
    model.train(training)
    peftlib.inject(model, "0", peftlib.Full)
    before, x = bits(model), torch.randn(8, 4) + 2
    for _ in range(3):
        assert torch.equal(model(x), base(x))
    assert bits(model) == before
    adapter = next(part for _, _, part in peftlib.adapters(model))
    own = {key.removeprefix("own."): tensor for key, tensor in adapter.state_dict().items()}
    assert all(torch.equal(own[key], tensor) for key, tensor in base[0].state_dict().items())


@pytest.mark.parametrize("name", ["linear", "bilinear", "experts", "attention-both"])
def test_a_merge_under_autocast_is_the_same_merge(name):
    kind, host = named(name)
    model = adapted(kind, host)
    with peftlib.merged(model):
        expected = bits(model)
    with torch.autocast("cpu", torch.bfloat16), peftlib.merged(model):
        assert bits(model) == expected


# The meta device


@table([cell for cell in MAIN if not cell[1].settles and cell[0].name != "lora-pissa"])
def test_injected_on_meta_and_materialised_it_is_the_same_adapter(kind, host):
    plain = adapted(kind, host).eval()
    with torch.device("meta"):
        model = host.module().eval()
    put(model, kind, host)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert list(model.state_dict()) == list(plain.state_dict())
    model.to_empty(device="cpu")
    model.load_state_dict(plain.state_dict())
    assert same(plain_call(model, host), plain_call(plain, host))


@table([cell for cell in MAIN if not cell[1].settles])
def test_loaded_onto_meta_and_materialised_the_output_is_identical(kind, host, tmp_path):
    plain = adapted(kind, host).eval()
    peftlib.save(plain, tmp_path / "adapter.safetensors")
    with torch.device("meta"):
        model = host.module().eval()
    peftlib.load(model, tmp_path / "adapter.safetensors")
    weights = {key: tensor for key, tensor in plain.state_dict().items() if "adapters." not in key}
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    assert not unexpected
    assert all("adapters." in key for key in missing)
    assert same(plain_call(model, host), plain_call(plain, host))


def test_reset_parameters_draws_what_inject_would_have_drawn():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(5, 4))
    peftlib.inject(model, "0", peftlib.LoRA, rank=2)
    model.to_empty(device="cpu")
    adapter = next(part for _, _, part in peftlib.adapters(model))
    torch.manual_seed(7)
    adapter.reset_parameters()
    other = nn.Sequential(nn.Linear(5, 4))
    torch.manual_seed(7)
    peftlib.inject(other, "0", peftlib.LoRA, rank=2)
    twin = next(part for _, _, part in peftlib.adapters(other))
    assert same(list(adapter.parameters()), list(twin.parameters()))

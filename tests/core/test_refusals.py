"""Each refusal says where, what was found and what to do, and leaves the model as it was."""

import contextlib
import functools
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.parametrizations import weight_norm

import peftlib
from peftlib import AdapterError, DoRA, Full, LoRA
from support.helpers import Gain, Offset, chain, linears, modules, moved, network
from support.refusals import Refusal, check, refused, refuses, require_three_parts

pytestmark = pytest.mark.mutants


def inject(targets: Any, kind: Any = LoRA, **config: Any) -> Callable[[Any], Any]:
    return lambda model: peftlib.inject(model, targets, kind, **config)


def adapted(make: Callable[[], Any] = linears, targets: Any = "0", kind: Any = LoRA, **config: Any) -> Any:
    def made() -> Any:
        model = make()
        peftlib.inject(model, targets, kind, **config)
        return moved(model)

    return made


GOOD = "cannot put LoRA into layers.0: rank=9 is too large. Use rank=2."


@pytest.mark.parametrize(
    ("message", "names"),
    [
        ("layers.0: rank=9 is too large.", ()),
        ("layers.0: rank=9 is too large. Use rank=2", ()),
        (GOOD, ("0",)),
        (GOOD, ("layers",)),
        (GOOD, ("rank=2", "rank=9")),
    ],
    ids=["no advice", "no whole sentence", "part of a name", "start of a name", "where comes last"],
)
def test_a_message_that_lacks_a_part_or_a_name_is_noticed(message, names):
    require_three_parts(GOOD, "layers.0", "LoRA", "rank=9", "rank=2")
    with pytest.raises(AssertionError):
        require_three_parts(message, *names)


# ---- who may be a host


class Mute(nn.Module):
    """Holds a weight, but is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.ones(2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.up


class Around(nn.Module):
    """Has no parameter of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Crowded(nn.Linear):
    adapters = "something of its own"


class Final(nn.Linear):
    """Does not let itself be subclassed, so no adapted class can stand before it."""

    def __init_subclass__(cls) -> None:
        raise TypeError("Final is final")


def lazy() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces lazy modules as new
        return chain(nn.Linear(4, 4), nn.LazyLinear(3))


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return chain(nn.Linear(4, 4), torch.jit.script(nn.Linear(4, 4)))


def sharded() -> nn.Module:
    model = linears()
    model[1].weight.device_mesh = "a mesh"  # what a DTensor has, and no plain tensor
    return model


HOSTS = {
    "lazy": Refusal(lazy, inject(["0", "1"]), ("1", "LazyLinear", "lazy")),
    "scripted": Refusal(
        scripted,
        inject(["0", "1"]),
        ("1", "RecursiveScriptModule", "scripted"),
    ),
    "sharded": Refusal(sharded, inject(["0", "1"]), ("1", "fully_shard")),
    "an attribute `adapters` of its own": Refusal(
        lambda: chain(nn.Linear(2, 2), Crowded(2, 2)),
        inject(nn.Linear),
        ("1", "Crowded", "`adapters`"),
    ),
    "a submodule `adapters` of its own": Refusal(
        lambda: modules({"adapters": nn.Linear(2, 2)}),
        inject(nn.ModuleDict, Full),
        ("the root", "ModuleDict", "`adapters`"),
    ),
    "no forward": Refusal(
        lambda: chain(nn.Linear(2, 2), Mute()),
        inject(["0", "1"]),
        ("1", "Mute", "forward"),
    ),
    "a class that cannot change": Refusal(
        lambda: chain(nn.Linear(2, 2), Final(2, 2)),
        inject(nn.Linear),
        ("1", "Final", "Final is final"),
    ),
    "a root whose class cannot change": Refusal(
        lambda: Final(2, 2),
        inject(nn.Linear),
        ("the root", "Final", "Final is final"),
    ),
    "a child that its parent reads, with a kind that has no path into it": Refusal(
        lambda: chain(nn.MultiheadAttention(4, 2)),
        inject("out_proj", Gain),
        ("0.out_proj", "HelperGain", "MultiheadAttention", "'out_proj'"),
    ),
}


@refuses(HOSTS)
def test_hosts_that_cannot_be_adapted(refusal):
    check(refusal, refusal.make())


def test_parameters_that_are_really_sharded(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = chain(nn.Linear(4, 4))
        fully_shard(model[0], mesh=init_device_mesh("cpu", (1,)))
        with refused(None, "0", "fully_shard"):
            peftlib.inject(model, "0", LoRA)
        assert not any("Adapted" in str(type(module).__mro__) for module in model.modules())
    finally:
        torch.distributed.destroy_process_group()


# ---- what may be put in


def conv() -> Any:
    return chain(nn.Conv1d(4, 4, 1), nn.ReLU(), nn.LayerNorm(4), nn.Embedding(5, 4), nn.Linear(4, 4))


CONFIGS = {
    **{
        f"rank={rank!r}": Refusal(
            linears,
            inject(["0", "1"], rank=rank),
            ("0", "LoRA", f"rank={rank!r}"),
        )
        for rank in (0, -1, 2.0, True, "8", None)
    },
    **{
        f"alpha={alpha!r}": Refusal(
            linears,
            inject("0", alpha=alpha),
            ("0", "LoRA", f"alpha={alpha!r}"),
        )
        for alpha in (0, -1.0, float("nan"), float("inf"), "16", True, None)
    },
    **{
        f"dropout={dropout!r}": Refusal(
            linears,
            inject("0", dropout=dropout),
            ("0", "LoRA", f"dropout={dropout!r}"),
        )
        for dropout in (1.0, -0.1, float("nan"), True, False, "0.1", None)
    },
    **{
        f"init={init!r}": Refusal(
            linears,
            inject("0", init=init),
            ("0", "LoRA", f"init={init!r}", "'kaiming'", "'gaussian'", "'orthogonal'", "'pissa'"),
        )
        for init in ("xavier", None, ["kaiming"])
    },
    **{
        f"{kind.__name__}, dtype={dtype!r}": Refusal(
            linears,
            inject("0", kind, dtype=dtype),
            ("0", kind.__name__, "dtype", repr(dtype)),
        )
        for kind in (LoRA, Full)
        for dtype in ("int8", "float33", "nn", torch.int32, 32)
    },
    "a rank beyond the singular vectors": Refusal(
        lambda: chain(nn.Linear(4, 4), nn.Linear(4, 2)),
        inject(nn.Linear, rank=3, init="pissa"),
        ("1", "LoRA", "rank=3", "[2, 4]", "2"),
    ),
    "dropout on an embedding": Refusal(
        conv,
        inject(["0", "3"], dropout=0.1),
        ("3", "LoRA", "dropout=0.1", "Embedding.weight", "dropout=0"),
    ),
    "dropout where only weights speak": Refusal(
        lambda: nn.MultiheadAttention(4, 2),
        inject(nn.MultiheadAttention, dropout=0.1),
        ("the root", "LoRA", "dropout=0.1", "MultiheadAttention.in_proj_weight"),
    ),
    "no weight at all": Refusal(
        conv,
        inject(["0", "1"]),
        ("1", "LoRA", "ReLU", "`weight`", "Full"),
    ),
    "only vectors": Refusal(
        conv,
        inject(nn.LayerNorm),
        ("2", "LoRA", "LayerNorm", "`weight`", "{'weight': (4,), 'bias': (4,)}", "Full"),
    ),
    "a matrix of another name": Refusal(
        lambda: chain(Expert()),
        inject("0"),
        ("0", "LoRA", "Expert", "`weight`", "{'up': (2, 3)}", "param='up'"),
    ),
    "a param that is not there": Refusal(
        lambda: chain(Expert()),
        inject("0", param="down"),
        ("0", "LoRA", "Expert.down", "up"),
    ),
    "a param deep in nowhere": Refusal(
        lambda: chain(Expert()),
        inject("0", param="a.b.down"),
        ("0", "LoRA", "Expert.a.b.down", "up"),
    ),
    "a param of a module whose matrices are deeper": Refusal(
        lambda: chain(Around(Expert())),
        inject("0", param="down"),
        ("0", "LoRA", "Around.down", "Full"),
    ),
    "a param that is a vector": Refusal(
        conv,
        inject("4", param="bias"),
        ("4", "LoRA", "Linear.bias", "(4,)", "weight"),
    ),
    "a param that is a vector, where all are": Refusal(
        conv,
        inject("2", param="bias"),
        ("2", "LoRA", "LayerNorm.bias", "(4,)", "Full"),
    ),
    "the second of two params": Refusal(
        lambda: chain(Expert()),
        inject("0", param=["up", "down"]),
        ("0", "LoRA", "Expert.down"),
    ),
    "a packed weight outside Linear": Refusal(
        lambda: chain(nn.Linear(4, 4), Packed()),
        inject(["0", "1"]),
        ("1", "LoRA", "Packed.weight", "torch.int8"),
    ),
    "Full on a packed weight": Refusal(
        lambda: chain(nn.Linear(4, 4), Packed()),
        inject(["0", "1"], Full),
        ("1", "Full", "Packed.weight", "torch.int8", "params"),
    ),
    "Full on a complex weight": Refusal(
        lambda: chain(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.complex64)),
        inject(["0", "1"], Full),
        ("1", "Full", "Linear.weight", "torch.complex64", "params"),
    ),
    "DoRA on a complex weight": Refusal(
        lambda: chain(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.complex64)),
        inject(["0", "1"], DoRA),
        ("1", "DoRA", "Linear.weight", "torch.complex64"),
    ),
    "Full on what is not there": Refusal(
        linears,
        inject("0", Full, params=["weight", "scale*"]),
        ("0", "Full", "params='scale*'", "Linear", "weight, bias"),
    ),
    "Full on nothing": Refusal(
        lambda: chain(nn.Linear(2, 2), nn.ReLU()),
        inject(["0", "1"], Full),
        ("1", "Full", "params='*'", "ReLU"),
    ),
    "Full on an out_proj, a weight that is not there": Refusal(
        lambda: chain(nn.MultiheadAttention(4, 2)),
        inject("out_proj", Full, params="gain"),
        ("0", "Full", "params='out_proj.gain'", "MultiheadAttention"),
    ),
    "a configuration that JSON cannot hold": Refusal(
        linears,
        inject(["0", "1"], Gain, start=torch.tensor(1.0)),
        ("0", "HelperGain", "{'start': tensor(1.)}"),
    ),
    "a configuration that is not finite": Refusal(
        linears,
        inject("0", Gain, start=float("inf")),
        ("0", "HelperGain", "{'start': inf}"),
    ),
}


@refuses(CONFIGS)
def test_configurations_that_make_no_sense(refusal):
    check(refusal, refusal.make())


NAMES = {
    **{
        f"name={name!r}": Refusal(
            linears,
            inject("0", name=name),
            (f"name={name!r}", "'.'", "':'"),
        )
        for name in ("", "a.b", "a:2", None, 3)
    },
    **{
        f"name={name!r}": Refusal(
            linears,
            inject("0", name=name),
            (f"name={name!r}", "ModuleDict"),
        )
        for name in ("keys", "pop", "forward", "type", "training", "selection", "_modules", "_parameters")
    },
    "a name that is taken there": Refusal(
        adapted(targets=["0", "1"]),
        inject("1"),
        ("1", '"default"', "LoRA", "'1.lora_A'"),
    ),
    "a name that is taken there by the same weights": Refusal(
        adapted(kind=Full, params="bias"),
        inject(["1", "0"], Full),
        ("0", '"default"', "Full", "'0.bias'"),
    ),
    "the same weight twice in one call": Refusal(
        lambda: chain(Expert()),
        inject("0", param=["up", "up"]),
        ("0", '"default"', "LoRA", "'0.up.lora_A'"),
    ),
}


@refuses(NAMES)
def test_names_that_cannot_be_given(refusal):
    check(refusal, refusal.make())


TARGETS = {
    "a typo": Refusal(
        network,
        inject("q_porj"),
        ("targets", "'q_porj'", "'q_proj'"),
    ),
    "a name in a model without names": Refusal(
        lambda: nn.Linear(2, 2),
        inject("q_proj"),
        ("targets", "'q_proj'", "submodules"),
    ),
    "an absent type": Refusal(
        network,
        inject([nn.Linear, nn.Conv2d]),
        ("targets", "Conv2d", "Embedding", "Linear", "ModuleList", "Network"),
    ),
    "a predicate that nothing satisfies": Refusal(
        network,
        inject(lambda name, module: False),
        ("targets", "'<lambda>'", "(name, module)"),
    ),
    "a partial as predicate": Refusal(
        network,
        inject(functools.partial(lambda answer, name, module: answer, False)),
        ("targets", "functools.partial"),
    ),
    "an empty list": Refusal(network, inject([]), ("targets", "empty")),
    "an absent exclude": Refusal(
        network, inject("q_proj", exclude=["v_proj", "haed"]), ("exclude", "'haed'", "'head'")
    ),
    "an exclude that takes all": Refusal(
        network,
        inject("head", exclude=nn.Linear),
        ("targets", "'head'", "exclude=<class 'torch.nn.modules.linear.Linear'>"),
    ),
}


@refuses(TARGETS)
def test_targets_that_match_nothing(refusal):
    check(refusal, refusal.make())


# ---- who is there


def without_adapters(act: Callable[[Any], Any]) -> Refusal:
    return Refusal(linears, act, ("Sequential", "peftlib.inject(model, ...)"))


def absent(act: Callable[[Any], Any]) -> Refusal:
    return Refusal(adapted(), act, ("Sequential", "'other'", "'default'"))


ON_A_MODEL = {
    "activate": peftlib.activate,
    "train_only": peftlib.train_only,
    "view": peftlib.view,
    "merge": peftlib.merge,
    "merged": lambda model, *names: peftlib.merged(model, *names).__enter__(),
    "merged_state_dict": peftlib.merged_state_dict,
    "eject": peftlib.eject,
    "eject, merged": lambda model, *names: peftlib.eject(model, *names, merge=True),
    "parameters": lambda model, *names: list(peftlib.parameters(model, *names)),
}
ABSENT = {
    **{f"{doing}, no adapter": without_adapters(act) for doing, act in ON_A_MODEL.items()},
    "unmerge, no adapter": without_adapters(peftlib.unmerge),
    "verify, no adapter": without_adapters(lambda model: peftlib.verify(model, torch.ones(1, 4))),
    "save, no adapter": without_adapters(lambda model: peftlib.save(model, "never written")),
    **{
        f"{doing}, no such name": absent(functools.partial(lambda act, m: act(m, "other"), act))
        for doing, act in ON_A_MODEL.items()
    },
    "activate, one name of two": absent(lambda model: peftlib.activate(model, "default", "other")),
    "save, no such name": absent(lambda model: peftlib.save(model, "never written", "other")),
}


@refuses(ABSENT)
def test_adapters_that_are_not_there(refusal):
    check(refusal, refusal.make())


# ---- merged, viewed, covered


def merged_model() -> Any:
    model = adapted()()
    peftlib.inject(model, "1", LoRA, name="other")
    peftlib.merge(model, "default")
    return model


def first_then_unmerge(doing: str) -> tuple[str, ...]:
    return (doing, "default", "unmerge")


STATES = {
    "inject into a merged model": Refusal(merged_model, inject("1", name="c"), first_then_unmerge("inject")),
    "eject from a merged model": Refusal(merged_model, peftlib.eject, first_then_unmerge("eject")),
    "a view of a merged model": Refusal(merged_model, peftlib.view, first_then_unmerge("view")),
    "verify a merged model": Refusal(
        merged_model, lambda model: peftlib.verify(model, torch.ones(1, 4)), first_then_unmerge("verify")
    ),
    "merge a merged model": Refusal(merged_model, lambda m: peftlib.merge(m, "other"), ("merge", "default", "unmerge")),
    "stream other names from a merged model": Refusal(
        merged_model,
        lambda m: peftlib.merged_state_dict(m, "other"),
        ("merged_state_dict", "default", "unmerge"),
    ),
    "eject another name than the merged one for good": Refusal(
        merged_model,
        lambda m: peftlib.eject(m, "other", merge=True),
        ("eject", "default", "'other'", "unmerge"),
    ),
    "unmerge what is not merged": Refusal(adapted(), peftlib.unmerge, ("unmerge", "Sequential", "merge")),
    "merge with nothing active": Refusal(
        lambda: peftlib.activate(adapted()()).__enter__(),
        peftlib.merge,
        ("merge", "active", "'default'"),
    ),
    "stream with nothing active": Refusal(
        lambda: peftlib.activate(adapted()()).__enter__(),
        peftlib.merged_state_dict,
        ("merged_state_dict", "active", "'default'"),
    ),
    "merge what has no weight form": Refusal(
        lambda: peftlib.inject(model := adapted()(), "1", Offset) and model,
        peftlib.merge,
        ("1", "merge", '"default"', "Offset"),
    ),
    "stream what has no weight form": Refusal(
        adapted(lambda: nn.Linear(4, 4), nn.Linear, Offset),
        peftlib.merged_state_dict,
        ("the root", "merged_state_dict", '"default"', "Offset"),
    ),
    "eject for good what has no weight form": Refusal(
        adapted(kind=Offset),
        lambda model: peftlib.eject(model, merge=True),
        ("0", "merge", '"default"', "Offset"),
    ),
    "run what has neither form": Refusal(
        lambda: formless(),
        lambda model: model(torch.ones(1, 4)),
        ("Formless", "forward", "fold"),
    ),
}


class Formless(peftlib.Adapter):
    """Forgets to say anything."""

    def __init__(self, host: Any) -> None:
        super().__init__()


def formless() -> Any:
    model = linears()
    peftlib.inject(model, "0", Formless)
    return model


@refuses(STATES)
def test_calls_that_do_not_fit_the_state(refusal):
    check(refusal, refusal.make())


def covered() -> Any:
    model = adapted(linears, ["0", "1"])()
    top = type(model[1])
    model[1].__class__ = type("Foreign", (top,), {})
    return model


@pytest.mark.parametrize("merge", [False, True])
def test_a_foreign_class_on_top_at_eject(merge):
    names = ("1", "Foreign", "Linear", "eject")
    check(Refusal(covered, lambda model: peftlib.eject(model, merge=merge), names))


# ---- what cannot be folded


@pytest.mark.parametrize(
    ("at", "make"), [("the root", lambda: nn.Linear(4, 4)), ("1", linears)], ids=["root", "inside"]
)
@pytest.mark.parametrize(
    ("found", "put"),
    [
        (
            ("forward",),
            lambda host: host.__dict__.update(forward=lambda x: x),
        ),
        (
            ("Foreign", "Other", "Linear"),
            lambda host: setattr(host, "__class__", type("Foreign", (type("Other", (type(host),), {}),), {})),
        ),
    ],
    ids=["a forward", "two classes"],
)
def test_what_was_put_on_a_host_after_inject_is_named_at_eject(at, make, found, put):
    model = adapted(make, nn.Linear)()
    put(model if at == "the root" else model[1])
    check(Refusal(linears, peftlib.eject, (at, *found, "eject")), model)


def tied() -> Any:
    model = modules({"embedding": nn.Embedding(4, 4), "head": nn.Linear(4, 4, bias=False)})
    model["head"].weight = model["embedding"].weight
    return model


def tied_by_memory() -> Any:
    model = linears()
    model[1].weight = nn.Parameter(model[0].weight.detach())  # another Parameter over the same memory
    return model


def poisoned(value: float, key: str = "lora_A") -> Any:
    model = adapted(linears, ["0", "1"])()
    with torch.no_grad():
        getattr(list(peftlib.adapters(model))[1][2], key).view(-1)[-1] = value
    return model


def overflowing() -> Any:
    """Each factor is finite in its float32; the product is beyond float16."""
    model = adapted(lambda: linears().half(), ["0", "1"], rank=1, alpha=1)()
    with torch.no_grad():
        list(peftlib.adapters(model))[1][2].lora_A.fill_(300)
        list(peftlib.adapters(model))[1][2].lora_B.fill_(300)
    return model


class Widened(Gain):
    """Folds to another shape."""

    def fold(self, host: Any) -> dict[str, torch.Tensor]:
        return {"weight": host.weight[:1] * self.gain}


FOLDS = {
    "a tied weight": Refusal(
        adapted(tied, "head"),
        peftlib.merge,
        ("head.weight", '"default"', "embedding.weight"),
    ),
    "a tied weight, from the other side": Refusal(
        adapted(tied, "embedding"),
        peftlib.merge,
        ("embedding.weight", '"default"', "head.weight"),
    ),
    "two adapters on both sides of a tie": Refusal(
        adapted(tied, ["embedding", "head"]),
        peftlib.merge,
        ("embedding.weight", '"default"', "head.weight"),
    ),
    "memory that is shared": Refusal(
        adapted(tied_by_memory, ["1"]),
        peftlib.merge,
        ("1.weight", '"default"', "0.weight"),
    ),
    "a computed weight": Refusal(
        adapted(lambda: chain(nn.Linear(4, 4), weight_norm(nn.Linear(4, 4))), nn.Linear),
        peftlib.merge,
        ("1.weight", "computed"),
    ),
    "no values": Refusal(
        lambda: meta_model(),
        peftlib.merge,
        ("0.weight", "meta"),
    ),
    "a folded form of another shape": Refusal(
        adapted(kind=Widened),
        peftlib.merge,
        ("0.weight", "[4, 4]", "[1, 4]", "fold"),
    ),
    **{
        f"{value} in {key}": Refusal(
            functools.partial(poisoned, value, key),
            peftlib.merge,
            ("1", '"default"', key, "NaN"),
        )
        for value in (float("nan"), float("inf"), float("-inf"))
        for key in ("lora_A", "lora_B")
    },
    "a product beyond the dtype": Refusal(
        overflowing,
        peftlib.merge,
        ("1.weight", "torch.float16", "NaN"),
    ),
}


def meta_model() -> Any:
    with torch.device("meta"):
        model = linears()
    peftlib.inject(model, "0", LoRA)
    return model


@refuses(FOLDS)
def test_weights_that_cannot_be_merged(refusal):
    check(refusal, refusal.make())


@refuses(FOLDS)
def test_weights_that_cannot_be_merged_cannot_be_streamed_or_ejected_either(refusal):
    check(refusal._replace(act=lambda model: list(peftlib.merged_state_dict(model))), refusal.make())
    check(refusal._replace(act=lambda model: peftlib.eject(model, merge=True)), refusal.make())


class Hidden(nn.Module):
    """Its weight is in no state dict."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(4, 4), persistent=False)
        self.bias = nn.Parameter(torch.zeros(4)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


@pytest.mark.parametrize("bias", [True, False], ids=["beside others", "alone"])
def test_a_merged_weight_that_is_in_no_state_dict(bias):
    names = ("merged_state_dict", "1", "state_dict()")
    model = adapted(lambda: chain(Hidden(bias), nn.Linear(4, 4)), "0", Gain)()
    check(Refusal(linears, lambda model: list(peftlib.merged_state_dict(model)), names), model)


def test_pissa_drawn_again_without_its_host():
    model = adapted(init="pissa", rank=2)()
    ((_, _, adapter),) = peftlib.adapters(model)
    names = ("LoRA", 'init="pissa"', "reset_parameters(host)")
    check(Refusal(linears, lambda model: adapter.reset_parameters(), names), model)


def test_two_kinds_of_one_name():
    with refused(None, "'LoRA'", "test_refusals.LoRA"):
        type("LoRA", (peftlib.Adapter,), {"__module__": __name__, "__qualname__": "LoRA"})
    model = linears()
    peftlib.inject(model, "0", LoRA)


# ---- files


@contextlib.contextmanager
def rewritten(path: Path) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """Lets a test change the tensors and the header of a saved file."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
        header = json.loads(file.metadata()["peftlib"])
    yield tensors, header
    save_file(tensors, path, {"format": "pt", "peftlib": json.dumps(header)})


@pytest.fixture
def saved(tmp_path):
    model = adapted(network, ["q_proj", "head"], rank=2)()
    peftlib.save(model, tmp_path / "adapter.safetensors", metadata={"task": "reviews"})
    return tmp_path / "adapter.safetensors"


def another_layer(tensors, header):
    header["hosts"]["layers.7.q_proj"] = header["hosts"]["head"]
    header["base"]["layers.7.q_proj"] = header["base"]["head"]


def duplicate(tensors, header):
    header["hosts"]["head"] = [0, 0]


DAMAGES = {
    "an unexpected key": (
        lambda tensors, header: tensors.update({"head.lora_C": torch.ones(2)}),
        ("head.lora_C", "unexpected"),
    ),
    "a missing key": (
        lambda tensors, header: tensors.pop("layers.1.q_proj.lora_B"),
        ("layers.1.q_proj.lora_B", "missing"),
    ),
    "many missing keys": (
        lambda tensors, header: [tensors.pop(key) for key in list(tensors)],
        ("head.lora_A", "missing", "head.lora_B", "layers.0.q_proj.lora_A", "2"),
    ),
    "a renamed key": (
        lambda tensors, header: tensors.update({"head.lora_a": tensors.pop("head.lora_A")}),
        ("head.lora_A", "head.lora_a"),
    ),
    "another shape": (
        lambda tensors, header: tensors.update({"head.lora_A": torch.ones(2, 9)}),
        ("head.lora_A", "[2, 9]", "[2, 8]"),
    ),
    "a transposed factor": (
        lambda tensors, header: tensors.update({"head.lora_A": tensors["head.lora_A"].T.contiguous()}),
        ("head.lora_A", "[8, 2]", "[2, 8]"),
    ),
    "another rank than its configuration": (
        lambda tensors, header: header["configs"][0]["config"].update(rank=3),
        ("[2, 8]", "[3, 8]"),
    ),
    "integers": (
        lambda tensors, header: tensors.update({"head.lora_A": torch.ones(2, 8, dtype=torch.int32)}),
        ("head.lora_A", "torch.int32", "torch.float32"),
    ),
    "complex numbers": (
        lambda tensors, header: tensors.update({"head.lora_A": torch.ones(2, 8, dtype=torch.complex64)}),
        ("head.lora_A", "torch.complex64", "torch.float32"),
    ),
    "NaN": (
        lambda tensors, header: tensors["head.lora_A"][0].fill_(float("nan")),
        ("head.lora_A", "NaN"),
    ),
    "infinity": (
        lambda tensors, header: tensors["head.lora_B"][0].fill_(float("-inf")),
        ("head.lora_B", "NaN"),
    ),
    "an unknown kind": (
        lambda tensors, header: header["configs"][0].update(kind="Unheard"),
        ("'Unheard'",),
    ),
    "another kind": (
        lambda tensors, header: header["configs"][0].update(kind="Full", config={}),
        ("head.lora_A", "head.weight"),
    ),
    "a kind that does not take its keywords": (
        lambda tensors, header: header["configs"][0].update(kind="Full"),
        ("Full", "unexpected keyword"),
    ),
    "an absent host": (
        another_layer,
        ("layers.7.q_proj", "Network"),
    ),
    "one adapter twice": (duplicate, ("head", '"default"', "LoRA", "'head.lora_A'")),
    "a name that cannot be": (
        lambda tensors, header: header.update(name="a.b"),
        ("name='a.b'",),
    ),
    "the values of another base": (
        lambda tensors, header: header["base"]["head"]["hash"].update(own="0" * 32),
        ("head", "values", "strict=False"),
    ),
    "the shapes of another base": (
        lambda tensors, header: header["base"]["head"]["weights"].update(weight=["float32", 3, 9]),
        ("head", "weight", "[3, 8]", "[3, 9]", "strict=False"),
    ),
    "weights that this base lacks": (
        lambda tensors, header: header["base"]["head"]["weights"].update(gain=["float32", 3]),
        ("head", "gain", "[3]", "strict=False"),
    ),
    **{
        f"{key}={value!r} in a configuration": (
            functools.partial(lambda k, v, tensors, header: header["configs"][0]["config"].update({k: v}), key, value),
            ("LoRA", key),
        )
        for key, value in {
            "rank": "8", "alpha": None, "dropout": [], "init": {}, "param": 5, "dtype": 7, "unheard": 1,
        }.items()
    },
    "a rank beyond all memory": (
        lambda tensors, header: header["configs"][0]["config"].update(rank=10**30),
        ("LoRA", "configuration"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "names"), DAMAGES.values(), ids=DAMAGES)
def test_files_that_do_not_fit(damage, names, saved):
    with rewritten(saved) as (tensors, header):
        damage(tensors, header)
    check(Refusal(network, lambda model: peftlib.load(model, saved), names))


HEADERS = {
    "a later format": ({"format": 2}, ("format 2", "1")),
    "no format": ({"format": None}, ("format None", "1")),
    "a format in words": ({"format": "1"}, ("format '1'", "1")),
    "a truth as format": ({"format": True}, ("format True", "1")),
    **{
        f"{key}={value!r}": ({key: value}, (f"'{key}'",))
        for key, value in {
            "version": 3, "name": None, "configs": {}, "hosts": [], "base": "x", "metadata": [1],
        }.items()
    },
    **{
        f"configs={value!r}": ({"configs": value}, ("configuration", "kind"))
        for value in ([3], [{}], [{"kind": 1, "config": {}}], [{"kind": "LoRA", "config": []}], [{"kind": "LoRA"}])
    },
    **{
        f"positions={value!r}": ({"hosts": {"head": value}}, ("'head'", "configuration"))
        for value in ([], 0, None, [1], [-1], [0.0], [True], ["0"], {})
    },
    **{
        f"fingerprint={value!r}": ({"base": {"head": value}}, ("fingerprint",))
        for value in (None, 3, {}, {"weights": []}, {"weights": {"weight": []}}, {"weights": {"weight": [3]}},
                      {"weights": {}, "hash": "x"}, {"weights": {"weight": "float32"}})
    },
}  # fmt: skip


@pytest.mark.parametrize(("change", "found"), HEADERS.values(), ids=HEADERS)
def test_headers_of_a_wrong_form(change, found, saved):
    with rewritten(saved) as (_, header):
        header.update(change)
    names = (str(saved), *found)
    check(Refusal(network, lambda model: peftlib.load(model, saved), names))
    check(Refusal(network, lambda model: peftlib.read_header(saved), names))


NO_JSON = {
    "empty": "",
    "cut": '{"format": 1,',
    "deep": "[" * 100_000,
    "a long number": '{"format": ' + "1" * 5_000 + "}",
}
NO_HEADER = {"a list": "[]", "a number": "3", "a word": '"peftlib"', "null": "null"}


@pytest.mark.parametrize("text", NO_JSON.values(), ids=NO_JSON)
def test_headers_that_are_no_json(text, saved):
    save_file({}, saved, {"peftlib": text})
    names = (str(saved), "JSON")
    check(Refusal(network, lambda model: peftlib.load(model, saved), names))


@pytest.mark.parametrize("text", NO_HEADER.values(), ids=NO_HEADER)
def test_headers_that_are_no_object(text, saved):
    save_file({}, saved, {"peftlib": text})
    names = (str(saved), "format")
    check(Refusal(network, lambda model: peftlib.load(model, saved), names))


def test_another_tools_file(saved):
    save_file({"weight": torch.ones(2)}, saved, {"format": "pt"})
    names = (str(saved), "header")
    check(Refusal(network, lambda model: peftlib.load(model, saved), names))
    save_file({"weight": torch.ones(2)}, saved)
    check(Refusal(network, lambda model: peftlib.load(model, saved), names))


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, -1, -100])
def test_a_truncated_file(keep, saved):
    whole = saved.read_bytes()
    saved.write_bytes(whole[:keep])
    names = (str(saved), "safetensors")
    check(Refusal(network, lambda model: peftlib.load(model, saved), names))


@pytest.mark.parametrize("junk", [b"PK\x03\x04" * 50, b"\xff" * 200, b"\0" * 200], ids=["zip", "ones", "zeros"])
def test_a_file_of_another_format(junk, saved):
    saved.write_bytes(junk)
    names = (str(saved), "safetensors")
    check(Refusal(network, lambda model: peftlib.load(model, saved), names))


def test_a_file_that_is_not_there_is_an_os_error(tmp_path):
    for act in (peftlib.read_header, lambda path: peftlib.load(network(), path)):
        with pytest.raises(FileNotFoundError):
            act(tmp_path / "nowhere.safetensors")
        with pytest.raises(IsADirectoryError):
            act(tmp_path)


def test_a_kind_that_gets_too_little_to_load(saved):
    with rewritten(saved) as (_, header):
        header["configs"][0]["config"]["unheard"] = 1
    names = (str(saved), "LoRA", "unheard")
    check(Refusal(network, lambda model: peftlib.load(model, saved), names))


LOADS = {
    "into a merged model": (
        lambda model: peftlib.merge(model),
        ("load", "b", "unmerge"),
    ),
    "beside a view": (
        lambda model: setattr(model, "face", None) or peftlib.view(model),
        ("load", "1", "view(s)"),
    ),
}


@pytest.mark.parametrize(("prepare", "names"), LOADS.values(), ids=LOADS)
def test_models_that_cannot_be_loaded_into(prepare, names, saved):
    model = network()
    peftlib.inject(model, "v_proj", LoRA, name="b")
    kept = prepare(model)
    check(Refusal(network, lambda model: peftlib.load(model, saved), names), model)
    del kept


def test_a_name_that_is_taken_at_load(saved):
    model = network()
    peftlib.load(model, saved)
    names = ("layers.0.q_proj", '"default"', "LoRA")
    check(Refusal(network, lambda model: peftlib.load(model, saved), names), model)


def test_a_lazy_host_at_load(saved):
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.head = nn.LazyLinear(3)
    names = ("head", "LazyLinear", "lazy")
    check(Refusal(network, lambda model: peftlib.load(model, saved), names), model)


SAVES = {
    "on the meta device": (
        meta_model,
        {},
        ("0.lora_A", "meta"),
    ),
    "metadata that JSON cannot hold": (
        adapted(),
        {"metadata": {"at": torch.ones(2)}},
        ("metadata", "{'at': tensor([1., 1.])}"),
    ),
    "metadata that are not finite": (
        adapted(),
        {"metadata": {"loss": float("nan")}},
        ("metadata", "{'loss': nan}"),
    ),
    "metadata that are infinite": (
        adapted(),
        {"metadata": {"loss": float("inf")}},
        ("metadata", "{'loss': inf}"),
    ),
    "metadata that are no dict": (adapted(), {"metadata": ["reviews"]}, ("metadata", "['reviews']")),
}


@pytest.mark.parametrize(("make", "keywords", "names"), SAVES.values(), ids=SAVES)
def test_what_cannot_be_saved(make, keywords, names, tmp_path):
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(b"the old file")
    check(Refusal(make, lambda model: peftlib.save(model, path, **keywords), names), make())
    assert [file.name for file in tmp_path.iterdir()] == ["adapter.safetensors"]
    assert path.read_bytes() == b"the old file"


def test_a_shard_cannot_be_saved(tmp_path):
    model = adapted()()
    ((_, _, adapter),) = peftlib.adapters(model)
    adapter.register_state_dict_post_hook(lambda module, state, prefix, _: setattr(state["lora_A"], "device_mesh", 1))
    names = ("0.lora_A", "shard")
    check(Refusal(linears, lambda model: peftlib.save(model, tmp_path / "a.safetensors"), names), model)


def test_a_folder_that_is_not_there(tmp_path):
    path = tmp_path / "nowhere" / "adapter.safetensors"
    with pytest.raises((AdapterError, OSError), match=r"nowhere"):
        peftlib.save(adapted()(), path)


class CachedBias(nn.Module):
    """As attention in timm's TinyViT: what it makes of a weight in eval mode is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 4)
        self.attention_biases = nn.Parameter(torch.randn(4, 4))
        self.attention_bias_cache: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.attention_biases[:, [0, 1, 2, 3]] if self.training else self.attention_bias_cache.get("cpu")
        if bias is None:
            bias = self.attention_bias_cache["cpu"] = self.attention_biases[:, [0, 1, 2, 3]]
        return self.qkv(x) + bias.sum(0)


@pytest.mark.parametrize("kind", [LoRA, DoRA, Full])
def test_a_module_that_keeps_what_it_made_of_its_weights(kind):
    model = nn.Sequential(CachedBias())
    with refused(model, "0", "CachedBias", "attention_bias_cache"):
        peftlib.inject(model, "0", kind, **({} if kind is Full else {"param": "attention_biases", "rank": 2}))
    assert peftlib.inject(model, "qkv", kind) == ["0.qkv"]
    assert peftlib.inject(model, "0", peftlib.Bottleneck, dim=4, name="around") == ["0"]


class Positions(nn.Embedding):
    """As ProphetNet's: called as a layer, and by a method of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input)

    def later(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input + 1)


@pytest.mark.parametrize("kind", [LoRA, DoRA, Full])
def test_a_layer_with_another_entry_than_its_forward(kind):
    model = nn.Sequential(Positions(6, 4))
    with refused(model, "0", "Positions", "later"):
        peftlib.inject(model, "0", kind)
    assert peftlib.inject(model, "0", peftlib.Bottleneck, width=2) == ["0"]

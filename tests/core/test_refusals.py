"""Each refusal says where, what was found and what to do, and leaves the model as it was."""

import contextlib
import functools
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
from support.helpers import Gain, Offset, chain, changes, linears, modules, moved, network, snapshot

pytestmark = pytest.mark.mutants


class Refusal(NamedTuple):
    """What is there, what is done to it, and what the refusal says."""

    make: Callable[[], Any]
    act: Callable[[Any], Any]
    message: str


def refuses(table: dict[str, Refusal]) -> Any:
    return pytest.mark.parametrize("refusal", table.values(), ids=table)


def check(refusal: Refusal, model: Any) -> None:
    before = snapshot(model)
    with pytest.raises(AdapterError) as raised:
        refusal.act(model)
    message = str(raised.value)
    assert re.fullmatch(refusal.message, message, re.DOTALL), message
    assert changes(before, model) == []
    assert message.endswith("."), "a message ends with what to do, a sentence"


def inject(targets: Any, kind: Any = LoRA, **config: Any) -> Callable[[Any], Any]:
    return lambda model: peftlib.inject(model, targets, kind, **config)


def adapted(make: Callable[[], Any] = linears, targets: Any = "0", kind: Any = LoRA, **config: Any) -> Any:
    def made() -> Any:
        model = make()
        peftlib.inject(model, targets, kind, **config)
        return moved(model)

    return made


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


class MambaMixer(nn.Module):
    """Named as the one whose fused kernels read `x_proj`."""

    def __init__(self) -> None:
        super().__init__()
        self.x_proj = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.x_proj.weight.T


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
    "lazy": Refusal(lazy, inject(["0", "1"]), r"1: LazyLinear is lazy and has no shapes yet\. Run one batch .*first\."),
    "scripted": Refusal(
        scripted,
        inject(["0", "1"]),
        r"1: RecursiveScriptModule is scripted, .* cannot change\. Adapt .*, then script it\.",
    ),
    "sharded": Refusal(
        sharded, inject(["0", "1"]), r"1: its parameters are sharded already\. Inject first, then fully_shard\."
    ),
    "an attribute `adapters` of its own": Refusal(
        lambda: chain(nn.Linear(2, 2), Crowded(2, 2)),
        inject(nn.Linear),
        r"1: Crowded has an attribute `adapters` of its own, which peftlib needs\. Rename it\.",
    ),
    "a submodule `adapters` of its own": Refusal(
        lambda: modules({"adapters": nn.Linear(2, 2)}),
        inject(nn.ModuleDict, Full),
        r"the root: ModuleDict has an attribute `adapters` of its own, which peftlib needs\. Rename it\.",
    ),
    "no forward": Refusal(
        lambda: chain(nn.Linear(2, 2), Mute()),
        inject(["0", "1"]),
        r"1: Mute has no forward and is never called\. Target the modules inside it\.",
    ),
    "a class that cannot change": Refusal(
        lambda: chain(nn.Linear(2, 2), Final(2, 2)),
        inject(nn.Linear),
        r"1: Final cannot change its class \(Final is final\)\. Wrap it in a plain nn\.Module and adapt that\.",
    ),
    "a root whose class cannot change": Refusal(
        lambda: Final(2, 2),
        inject(nn.Linear),
        r"the root: Final cannot change its class \(Final is final\)\. Wrap it in a plain nn\.Module and adapt that\.",
    ),
    "a child that fused kernels read": Refusal(
        lambda: chain(MambaMixer()),
        inject("x_proj"),
        r"0\.x_proj: MambaMixer reads this child's weight .* without calling it, .*\. Exclude it and target in_proj\.",
    ),
    "a child that its parent reads, with a kind that has no path into it": Refusal(
        lambda: chain(nn.MultiheadAttention(4, 2)),
        inject("out_proj", Gain),
        r"cannot put HelperGain into 0\.out_proj: MultiheadAttention reads the weights of its child 'out_proj' without "
        r"calling it, so HelperGain there would never run\. Target the MultiheadAttention itself\.",
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
        with pytest.raises(AdapterError, match=r"0: its parameters are sharded already\. Inject first"):
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
            rf"cannot put LoRA into 0: rank={re.escape(repr(rank))}: the rank is a whole number .*\. Pass rank=8.*\.",
        )
        for rank in (0, -1, 2.0, True, "8", None)
    },
    **{
        f"alpha={alpha!r}": Refusal(
            linears,
            inject("0", alpha=alpha),
            rf"cannot put LoRA into 0: alpha={re.escape(repr(alpha))}: alpha is a positive number\. Pass alpha=16.*\.",
        )
        for alpha in (0, -1.0, float("nan"), float("inf"), "16", True, None)
    },
    **{
        f"dropout={dropout!r}": Refusal(
            linears,
            inject("0", dropout=dropout),
            rf"cannot put LoRA into 0: dropout={re.escape(repr(dropout))}: the probability is in \[0, 1\)\. Pass .*\.",
        )
        for dropout in (1.0, -0.1, float("nan"), True, False, "0.1", None)
    },
    **{
        f"init={init!r}": Refusal(
            linears,
            inject("0", init=init),
            rf"cannot put LoRA into 0: init={re.escape(repr(init))} is none of 'kaiming', 'gaussian', 'orthogonal', "
            r"'pissa'\. Pass one of them\.",
        )
        for init in ("xavier", None, ["kaiming"])
    },
    **{
        f"{kind.__name__}, dtype={dtype!r}": Refusal(
            linears,
            inject("0", kind, dtype=dtype),
            rf"cannot put {kind.__name__} into 0: dtype: {re.escape(repr(dtype))} is no floating-point dtype\. Use.*\.",
        )
        for kind in (LoRA, Full)
        for dtype in ("int8", "float33", "nn", torch.int32, 32)
    },
    "a rank beyond the singular vectors": Refusal(
        lambda: chain(nn.Linear(4, 4), nn.Linear(4, 2)),
        inject(nn.Linear, rank=3, init="pissa"),
        r'cannot put LoRA into 1: rank=3: a \[2, 4\] matrix has 2 singular vectors\. Lower the rank, .* than "pissa"\.',
    ),
    "dropout on an embedding": Refusal(
        conv,
        inject(["0", "3"], dropout=0.1),
        r"cannot put LoRA into 3: dropout=0\.1: Embedding\.weight has no input of its own .*\. Use dropout=0 here\.",
    ),
    "dropout where only weights speak": Refusal(
        lambda: nn.MultiheadAttention(4, 2),
        inject(nn.MultiheadAttention, dropout=0.1),
        r"cannot put LoRA into the root: dropout=0\.1: MultiheadAttention\.in_proj_weight has no input .*\. Use .*\.",
    ),
    "no weight at all": Refusal(
        conv,
        inject(["0", "1"]),
        r"cannot put LoRA into 1: ReLU has no `weight` matrix \(its parameters: none\)\. Use Full for vectors, or .*\.",
    ),
    "only vectors": Refusal(
        conv,
        inject(nn.LayerNorm),
        r"cannot put LoRA into 2: LayerNorm has no `weight` matrix \(its parameters: \{'weight': \(4,\), 'bias': "
        r"\(4,\)\}\)\. Use Full for vectors, or target a module that has a matrix\.",
    ),
    "a matrix of another name": Refusal(
        lambda: chain(Expert()),
        inject("0"),
        r"cannot put LoRA into 0: Expert has no `weight` matrix \(its parameters: \{'up': \(2, 3\)\}\)\. Pass "
        r"param='up'\.",
    ),
    "a param that is not there": Refusal(
        lambda: chain(Expert()),
        inject("0", param="down"),
        r"cannot put LoRA into 0: Expert\.down is no tensor of it, and LoRA needs a matrix\. Its matrices: up\.",
    ),
    "a param deep in nowhere": Refusal(
        lambda: chain(Expert()),
        inject("0", param="a.b.down"),
        r"cannot put LoRA into 0: Expert\.a\.b\.down is no tensor of it, and LoRA needs a matrix\. Its matrices: up\.",
    ),
    "a param of a module whose matrices are deeper": Refusal(
        lambda: chain(Around(Expert())),
        inject("0", param="down"),
        r"cannot put LoRA into 0: Around\.down is no tensor of it, and LoRA needs a matrix\. Use Full for vectors, or "
        r"target a module that has a matrix\.",
    ),
    "a param that is a vector": Refusal(
        conv,
        inject("4", param="bias"),
        r"cannot put LoRA into 4: Linear\.bias is of shape \(4,\), and LoRA needs a matrix\. Its matrices: weight\.",
    ),
    "a param that is a vector, where all are": Refusal(
        conv,
        inject("2", param="bias"),
        r"cannot put LoRA into 2: LayerNorm\.bias is of shape \(4,\), and LoRA needs a matrix\. Use Full.*\.",
    ),
    "the second of two params": Refusal(
        lambda: chain(Expert()),
        inject("0", param=["up", "down"]),
        r"cannot put LoRA into 0: Expert\.down is no tensor of it.*\.",
    ),
    "a packed weight outside Linear": Refusal(
        lambda: chain(nn.Linear(4, 4), Packed()),
        inject(["0", "1"]),
        r"cannot put LoRA into 1: Packed\.weight is torch\.int8, not floating point, and only .*\. Exclude.*\.",
    ),
    "Full on a packed weight": Refusal(
        lambda: chain(nn.Linear(4, 4), Packed()),
        inject(["0", "1"], Full),
        r"cannot put Full into 1: Packed\.weight is torch\.int8, which cannot train\. Leave it out of params\.",
    ),
    "Full on a complex weight": Refusal(
        lambda: chain(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.complex64)),
        inject(["0", "1"], Full),
        r"cannot put Full into 1: Linear\.weight is torch\.complex64, which cannot train\. Leave it out of params\.",
    ),
    "DoRA on a complex weight": Refusal(
        lambda: chain(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.complex64)),
        inject(["0", "1"], DoRA),
        r"cannot put DoRA into 1: Linear\.weight is torch\.complex64, and DoRA needs the norms of its rows\. .*\.",
    ),
    "Full on what is not there": Refusal(
        linears,
        inject("0", Full, params=["weight", "scale*"]),
        r"cannot put Full into 0: params='scale\*' matches no weight of Linear \(it has weight, bias\)\. Name.*\.",
    ),
    "Full on nothing": Refusal(
        lambda: chain(nn.Linear(2, 2), nn.ReLU()),
        inject(["0", "1"], Full),
        r"cannot put Full into 1: params='\*' matches no weight of ReLU \(it has none\)\. Name one of them\.",
    ),
    "Full on an out_proj, a weight that is not there": Refusal(
        lambda: chain(nn.MultiheadAttention(4, 2)),
        inject("out_proj", Full, params="gain"),
        r"cannot put Full into 0: params='out_proj\.gain' matches no weight of MultiheadAttention \(it .*\)\. Name.*\.",
    ),
    "a configuration that JSON cannot hold": Refusal(
        linears,
        inject(["0", "1"], Gain, start=torch.tensor(1.0)),
        r"cannot put HelperGain into 0: HelperGain: its configuration \{'start': tensor\(1\.\)\} cannot be saved .*\.",
    ),
    "a configuration that is not finite": Refusal(
        linears,
        inject("0", Gain, start=float("inf")),
        r"cannot put HelperGain into 0: HelperGain: its configuration \{'start': inf\} cannot be saved \(.*\)\. .*",
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
            rf"name={re.escape(repr(name))}: a name is a string without '\.' and ':'\. Rename the adapter\.",
        )
        for name in ("", "a.b", "a:2", None, 3)
    },
    **{
        f"name={name!r}": Refusal(
            linears,
            inject("0", name=name),
            rf"name='{name}': torch's ModuleDict has an attribute of that name\. Rename the adapter\.",
        )
        for name in ("keys", "pop", "forward", "type", "training", "selection", "_modules", "_parameters")
    },
    "a name that is taken there": Refusal(
        adapted(targets=["0", "1"]),
        inject("1"),
        r'1: "default" has a LoRA with \'1\.lora_A\' already\. Eject it, or inject under another name\.',
    ),
    "a name that is taken there by the same weights": Refusal(
        adapted(kind=Full, params="bias"),
        inject(["1", "0"], Full),
        r'0: "default" has a Full with \'0\.bias\' already\. Eject it, or inject under another name\.',
    ),
    "the same weight twice in one call": Refusal(
        lambda: chain(Expert()),
        inject("0", param=["up", "up"]),
        r'0: "default" has a LoRA with \'0\.up\.lora_A\' already\. Eject it, or inject under another name\.',
    ),
}


@refuses(NAMES)
def test_names_that_cannot_be_given(refusal):
    check(refusal, refusal.make())


TARGETS = {
    "a typo": Refusal(
        network,
        inject("q_porj"),
        r"targets: no module matches 'q_porj'\. The nearest names are 'q_proj'.*\. Correct the pattern or drop it\.",
    ),
    "a name in a model without names": Refusal(
        lambda: nn.Linear(2, 2),
        inject("q_proj"),
        r"targets: no module matches 'q_proj'\. The model has no named submodules\. Pass .*\.",
    ),
    "an absent type": Refusal(
        network,
        inject([nn.Linear, nn.Conv2d]),
        r"targets: no module is a Conv2d\. The model is made of Embedding, .*Linear, ModuleList, Network\.",
    ),
    "a predicate that nothing satisfies": Refusal(
        network,
        inject(lambda name, module: False),
        r"targets: no module satisfies '<lambda>'\. Check the predicate: it is called with \(name, module\) .*\.",
    ),
    "a partial as predicate": Refusal(
        network,
        inject(functools.partial(lambda answer, name, module: answer, False)),
        r"targets: no module satisfies functools\.partial\(.*\)\. Check the predicate: .*\.",
    ),
    "an empty list": Refusal(
        network, inject([]), r"targets: the list is empty\. Name at least one module, type or predicate\."
    ),
    "an absent exclude": Refusal(
        network, inject("q_proj", exclude=["v_proj", "haed"]), r"exclude: no module matches 'haed'\. The nearest .*\."
    ),
    "an exclude that takes all": Refusal(
        network,
        inject("head", exclude=nn.Linear),
        r"targets: 'head' matches only modules that exclude=<class 'torch.*Linear'> takes away\. Narrow `exclude`\.",
    ),
}


@refuses(TARGETS)
def test_targets_that_match_nothing(refusal):
    check(refusal, refusal.make())


# ---- who is there


def without_adapters(act: Callable[[Any], Any]) -> Refusal:
    return Refusal(linears, act, r"Sequential has no adapters\. Put some in first: peftlib\.inject\(model, \.\.\.\)\.")


def absent(act: Callable[[Any], Any]) -> Refusal:
    return Refusal(adapted(), act, r"Sequential has no adapter named 'other'\. It has 'default'\.( .*\.)?")


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


def first_then_unmerge(doing: str) -> str:
    return rf"{doing}: default is merged into the base\. Call unmerge first\."


STATES = {
    "inject into a merged model": Refusal(merged_model, inject("1", name="c"), first_then_unmerge("inject")),
    "eject from a merged model": Refusal(merged_model, peftlib.eject, first_then_unmerge("eject")),
    "activate in a merged model": Refusal(
        merged_model, lambda model: peftlib.activate(model, "other"), first_then_unmerge("activate")
    ),
    "a view of a merged model": Refusal(merged_model, peftlib.view, first_then_unmerge("view")),
    "verify a merged model": Refusal(
        merged_model, lambda model: peftlib.verify(model, torch.ones(1, 4)), first_then_unmerge("verify")
    ),
    "merge a merged model": Refusal(
        merged_model,
        lambda m: peftlib.merge(m, "other"),
        r"merge: default is merged into the base\. Call unmerge first\.",
    ),
    "stream other names from a merged model": Refusal(
        merged_model,
        lambda m: peftlib.merged_state_dict(m, "other"),
        r"merged_state_dict: default is merged into the base\. Call unmerge first\.",
    ),
    "eject another name than the merged one for good": Refusal(
        merged_model,
        lambda m: peftlib.eject(m, "other", merge=True),
        r"eject: default is merged, not 'other' alone\. Call unmerge first\.",
    ),
    "unmerge what is not merged": Refusal(
        adapted(), peftlib.unmerge, r"unmerge: Sequential is not merged\. Call merge first\."
    ),
    "merge with nothing active": Refusal(
        lambda: peftlib.activate(adapted()()).__enter__(),
        peftlib.merge,
        r"merge: no adapter is active\. Name one of 'default'\.",
    ),
    "stream with nothing active": Refusal(
        lambda: peftlib.activate(adapted()()).__enter__(),
        peftlib.merged_state_dict,
        r"merged_state_dict: no adapter is active\. Name one of 'default'\.",
    ),
    "merge what has no weight form": Refusal(
        lambda: peftlib.inject(model := adapted()(), "1", Offset) and model,
        peftlib.merge,
        r'merge: "default" holds a Offset on 1, which has no weight form\. Keep it live, or merge another name\.',
    ),
    "stream what has no weight form": Refusal(
        adapted(lambda: nn.Linear(4, 4), nn.Linear, Offset),
        peftlib.merged_state_dict,
        r'merged_state_dict: "default" holds a Offset on the root, which has no weight form\. Keep it live, or .*\.',
    ),
    "eject for good what has no weight form": Refusal(
        adapted(kind=Offset),
        lambda model: peftlib.eject(model, merge=True),
        r'merge: "default" holds a Offset on 0, .*\.',
    ),
    "run what has neither form": Refusal(
        lambda: formless(),
        lambda model: model(torch.ones(1, 4)),
        r"Formless has neither forward nor fold, so it does nothing\. Write one of them\.",
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
    message = r"1: Foreign was put above the adapted Linear after inject\. Undo that first, then eject\."
    check(Refusal(covered, lambda model: peftlib.eject(model, merge=merge), message), covered())


# ---- what cannot be folded


@pytest.mark.parametrize(
    ("at", "make"), [("the root", lambda: nn.Linear(4, 4)), ("1", linears)], ids=["root", "inside"]
)
@pytest.mark.parametrize(
    ("found", "put"),
    [
        (
            "a forward was put on this Linear itself",
            lambda host: host.__dict__.update(forward=lambda x: x),
        ),
        (
            "Foreign, Other was put above the adapted Linear",
            lambda host: setattr(host, "__class__", type("Foreign", (type("Other", (type(host),), {}),), {})),
        ),
    ],
    ids=["a forward", "two classes"],
)
def test_what_was_put_on_a_host_after_inject_is_named_at_eject(at, make, found, put):
    model = adapted(make, nn.Linear)()
    put(model if at == "the root" else model[1])
    check(Refusal(linears, peftlib.eject, rf"{at}: {found} after inject\. Undo that first, then eject\."), model)


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
        r'cannot merge "default" into head\.weight: it is also embedding\.weight, which would change too\. Untie .*\.',
    ),
    "a tied weight, from the other side": Refusal(
        adapted(tied, "embedding"),
        peftlib.merge,
        r'cannot merge "default" into embedding\.weight: it is also head\.weight, which would change too\. Untie .*\.',
    ),
    "two adapters on both sides of a tie": Refusal(
        adapted(tied, ["embedding", "head"]),
        peftlib.merge,
        r'cannot merge "default" into (embedding|head)\.weight: it is also (head|embedding)\.weight, which .*\.',
    ),
    "memory that is shared": Refusal(
        adapted(tied_by_memory, ["1"]),
        peftlib.merge,
        r'cannot merge "default" into 1\.weight: it is also 0\.weight, which would change too\. Untie them first\.',
    ),
    "a computed weight": Refusal(
        adapted(lambda: chain(nn.Linear(4, 4), weight_norm(nn.Linear(4, 4))), nn.Linear),
        peftlib.merge,
        r"cannot merge into 1\.weight: it is computed from other parameters\. Make it a plain weight first .*\.",
    ),
    "no values": Refusal(
        lambda: meta_model(),
        peftlib.merge,
        r"cannot merge into 0\.weight: it is on the meta device\. Materialise the model, or mend the kind's fold\.",
    ),
    "a folded form of another shape": Refusal(
        adapted(kind=Widened),
        peftlib.merge,
        r"cannot merge into 0\.weight: it is \[4, 4\] and its folded form \[1, 4\]\. Materialise .*, or mend.*\.",
    ),
    **{
        f"{value} in {key}": Refusal(
            functools.partial(poisoned, value, key),
            peftlib.merge,
            rf'cannot merge "default" into 1: {key} holds NaN or infinity\. Load a sound adapter, or eject this one\.',
        )
        for value in (float("nan"), float("inf"), float("-inf"))
        for key in ("lora_A", "lora_B")
    },
    "a product beyond the dtype": Refusal(
        overflowing,
        peftlib.merge,
        r"cannot merge into 1\.weight: the result has NaN or infinity in torch\.float16\. Keep the adapter live, .*\.",
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
    message = (
        r"merged_state_dict: 1 merged weight\(s\) are not in state_dict\(\), so they would be lost\. Merge in .*\."
    )
    model = adapted(lambda: chain(Hidden(bias), nn.Linear(4, 4)), "0", Gain)()
    check(Refusal(linears, lambda model: list(peftlib.merged_state_dict(model)), message), model)


def test_pissa_drawn_again_without_its_host():
    model = adapted(init="pissa", rank=2)()
    ((_, _, adapter),) = peftlib.adapters(model)
    message = r'LoRA with init="pissa" starts from its host\'s weight\. Call reset_parameters\(host\)\.'
    check(Refusal(linears, lambda model: adapter.reset_parameters(), message), model)


def test_two_kinds_of_one_name():
    message = r"kind 'LoRA': peftlib\.LoRA has this name already, .*\. Rename .*test_refusals.*LoRA\."
    with pytest.raises(AdapterError, match=message):
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
        r"missing nothing; unexpected head\.lora_C\. Save it again from its model\.",
    ),
    "a missing key": (
        lambda tensors, header: tensors.pop("layers.1.q_proj.lora_B"),
        r"missing layers\.1\.q_proj\.lora_B; unexpected nothing\. Save it again from its model\.",
    ),
    "many missing keys": (
        lambda tensors, header: [tensors.pop(key) for key in list(tensors)],
        r"missing head\.lora_A, head\.lora_B, layers\.0\.q_proj\.lora_A, .* and 2 more; unexpected nothing\. Save .*\.",
    ),
    "a renamed key": (
        lambda tensors, header: tensors.update({"head.lora_a": tensors.pop("head.lora_A")}),
        r"missing head\.lora_A; unexpected head\.lora_a\. Save it again from its model\.",
    ),
    "another shape": (
        lambda tensors, header: tensors.update({"head.lora_A": torch.ones(2, 9)}),
        r"head\.lora_A has shape \[2, 9\], this model needs \[2, 8\]\. Load it onto its own base\.",
    ),
    "a transposed factor": (
        lambda tensors, header: tensors.update({"head.lora_A": tensors["head.lora_A"].T.contiguous()}),
        r"head\.lora_A has shape \[8, 2\], this model needs \[2, 8\]\. Load it onto its own base\.",
    ),
    "another rank than its configuration": (
        lambda tensors, header: header["configs"][0]["config"].update(rank=3),
        r".*lora_A has shape \[2, 8\], this model needs \[3, 8\]\. Load it onto its own base\.",
    ),
    "integers": (
        lambda tensors, header: tensors.update({"head.lora_A": torch.ones(2, 8, dtype=torch.int32)}),
        r"head\.lora_A is torch\.int32, expected torch\.float32\. Save it again from its model\.",
    ),
    "complex numbers": (
        lambda tensors, header: tensors.update({"head.lora_A": torch.ones(2, 8, dtype=torch.complex64)}),
        r"head\.lora_A is torch\.complex64, expected torch\.float32\. Save it again from its model\.",
    ),
    "NaN": (
        lambda tensors, header: tensors["head.lora_A"][0].fill_(float("nan")),
        r"head\.lora_A holds NaN or infinity\. Train again from a sound checkpoint\.",
    ),
    "infinity": (
        lambda tensors, header: tensors["head.lora_B"][0].fill_(float("-inf")),
        r"head\.lora_B holds NaN or infinity\. Train again from a sound checkpoint\.",
    ),
    "an unknown kind": (
        lambda tensors, header: header["configs"][0].update(kind="Unheard"),
        r"kind 'Unheard' is unknown here\. Import the module that defines it first\.",
    ),
    "another kind": (
        lambda tensors, header: header["configs"][0].update(kind="Full", config={}),
        r"missing .*\.weight.*; unexpected .*lora_A.*\. Save it again from its model\.",
    ),
    "a kind that does not take its keywords": (
        lambda tensors, header: header["configs"][0].update(kind="Full"),
        r".*: Full refuses its configuration \(.*unexpected keyword.*\)\. Save it again from its model\.",
    ),
    "an absent host": (
        another_layer,
        r"made for another model: layers\.7\.q_proj not in Network\. Load it onto its own base\.",
    ),
    "one adapter twice": (duplicate, r'head: "default" has a LoRA with \'head\.lora_A\' already\. Eject it, .*\.'),
    "a name that cannot be": (
        lambda tensors, header: header.update(name="a.b"),
        r"name='a\.b': a name is a string without '\.' and ':'\. Rename the adapter\.",
    ),
    "the values of another base": (
        lambda tensors, header: header["base"]["head"]["hash"].update(own="0" * 32),
        r"made on another base: head has weights of other values\. Load it onto its own base, or pass strict=False\.",
    ),
    "the shapes of another base": (
        lambda tensors, header: header["base"]["head"]["weights"].update(weight=["float32", 3, 9]),
        r"made on another base: head has weight \[3, 8\], in the file \[3, 9\]\. Load .*, or pass strict=False\.",
    ),
    "weights that this base lacks": (
        lambda tensors, header: header["base"]["head"]["weights"].update(gain=["float32", 3]),
        r"made on another base: head has gain absent, in the file \[3\]\. Load .*, or pass strict=False\.",
    ),
    **{
        f"{key}={value!r} in a configuration": (
            functools.partial(lambda k, v, tensors, header: header["configs"][0]["config"].update({k: v}), key, value),
            r".*(LoRA).*(rank|alpha|dropout|init|param|dtype|matrix|configuration).*\.",
        )
        for key, value in {
            "rank": "8", "alpha": None, "dropout": [], "init": {}, "param": 5, "dtype": 7, "unheard": 1,
        }.items()
    },
    "a rank beyond all memory": (
        lambda tensors, header: header["configs"][0]["config"].update(rank=10**30),
        r".*LoRA refuses its configuration \(.*\)\. Save it again from its model\.",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_files_that_do_not_fit(damage, message, saved):
    with rewritten(saved) as (tensors, header):
        damage(tensors, header)
    path = re.escape(str(saved))
    check(Refusal(network, lambda model: peftlib.load(model, saved), rf"({path}: )?(\S+: )?({message})"), network())


HEADERS = {
    "a later format": ({"format": 2}, "format 2, this version reads 1"),
    "no format": ({"format": None}, "format None, this version reads 1"),
    "a format in words": ({"format": "1"}, "format '1', this version reads 1"),
    "a truth as format": ({"format": True}, "format True, this version reads 1"),
    **{
        f"{key}={value!r}": ({key: value}, rf"no sound '{key}'")
        for key, value in {
            "version": 3, "name": None, "configs": {}, "hosts": [], "base": "x", "metadata": [1],
        }.items()
    },
    **{
        f"configs={value!r}": ({"configs": value}, "a configuration that is not a kind with keywords")
        for value in ([3], [{}], [{"kind": 1, "config": {}}], [{"kind": "LoRA", "config": []}], [{"kind": "LoRA"}])
    },
    **{
        f"positions={value!r}": ({"hosts": {"head": value}}, "no sound configuration for host 'head'")
        for value in ([], 0, None, [1], [-1], [0.0], [True], ["0"], {})
    },
    **{
        f"fingerprint={value!r}": ({"base": {"head": value}}, "no sound fingerprint for host '.*'")
        for value in (None, 3, {}, {"weights": []}, {"weights": {"weight": []}}, {"weights": {"weight": [3]}},
                      {"weights": {}, "hash": "x"}, {"weights": {"weight": "float32"}})
    },
}  # fmt: skip


@pytest.mark.parametrize(("change", "found"), HEADERS.values(), ids=HEADERS)
def test_headers_of_a_wrong_form(change, found, saved):
    with rewritten(saved) as (_, header):
        header.update(change)
    message = rf"{re.escape(str(saved))}: its header (has|names) {found}\. Save it again, with this version .*\."
    check(Refusal(network, lambda model: peftlib.load(model, saved), message), network())
    check(Refusal(network, lambda model: peftlib.read_header(saved), message), network())


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
    message = rf"{re.escape(str(saved))}: its header is not JSON \(.*\)\. Save it again\."
    check(Refusal(network, lambda model: peftlib.load(model, saved), message), network())


@pytest.mark.parametrize("text", NO_HEADER.values(), ids=NO_HEADER)
def test_headers_that_are_no_object(text, saved):
    save_file({}, saved, {"peftlib": text})
    message = rf"{re.escape(str(saved))}: its header has format .*, this version reads 1\. Save it again, .*\."
    check(Refusal(network, lambda model: peftlib.load(model, saved), message), network())


def test_another_tools_file(saved):
    save_file({"weight": torch.ones(2)}, saved, {"format": "pt"})
    message = rf"{re.escape(str(saved))}: a safetensors file without peftlib's header\. Load it with the tool that .*\."
    check(Refusal(network, lambda model: peftlib.load(model, saved), message), network())
    save_file({"weight": torch.ones(2)}, saved)
    check(Refusal(network, lambda model: peftlib.load(model, saved), message), network())


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, -1, -100])
def test_a_truncated_file(keep, saved):
    whole = saved.read_bytes()
    saved.write_bytes(whole[:keep])
    message = rf"{re.escape(str(saved))}: not a sound safetensors file \(.*\)\. Save or copy it again\."
    check(Refusal(network, lambda model: peftlib.load(model, saved), message), network())


@pytest.mark.parametrize("junk", [b"PK\x03\x04" * 50, b"\xff" * 200, b"\0" * 200], ids=["zip", "ones", "zeros"])
def test_a_file_of_another_format(junk, saved):
    saved.write_bytes(junk)
    message = rf"{re.escape(str(saved))}: not a sound safetensors file \(.*\)\. Save or copy it again\."
    check(Refusal(network, lambda model: peftlib.load(model, saved), message), network())


def test_a_file_that_is_not_there_is_an_os_error(tmp_path):
    for act in (peftlib.read_header, lambda path: peftlib.load(network(), path)):
        with pytest.raises(FileNotFoundError):
            act(tmp_path / "nowhere.safetensors")
        with pytest.raises(IsADirectoryError):
            act(tmp_path)


def test_a_kind_that_gets_too_little_to_load(saved):
    with rewritten(saved) as (_, header):
        header["configs"][0]["config"]["unheard"] = 1
    message = (
        rf"{re.escape(str(saved))}: (layers\.0\.q_proj|head): LoRA refuses its configuration \(.*unheard.*\)\. .*\."
    )
    check(Refusal(network, lambda model: peftlib.load(model, saved), message), network())


LOADS = {
    "into a merged model": (
        lambda model: peftlib.merge(model),
        r"load: b is merged into the base\. Call unmerge first\.",
    ),
    "beside a view": (
        lambda model: setattr(model, "face", None) or peftlib.view(model),
        r"load: 1 view\(s\) of this model are alive and would change too\. Delete them first\.",
    ),
}


@pytest.mark.parametrize(("prepare", "message"), LOADS.values(), ids=LOADS)
def test_models_that_cannot_be_loaded_into(prepare, message, saved):
    model = network()
    peftlib.inject(model, "v_proj", LoRA, name="b")
    kept = prepare(model)
    check(Refusal(network, lambda model: peftlib.load(model, saved), message), model)
    del kept


def test_a_name_that_is_taken_at_load(saved):
    model = network()
    peftlib.load(model, saved)
    message = r'(.*: )?(head|layers\.0\.q_proj): "default" has a LoRA with .* already\. Eject it, or .*\.'
    check(Refusal(network, lambda model: peftlib.load(model, saved), message), model)


def test_a_lazy_host_at_load(saved):
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.head = nn.LazyLinear(3)
    message = r"(.*: )?head: LazyLinear is lazy and has no shapes yet\. Run one batch .*\."
    check(Refusal(network, lambda model: peftlib.load(model, saved), message), model)


SAVES = {
    "on the meta device": (
        meta_model,
        {},
        r"0\.lora_A: on the meta device, so its values are not here\. Materialise or gather it, then save\.",
    ),
    "metadata that JSON cannot hold": (
        adapted(),
        {"metadata": {"at": torch.ones(2)}},
        r"metadata: .*tensor.* would not come back from JSON as it is\. Use a dict with string keys, .*\.",
    ),
    "metadata that are not finite": (
        adapted(),
        {"metadata": {"loss": float("nan")}},
        r"metadata: .*nan.* would not come back from JSON as it is\. Use a dict with string keys, .*\.",
    ),
    "metadata that are infinite": (
        adapted(),
        {"metadata": {"loss": float("inf")}},
        r"metadata: .*inf.* would not come back from JSON as it is\. Use a dict with string keys, .*\.",
    ),
    "metadata that are no dict": (adapted(), {"metadata": ["reviews"]}, r"metadata: .*\."),
}


@pytest.mark.parametrize(("make", "keywords", "message"), SAVES.values(), ids=SAVES)
def test_what_cannot_be_saved(make, keywords, message, tmp_path):
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(b"the old file")
    check(Refusal(make, lambda model: peftlib.save(model, path, **keywords), message), make())
    assert [file.name for file in tmp_path.iterdir()] == ["adapter.safetensors"]
    assert path.read_bytes() == b"the old file"


def test_a_shard_cannot_be_saved(tmp_path):
    model = adapted()()
    ((_, _, adapter),) = peftlib.adapters(model)
    adapter.register_state_dict_post_hook(lambda module, state, prefix, _: setattr(state["lora_A"], "device_mesh", 1))
    message = r"0\.lora_A: a shard, so its values are not here\. Materialise or gather it, then save\."
    check(Refusal(linears, lambda model: peftlib.save(model, tmp_path / "a.safetensors"), message), model)


def test_a_folder_that_is_not_there(tmp_path):
    path = tmp_path / "nowhere" / "adapter.safetensors"
    with pytest.raises((AdapterError, OSError), match=r"nowhere"):
        peftlib.save(adapted()(), path)

"""Any order of operations: the laws hold after each, and after the last eject the model is what it was, to the bit."""

import contextlib
import copy
import io
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor, nn

import peftlib
from peftlib import IA3, AdapterError, Bottleneck, DoRA, Full, LoRA, Prefix, Prompt
from support.faults import Fault, Steps, failing
from support.helpers import Gain, Offset, bits, changes, snapshot


class Tangled(nn.Module):
    """A tied weight, a module under two names, an attention that reads its child, a frozen bias, a frozen buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.again = self.first
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("offset", torch.ones(8))
        self.second.bias.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens)) + self.offset
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.again(torch.tanh(self.second(self.first(x))))
        return self.head(x)


def made() -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return Tangled().eval()


def is_root(name: str, _: nn.Module) -> bool:
    return name == ""


# Target, kind, keywords; and whether its weight form can be folded into this model.
PARTS: list[tuple[Any, Any, dict[str, Any], bool]] = [
    ("first", LoRA, {"rank": 2}, True),
    ("second", LoRA, {"rank": 1, "init": "pissa"}, True),
    ("attention", LoRA, {"rank": 2}, True),
    ("out_proj", LoRA, {"rank": 2}, True),
    ("embedding", Full, {}, False),
    ("head", LoRA, {"rank": 2}, False),
    ("norm", Full, {}, True),
    ("second", Full, {"params": "bias"}, True),
    (is_root, Full, {"params": ["first.*", "offset"]}, True),
    ("first", Gain, {"start": 1.5}, True),
    ("second", Offset, {}, False),
    ("first", DoRA, {"rank": 2}, True),
    ("second", IA3, {}, True),
    ("attention", Bottleneck, {"width": 2, "dim": 8}, False),
    ("second", Bottleneck, {"width": 2}, False),
    ("attention", Prefix, {"length": 2}, False),
    ("embedding", Prompt, {"length": 2}, False),
]
TOKENS = torch.arange(6).view(2, 3)
KEYS = list(made().state_dict())


def tensors_of(target: Any, kind: Any, config: dict[str, Any], _: bool) -> set[str]:
    """What the part is called in a file; a name can hold each key once."""
    model = made()
    peftlib.inject(model, target, kind, **config)
    return {f"{host}.{key}" for host, _, adapter in peftlib.adapters(model) for key in adapter.file_keys()}


TENSORS = [tensors_of(*part) for part in PARTS]
COPIES = [tensors if kind is Full else set[str]() for tensors, (_, kind, _, _) in zip(TENSORS, PARTS, strict=True)]

name_of_one = st.sampled_from("abc")
some_names = st.lists(name_of_one, max_size=3, unique=True).map(tuple)
a_part = st.sampled_from(PARTS)
a_moment = st.integers(0, 12)
a_step = st.integers(0, 200)


def portrait(model: nn.Module) -> dict[str, Any]:
    """All that a model is but its objects' identities, so that copies can be compared; ties count by first name."""
    first: dict[int, str] = {}
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name] = type(module), tuple(vars(module)), module.training, first.setdefault(id(module), name)
        for slot, value in vars(module).items():
            if isinstance(value, dict) and slot not in ("_parameters", "_buffers", "_modules"):
                found[f"{name}:{slot}"] = len(value)
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                path = f"{name}.{leaf}"
                grad = None if tensor.grad is None else bits(tensor.grad)
                found[path] = bits(tensor), tensor.requires_grad, type(tensor), grad, first.setdefault(id(tensor), path)
    return found


def weights(model: nn.Module) -> dict[str, bytes]:
    return {key: bits(tensor) for key, tensor in model.state_dict().items() if "adapters." not in key}


def states(model: nn.Module) -> dict[str, str]:
    """What each name is now: active, off or merged."""
    return {row.name: row.state for row in peftlib.summary(model).rows}


class Operations(RuleBasedStateMachine):
    """The library beside a few plain lists that say what it should hold."""

    @initialize()
    def start(self) -> None:
        torch.manual_seed(0)
        self.model = made()
        self.plain = made()  # what the model should be once it is empty
        self.parts: dict[str, list[int]] = {}
        self.active: tuple[str, ...] = ()
        self.merged: tuple[str, ...] = ()
        self.frozen = False
        self.open: list[tuple[Any, tuple[str, ...], tuple[str, ...]]] = []
        self.views: list[tuple[Any, tuple[str, ...]]] = []
        self.base_version = 0
        self.folder = tempfile.TemporaryDirectory()
        self.files: dict[str, tuple[list[int], int]] = {}

    # -- what the lists say

    def is_known(self, names: tuple[str, ...]) -> bool:
        return bool(self.parts) and all(name in self.parts for name in names)

    def folds(self, names: tuple[str, ...]) -> bool:
        return all(PARTS[at][3] for name in names for at in self.parts[name])

    def is_free(self, name: str, at: int) -> bool:
        return all(TENSORS[other].isdisjoint(TENSORS[at]) for other in self.parts.get(name, []))

    def one_copy(self, names: tuple[str, ...], name: str = "", ats: list[int] | None = None) -> bool:
        """Whether no weight has copies in two of the names, these parts put into one of them."""
        parts = {each: self.parts.get(each, []) + ((ats or []) if each == name else []) for each in {*names, name}}
        copies = [{weight for at in held for weight in COPIES[at]} for held in parts.values()]
        return sum(map(len, copies)) == len(set().union(*copies))

    def can_fold(self, names: tuple[str, ...]) -> bool:
        return bool(names) and not self.views and self.folds(names) and self.one_copy(names)

    def arrived(self, name: str, ats: list[int]) -> None:
        self.parts.setdefault(name, []).extend(ats)
        if name not in self.active:
            self.active += (name,)

    def left(self, name: str | None) -> None:
        for gone in [name] if name else list(self.parts):
            self.parts.pop(gone)
            self.active = tuple(other for other in self.active if other != gone)
        if not self.parts:
            self.frozen = False
            self.open.clear()  # the choices to go back to are gone with the last adapter

    @contextlib.contextmanager
    def expected(self, to_work: bool) -> Any:
        """A call that should work does; one that should be refused is, and changes nothing."""
        if to_work:
            yield
            return
        before = snapshot(self.model)
        with pytest.raises(AdapterError):
            yield
        assert changes(before, self.model) == []

    # -- putting in and taking out

    @rule(name=name_of_one, part=a_part, freeze=st.booleans())
    def inject(self, name: str, part: Any, freeze: bool) -> None:
        at = PARTS.index(part)
        target, kind, config, _ = part
        works = not self.merged and not self.views and self.is_free(name, at)
        works = works and self.one_copy(self.active, name, [at])
        with self.expected(works):
            peftlib.inject(self.model, target, kind, name=name, freeze=freeze, **config)
        if works:
            self.arrived(name, [at])
            self.frozen |= freeze

    @rule(name=st.one_of(st.none(), name_of_one))
    def eject(self, name: str | None) -> None:
        works = self.is_known((name,) if name else ()) and not self.merged and not self.views
        with self.expected(works):
            peftlib.eject(self.model, name)
        if works:
            self.left(name)

    @rule(name=st.one_of(st.none(), name_of_one))
    def eject_for_good(self, name: str | None) -> None:
        names = (name,) if name else self.merged or self.active
        works = self.is_known(names) and not self.views and bool(names)
        works = works and (names == self.merged if self.merged else self.folds(names))
        with self.expected(works):
            peftlib.eject(self.model, name, merge=True)
        if works:
            if self.merged:
                self.active, self.merged = self.aside, ()
            self.left(name)
            self.base_version += 1
            with torch.no_grad():
                for key, tensor in self.plain.state_dict().items():
                    tensor.copy_(self.model.state_dict()[key])

    # -- choosing

    @rule(names=some_names, stay=st.booleans())
    def activate(self, names: tuple[str, ...], stay: bool) -> None:
        """What is merged is unmerged for it."""
        works = self.is_known(names) and self.one_copy(names) and not (self.merged and self.views)
        with self.expected(works):
            undo = peftlib.activate(self.model, *names)
        if works:
            merged, before = self.merged, self.aside if self.merged else self.active
            if not stay:
                self.open.append((undo, before, merged))
            self.active, self.merged = names, ()

    @precondition(lambda self: self.open)
    @rule(at=st.integers(0, 3), fails=st.booleans())
    def leave_a_block(self, at: int, fails: bool) -> None:
        """Blocks may end in any order, after anything happened inside, and by an exception."""
        undo, *before = self.open.pop(at % len(self.open))
        active, merged = (tuple(name for name in names if name in self.parts) for names in before)
        again = bool(merged) and not self.merged
        works = self.one_copy(active) and (not again or self.can_fold(merged))
        with contextlib.nullcontext() if works else pytest.raises(AdapterError):
            undo.__exit__(*((Fault, Fault(), None) if fails else (None, None, None)))
        if self.merged and works:
            self.aside = active
        elif self.parts and self.one_copy(active):
            self.active = active
            if again and works:
                self.merged, self.aside, self.active = merged, active, ()

    @rule(names=some_names, fails=st.booleans())
    def train_only(self, names: tuple[str, ...], fails: bool) -> None:
        works = self.is_known(names)
        with self.expected(works), contextlib.suppress(Fault):
            undo = peftlib.train_only(self.model, *names)
            trained = {name for _, name, a in peftlib.adapters(self.model) for p in a.parameters() if p.requires_grad}
            assert trained == set(names)
            if fails:
                with undo:
                    raise Fault

    @precondition(lambda self: self.parts)
    @rule(names=some_names)
    def view(self, names: tuple[str, ...]) -> None:
        works = self.is_known(names) and not self.merged and self.one_copy(names)
        with self.expected(works):
            self.views.append((peftlib.view(self.model, *names), names))

    @precondition(lambda self: self.views)
    @rule()
    def drop_views(self) -> None:
        face: Any
        for face, names in self.views:
            with torch.no_grad():
                seen = face(TOKENS)
            if not self.merged:
                with peftlib.activate(self.model, *names), torch.no_grad():
                    assert torch.equal(seen, self.model(TOKENS))
        face = None
        self.views.clear()

    # -- folding

    @rule(names=some_names, backup=st.sampled_from(["device", "cpu"]))
    def merge(self, names: tuple[str, ...], backup: str) -> None:
        chosen = names or self.active
        works = self.is_known(chosen) and not self.merged and self.can_fold(chosen)
        with self.expected(works):
            peftlib.merge(self.model, *names, backup=backup)
        if works:
            self.merged, self.aside, self.active = chosen, self.active, ()

    @rule()
    def unmerge(self) -> None:
        works = bool(self.merged) and not self.views
        with self.expected(works):
            peftlib.unmerge(self.model)
        if works:
            self.merged, self.active = (), self.aside

    @rule(names=some_names)
    def fail_in_a_merged_block(self, names: tuple[str, ...]) -> None:
        before = snapshot(self.model)
        with contextlib.suppress(Fault, AdapterError), peftlib.merged(self.model, *names):
            raise Fault
        assert changes(before, self.model) == []

    @rule(names=some_names)
    def stream(self, names: tuple[str, ...]) -> None:
        before = snapshot(self.model)
        with contextlib.suppress(AdapterError):
            assert [key for key, _ in peftlib.merged_state_dict(self.model, *names)] == KEYS
        assert changes(before, self.model) == []

    # -- running

    @rule(mode=st.booleans())
    def train_mode(self, mode: bool) -> None:
        for model in (self.model, self.plain, *(face for face, _ in self.views)):  # a face has a mode of its own
            model.train(mode)

    @precondition(lambda self: self.active)
    @rule()
    def train_step(self) -> None:
        peftlib.train_only(self.model, *self.active)
        parameters = list(peftlib.parameters(self.model))
        optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
        self.model(TOKENS).square().mean().backward()
        if self.frozen:
            assert not [n for n, p in self.model.named_parameters() if p.grad is not None and "adapters." not in n]
        optimizer.step()
        self.model.zero_grad()

    # -- files

    @precondition(lambda self: self.parts)
    @rule(name=name_of_one)
    def save(self, name: str) -> None:
        path = Path(self.folder.name) / f"{name}.safetensors"
        works = name in self.parts
        with self.expected(works):
            peftlib.save(self.model, path, name)
        if not works:
            return
        self.files[name] = list(self.parts[name]), self.base_version
        other = copy.deepcopy(self.plain)
        peftlib.load(other, path)
        other.requires_grad_(not self.frozen)  # MultiheadAttention chooses another kernel where nothing trains
        if not self.merged:
            with peftlib.activate(self.model, name), torch.no_grad():
                assert torch.equal(other(TOKENS), self.model(TOKENS))

    @precondition(lambda self: self.files)
    @rule(name=name_of_one, called=name_of_one)
    def load(self, name: str, called: str) -> None:
        if name not in self.files:
            return
        ats, base_version = self.files[name]
        works = not self.merged and not self.views and all(self.is_free(called, at) for at in ats)
        works = works and self.one_copy(self.active, called, ats)
        works = works and base_version == self.base_version
        if base_version != self.base_version:
            return  # the base may or may not have moved where this file looks
        with self.expected(works):
            peftlib.load(self.model, Path(self.folder.name) / f"{name}.safetensors", called)
        if works:
            self.arrived(called, ats)
            self.frozen = True

    # -- copies

    def continue_with(self, other: Any) -> None:
        """A copy has no views, and the blocks that are open belong to the original."""
        self.model, self.open, self.views = other, [], []

    @rule()
    def deepcopy(self) -> None:
        self.continue_with(copy.deepcopy(self.model))

    @rule(torch_too=st.booleans())
    def pickle(self, torch_too: bool) -> None:
        if torch_too:
            stream = io.BytesIO()
            torch.save(self.model, stream)
            stream.seek(0)
            self.continue_with(torch.load(stream, weights_only=False))
        else:
            self.continue_with(pickle.loads(pickle.dumps(self.model)))

    # -- failures

    @rule(step=a_step, name=name_of_one, part=a_part)
    def fail_in_inject(self, step: int, name: str, part: Any) -> None:
        target, kind, config, _ = part
        before = snapshot(self.model)
        with Steps(step), pytest.raises((Fault, AdapterError)):
            peftlib.inject(self.model, [target, "norm"], kind, name=name, **config)
        assert changes(before, self.model) == []

    @precondition(lambda self: self.active and not self.merged)
    @rule(moment=a_moment, late=st.booleans(), attribute=st.sampled_from(["copy_", "clone", "isfinite"]))
    def fail_in_merge(self, moment: int, late: bool, attribute: str) -> None:
        def merges() -> None:
            peftlib.merge(self.model)
            raise Fault  # the moment never came: undone below

        before = snapshot(self.model)
        with failing(torch.Tensor, attribute, moment, late) as struck, contextlib.suppress(Fault, AdapterError):
            merges()
        if not struck and "merged" in states(self.model).values():
            peftlib.unmerge(self.model)
        assert changes(before, self.model) == []

    @precondition(lambda self: self.merged and not self.views)
    @rule(moment=a_moment, late=st.booleans())
    def fail_in_unmerge(self, moment: int, late: bool) -> None:
        before, merged = weights(self.model), self.merged
        with failing(torch.Tensor, "copy_", moment, late) as struck, contextlib.suppress(Fault):
            peftlib.unmerge(self.model)
        if struck:
            assert weights(self.model) == before
            assert {name for name, state in states(self.model).items() if state == "merged"} == set(merged)
        else:
            self.merged, self.active = (), self.aside

    @precondition(lambda self: self.parts)
    @rule(step=a_step)
    def fail_in_eject(self, step: int) -> None:
        before = snapshot(self.model)
        with Steps(step):
            try:
                peftlib.eject(self.model)
            except AdapterError:
                assert changes(before, self.model) == []
                return
            except Fault:
                if changes(before, self.model) == []:
                    return
        assert list(peftlib.adapters(self.model)) == [], "all is out, or nothing"
        self.left(None)

    @rule()
    def calls_that_make_no_sense(self) -> None:
        for call in (
            lambda: peftlib.inject(self.model, "nowhere", LoRA),
            lambda: peftlib.inject(self.model, "first", LoRA, rank=0, name="d"),
            lambda: peftlib.inject(self.model, ["first", "norm"], LoRA, name="d"),
            lambda: peftlib.activate(self.model, "d"),
            lambda: peftlib.merge(self.model, "d"),
            lambda: peftlib.eject(self.model, "d"),
            lambda: peftlib.eject(self.model, "d", merge=True),
            lambda: peftlib.view(self.model, "d"),
            lambda: peftlib.train_only(self.model, "d"),
            lambda: peftlib.save(self.model, Path(self.folder.name) / "d", "d"),
        ):
            with self.expected(False):
                call()

    # -- what always holds

    @invariant()
    def the_base_is_as_it_was(self) -> None:
        model = getattr(self, "model", None)
        if model is None:
            return
        assert [key for key in model.state_dict() if "adapters." not in key] == KEYS
        assert model.head.weight is model.embedding.weight
        assert model.again is model.first
        trains = {name: p.requires_grad for name, p in model.named_parameters() if "adapters." not in name}
        own = {name: p.requires_grad and not self.frozen for name, p in self.plain.named_parameters()}
        assert trains == own
        if not self.merged:
            assert weights(model) == weights(self.plain)

    @invariant()
    def the_adapters_are_those_that_were_put_in(self) -> None:
        model = getattr(self, "model", None)
        if model is None:
            return
        assert {name for _, name, _ in peftlib.adapters(model)} == self.parts.keys()
        acts = dict.fromkeys(self.active, "active") | dict.fromkeys(self.merged, "merged")
        assert states(model) == dict.fromkeys(self.parts, "off") | acts

    @invariant()
    def with_no_adapter_the_output_is_the_bases(self) -> None:
        if not getattr(self, "parts", None) or self.merged:
            return
        own = {name: p.requires_grad for name, p in self.plain.named_parameters()}
        self.plain.requires_grad_(not self.frozen)  # as above: the kernel depends on it
        with peftlib.activate(self.model), torch.no_grad():
            assert torch.equal(self.model(TOKENS), self.plain(TOKENS))
        for name, parameter in self.plain.named_parameters():
            parameter.requires_grad_(own[name])

    def teardown(self) -> None:
        if getattr(self, "model", None) is None:
            return
        self.views.clear()
        if self.merged:
            peftlib.unmerge(self.model)
        if self.parts:
            peftlib.eject(self.model)
        assert portrait(self.model) == portrait(self.plain)
        self.folder.cleanup()


runs = settings(
    max_examples=100,
    stateful_step_count=20,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


def test_any_order_of_operations():
    run_state_machine_as_test(Operations, settings=runs)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_any_order_of_operations_at_length(part):
    """1,000 sequences of up to 40 operations, others each time; 0.2 seconds each."""
    run_state_machine_as_test(
        Operations, settings=settings(runs, max_examples=250, stateful_step_count=40, derandomize=False)
    )

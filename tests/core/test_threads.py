"""One base, many threads: each view gives its own adapter's output, whatever runs beside it."""

import copy
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlib
from peftlib import IA3, Bottleneck, DoRA, Full, LoRA
from support.helpers import Gain, Offset, moved, network, same_bits, tokens

pytestmark = pytest.mark.mutants

THREADS = 8

# A name of each sort: with a weight form and without, shadowing weights and not, and a mixture.
KINDS: dict[str, Callable[[Any], Any]] = {
    "lora": lambda m: peftlib.inject(m, nn.Linear, LoRA, rank=2, name="lora"),
    "full": lambda m: peftlib.inject(m, ["norm", "head"], Full, name="full"),
    "gain": lambda m: peftlib.inject(m, "v_proj", Gain, start=2.0, name="gain"),
    "offset": lambda m: peftlib.inject(m, "q_proj", Offset, name="offset"),
    "dora": lambda m: peftlib.inject(m, "q_proj", DoRA, rank=2, name="dora"),
    "ia3": lambda m: peftlib.inject(m, ["q_proj", "v_proj"], IA3, name="ia3"),
    "bottleneck": lambda m: peftlib.inject(m, "v_proj", Bottleneck, width=2, name="bottleneck"),
}
CHOICES = [*((name,) for name in KINDS), ("lora", "full", "offset")]


def served() -> Any:
    model = network()
    for put in KINDS.values():
        put(model)
    return moved(model)


def together(*work: Callable[[], None]) -> None:
    """Runs each in a thread of its own; what any of them raises is raised here."""
    failures: list[BaseException] = []
    gate = threading.Barrier(len(work))

    def run(one: Callable[[], None]) -> None:
        try:
            gate.wait()
            one()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def alone(model: Any, names: tuple[str, ...]) -> Tensor:
    with peftlib.activate(model, *names), torch.no_grad():
        return model(tokens()).clone()


def serve(calls: int) -> None:
    model = served()
    expected = {names: alone(model, names) for names in CHOICES}
    assert len({bytes(out.numpy().data) for out in expected.values()}) == THREADS, "no two choices give the same"
    count, wrong = itertools.count(), []

    def client(names: tuple[str, ...], face: Any) -> None:
        with torch.no_grad():
            while next(count) < calls:
                if not same_bits(face(tokens()), expected[names]):
                    wrong.append(names)

    faces = {names: peftlib.view(model, *names) for names in CHOICES}
    tensors = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    for face in faces.values():
        assert {id(tensor) for tensor in [*face.parameters(), *face.buffers()]} == tensors, "a parameter was copied"
    together(*(lambda names=names, face=face: client(names, face) for names, face in faces.items()))
    assert wrong == []


def test_eight_threads_are_served_their_own_adapters():
    serve(1_000)


@pytest.mark.slow
def test_ten_thousand_calls_of_eight_threads_and_none_is_wrong():
    serve(10_000)


def trained(model: Any, name: str, steps: int = 20) -> list[Tensor]:
    """Trains one name through a face of the model; returns its parameters."""
    parameters = list(peftlib.parameters(model, name))
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    for step in range(steps):
        loss = (model(tokens()) - step / steps).square().mean()
        gradients = torch.autograd.grad(loss, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


@pytest.mark.parametrize(("first", "second"), [("lora", "dora"), ("full", "bottleneck"), ("gain", "ia3")])
def test_two_views_train_in_two_threads_as_each_would_alone(first, second):
    torch.manual_seed(0)
    model = served()
    expected = {}
    for name in (first, second):
        reference = copy.deepcopy(model)
        peftlib.activate(reference, name)
        expected[name] = trained(reference, name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found: dict[str, list[Tensor]] = {}
    faces = {name: peftlib.view(model, name) for name in (first, second)}
    together(*(lambda name=name: found.update({name: trained(faces[name], name)}) for name in faces))
    for name in (first, second):
        assert all(itertools.starmap(same_bits, zip(found[name], expected[name], strict=True)))
    mine = {id(p) for name in (first, second) for p in peftlib.parameters(model, name)}
    for key, value in model.state_dict(keep_vars=True).items():
        if id(value) not in mine:
            assert same_bits(value, before[key]), key


def test_each_view_can_be_compiled():
    model = served()
    choices = [("lora",), ("full", "offset"), ()]
    torch._dynamo.reset()
    try:
        faces = {names: peftlib.view(model, *names) for names in choices}
        compiled: dict[Any, Any] = {
            names: torch.compile(face, fullgraph=True, backend="aot_eager") for names, face in faces.items()
        }
        with torch.no_grad():
            for names, face in compiled.items():
                torch.testing.assert_close(face(tokens()), alone(model, names))
            expected = {names: face(tokens()).clone() for names, face in compiled.items()}
            wrong: list[Any] = []

            def client(names: Any) -> None:
                with torch.no_grad():
                    wrong.extend(names for _ in range(20) if not same_bits(compiled[names](tokens()), expected[names]))

            with torch.compiler.set_stance("fail_on_recompile"):  # for all threads
                together(*(lambda names=names: client(names) for names in choices))
        assert wrong == []
    finally:
        torch._dynamo.reset()


def test_views_come_and_go_in_threads():
    """Each model's list of views is kept in one table, which all threads write."""
    models = [network() for _ in range(4)]
    for model in models:
        peftlib.inject(model, "head", LoRA, name="a")
        moved(model)
    expected = [alone(model, ("a",)) for model in models]

    def comes_and_goes(at: int) -> None:
        with torch.no_grad():
            for _ in range(60):
                face = peftlib.view(models[at % 4], "a")
                assert same_bits(face(tokens()), expected[at % 4])
                again = peftlib.view(face)
                del face, again

    together(*(lambda at=at: comes_and_goes(at) for at in range(THREADS)))
    for model in models:
        peftlib.eject(model)  # a view that was still known would be in the way


class Peeking(nn.Linear):
    """Has a copy of the model made in the middle of its own call, as another thread might."""

    peek: Any = None

    def forward(self, input: Tensor) -> Tensor:
        if self.peek is not None:
            self.peek()
        return super().forward(input)


class Recurrent(nn.Module):
    """Its recurrent child is no host, and is run with another's weights all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.peeking, self.rnn = Peeking(4, 4), nn.RNN(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(self.peeking(x))[0]


@pytest.mark.parametrize(
    ("make", "copied"),
    [(lambda: Peeking(4, 4), copy.deepcopy), (lambda: Peeking(4, 4), peftlib.view), (Recurrent, peftlib.view)],
    ids=["copy", "view", "view of a recurrent child"],
)
def test_a_copy_that_is_made_in_the_middle_of_a_call_is_whole(make, copied):
    """A kind with only a weight form puts its tensors into the host for the length of a call."""
    model: Any = nn.Sequential(make())
    peeking = next(module for module in model.modules() if isinstance(module, Peeking))
    peftlib.inject(model, "0", Full)
    moved(model)
    x, found = torch.ones(2, 4), []

    def peek() -> None:
        peeking.peek = None
        found.append(copied(model))

    with torch.no_grad():
        with peftlib.activate(model):
            plain = model(x)
        peeking.peek = peek
        assert not same_bits(model(x), plain)
        with peftlib.activate(found[0]):
            assert same_bits(found[0](x), plain)


def test_a_view_that_is_made_while_the_model_runs_is_whole():
    model = network()
    peftlib.inject(model, ["norm", "head"], Full, name="full")
    peftlib.inject(model, "q_proj", LoRA, rank=2, name="lora")
    moved(model)
    expected, plain = alone(model, ("full",)), alone(model, ())
    peftlib.activate(model, "full")
    done = threading.Event()

    def runs() -> None:
        with torch.no_grad():
            while not done.is_set():
                assert same_bits(model(tokens()), expected)

    def looks() -> None:
        try:
            with torch.no_grad():
                for _ in range(300):
                    assert same_bits(peftlib.view(model)(tokens()), plain)
        finally:
            done.set()

    together(runs, looks)


BESIDE = """
import threading, time, torch, peftlib
from torch import nn
torch.set_num_threads(1)
model, x = nn.Sequential({host}), torch.randn(2, 4, 8)
peftlib.inject(model, "0", peftlib.{kind})
end = time.monotonic() + 2
def run():
    while time.monotonic() < end:
        model[0]({given})
def read():
    while time.monotonic() < end:
        for parameter in peftlib.parameters(model):
            parameter * 2
threads = [threading.Thread(target=work) for work in (run, read)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


@pytest.mark.parametrize(
    ("host", "given", "kind"),
    [
        ("nn.Linear(8, 8)", "x", "LoRA"),
        ("nn.Linear(8, 8).bfloat16()", "x.bfloat16()", "DoRA"),
        ("nn.Conv1d(4, 8, 3)", "x", "LoRA, dropout=0.5"),
        ("nn.LayerNorm(8)", "x", "Bottleneck, width=2"),
        ("nn.MultiheadAttention(8, 2)", "x, x, x", "IA3"),
    ],
)
def test_a_thread_that_reads_the_same_parameters_does_not_stop_it_for_ever(host, given, kind):
    """torch 2.13 can: see `kernels/apply.py`. A stopped process holds the GIL, so it is another one."""
    subprocess.run([sys.executable, "-c", BESIDE.format(host=host, given=given, kind=kind)], check=True, timeout=120)

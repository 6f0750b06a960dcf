"""Hot swap: a file's values in the place of an adapter's, in the same tensors."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import peftlib
from peftlib import IA3, Bottleneck, DoRA, Full, LoRA, Prefix
from support.faults import fail_at_every_step
from support.helpers import bits, changes, linears, moved, network, snapshot, tokens
from support.refusals import refused

pytestmark = pytest.mark.mutants


class Layers(nn.Module):
    """Layers whose factors lie in different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.transposed = nn.ConvTranspose1d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x)[0]
        return self.head(self.transposed(self.conv(x.mT)).mT)


LAYERS = ["embedding", "attention", "conv", "transposed", "head"]


def adapted(draw: int, kind: Any = LoRA, targets: Any = LAYERS, name: str = "a", **config: Any) -> Any:
    """Adapters that differ by their draw, on a base that does not."""
    torch.manual_seed(0)
    model = Layers().double()
    torch.manual_seed(draw)
    peftlib.inject(model, targets, kind, name=name, **config)
    return moved(model)


def saved(model: Any, tmp_path: Any, name: str = "a") -> Any:
    path = tmp_path / "adapter.safetensors"
    peftlib.save(model, path, name)
    return path


KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "lora": (LoRA, LAYERS, {"rank": 2}),
    "pissa": (LoRA, LAYERS, {"rank": 2, "init": "pissa"}),
    "dora": (DoRA, LAYERS, {"rank": 2}),
    "ia3": (IA3, LAYERS, {}),
    "bottleneck": (Bottleneck, LAYERS, {"width": 3}),
    "prefix": (Prefix, "attention", {"length": 2}),
    "full": (Full, LAYERS, {}),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_swapped_adapter_gives_what_the_file_s_gives_in_the_same_tensors(name, tmp_path):
    kind, targets, config = KINDS[name]
    model, other = adapted(1, kind, targets, **config), adapted(2, kind, targets, **config)
    own = list(peftlib.parameters(model))
    names = peftlib.load(model, saved(other, tmp_path), into="a")
    assert sorted(names) == sorted({host for host, _, _ in peftlib.adapters(other)})
    assert torch.equal(model(tokens()), other(tokens()))
    assert list(map(id, peftlib.parameters(model))) == list(map(id, own))
    assert [bits(p) for p in own] == [bits(p) for p in peftlib.parameters(other)]


@pytest.mark.parametrize("kind", [LoRA, DoRA])
@pytest.mark.parametrize(
    "config",
    [{"rank": 2, "alpha": 5}, {"rank": 3, "alpha": 8}, {"rank": 1, "alpha": 7, "rank_stabilized": True}],
    ids=str,
)
def test_a_lower_rank_has_its_own_scale_and_is_saved_as_what_it_is(kind, config, tmp_path):
    model, other = adapted(1, kind, rank=6, alpha=4), adapted(2, kind, **config)
    peftlib.load(model, saved(other, tmp_path), into="a")
    torch.testing.assert_close(model(tokens()), other(tokens()), rtol=0, atol=1e-12)
    scales = [{part.scale for _, _, part in peftlib.adapters(each)} for each in (model, other)]
    assert scales[0] == scales[1]
    again = adapted(3, kind, rank=6, alpha=4)
    peftlib.load(again, saved(model, tmp_path), into="a")
    assert torch.equal(again(tokens()), model(tokens()))
    fresh = Layers().double()
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if ".adapters." not in k})
    peftlib.load(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(fresh(tokens()), model(tokens()))


def test_a_lower_rank_trains_as_it_would_alone_and_nothing_leaks_into_the_rank_that_is_free(tmp_path):
    model, other = adapted(1, rank=5), adapted(2, rank=2, alpha=6)
    peftlib.load(model, saved(other, tmp_path), into="a")
    for each in (model, other):
        optimizer = torch.optim.AdamW(peftlib.parameters(each), lr=0.01, weight_decay=0.1)
        for _ in range(10):
            optimizer.zero_grad()
            each(tokens()).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(model(tokens()), other(tokens()), rtol=0, atol=1e-10)
    head, free = model.head.adapters["a"], slice(2, None)
    assert not head.lora_A[free].any()
    assert not head.lora_B[:, free].any()
    conv = model.conv.adapters["a"]
    assert not conv.lora_A[free].any()
    assert not conv.lora_B[:, free].any()


def test_what_is_chosen_routed_and_trained_stays_so_and_gradients_go(tmp_path):
    model, other = adapted(1, rank=4, alpha=4), adapted(2, rank=2, alpha=6)
    peftlib.inject(model, "head", LoRA, rank=1, name="b")
    moved(model, "b")
    path = saved(other, tmp_path)
    peftlib.train_only(model, "b")
    flags = [p.requires_grad for p in peftlib.parameters(model)]
    with peftlib.route(model, ["a", "b", None, "a"]):
        model(tokens().repeat(2, 1))
        peftlib.load(model, path, into="a")
        found = model(tokens().repeat(2, 1))
    assert [p.requires_grad for p in peftlib.parameters(model)] == flags
    rows = tokens().repeat(2, 1)
    torch.testing.assert_close(found[0], other(rows)[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[3], other(rows)[3], rtol=0, atol=1e-12)
    peftlib.train_only(model, "a")
    peftlib.activate(model, {"a": 0.5})
    model(tokens()).sum().backward()
    peftlib.load(model, path, into="a")
    assert all(p.grad is None for p in peftlib.parameters(model, "a"))
    assert {row.name: row.state for row in peftlib.summary(model).rows} == {"a": "active", "b": "off"}


def test_a_narrower_file_fits_into_a_wider_adapter_and_not_the_other_way(tmp_path):
    wide, narrow = adapted(1, rank=2, dtype="float32"), adapted(2, rank=2, dtype="bfloat16")
    path = saved(narrow, tmp_path)
    peftlib.load(wide, path, into="a")
    assert [bits(p) for p in peftlib.parameters(wide)] == [bits(p.float()) for p in peftlib.parameters(narrow)]
    path = saved(adapted(3, rank=2, dtype="float32"), tmp_path)
    with refused(narrow, "a", "torch.float32", "torch.bfloat16"):
        peftlib.load(narrow, path, into="a")


def test_compiled_a_swap_compiles_nothing_once_a_scale_has_changed(tmp_path):
    torch.compiler.reset()
    model = adapted(1, targets="head", rank=4, alpha=8)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    compiled(tokens())
    for seed in (2, 3):
        other = adapted(seed, targets="head", rank=4, alpha=8)
        peftlib.load(model, saved(other, tmp_path), into="a")
        torch.testing.assert_close(compiled(tokens()), other(tokens()), rtol=0, atol=1e-12)
    assert counter.frame_count == 1
    for seed, rank, alpha in ((4, 2, 8), (5, 3, 1), (6, 4, 8), (7, 1, 3)):
        other = adapted(seed, targets="head", rank=rank, alpha=alpha)
        peftlib.load(model, saved(other, tmp_path), into="a")
        torch.testing.assert_close(compiled(tokens()), other(tokens()), rtol=0, atol=1e-12)
    assert counter.frame_count == 2


# ---- refusals

FILES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "higher rank": (lambda: adapted(2, rank=5), ("a", "LoRA", "5", "4")),
    "another type": (lambda: adapted(2, DoRA, rank=4), ("DoRA", "LoRA", '"a"')),
    "fewer modules": (lambda: adapted(2, targets=["head", "conv"], rank=4), ("attention", "nothing")),
    "dropout": (
        lambda: adapted(2, targets=["conv", "head", "transposed"], rank=4, dropout=0.5),
        ("attention", "nothing"),
    ),
    "another start": (lambda: adapted(2, rank=4, init="pissa"), ('"a"',)),
    "a seed": (lambda: adapted(2, rank=4, seed=3), ('"a"',)),
}


@pytest.mark.parametrize("which", FILES)
def test_a_file_that_does_not_fit_is_refused(which, tmp_path):
    make, named = FILES[which]
    model, path = adapted(1, rank=4), saved(make(), tmp_path)
    with refused(model, *named):
        peftlib.load(model, path, into="a")


def test_another_configuration_is_refused_by_its_keyword(tmp_path):
    model = adapted(1, targets="head", rank=4)
    for config, named in (({"dropout": 0.5}, "dropout"), ({"seed": 3}, "head")):
        path = saved(adapted(2, targets="head", rank=4, **config), tmp_path)
        with refused(model, "head", named):
            peftlib.load(model, path, into="a")


def test_another_base_and_a_damaged_file_are_refused(tmp_path):
    model, other = adapted(1, rank=2), adapted(2, rank=2)
    with torch.no_grad():
        other.head.weight.add_(1.0)
    path = saved(other, tmp_path)
    with refused(model, str(path), "head"):
        peftlib.load(model, path, into="a")
    assert peftlib.load(model, path, into="a", strict=False)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with refused(model, str(path)):
        peftlib.load(model, path, into="a", strict=False)


def test_an_absent_adapter_two_names_a_view_and_a_merged_model_are_refused(tmp_path):
    model = adapted(1, rank=2)
    path = saved(adapted(2, rank=2), tmp_path)
    with refused(model, "'z'"):
        peftlib.load(model, path, into="z")
    with refused(model, "load", "'b'", "'a'"):
        peftlib.load(model, path, "b", into="a")
    with peftlib.merged(model), refused(model, "load"):
        peftlib.load(model, path, into="a")
    view = peftlib.view(model, "a")
    with refused(model, "load"):
        peftlib.load(model, path, into="a")
    with refused(view, "load"):
        peftlib.load(view, path, into="a")


def test_a_failure_on_the_way_leaves_all_as_it_was(tmp_path):
    def make(seed: int = 1, rank: int = 3) -> Any:
        torch.manual_seed(0)
        model = linears(1)
        torch.manual_seed(seed)
        peftlib.inject(model, "0", LoRA, rank=rank, name="a")
        return moved(model)

    path = saved(make(2, 2), tmp_path)
    assert fail_at_every_step(make, lambda model: peftlib.load(model, path, into="a")) > 20


def test_an_adapter_of_many_layers_is_swapped_whole_or_not_at_all(tmp_path):
    model, other = network(), network()
    for each in (model, other):
        peftlib.inject(each, nn.Linear, LoRA, rank=2, name="a")
        moved(each)
    before = snapshot(model)
    last = [part for _, _, part in peftlib.adapters(other)][-1]
    with torch.no_grad():
        last.lora_B.fill_(float("inf"))
    with refused(model, "head.lora_B"):
        peftlib.load(model, _written_with_infinity(other, tmp_path), into="a")
    assert changes(before, model) == []


def _written_with_infinity(model: Any, tmp_path: Any) -> Any:
    """`save` refuses it, so the file is changed."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with torch.no_grad():
        [part for _, _, part in peftlib.adapters(model)][-1].lora_B.fill_(1.0)
    path = saved(model, tmp_path)
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    tensors["head.lora_B"].fill_(torch.inf)
    save_file(tensors, path, metadata)
    return path

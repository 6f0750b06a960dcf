"""Rows: each row of a routed batch gives what it would give alone, whatever goes through the others."""

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_laws import MAIN, Kind, floating, put, table
from torch import Tensor, nn

import peftlib
from peftlib import IA3, AdapterError, Bottleneck, DoRA, Full, LoRA, Prefix
from support.helpers import Gain, Offset, changes, moved, network, same_bits, snapshot
from support.hosts import Host

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning"),
]

Row = str | None | tuple[str, ...]
ROWS: list[Row] = ["a", "b", None, "c", "a", ("a", "b"), "b", "a", "c", None, "a"]
NAMES = ("a", "b", "c")
# For all rows the same, so not one for each.
SHARED = {"attn_mask", "output_size", "need_weights"}
# One sample without a dimension for the batch; where that dimension goes.
UNBATCHED = {
    "linear-no-bias": 0, "conv1d-grouped-unbatched": 0, "conv2d-unbatched": 0, "transposed1d-unbatched": 0, "rnn": 1,
    "attention-extra-keys": 1,
}  # fmt: skip
# Rows in dimension 1 of what goes in.
SECOND = ("lstm", "gru", "attention-packed", "attention-separate")
WITHOUT_ROWS = ("bag-sum", "bag-mean-padding", "bag-per-sample", "bag-max", "bag-last-offset")


def has_rows(kind: Kind, host: Host) -> bool:
    return host.name not in (*WITHOUT_ROWS, "batch-norm") and not kind.random and not writes_weight(kind, host)


def writes_weight(kind: Kind, host: Host) -> bool:
    return host.name == "embedding-max-norm" and kind.kind is not peftlib.Bottleneck


CELLS = table([(kind, host) for kind, host in MAIN if has_rows(kind, host)])


def dim_of(host: Host, tensor: Tensor, position: int) -> int:
    if host.name in SECOND:
        return 1
    return 1 if host.name == "lstm-projected" and position > 0 else 0


def joined(host: Host, draws: list[Any], position: int) -> Any:
    """The same argument of several calls, as one batch."""
    first = draws[0]
    if isinstance(first, tuple):
        return tuple(joined(host, [draw[i] for draw in draws], position) for i in range(len(first)))
    if host.name in UNBATCHED:
        return torch.stack(draws, UNBATCHED[host.name])
    return torch.cat(draws, dim_of(host, first, position))


class Batch:
    """A call of the host for each row, and the call for any of the rows together."""

    def __init__(self, host: Host, rows: int) -> None:
        self.host, self.calls = host, []
        for row in range(rows):
            torch.manual_seed(100 + row)
            self.calls.append(converted_call(host))

    def of(self, rows: list[int]) -> tuple[list[Any], dict[str, Any]]:
        chosen = [self.calls[row] for row in rows]
        args = [joined(self.host, [args[i] for args, _ in chosen], i) for i in range(len(chosen[0][0]))]
        keywords = {
            name: value if name in SHARED else torch.cat([kwargs[name] for _, kwargs in chosen])
            for name, value in chosen[0][1].items()
        }
        return args, keywords


def converted_call(host: Host) -> tuple[Any, dict[str, Any]]:
    convert: Callable[[Tensor], Tensor] = lambda x: x.double() if x.is_floating_point() else x  # noqa: E731
    return torch.utils._pytree.tree_map_only(Tensor, convert, (host.inputs(), host.keywords()))


def many(kind: Kind, host: Host) -> Any:
    """A model with three adapters of one type, of other ranks and scales where it has them, none of them at rest."""
    model = host.model(torch.float64)
    ranks = (2, 1, 2) if host.name == "transposed3d" else (2, 1, 3)  # its smaller side is 2
    for name, rank in zip(NAMES, ranks, strict=True):
        more = {"rank": rank, "alpha": 1.0 + rank} if "rank" in kind.config else {}
        put(model, kind, host, name=name, **more)
        peftlib.activate(model)  # copies of one weight cannot act together
    with torch.no_grad():
        for parameter in peftlib.parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def rows_for(kind: Kind) -> list[Row]:
    """Two copies of one weight have no sum."""
    return [row if row != ("a", "b") else "b" for row in ROWS] if kind.kind is Full else ROWS


def names_of(row: Row) -> tuple[str, ...]:
    return (row,) if isinstance(row, str) else row or ()


def groups(rows: list[Row]) -> dict[Row, list[int]]:
    return {choice: [i for i, row in enumerate(rows) if row == choice] for choice in dict.fromkeys(rows)}


def rows_in(outputs: list[Tensor], host: Host, rows: list[int], size: int) -> list[Tensor]:
    """What a joined batch's outputs have for these rows."""
    return [pick(tensor, output_dim(host, at), rows, size) for at, tensor in enumerate(outputs)]


def output_dim(host: Host, position: int) -> int:
    first = 1 if host.name in SECOND or UNBATCHED.get(host.name) else 0
    recurrent = host.name.startswith(("lstm", "gru", "rnn")) and not host.name.endswith("cell")
    return first if position == 0 else int(recurrent)


def pick(tensor: Tensor, dim: int, rows: list[int], size: int) -> Tensor:
    share = tensor.shape[dim] // size
    index = torch.tensor([row * share + i for row in rows for i in range(share)])
    return tensor.index_select(dim, index)


def run(model: Any, args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the leaves that they were made from."""
    leaves = [leaf.requires_grad_() for leaf in floating(args)]
    return floating(model(*args, **kwargs)), leaves


def gradients_of(outputs: list[Tensor], leaves: list[Tensor], given: list[Tensor]) -> list[Tensor | None]:
    reached = [(output, each) for output, each in zip(outputs, given, strict=True) if output.requires_grad]
    if not reached:
        return [None] * len(leaves)
    outputs, given = [output for output, _ in reached], [each for _, each in reached]
    return list(torch.autograd.grad(outputs, leaves, given, allow_unused=True))


def weights_like(tensor: Tensor) -> Tensor:
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(7), dtype=tensor.dtype)


def parameters_of(model: Any) -> dict[str, nn.Parameter]:
    return {
        f"{at} {name} {key} {i}": p
        for i, (at, name, part) in enumerate(peftlib.adapters(model))
        for key, p in part.named_parameters()
    }


def assert_near(found: Tensor | None, expected: Tensor | None, what: str) -> None:
    if found is None or expected is None:
        assert found is expected, what
        return
    assert found.shape == expected.shape, what
    if found.numel():
        off = (found - expected).abs().max().item()
        assert off <= 1e-12 * max(1.0, expected.abs().max().item()), f"{what}: off by {off:.3g}"


def alone(
    model: Any, host: Host, batch: Batch, own: list[int], names: tuple[str, ...], cotangents: list[Tensor]
) -> Any:
    """A group's outputs, its adapters' gradients and its inputs', by itself."""
    with peftlib.activate(model, *names):
        outputs, leaves = run(model, *batch.of(own))
    given = [pick(each, output_dim(host, at), own, len(ROWS)) for at, each in enumerate(cotangents)]
    trained = parameters_of(model)
    found = gradients_of(outputs, [*trained.values(), *leaves], given)
    return outputs, dict(zip(trained, found, strict=False)), found[len(trained) :]


@CELLS
def test_each_group_of_rows_gives_what_it_gives_alone(kind, host):
    model, batch, rows = many(kind, host), Batch(host, len(ROWS)), rows_for(kind)
    with peftlib.route(model, rows):
        outputs, leaves = run(model, *batch.of([*range(len(ROWS))]))
    cotangents = [weights_like(each) for each in outputs]
    trained = parameters_of(model)
    found = gradients_of(outputs, [*trained.values(), *leaves], cotangents)
    gradients, of_inputs = dict(zip(trained, found, strict=False)), found[len(trained) :]
    expected: dict[str, Tensor] = {}
    for choice, own in groups(rows).items():
        outputs_alone, own_gradients, inputs_alone = alone(model, host, batch, own, names_of(choice), cotangents)
        for at, (each, other) in enumerate(zip(outputs, outputs_alone, strict=True)):
            assert_near(pick(each, output_dim(host, at), own, len(ROWS)), other, f"output {at} of {choice}")
        for at, (each, other) in enumerate(zip(of_inputs, inputs_alone, strict=True)):
            assert_near(pick(each, input_dim(host, at), own, len(ROWS)), other, f"input {at} of {choice}")
        for key, gradient in own_gradients.items():
            if gradient is not None:
                expected[key] = expected[key] + gradient if key in expected else gradient
    for key, gradient in gradients.items():
        assert_near(gradient, expected.get(key), key)


def input_dim(host: Host, leaf: int) -> int:
    if host.name in UNBATCHED:
        return UNBATCHED[host.name]
    return dim_of(host, torch.empty(0), leaf)


# On a network of several hosts


def tokens(rows: int) -> Tensor:
    return torch.arange(rows * 5).view(rows, 5) * 7 % 11


def served() -> Any:
    """Adapters of each sort: with a merged weight and without, beside the call and around it, one inside another."""
    model = network().double()
    peftlib.inject(model, nn.Linear, LoRA, rank=2, name="lora")
    peftlib.inject(model, "q_proj", LoRA, rank=3, name="other")
    peftlib.inject(model, ["norm", "head"], Full, name="full")
    peftlib.activate(model)
    peftlib.inject(model, "v_proj", Gain, start=2.0, name="gain")
    peftlib.inject(model, "q_proj", Offset, name="offset")
    peftlib.inject(model, "q_proj", DoRA, rank=2, name="dora")
    peftlib.inject(model, ["q_proj", "v_proj"], IA3, name="ia3")
    peftlib.inject(model, ["v_proj", "layers.0"], Bottleneck, width=2, name="bottleneck", dim=8)
    peftlib.inject(model, "layers.1", Full, name="layer")
    return moved(model)


MIXED: list[Row] = [
    "layer", "lora", None, "gain", "offset", ("layer", "lora"), "dora", "ia3", "lora", "bottleneck", "full", "other",
    ("lora", "other", "offset"), "lora",
]  # fmt: skip


def by_row(model: Any, rows: list[Row], x: Tensor) -> list[Tensor]:
    """What each row gives by itself."""
    found = []
    for i, row in enumerate(rows):
        with peftlib.activate(model, *names_of(row)):
            found.append(model(x[i : i + 1]))
    return found


def test_rows_of_different_types_and_nested_modules_share_one_batch():
    model, x = served(), tokens(len(MIXED))
    alone = torch.cat(by_row(model, MIXED, x))
    weight = torch.randn_like(alone)
    expected = torch.autograd.grad((alone * weight).sum(), list(peftlib.parameters(model)), allow_unused=True)
    with peftlib.route(model, MIXED):
        y = model(x)
    found = torch.autograd.grad((y * weight).sum(), list(peftlib.parameters(model)), allow_unused=True)
    assert_near(y, alone, "output")
    for at, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert_near(one, other, f"gradient {at}")


def test_an_adapter_without_rows_gets_no_gradient():
    model = served()
    with peftlib.route(model, ["lora", "gain"]):
        model(tokens(2)).sum().backward()
    with_rows = {name for _, name, part in peftlib.adapters(model) for p in part.parameters() if p.grad is not None}
    assert with_rows == {"lora", "gain"}


@pytest.mark.parametrize("name", ["lora", "gain", "offset", "dora", "ia3", "bottleneck", "full", "layer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_in_one_adapter_changes_no_bit_of_other_rows(name, value):
    model, x = served(), tokens(len(MIXED))
    others = [i for i, row in enumerate(MIXED) if name not in names_of(row)]

    def outputs_and_gradients() -> tuple[Tensor, dict[str, Tensor | None]]:
        with peftlib.route(model, MIXED):
            y = model(x)
        trained = {key: p for key, p in parameters_of(model).items() if f" {name} " not in key}
        # Rows of sums with this adapter are its own.
        loss = y[[i for i in others if not isinstance(MIXED[i], tuple)]].sum()
        return y[others], dict(
            zip(trained, torch.autograd.grad(loss, [*trained.values()], allow_unused=True), strict=True)
        )

    before, gradients = outputs_and_gradients()
    with torch.no_grad():
        for parameter in peftlib.parameters(model, name):
            parameter.fill_(value)
    after, later = outputs_and_gradients()
    assert same_bits(before, after)
    beside = {other for row in MIXED if name in names_of(row) for other in names_of(row)}
    for key, gradient in gradients.items():
        if gradient is not None and not any(f" {other} " in key for other in beside):
            assert same_bits(gradient, later[key])


def test_an_adapter_that_was_not_finite_is_whole_again_once_a_file_is_loaded_into_it(tmp_path):
    model, x = many_linears(), torch.randn(4, 4)
    before = routed(model, SHUFFLED, x)
    peftlib.save(model, tmp_path / "b.safetensors", "b")
    for parameter in peftlib.parameters(model, "b"):
        parameter.data.fill_(float("nan"))
    assert routed(model, SHUFFLED, x).isnan().any()
    peftlib.load(model, tmp_path / "b.safetensors", into="b")
    assert torch.equal(routed(model, SHUFFLED, x), before)


def test_what_is_not_finite_in_one_row_changes_no_bit_of_others():
    model = many_linears()
    x = torch.randn(6, 3, 4)
    rows: list[Row] = ["a", "b", None, "b", "a", "c"]
    with peftlib.route(model, rows):
        before = model(x)
        x[1] = float("nan")
        after = model(x)
    keep = [0, 2, 3, 4, 5]
    assert same_bits(before[keep], after[keep])
    assert after[1].isnan().all()


def many_linears(**config: Any) -> Any:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
    for name, rank in zip(NAMES, (2, 1, 3), strict=True):
        peftlib.inject(model, nn.Linear, LoRA, rank=rank, alpha=rank + 1.0, name=name, **config)
    return moved(model)


def test_a_mapping_and_a_tensor_say_the_same_as_a_list():
    model, x = many_linears(), torch.randn(5, 4)
    rows: list[Row] = ["b", "b", None, "a", "a"]
    found = []
    index = torch.tensor([1, 1, -1, 0, 0])
    for given in ({"rows": rows}, {"rows": {"b": 2, None: 1, "a": 2}}, {"rows": index, "names": ["a", "b"]}):
        with peftlib.route(model, **given):
            found.append(model(x))
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


def test_leaving_the_block_brings_the_choice_back_and_without_a_block_the_route_stands():
    model, x = many_linears(), torch.randn(2, 4)
    peftlib.activate(model, "a")
    before, state = model(x), snapshot(model)
    with peftlib.route(model, ["b", "c"]) as same:
        assert same is model
        routed = model(x)
        with peftlib.activate(model, "c"):
            assert not torch.equal(model(x), routed)
        assert torch.equal(model(x), routed)
    assert changes(state, model) == []
    assert torch.equal(model(x), before)
    peftlib.route(model, ["b", "c"])
    assert torch.equal(model(x), routed)
    peftlib.activate(model, "a")
    assert torch.equal(model(x), before)


def test_rows_may_lie_in_another_dimension():
    model, x = many_linears(), torch.randn(3, 5, 4)
    with peftlib.route(model, ["a", None, "b", "a", "c"], dim=1):
        found = model(x)
    with peftlib.route(model, ["a", None, "b", "a", "c"]):
        expected = model(x.transpose(0, 1))
    torch.testing.assert_close(found, expected.transpose(0, 1))


@pytest.mark.parametrize("rows", [["a", "z"], [], {"a": -1}, {}])
def test_a_route_that_makes_no_sense_is_refused_and_changes_nothing(rows):
    model = many_linears()
    before = snapshot(model)
    with pytest.raises(AdapterError):
        peftlib.route(model, rows)
    with pytest.raises(AdapterError):
        peftlib.route(model, torch.tensor([0, 3]), names=["a", "b"])
    assert changes(before, model) == []


@pytest.mark.parametrize("rows", ["a", 3, [1, 2], [["a"]], torch.tensor([0, 1])])
def test_a_route_of_a_wrong_type_is_a_type_error(rows):
    with pytest.raises(TypeError):
        peftlib.route(many_linears(), rows)


@pytest.mark.parametrize("act", [
    lambda m: peftlib.inject(m, "0", LoRA, rank=2, name="late"),
    lambda m: peftlib.eject(m, "a"),
    lambda m: peftlib.merge(m),
    lambda m: peftlib.merge(m, "a"),
    lambda m: list(peftlib.merged_state_dict(m, "a")),
], ids=["inject", "eject", "merge", "merge-one", "merged_state_dict"])  # fmt: skip
def test_what_changes_the_adapters_waits_until_the_route_ends(act):
    model = many_linears()
    with peftlib.route(model, ["a", "b"]):
        before = snapshot(model)
        with pytest.raises(AdapterError, match="rout"):
            act(model)
        assert changes(before, model) == []


def test_a_merged_model_is_unmerged_for_the_route_and_merged_again_behind_it():
    model, x = many_linears(), torch.randn(2, 4)
    with peftlib.route(model, ["a", "b"]):
        expected = model(x)
    with peftlib.merged(model, "a"):
        folded = model(x)
        with peftlib.route(model, ["a", "b"]):
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x), folded)


def test_two_copies_of_one_weight_for_one_row_are_refused():
    model = many_linears()
    for name in ("copy", "other"):
        peftlib.activate(model)
        peftlib.inject(model, "0", Full, name=name)
    with peftlib.route(model, ["copy", "other"]):
        model(torch.randn(2, 4))
    before = snapshot(model)
    with pytest.raises(AdapterError, match="copy"):
        peftlib.route(model, ["a", ("copy", "other")])
    assert changes(before, model) == []


def test_another_number_of_rows_is_refused_with_the_name_of_the_module():
    model = nn.Sequential(nn.Identity(), many_linears())
    with peftlib.route(model, ["a", "b", None]), pytest.raises(AdapterError, match=r"1\.0 \(Linear\).*\[4, 4\]"):
        model(torch.randn(4, 4))


@pytest.mark.parametrize("make", [
    lambda: nn.BatchNorm1d(4),
    lambda: nn.BatchNorm1d(4, track_running_stats=False).eval(),
    lambda: nn.InstanceNorm1d(4, track_running_stats=True),
])  # fmt: skip
def test_a_norm_that_mixes_rows_is_refused_by_name_also_when_it_begins_to_later(make):
    norm, x = make(), torch.randn(2, 4, 4)
    model = nn.Sequential(nn.Linear(4, 4), norm)
    peftlib.inject(model, "0", LoRA, rank=2, name="a")
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"1 \("):
        peftlib.route(model, ["a", None])
    assert changes(before, model) == []
    if norm.track_running_stats:
        norm.eval()
        with peftlib.route(model, ["a", None]):
            model(x)
            model.train()
            with pytest.raises(AdapterError, match=r"1 \("):
                model(x)


class Reader(nn.Module):
    """Takes whatever it is called with beside its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor, beside: Any = None, mask: Any = None, gives: Any = None) -> Any:
        y = x @ self.weight.T
        if isinstance(beside, dict):
            y = y + beside["offset"]
        elif isinstance(beside, Tensor):
            y = y + beside
        return y if gives is None else gives(y)


def reader() -> Any:
    model = nn.Sequential(Reader())
    for name in NAMES:
        peftlib.inject(model, "0", LoRA, rank=2, name=name)
    return moved(model)[0]


def routed(model: Any, rows: list[Row], *args: Any, **kwargs: Any) -> Any:
    with peftlib.route(model, rows):
        return model(*args, **kwargs)


SHUFFLED: list[Row] = ["b", "a", "b", None]


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"offset": x}], ids=["tensor", "dict"])
def test_what_goes_with_each_row_is_cut_and_what_is_for_all_is_not(wrap):
    model, x = reader(), torch.randn(4, 3, 4)
    for beside in (torch.randn(4, 3, 4), torch.randn(4, 1, 1), torch.randn(1, 3, 4), torch.randn(3, 4)):
        y = routed(model, SHUFFLED, x, wrap(beside))
        for i, row in enumerate(SHUFFLED):
            own = beside[i : i + 1] if len(beside) == 4 else beside
            with peftlib.activate(model, *names_of(row)):
                torch.testing.assert_close(y[i : i + 1], model(x[i : i + 1], wrap(own)))


@pytest.mark.parametrize(("give", "look"), [
    (lambda y: (y, y * 2, None), lambda out: out[1] / 2),
    (lambda y: [y], lambda out: out[0]),
    (lambda y: {"last": y, "kept": 3}, lambda out: out["last"]),
    (lambda y: {"inner": (y,)}, lambda out: out["inner"][0]),
])  # fmt: skip
def test_whatever_structure_a_module_returns_comes_back(give, look):
    model, x = reader(), torch.randn(4, 3, 4)
    plain, nested = routed(model, SHUFFLED, x), routed(model, SHUFFLED, x, gives=give)
    assert type(nested) is type(give(x))
    torch.testing.assert_close(look(nested), plain)


def test_what_is_one_for_all_rows_of_a_group_is_that_of_each_of_its_rows():
    model, x, give = reader(), torch.randn(4, 3, 4), lambda y: (y, y.amax(0, keepdim=True))
    _, found = routed(model, SHUFFLED, x, gives=give)
    for choice, own in groups(SHUFFLED).items():
        with peftlib.activate(model, *names_of(choice)):
            _, expected = model(x[own], gives=give)
        torch.testing.assert_close(found[own], expected.expand(len(own), -1, -1))


@pytest.mark.parametrize(
    "gives", [lambda y: y.sum(), lambda y: y.sum().view(1), lambda y: (y, object()), lambda y: (y, len(y))]
)
def test_what_has_no_rows_to_join_is_refused(gives):
    with pytest.raises(AdapterError, match="Reader"):
        routed(reader(), SHUFFLED, torch.randn(4, 3, 4), gives=gives)


@pytest.mark.parametrize(("args", "kwargs"), [
    ((torch.randn(4, 3, 4), object()), {}),
    ((3,), {}),
    ((torch.randn(4, 4, 4),), {"beside": torch.randn(4, 4)}),
], ids=["an object", "no tensor", "rows or positions"])  # fmt: skip
def test_arguments_that_cannot_be_told_apart_by_rows_are_refused(args, kwargs):
    with pytest.raises(AdapterError, match="Reader"):
        routed(reader(), SHUFFLED, *args, **kwargs)


@pytest.mark.parametrize("name", ["bag-sum", "bag-mean-padding", "bag-per-sample", "bag-last-offset"])
def test_bags_with_offsets_are_refused(name):
    from support.hosts import HOSTS

    host = next(host for host in HOSTS if host.name == name)
    model = host.model()
    for own in ("a", "b"):
        peftlib.inject(model, "host", LoRA, rank=2, name=own)
    (arguments, keywords) = host.arguments()
    rows = ["a", "b"] * (len(arguments[0]) // 2)
    with peftlib.route(model, rows), pytest.raises(AdapterError, match="EmbeddingBag"):
        model(*arguments, **keywords)


def test_one_adapter_for_all_rows_asks_nothing_of_the_batch():
    model = many_linears()
    with peftlib.route(model, ["a"] * 3), peftlib.activate(model, "a"):
        expected = model(torch.ones(7, 4))
    with peftlib.route(model, ["a"] * 3):
        assert torch.equal(model(torch.ones(7, 4)), expected)


def test_a_copy_a_pickle_and_a_view_of_a_routed_model():
    model, x = many_linears(), torch.randn(3, 4)
    with peftlib.route(model, ["b", None, "a"]):
        expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x), expected)
        view = peftlib.view(model, "c")
        with peftlib.activate(copy.deepcopy(model), "c") as chosen:
            assert torch.equal(view(x), chosen(x))
        peftlib.route(view, ["c", "c", "b"])
        assert torch.equal(model(x), expected)


class GainBehind(peftlib.Adapter):
    """Only a call form, around a module that has others inside."""

    def __init__(self, host: Any) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, host: Any, call: Any, *args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs) * self.gain


def test_threads_that_run_one_routed_model_do_not_meet():
    """Two modules deep, so that the inner ones follow the group that the outer one is running for, in each thread."""
    model = network().double()
    peftlib.inject(model, ["q_proj", "v_proj"], LoRA, rank=2, name="lora")
    for name in ("gained", "other"):
        peftlib.inject(model, ["layers.*"], GainBehind, name=name)
        peftlib.inject(model, "q_proj", LoRA, rank=2, name=name)
    moved(model)
    rows: list[Row] = ["lora", "gained", None, "other", "gained", "lora"]
    x = tokens(len(rows))
    with peftlib.route(model, rows), torch.no_grad():
        expected = model(x)
        found: list[Tensor] = []
        threads = [threading.Thread(target=lambda: found.extend(model(x) for _ in range(10))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 40
    assert all(torch.equal(each, expected) for each in found)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_routed_modules_gives_the_same_gradients(reentrant):
    from torch.utils.checkpoint import checkpoint

    model = many_linears()
    x = torch.randn(4, 4, requires_grad=True)
    found = []
    for run_it in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        with peftlib.route(model, SHUFFLED):
            run_it(x).square().sum().backward()
        found.append({key: p.grad for key, p in parameters_of(model).items()})
        model.zero_grad()
    for key, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][key])


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


def test_a_checkpoint_inside_a_module_that_runs_by_groups_is_refused_not_wrong():
    model = nn.Sequential(Checkpointed())
    peftlib.inject(model, "0", Full, name="a")
    peftlib.inject(model, "0.inner", LoRA, rank=2, name="a")
    peftlib.inject(model, "0.inner", LoRA, rank=2, name="b")
    moved(model)
    with peftlib.route(model, ["a", "b", "a", "b"]):
        y = model(torch.randn(4, 4))
        with pytest.raises(AdapterError, match=r"0\.inner"):
            y.sum().backward()


def test_the_fast_path_of_torch_stays_off_and_its_layers_follow_the_rows():
    torch.manual_seed(0)
    model = (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 2).double().eval()
    )
    peftlib.inject(model, ["linear1", "self_attn"], LoRA, rank=2, name="a")
    peftlib.inject(model, "self_attn", Prefix, length=3, name="b")
    peftlib.inject(model, "layers.1", Full, name="c")
    moved(model)
    rows: list[Row] = ["c", "b", None, "a", "c", ("a", "b")]
    x = torch.randn(6, 5, 8).double()
    padding = torch.zeros(6, 5).bool()
    padding[2, 3:] = padding[4, 4:] = True
    with torch.no_grad():
        with peftlib.route(model, rows):
            found = model(x, src_key_padding_mask=padding)
        for i, row in enumerate(rows):
            with peftlib.activate(model, *names_of(row)):
                expected = model(x[i : i + 1], src_key_padding_mask=padding[i : i + 1])
            seen = ~padding[i]
            assert_near(found[i, seen], expected[0, seen], f"row {i}")


def test_compiled_without_a_break_rows_give_the_same():
    model, x = many_linears(), torch.randn(4, 4)
    model = model.eval()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for rows in (SHUFFLED, ["a", "a", "c", "b"], ["a", None, None, None]):
        with peftlib.route(model, rows):
            torch.testing.assert_close(compiled(x), model(x))


def test_an_optimizer_of_one_trial_moves_no_bit_of_another_and_none_without_rows():
    """With weight decay and momentum, which move a parameter also where its gradient is zero."""
    model, x = many_linears(), torch.randn(3, 4)
    optimizers = {name: torch.optim.AdamW(peftlib.parameters(model, name), lr=0.1, weight_decay=0.5) for name in NAMES}
    for rows in (["a", "b", "a"], ["a", None, "a"]):
        before = {name: [p.detach().clone() for p in peftlib.parameters(model, name)] for name in NAMES}
        with peftlib.route(model, rows):
            model(x).square().sum().backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        for name in NAMES:
            stood = all(map(same_bits, before[name], peftlib.parameters(model, name)))
            assert stood == (name not in rows)


def test_100_steps_of_three_trials_are_those_of_each_alone():
    """Each with its own optimizer, clip and masks: ranks, scales and rates differ."""
    torch.manual_seed(5)
    base = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    rows: list[Row] = ["b", "a", "c", "a", "b", "a"]
    batches = torch.randn(100, 2, len(rows), 3, 4).double()

    def put_in(model: Any, name: str) -> Any:
        at = NAMES.index(name)
        peftlib.inject(model, nn.Linear, LoRA, rank=at + 1, alpha=2.0 + at, dropout=0.1 * at, name=name, seed=at)
        return torch.optim.AdamW(peftlib.parameters(model, name), lr=0.01 * (at + 1))

    def step(model: Any, name: str, optimizer: Any) -> None:
        nn.utils.clip_grad_norm_(peftlib.parameters(model, name), 0.5)
        optimizer.step()
        optimizer.zero_grad()

    together = copy.deepcopy(base)
    optimizers = {name: put_in(together, name) for name in NAMES}
    with peftlib.route(together, rows):
        for x, target in batches:
            errors = (together(x) - target).square()
            torch.stack([errors[groups(rows)[name]].mean() for name in NAMES]).sum().backward()
            for name in NAMES:
                step(together, name, optimizers[name])
    for name in NAMES:
        model = copy.deepcopy(base)
        optimizer = put_in(model, name)
        for x, target in batches[:, :, groups(rows)[name]]:
            (model(x) - target).square().mean().backward()
            step(model, name, optimizer)
        for one, other in zip(peftlib.parameters(together, name), peftlib.parameters(model, name), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)

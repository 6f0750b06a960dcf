"""The fingerprint of a base: the same weights are known in every guise, others are not, and it costs nearly nothing."""

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import peftlib
from peftlib import Full, LoRA
from peftlib.files.fingerprint import differs, fingerprint
from support.helpers import chain, linears, moved, network


class Packed(nn.Linear):
    """A linear layer whose weight is packed into bytes, two values in each, with a scale beside it."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features)
        self.bias = plain.bias
        self.scale = nn.Parameter(plain.weight.detach().abs().max() / 7, requires_grad=False)
        whole = (plain.weight.detach() / self.scale).round().to(torch.int8) + 8
        packed = (whole.flatten()[::2] * 16 + whole.flatten()[1::2]).to(torch.uint8)[:, None]
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        whole = torch.stack([self.weight // 16, self.weight % 16], -1).reshape(self.out_features, -1)
        return nn.functional.linear(input, (whole.to(input.dtype) - 8) * self.scale, self.bias)


class Opaque(nn.Parameter):
    """Stands for a quantisation library's tensor: what its bytes mean is its own affair."""


def plain(seed: int = 0, width: int = 4) -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return linears(1, width)


def packed(model: Any) -> Any:
    return chain(Packed(model[0]))


def opaque(model: Any) -> Any:
    model[0].weight = Opaque(model[0].weight.detach())
    return model


def on_meta(model: Any) -> Any:
    return model.to("meta")


GUISES: dict[str, Any] = {"plain": lambda model: model, "packed": packed, "opaque": opaque, "on meta": on_meta}


def prints(make: Any, seed: int = 0, width: int = 4) -> Any:
    return fingerprint(make(plain(seed, width))[0], set())


@pytest.mark.parametrize("loaded", GUISES)
@pytest.mark.parametrize("made", GUISES)
def test_the_same_weights_are_known_in_every_guise(made, loaded):
    assert differs(prints(GUISES[made]), prints(GUISES[loaded])) is None


@pytest.mark.parametrize("loaded", GUISES)
@pytest.mark.parametrize("made", GUISES)
def test_another_shape_is_another_base_in_every_guise(made, loaded):
    found = differs(prints(GUISES[made]), prints(GUISES[loaded], width=6))
    assert found is not None
    assert found.startswith("has bias [6], in the file [4]")


@pytest.mark.parametrize("guise", ["plain", "packed"])
def test_other_values_are_another_base_where_values_can_be_compared(guise):
    assert differs(prints(GUISES[guise]), prints(GUISES[guise], seed=1)) == "has weights of other values"


@pytest.mark.parametrize(("made", "loaded"), [("plain", "packed"), ("packed", "opaque"), ("opaque", "plain")])
def test_other_values_cannot_be_told_across_packings(made, loaded):
    """The documented limit: of a weight that is packed on one side only the shape is known."""
    assert differs(prints(GUISES[made]), prints(GUISES[loaded], seed=1)) is None


@pytest.mark.parametrize("made", ["plain", "packed"])
@pytest.mark.parametrize("loaded", ["plain", "packed"])
def test_an_adapter_travels_between_a_base_and_its_packed_form(made, loaded, tmp_path):
    model = GUISES[made](plain())
    peftlib.inject(model, "0", LoRA, rank=2)
    moved(model)
    peftlib.save(model, tmp_path / "a")
    other = GUISES[loaded](plain())
    peftlib.load(other, tmp_path / "a")
    for mine, theirs in zip(peftlib.parameters(model), peftlib.parameters(other), strict=True):
        assert torch.equal(mine, theirs)


def test_one_changed_bit_of_a_sampled_weight_is_another_base():
    model = plain()
    before = fingerprint(model[0], set())
    with torch.no_grad():
        model[0].weight.view(torch.int32)[0, 0] ^= 1
    assert differs(before, fingerprint(model[0], set())) == "has weights of other values"


def test_what_is_replaced_or_beside_the_host_does_not_count():
    one, other = plain(), plain()
    with torch.no_grad():
        other[0].bias.add_(1)
    assert differs(fingerprint(one[0], {"bias"}), fingerprint(other[0], {"bias"})) is None
    assert differs(fingerprint(one[0], set()), fingerprint(other[0], set())) is not None


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_the_device_does_not_matter(device):
    assert differs(prints(GUISES["plain"]), fingerprint(plain()[0].to(device), set())) is None


def test_a_layout_does_not_matter():
    strided = plain()
    strided[0].weight = nn.Parameter(strided[0].weight.detach().T.contiguous().T)
    assert not strided[0].weight.is_contiguous()
    assert differs(prints(GUISES["plain"]), fingerprint(strided[0], set())) is None


@pytest.mark.parametrize("shape", [(), (1,), (63,), (64,), (65,), (3, 5, 7, 2)])
def test_every_shape_has_a_fingerprint(shape):
    class Holder(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full(shape, value))

    assert differs(fingerprint(Holder(1.0), set()), fingerprint(Holder(1.0), set())) is None
    assert differs(fingerprint(Holder(1.0), set()), fingerprint(Holder(2.0), set())) is not None


def test_an_empty_weight_has_a_fingerprint():
    module = nn.Module()
    module.weight = nn.Parameter(torch.empty(0, 4))
    assert differs(fingerprint(module, set()), fingerprint(copy.deepcopy(module), set())) is None


def test_a_sharded_base_is_known_by_its_shapes(tmp_path):
    """Whether the adapter's own parameters are whole, or shards too."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = chain(nn.Linear(4, 4), nn.Linear(4, 4))
        other = copy.deepcopy(model)
        peftlib.inject(model, "0", LoRA, rank=2)
        own = set(peftlib.parameters(model))
        fully_shard(model[0], mesh=init_device_mesh("cpu", (1,)), ignored_params=own)
        assert "hash" not in fingerprint(model[0], set())
        peftlib.save(model, tmp_path / "a")
        peftlib.load(other, tmp_path / "a")
        sharded = chain(nn.Linear(4, 4))
        peftlib.inject(sharded, "0", LoRA, rank=2)
        fully_shard(sharded[0], mesh=init_device_mesh("cpu", (1,)))
        peftlib.save(sharded, tmp_path / "b")
        peftlib.load(chain(nn.Linear(4, 4)), tmp_path / "b")
    finally:
        torch.distributed.destroy_process_group()


def test_a_merged_model_has_the_fingerprint_of_its_base():
    model = network()
    before = fingerprint(model.head, set())
    peftlib.inject(model, "head", LoRA, rank=2)
    moved(model)
    with peftlib.merged(model):
        assert fingerprint(model.head, set()) == before


def test_a_whole_layer_that_is_replaced_has_shapes_and_no_hash(tmp_path):
    model = network()
    peftlib.inject(model, "head", Full)
    peftlib.save(model, tmp_path / "a")
    assert "hash" not in peftlib.read_header(tmp_path / "a")["base"]["head"]
    peftlib.load(network(seed=1), tmp_path / "a")


def wide(out: int, inputs: int) -> nn.Linear:
    """A layer with all the values of its shape to read, and the memory of one."""
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(torch.randn(1, 1).bfloat16().expand(out, inputs), requires_grad=False)
    layer.in_features, layer.out_features = inputs, out
    return layer


def test_eight_billion_parameters_take_less_than_a_second():
    block = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
    layers = [wide(*shape) for shape in [*block * 32, (128256, 4096), (128256, 4096)]]
    count = sum(layer.weight.numel() for layer in layers)
    fingerprint(layers[0], set())
    start = time.perf_counter()
    for layer in layers:
        assert "hash" in fingerprint(layer, set())
    seconds = time.perf_counter() - start
    print(f"{count / 1e9:.2f} billion parameters in {len(layers)} hosts: {seconds * 1e3:.0f} ms")
    assert count > 8e9
    assert seconds < 1


def test_a_fingerprint_reads_a_few_values_of_each_weight_and_no_more(monkeypatch):
    seen: list[int] = []
    real = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: (seen.append(self.numel()), real(self))[1])
    fingerprint(nn.Linear(1000, 1000), set())
    assert seen == [64, 64]


def test_files_of_two_bases_differ_only_in_their_fingerprints(tmp_path):
    paths: list[Path] = [tmp_path / "a", tmp_path / "b"]
    for seed, path in enumerate(paths):
        model = network(seed=seed)
        torch.manual_seed(0)
        peftlib.inject(model, "head", LoRA, rank=2)
        peftlib.save(model, path)
    one, other = map(peftlib.read_header, paths)
    assert one.pop("base") != other.pop("base")
    assert one == other

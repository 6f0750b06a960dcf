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
from peftlib import AdapterError, Full, LoRA
from support.helpers import chain, linears, moved, network

pytestmark = pytest.mark.mutants


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


class Mark(peftlib.Adapter):
    """A kind that reads nothing of its host, so that any host will do."""

    def __init__(self, host: Any) -> None:
        super().__init__()
        self.mark = nn.Parameter(torch.zeros(1))

    def forward(self, host: Any, call: Any, *args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter"


def saved(model: Any, path: Path, kind: Any = Mark, **config: Any) -> dict[str, Any]:
    """The fingerprint that is written of the model's first child."""
    peftlib.inject(model, "0", kind, **config)
    peftlib.save(model, path)
    return peftlib.read_header(path)["base"]["0"]


def refusal(model: Any, path: Path) -> str:
    with pytest.raises(AdapterError) as error:
        peftlib.load(model, path)
    return str(error.value)


@pytest.mark.parametrize("loaded", GUISES)
@pytest.mark.parametrize("made", GUISES)
def test_the_same_weights_are_known_in_every_guise(made, loaded, path):
    saved(GUISES[made](plain()), path)
    peftlib.load(GUISES[loaded](plain()), path)


@pytest.mark.parametrize("loaded", GUISES)
@pytest.mark.parametrize("made", GUISES)
def test_another_shape_is_another_base_in_every_guise(made, loaded, path):
    saved(GUISES[made](plain()), path)
    message = refusal(GUISES[loaded](plain(width=6)), path)
    assert all(part in message for part in (" 0 ", "bias", "[6]", "[4]"))


@pytest.mark.parametrize("guise", ["plain", "packed"])
def test_other_values_are_another_base_where_values_can_be_compared(guise, path):
    saved(GUISES[guise](plain()), path)
    message = refusal(GUISES[guise](plain(seed=1)), path)
    assert " 0 " in message
    assert "values" in message


@pytest.mark.parametrize(("made", "loaded"), [("plain", "packed"), ("packed", "opaque"), ("opaque", "plain")])
def test_other_values_cannot_be_told_across_packings(made, loaded, path):
    """The documented limit: of a weight that is packed on one side only the shape is known."""
    saved(GUISES[made](plain()), path)
    peftlib.load(GUISES[loaded](plain(seed=1)), path)


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


def test_one_changed_bit_of_a_sampled_weight_is_another_base(path):
    saved(plain(), path)
    model = plain()
    with torch.no_grad():
        model[0].weight.view(torch.int32)[0, 0] ^= 1
    assert "values" in refusal(model, path)


def test_what_is_replaced_or_beside_the_host_does_not_count(path):
    def other() -> Any:
        model = plain()
        with torch.no_grad():
            model[0].bias.add_(1)
        return model

    saved(plain(), path, Full, params="bias")
    peftlib.load(other(), path)
    saved(plain(), path)
    assert "values" in refusal(other(), path)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_the_device_does_not_matter(device, path):
    saved(plain(), path)
    peftlib.load(plain().to(device), path)


def test_a_layout_does_not_matter(path):
    saved(plain(), path)
    strided = plain()
    strided[0].weight = nn.Parameter(strided[0].weight.detach().T.contiguous().T)
    assert not strided[0].weight.is_contiguous()
    peftlib.load(strided, path)


class Holder(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("shape", [(), (1,), (63,), (64,), (65,), (3, 5, 7, 2)])
def test_every_shape_has_a_fingerprint(shape, path):
    saved(chain(Holder(torch.full(shape, 1.0))), path)
    peftlib.load(chain(Holder(torch.full(shape, 1.0))), path)
    assert "values" in refusal(chain(Holder(torch.full(shape, 2.0))), path)


def test_an_empty_weight_has_a_fingerprint(path):
    saved(chain(Holder(torch.empty(0, 4))), path)
    peftlib.load(chain(Holder(torch.empty(0, 4))), path)


def test_a_sharded_base_is_known_by_its_values_where_all_processes_save(tmp_path):
    """Where the adapter is in shards too; one that is whole may be saved by one process, which cannot gather."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = chain(nn.Linear(4, 4), nn.Linear(4, 4))
        other = copy.deepcopy(model)
        peftlib.inject(model, "0", LoRA, rank=2)
        own = set(peftlib.parameters(model))
        fully_shard(model[0], mesh=init_device_mesh("cpu", (1,)), ignored_params=own)
        peftlib.save(model, tmp_path / "a")
        assert "hash" not in peftlib.read_header(tmp_path / "a")["base"]["0"]
        peftlib.load(other, tmp_path / "a")
        sharded = chain(nn.Linear(4, 4))
        same = copy.deepcopy(sharded)
        peftlib.inject(sharded, "0", LoRA, rank=2)
        fully_shard(sharded[0], mesh=init_device_mesh("cpu", (1,)))
        peftlib.save(sharded, tmp_path / "b")
        peftlib.load(same, tmp_path / "b")
        assert "values" in refusal(chain(nn.Linear(4, 4)), tmp_path / "b")
    finally:
        torch.distributed.destroy_process_group()


def test_a_merged_model_has_the_fingerprint_of_its_base(path):
    model = network()
    peftlib.inject(model, "head", LoRA, rank=2)
    moved(model)
    peftlib.save(model, path)
    before = peftlib.read_header(path)["base"]
    with peftlib.merged(model):
        peftlib.save(model, path)
    assert peftlib.read_header(path)["base"] == before


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


def test_the_fingerprints_of_eight_billion_parameters_take_less_than_a_second(path):
    block = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
    model = chain(*(wide(*shape) for shape in [*block * 32, (128256, 4096), (128256, 4096)]))
    count = sum(layer.weight.numel() for layer in model)
    peftlib.inject(model, nn.Linear, Mark)
    peftlib.save(model, path)
    assert all("hash" in base for base in peftlib.read_header(path)["base"].values())
    peftlib.eject(model)
    start = time.process_time()
    peftlib.load(model, path)
    seconds = time.process_time() - start
    print(f"{count / 1e9:.2f} billion parameters in {len(model)} hosts: {seconds * 1e3:.0f} ms")
    assert count > 8e9
    assert seconds < 1


def test_a_fingerprint_reads_a_few_values_of_each_weight_and_no_more(monkeypatch, path):
    model = chain(nn.Linear(1000, 1000))
    peftlib.inject(model, "0", Mark)
    seen: list[int] = []
    real = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: (seen.append(self.numel()), real(self))[1])
    peftlib.save(model, path)
    assert sorted(seen) == [1, 64 + 64], "the mark, and a sample of each weight, together"


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

"""torchvision and timm with every kind: convolutions, batch norm, and two forms of attention."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlib
from support.ecosystem import COLUMNS, feature, not_applicable
from support.hosts import without_fast_path

torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning"),
]


@dataclass(frozen=True)
class Picture:
    """A model of pictures, and where each kind goes in it; `width`: of what a block returns, where it does not say."""

    make: Callable[[], nn.Module]
    blocks: Any
    attention: Any = None
    width: dict[str, int] = field(default_factory=dict)
    size: int = 32

    def model(self) -> Any:
        """In float64, and in eval mode: a batch norm in training mode computes, and moves, statistics of its own. Here
        they are those of the pictures, as after pretraining: without them the signal fades in a deep network."""
        torch.manual_seed(1)
        made = self.make().double().train()
        norms = [module for module in made.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            made(self.pictures())
        return made.eval()

    def pictures(self) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        return torch.randn(4, 3, self.size, self.size, dtype=torch.float64, generator=generator)


def small_convnext() -> nn.Module:
    block = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([block(16, 32, 1), block(32, None, 1)], num_classes=5)


def small_transformer() -> nn.Module:
    """Its head starts as zero, behind which nothing learns."""
    made = torchvision.models.VisionTransformer(16, 4, 2, 4, hidden_dim=32, mlp_dim=48, num_classes=5)
    nn.init.normal_(made.heads.head.weight, std=0.2)
    return made


def of_timm(name: str, **config: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **config)


CONVOLUTIONS = {
    "ResNet": Picture(lambda: torchvision.models.resnet18(num_classes=5), ["layer?.0.conv?"]),
    "ConvNeXt": Picture(small_convnext, nn.Conv2d),
    "EfficientNet": Picture(
        lambda: torchvision.models.efficientnet_b0(num_classes=5), ["features.[56].*.block.0.0"], size=64
    ),
}
CONVOLUTIONS_OF_TIMM = {
    "ResNet": Picture(of_timm("resnet10t", zero_init_last=False), ["layer?.0.conv?"]),
    "ConvNeXt": Picture(of_timm("convnext_atto"), ["stages.?.blocks.0.conv_dw"]),
    "EfficientNet": Picture(of_timm("efficientnet_lite0"), ["blocks.?.0.conv_pw"]),
}
TRANSFORMERS = {"ViT": Picture(small_transformer, "mlp", "self_attention", {"dim": 32}, size=16)}
TRANSFORMERS_OF_TIMM = {
    "ViT": Picture(of_timm("vit_tiny_patch16_224", img_size=32, depth=2), "mlp", "attn", {"dim": 192}),
}


def types_in(model: nn.Module, *types: type[nn.Module]) -> list[type[nn.Module]]:
    return [each for each in types if any(isinstance(module, each) for module in model.modules())]


def put(model: Any, kind: type[peftlib.Adapter], picture: Picture) -> Any:
    torch.manual_seed(3)
    weights = types_in(model, nn.Conv2d, nn.Linear)
    if kind is peftlib.Full:
        peftlib.inject(model, types_in(model, nn.BatchNorm2d, nn.LayerNorm), kind)
    elif kind is peftlib.Prefix:
        peftlib.inject(model, picture.attention, kind, length=2)
    elif kind is peftlib.Bottleneck:
        peftlib.inject(model, picture.blocks, kind, width=2, **picture.width)
    elif kind is peftlib.IA3:
        read = [name for name, _ in model.named_modules() if name.endswith("out_proj")]  # without being called
        peftlib.inject(model, weights, kind, exclude=read)
    else:
        peftlib.inject(model, weights, kind, rank=2)
    return model


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items() if ".adapters." not in f".{key}"}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return all(torch.equal(now[key], tensor) for key, tensor in before.items())


def trained(model: nn.Module, pictures: Tensor) -> list[float]:
    labels, losses = torch.tensor([0, 1, 2, 3]), []
    optimizer = torch.optim.AdamW(peftlib.parameters(model), lr=1e-4, weight_decay=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(pictures), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check(picture: Picture, kind: type[peftlib.Adapter], folder: Path, record: Any) -> None:
    if kind is peftlib.Prompt:
        not_applicable(record, "a picture has no tokens to stand in front of")
        return
    if kind is peftlib.Prefix and picture.attention is None:
        not_applicable(record, "there is no attention in a convolutional network")
        return
    with without_fast_path():  # torch's attention takes it in eval mode without adapters, and rounds otherwise there
        check_laws(picture, kind, folder)


def check_laws(picture: Picture, kind: type[peftlib.Adapter], folder: Path) -> None:
    base, model, pictures = picture.model().requires_grad_(False), picture.model(), picture.pictures()
    expected, before = base(pictures), copied(base)
    put(model, kind, picture)
    if kind is not peftlib.Prefix:  # without a gate it is there from the start
        assert torch.equal(model(pictures), expected)
    losses = trained(model, pictures)
    assert losses[-1] < losses[0]
    assert unchanged(model, before)
    peftlib.save(model, folder / "adapter.safetensors")
    peftlib.load(fresh := picture.model(), folder / "adapter.safetensors")
    with torch.no_grad():
        live = model(pictures)
        assert torch.equal(fresh(pictures), live)
        assert not torch.equal(live, expected)
        check_merge(model, kind, pictures, live)
        assert unchanged(model, before)
        peftlib.eject(model)
        assert torch.equal(model(pictures), expected)
    assert list(model.state_dict()) == list(base.state_dict())


def check_merge(model: Any, kind: Any, pictures: Tensor, live: Tensor) -> None:
    """1e-10 of the largest value is some 1e5 roundings of float64."""
    if kind in (peftlib.Bottleneck, peftlib.Prefix):
        with pytest.raises(peftlib.AdapterError, match=kind.__name__):
            peftlib.merge(model)
        return
    with peftlib.merged(model):
        assert (model(pictures) - live).abs().max() <= 1e-10 * live.abs().max()


every_kind = pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.name)


@feature("torchvision: ResNet, ConvNeXt, EfficientNet")
@pytest.mark.parametrize("picture", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@every_kind
def test_convolutional_networks_of_torchvision(column, picture, tmp_path, record_property):
    check(picture, column.kind, tmp_path, record_property)


@feature("torchvision: ViT, on nn.MultiheadAttention")
@pytest.mark.parametrize("picture", TRANSFORMERS.values(), ids=TRANSFORMERS)
@every_kind
def test_transformers_of_torchvision(column, picture, tmp_path, record_property):
    check(picture, column.kind, tmp_path, record_property)


@feature("timm: ResNet, ConvNeXt, EfficientNet")
@pytest.mark.parametrize("picture", CONVOLUTIONS_OF_TIMM.values(), ids=CONVOLUTIONS_OF_TIMM)
@every_kind
def test_convolutional_networks_of_timm(column, picture, tmp_path, record_property):
    check(picture, column.kind, tmp_path, record_property)


@feature("timm: ViT")
@pytest.mark.parametrize("picture", TRANSFORMERS_OF_TIMM.values(), ids=TRANSFORMERS_OF_TIMM)
@every_kind
def test_transformers_of_timm(column, picture, tmp_path, record_property):
    check(picture, column.kind, tmp_path, record_property)


def test_a_batch_norm_in_training_mode_moves_its_statistics_as_without_adapters():
    """They are the base's own buffers: keep it in eval mode while adapters train, and the base stays as it is."""
    picture = CONVOLUTIONS["ResNet"]
    base, model = picture.model(), put(picture.model(), peftlib.LoRA, picture)
    for one in (base, model):
        one.train()(picture.pictures())
    assert unchanged(model, copied(base))
    assert not unchanged(model, copied(picture.model()))

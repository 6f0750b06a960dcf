"""What others ask of a module stays true of an adapted one: its name, and a container's length, items and slices."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlib
from peftlib import Bottleneck, Full, LoRA


class Skipping(nn.Sequential):
    """Reads itself as a list: all but the last item, then the last one."""

    def forward(self, input: Tensor) -> Tensor:
        for module in self[:-1]:
            input = module(input)
        return self[-1](input) * len(self)


class Dense(nn.ModuleDict):
    """Each item sees all that came before, as in DenseNet."""

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for _, layer in self.items():
            found.append(layer(torch.stack(found).sum(0)))
        assert list(self) == list(self.keys())
        return torch.cat(found, -1)


class Listed(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        for at in range(len(self)):
            x = self[at](x)
        return x


def layers(count: int = 3) -> list[nn.Module]:
    return [nn.Linear(4, 4) for _ in range(count)]


MAKERS: dict[str, Any] = {
    "sequential": lambda: nn.Sequential(*layers()),
    "skipping": lambda: Skipping(*layers()),
    "dense": lambda: Dense({f"layer{at}": layer for at, layer in enumerate(layers())}),
    "listed": lambda: Listed(layers()),
}
each_container = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def root(name: str, module: nn.Module) -> bool:
    return name == ""


def same_items(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


@each_container
@pytest.mark.parametrize("kind", [Full, Bottleneck])
def test_an_adapted_container_computes_what_it_did(make, kind):
    model = make()
    expected, items, size = model(X), list(model), len(model)
    more = {"dim": expected.shape[-1]} if kind is Bottleneck else {}
    peftlib.inject(model, root, kind, **more)
    assert torch.equal(model(X), expected)
    assert len(model) == size
    assert list(model) == items
    with peftlib.activate(model):
        assert torch.equal(model(X), expected)
    peftlib.eject(model)
    assert torch.equal(model(X), expected)
    assert list(model) == items


@pytest.mark.parametrize("make", [MAKERS["sequential"], MAKERS["listed"]], ids=["sequential", "list"])
def test_a_list_of_modules_is_sliced_appended_and_shortened_as_before(make):
    model = make()
    first, second, third = model
    peftlib.inject(model, root, Full)
    assert model[0] is first
    assert model[-1] is third
    assert same_items(model[1:], [second, third])
    assert type(model[1:]) is type(make())
    assert first in list(model)
    extra = nn.Linear(4, 4)
    assert model.append(extra) is model
    assert same_items(model, [first, second, third, extra])
    model[0] = extra
    assert model[0] is extra
    del model[1]
    assert same_items(model, [extra, third, extra])
    model.extend([first])
    model.insert(0, second)
    assert same_items(model, [second, extra, third, extra, first])
    assert [name for name, _, _ in peftlib.adapters(model)] == [""]


def test_a_dict_of_modules_has_its_own_keys():
    model = MAKERS["dense"]()
    names = ["layer0", "layer1", "layer2"]
    items = list(model.values())
    peftlib.inject(model, root, Full)
    assert list(model.keys()) == list(model) == names
    assert same_items(list(model.values()), items)
    assert [name for name, _ in model.items()] == names
    assert "adapters" not in model
    assert "layer1" in model
    assert model.pop("layer1") is items[1]
    model["more"] = items[1]
    model.update({"last": items[0]})
    assert list(model) == ["layer0", "layer2", "more", "last"]
    assert len(model) == 4
    assert len(list(peftlib.adapters(model))) == 1


def test_an_adapted_container_compiles_as_one_graph():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    peftlib.inject(model, root, Bottleneck, dim=4)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(X), model(X))


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), MAKERS["dense"], lambda: nn.LayerNorm(4)])
def test_an_adapted_class_has_the_name_of_its_host(make):
    model, plain = make(), make()
    peftlib.inject(model, root, Full)
    assert type(model) is not type(plain)
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(model), name) == getattr(type(plain), name)
    assert model._get_name() == plain._get_name()


def test_two_hosts_of_one_type_share_a_class_and_another_type_has_its_own():
    model = nn.Sequential(*layers(2), nn.LayerNorm(4))
    peftlib.inject(model, nn.Linear, LoRA, rank=2)
    peftlib.inject(model, nn.LayerNorm, Full)
    assert type(model[0]) is type(model[1])
    assert type(model[0]) is not type(model[2])

"""HF peft's files and children that a parent calls in one case and reads in another, as fused mixers do."""

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import peftlib
from peftlib import AdapterError, hf
from support.helpers import changes, snapshot


class Mixer(nn.Module):
    """Calls its children, or, with `fused`, reads their weights; one it only ever reads."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = False
        self.linear = nn.Linear(6, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.table = nn.Embedding(9, 6)
        self.gate = nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        x = (self.table.weight[tokens] if self.fused else self.table(tokens)) * torch.sigmoid(self.gate.weight[0])
        if self.fused:
            y = F.conv1d(x.mT, self.conv.weight, self.conv.bias, padding=1)
            return F.linear(y.mT, self.linear.weight, self.linear.bias)
        return self.linear(self.conv(x.mT).mT)


def net() -> Any:
    torch.manual_seed(0)
    return nn.ModuleDict({"mixer": Mixer()}).double()


def run(model: Any, fused: bool) -> Tensor:
    mixer = model["mixer"]
    mixer.fused = fused
    return mixer(torch.arange(8).view(2, 4))


@pytest.mark.parametrize("target", ["linear", "conv", "table"])
def test_pairs_of_peft_act_where_the_child_is_called_and_where_it_is_read(target, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
        theirs.save_pretrained(str(tmp_path / "theirs"))
    model = net()
    base = run(model, False)
    hf.load(model, tmp_path / "theirs")
    expected = run(theirs.base_model.model, False)
    assert (expected - base).abs().max() > 1e-3
    for fused in (False, True):
        assert (run(model, fused) - expected).abs().max() <= 1e-6
    hf.save(model, tmp_path / "ours")
    written, read = (load_file(tmp_path / which / "adapter_model.safetensors") for which in ("ours", "theirs"))
    assert written.keys() == read.keys()
    assert all(torch.equal(written[key], read[key]) for key in read)


def test_a_pair_that_peft_would_leave_without_effect_is_neither_loaded_nor_saved(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["gate"])).save_pretrained(str(tmp_path / "in"))
    model = net()
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"mixer\.gate"):
        hf.load(model, tmp_path / "in")
    assert not changes(before, model)
    peftlib.inject(model, "gate", peftlib.LoRA, rank=2)
    with pytest.raises(AdapterError, match=r"mixer\.gate"):
        hf.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_copies_of_such_a_child_are_saved_whole(tmp_path):
    model = net()
    fresh = copy.deepcopy(model)
    peftlib.inject(model, "linear", peftlib.LoRA, rank=2)
    peftlib.inject(model, "gate", peftlib.Full)
    with torch.no_grad():
        for parameter in peftlib.parameters(model):
            parameter.add_(1)
    hf.save(model, tmp_path / "ours")
    hf.load(fresh, tmp_path / "ours")
    for fused in (False, True):
        assert torch.equal(run(fresh, fused), run(model, fused))

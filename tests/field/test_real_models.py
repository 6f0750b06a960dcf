"""Models that people have, each type of adapter in all of its places: trained, saved, opened elsewhere, taken out."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import placing
import pytest
import reopened
import torch
from subject import Subject, changes, projected, state

import peftlib

FAST = ["shelf/resnet"]
LANGUAGE = ["hf/gpt2", "hf/bert", "hf/t5", "hf/whisper", "hf/clip", "hf/mamba2", "hf/qwen3_moe"]
VISION = [
    "timm/resnet18", "timm/convnext_tiny", "timm/efficientnet_b0", "timm/swin_tiny_patch4_window7_224",
    "timm/vit_tiny_patch16_224",
]  # fmt: skip
EVERYWHERE = {"LoRA", "DoRA", "IA3", "Bottleneck", "Full"}
ATTENTIVE = {"hf/gpt2", "hf/bert", "hf/t5", "hf/whisper", "hf/clip", "hf/qwen3_moe", "timm/vit_tiny_patch16_224"}
FROM_TOKENS = {"hf/gpt2", "hf/bert", "hf/mamba2", "hf/qwen3_moe"}

pytestmark = pytest.mark.filterwarnings("ignore")  # of the models


def train(subject: Subject, model: Any) -> None:
    """Five steps in train mode, weight decay included."""
    optimizer = torch.optim.AdamW(peftlib.parameters(model), lr=0.01, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        projected([tensor for tensor in subject.run(model) if tensor.requires_grad]).backward()
        optimizer.step()


def trained_and_ejected(subject: Subject, kind: placing.Kind, folder: Path) -> bool:
    """Whether the model has a place for this type; its file, and what the model gives, then lie in the folder."""
    case = placing.Case(subject, kind)
    case.settle()
    if not case.hosts:
        return False
    base, model = subject.fresh(train=True), case.injected(train=True)
    untrained = reopened.outputs(subject, model)
    train(subject, model.train())
    given = reopened.outputs(subject, model)
    assert any(not torch.equal(*pair) for pair in zip(untrained["eval"], given["eval"], strict=True)), "nothing trained"
    peftlib.save(model, folder / f"{kind.name}.safetensors")
    torch.save(given, folder / f"{kind.name}.pt")
    peftlib.eject(model)
    assert changes(state(base), state(model.train())) == []
    return True


def opened_elsewhere(name: str, folder: Path) -> str:
    """What differs in a new process."""
    command = [sys.executable, reopened.__file__, name, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def held(name: str, folder: Path) -> None:
    subject = Subject(families.build(name))
    placed = {kind.name for kind in placing.KINDS if trained_and_ejected(subject, kind, folder)}
    expected = {*EVERYWHERE, *(["Prefix"] if name in ATTENTIVE else []), *(["Prompt"] if name in FROM_TOKENS else [])}
    assert placed == expected
    assert opened_elsewhere(name, folder) == ""


@pytest.mark.parametrize("name", FAST)
def test_what_was_trained_opens_in_a_new_process_to_the_bit_and_the_base_comes_back(name, tmp_path):
    held(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", LANGUAGE)
def test_a_model_of_transformers_trains_opens_elsewhere_to_the_bit_and_comes_back(name, tmp_path):
    held(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", VISION)
def test_a_model_of_timm_trains_opens_elsewhere_to_the_bit_and_comes_back(name, tmp_path):
    pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))  # torchvision is built beside one torch alone
    held(name, tmp_path)

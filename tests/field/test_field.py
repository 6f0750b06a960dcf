"""A sample of the sweep: five nets of the shelf in the suite, thirty architectures of transformers in the slow one."""

from typing import Any

import families
import laws
import placing
import pytest
import recipes
import run
import subject
import table
import torch
from torch import Tensor, nn
from transformers import ClvpConfig

import peftlib

NETS = ["u-net", "sliced", "shared", "resnet", "in-place"]
ARCHITECTURES = [
    "llama", "qwen3_moe", "gemma3_text", "mixtral", "gpt2", "gpt_neox", "falcon", "bloom", "opt", "phi3", "mamba",
    "mamba2", "bert", "roberta", "deberta-v2", "albert", "distilbert", "modernbert", "t5", "bart", "m2m_100", "vit",
    "swin", "convnext", "resnet", "segformer", "clip", "whisper", "wav2vec2", "mobilenet_v2",
]  # fmt: skip


def held(name: str) -> None:
    """With two of those that are alike: adapters behind one another, and experts beside one another."""
    found = [*run.checked(name, alike=2)]
    assert not [record["unbuilt"] for record in found if "unbuilt" in record]
    assert not {record["kind"]: wrong for record in found if (wrong := table.wrong_laws(record))}


@pytest.mark.filterwarnings("ignore")  # of the models
@pytest.mark.parametrize("net", NETS)
def test_every_law_holds_on_a_net_of_the_shelf(net):
    held(f"shelf/{net}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_law_holds_on_an_architecture_of_transformers(kind):
    held(f"hf/{kind}")


@pytest.mark.parametrize("recipe", recipes.RECIPES, ids=lambda recipe: recipe.name)
def test_a_tiny_configuration_names_no_token_beyond_its_vocabulary(recipe):
    """CLVP's decoder puts these codes into what it gives, once it has given the end of a sequence."""
    config = recipes.tiny(ClvpConfig, recipe).decoder_config
    assert max(*config.decoder_fixing_codes, config.bos_token_id, config.eos_token_id) < config.vocab_size


def test_a_model_whose_configuration_leaves_sizes_out_is_built():
    assert families.build("hf/ministral").recipe.startswith("nothing left out")


class FieldFaulty(peftlib.Adapter):
    """Adds a vector to what a linear gives, and has one fault, or none."""

    def __init__(self, host: Any, fault: str = "") -> None:
        super().__init__()
        self.fault, self.unsaved = fault, torch.rand(())
        self.offset = nn.Parameter(torch.zeros(host.out_features))

    def forward(self, host: Any, call: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fault == "moves the base" and self.training:
            host.weight.data.mul_(1.01)
        if self.fault == "leaves a mark":
            host.mark = True
        if self.fault == "never runs":
            return call(*args, **kwargs)
        return call(*args, **kwargs) + self.shift() + (self.fault == "starts elsewhere")

    def shift(self) -> Tensor:
        return self.offset * (1 + self.unsaved if self.fault == "forgets" else 1)

    def fold(self, host: Any) -> dict[str, Tensor]:
        return {"bias": host.bias + self.shift() * (2 if self.fault == "merges otherwise" else 1)}


FAULTS = {
    "": set(),
    "starts elsewhere": {laws.unchanged_at_the_start, laws.merged_equals_unmerged},
    "merges otherwise": {laws.merged_equals_unmerged},
    "never runs": {laws.merged_equals_unmerged},
    "forgets": {laws.saved_and_loaded_is_equal},
    "leaves a mark": {laws.trained_and_ejected_is_the_base},
    "moves the base": {laws.unchanged_at_the_start, laws.trained_and_ejected_is_the_base},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_kind_breaks_the_laws_that_are_there_for_it(fault):
    kind = placing.Kind("faulty", FieldFaulty, placing.matrices, {"fault": fault})
    case = placing.Case(subject.Subject(families.build("shelf/sliced")), kind)
    case.settle()
    assert {law for law in laws.LAWS if run.verdict(law, case).startswith("wrong")} == FAULTS[fault]


@pytest.mark.slow
def test_a_second_run_keeps_what_the_first_found_and_a_limit_that_struck_is_told(tmp_path):
    cache = tmp_path / "0.jsonl"
    run.sweep(["shelf/sliced"], cache, seconds=100, gigabytes=64.0)
    first = cache.read_text()
    run.sweep(["shelf/sliced", "shelf/u-net"], cache, seconds=100, gigabytes=0.01)
    assert cache.read_text().startswith(first)
    assert {record["name"] for record in table.records(tmp_path) if "unbuilt" in record} == {"shelf/u-net"}

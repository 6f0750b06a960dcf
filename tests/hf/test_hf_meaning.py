"""What a configuration of HF peft means beyond its pairs: the task's head, tied weights, rows of tokens, versions."""

import copy
import json
from collections.abc import Callable
from typing import Any, ClassVar

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftlib
from peftlib import AdapterError, hf
from support import helpers
from support.peft_models import assert_same, quiet, shifted

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                         "num_attention_heads": 4}  # fmt: skip


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make().eval()


def llama(tied: bool = False) -> Any:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=tied)
    return seeded(lambda: transformers.LlamaForCausalLM(config))


def tied() -> Any:
    return llama(tied=True)


def classifier() -> Any:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0)
    return seeded(lambda: transformers.LlamaForSequenceClassification(config))


def bert(kind: str) -> Callable[[], Any]:
    make = getattr(transformers, f"BertFor{kind}")
    return lambda: seeded(lambda: make(transformers.BertConfig(**SIZES)))


def tokens() -> Tensor:
    torch.manual_seed(1)
    return torch.randint(1, 50, (2, 7))


def parts(model: Any) -> list[Any]:
    return [part for _, _, part in peftlib.adapters(model)]


SEEN = int(tokens()[0, 0])


def output(model: Any) -> Tensor:
    found = model(tokens())
    return torch.cat([found[key].flatten(1) for key in ("logits", "start_logits", "end_logits") if key in found], 1)


def lora(**config: Any) -> Any:
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **config}
    )


def of_task(task: str, *targets: str, **config: Any) -> Any:
    return lora(task_type=task, target_modules=list(targets), **config)


ROWS: dict[str, tuple[Callable[[], Any], Any]] = {
    "a classifier's head": (bert("SequenceClassification"), of_task("SEQ_CLS", "query", "value")),
    "a head of another name": (classifier, of_task("SEQ_CLS", "q_proj")),
    "a head for tokens": (bert("TokenClassification"), of_task("TOKEN_CLS", "query")),
    "a head for answers": (bert("QuestionAnswering"), of_task("QUESTION_ANS", "query")),
    "a head that is a target too": (bert("SequenceClassification"), of_task("SEQ_CLS", "query", "classifier")),
    "a head beside others": (bert("SequenceClassification"), of_task("SEQ_CLS", "key", modules_to_save=["pooler"])),
    "all that is linear but the head": (classifier, lora(task_type="SEQ_CLS", target_modules="all-linear")),
    "(IA)³ and a head": (
        bert("SequenceClassification"),
        peft.IA3Config(task_type="SEQ_CLS", target_modules=["query"], feedforward_modules=[]),
    ),
    "a target that is kept whole": (llama, lora(target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"])),
    "rows of tied embeddings": (tied, lora(trainable_token_indices=[1, 3])),
    "rows named twice": (tied, lora(trainable_token_indices={"lm_head": [1, 3], "embed_tokens": [1, 3]})),
    "rows that differ": (tied, lora(trainable_token_indices={"lm_head": [1, 3], "embed_tokens": [1, 2]})),
    "rows of an untied head": (llama, lora(trainable_token_indices={"lm_head": [1, 3], "embed_tokens": [2]})),
    "rows alone": (llama, peft.TrainableTokensConfig(token_indices=[SEEN, 3], task_type="CAUSAL_LM")),
    "rows alone, of tied embeddings": (tied, peft.TrainableTokensConfig(token_indices=[1, 3], task_type="CAUSAL_LM")),
    "rows alone, of both": (
        llama,
        peft.TrainableTokensConfig(token_indices=[4], target_modules=["embed_tokens", "lm_head"]),
    ),
    "tied rows, ensured": (tied, lora(trainable_token_indices=[1, 3], ensure_weight_tying=True)),
    "tied weights, ensured": (tied, lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "tied weights, ensured by the head": (tied, lora(modules_to_save=["lm_head"], ensure_weight_tying=True)),
    "tied weights, both apart": (tied, lora(modules_to_save=["embed_tokens", "lm_head"])),
    "biases where there are none": (llama, lora(lora_bias=True)),
    "biases, scaled by the root": (llama, lora(lora_bias=True, use_rslora=True)),
    "biases, some of the layers' own": (
        bert("SequenceClassification"),
        lora(task_type="SEQ_CLS", target_modules=["query"], lora_bias=True),
    ),
    "a tie where nothing is tied": (llama, lora(modules_to_save=["lm_head"], ensure_weight_tying=True)),
}
every_row = pytest.mark.parametrize(("make", "config"), ROWS.values(), ids=ROWS)


def saved(make: Callable[[], Any], config: Any, folder: Any) -> Any:
    """peft's model, moved as training would; its files are in the folder."""
    with quiet():
        model = peft.get_peft_model(make(), copy.deepcopy(config))
        shifted(parameter for parameter in model.parameters() if parameter.requires_grad)
        model.eval().save_pretrained(str(folder))
    return model


def read_by_peft(make: Callable[[], Any], folder: Any) -> Any:
    with quiet():
        return peft.PeftModel.from_pretrained(make(), str(folder)).eval()


@every_row
def test_what_peft_saves_means_the_same_here_and_goes_back(make, config, tmp_path):
    expected, model = output(saved(make, config, tmp_path / "theirs")), make()
    assert (output(make()) - expected).abs().max() > 1e-3
    hf.load(model, tmp_path / "theirs")
    assert_same(output(model), expected)
    hf.save(model, tmp_path / "ours")
    assert_same(output(read_by_peft(make, tmp_path / "ours")), expected)


@every_row
def test_a_configuration_trains_what_peft_would_train(make, config, tmp_path):
    theirs, model = saved(make, config, tmp_path / "theirs"), make()
    hf.inject(model, copy.deepcopy(config))
    assert_same(output(model), output(make()))
    trained = sum(parameter.numel() for parameter in theirs.parameters() if parameter.requires_grad)
    assert sum(parameter.numel() for parameter in peftlib.parameters(model)) == trained
    helpers.moved(model)
    hf.save(model, tmp_path / "ours")
    assert_same(output(read_by_peft(make, tmp_path / "ours")), output(model))


@pytest.mark.parametrize("name", ["rows of tied embeddings", "tied weights, ensured", "rows alone, of tied embeddings"])
def test_what_is_tied_stays_one_parameter_through_training(name, tmp_path):
    make, config = ROWS[name]
    saved(make, config, tmp_path / "theirs")
    fresh, loaded = make(), make()
    hf.inject(fresh, copy.deepcopy(config))
    hf.load(loaded, tmp_path / "theirs")
    for model in (fresh, loaded):
        optimizer = torch.optim.SGD(peftlib.parameters(model), lr=0.1)
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        full = [part.own.weight for part in parts(model) if isinstance(part, peftlib.Full)]
        assert len(full) == 2
        assert full[0] is full[1]
    theirs = read_by_peft(make, tmp_path / "theirs")
    for parameter_name, parameter in theirs.named_parameters():
        kinds = ("lora_", "trainable_tokens_delta", "modules_to_save")
        parameter.requires_grad_(any(kind in parameter_name for kind in kinds))
    optimizer = torch.optim.SGD((p for p in theirs.parameters() if p.requires_grad), lr=0.1)
    theirs(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    assert_same(output(loaded), output(theirs))


def test_a_head_that_was_not_trained_is_written_for_the_task(tmp_path):
    """Without it, peft cannot read the file."""
    make = bert("SequenceClassification")
    model = make()
    peftlib.inject(model, "query", peftlib.LoRA, rank=2)
    helpers.moved(model)
    hf.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    assert_same(output(read_by_peft(make, tmp_path)), output(model))
    written = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert torch.equal(written, make().classifier.weight)


def test_a_pair_on_the_head_is_no_whole_head(tmp_path):
    make = bert("SequenceClassification")
    model = make()
    peftlib.inject(model, ["query", "classifier"], peftlib.LoRA, rank=2)
    helpers.moved(model)
    with pytest.raises(AdapterError, match="classifier"):
        hf.save(model, tmp_path, task_type="SEQ_CLS")
    hf.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] is None
    assert_same(output(read_by_peft(make, tmp_path)), output(model))


TASKS: dict[str, Callable[[], Any]] = {
    "CAUSAL_LM": llama,
    "SEQ_CLS": bert("SequenceClassification"),
    "TOKEN_CLS": bert("TokenClassification"),
    "QUESTION_ANS": bert("QuestionAnswering"),
}


@pytest.mark.parametrize(("task", "make"), TASKS.items(), ids=TASKS)
def test_the_task_is_what_the_class_of_the_model_says(task, make, tmp_path):
    model = make()
    peftlib.inject(model, ["q_proj", "query"][task != "CAUSAL_LM"], peftlib.LoRA, rank=2)
    hf.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == task
    assert read_by_peft(make, tmp_path).active_peft_config.task_type == task


REFUSED: dict[str, tuple[Callable[[], Any], Any, str]] = {
    "a pair that is tied": (tied, lora(target_modules=["embed_tokens"], ensure_weight_tying=True), "lm_head"),
    "rows of a head with a bias": (
        bert("TokenClassification"), lora(target_modules=["query"], trainable_token_indices={"classifier": [1]}),
        "classifier"),
    "rows and a pair on one layer": (
        llama, lora(target_modules=["embed_tokens"], trainable_token_indices=[1]), "embed_tokens"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "config", "named"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_meant_here_is_not_dropped_in_silence(make, config, named):
    model = make()
    before = helpers.snapshot(model)
    with pytest.raises(AdapterError, match=named):
        hf.inject(model, config)
    assert helpers.changes(before, model) == []


def test_a_bias_of_its_own_has_no_weight_to_be_merged_into(tmp_path):
    """In peft too. What is saved here comes back."""
    config = lora(lora_bias=True)
    with quiet(), pytest.raises(RuntimeError):
        peft.get_peft_model(llama(), copy.deepcopy(config)).merge_and_unload()
    model, again = llama(), llama()
    hf.inject(model, config)
    helpers.moved(model)
    with pytest.raises(AdapterError, match="OutputBias"):
        peftlib.merge(model)
    peftlib.save(model, tmp_path / "adapter.safetensors")
    peftlib.load(again, tmp_path / "adapter.safetensors")
    assert torch.equal(output(again), output(model))


def test_a_layer_that_is_adapted_and_kept_whole_is_refused_as_peft_refuses_it():
    config = lora(target_modules=["classifier"], modules_to_save=["ssifier"], task_type=None)
    with quiet(), pytest.raises(TypeError):
        peft.get_peft_model(bert("TokenClassification")(), copy.deepcopy(config))
    model = bert("TokenClassification")()
    with pytest.raises(AdapterError, match="classifier"):
        hf.inject(model, config)


def test_a_tied_pair_of_peft_is_read_as_one_for_each_layer(tmp_path):
    config = lora(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    expected, model = output(saved(tied, config, tmp_path / "theirs")), tied()
    hf.load(model, tmp_path / "theirs")
    assert_same(output(model), expected)
    hf.save(model, tmp_path / "ours")
    assert_same(output(read_by_peft(tied, tmp_path / "ours")), expected)


PROMPTS: dict[str, Any] = {
    "prompt tuning": peft.PromptTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=4),
    "p-tuning": peft.PromptEncoderConfig(task_type="TOKEN_CLS", num_virtual_tokens=4, encoder_hidden_size=8),
}


@pytest.mark.parametrize("config", PROMPTS.values(), ids=PROMPTS)
def test_a_prompt_has_the_head_of_its_task_beside_it(config, tmp_path):
    """peft gives the outputs at the prompt too."""
    make = bert("TokenClassification")
    expected, model = saved(make, config, tmp_path / "theirs")(tokens()).logits[:, 4:], make()
    assert hf.load(model, tmp_path / "theirs") == ["", "classifier"]
    assert_same(model(tokens()).logits, expected)
    hf.save(model, tmp_path / "ours")
    assert_same(read_by_peft(make, tmp_path / "ours")(tokens()).logits[:, 4:], expected)


# A stack of experts, whose sides changed places between versions of peft.


class Experts(nn.Module):
    def __init__(self, transposed: bool, name: str, *shape: int) -> None:
        super().__init__()
        self.is_transposed, self.name = transposed, name
        self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ti,eio->to", x, self.get_parameter(self.name))


def stack(transposed: bool, name: str, *shape: int) -> Any:
    return seeded(lambda: nn.ModuleDict({"layer": Experts(transposed, name, *shape)}))


def file_of_experts(folder: Any, version: str | None, name: str, A: Tensor, B: Tensor) -> Any:
    config = {"r": 2, "lora_alpha": 6, "target_modules": [], "target_parameters": [f"layer.{name}"]}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_version": version}))
    keys = (f"base_model.model.layer.lora_{letter}.weight" for letter in "AB")
    save_file(dict(zip(keys, (A, B), strict=True)), folder / "adapter_model.safetensors")
    return folder


# Which of the two sides A is beside, by version and by what the module says: read in the sources of 0.18.1, 0.19.0,
# 0.19.1 and 0.20.0, and run with them once.
SIDES = {
    ("0.18.1", False): "e i o", ("0.18.1", True): "e i o", ("0.19.0", False): "e i o", ("0.19.0", True): "e o i",
    ("0.19.1", False): "e o i", ("0.19.1", True): "e i o", ("0.21.2", False): "e o i", ("0.21.2", True): "e i o",
    ("0.20.1.dev0", False): "e o i",
}  # fmt: skip


@pytest.mark.parametrize(("version", "transposed"), SIDES, ids=str)
def test_a_square_expert_is_read_as_the_peft_of_its_version_meant_it(version, transposed, tmp_path):
    A, B = torch.randn(3 * 2, 4), torch.randn(4, 2 * 3)
    model, base = stack(transposed, "up", 3, 4, 4), stack(transposed, "up", 3, 4, 4)
    hf.load(model, file_of_experts(tmp_path, version, "up", A, B))
    as_A, as_B = A.double().view(3, 2, 4), B.double().view(4, 2, 3)
    expected = base["layer"].up.double() + 3 * torch.einsum(f"o r e, e r i -> {SIDES[version, transposed]}", as_B, as_A)
    peftlib.merge(model)
    assert_same(model["layer"].up, expected.float())


@pytest.mark.parametrize("version", [None, "0.18.1", "0.19.0", "0.21.2"])
@pytest.mark.parametrize("beside", [1, 2])
def test_a_shape_that_has_two_sides_says_itself_which_is_meant(version, beside, tmp_path):
    shape = (3, 4, 5)
    A, B = torch.randn(3 * 2, shape[beside]), torch.randn(shape[3 - beside], 2 * 3)
    model, base = stack(False, "up", *shape), stack(False, "up", *shape)
    hf.load(model, file_of_experts(tmp_path, version, "up", A, B))
    as_A, as_B = A.double().view(3, 2, -1), B.double().view(-1, 2, 3)
    sides = "e i o" if beside == 1 else "e o i"
    expected = base["layer"].up.double() + 3 * torch.einsum(f"o r e, e r i -> {sides}", as_B, as_A)
    peftlib.merge(model)
    assert_same(model["layer"].up, expected.float())


UNKNOWN = [(None, "up"), ("", "up"), ("main", "up"), ("0.19.1.dev0", "up"), ("0.19.0", "down_proj")]


@pytest.mark.parametrize(("version", "name"), UNKNOWN, ids=str)
def test_a_square_expert_of_an_unknown_peft_is_refused(version, name, tmp_path):
    model = stack(False, name, 3, 4, 4)
    before = helpers.snapshot(model)
    with pytest.raises(AdapterError, match="square"):
        hf.load(model, file_of_experts(tmp_path, version, name, torch.ones(6, 4), torch.ones(4, 6)))
    assert helpers.changes(before, model) == []


def test_a_square_expert_that_is_written_here_says_its_version(tmp_path):
    model = stack(False, "up", 3, 4, 4)
    peftlib.inject(model, "layer", peftlib.LoRA, param="up", rank=2)
    helpers.moved(model)
    hf.save(model, tmp_path)
    again = stack(False, "up", 3, 4, 4)
    hf.load(again, tmp_path)
    theirs = stack(False, "up", 3, 4, 4)
    with quiet():
        merged = peft.PeftModel.from_pretrained(theirs, str(tmp_path)).merge_and_unload()
    for each in (model, again):
        peftlib.merge(each)
        assert_same(each["layer"].up, merged["layer"].up)


# Starts, and names of yesterday.

LAYERS: dict[str, Callable[[], Any]] = {
    "linear": lambda: nn.Linear(5, 3),
    "convolution": lambda: nn.Conv2d(4, 6, 3),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "embedding": lambda: nn.Embedding(9, 6),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_random_start_has_an_effect_before_any_training(make):
    """As torch draws a layer: uniform in ±1/√(fan in), and normal for an embedding."""
    model: Any = nn.ModuleDict({"layer": make()})
    hf.inject(model, {"r": 4, "target_modules": ["layer"], "init_lora_weights": False})
    (part,) = parts(model)
    bound = part.lora_B[0].numel() ** -0.5
    assert part.lora_A.count_nonzero() == part.lora_A.numel()
    assert part.lora_B.count_nonzero() == part.lora_B.numel()
    if not isinstance(model["layer"], nn.Embedding):
        assert part.lora_B.abs().max() <= bound
        assert part.lora_B.abs().max() > bound / 2


@pytest.mark.parametrize("start", ["olora", "orthogonal"])
def test_a_start_in_which_neither_factor_is_zero_changes_nothing_yet(start):
    model: Any = nn.ModuleDict({"layer": nn.Linear(6, 5)})
    x = torch.randn(3, 6)
    base = model["layer"](x)
    hf.inject(model, {"r": 4, "lora_alpha": 12, "target_modules": ["layer"], "init_lora_weights": start})
    (part,) = parts(model)
    assert_same(model["layer"](x), base)
    for factor in (part.lora_A, part.lora_B):
        assert torch.linalg.matrix_rank(factor) == (4 if start == "olora" else 2)
    if start == "olora":
        product = part.lora_B @ part.lora_A
        Q, R = torch.linalg.qr(model["layer"].weight.detach().double())
        assert_same(product, (Q[:, :4] @ R[:4]).float())


def test_a_start_that_halves_the_rank_refuses_an_odd_one():
    model = nn.ModuleDict({"layer": nn.Linear(6, 5)})
    with pytest.raises(AdapterError, match="r=3"):
        hf.inject(model, {"r": 3, "target_modules": ["layer"], "init_lora_weights": "orthogonal"})
    assert list(peftlib.adapters(model)) == []


def test_modules_that_were_renamed_are_found_by_key_mapping(tmp_path):
    old = seeded(lambda: nn.ModuleDict({"tower": nn.ModuleDict({"proj": nn.Linear(4, 3)})}))
    new = seeded(lambda: nn.ModuleDict({"vision": nn.ModuleDict({"proj": nn.Linear(4, 3)})}))
    peftlib.inject(old, "proj", peftlib.LoRA, rank=2)
    helpers.moved(old)
    hf.save(old, tmp_path)
    with pytest.raises(AdapterError, match="missing"):
        hf.load(new, tmp_path)
    assert hf.load(new, tmp_path, key_mapping={"^nothing": "x", "^tower": "vision"}) == ["vision.proj"]
    x = torch.randn(2, 4)
    assert_same(new["vision"]["proj"](x), old["tower"]["proj"](x))


def test_a_mapping_that_makes_two_keys_one_is_refused(tmp_path):
    model = seeded(lambda: nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}))
    peftlib.inject(model, nn.Linear, peftlib.LoRA, rank=1)
    hf.save(model, tmp_path)
    fresh = seeded(lambda: nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}))
    with pytest.raises(AdapterError, match="key_mapping"):
        hf.load(fresh, tmp_path, key_mapping={"^b": "a"})
    assert list(peftlib.adapters(fresh)) == []


class Renamed(nn.ModuleDict):
    """As classes of transformers say of checkpoints of another structure; peft follows it."""

    _checkpoint_conversion_mapping: ClassVar = {"^tower": "vision"}


def test_what_a_class_says_of_its_old_names_is_followed_as_by_peft(tmp_path):
    old = seeded(lambda: nn.ModuleDict({"tower": nn.ModuleDict({"proj": nn.Linear(4, 3)})}))

    def make() -> Any:
        return seeded(lambda: Renamed({"vision": nn.ModuleDict({"proj": nn.Linear(4, 3)})}))

    peftlib.inject(old, "proj", peftlib.LoRA, rank=2)
    helpers.moved(old)
    hf.save(old, tmp_path)
    model, x = make(), torch.randn(2, 4)
    hf.load(model, tmp_path)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path))
    assert_same(model["vision"]["proj"](x), theirs.base_model.model["vision"]["proj"](x))
    assert_same(model["vision"]["proj"](x), old["tower"]["proj"](x))

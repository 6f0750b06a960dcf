"""What the pages of accuracy and forgetting say of the kept runs: how a rate is chosen, which differences count."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def modules(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("tables"), importlib.import_module("methods"), importlib.import_module("tasks")


@pytest.fixture
def tables(modules) -> Any:
    return modules[0]


def cell(**rates: tuple[float, float, float, float]) -> dict[str, Any]:
    """By rate accuracy and loss in validation, accuracy in test and on the old task."""
    return {"rates": rates, "trainable": 1, "steps": [1.0, 2.0], "seconds": [1.0, 1.0]}


def test_the_error_of_a_difference_is_that_of_the_differences_by_seed(tables):
    values, others = [0.1, 0.3, 0.5, 0.7, 0.9], [0.0, 0.1, 0.2, 0.3, 0.4]
    mean, error = tables.difference(values, others)
    by_seed = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64)
    assert mean == pytest.approx(by_seed.mean().item())
    assert error == pytest.approx(math.sqrt(by_seed.var(correction=1).item() / 5))


def test_seeds_that_differ_alike_leave_no_error(tables):
    mean, error = tables.difference([0.5, 0.75, 1.0], [0.25, 0.5, 0.75])
    assert (mean, error) == (0.25, 0.0)
    assert tables.is_clear(mean, error)
    assert not tables.is_clear(0.0, 0.0)


def test_a_difference_is_clear_beyond_two_errors_either_way(tables):
    assert tables.is_clear(0.021, 0.01)
    assert tables.is_clear(-0.021, 0.01)
    assert not tables.is_clear(0.019, 0.01)


def test_the_rate_is_chosen_by_validation_and_not_by_test(tables):
    cells = [cell(low=(0.8, 1.0, 0.1, 0.1), high=(0.7, 0.1, 0.9, 0.9)) for _ in range(3)]
    assert tables.chosen(cells) == "low"


def test_the_rate_is_chosen_by_the_mean_over_the_seeds(tables):
    low, high = (0.7, 0.3, 0.0, 0.0), (0.8, 0.3, 0.0, 0.0)
    cells = [cell(low=low, high=high), cell(low=low, high=high), cell(low=low, high=(0.3, 0.3, 0.0, 0.0))]
    assert tables.chosen(cells) == "low"


def test_equal_accuracies_are_told_apart_by_their_loss(tables):
    cells = [cell(low=(0.1 * seed, 0.5, 0.0, 0.0), high=(0.3 - 0.1 * seed, 0.4, 0.0, 0.0)) for seed in range(4)]
    assert tables.chosen(cells) == "high"


def test_a_rate_with_which_one_seed_came_to_no_end_is_not_chosen(tables):
    cells = [cell(low=(0.6, 1.0, 0.0, 0.0), high=(0.9, 0.1, 0.0, 0.0)), cell(low=(0.6, 1.0, 0.0, 0.0))]
    assert tables.chosen(cells) == "low"
    assert tables.chosen(cells[::-1]) == "low"


def test_the_list_of_clear_differences_has_each_once_and_no_other(tables, modules):
    _, methods, _ = modules
    accuracies = {methods.FULL: 0.9, methods.LORA: 0.8}
    found = {}
    for method in methods.METHODS:
        for seed in methods.SEEDS:
            noise = 0.0 if method in accuracies else 0.2 * (-1) ** seed
            found[methods.key_of("digits", method, seed)] = cell(
                low=(0.5, 0.5, accuracies.get(method, 0.8) + noise, 0.5)
            )
    results = tables.Results("digits", found)
    lines = tables.clear(results, tables.TEST).splitlines()
    assert " 1 exceed" in lines[0]
    assert lines[2:] == [f"- {methods.FULL.name}: above {methods.LORA.name}."]


def test_the_pages_say_what_the_committed_runs_say(tables, modules):
    _, methods, _ = modules
    found = json.loads(methods.KEPT.read_text())
    results = {task: tables.Results(task, found) for task in tables.TASKS}
    for page, marks in tables.texts(results, found["machine"]).items():
        written = (ROOT / "docs" / f"{page}.md").read_text()
        for name, text in marks.items():
            assert f"<!-- {name} -->\n{text}\n<!-- end of {name} -->" in written


def test_a_finished_cell_is_not_run_again(modules, monkeypatch, tmp_path):
    _, methods, _ = modules
    ran: list[tuple[Any, str, int]] = []

    def run(task: Any, method: Any, seed: int) -> dict[str, Any]:
        if len(ran) == 7:
            raise KeyboardInterrupt
        ran.append((task, method.name, seed))
        return cell(low=(0.5, 0.5, 0.5, 0.5))

    monkeypatch.setattr(methods, "KEPT", tmp_path / "methods.json")
    monkeypatch.setattr(methods, "TASKS", {"reviews": lambda: "reviews", "digits": lambda: "digits"})
    monkeypatch.setattr(methods, "run", run)
    monkeypatch.setattr("sys.argv", ["methods.py", "--seeds", "0", "1"])
    with pytest.raises(KeyboardInterrupt):
        methods.main()
    before, ran = ran, []
    monkeypatch.setattr(methods, "run", lambda *given: ran.append((given[0], given[1].name, given[2])) or cell())
    methods.main()
    tasks = [(task, method) for task in ("reviews", "digits") for method in methods.METHODS if task in method.tasks]
    assert before + ran == [(task, method.name, seed) for seed in (0, 1) for task, method in tasks]
    ran.clear()
    methods.main()
    assert not ran


def small_task(modules: Any) -> Any:
    tasks = modules[2]
    torch.manual_seed(0)
    lengths = torch.arange(40) // 10 + 2
    mask = (torch.arange(5) < lengths[:, None]).float()
    states = torch.arange(40.0).view(-1, 1, 1).expand(40, 5, 4) * mask.unsqueeze(-1)
    data = tasks.Data({"states": states, "attention_mask": mask}, torch.arange(40))
    blocks = nn.ModuleList()
    return tasks.Task(blocks, 40, data, 24, 3, data, data, data, lambda features: features, head_rate=0.05)


def test_a_seed_trains_on_as_many_rows_as_it_draws_and_on_each_in_every_epoch(modules):
    task = small_task(modules)
    batches = task.batches(seed=1, size=8)
    labels = torch.stack([batch.labels for batch in batches]).view(3, -1).sort().values
    assert len(labels[0].unique()) == 24
    assert torch.equal(labels[0], labels[1])
    assert torch.equal(labels[0], labels[2])
    again, other = task.batches(seed=1, size=8), task.batches(seed=2, size=8)
    assert all(torch.equal(one.labels, same.labels) for one, same in zip(batches, again, strict=True))
    assert not all(torch.equal(one.labels, same.labels) for one, same in zip(batches, other, strict=True))


def test_a_batch_loses_padding_and_no_token(modules):
    task = small_task(modules)
    for batch in task.batches(seed=0, size=8):
        states, mask = batch.inputs["states"], batch.inputs["attention_mask"]
        assert int(mask.sum(1).max()) == states.shape[1] == mask.shape[1]
        assert torch.equal(mask.sum(1).long(), batch.labels // 10 + 2)
        assert torch.equal(states[:, 0, 0].long(), batch.labels)


def test_padding_changes_no_features(modules):
    tasks = modules[2]
    torch.manual_seed(0)
    config = BertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=16)
    config._attn_implementation = "sdpa"
    body = tasks.Body(nn.ModuleList([BertLayer(config)])).eval()
    states, mask = torch.randn(3, 4, 8), torch.ones(3, 4)
    padded = nn.functional.pad(states, (0, 0, 0, 3), value=7.0)
    torch.testing.assert_close(body(padded, nn.functional.pad(mask, (0, 3))), body(states, mask))


def test_only_the_trial_s_own_parts_move_and_each_group_has_its_rate(modules):
    _, methods, tasks = modules
    config = BertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=16)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    data = tasks.Data({"states": torch.randn(8, 3, 8), "attention_mask": torch.ones(8, 3)}, torch.arange(8) % 2)
    task = tasks.Task(
        nn.ModuleList([BertLayer(config), BertLayer(config)]),
        2,
        data,
        8,
        2,
        data,
        data,
        data,
        lambda features: features,
        head_rate=0.05,
    )
    for method in methods.METHODS:
        one = methods.Cell(task, method, seed=0)
        base = {key: tensor.clone() for key, tensor in one.network.state_dict().items() if "adapters" not in key}
        for batch in one.batches:
            one.step(batch)
        found = one.results()
        assert [*found] == [f"{rate:g}" for rate in method.rates(task)], method.name
        now = one.network.state_dict()
        assert all(torch.equal(now[key], tensor) for key, tensor in base.items())
        groups = one.trials["rate-2"].optimizer.param_groups
        initial = [group["initial_lr"] for group in groups]
        assert initial == ([task.head_rate, method.rates(task)[2]] if method.parts else [method.rates(task)[2]])
        together, apart = methods.step_times(one, rounds=1)
        assert 0 < together < math.inf
        assert 0 < apart < math.inf

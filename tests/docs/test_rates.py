"""What the page of rates says of its own measurement: the committed runs, and one of them made again in part."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rates() -> Any:
    spec = importlib.util.spec_from_file_location("rates", ROOT / "benchmarks" / "rates.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def best_by_rank(rates: Any, run: dict[str, list[float]], scale: str) -> list[float]:
    return [rates.best(values) for name, values in run.items() if name.startswith(scale)]


def test_the_table_of_the_page_is_that_of_the_committed_runs(rates):
    kept = json.loads(rates.KEPT.read_text())
    assert rates.table([kept[str(seed)] for seed in rates.SEEDS]) in rates.PAGE.read_text()


def test_under_the_default_scale_the_best_rate_stays_within_one_step_of_the_grid_at_all_ranks(rates):
    for run in json.loads(rates.KEPT.read_text()).values():
        found = best_by_rank(rates, run, "LoRA, α/r")
        assert len(found) == len(rates.RANKS)
        assert max(found) <= 2 * min(found)


@pytest.mark.slow
def test_a_run_made_again_agrees(rates):
    found = best_by_rank(rates, rates.run(0, ranks=(2, 16, 64)), "LoRA, α/r")
    assert max(found) <= 2 * min(found)

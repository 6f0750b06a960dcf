"""The page on monitoring with the real TensorBoard and MLflow: what they hold is what was measured."""

from pathlib import Path
from typing import Any

import pytest

import peftlib
from support.pages import blocks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
]
event_files = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
mlflow = pytest.importorskip("mlflow")

PAGE = Path(__file__).parents[2] / "docs" / "monitor.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the names of the page stand for when all of it has run, in a folder of its own."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    labelled = [*blocks(PAGE), *blocks(PAGE, label="tracked")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("runs"))
        for language, line, source in sorted(labelled, key=lambda block: block[1]):
            if language == "python":
                exec(compile("\n" * line + source, str(PAGE), "exec"), namespace)
        yield namespace


def test_tensorboard_holds_every_number_at_every_step(page):
    events = event_files.EventAccumulator("runs", size_guidance={event_files.SCALARS: 0})
    events.Reload()
    assert set(events.Tags()["scalars"]) == page["history"][0].keys()
    for key in page["history"][0]:
        held = [(event.step, event.value) for event in events.Scalars(key)]
        expected = [(step, numbers[key]) for step, numbers in zip(page["steps"], page["history"], strict=True)]
        assert held == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]  # kept in float32


def test_mlflow_holds_every_number_at_every_step(page):
    client = mlflow.MlflowClient()
    run = page["run"].info.run_id
    assert client.get_run(run).data.metrics.keys() == page["history"][0].keys()
    for key in ["loss", "default/delta_ratio", "default/1.layers.2.linear2/stable_rank"]:
        held = [(metric.step, metric.value) for metric in client.get_metric_history(run, key)]
        assert held == [(s, n[key]) for s, n in zip(page["steps"], page["history"], strict=True)]


def test_the_artifact_is_the_adapter_and_says_where_it_comes_from(page):
    header = peftlib.read_header(page["path"])
    assert header["metadata"] == page["lineage"]
    assert header["metadata"]["run"] == page["run"].info.run_id
    assert header["base"].keys() == header["hosts"].keys()
    peftlib.eject(page["model"])
    assert peftlib.load(page["model"], page["path"]) == list(header["hosts"])

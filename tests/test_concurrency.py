"""Runs that start at the same moment in one folder, without arrays of their data set."""

import json
from pathlib import Path

import pytest
from processes import end, records, start

import task1
from common.cli import run_script
from common.data import phantom
from common.records.read import read_history

RUNS = 4


@pytest.mark.slow
def test_runs_that_start_at_once_leave_intact_records(tmp_path: Path) -> None:
    data_root, output = tmp_path / "data", tmp_path / "output"
    keys = ["--dataset=phantom", "--size=28", "--input_size=28", "--train_tiles=180", "--n_epochs=2"]
    keys += ["--wandb=disabled", f"--data_root={data_root}", f"--output_dir={output}"]

    def run(number: int) -> None:
        # Two runs of each seed must write the same records, whichever of them built the arrays.
        given = [*keys, f"--run_id=r{number}", f"--seed={number % 2}"]
        run_script(task1.main, task1.Task1Config, given)

    processes = [start(lambda number=number: run(number), tmp_path / f"log{number}") for number in range(RUNS)]
    statuses = [end(pid) for pid in processes]
    assert statuses == [0] * RUNS, (tmp_path / "log0").read_text()
    folder = f"phantom-v{phantom.VERSION}_28_180.arrays"
    assert [path.name for path in data_root.iterdir() if path.is_dir()] == [folder]
    found = records(output)
    for number in range(RUNS):
        record = output / "runs" / f"r{number}"
        assert json.loads((record / "config.json").read_text())["run_id"] == f"r{number}"
        assert len(read_history(record / "history.csv")) == 2
        twin = f"r{(number + 2) % RUNS}"
        for name in ("history.csv", "scores.npz"):
            assert found[f"runs/r{number}/{name}"] == found[f"runs/{twin}/{name}"]
        weights, others = (found[f"checkpoints/{name}/best.pt"] for name in (f"r{number}", twin))
        assert {**weights, "run_id": twin} == others
    assert len(list((output / "fig" / "task1").glob("*.png"))) == 4 * RUNS

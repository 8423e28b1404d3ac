"""Runs that start at the same moment in one folder without a data cache."""

import json
from pathlib import Path

import pytest
from processes import end, records, start

import task1
from common.config import run_script
from common.records.read import read_history

RUNS = 8


@pytest.mark.slow
def test_eight_runs_at_once_on_one_folder_and_an_empty_cache_leave_eight_intact_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_root, output = tmp_path / "data", tmp_path / "output"
    keys = [
        "--dataset=phantom",
        "--size=28",
        "--input_size=28",
        "--train_tiles=180",
        "--wandb=disabled",
        "--n_epochs=2",
    ]
    keys += [f"--data_root={data_root}", f"--output_dir={output}"]

    def run(number: int) -> None:
        # Two runs of each seed must write the same records, whichever of them built the cache.
        given = [*keys, f"--run_id=r{number}", f"--seed={number % 4}"]
        run_script(task1.main, task1.Task1Config, given)

    processes = [start(lambda number=number: run(number), tmp_path / f"log{number}") for number in range(RUNS)]
    statuses = [end(pid) for pid in processes]
    assert statuses == [0] * RUNS, (tmp_path / "log0").read_text()
    assert [path.name for path in data_root.iterdir() if path.suffix == ".arrays"] == ["phantom-v3_28_180.arrays"]
    found = records(output)
    for number in range(RUNS):
        folder = output / "runs" / f"r{number}"
        assert json.loads((folder / "config.json").read_text())["run_id"] == f"r{number}"
        assert len(read_history(folder / "history.csv")) == 2
        twin = f"r{(number + 4) % RUNS}"
        for name in ("history.csv", "scores.npz"):
            assert found[f"runs/r{number}/{name}"] == found[f"runs/{twin}/{name}"]
        assert found[f"checkpoints/r{number}/best.pt"] == found[f"checkpoints/{twin}/best.pt"]
    assert len(list((output / "fig" / "task1").glob("*.png"))) == 4 * RUNS
    with capsys.disabled():
        print(f"\n{RUNS} runs at once: {RUNS} intact records")

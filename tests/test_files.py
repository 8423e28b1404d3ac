"""Files appear complete or not at all, with what a record may show; a run is locked by its process alone."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
from processes import end, start

from common.config import TrainingConfig
from common.data.dataset import Dataset
from common.files import atomic_path, delete_temporary_files, write_csv, write_json
from common.records.run import Run


def test_a_failed_write_leaves_the_file_before_it(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_json(path, {"one": 1})
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"one": float("nan")})
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == '{\n  "one": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_appears_only_when_its_content_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flushed, fsync = tmp_path / "new" / "record.txt", [], os.fsync

    def recorded(descriptor: int) -> None:
        flushed.append((Path(f"/proc/self/fd/{descriptor}").readlink(), path.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded)
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
        assert temporary.suffix == ".txt"
        assert not path.exists()
    assert path.read_text() == "whole"
    assert flushed == [(temporary, False)]


def test_an_error_of_the_temporary_file_names_the_file_itself(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=f"Is a directory: '{tmp_path}/folder'"):
        write_json(tmp_path / "folder", 1)
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_a_table_keeps_every_digit(tmp_path: Path) -> None:
    write_csv(tmp_path / "table.csv", [{"epoch": 1, "loss": 0.1 + 0.2}, {"epoch": 2, "loss": None}])
    assert (tmp_path / "table.csv").read_bytes() == b"epoch,loss\n1,0.30000000000000004\n2,\n"


def test_what_a_killed_process_has_left_is_swept_up(tmp_path: Path) -> None:
    kept = {".lock", ".my-notes.txt", "best.pt"}
    for name in kept:
        (tmp_path / name).write_text("mine")
    killed = [atomic_path(tmp_path / name) for name in ("summary.json", "best.pt", "name")]
    for context in killed:
        context.__enter__().write_text("half")
    assert len(list(tmp_path.iterdir())) == len(kept) + 3
    delete_temporary_files(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_record_shows_no_home_folder_and_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone/")
    write_json(
        tmp_path / "record.json",
        {
            "data_root": "/home/someone/data",
            "home": ["/home/someone", "/home/someone-else", "/mnt/home/someone/x"],
            "command": "task1.py --output_dir=/home/someone/out '/home/someone/a b'",
            "wandb": "https://me:secret@wandb.example/hw1",
        },
    )
    assert json.loads((tmp_path / "record.json").read_text()) == {
        "data_root": "~/data",
        "home": ["~", "/home/someone-else", "/mnt/home/someone/x"],
        "command": "task1.py --output_dir=~/out '~/a b'",
        "wandb": "https://wandb.example/hw1",
    }


def test_a_run_is_locked_for_other_processes_until_its_process_ends(tiny: Dataset, tmp_path: Path) -> None:
    config, log = TrainingConfig(output_dir=tmp_path, run_id="r"), tmp_path / "log"
    open_run = partial(Run, "task1", config, tiny, "cpu")
    assert [end(start(open_run, log)) for _ in range(2)] == [0, 0]
    runs = [open_run(), open_run()]  # the same process may open it again
    assert end(start(open_run, log)) == 70
    refusal = "Fault: run r is running in another process: wait for its end, or use another --run_id"
    assert refusal in log.read_text()
    assert len(runs) == 2

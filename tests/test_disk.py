"""A full disk, a read-only folder: one line names it, and no earlier file changes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from processes import assert_same, end, mount, start

import train
from common.cli import run_script

KEYS = [
    *("--dataset=phantom", "--size=28", "--input_size=28", "--train_tiles=90", "--batch_size=45", "--n_epochs=2"),
    *("--model_name=shufflenet_v2_x0_5", "--wandb=disabled", "--run_id=r", "--device=cpu"),
]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted disk of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if mount(folder, "size=64m") != 0:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def run(folder: Path, data_root: Path) -> None:
    run_script(train.main, train.TrainConfig, [*KEYS, f"--data_root={data_root}", f"--output_dir={folder}"])


def assert_fails(folder: Path, data_root: Path, log: Path, message: str) -> None:
    """The run, in a separate process, ends with one line: a file of the folder, and the message."""
    log.unlink(missing_ok=True)
    assert end(start(lambda: run(folder, data_root), log)) == 1
    line = log.read_text().splitlines()[-1]
    assert str(folder) in line
    assert line.endswith(f": {message}; fix this, then start the same command with --run_id=r again")
    assert "Traceback" not in log.read_text()


def assert_nothing_torn(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            if path.suffix == ".pt":
                torch.load(path, weights_only=True)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".png":
                assert path.read_bytes().endswith(b"IEND\xaeB`\x82")


@pytest.fixture(scope="module")
def whole(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(folder, phantom_root)
    return folder


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_line_and_with_room_it_continues(
    small_disk: Path, whole: Path, tmp_path: Path, phantom_root: Path
) -> None:
    log, checkpoints = tmp_path / "log", sum(path.stat().st_size for path in whole.rglob("*.pt"))
    for share in (0.01, 0.45, 0.95):
        assert mount(small_disk, f"remount,size={int(share * checkpoints) // 1024 + 8}k") == 0
        assert_fails(small_disk, phantom_root, log, "No space left on device")
        assert_nothing_torn(small_disk)
    assert mount(small_disk, "remount,size=64m") == 0
    assert end(start(lambda: run(small_disk, phantom_root), log)) == 0
    assert_same(small_disk, whole)


def test_a_read_only_folder_is_named_and_does_not_change(
    small_disk: Path, tmp_path: Path, phantom_root: Path
) -> None:
    (small_disk / "runs").mkdir()
    (small_disk / "runs" / "earlier").write_text("kept")
    assert mount(small_disk, "remount,ro") == 0
    assert_fails(small_disk, phantom_root, tmp_path / "log", "Read-only file system")
    assert (small_disk / "runs" / "earlier").read_text() == "kept"


@pytest.mark.slow
def test_wandb_offline_on_a_full_disk_adds_no_traceback(
    small_disk: Path, phantom_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    keys = [*KEYS, "--wandb=offline", f"--data_root={phantom_root}", f"--output_dir={small_disk}"]
    assert mount(small_disk, "remount,size=20k") == 0  # less than W&B's own log needs
    done = subprocess.run([sys.executable, ROOT / "train.py", *keys], capture_output=True, text=True)
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert str(small_disk) in line
    assert "No space left on device" in line

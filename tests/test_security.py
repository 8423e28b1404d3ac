"""No record contains an API key."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.slow
def test_no_record_log_or_figure_contains_the_api_key(tmp_path: Path, phantom_root: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}
    environment |= {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}
    keys = ["--dataset=phantom", "--size=28", "--input_size=28", "--train_tiles=90", "--n_epochs=1", "--run_id=r"]
    where = [f"--data_root={phantom_root}", f"--output_dir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "task1.py", *keys, *where], cwd=ROOT, env=environment, capture_output=True, timeout=200
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"W&B: offline" in done.stdout
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10
    assert any(path.suffix == ".wandb" for path in written)
    for content in (done.stdout, done.stderr, *(path.read_bytes() for path in written)):
        assert KEY.encode() not in content

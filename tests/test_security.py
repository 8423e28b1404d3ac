"""No file or option can run code, and no record contains an API key."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

KEY = "0123456789abcdef0123456789abcdef01234567"
SOURCES = [path for files in ("*.py", "common/**/*.py", "study/*.py", "bench/*.py") for path in ROOT.glob(files)]
# The argument without which these calls could run code from a file.
GUARDED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
FORBIDDEN = {"eval", "exec", "yaml.load", "os.system", "os.popen", "pickle.load", "pickle.loads", "torch.hub.load"}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_no_call_can_run_code_from_a_file_or_through_a_shell() -> None:
    guarded = 0
    for path in SOURCES:
        for name, call in calls(path):
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            assert name not in FORBIDDEN, f"{path}:{call.lineno} {name}"
            assert "shell" not in given, f"{path}:{call.lineno} shell"
            if name in GUARDED:
                key, value = GUARDED[name]
                assert key in given, f"{path}:{call.lineno} {name} without {key}"
                found = given[key]
                assert isinstance(found, ast.Constant)
                assert found.value is value
                guarded += 1
    assert guarded >= 2


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

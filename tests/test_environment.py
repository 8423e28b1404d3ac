"""Closed and ASCII streams; no home folder: at most one line."""

import io
import pwd
import sys
from pathlib import Path

import pytest
from bad_input import assert_refused

from common.config import TrainingConfig, run_script
from common.data.dataset import load_dataset


def say(config: TrainingConfig) -> None:
    """A script that prints what ASCII does not have."""
    print("run a · b × c")


@pytest.mark.parametrize(
    ("environment", "line", "status", "message"),
    [
        (
            {"PATHMNIST_ROOT": "~nobody-has-this-name/x"},
            "task1.py",
            2,
            "--data_root: this user has no home folder",
        ),
    ],
)
def test_a_wrong_variable_is_named(
    environment: dict[str, str],
    line: str,
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert_refused(line, status, message, tmp_path, capsys)


def test_a_user_without_a_home_folder_needs_only_a_data_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "PATHMNIST_ROOT"):
        monkeypatch.delenv(name, raising=False)
    assert_refused("task1.py", 2, "--data_root: this user has no home folder; name a folder", tmp_path, capsys)
    assert len(load_dataset("phantom", 28, tmp_path, train_tiles=45).train) == 45


def test_an_ascii_terminal_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="ascii", write_through=True))
    run_script(say, TrainingConfig, ["--run_id=r"])
    assert output.getvalue() == b"run a \\xb7 b \\xd7 c\n"


def test_closed_streams_lead_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    run_script(say, TrainingConfig, ["--run_id=r"])
    with pytest.raises(SystemExit) as ended:
        run_script(say, TrainingConfig, ["--quux"])
    assert ended.value.code == 2

"""Closed and ASCII streams, no home folder, Ctrl-C during the imports: at most one line."""

import io
import os
import pwd
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bad_input import assert_refused
from conftest import ROOT

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


@pytest.mark.parametrize("command", [["task1.py"], ["-m", "study.sweep", "sweep.yaml"]])
@pytest.mark.parametrize("seconds", [0.15, 0.6])
def test_ctrl_c_during_the_imports_is_one_line(command: list[str], seconds: float) -> None:
    start = [sys.executable, "-X", "importtime", *command, "--help"]
    process = subprocess.Popen(start, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    while not process.stderr.readline().rstrip().endswith(" common"):  # Ctrl-C before this import is Python's
        assert process.poll() is None
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    error = "".join(line for line in process.stderr if not line.startswith("import time:"))
    process.wait()
    if process.returncode != 0:  # a fast machine may have finished before
        assert re.fullmatch(r"(\S+: )?interrupted.*\n", error)
        assert process.returncode == 130


def test_importing_the_package_leaves_other_programs_their_ctrl_c() -> None:
    handler = "signal.getsignal(signal.SIGINT)"
    code = f"import signal; before = {handler}; import common; print({handler} is before)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, cwd="/"
    )
    assert done.stdout == b"True\n"


@pytest.mark.parametrize("first", ["-m", "other.py"])
def test_a_warning_of_a_script_is_one_line_and_other_programs_keep_theirs(first: str) -> None:
    code = f"import sys; sys.argv[0] = {first!r}; import common, warnings; warnings.warn('a\\nb')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, cwd="/"
    )
    assert (done.stderr == b"warning: a b\n") == (first == "-m")

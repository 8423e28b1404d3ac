"""Forked processes that a test can kill, and a comparison, bit by bit, of the files that two runs have written."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# What differs between two equal runs; best.pt, of which best_sha256 is, holds the path of its folder.
TIMINGS = ("seconds", "tiles_per_second", "wall_seconds", "best_sha256")


def start(action: Callable[[], None], log: Path) -> int:
    """Run `action` in a forked process, which need not import PyTorch again; returns the process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        # Else pytest would capture this output.
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        action()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 71
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def end(pid: int, within: float = 120) -> int:
    """Wait for the process; returns its exit status, or minus the number of the signal that ended it.

    After `within` seconds its whole process group is killed.
    """
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        finished, status = os.waitpid(pid, os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.003)
    os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def records(folder: Path) -> dict[str, Any]:
    """The content of every file in `folder`, by name, without timings and without config.json."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".csv":
            with open(path, newline="") as file:
                found[name] = plain(list(csv.DictReader(file)))
        elif path.name == "summary.json":
            found[name] = plain(json.loads(path.read_text()))
        elif path.suffix == ".pt":
            found[name] = plain(torch.load(path, weights_only=True))
        elif path.suffix in (".png", ".npz") and not path.name.startswith("."):
            found[name] = path.read_bytes()
        elif path.name != "config.json":  # it holds the time of the start
            found[name] = None
    return found


def plain(content: Any) -> Any:
    """A checkpoint or a record without timings and folders, as something that == compares bit by bit."""
    if isinstance(content, torch.Tensor):
        return content.numpy().tobytes()
    if isinstance(content, dict):
        return {
            name: plain(value) for name, value in content.items() if name not in (*TIMINGS, "output_dir", "config")
        }
    if isinstance(content, list | tuple):
        return [plain(value) for value in content]
    return content


def assert_same(killed: Path, whole: Path) -> None:
    """Fail where the records of a killed and continued run differ from those of a run without a kill."""
    found, expected = records(killed), records(whole)
    # A kill may leave the hidden file of a figure; one after summary.json also leaves a lock and last.pt.
    left = r"fig/.*/\.|runs/[^/]*/\.lock|checkpoints/[^/]*/last\.pt"
    found = {name: value for name, value in found.items() if not re.match(left, name)}
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], f"{name}: {found[name]!r:.2000} is not {expected[name]!r:.2000}"


def mount(folder: Path, options: str) -> int:
    """Mount a small disk, with the right to do so; returns mount's exit status."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode

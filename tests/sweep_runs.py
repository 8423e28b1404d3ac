"""What the tests of sweeps and searches share: sweep files for a fake program, and commands that run them."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import start

from common.cli import run_script
from study import sweep

GRID = {"method": "grid", "parameters": {"row": {"values": ["a", "b", "c"]}, "seed": {"values": [0, 1]}}}
SEARCH = {
    "method": "bayes",
    "metric": {"name": "validate/acc", "goal": "maximize"},
    "parameters": {"quality": {"min": 0.1, "max": 1.0}, "row": {"values": ["a", "b"]}, "test": {"value": False}},
}
Write = Callable[..., Path]


def run(path: Path, output: Path, *fixed: str, **keys: Any) -> None:
    """Run a sweep file; `fixed` are keys for every run."""
    output.mkdir(exist_ok=True)
    sweep.main(sweep.SweepConfig(**{"file": (str(path), *fixed), "output_dir": output, "workers": 1, **keys}))


def begin(path: Path, output: Path, **keys: Any) -> int:
    """Start a command in another process; its output goes to log.txt."""
    output.mkdir(exist_ok=True)
    keys = {"output_dir": output, "workers": 1, **keys}
    arguments = [str(path), *(f"--{name}={value}" for name, value in keys.items()), "--", "--wandb=disabled"]
    return start(lambda: run_script(sweep.main, sweep.SweepConfig, arguments), output / "log.txt")


def wait_for_starts(output: Path, n_runs: int) -> None:
    deadline = time.monotonic() + 60
    while len(starts(output)) != n_runs:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def starts(output: Path) -> list[str]:
    path = output / "starts.txt"
    return path.read_text().split() if path.exists() else []


def most_at_once(output: Path) -> int:
    """How many runs were at work at the same time."""
    spans = [[float(moment) for moment in line.split()] for line in (output / "spans.txt").open()]
    return max(sum(begun <= moment < ended for begun, ended in spans) for moment, _ in spans)


def table(output: Path) -> list[dict[str, str]]:
    """The lines of a table.md."""
    text = (output / "sweeps/try/table.md").read_text().replace(r"\_", "_")
    columns, _, *lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(columns, line, strict=False)) for line in lines]

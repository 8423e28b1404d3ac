"""Run the trials of a sweep as processes, each by one worker only, and read their records."""

import csv
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.config import BOOKKEEPING_KEYS
from common.errors import Fault, UsageError
from common.sweep_file import Sweep
from common.tracking import read_json

POLL = 0.5  # seconds between two looks at a run, or at what other workers have finished
PATIENCE = 30.0  # seconds that a run gets to end after SIGTERM


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: its id, and the values that it has beside the fixed keys."""

    run_id: str
    values: Mapping[str, Any]


class Workplace:
    """Where a sweep's trials are run: starts their processes and finds their records."""

    def __init__(self, sweep: Sweep, output_dir: Path) -> None:
        self.sweep = sweep
        self.output_dir = output_dir
        self.folder = output_dir / "sweeps" / sweep.name

    def record(self, trial: Trial, name: str) -> Path:
        """The path of one of the trial's records."""
        return self.output_dir / "runs" / trial.run_id / name

    def lock_path(self, trial: Trial) -> Path:
        """The file whose lock its worker, and the run itself, hold as long as they live."""
        return self.folder / f"{trial.run_id}.lock"

    def is_finished(self, trial: Trial) -> bool:
        """Whether the run's records are complete; UsageError where they are of another configuration."""
        if not self.record(trial, "summary.json").exists():
            return False
        recorded = read_json(self.record(trial, "config.json"))["config"]
        wanted = self.sweep.config({**trial.values, "run_id": trial.run_id}).as_dict()
        for name in wanted.keys() & recorded.keys() - set(BOOKKEEPING_KEYS):
            if recorded[name] != wanted[name]:
                raise UsageError(
                    f"run {trial.run_id} is finished already, with {name} {recorded[name]} instead of "
                    f"{wanted[name]}: use another --output_dir, or another name in the sweep file"
                )
        return True

    @contextmanager
    def process(self, trial: Trial, lock: int) -> Iterator["subprocess.Popen[bytes]"]:
        """The running trial, its output going to a log; whatever ends the block ends the trial.

        The process inherits the lock: should this worker be killed, no other one starts the same run beside
        the orphan.
        """
        given = {**trial.values, "run_id": trial.run_id, "output_dir": self.output_dir}
        # Unbuffered, so that the log's last line is the last that was written. The group is W&B's.
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "WANDB_RUN_GROUP": self.sweep.name}
        with open(self._log(trial), "ab") as log:
            process = subprocess.Popen(
                self.sweep.command_line(given),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[lock],
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def failure(self, trial: Trial, status: int) -> str:
        """Why the trial failed, in one line: the last that it wrote."""
        lines = self._log(trial).read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
        return f"FAILED with exit status {status}: {last} (log: {self._log(trial)})"

    def history(self, trial: Trial) -> dict[int, float]:
        """The metric by epoch, so far; Fault where the program does not record it."""
        metric = self.sweep.metric
        if metric is None or not self.record(trial, "history.csv").exists():
            return {}
        with open(self.record(trial, "history.csv"), newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if rows and metric not in rows[0]:
            raise Fault(f"{self.record(trial, 'history.csv')} has no column {metric}, the sweep's metric")
        return {int(row["epoch"]): float(row[metric]) for row in rows}

    def best(self, trial: Trial) -> float | None:
        """The best value of the metric over the epochs, if there is a finite one."""
        values = [value for value in self.history(trial).values() if math.isfinite(value)]
        if not values:
            return None
        return max(values) if self.sweep.maximize else min(values)

    def outcome(self, trial: Trial, state: str) -> str:
        """`state` and the best value of the metric, if there is one."""
        best = self.best(trial)
        return state if best is None else f"{state}, {self.sweep.metric} {best:.4f}"

    def _log(self, trial: Trial) -> Path:
        return self.folder / f"{trial.run_id}.log"


def say(line: str) -> None:
    """Print a line without tearing the progress bar, at once: a sweep's log is read while it runs."""
    tqdm.write(line)
    sys.stdout.flush()


def markdown_line(*cells: str) -> list[str]:
    """One line of a Markdown table, as a list to be added to others."""
    return [f"| {' | '.join(cells)} |"]

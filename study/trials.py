"""Run the trials of a sweep as processes, several at once but none of them twice, and read their records."""

import csv
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.compute import Compute
from common.errors import Fault, UsageError
from common.interruption import Interruption
from common.records import is_finished, read_json, run_folder
from study.sweep_file import Sweep

POLL = 0.5  # seconds between two looks at the runs' histories, or at what other commands have finished
BLINK = 0.05  # seconds between two looks at whether a process has ended
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
        return run_folder(self.output_dir, trial.run_id) / name

    def lock_path(self, trial: Trial) -> Path:
        """The file whose lock the run itself, and the command that started it, hold as long as they live."""
        return self.folder / f"{trial.run_id}.lock"

    def is_finished(self, trial: Trial) -> bool:
        """Whether the run's records are complete; UsageError where another configuration has this name."""
        if self.record(trial, "config.json").exists():
            recorded = read_json(self.record(trial, "config.json"))["config"]
            wanted = self.sweep.config({**trial.values, "run_id": trial.run_id}).identity()
            for name in sorted(wanted):
                if recorded.get(name) != wanted[name]:
                    raise UsageError(
                        f"run {trial.run_id} exists already, with {name} {recorded.get(name)} instead of "
                        f"{wanted[name]}: use another --output_dir, or another name in the sweep file"
                    )
        return is_finished(self.output_dir, trial.run_id)

    def on_cpu(self, values: Mapping[str, Any]) -> bool:
        """Whether a trial with these values computes on a CPU."""
        return Compute.of(self.sweep.config(values).device, "fp32").device.type == "cpu"

    def start(self, trial: Trial, lock: int) -> "subprocess.Popen[bytes]":
        """Start the trial's process, its output going to a log.

        The process inherits the lock: should this command be killed, no other one starts the same run beside
        the orphan.
        """
        given = {**trial.values, "run_id": trial.run_id, "output_dir": self.output_dir}
        # Two processes with one thread each train more tiles than one process with two threads.
        threads = {"OMP_NUM_THREADS": "1"} if self.on_cpu(trial.values) else {}
        # Unbuffered, so that the log's last line is the last that was written. The group is W&B's.
        environment = {**threads, **os.environ, "PYTHONUNBUFFERED": "1", "WANDB_RUN_GROUP": self.sweep.name}
        with open(self._log(trial), "ab") as log:
            return subprocess.Popen(
                self.sweep.command_line(given),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[lock],
            )

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


class Running:
    """A trial's process, and the claim that nobody else starts the trial."""

    def __init__(self, trial: Trial, process: "subprocess.Popen[bytes]", claim: ExitStack) -> None:
        self.trial = trial
        self.claim = claim
        self._process = process
        self._started = time.monotonic()
        self._patience_ends = math.inf

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self._started

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._patience_ends < math.inf

    def stop(self) -> None:
        """Ask the process to end. Only once: a second SIGTERM would end it before it has saved its state."""
        if not self.stopped:
            self._process.terminate()
            self._patience_ends = time.monotonic() + PATIENCE

    def status(self) -> int | None:
        """The exit status, None while the process runs; one that does not end PATIENCE after `stop` is killed."""
        if time.monotonic() > self._patience_ends:
            self._process.kill()
        return self._process.poll()


class Workers:
    """The trials that this command runs at the same time, `limit` at most; whatever ends the block ends them.

    Ctrl-C and SIGTERM are only noted, and end the block in `wait`: so no process is started and then forgotten.
    """

    def __init__(self, workplace: Workplace, limit: int) -> None:
        self.running: list[Running] = []
        self._workplace = workplace
        self._limit = limit
        self._interruption = Interruption()

    def __enter__(self) -> "Workers":
        """Note signals from now on."""
        self._interruption.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop all that runs, at the same time, and wait until it has ended."""
        for running in self.running:
            running.stop()
        while any(running.status() is None for running in self.running):
            time.sleep(BLINK)
        for running in self.running:
            running.claim.close()
        self._interruption.__exit__(None, None, None)

    def have_room(self) -> bool:
        """Whether one more may be started."""
        return len(self.running) < self._limit

    def start(self, trial: Trial, lock: int, claim: ExitStack) -> None:
        """Start a trial and take over the claim of its lock."""
        self.running.append(Running(trial, self._workplace.start(trial, lock), claim.pop_all()))

    def wait(self) -> list[tuple[Running, int]]:
        """Those that have ended, and their status; waits POLL seconds at most. Stopped after Ctrl-C or SIGTERM."""
        until = time.monotonic() + POLL
        while all(running.status() is None for running in self.running) and time.monotonic() < until:
            time.sleep(BLINK)
        ended = [(running, status) for running in self.running if (status := running.status()) is not None]
        if self._interruption.came:  # Ctrl-C reaches the trials as well: those that it ended have not failed
            raise self._interruption.stopped("the sweep ended early")
        for running, _ in ended:
            self.running.remove(running)
        return ended


def say(line: str) -> None:
    """Print a line without tearing the progress bar, at once: a sweep's log is read while it runs."""
    tqdm.write(line)
    sys.stdout.flush()


def markdown_line(*cells: str) -> list[str]:
    """One line of a Markdown table, as a list to be added to others."""
    return [f"| {' | '.join(cells)} |"]

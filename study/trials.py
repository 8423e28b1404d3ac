"""Run the trials of a sweep as processes, several at the same time and each only once, and read their records."""

import fcntl
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.errors import Fault
from common.records.read import is_finished, read_history, read_json, run_folder
from common.records.run import check_same
from study.interruption import Interruption
from study.sweep_file import Sweep

POLL = 0.5  # seconds after which `Workers.wait` returns even if no trial has ended
BLINK = 0.05  # seconds between two checks whether a process has ended
PATIENCE = 30.0  # seconds from SIGTERM to SIGKILL


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[int | None]:
    """Lock the file `path` and yield its descriptor, or None where the lock is taken already.

    With `wait`, wait until the lock is free. A process that is started with the descriptor (`pass_fds`) shares the
    lock. The kernel releases the lock when the last of these processes has ended.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            descriptor = None
        else:
            descriptor = file.fileno()
        yield descriptor


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: its id, and its values beside the fixed keys."""

    run_id: str
    values: Mapping[str, Any]


class TrialRecords:
    """The files of a sweep's trials: where they are, and what they contain."""

    def __init__(self, sweep: Sweep, output_dir: Path) -> None:
        self.sweep = sweep
        self.output_dir = output_dir
        self.folder = output_dir / "sweeps" / sweep.name

    def lock_path(self, run_id: str) -> Path:
        """The trial's process, and the command that started it, lock this file as long as they live."""
        return self.folder / f"{run_id}.lock"

    def log_path(self, run_id: str) -> Path:
        """The file with the output of the trial's process."""
        return self.folder / f"{run_id}.log"

    def is_finished(self, trial: Trial) -> bool:
        """Whether the trial's records are complete; UsageError where they are of another configuration."""
        facts = run_folder(self.output_dir, trial.run_id) / "config.json"
        if facts.exists():
            config = self.sweep.config({**trial.values, "run_id": trial.run_id})
            remedy = "use another --output_dir, or another name in the sweep file"
            check_same(config, read_json(facts)["config"], remedy)
        return is_finished(self.output_dir, trial.run_id)

    def history(self, run_id: str) -> dict[int, float]:
        """The metric of each epoch until now; Fault where the program does not record it."""
        path, metric = run_folder(self.output_dir, run_id) / "history.csv", self.sweep.metric
        if metric is None or not path.exists():
            return {}
        rows = read_history(path)
        if rows and metric not in rows[0]:
            raise Fault(f"{path} has no column {metric}, the sweep's metric")
        return {int(row["epoch"]): row[metric] for row in rows}

    def best(self, run_id: str) -> float | None:
        """The best finite value of the metric over the epochs; None where there is none."""
        return self.sweep.best(self.history(run_id).values())

    def outcome(self, run_id: str, state: str) -> str:
        """`state`, with the best value of the metric where there is one."""
        best = self.best(run_id)
        return state if best is None else f"{state}, {self.sweep.metric} {best:.4f}"

    def failure(self, run_id: str, status: int) -> str:
        """Why the trial failed, in one line: the last line of its log."""
        log = self.log_path(run_id)
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
        return f"FAILED with exit status {status}: {last} (log: {log})"


def failed_runs(run_ids: Sequence[str]) -> Fault:
    """The error that names the runs which failed; they are not finished, so the next command runs them."""
    return Fault(f"{', '.join(run_ids)} failed: see their logs; the same command tries them again")


class Running:
    """A trial's process, and the lock that keeps other commands from starting the same trial.

    Whoever handles the end of the process closes `lock`.
    """

    def __init__(self, trial: Trial, records: TrialRecords, lock: int) -> None:
        """Start the process. It inherits the lock, and keeps it even if this command is killed."""
        self.trial = trial
        self.lock = os.fdopen(os.dup(lock), "rb")  # the caller closes its own descriptor
        self.stopped = False
        self._started = time.monotonic()
        self._kill_at = math.inf
        sweep = records.sweep
        # Two processes with one thread each train more tiles than one process with two threads.
        threads = {"OMP_NUM_THREADS": "1"} if sweep.on_cpu(trial.values) else {}
        # Unbuffered output: after a kill, the log holds every line. W&B shows the runs of a group together.
        environment = {
            **threads,
            **sweep.environment,
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "WANDB_RUN_GROUP": sweep.name,
        }
        with open(records.log_path(trial.run_id), "ab") as log:
            self._process = subprocess.Popen(
                sweep.command_line({**trial.values, "run_id": trial.run_id, "output_dir": records.output_dir}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[self.lock.fileno()],
                # Ctrl-C reaches this command alone: a trial that gets it, and then SIGTERM, cannot save its state.
                process_group=0,
            )

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def stop(self) -> None:
        """Send SIGTERM, but only once: a second one would end the process before it has saved its state."""
        if not self.stopped:
            self.stopped = True
            self._process.terminate()
            self._kill_at = time.monotonic() + PATIENCE

    def status(self) -> int | None:
        """The exit status; None while the process runs. Kills it where `stop` has not ended it in time."""
        if time.monotonic() > self._kill_at:
            self._process.kill()
        return self._process.poll()


class Workers(ExitStack):
    """The trials that this command runs at the same time, and a progress bar; leaving the `with` block stops them.

    The block adds to `running`. Ctrl-C and SIGTERM end it only in `wait`: so every started process is stopped.
    """

    def __init__(self, name: str, total: int, unit: str) -> None:
        super().__init__()
        self.running: list[Running] = []
        self.bar = self.enter_context(tqdm(total=total, desc=name, unit=unit, disable=None))
        self._interruption = self.enter_context(Interruption())
        self.callback(self._stop_all)

    def _stop_all(self) -> None:
        for running in self.running:
            running.stop()
        while any(running.status() is None for running in self.running):
            time.sleep(BLINK)
        for running in self.running:
            running.lock.close()

    def print(self, line: str) -> None:
        """Print a line above the progress bar, and flush it: users read a sweep's output while it runs."""
        self.bar.write(line)
        sys.stdout.flush()

    def wait(self) -> list[tuple[Running, int]]:
        """The trials that have ended, with their exit status, after POLL seconds at most.

        Raises Stopped after Ctrl-C or SIGTERM.
        """
        until = time.monotonic() + POLL
        while all(running.status() is None for running in self.running) and time.monotonic() < until:
            time.sleep(BLINK)
        ended = [(running, status) for running in self.running if (status := running.status()) is not None]
        if self._interruption.came:
            raise self._interruption.error("the sweep ended early")
        for running, _ in ended:
            self.running.remove(running)
        return ended

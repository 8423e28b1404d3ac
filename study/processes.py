"""Train the runs of a sweep, each in a process of its own, several at the same time."""

import os
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from common.cli import Fault
from common.records.read import is_finished, read_json, run_folder
from common.records.run import check_same
from study.interruption import Interruption
from study.sweep_spec import Sweep

BLINK = 0.1  # seconds between two looks at a process
WAIT = 1.0  # seconds between two looks at a run that another command trains
PATIENCE = 30.0  # seconds from SIGTERM to SIGKILL


@dataclass(frozen=True)
class Run:
    """One run that a sweep trains: its id, the values that make it differ from the others, and its command."""

    run_id: str
    values: Mapping[str, Any]
    command: Sequence[str]


def planned(sweep: Sweep, run_id: str, values: Mapping[str, Any], output_dir: Path) -> Run:
    """A run of the sweep with these values.

    Raises UsageError where the program refuses them, or where the run's folder has records of other values.
    """
    config = sweep.config({**values, "run_id": run_id})
    facts = run_folder(output_dir, run_id) / "config.json"
    if facts.exists():
        remedy = "use another --output_dir, or another name in the sweep file"
        check_same(config, read_json(facts)["config"], remedy)
    return Run(run_id, values, sweep.command_line({**values, "run_id": run_id, "output_dir": output_dir}))


class Processes(Interruption):
    """Trains runs, each in a process of its own with a log file; Ctrl-C and SIGTERM end all of them.

    Use it as a context manager. Its methods may be called from several threads.
    """

    def __init__(self, output_dir: Path, logs: Path, environment: Mapping[str, str]) -> None:
        self.output_dir, self.logs = output_dir, logs
        # Unbuffered output: after a kill, a log holds every line. What the user has set stays.
        self._environment = {**environment, **os.environ, "PYTHONUNBUFFERED": "1"}

    def train(self, run: Run, watch: Callable[[], bool] = lambda: False) -> int:
        """Train a run and return its exit status; as soon as `watch` is true, end it by SIGTERM.

        Raises Stopped after Ctrl-C or SIGTERM.
        """
        self.check()
        self.logs.mkdir(parents=True, exist_ok=True)
        with open(self.log(run), "ab") as log:
            # A process group of its own: Ctrl-C reaches this command alone, which then ends each run once.
            process = subprocess.Popen(
                run.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                process_group=0,
            )
        try:
            while process.poll() is None and not self.came and not watch():
                time.sleep(BLINK)
        finally:
            process.terminate()  # does nothing where it has ended
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.check()
        return process.returncode

    def check(self) -> None:
        """Raise Stopped after Ctrl-C or SIGTERM."""
        if self.came:
            raise self.error("the sweep ended early")

    def is_running(self, run: Run) -> bool:
        """Whether some process trains this run: one of another command, or one whose command was killed."""
        path = run_folder(self.output_dir, run.run_id) / ".lock"
        if not path.exists():
            return False
        try:
            FileLock(path).acquire(blocking=False).lock.release()
        except Timeout:
            return True
        return False

    def is_finished(self, run: Run) -> bool:
        """Whether the run's records are complete."""
        return is_finished(self.output_dir, run.run_id)

    def log(self, run: Run) -> Path:
        """The file with the output of a run's process."""
        return self.logs / f"{run.run_id}.log"

    def failure(self, run: Run, status: int) -> str:
        """Why a run failed, in one line: the last line of its log."""
        lines = self.log(run).read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")
        return f"FAILED with exit status {status}: {last} (log: {self.log(run)})"


def train_all(runs: Sequence[Run], processes: Processes, n_workers: int) -> list[str]:
    """Train the runs that are not finished, `n_workers` at the same time; returns the ids of those that failed.

    A run that another command trains comes last: by then it has finished, or this command takes it over.
    """
    left = deque(run for run in runs if not processes.is_finished(run))
    print(f"{len(runs)} runs, {len(runs) - len(left)} of them finished; logs: {processes.logs}", flush=True)
    failed: list[str] = []

    def work() -> None:
        while left:
            try:
                run = left.popleft()
            except IndexError:  # another worker took the last one
                return
            started, status = time.monotonic(), None
            if not processes.is_finished(run) and not processes.is_running(run):
                status = processes.train(run)
            if processes.is_finished(run):
                outcome = "finished"
            elif status is None or processes.is_running(run):  # another command was faster
                left.append(run)
                processes.check()
                time.sleep(WAIT)
                continue
            else:
                outcome = processes.failure(run, status)
                failed.append(run.run_id)
            print(f"{run.run_id}: {outcome} ({time.monotonic() - started:.0f} s)", flush=True)

    with processes, ThreadPoolExecutor(n_workers) as pool:
        try:
            for worker in [pool.submit(work) for _ in range(n_workers)]:
                worker.result()
        finally:  # after an error, the other workers start no further runs
            left.clear()
    return failed


def failed_runs(run_ids: Sequence[str]) -> Fault:
    """The error that names the runs which failed; they are not finished, so the next command runs them."""
    return Fault(f"{', '.join(run_ids)} failed: see their logs; the same command tries them again")

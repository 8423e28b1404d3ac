"""Train runs, each in a process of its own, several at the same time."""

import fcntl
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from joblib import cpu_count

from common.cli import Fault
from common.records.read import is_finished
from common.training.device import Compute

PAUSE = 0.5  # seconds between two looks at the processes


def workers(device: str) -> tuple[int, dict[str, str]]:
    """How many runs to train at the same time on the device of a key `device`, and their environment.

    On a CPU, two processes with one thread each train more tiles than one process with two threads.
    """
    if Compute.of(device, "fp32").device.type == "cpu":
        return cpu_count(only_physical_cores=True), {"OMP_NUM_THREADS": "1"}
    return 1, {}


@dataclass
class Processes:
    """The processes of this command that train runs in `output_dir`; their output is appended to logs/ID.log."""

    output_dir: Path
    logs: Path
    environment: Mapping[str, str]  # what the user has set stays
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = field(default_factory=dict)  # by run id
    failed: list[str] = field(default_factory=list)  # the ids of runs that the next command tries again

    @contextmanager
    def ended_together(self) -> Iterator[None]:
        """At the end of the context, also by Ctrl-C or SIGTERM, end all processes by SIGTERM.

        Raises Fault where runs have failed.
        """
        self.logs.mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            for process, _ in self.running.values():
                process.terminate()
            for process, _ in self.running.values():
                process.wait()
        if self.failed:
            raise Fault(f"{', '.join(self.failed)} failed: see their logs; the same command tries them again")

    def start(self, run_id: str, command: Sequence[str]) -> bool:
        """Start a run's process. False if the run has finished, or if a process (of any command) trains it.

        The process inherits the lock of its log: it lasts as long as the process, even if this command is killed.
        """
        path = self.logs / f"{run_id}.log"
        with open(path, "ab") as log:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            if is_finished(self.output_dir, run_id):
                return False
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self.environment, **os.environ, "PYTHONUNBUFFERED": "1"},  # after a kill, no line is lost
                process_group=0,  # Ctrl-C reaches this command alone, which then ends each run once
            )
        self.running[run_id] = process, time.monotonic()
        print(f"{run_id}: started (log: {path})", flush=True)
        return True

    def ended(self) -> Iterator[tuple[str, int, str]]:
        """Wait a moment; then run id, exit status and outcome in words of each process that has ended."""
        time.sleep(PAUSE)
        for run_id, (process, started) in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[run_id]
            outcome = "finished"
            if not is_finished(self.output_dir, run_id):
                log = self.logs / f"{run_id}.log"
                *_, last = log.read_text(encoding="utf-8", errors="replace").splitlines() or ["it wrote nothing"]
                outcome = f"FAILED with exit status {process.returncode}: {last} (log: {log})"
            yield run_id, process.returncode, f"{outcome} ({time.monotonic() - started:.0f} s)"


def train_all(runs: Mapping[str, Sequence[str]], processes: Processes, n_workers: int) -> None:
    """Train the runs (by id) that are not finished, `n_workers` at the same time. Raises Fault where some fail.

    A run that another command trains is waited for, and taken over if it fails there.
    """
    left = [run_id for run_id in runs if not is_finished(processes.output_dir, run_id)]
    print(f"{len(runs)} runs, {len(runs) - len(left)} of them finished; logs: {processes.logs}", flush=True)
    with processes.ended_together():
        while n_workers and (left or processes.running):
            for run_id in list(left):
                free = len(processes.running) < n_workers
                if is_finished(processes.output_dir, run_id) or (free and processes.start(run_id, runs[run_id])):
                    left.remove(run_id)
            for run_id, _, outcome in processes.ended():
                print(f"{run_id}: {outcome}", flush=True)
                if not is_finished(processes.output_dir, run_id):
                    processes.failed.append(run_id)

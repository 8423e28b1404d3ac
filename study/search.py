"""Search a sweep's parameters with Optuna: all workers share one journal file or one database."""

import json
import math
import os
import re
import socket
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from common.errors import Fault, Untrainable, UsageError, first_line
from study.sweep_file import Range, Sweep
from study.trials import Running, Trial, TrialRecords, Workers, failed_runs, locked

ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
MAX_FAILURES = 3  # then the machine is broken, for example its disk is full: a command starts no other trial
HEARTBEAT = 60  # seconds between two signs of life of a trial in a database
GRACE = 600  # seconds without a sign of life, after which other machines repeat a trial


class Search:
    """A search and its trials, as this command sees them.

    Optuna's storage is a journal file in the sweep's folder, and commands that share the folder share the search.
    Or it is a database, for commands on several machines, each with a folder for itself. A command continues the
    trials that a killed command left in the same folder. With a database, a trial of a machine that is lost is
    repeated by another machine after GRACE seconds.
    """

    def __init__(self, records: TrialRecords, url: str | None = None) -> None:
        """Create or open the search. UsageError where it was started with other parameters, or for a bad URL."""
        self.records = records
        self.failed: list[str] = []  # trials that this command could not finish, and not by their configuration
        self._database: RDBStorage | None = None
        self._owner = ""  # whose folder a trial's records and locks are in; a journal has only one folder
        self._beats: dict[int, float] = {}  # trial → time of its last heartbeat
        records.folder.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.filterwarnings("ignore", "Heartbeat of storage")  # this module sends them
        with locked(records.folder / "search.lock", wait=True):
            if url is None:
                self.study = self._create(JournalStorage(_Journal(records.folder / "search.journal")))
            else:
                self._database = _open_database(url, self._repeat)
                self._owner = f"{socket.gethostname()}:{records.folder.resolve()}"
                self.study = self._create(self._database)
            self._check_space()

    def _create(self, storage: JournalStorage | RDBStorage) -> optuna.Study:
        sweep = self.records.sweep
        pruner: BasePruner = NopPruner()
        if sweep.min_iter is not None:  # W&B's hyperband with `min_iter` is one bracket of successive halving
            pruner = SuccessiveHalvingPruner(min_resource=sweep.min_iter, reduction_factor=sweep.eta)
        return optuna.create_study(
            storage=storage,
            study_name=sweep.name,
            direction="maximize" if sweep.maximize else "minimize",
            pruner=pruner,
            load_if_exists=True,
        )

    def _check_space(self) -> None:
        sweep = self.records.sweep
        fixed = {name: value for name, value in sweep.fixed.items() if name not in sweep.per_machine()}
        space = {"metric": sweep.metric, "fixed": fixed, "swept": str(dict(sweep.swept))}
        other_goal = sweep.maximize != (self.study.direction == StudyDirection.MAXIMIZE)
        if other_goal or self.study.user_attrs.get("space", space) != space:
            raise UsageError(
                f"search {sweep.name} was started with other parameters: use another --output_dir, or another "
                "name in the sweep file"
            )
        self.study.set_user_attr("space", space)

    def trials(self) -> list[FrozenTrial]:
        """The trials of all commands and of earlier starts, without those that another machine repeats."""
        trials = self.study.get_trials(deepcopy=False)
        repeated = {trial.user_attrs.get("repeats") for trial in trials}
        return [trial for trial in trials if trial.number not in repeated]

    def ended(self) -> list[FrozenTrial]:
        """Those of `trials` that have ended."""
        return [trial for trial in self.trials() if trial.state in ENDED]

    def run(self, count: int, n_workers: int) -> None:
        """Run trials until `count` have ended, including those of other commands and of earlier starts.

        Raises Fault naming the trials that failed, unless their configuration was the reason: the next command
        tries these again.
        """
        asked: dict[str, optuna.Trial] = {}
        with _one_line_for_the_database(), Workers(self.records.sweep.name, count, " trials") as workers:
            while True:
                ended = self.ended()
                workers.bar.update(len(ended) - workers.bar.n)
                left = count - len(ended) - len(self.failed) if len(self.failed) < MAX_FAILURES else 0
                if left <= 0 and not workers.running:
                    break
                while left > 0 and len(workers.running) < n_workers:
                    with self._next_trial(count) as found:
                        if found is None:
                            break  # other commands run the last ones; if one is killed, this command continues it
                        optuna_trial, lock = found
                        trial = Trial(self.run_id(optuna_trial), _suggest(optuna_trial, self.records.sweep))
                        if self.records.is_finished(trial):  # its process outlived the command that started it
                            workers.print(f"{trial.run_id}: {self._end(optuna_trial, trial)}")
                            left -= 1
                        else:
                            asked[trial.run_id] = optuna_trial
                            workers.running.append(Running(trial, self.records, lock))
                for running, status in workers.wait():
                    trial = running.trial
                    with running.lock:
                        outcome = self._end(asked[trial.run_id], trial, status, pruned=running.stopped)
                    workers.print(f"{trial.run_id}: {outcome} ({running.seconds:.0f} s)")
                self._send_heartbeats([asked[running.trial.run_id] for running in workers.running])
                for running in workers.running:
                    run_id = running.trial.run_id
                    if self._report(asked[run_id], self.records.history(run_id)):
                        running.stop()
        if self.failed:
            raise failed_runs(self.failed)
        if all(trial.state == TrialState.FAIL for trial in ended):
            raise Fault(f"all {len(ended)} trials failed")

    def run_id(self, trial: optuna.Trial | FrozenTrial) -> str:
        """The id of a trial's run."""
        return f"{self.records.sweep.name}-{trial.number}"

    @contextmanager
    def _next_trial(self, count: int) -> Iterator[tuple[optuna.Trial, int] | None]:
        """Yield a trial that a command left, else a new one, with its lock; None where others run the last ones.

        In a folder, only one command at a time does this. So no command sees a new trial before its lock is taken.
        """
        with locked(self.records.folder / "search.lock", wait=True), self._left_trial() as left:
            if left is not None:
                yield left
                return
            fail_stale_trials(self.study)  # calls self._repeat for each
            if len(self.trials()) < count:
                self._add(self._sample(), {})
            with self._left_trial() as new:
                yield new

    @contextmanager
    def _left_trial(self) -> Iterator[tuple[optuna.Trial, int] | None]:
        """Yield a trial of this folder that no process runs, with its lock."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.user_attrs["owner"] == self._owner and self.run_id(trial) not in self.failed:
                with locked(self.records.lock_path(self.run_id(trial))) as lock:
                    if lock is not None:
                        yield optuna.Trial(self.study, trial._trial_id), lock
                        return
        yield None

    def _add(self, values: FrozenTrial, attributes: Mapping[str, Any]) -> None:
        """Add a trial of this folder with the values of another one, in one write: after a kill it is whole."""
        new = optuna.create_trial(
            state=TrialState.RUNNING,
            params=values.params,
            distributions=values.distributions,
            user_attrs={"owner": self._owner, **attributes},
        )
        self.study.add_trial(new)

    def _repeat(self, _: optuna.Study, lost: FrozenTrial) -> None:
        """Add a trial in the place of one whose machine is lost."""
        self._add(lost, {"repeats": lost.number})

    def _sample(self) -> FrozenTrial:
        """A trial with the values to try next, by the sweep's method.

        The seed is the trial's number: so kills do not change the samples, and each trial has other ones. Machines
        that sample at the same time have different seeds.
        """
        trials = self.study.get_trials(deepcopy=False)
        seed = zlib.crc32(f"{len(trials)} {self._owner}".encode())
        sampler: BaseSampler = RandomSampler(seed=seed)
        if self.records.sweep.method == "bayes":  # constant liar: trials at the same time try different values
            sampler = TPESampler(seed=seed, constant_liar=True)
        in_memory = optuna.create_study(direction=self.study.direction, sampler=sampler)
        in_memory.add_trials(trials)
        _suggest(in_memory.ask(), self.records.sweep)
        return in_memory.trials[-1]

    def _end(self, optuna_trial: optuna.Trial, trial: Trial, status: int = 0, pruned: bool = False) -> str:
        """Tell Optuna how a trial ended, unless it is to be tried again; returns the outcome in words."""
        records = self.records
        self._report(optuna_trial, records.history(trial.run_id))  # the epochs since the last report
        best = records.best(trial.run_id)
        if records.is_finished(trial) and best is not None:
            self.study.tell(optuna_trial, best, skip_if_finished=True)
            return records.outcome(trial.run_id, "finished")
        if pruned:
            self.study.tell(optuna_trial, state=TrialState.PRUNED, skip_if_finished=True)
            return records.outcome(trial.run_id, "pruned")
        if status in (UsageError.exit_status, Untrainable.exit_status):  # every attempt would end like this
            self.study.tell(optuna_trial, state=TrialState.FAIL, skip_if_finished=True)
        else:
            self.failed.append(trial.run_id)
        return records.failure(trial.run_id, status)

    def _report(self, optuna_trial: optuna.Trial, history: dict[int, float]) -> bool:
        """Report each new epoch to Optuna; returns whether the trial is to be stopped."""
        known = self.study.get_trials(deepcopy=False)[optuna_trial.number]
        if known.state != TrialState.RUNNING:  # this machine gave no sign of life, and another one repeats it
            return True
        prune = False
        for epoch in sorted(history.keys() - known.intermediate_values.keys()):
            optuna_trial.report(history[epoch], epoch)
            prune |= optuna_trial.should_prune()
        return prune

    def _send_heartbeats(self, trials: Sequence[optuna.Trial]) -> None:
        if self._database is None:
            return
        for trial in trials:
            if time.monotonic() > self._beats.get(trial.number, -math.inf) + HEARTBEAT:
                self._database.record_heartbeat(trial._trial_id)
                self._beats[trial.number] = time.monotonic()


def _open_database(url: str, repeat: Callable[[optuna.Study, FrozenTrial], None]) -> RDBStorage:
    """Optuna's tables in the database at `url`; UsageError where it cannot be opened."""
    until = time.monotonic() + 10
    while True:
        try:
            return RDBStorage(
                url,
                heartbeat_interval=HEARTBEAT,
                grace_period=GRACE,
                heartbeat_stale_trial_callback=repeat,
            )
        except Exception as error:  # of Optuna, SQLAlchemy, or the database's driver
            # Another machine may be creating the tables at this moment.
            at_once = re.search("already exists|duplicate key|UNIQUE constraint", str(error))
            if not at_once or time.monotonic() > until:
                reason = first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
                raise UsageError(f"--storage: no database can be opened: {reason}") from None
        time.sleep(0.2)


@contextmanager
def _one_line_for_the_database() -> Iterator[None]:
    try:
        yield
    except StorageInternalError as error:
        raise Fault(f"the search's database: {first_line(error)}; the same command continues") from error


class _Journal(JournalFileBackend):
    """Optuna's journal file, with a lock that the kernel releases when its process ends.

    Optuna's own lock is a symbolic link that stays after a kill. Then the next process waits for 30 seconds or, if
    the journal's path is relative, forever.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append each log as a line of JSON; OSError with the file's name where the disk is full."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        try:
            with locked(self._path.with_name("journal.lock"), wait=True), open(self._path, "r+b") as file:
                # A full disk or a kill may have left part of a line: remove it before appending.
                file.truncate(file.read().rfind(b"\n") + 1)
                file.seek(0, os.SEEK_END)
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            error.filename = error.filename or str(self._path)
            raise


def _suggest(trial: optuna.Trial, sweep: Sweep) -> dict[str, Any]:
    """The trial's values: those that it has, or new samples."""
    chosen: dict[str, Any] = {}
    for name, values in sweep.swept.items():
        if not isinstance(values, Range):
            chosen[name] = trial.suggest_categorical(name, values)
        elif values.distribution == "int_uniform":
            chosen[name] = trial.suggest_int(name, int(values.low), int(values.high))
        else:
            log = values.distribution == "log_uniform_values"
            chosen[name] = trial.suggest_float(name, values.low, values.high, log=log)
    return chosen

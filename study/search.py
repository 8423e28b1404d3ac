"""Search a sweep's parameters with Optuna; the commands that share a search share its database."""

import shlex
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from filelock import FileLock
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

from common.cli import Fault, Stopped, Untrainable, UsageError, first_line
from common.files import public, write_text
from common.records.read import is_finished, read_history, read_json, run_folder
from study.processes import WAIT, Processes, failed_runs, planned
from study.sweep_spec import Sweep
from study.sweep_tables import Ended, ranked, search_table

HEARTBEAT = 60  # seconds between two signs of life of a trial
GRACE = 180  # seconds without a sign of life, after which a trial is tried again
MAX_FAILURES = 3  # then the machine is broken, for example its disk is full: a command starts no other trial
REFUSED = "refused"  # marks a failed trial whose configuration was the reason: it is not tried again

warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats
try_again = RetryHeartbeatStaleTrialCallback()


class Failed(Exception):
    """A trial failed; the search goes on."""


def search(sweep: Sweep, processes: Processes, count: int, n_workers: int, storage: str | None) -> None:
    """Run trials until `count` have ended, those of other commands included, and write their table.

    Without workers, only write the table. Raises Fault naming the trials that failed for another reason than their
    configuration: the next command tries these again. UsageError where the search had other parameters.
    """
    file = processes.logs / "search.db"
    with _one_line(storage or str(file)):
        study = _open(sweep, storage or f"sqlite:///{file.absolute()}", file)
        objective = Objective(study, sweep, processes)
        if n_workers:
            objective.run(count, n_workers)
        ended = [objective.ended(trial) for trial in ended_trials(study)]
    if ended:
        _write(sweep, ranked(sweep, ended), processes.logs)
    if objective.failed:
        raise failed_runs(objective.failed)
    if not ended:
        raise UsageError(f"no trial of {sweep.name} has ended yet")
    if all(trial.state == "failed" for trial in ended):
        raise Fault(f"all {len(ended)} trials failed")


def ended_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that have ended, but for those that are tried again."""
    trials = study.get_trials(deepcopy=False)
    done = (TrialState.COMPLETE, TrialState.PRUNED)
    return [trial for trial in trials if trial.state in done or REFUSED in trial.user_attrs]


class Objective:
    """Trains the trials of a search. `failed` names those that failed, but not by their configuration."""

    def __init__(self, study: optuna.Study, sweep: Sweep, processes: Processes) -> None:
        self.study, self.sweep, self.processes = study, sweep, processes
        self.failed: list[str] = []

    def run(self, count: int, n_workers: int) -> None:
        """Run trials until `count` have ended."""

        def left() -> int:
            running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            return count - len(ended_trials(self.study)) - len(running)

        def stop_in_time(study: optuna.Study, trial: FrozenTrial) -> None:
            if left() <= 0 or len(self.failed) >= MAX_FAILURES:
                study.stop()

        with self.processes:
            while len(ended_trials(self.study)) < count and len(self.failed) < MAX_FAILURES:
                fail_stale_trials(self.study)
                if (missing := left()) > 0:
                    # `n_trials` is exact for this command; the callback sees the trials of others.
                    n_jobs = min(n_workers, missing)
                    self.study.optimize(self, missing, n_jobs=n_jobs, catch=(Failed,), callbacks=[stop_in_time])
                else:  # other commands run the last ones; if one is killed, this command continues its trial
                    self.processes.check()
                    time.sleep(WAIT)

    def __call__(self, trial: optuna.Trial) -> float:
        """The best value of the metric over the epochs. Raises TrialPruned, Failed, and Stopped after Ctrl-C."""
        started, processes = time.monotonic(), self.processes
        run_id = self.run_id(self._frozen(trial))
        values = {name: parameter.suggest(trial, name) for name, parameter in self.sweep.swept.items()}
        try:
            self.sweep.config(values)
        except UsageError as error:  # swept values that exclude each other
            raise self._refused(trial, f"{run_id}: FAILED: {error}") from None
        run = planned(self.sweep, run_id, values, processes.output_dir)
        reported, pruned = 0, False

        def report() -> bool:
            nonlocal reported, pruned
            history = self.history(run_id)
            for epoch in sorted(history)[reported:]:
                reported = epoch
                trial.report(history[epoch], epoch)
                pruned = pruned or trial.should_prune()
            return pruned

        try:
            while processes.is_running(run):  # its command was killed
                processes.check()
                time.sleep(WAIT)
            status = 0 if processes.is_finished(run) else processes.train(run, report)
        except Stopped:
            try_again(self.study, self._frozen(trial))
            raise
        report()  # the last epochs
        best = self.sweep.best(self.history(run_id).values())
        value = "" if best is None else f", {self.sweep.metric_name} {best:.4f}"
        seconds = f"({time.monotonic() - started:.0f} s)"
        if processes.is_finished(run) and best is not None:
            print(f"{run_id}: finished{value} {seconds}", flush=True)
            return best
        if pruned:
            print(f"{run_id}: pruned{value} {seconds}", flush=True)
            raise optuna.TrialPruned
        line = f"{run_id}: {processes.failure(run, status)} {seconds}"
        if status in (UsageError.exit_status, Untrainable.exit_status):  # every attempt would end like this
            raise self._refused(trial, line)
        print(line, flush=True)
        self.failed.append(run_id)
        try_again(self.study, self._frozen(trial))
        raise Failed

    def _frozen(self, trial: optuna.Trial) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[trial.number]

    def _refused(self, trial: optuna.Trial, line: str) -> Failed:
        print(line, flush=True)
        trial.set_user_attr(REFUSED, True)
        return Failed()

    def run_id(self, trial: FrozenTrial) -> str:
        """The id of a trial's run; a trial that is tried again continues the run of the first attempt."""
        first = try_again.retried_trial_number(trial)
        return f"{self.sweep.name}-{trial.number if first is None else first}"

    def history(self, run_id: str) -> dict[int, float]:
        """The metric of each epoch until now; Fault where the program does not record it."""
        path = run_folder(self.processes.output_dir, run_id) / "history.csv"
        rows = read_history(path) if path.exists() else []
        if rows and self.sweep.metric_name not in rows[0]:
            raise Fault(f"{path} has no column {self.sweep.metric_name}, the sweep's metric")
        return {int(row["epoch"]): row[self.sweep.metric_name] for row in rows}

    def ended(self, trial: FrozenTrial) -> Ended:
        """A trial by its run's own records; what Optuna knows of it only fills in what these lack."""
        run_id, params, dataset = self.run_id(trial), trial.params, None
        path = run_folder(self.processes.output_dir, run_id) / "config.json"
        if path.exists():
            facts = read_json(path)
            params, dataset = {name: facts["config"][name] for name in self.sweep.swept}, facts["dataset"]
        here = "finished" if is_finished(self.processes.output_dir, run_id) else "elsewhere"
        state = {TrialState.COMPLETE: here, TrialState.PRUNED: "pruned"}.get(trial.state, "failed")
        return Ended(run_id, state, params, self.history(run_id), dataset)


def _write(sweep: Sweep, trials: list[Ended], folder: Path) -> None:
    """Write table.md, and print where they are and how to train the best trial's configuration."""
    text = search_table(sweep, trials)
    if trials[0].state == "finished":
        command = shlex.join(["python", sweep.program, *sweep.recipe(trials[0].params)])
        text += ["", f"The best trial's configuration, on all training tiles: `{command}`"]
        print(text[-1])
    write_text(folder / "table.md", "\n".join(text) + "\n")
    print(f"{sweep.name}: {len(trials)} trials, the best one first: {folder / 'table.md'}", flush=True)


def _open(sweep: Sweep, url: str, file: Path) -> optuna.Study:
    """Create or open the search in the database at `url`. UsageError where it had other parameters."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        place = sqlalchemy.make_url(url)
        place.get_dialect()
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        raise UsageError(f"--storage: {first_line(error)}") from None
    path = Path(place.database or "")
    if place.drivername.startswith("sqlite") and path.exists() and not path.is_file():
        raise UsageError(f"{path}: a search's database must be a regular file")
    pruner: BasePruner = NopPruner()
    if early := sweep.early_terminate:  # W&B's hyperband with `min_iter` is one bracket of successive halving
        pruner = SuccessiveHalvingPruner(min_resource=early.min_iter, reduction_factor=early.eta)
    # Constant liar: trials at the same time try different values.
    sampler: BaseSampler = TPESampler(constant_liar=True) if sweep.method == "bayes" else RandomSampler()
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):  # two commands that start together must not both create the tables
        storage = RDBStorage(
            url, heartbeat_interval=HEARTBEAT, grace_period=GRACE, heartbeat_stale_trial_callback=try_again
        )
        if place.drivername.startswith("sqlite"):  # else two workers could take the same waiting trial
            sqlalchemy.event.listen(storage.engine, "connect", _leave_begin_to_us)
            sqlalchemy.event.listen(storage.engine, "begin", _lock_at_begin)
            storage.engine.dispose()
        study = optuna.create_study(
            storage=storage,
            study_name=sweep.name,
            direction="maximize" if sweep.maximize else "minimize",
            sampler=sampler,
            pruner=pruner,
            load_if_exists=True,
        )
        if study.user_attrs.get("space", sweep.space) != sweep.space:
            raise UsageError(
                f"search {sweep.name} was started with other parameters: use another --output_dir, or another "
                "name in the sweep file"
            )
        study.set_user_attr("space", sweep.space)
    return study


def _leave_begin_to_us(connection: Any, _: Any) -> None:
    connection.isolation_level = None


def _lock_at_begin(connection: Any) -> None:
    """Lock a SQLite database for a whole transaction, as SQLAlchemy's documentation of SQLite recommends."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")


@contextmanager
def _one_line(place: str) -> Iterator[None]:
    """Turn an error of the database at `place`, which may have any type, into one line that names it."""
    try:
        yield
    except (UsageError, Fault, Stopped, OSError):
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        what = f"{type(cause).__name__}: {first_line(cause)}"
        raise Fault(
            f"{public(place)}: the search's database cannot be read or written ({what}); the same command tries "
            "again; if the file is damaged, restore it, or search with another --output_dir"
        ) from error

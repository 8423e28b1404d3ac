"""Run a W&B sweep file without an account: every run of a grid, or the trials of a search.

    python -m study.sweep ablation.yaml             # a grid: every combination; study.report makes its table
    python -m study.sweep sweep.yaml --count 30     # a search: 30 trials, then their ranking
    python -m study.sweep ablation.yaml --output_dir try -- --dataset=phantom --size=28   # keys for every run

After a kill, the same command skips the finished runs and resumes the others from their checkpoints. A second
command at the same time shares the work. So with several GPUs, start one command for each, the second one with
CUDA_VISIBLE_DEVICES=1. output_dir/sweeps/<name>/ holds logs, and of a search Optuna's journal and the table.
"""

import itertools
import math
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import optuna
from filelock import FileLock
from optuna import pruners, samplers
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from common.cli import BOOKKEEPING, Fault, Keys, Untrainable, UsageError, first_line, key, run_script
from common.files import public, write_text
from common.markdown import markdown_table, text
from common.records.read import checkpoint_folder, is_finished, read_history, read_json, run_folder
from common.records.run import check_same
from study.processes import Processes, train_all, workers
from study.sweep_spec import Sweep, read_sweep

REMEDY = "use another --output_dir, or another name in the sweep file"


class SweepConfig(Keys):
    """The keys of a sweep; those of its runs are in its file."""

    unknown_key: ClassVar[str] = "keys of the runs come after --, as in `-- --size=28`"

    file: tuple[str, ...] = key((), "the sweep's YAML file; then, after --, keys for every run", positional=True)
    count: int = key(20, "trials of a search, of all workers together; a grid ignores it", ge=1, le=10_000)
    workers: int | None = key(
        None, "runs at the same time; 0: only the table (default: 1; on a CPU one per physical core)", ge=0
    )
    output_dir: Path = key(Path("my"), "folder that gets sweeps/ and the runs' folders")


def grid(sweep: Sweep, output_dir: Path) -> dict[str, list[str]]:
    """The command of every combination of the values, in the file's order; but the seeds vary slowest.

    So the first runs give one seed of every row. A run's id consists of the sweep's name and the values. Raises
    UsageError where the program refuses a combination, or where a run's folder has records of other values.
    """
    axes = {name: parameter.values for name, parameter in sweep.swept.items()}
    if ranges := [name for name, values in axes.items() if not values]:
        raise UsageError(f"parameter {ranges[0]}: a grid needs values, not min and max")
    if sweep.early_terminate:
        raise UsageError("early_terminate: only the runs of a search are ended early")
    runs = {}
    order = sorted(axes, key=lambda name: name != "seed")  # stable
    for combination in itertools.product(*(axes[name] for name in order)):
        values = dict(zip(order, combination, strict=True))
        parts = [sweep.name, *(str(values[name]) for name in axes)]
        run_id = "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", part) for part in parts)
        config = sweep.config({**values, "run_id": run_id})
        if run_id in runs:
            raise UsageError(f"two combinations have the run id {run_id}: change one of the values")
        runs[run_id] = sweep.command_line({**values, "run_id": run_id, "output_dir": output_dir})
        if (path := run_folder(output_dir, run_id) / "config.json").exists():
            check_same(config, read_json(path, "config")["config"], REMEDY)
    return runs


class Search:
    """A search that has `count` trials in the end, those of other commands included. Trial N is the run NAME-N.

    The commands that share a folder share search.jsonl, Optuna's journal of the parameters, states and scores.
    """

    def __init__(self, sweep: Sweep, processes: Processes, count: int) -> None:
        """Open the journal. Fault where it is damaged, UsageError where the search has other parameters."""
        self.sweep, self.processes, self.count = sweep, processes, count
        self.file, early = processes.logs / "search.jsonl", sweep.early_terminate
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.file.with_suffix(".lock"))
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        # Constant liar: a trial without a value counts as a bad one, so trials at the same time differ.
        sampler = samplers.TPESampler(constant_liar=True) if sweep.method == "bayes" else samplers.RandomSampler()
        pruner = pruners.SuccessiveHalvingPruner(early.min_iter, early.eta) if early else pruners.NopPruner()
        with self.lock:
            before = self.file.read_bytes() if self.file.exists() else b""
            if before and not before.endswith(b"\n"):  # a full disk; Optuna would append to the torn line
                os.truncate(self.file, before.rfind(b"\n") + 1)
            try:
                self.study = optuna.create_study(
                    # With a relative path, Optuna would wait for ever for the lock of a killed command.
                    storage=JournalStorage(JournalFileBackend(str(self.file.resolve()))),
                    sampler=sampler,
                    pruner=pruner,
                    study_name=sweep.name,
                    direction=sweep.metric.goal,
                    load_if_exists=True,
                )
            except Exception as error:  # a damaged journal makes Optuna raise many types
                raise Fault(f"{self.file}: damaged ({first_line(error)}); restore it, or {REMEDY}") from error
        content = sweep.model_dump(mode="json", include={"program", "metric", "parameters"}, exclude_unset=True)
        content["parameters"] = {key: content["parameters"][key] for key in sweep.parameters.keys() - BOOKKEEPING}
        if self.study.user_attrs.get("content", content) != content:
            raise UsageError(f"search {sweep.name} was started with other parameters: {REMEDY}")
        self.study.set_user_attr("content", content)
        self.space = {name: parameter.for_optuna() for name, parameter in sweep.swept.items()}

    def run_id(self, number: int) -> str:
        """The id of a trial's run."""
        return f"{self.sweep.name}-{number}"

    def run(self, n_workers: int) -> None:
        """Train trials until none is left, and write their table; without workers, only write the table.

        Raises Fault naming the trials that failed for another reason than their configuration. UsageError where no
        trial has finished or failed.
        """
        with self.processes.ended_together():
            is_left = True
            while is_left:
                ended = list(self.processes.ended())
                with self.lock:
                    is_left = self.step(ended, n_workers) and n_workers > 0
            if not self.processes.failed or self.study.get_trials(states=[TrialState.COMPLETE]):
                self.write_table()

    def step(self, ended: Sequence[tuple[str, int, str]], n_workers: int) -> bool:
        """Note what has ended, stop what is hopeless, and start what is next. The caller has the lock.

        Returns whether a trial is left. Those of other commands count, too: such a command may be killed.
        """
        running, failed, left = self.processes.running, self.processes.failed, []
        statuses = {run_id: status for run_id, status, _ in ended}
        for trial in self.study.get_trials(states=[TrialState.RUNNING]):
            run_id = self.run_id(trial.number)
            handle = self.report(trial)
            if is_finished(self.processes.output_dir, run_id):
                self.study.tell(trial.number, self.best(trial.number))
            elif statuses.get(run_id) in (UsageError.exit_status, Untrainable.exit_status):
                self.study.tell(trial.number, state=TrialState.FAIL)  # every attempt would end like this
            elif run_id in running and handle.should_prune():  # only the command that trains it
                self.study.tell(trial.number, state=TrialState.PRUNED)
                running[run_id][0].terminate()
            elif run_id in statuses:
                failed.append(run_id)
            elif run_id not in (*failed, *running):
                left.append(handle)
        for run_id, _, outcome in ended:
            state = self.study.trials[int(run_id.rpartition("-")[2])].state
            if state == TrialState.PRUNED:
                outcome = "pruned"
                (checkpoint_folder(self.processes.output_dir, run_id) / "last.pt").unlink(missing_ok=True)
            print(f"{run_id}: {outcome}", flush=True)
        for number in range(len(self.study.trials), self.count if n_workers else 0):
            if (folder := run_folder(self.processes.output_dir, self.run_id(number))).exists():
                raise UsageError(f"{folder}: this run is not in {self.file}: {REMEDY}")
        for begun in left:
            if len(running) < n_workers:
                self.start(begun)
        while len(running) < n_workers and len(self.study.trials) < self.count:
            self.start(self.study.ask())
        return bool(running or left) or len(self.study.trials) < self.count

    def start(self, trial: optuna.Trial) -> None:
        """Start a trial's process, unless another command trains it.

        A killed command may have begun the trial without choosing all its values: they are chosen now.
        """
        run_id = self.run_id(trial.number)
        values = {name: trial._suggest(name, parameter) for name, parameter in self.space.items()}
        values |= {"run_id": run_id, "output_dir": self.processes.output_dir}
        self.processes.start(run_id, self.sweep.command_line(values))

    def report(self, trial: FrozenTrial) -> optuna.Trial:
        """Tell Optuna the epochs of a trial that have ended. Returns the trial for its `should_prune`.

        That is successive halving which does not wait for the other trials (Li et al., MLSys 2020).
        """
        handle = optuna.Trial(self.study, trial._trial_id)
        for epoch, score in enumerate(self.scores(trial.number), start=1):
            if epoch not in trial.intermediate_values:
                handle.report(score, epoch)
        return handle

    def scores(self, number: int) -> list[float]:
        """The metric after each epoch of a trial's run."""
        path = run_folder(self.processes.output_dir, self.run_id(number)) / "history.csv"
        return [row[self.sweep.metric.name] for row in (read_history(path) if path.exists() else [])]

    def best(self, number: int) -> float:
        """The best metric of a trial's epochs until now; before the first one, the worse infinity."""
        maximize = self.sweep.metric.goal == "maximize"
        scores = self.scores(number)
        return max(scores, default=-math.inf) if maximize else min(scores, default=math.inf)

    def write_table(self) -> None:
        """Write table.md, and print the command of the best trial.

        Scores and keys are those of the runs' records; the journal only says which trials there are, and their
        states: `pruned` means ended by early termination, `fail` an impossible configuration. There are no test
        scores: nobody may choose a trial by them.
        """
        name, table, output_dir = self.sweep.name, self.processes.logs / "table.md", self.processes.output_dir
        trials = sorted(self.study.trials, key=lambda trial: self.best(trial.number))
        trials = trials[::-1] if self.sweep.metric.goal == "maximize" else trials
        trials.sort(key=lambda trial: trial.state != TrialState.COMPLETE)  # keeps that order otherwise
        if not trials or trials[0].state != TrialState.COMPLETE:
            raise UsageError(f"no trial of {name} has finished: see the logs in {self.processes.logs}")
        rows: list[list[str]] = []
        records: list[dict[str, Any]] = []
        for trial in trials:
            run_id, state, scores = self.run_id(trial.number), trial.state.name.lower(), self.scores(trial.number)
            path = run_folder(output_dir, run_id) / "config.json"
            is_there = state == "complete" or path.exists()
            records.append(read_json(path, "config", "dataset") if is_there else {"config": trial.params})
            keys = [records[-1]["config"].get(key, "") for key in self.space]
            cells = [run_id, state, self.best(trial.number) if scores else "", len(scores), *keys]
            rows.append([f"{cell:.4g}" if isinstance(cell, float) else text(cell) for cell in cells])
        columns = ["run_id", "state", f"best {self.sweep.metric.name}", "epochs", *self.space]
        best = {key: records[0]["config"][key] for key in self.space}
        command = shlex.join(["python", *self.sweep.command_line(best)[1:]])
        lines = [f"**{name}**: {records[0]['dataset']}; {len(rows)} trials of a {self.sweep.method} search", ""]
        lines += [*markdown_table(columns, "l" * len(columns), rows), "", f"The best trial: `{command}`"]
        write_text(table, public("\n".join(lines) + "\n"))
        print(f"{lines[-1]}\n{len(rows)} trials, the best one first: {table}", flush=True)


def main(config: SweepConfig) -> None:
    """Sweep file → runs."""
    if not config.file:
        raise UsageError("which sweep? python -m study.sweep FILE.yaml")
    sweep = read_sweep(Path(config.file[0]), config.file[1:])
    n_workers, environment = workers(sweep.config({}).device)
    n_workers = n_workers if config.workers is None else config.workers
    environment |= {"WANDB_RUN_GROUP": sweep.name} | ({"WANDB_PROJECT": sweep.project} if sweep.project else {})
    folder = config.output_dir
    processes = Processes(folder, folder / "sweeps" / sweep.name, environment)
    if sweep.method != "grid":
        Search(sweep, processes, config.count).run(n_workers)
        return
    runs = grid(sweep, folder)
    train_all(runs, processes, n_workers)
    finished = sum(is_finished(folder, run_id) for run_id in runs)
    print(f"{finished} of {len(runs)} runs are finished; python -m study.report --output_dir {folder} shows them")


if __name__ == "__main__":
    run_script(main, SweepConfig)

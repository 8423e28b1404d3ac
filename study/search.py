"""Search a sweep's parameters with Optuna; the commands that share a folder share its search.

sweeps/<name>/search.json lists the trials: their parameters, and which of them were stopped early ("pruned") or
have an impossible configuration ("refused"). All else is read from the records of their runs.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from filelock import FileLock
from optuna import distributions, samplers
from optuna.trial import TrialState, create_trial

from common.cli import Untrainable, UsageError
from common.files import write_text
from common.markdown import markdown_table, text
from common.records.read import is_finished, read_history, read_json, run_folder
from study.processes import Processes, Run
from study.sweep_spec import Parameter, Sweep

STATES = ("finished", "pruned", "begun", "refused")  # of trials, in the order of the table
REMEDY = "use another --output_dir, or another name in the sweep file"


@dataclass
class Trial:
    """A trial: its run's id, its parameters, one of STATES, and the metric of each epoch until now."""

    run_id: str
    params: dict[str, Any]
    state: str
    values: list[float]


@dataclass
class Search:
    """A search that has `count` trials in the end, those of other commands included."""

    sweep: Sweep
    processes: Processes
    count: int

    def run(self, n_workers: int) -> None:
        """Train trials until none is left, and write their table; without workers, only write the table.

        Raises Fault naming the trials that failed, but not by their configuration. UsageError where the search had
        other parameters, or where no trial has finished.
        """
        self.file = self.processes.logs / "search.json"
        self.space = self.sweep.model_dump(mode="json", include={"metric", "parameters"}, exclude_unset=True)
        with self.processes.ended_together():
            is_left = n_workers > 0
            while is_left:
                ended = list(self.processes.ended())
                with FileLock(self.file.with_suffix(".lock")):
                    is_left = self.step(ended, n_workers)
        self.write_table()

    def step(self, ended: Sequence[tuple[str, int, str]], n_workers: int) -> bool:
        """Note what has ended, stop what is hopeless, and start what is next. The caller has the lock.

        Returns whether a trial is left, be it one of another command: that may be killed.
        """
        trials, running = self.trials(), self.processes.running
        for run_id, status, outcome in ended:
            trial = next(one for one in trials if one.run_id == run_id)
            if trial.state == "begun" and status in (UsageError.exit_status, Untrainable.exit_status):
                trial.state = "refused"  # every attempt would end like this
                self.save(trials)
            elif trial.state == "begun":
                self.processes.failed.append(run_id)
            score = f", {self.sweep.metric.name} {self.sweep.best(trial.values):.4f}" if trial.values else ""
            print(f"{run_id}: {'pruned' if trial.state == 'pruned' else outcome}{score}", flush=True)
        for trial in trials:
            if trial.state == "begun" and trial.run_id in running and self.is_hopeless(trial, trials):
                trial.state = "pruned"
                self.save(trials)
                running[trial.run_id][0].terminate()
        begun = [trial for trial in trials if trial.state == "begun" and trial.run_id not in self.processes.failed]
        for trial in begun:
            if len(running) < n_workers:
                self.start(trial)
        while len(running) < n_workers and len(trials) < self.count:
            run_id = f"{self.sweep.name}-{len(trials)}"
            if (folder := run_folder(self.processes.output_dir, run_id)).exists():
                raise UsageError(f"{folder}: this run is not in {self.file}: {REMEDY}")
            trials.append(Trial(run_id, self.ask(trials), "begun", []))
            self.save(trials)
            self.start(trials[-1])
        return bool(running or begun) or len(trials) < self.count

    def trials(self) -> list[Trial]:
        """The trials of search.json with what the records of their runs say."""
        content: Any = read_json(self.file) if self.file.exists() else {"space": self.space, "trials": []}
        if content["space"] != self.space:
            raise UsageError(f"search {self.sweep.name} was started with other parameters: {REMEDY}")
        trials = [Trial(**kept, values=[]) for kept in content["trials"]]
        for trial in trials:
            path = run_folder(self.processes.output_dir, trial.run_id) / "history.csv"
            rows = read_history(path) if path.exists() else []
            trial.values = [row[self.sweep.metric.name] for row in rows]
            if is_finished(self.processes.output_dir, trial.run_id):
                trial.state = "finished"
        return trials

    def save(self, trials: Sequence[Trial]) -> None:
        """Write search.json."""
        kept = [{"run_id": trial.run_id, "params": trial.params, "state": trial.state} for trial in trials]
        write_text(self.file, json.dumps({"space": self.space, "trials": kept}, indent=2) + "\n")

    def start(self, trial: Trial) -> None:
        """Start a trial's process, unless another command trains it."""
        values = {**trial.params, "run_id": trial.run_id, "output_dir": self.processes.output_dir}
        self.processes.start(Run(trial.run_id, trial.params, self.sweep.command_line(values)))

    def ask(self, trials: Sequence[Trial]) -> dict[str, Any]:
        """The parameters of a new trial, by Optuna; with the method bayes it learns from the trials until now."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        # Constant liar: a trial without a value counts as a bad one, so trials at the same time differ.
        bayes = self.sweep.method == "bayes"
        sampler = samplers.TPESampler(constant_liar=True) if bayes else samplers.RandomSampler()
        study = optuna.create_study(direction=self.sweep.metric.goal, sampler=sampler)
        space = {name: distribution(parameter) for name, parameter in self.sweep.swept.items()}
        for trial in trials:
            state, value = TrialState.RUNNING, None
            if trial.state in ("finished", "pruned"):  # a pruned one has the best value of its epochs
                state, value = TrialState.COMPLETE, self.sweep.best(trial.values)
            study.add_trial(create_trial(state=state, value=value, params=trial.params, distributions=space))
        return study.ask(space).params

    def is_hopeless(self, trial: Trial, trials: Sequence[Trial]) -> bool:
        """Whether it is at an epoch of early termination, and not among the best 1/eta of all that were there.

        This is successive halving that does not wait for the other trials (Li et al., MLSys 2020).
        """
        early, epoch = self.sweep.early_terminate, len(trial.values)
        if early is None or epoch not in [early.min_iter * early.eta**power for power in range(20)]:
            return False
        scores = [self.sweep.best(one.values[:epoch]) for one in trials if len(one.values) >= epoch]
        scores.sort(reverse=self.sweep.metric.goal == "maximize")
        return self.sweep.best(trial.values) not in scores[: max(len(scores) // early.eta, 1)]

    def write_table(self) -> None:
        """Write table.md, and print the command of the best trial.

        The table has no test scores: nobody may choose a trial by them.
        """
        trials, name, logs = self.trials(), self.sweep.metric.name, self.processes.logs
        trials.sort(key=lambda one: self.sweep.best(one.values), reverse=self.sweep.metric.goal == "maximize")
        trials.sort(key=lambda one: STATES.index(one.state))  # keeps that order within a state
        if not trials or trials[0].state != "finished":
            raise UsageError(f"no trial of {self.sweep.name} has finished (logs: {logs})")
        rows = []
        for trial in trials:
            best = self.sweep.best(trial.values) if trial.values else ""
            cells = [trial.run_id, trial.state, best, len(trial.values), *trial.params.values()]
            rows.append([f"{cell:.4g}" if isinstance(cell, float) else text(cell) for cell in cells])
        columns = ["run_id", "state", f"best {name}", "epochs", *trials[0].params]
        data = read_json(run_folder(self.processes.output_dir, trials[0].run_id) / "config.json")["dataset"]
        command = shlex.join(["python", *self.sweep.command_line(trials[0].params)[1:]])
        lines = [f"**{self.sweep.name}**: {data}; {len(rows)} trials of a {self.sweep.method} search", ""]
        lines += [*markdown_table(columns, "l" * len(columns), rows), "", f"The best trial: `{command}`"]
        write_text(logs / "table.md", "\n".join(lines) + "\n")
        print(f"{lines[-1]}\n{len(rows)} trials, the best one first: {logs / 'table.md'}", flush=True)


def distribution(parameter: Parameter) -> distributions.BaseDistribution:
    """A parameter for Optuna."""
    if parameter.values:
        return distributions.CategoricalDistribution(parameter.values)
    if parameter.is_whole:
        return distributions.IntDistribution(int(parameter.min), int(parameter.max))
    log = parameter.distribution == "log_uniform_values"
    return distributions.FloatDistribution(parameter.min, parameter.max, log=log)

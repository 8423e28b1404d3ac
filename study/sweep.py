"""Run a W&B sweep file without an account: every run of a grid, or the trials of a search.

    python -m study.sweep ablation.yaml             # a grid: every combination, then its table and figure
    python -m study.sweep sweep.yaml --count 20     # a search: 20 trials, then their ranking and figures
    python -m study.sweep ablation.yaml --output_dir try -- --dataset=phantom --size=28   # keys for every run
    python -m study.sweep ablation.yaml --table_only   # only the table of the finished runs; starts no run

--workers sets how many runs train at the same time. The default on a CPU is one per core, each with one thread; on
a GPU it is one. After a kill, the same command skips the finished runs and resumes the others from their
checkpoints. A second command at the same time, for example on another GPU, shares the work: a lock keeps two
processes from training the same run. output_dir/sweeps/<name>/ holds logs, tables, and the state of a search.

Machines without a shared folder share a search through a database. Start the same command on each of them:

    python -m study.sweep sweep.yaml --count 40 --storage postgresql+psycopg://USER:PASSWORD@HOST/DATABASE

They may differ in data_root, device and wandb. If a machine is lost, another one repeats its trials. Every command
ends when `count` trials have ended; a few more may run if machines ask for one at the same moment.
"""

import itertools
import math
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from common.cli import Keys, UsageError, key, run_script
from common.training.device import physical_cores
from study.sweep_file import Range, Sweep, read_sweep
from study.trials import Running, Trial, TrialRecords, Workers, failed_runs, locked

MAX_RUNS = 10_000


class SweepConfig(Keys):
    """The keys of a sweep; those of its runs are in its file."""

    hint: ClassVar[str] = "--help lists the keys; write those of the runs after --"

    file: Path | None = key(None, "the sweep's YAML file; as the first argument it needs no --file")
    count: int = key(20, "trials of a search, of all workers together; a grid ignores it", ge=1, le=MAX_RUNS)
    workers: int | None = key(
        None, "runs at the same time (default: one per core on a CPU, 1 on a GPU)", ge=1, le=1000
    )
    output_dir: Path = key(Path(), "folder that gets sweeps/ and the runs' folders")
    storage: str | None = key(None, "URL of a database, to share a search between machines (see docs/running.md)")
    fixed: str = key("", "keys for every run, as '--key=value --key=value'; or write them after --")
    table_only: bool = key(
        False,
        "start no run: only make the table of the finished ones, whose keys the loaded program checks",
    )


def grid(sweep: Sweep) -> list[Trial]:
    """Every combination of the values, in the file's order; but the seeds vary slowest.

    So the first runs give one seed of every row. A run's id consists of the sweep's name and the values.
    """
    axes: dict[str, tuple[Any, ...]] = {}
    for name, values in sweep.swept.items():
        if isinstance(values, Range):
            raise UsageError(f"parameter {name}: a grid needs values, not min and max")
        axes[name] = values
    order = sorted(axes, key=lambda name: name != "seed")  # stable
    n_runs = math.prod(map(len, axes.values()))
    if n_runs > MAX_RUNS:
        raise UsageError(f"the grid has {n_runs:,} runs; at most {MAX_RUNS:,} can be planned")
    trials = []
    for combination in itertools.product(*(axes[name] for name in order)):
        chosen = dict(zip(order, combination, strict=True))
        parts = [sweep.name, *(str(chosen[name]) for name in axes)]
        run_id = "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", part) for part in parts)
        sweep.config({**chosen, "run_id": run_id})  # raises UsageError for an impossible combination
        trials.append(Trial(run_id, chosen))
    if len({trial.run_id for trial in trials}) < len(trials):
        raise UsageError("two runs of the grid would have the same id: a value is listed twice")
    return trials


def run_grid(trials: Sequence[Trial], records: TrialRecords, n_workers: int) -> list[str]:
    """Run the unfinished trials until all, also those of other commands, have finished or failed.

    Returns the ids of the failed ones.
    """
    left: list[Trial] = list(trials)
    failed: list[str] = []
    with Workers(records.sweep.name, len(trials), " runs") as workers:
        while True:
            left = [trial for trial in left if trial.run_id not in failed and not records.is_finished(trial)]
            workers.bar.update(len(trials) - len(failed) - len(left) - workers.bar.n)
            if not left and not workers.running:
                break
            # If other commands run all that is left, this one waits: it takes over the run of a killed command.
            for trial in left:
                if len(workers.running) < n_workers:
                    with locked(records.lock_path(trial.run_id)) as lock:
                        # Another command may have finished the trial just before we got its lock.
                        if lock is not None and not records.is_finished(trial):
                            workers.running.append(Running(trial, records, lock))
            for running, status in workers.wait():
                run_id = running.trial.run_id
                with running.lock:
                    if records.is_finished(running.trial):
                        outcome = records.outcome(run_id, "finished")
                    else:
                        outcome = records.failure(run_id, status)
                        failed.append(run_id)
                workers.print(f"{run_id}: {outcome} ({running.seconds:.0f} s)")
    return failed


def main(config: SweepConfig) -> None:
    """Sweep file → runs → table and figures."""
    if config.file is None:
        raise UsageError("which sweep? python -m study.sweep FILE.yaml")
    try:
        fixed = shlex.split(config.fixed)
    except ValueError as error:
        raise UsageError(f"--fixed {config.fixed}: {error}") from None
    sweep = read_sweep(config.file, fixed)
    records = TrialRecords(sweep, config.output_dir)
    n_workers = config.workers or (physical_cores() if sweep.on_cpu({}) else 1)
    if sweep.method == "grid":
        from study.ablation import report

        if config.storage:
            raise UsageError("--storage is for a search: commands that share a grid share its --output_dir")
        trials = grid(sweep)
        failed = [] if config.table_only else run_grid(trials, records, n_workers)
        try:
            report(trials, records)
        except UsageError:  # no run has finished, or none of the first row
            if not failed:
                raise
        if failed:
            raise failed_runs(failed)
    else:
        from study.ranking import rank  # Optuna takes a second to import: a grid does not need it
        from study.search import Search

        if config.table_only and not config.storage and not (records.folder / "search.journal").exists():
            raise UsageError(f"no trial of {sweep.name} has ended yet")  # a new search would keep these keys
        search = Search(records, config.storage)
        if not config.table_only:
            search.run(config.count, n_workers)
        rank(search)


def as_keys(arguments: Sequence[str]) -> list[str]:
    """`FILE … -- --key=value` written as keys: `--file=FILE … --fixed=--key=value`."""
    given = list(arguments)
    if "--" in given:
        separator = given.index("--")
        given[separator:] = [f"--fixed={shlex.join(given[separator + 1 :])}"]
    if given and not given[0].startswith("-"):
        given[0] = f"--file={given[0]}"
    return given


if __name__ == "__main__":
    run_script(main, SweepConfig, as_keys(sys.argv[1:]))

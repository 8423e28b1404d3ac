"""Run a W&B sweep file without an account: every run of a grid, or the trials of a search.

    python -m study.sweep ablation.yaml             # a grid: every combination, then its table and figure
    python -m study.sweep sweep.yaml --count 20     # a search: 20 trials, then their ranking and figures
    python -m study.sweep ablation.yaml --output_dir try -- --dataset=phantom --size=28   # keys for every run
    python -m study.sweep ablation.yaml --table_only   # what is finished, without running anything

On a CPU it runs as many at the same time as there are cores, with one thread each; on a GPU, one. --workers
changes that. After a kill the same command goes on: it skips a finished run, and an unfinished one goes on from
its checkpoint. A second command beside the first, on another GPU for example, joins in: no run is ever worked on
by two processes. Everything is kept in output_dir/sweeps/<name>/: each run's log, the tables, and the state of a
search.
"""

import itertools
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.compute import physical_cores
from common.config import Keys, key, run_script
from common.errors import Fault, UsageError
from common.files import locked
from study.sweep_file import Range, Sweep, read_sweep
from study.trials import Running, Trial, Workers, Workplace, say


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Keys):
    """The keys of a sweep; those of its runs are in its file."""

    file: Path | None = key(None, "the sweep's YAML file; as the first argument it needs no --file")
    count: int = key(20, "trials of a search, all workers' together; a grid runs whole", at_least=1)
    workers: int | None = key(None, "runs at the same time (default: on a CPU one a core, on a GPU 1)", at_least=1)
    output_dir: Path = key(Path(), "folder that gets sweeps/ and the runs' folders")
    fixed: str = key("", "keys for every run, as '--key=value --key=value'; or write them after --")
    table_only: bool = key(False, "run nothing: make the table of what is finished")


def grid(sweep: Sweep) -> list[Trial]:
    """Every combination of the values, in the file's order but for the seeds, which vary slowest.

    So the first runs give one seed of every row. A run's id is made of the sweep's name and the values.
    """
    axes: dict[str, tuple[Any, ...]] = {}
    for name, values in sweep.swept.items():
        if isinstance(values, Range):
            raise UsageError(f"parameter {name}: a grid needs values, not min and max")
        axes[name] = values
    order = sorted(axes, key=lambda name: name != "seed")  # stable
    trials = []
    for combination in itertools.product(*(axes[name] for name in order)):
        chosen = dict(zip(order, combination, strict=True))
        parts = [sweep.name, *(str(chosen[name]) for name in axes)]
        trials.append(Trial("-".join(re.sub(r"[^A-Za-z0-9._]+", "_", part) for part in parts), chosen))
    for trial in trials:
        sweep.config({**trial.values, "run_id": trial.run_id})
    if len({trial.run_id for trial in trials}) < len(trials):
        raise UsageError("two runs of the grid would have the same id: a value is listed twice")
    return trials


def run_grid(trials: Sequence[Trial], workplace: Workplace, n_workers: int) -> None:
    """Run what is unfinished and no other command is at; return when every run has finished or failed."""
    left: list[Trial] = list(trials)
    failed: set[str] = set()
    with (
        tqdm(total=len(trials), desc=workplace.sweep.name, unit=" runs", disable=None) as bar,
        Workers(workplace, n_workers) as workers,
    ):
        while True:
            left = [trial for trial in left if trial.run_id not in failed and not workplace.is_finished(trial)]
            bar.update(len(trials) - len(failed) - len(left) - bar.n)
            if not left and not workers.running:
                break
            for trial in left:
                if workers.have_room():
                    _start(trial, workplace, workers)
            # Where other commands are at all that is left, this only waits: should one die, its run is ours.
            for running, status in workers.wait():
                with running.claim:
                    if not _succeeded(running, status, workplace):
                        failed.add(running.trial.run_id)
    if len(failed) == len(trials):
        raise Fault(f"all {len(trials)} runs failed")


def _start(trial: Trial, workplace: Workplace, workers: Workers) -> None:
    """Start a run, unless somebody is at it already or has just finished it."""
    with ExitStack() as claim:
        lock = claim.enter_context(locked(workplace.lock_path(trial)))
        if lock is not None and not workplace.is_finished(trial):
            workers.start(trial, lock, claim)


def _succeeded(ended: Running, status: int, workplace: Workplace) -> bool:
    """Whether a trial that has ended succeeded; say how it went."""
    trial = ended.trial
    succeeded = status == 0 and workplace.is_finished(trial)
    outcome = workplace.outcome(trial, "finished") if succeeded else workplace.failure(trial, status)
    say(f"{trial.run_id}: {outcome} ({ended.seconds:.0f} s)")
    return succeeded


def main(config: SweepConfig) -> None:
    """Sweep file → runs → table and figures."""
    if config.file is None:
        raise UsageError("which sweep? python -m study.sweep FILE.yaml")
    sweep = read_sweep(config.file, shlex.split(config.fixed))
    workplace = Workplace(sweep, config.output_dir)
    n_workers = config.workers or (physical_cores() if workplace.on_cpu({}) else 1)
    if sweep.method == "grid":
        from study.ablation import report

        trials = grid(sweep)
        if not config.table_only:
            run_grid(trials, workplace, n_workers)
        report(trials, workplace)
    else:
        from study.search import rank, search

        if not config.table_only:
            search(workplace, config.count, n_workers)
        rank(workplace)


def as_keys(arguments: Sequence[str]) -> list[str]:
    """`FILE … -- --key=value` written as keys alone: `--file=FILE … --fixed=--key=value`."""
    given = list(arguments)
    if "--" in given:
        separator = given.index("--")
        given[separator:] = [f"--fixed={shlex.join(given[separator + 1 :])}"]
    if given and not given[0].startswith("-"):
        given[0] = f"--file={given[0]}"
    return given


if __name__ == "__main__":
    run_script(main, SweepConfig, as_keys(sys.argv[1:]))

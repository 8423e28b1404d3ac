"""Run a W&B sweep file without an account: every run of a grid, or the trials of a search.

    python -m common.sweep ablation.yaml             # a grid: every combination, then its table and figure
    python -m common.sweep sweep.yaml --count 20     # a search: 20 trials, then their ranking and figures
    python -m common.sweep ablation.yaml --output_dir try -- --dataset=phantom --size=28   # keys for every run
    python -m common.sweep ablation.yaml --table_only   # what is finished, without running anything

The same command started again, after a kill or beside the first, joins in: a finished run is skipped, an
unfinished one goes on from its checkpoint, and no run is ever worked on by two processes. Everything is kept
in output_dir/sweeps/<name>/: each run's log, the tables, and the state of a search.
"""

import itertools
import re
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.config import Keys, key, run_script
from common.errors import Fault, UsageError
from common.files import claimed
from common.sweep_file import Range, Sweep, read_sweep
from common.trials import POLL, Trial, Workplace, say


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Keys):
    """The keys of a sweep; those of its runs are in its file."""

    file: Path | None = key(None, "the sweep's YAML file; as the first argument it needs no --file")
    count: int = key(20, "trials of a search, all workers' together; a grid runs whole", at_least=1)
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


def run_grid(trials: Sequence[Trial], workplace: Workplace) -> None:
    """Run what is unfinished and no other worker is at; return when every run has finished or failed."""
    failed: set[str] = set()
    with tqdm(total=len(trials), desc=workplace.sweep.name, unit=" runs", disable=None) as bar:
        while True:
            left = [trial for trial in trials if not workplace.is_finished(trial)]
            bar.update(len(trials) - len(left) - bar.n)
            left = [trial for trial in left if trial.run_id not in failed]
            if not left:
                break
            for trial in left:
                with claimed(workplace.lock_path(trial)) as lock:
                    if lock is None:
                        continue
                    if not workplace.is_finished(trial) and not _run(trial, workplace, lock):
                        failed.add(trial.run_id)
                    break
            else:
                time.sleep(POLL)  # other workers are at all that is left; should one die, its run is ours
    if len(failed) == len(trials):
        raise Fault(f"all {len(trials)} runs failed")


def _run(trial: Trial, workplace: Workplace, lock: int) -> bool:
    """Run a trial to its end and say how it went; whether it succeeded."""
    started = time.monotonic()
    with workplace.process(trial, lock) as process:
        status = process.wait()
    succeeded = status == 0 and workplace.is_finished(trial)
    outcome = workplace.outcome(trial, "finished") if succeeded else workplace.failure(trial, status)
    say(f"{trial.run_id}: {outcome} ({time.monotonic() - started:.0f} s)")
    return succeeded


def main(config: SweepConfig) -> None:
    """Sweep file → runs → table and figures."""
    if config.file is None:
        raise UsageError("which sweep? python -m common.sweep FILE.yaml")
    sweep = read_sweep(config.file, shlex.split(config.fixed))
    workplace = Workplace(sweep, config.output_dir)
    # What a worker started must end with it where it can: SIGTERM shall run the finally blocks.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if sweep.method == "grid":
        from common.ablation import report

        trials = grid(sweep)
        if not config.table_only:
            run_grid(trials, workplace)
        report(trials, workplace)
    else:
        from common.search import rank, search

        if not config.table_only:
            search(workplace, config.count)
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

"""Run a W&B sweep file without an account: every run of a grid, or the trials of a search.

    python -m study.sweep ablation.yaml             # a grid: every combination, then its table and figure
    python -m study.sweep sweep.yaml --count 30     # a search: 30 trials, then their ranking
    python -m study.sweep ablation.yaml --output_dir try -- --dataset=phantom --size=28   # keys for every run
    python -m study.sweep ablation.yaml --workers 0   # only the table of what is finished

--workers sets how many runs train at the same time. The default on a CPU is one per core, each with one thread; on
a GPU it is one. After a kill, the same command skips the finished runs and resumes the others from their
checkpoints. A second command at the same time shares the work: with several GPUs, start one command for each:

    CUDA_VISIBLE_DEVICES=0 python -m study.sweep sweep.yaml --count 30
    CUDA_VISIBLE_DEVICES=1 python -m study.sweep sweep.yaml --count 30

output_dir/sweeps/<name>/ holds logs, tables, and the state of a search. Machines without a shared folder share a
search through a database. Start the same command on each of them; they may differ in data_root, device and wandb:

    python -m study.sweep sweep.yaml --count 30 --storage postgresql+psycopg://USER:PASSWORD@HOST/DATABASE
"""

import itertools
import math
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from joblib import cpu_count

from common.cli import Keys, UsageError, key, run_script
from common.files import write_text
from common.records.read import Record
from study.processes import Processes, Run, failed_runs, planned, train_all
from study.sweep_spec import Sweep, read_sweep

MAX_RUNS = 10_000


class SweepConfig(Keys):
    """The keys of a sweep; those of its runs are in its file."""

    file: Path | None = key(None, "the sweep's YAML file; as the first argument it needs no --file")
    count: int = key(20, "trials of a search, of all workers together; a grid ignores it", ge=1, le=MAX_RUNS)
    workers: int | None = key(
        None,
        "runs at the same time, 0: only the table (default: one per core on a CPU, 1 on a GPU)",
        ge=0,
        le=1000,
    )
    output_dir: Path = key(Path(), "folder that gets sweeps/ and the runs' folders")
    storage: str | None = key(None, "URL of a database, to share a search between machines (see docs/running.md)")
    fixed: str = key("", "keys for every run, as '--key=value --key=value'; or write them after --")


def grid(sweep: Sweep, output_dir: Path) -> list[Run]:
    """Every combination of the values, in the file's order; but the seeds vary slowest.

    So the first runs give one seed of every row. A run's id consists of the sweep's name and the values.
    """
    if ranges := [name for name, parameter in sweep.swept.items() if parameter.is_range]:
        raise UsageError(f"parameter {ranges[0]}: a grid needs values, not min and max")
    axes = {name: parameter.values for name, parameter in sweep.swept.items()}
    order = sorted(axes, key=lambda name: name != "seed")  # stable
    n_runs = math.prod(map(len, axes.values()))
    if n_runs > MAX_RUNS:
        raise UsageError(f"the grid has {n_runs:,} runs; at most {MAX_RUNS:,} can be planned")
    runs = {}
    for combination in itertools.product(*(axes[name] for name in order)):
        values = dict(zip(order, combination, strict=True))
        parts = [sweep.name, *(str(values[name]) for name in axes)]
        run_id = "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", part) for part in parts)
        if run_id in runs:
            raise UsageError(f"two runs of the grid would have the id {run_id}: a value is listed twice")
        runs[run_id] = planned(sweep, run_id, values, output_dir)
    return list(runs.values())


def write_grid(sweep: Sweep, runs: Sequence[Run], processes: Processes) -> None:
    """Write table.md and the figure, and print where they are.

    Raises UsageError where no run of the first row, with which the others are compared, has finished.
    """
    from study.groups import Group
    from study.sweep_tables import caption, draw_grid, grid_table  # matplotlib takes a second to import

    found: dict[str, list[Record]] = {}
    missing: dict[str, list[str]] = {}
    for run in runs:
        name = ", ".join(str(value) for key, value in run.values.items() if key != "seed") or "all runs"
        row = found.setdefault(name, [])  # also for an unfinished run: else another row could become the first one
        if processes.is_finished(run):
            row.append(Record.read(processes.output_dir, run.run_id))
        else:
            missing.setdefault(name, []).append(str(run.values.get("seed", "")))
    reference = next(iter(found))
    if not found[reference]:
        raise UsageError(f"no run of {reference} is finished yet, the first row of the table of {sweep.name}")
    rows = {name: Group(name, records) for name, records in found.items() if records}
    text = [caption(sweep.name, list(itertools.chain(*found.values()))), "", *grid_table(rows)]
    if missing:
        seeds = ", ".join(f"{name} ({', '.join(numbers)})" for name, numbers in missing.items())
        text += ["", f"**Incomplete**: of {len(runs)} runs these are missing, with their seeds: {seeds}."]
    table, figure = processes.logs / "table.md", processes.output_dir / "fig" / "task4" / f"{sweep.name}.png"
    write_text(table, "\n".join(text) + "\n")
    draw_grid(figure, rows)
    print(f"{sweep.name}: table and figure:\n  {table}\n  {figure}", flush=True)


def main(config: SweepConfig) -> None:
    """Sweep file → runs → table and figure."""
    if config.file is None:
        raise UsageError("which sweep? python -m study.sweep FILE.yaml")
    try:
        fixed = shlex.split(config.fixed)
    except ValueError as error:
        raise UsageError(f"--fixed {config.fixed}: {error}") from None
    sweep = read_sweep(config.file, fixed)
    variables = {"WANDB_PROJECT": sweep.project, "WANDB_ENTITY": sweep.entity, "WANDB_RUN_GROUP": sweep.name}
    environment = {name: value for name, value in variables.items() if value}
    n_workers = 1 if config.workers is None else config.workers
    if sweep.on_cpu():  # two processes with one thread each train more tiles than one process with two threads
        environment["OMP_NUM_THREADS"] = "1"
        n_workers = cpu_count(only_physical_cores=True) if config.workers is None else n_workers
    processes = Processes(config.output_dir, config.output_dir / "sweeps" / sweep.name, environment)
    if sweep.method != "grid":
        from study.search import search  # Optuna takes a second to import: a grid does not need it

        search(sweep, processes, config.count, n_workers, config.storage)
        return
    if config.storage:
        raise UsageError("--storage is for a search: commands that share a grid share its --output_dir")
    runs = grid(sweep, config.output_dir)
    failed = train_all(runs, processes, n_workers) if n_workers else []
    try:
        write_grid(sweep, runs, processes)
    except UsageError:  # no run has finished, or none of the first row
        if not failed:
            raise
    if failed:
        raise failed_runs(failed)


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

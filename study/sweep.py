"""Run a W&B sweep file without an account: every run of a grid, or the trials of a search.

    python -m study.sweep ablation.yaml             # a grid: every combination, then its table and figure
    python -m study.sweep sweep.yaml --count 30     # a search: 30 trials, then their ranking
    python -m study.sweep ablation.yaml --output_dir try -- --dataset=phantom --size=28   # keys for every run
    python -m study.sweep ablation.yaml --workers 0   # only the table of what is finished

After a kill, the same command skips the finished runs and resumes the others from their checkpoints. A second
command at the same time shares the work. So with several GPUs, start one command for each, the second one with
CUDA_VISIBLE_DEVICES=1. output_dir/sweeps/<name>/ holds logs, tables, and the state of a search.
"""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from joblib import cpu_count

from common.cli import Keys, UsageError, key, run_script
from common.files import write_text
from common.records.read import Record, is_finished, read_json, run_folder
from common.records.run import check_same
from common.training.device import Compute
from study.processes import Processes, Run, train_all
from study.sweep_spec import Sweep, read_sweep


class SweepConfig(Keys):
    """The keys of a sweep; those of its runs are in its file."""

    file: tuple[str, ...] = key((), "the sweep's YAML file; then, after --, keys for every run", positional=True)
    count: int = key(20, "trials of a search, of all workers together; a grid ignores it", ge=1, le=10_000)
    workers: int | None = key(None, "runs at the same time, 0: none (default: 1; on a CPU one per core)", ge=0)
    output_dir: Path = key(Path(), "folder that gets sweeps/ and the runs' folders")


def grid(sweep: Sweep, output_dir: Path) -> list[Run]:
    """Every combination of the values, in the file's order; but the seeds vary slowest.

    So the first runs give one seed of every row. A run's id consists of the sweep's name and the values. Raises
    UsageError where the program refuses a combination, or where a run's folder has records of other values.
    """
    axes = {name: parameter.values for name, parameter in sweep.swept.items()}
    if ranges := [name for name, values in axes.items() if not values]:
        raise UsageError(f"parameter {ranges[0]}: a grid needs values, not min and max")
    runs: dict[str, Run] = {}
    order = sorted(axes, key=lambda name: name != "seed")  # stable
    for combination in itertools.product(*(axes[name] for name in order)):
        values = dict(zip(order, combination, strict=True))
        parts = [sweep.name, *(str(values[name]) for name in axes)]
        run_id = "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", part) for part in parts)
        if run_id in runs:
            raise UsageError(f"two runs of the grid would have the id {run_id}: a value is listed twice")
        config = sweep.config({**values, "run_id": run_id})
        if (path := run_folder(output_dir, run_id) / "config.json").exists():
            remedy = "use another --output_dir, or another name in the sweep file"
            check_same(config, read_json(path)["config"], remedy)
        command = sweep.command_line({**values, "run_id": run_id, "output_dir": output_dir})
        runs[run_id] = Run(run_id, values, command)
    return list(runs.values())


def write_grid(name: str, runs: Sequence[Run], processes: Processes) -> None:
    """Write table.md and the figure, and print where they are.

    Raises UsageError where no run of the first row, with which the others are compared, has finished.
    """
    from study.groups import Group
    from study.sweep_tables import draw_grid, grid_table  # matplotlib takes a second to import

    found: dict[str, list[Record]] = {}
    for run in runs:
        row = ", ".join(str(value) for key, value in run.values.items() if key != "seed") or "all runs"
        found.setdefault(row, [])  # also for an unfinished run: else another row could become the first one
        if is_finished(processes.output_dir, run.run_id):
            found[row].append(Record.read(processes.output_dir, run.run_id))
    reference = next(iter(found))
    if not found[reference]:
        raise UsageError(f"no run of {reference} is finished yet, the first row of the table of {name}")
    rows = {row: Group(row, records) for row, records in found.items() if records}
    data = sorted({str(record.summary["dataset"]) for records in found.values() for record in records})
    table, figure = processes.logs / "table.md", processes.output_dir / "fig" / "task4" / f"{name}.png"
    write_text(table, "\n".join([f"**{name}**: {' / '.join(data)}", "", *grid_table(rows)]) + "\n")
    draw_grid(figure, rows)
    print(f"{name}: table and figure:\n  {table}\n  {figure}", flush=True)


def main(config: SweepConfig) -> None:
    """Sweep file → runs → table and figure."""
    if not config.file:
        raise UsageError("which sweep? python -m study.sweep FILE.yaml")
    sweep = read_sweep(Path(config.file[0]), config.file[1:])
    environment = {"WANDB_RUN_GROUP": sweep.name} | ({"WANDB_PROJECT": sweep.project} if sweep.project else {})
    n_workers = 1
    if Compute.of(sweep.config({}).device, "fp32").device.type == "cpu":
        # Two processes with one thread each train more tiles than one process with two threads.
        environment["OMP_NUM_THREADS"], n_workers = "1", cpu_count(only_physical_cores=True)
    n_workers = n_workers if config.workers is None else config.workers
    processes = Processes(config.output_dir, config.output_dir / "sweeps" / sweep.name, environment)
    if sweep.method != "grid":
        from study.search import Search  # Optuna takes a second to import: a grid does not need it

        Search(sweep, processes, config.count).run(n_workers)
        return
    runs = grid(sweep, config.output_dir)
    train_all(runs, processes, n_workers)
    write_grid(sweep.name, runs, processes)


if __name__ == "__main__":
    run_script(main, SweepConfig)

"""A table of the runs in a study's folder, the newest last.

python -m study.runs                        # runs/ here
python -m study.runs --output_dir FOLDER    # FOLDER/runs/
"""

from pathlib import Path

from filelock import FileLock, Timeout

from common.cli import Fault, Keys, UsageError, key, run_script
from common.records.read import checkpoint_folder, is_finished, read_history, read_json, run_folder

COLUMNS = ("started", "run", "task", "network", "data", "seed", "state", "validation ACC", "test ACC")


class RunsConfig(Keys):
    """Where the runs are."""

    output_dir: Path = key(Path(), "folder that has runs/")


def main(config: RunsConfig) -> None:
    """runs/ → a table on stdout."""
    runs = config.output_dir / "runs"
    found = sorted(row(config.output_dir, path.parent.name) for path in runs.glob("*/config.json"))
    if not found:
        raise UsageError(f"{runs}: no runs here; python task1.py makes one, --output_dir names another folder")
    lines = [COLUMNS, *found]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def row(output_dir: Path, run_id: str) -> tuple[str, ...]:
    """The cells of a run; one with damaged records has few."""
    folder = run_folder(output_dir, run_id)
    try:
        facts = read_json(folder / "config.json")
        config, history = facts["config"], []
        if (folder / "history.csv").exists():
            history = read_history(folder / "history.csv")
        if is_finished(output_dir, run_id):
            summary = read_json(folder / "summary.json")
            weights = (checkpoint_folder(output_dir, run_id) / "best.pt").exists() or "baseline" in config
            state = "finished" if weights else "finished (no weights)"
            best = f"{summary['validate']['validate/acc']:.4f}"
            test = f"{summary['test/acc']:.4f}" if "test/acc" in summary else "not scored"
        else:
            state = f"{'running' if is_running(folder) else 'stopped'} ({len(history)} epochs)"
            best, test = max((f"{epoch['validate/acc']:.4f}" for epoch in history), default=""), ""
    except Fault:
        return "", run_id, "", "", "", "", "damaged", "", ""
    network = config.get("model_name") or config["baseline"]
    words = (facts["started"][:16], run_id, facts["task"], network, facts["dataset"], config["seed"])
    return (*map(str, words), state, best, test)


def is_running(folder: Path) -> bool:
    """Whether a process trains the run: it holds the run's lock."""
    path = folder / ".lock"
    try:
        if path.exists():
            FileLock(path).acquire(blocking=False).lock.release()
    except Timeout:
        return True
    return False


if __name__ == "__main__":
    run_script(main, RunsConfig)

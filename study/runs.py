"""A table of the runs in a study's folder, the newest last.

python -m study.runs                        # runs/ here
python -m study.runs --output_dir FOLDER    # FOLDER/runs/
"""

import os
import re
import sys
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from common.cli import Fault, Keys, UsageError, key, run_script
from common.records.read import checkpoint_folder, is_finished, read_history, read_json, run_folder

COLUMNS = ("run", "task", "network", "data", "seed", "state", "validation ACC", "test ACC", "age")
COLOURS = {"finished": "32", "running": "36", "stopped": "33", "damaged": "31"}  # ANSI: green, cyan, yellow, red


class RunsConfig(Keys):
    """Where the runs are."""

    output_dir: Path = key(Path(), "folder that has runs/")


def main(config: RunsConfig) -> None:
    """runs/ → a table on stdout; the states are coloured on a terminal."""
    runs = config.output_dir / "runs"
    found = [row(config.output_dir, path.parent.name) for path in runs.glob("*/config.json")]
    if not found:
        raise UsageError(f"{runs}: no runs here; python task1.py makes one, --output_dir names another folder")
    rows = [
        dict(zip(COLUMNS, COLUMNS, strict=True)),
        *(cells for _, cells in sorted(found, key=lambda one: one[0])),
    ]
    widths = {name: max(len(cells[name]) for cells in rows) for name in COLUMNS}
    lines = []
    for cells in rows:
        padded = {name: cells[name].ljust(widths[name]) for name in COLUMNS}
        colour = COLOURS.get(cells["state"].split()[0])
        if colour and in_colour():
            padded["state"] = f"\x1b[{colour}m{padded['state']}\x1b[0m"
        lines.append("  ".join(padded.values()).rstrip())
    show("\n".join(lines) + "\n")


def show(text: str) -> None:
    """Write to stdout; Fault where it cannot be written. A reader that wants no more of it is no error."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # else Python tries to write the rest at its end
        if not isinstance(error, BrokenPipeError):
            raise Fault(f"standard output: {error.strerror}") from None


def row(output_dir: Path, run_id: str) -> tuple[str, dict[str, str]]:
    """When a run was started, and its cells by column; a run with damaged records has few."""
    folder = run_folder(output_dir, run_id)
    cells = dict.fromkeys(COLUMNS, "") | {"run": run_id}
    try:
        facts = read_json(folder / "config.json")
        config, started = facts["config"], facts["started"]
        history = read_history(folder / "history.csv") if (folder / "history.csv").exists() else []
        accuracies = [epoch["validate/acc"] for epoch in history]
        state = "running" if is_running(folder) else "stopped"
        cells |= {
            "task": facts["task"],
            "network": config.get("model_name") or config["baseline"],
            "data": facts["dataset"],
            "seed": str(config["seed"]),
            "state": f"{state} ({len(history)} of {config['n_epochs']} epochs)"
            if "n_epochs" in config
            else "not finished",
            "validation ACC": f"{max(accuracies):.4f}" if accuracies else "",
            "age": age(datetime.fromisoformat(started)),
        }
        if is_finished(output_dir, run_id):
            summary = read_json(folder / "summary.json")
            weights = checkpoint_folder(output_dir, run_id) / "best.pt"
            accuracy = summary["validate"]["validate/acc"]
            cells |= {
                "state": "finished" if weights.exists() or "baseline" in config else "finished (no weights)",
                "validation ACC": f"{accuracy:.4f}",
                "test ACC": f"{summary['test/acc']:.4f}" if "test/acc" in summary else "not scored",
            }
    except (Fault, OSError, KeyError, TypeError, ValueError):
        return "", cells | {"state": "damaged"}
    # Escape codes in a record must not reach the terminal.
    return started, {name: re.sub(r"[^ -~\u00a0-\uffff]", "?", text) for name, text in cells.items()}


def is_running(folder: Path) -> bool:
    """Whether another process trains the run: it holds the run's lock."""
    path = folder / ".lock"
    if not path.exists():
        return False
    try:
        with FileLock(path, blocking=False):
            return False
    except Timeout:
        return True


def age(started: datetime) -> str:
    """The time since then in its largest unit: `3 min`, `5 h`, `12 d`."""
    minutes = (datetime.now(UTC) - started).total_seconds() / 60
    if minutes < -1:
        return "?"  # a clock was wrong
    for unit, length in (("d", 24 * 60), ("h", 60)):
        if minutes >= length:
            return f"{minutes / length:.0f} {unit}"
    return f"{minutes:.0f} min"


def in_colour() -> bool:
    """Whether stdout is a terminal that shows colours; see https://no-color.org."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


if __name__ == "__main__":
    run_script(main, RunsConfig)

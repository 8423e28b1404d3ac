"""What Task 2 explains, a trained network and some test tiles, and the records that it leaves of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.cli import UsageError
from common.config import ScriptConfig
from common.files import write_json, write_text
from common.markdown import markdown_table, text
from common.records.read import checkpoint_folder, read_json
from common.records.run import send, start_wandb


@dataclass(frozen=True)
class Explained:
    """A test tile, (H, W, 3) uint8, with the names of its classes and its maps by method, (H, W) float32."""

    run_id: str  # whose network is explained
    index: int
    tile: NDArray[np.uint8]
    label: str
    predicted: str
    probability: float  # of the predicted class
    maps: Mapping[str, NDArray[Any]]

    @property
    def row(self) -> dict[str, Any]:
        """The tile's row of the table; `input` and `saliency` are the figures, relative to the output folder."""
        row = {name: getattr(self, name) for name in ("index", "label", "predicted", "probability")}
        figure = f"fig/task2/{self.run_id}/{self.index:05d}"
        return {**row, "input": f"{figure}-input.png", "saliency": f"{figure}-saliency.png"}


def find_run(output_dir: Path, run_id: str | None) -> Mapping[str, Any]:
    """The config.json of the finished run to explain; UsageError if there is none.

    Without a name it is the Task 1 run with a best.pt that has most training tiles, of several the newest.
    """
    summaries = (output_dir / "runs").glob(f"{run_id or '*'}/summary.json")
    names = ("config", "task", "run_id", "data_fingerprint", "tiles", "started", "synthetic")
    ours = [read_json(path.with_name("config.json"), *names) for path in summaries]
    if not run_id:
        own = [run for run in ours if run["task"] == "task1"]
        ours = [run for run in own if (checkpoint_folder(output_dir, run["run_id"]) / "best.pt").exists()]
    if not ours:
        wanted = f"--run_id {run_id}: no finished run" if run_id else "no finished Task 1 run with its weights"
        raise UsageError(f"{wanted} in {output_dir}; python task1.py makes one, --output_dir names its folder")
    return max(ours, key=lambda run: (run["tiles"]["train"], run["started"], run["run_id"]))


def choose_tiles(n_tiles: int, count: int, seed: int) -> list[int]:
    """`count` different tiles in random order, or all if there are fewer. Seed 0, ten tiles: the coursework's."""
    random = np.random.default_rng(seed)
    return [int(index) for index in random.choice(n_tiles, min(count, n_tiles), replace=False)]


def write_records(
    folder: Path,
    config: ScriptConfig,
    facts: Mapping[str, Any],
    shown: Sequence[Explained],
    checks: Mapping[str, Any],
    figures: Mapping[str, Path],
) -> None:
    """Write saliency.md and attribution.json into `folder`, and send the figures to W&B.

    `facts` are those of task2.py; `checks` is the record that `check_methods` returns.
    """
    rows, cells = [one.row for one in shown], []
    for row in rows:
        tile = f"{row['index']:05d}"
        mark = "" if row["label"] == row["predicted"] else " ✗"
        images = [f"![{part} of tile {tile}](../../{row[part]})" for part in ("input", "saliency")]
        cells.append([tile, row["label"], f"{row['predicted']} ({row['probability']:.2f}){mark}", *images])
    table = markdown_table(["Index", "Label", "Predicted", "Input", "Saliency"], "lllll", cells)
    write_text(folder / "saliency.md", "\n".join([text(facts["network"]), "", *table]) + "\n")
    names = {name: path.name for name, path in figures.items()}
    record = {**facts, "config": config.as_dict(), "tiles": rows, **checks, "figures": names}
    write_json(folder / "attribution.json", record)

    def log(run: Any) -> None:
        import wandb

        run.log({f"figures/{name}": wandb.Image(str(path)) for name, path in figures.items()})
        run.finish()

    network = facts["network"].split(" on ")[0]
    send(start_wandb("task2", f"{facts['run_id']}-task2", config, facts, network), log)

"""What Task 2 explains, a trained network and some test tiles, and the records that it leaves of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.cli import UsageError
from common.config import ScriptConfig
from common.data.dataset import Dataset
from common.files import write_json, write_text
from common.finetune.weights import SCRATCH
from common.markdown import markdown_table
from common.records.read import checkpoint_folder, is_finished, read_json, run_folder
from common.records.run import provenance, send, start_wandb

PACKAGES = ("captum", "torch", "torchvision", "numpy", "scipy", "matplotlib")


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
        return {
            "index": self.index,
            "label": self.label,
            "predicted": self.predicted,
            "probability": self.probability,
            **{part: f"fig/task2/{self.run_id}/{self.index:05d}-{part}.png" for part in ("input", "saliency")},
        }


def find_run(output_dir: Path, run_id: str | None) -> Mapping[str, Any]:
    """The config.json of the run to explain; UsageError if there is none, or if the named run is not finished.

    Without a name it is a finished Task 1 run with its best.pt: the one with most training tiles, of several the
    newest.
    """
    runs = output_dir / "runs"
    if run_id:
        if not is_finished(output_dir, run_id):
            raise UsageError(f"--run_id {run_id}: no finished run in {runs}; python task1.py makes one")
        run: Mapping[str, Any] = read_json(run_folder(output_dir, run_id) / "config.json")
        return run
    finished = [read_json(path.with_name("config.json")) for path in runs.glob("*/summary.json")]
    ours = [
        run
        for run in finished
        if run["task"] == "task1" and (checkpoint_folder(output_dir, run["run_id"]) / "best.pt").exists()
    ]
    if not ours:
        problem = f"no finished Task 1 run with its weights in {output_dir}"
        raise UsageError(f"{problem}: run python task1.py first, or name its --output_dir")
    return max(ours, key=lambda run: (run["tiles"]["train"], run["started"], run["run_id"]))


def origin(trained: Mapping[str, Any]) -> str:
    """How the network of this configuration was trained, in words."""
    weights = trained.get("weights", SCRATCH)
    return "trained from scratch" if weights == SCRATCH else f"from {Path(weights).name}, fine-tuned"


def choose_tiles(n_tiles: int, count: int, seed: int) -> list[int]:
    """`count` different tiles in random order, or all if there are fewer. Seed 0, ten tiles: the coursework's."""
    chosen: list[int] = np.random.default_rng(seed).choice(n_tiles, min(count, n_tiles), replace=False).tolist()
    return chosen


def one_of_each_class(labels: NDArray[Any], candidates: NDArray[np.bool_], seed: int) -> list[int]:
    """A random tile of each class among the candidates, by class; none of a class without a candidate.

    `labels` are (N,) integers, `candidates` (N,) bool.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[candidates[order]]
    _, first_places = np.unique(labels[order], return_index=True)
    chosen: list[int] = order[first_places].tolist()
    return chosen


def explained_tiles(
    run_id: str,
    dataset: Dataset,
    probabilities: NDArray[np.float64],
    indices: Sequence[int],
    maps: Mapping[str, NDArray[np.float32]],
) -> dict[int, Explained]:
    """The test tiles `indices` by index; `maps` (len(indices), H, W) are theirs by method.

    `probabilities` are (N, C), of the whole test split.
    """
    names, labels = dataset.class_names, dataset.test.labels
    return {
        index: Explained(
            run_id,
            index,
            dataset.test.images[index].permute(1, 2, 0).numpy(),
            names[labels[index]],
            names[probabilities[index].argmax()],
            float(probabilities[index].max()),
            {name: values[place] for name, values in maps.items()},
        )
        for place, index in enumerate(indices)
    }


def write_records(
    folder: Path,
    config: ScriptConfig,
    facts: Mapping[str, Any],
    shown: Sequence[Explained],
    checks: Mapping[str, Any],
    figures: Mapping[str, Path],
) -> None:
    """Write saliency.md and attribution.json into `folder`, and send their content to W&B.

    `facts` are those of task2.py; `checks` is the record that `check_methods` returns.
    """
    rows = [one.row for one in shown]
    write_text(folder / "saliency.md", saliency_table(rows))
    names = {name: path.name for name, path in figures.items()}
    record = {"config": config.as_dict(), **provenance(PACKAGES), "tiles": rows, **checks, "figures": names}
    write_json(folder / "attribution.json", {**facts, **record})

    def log(run: Any) -> None:
        import wandb

        table = wandb.Table(columns=list(rows[0]))
        for row in rows:
            images = {part: wandb.Image(str(config.output_dir / row[part])) for part in ("input", "saliency")}
            table.add_data(*{**row, **images}.values())
        run.log({"saliency": table})
        run.log({f"figures/{name}": wandb.Image(str(path)) for name, path in figures.items()})
        run.finish()

    network = facts["network"].split(" on ")[0]
    send(start_wandb("task2", f"{facts['run_id']}-task2", config, facts, network), log)


def saliency_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown table Index / Label / Predicted / Input / Saliency of runs/<run_id>/saliency.md."""
    cells = []
    for row in rows:
        tile = f"{row['index']:05d}"
        mark = "" if row["label"] == row["predicted"] else " ✗"
        images = [
            f"![{what} of tile {tile}, {row['label']}](../../{row[part]})"
            for what, part in (("Tile", "input"), ("Map", "saliency"))
        ]
        cells.append([tile, row["label"], f"{row['predicted']} ({row['probability']:.2f}){mark}", *images])
    return "\n".join(markdown_table(["Index", "Label", "Predicted", "Input", "Saliency"], "lllll", cells)) + "\n"

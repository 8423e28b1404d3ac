"""Task 2: saliency maps of Task 1's ResNet-18, and whether they can be trusted.

    python task2.py                   # explains the newest finished Task 1 run under --output_dir
    python task2.py --run_id ID       # explains that run

Ten test tiles, the coursework's ten on the full test split, are explained by Captum's Saliency in eval mode;
beside it stand SmoothGrad, Integrated Gradients, Grad-CAM and Occlusion. Then every method is checked: do its maps
change when the network is randomised, do the pixels that it names matter more than random ones, and than edges?
About two minutes on two CPU cores at 28 pixels (bench/saliency.py).

Leaves fig/task2/NNNNN-input.png and NNNNN-saliency.png for each tile, four figures fig/task2/<run_id>-*.png,
runs/<run_id>/saliency.md and runs/<run_id>/attribution.json.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common import checkpoint
from common.compute import Compute
from common.config import ScriptConfig, check_run_id, key, run_script
from common.data import Dataset, load_dataset
from common.errors import Fault, UsageError, first_line
from common.evaluation import evaluate
from common.files import atomic_path, write_json
from common.models import build_model
from common.pathmnist import CLASS_NAMES
from common.records import is_finished, read_json, run_folder
from common.tiles import DeviceTiles
from common.tracking import provenance, send, start_wandb
from common.training import derived_seed

MODEL_NAME = "resnet18"
SHOWN = 10
TARGETS = {"predicted": "the predicted one", "label": "the true one"}
PACKAGES = ("captum", "torch", "torchvision", "numpy", "scipy", "matplotlib")


@dataclass(frozen=True, kw_only=True)
class Task2Config(ScriptConfig):
    """Which run to explain, and how."""

    run_id: str | None = key(
        None, "the Task 1 run to explain (default: the newest finished one)", check=check_run_id
    )
    target: str = key("predicted", "the class whose logit is explained", choices=tuple(TARGETS))
    checked_tiles: int = key(256, "test tiles for the checks of the methods", at_least=2)
    seed: int = key(
        0, "seed of the choice of tiles, of noise and of random networks", at_least=0, at_most=2**32 - 1
    )


def main(config: Task2Config) -> None:
    """Task 1's run → network and tiles → maps → checks → figures, table and record."""
    compute = Compute.of(config.device, "fp32")
    compute.prepare_process()
    folder = find_run(config)
    record = read_json(folder / "config.json")
    run_id, trained = record["run_id"], record["config"]
    model = load_network(config.output_dir / "checkpoints" / run_id / "best.pt", trained["size"], compute)
    dataset = load_dataset(trained["dataset"], trained["size"], config.data_root, trained["train_tiles"])
    if dataset.fingerprint != record["data_fingerprint"]:
        raise Fault(f"{config.data_root}: its {dataset.title} is not what run {run_id} was trained on")
    print(f"explaining run {run_id}: {MODEL_NAME} trained on {dataset.title}, test tiles, on {compute.name}")

    test = DeviceTiles(dataset.test, compute.device)
    probabilities = evaluate(model, test, compute).probabilities
    labels, predicted = dataset.test.labels.numpy(), probabilities.argmax(axis=1)
    targets = torch.from_numpy(predicted if config.target == "predicted" else labels.copy())
    shown = choose_tiles(len(test), SHOWN, config.seed)
    right, wrong = one_of_each_class(labels, predicted, config.seed)

    from common.attribution import METHODS  # Captum: seconds of import, after the errors that a user can make
    from common.attribution_checks import check_methods

    def inputs_of(indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        where = torch.tensor(indices)
        inputs, _ = test.inputs(where.to(test.index_device))
        return inputs, targets[where].to(compute.device)

    pictured = sorted({*shown, *(index for index in right + wrong if index is not None)})
    by_method = {
        name: method.maps(model, *inputs_of(pictured), config.seed).cpu().numpy()
        for name, method in METHODS.items()
    }
    maps = {
        index: {name: values[place] for name, values in by_method.items()} for place, index in enumerate(pictured)
    }
    torch.manual_seed(derived_seed(config.seed, 0, "randomised network"))
    fresh = build_model(MODEL_NAME, len(dataset.class_names), dataset.size)
    checked = choose_tiles(len(test), config.checked_tiles, config.seed)
    checks = check_methods(model, fresh, *inputs_of(checked), config.seed)

    facts = {
        "run_id": run_id,
        "dataset": dataset.title,
        "synthetic": record["synthetic"],
        "network": f"{MODEL_NAME}, trained from scratch on {dataset.title}, seed {trained['seed']}",
        "target": config.target,
        "device": compute.name,
    }
    figures, rows = draw(config, facts, dataset, labels, probabilities, shown, (right, wrong), maps, checks)
    table = saliency_table(rows, folder)
    with atomic_path(folder / "saliency.md") as temporary:
        temporary.write_text(table, encoding="utf-8")
    write_json(
        folder / "attribution.json",
        {
            **facts,
            "config": config.as_dict(),
            **provenance(PACKAGES),
            "tiles": rows,
            **checks,
            "figures": {name: path.name for name, path in figures.items()},
        },
    )
    log_to_wandb(config, facts, rows, checks, figures)
    for result in checks["methods"].values():
        print(result["verdict"])
    print(f"records: {folder / 'saliency.md'}, {folder / 'attribution.json'}; figures:")
    for path in figures.values():
        print(f"  {path}")


def find_run(config: Task2Config) -> Path:
    """The folder of the Task 1 run to explain: the named one, or the newest that is finished.

    Raises UsageError where there is none, or where the named one is another task's or unfinished.
    """
    runs = config.output_dir / "runs"
    if config.run_id is not None:
        folder = run_folder(config.output_dir, config.run_id)
        if not (folder / "config.json").exists():
            raise UsageError(f"--run_id {config.run_id}: no such run in {runs}; python task1.py makes one")
        task = read_json(folder / "config.json").get("task")
        if task != "task1":
            raise UsageError(f"--run_id {config.run_id}: a run of {task}, not of task1; Task 2 explains Task 1's")
        if not is_finished(config.output_dir, config.run_id):
            raise UsageError(f"--run_id {config.run_id}: not finished; task1.py with this --run_id goes on")
        return folder
    finished = [path.parent for path in runs.glob("*/summary.json")]
    records = [(read_json(folder / "config.json"), folder) for folder in finished]
    ours = [(record["started"], folder) for record, folder in records if record.get("task") == "task1"]
    if not ours:
        raise UsageError(f"no finished Task 1 run in {runs}: run python task1.py first, or name its --output_dir")
    return max(ours)[1]


def load_network(path: Path, size: int, compute: Compute) -> nn.Module:
    """The trained ResNet-18 of a checkpoint, frozen, in eval mode, on the device.

    Raises UsageError for another architecture or number of classes, Fault for a checkpoint that is none.
    """
    saved = checkpoint.load(path)
    name, classes = saved.get("model_name"), len(saved.get("class_names", ()))
    if name != MODEL_NAME or classes != len(CLASS_NAMES):
        raise UsageError(
            f"{path}: {name} with {classes} classes; Task 2 explains a {MODEL_NAME} with {len(CLASS_NAMES)}"
        )
    model = build_model(MODEL_NAME, classes, size)
    try:
        model.load_state_dict(saved["state_dict"])
    except (KeyError, RuntimeError) as error:
        raise Fault(f"{path}: its weights do not fit a {MODEL_NAME} ({first_line(error)}); train again") from error
    model.to(compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval().requires_grad_(False)


def choose_tiles(n_tiles: int, count: int, seed: int) -> list[int]:
    """`count` different tiles (all, where there are fewer) in random order; seed 0, ten: the coursework's."""
    return [int(i) for i in np.random.default_rng(seed).choice(n_tiles, min(count, n_tiles), replace=False)]


def one_of_each_class(
    labels: np.ndarray, predicted: np.ndarray, seed: int
) -> tuple[list[int | None], list[int | None]]:
    """A random tile of each class that is classified correctly, and one that is not; None where there is none."""
    order = np.random.default_rng(seed).permutation(len(labels))

    def first(chosen: np.ndarray) -> int | None:
        return next((int(index) for index in order if chosen[index]), None)

    classes, correct = range(len(CLASS_NAMES)), labels == predicted
    return [first((labels == c) & correct) for c in classes], [first((labels == c) & ~correct) for c in classes]


def draw(
    config: Task2Config,
    facts: dict[str, Any],
    dataset: Dataset,
    labels: np.ndarray,
    probabilities: np.ndarray,
    shown: list[int],
    grid: tuple[list[int | None], list[int | None]],
    maps: dict[int, dict[str, np.ndarray]],
    checks: dict[str, Any],
) -> tuple[dict[str, Path], list[dict[str, Any]]]:
    """Draw everything; returns the run's figures by name, and a row of the table for each tile shown."""
    from common import attribution_figures as pictures  # matplotlib, as late as Captum

    names, folder = dataset.class_names, config.output_dir / "fig" / "task2"

    def explained(index: int) -> pictures.Explained:
        best = int(probabilities[index].argmax())
        return pictures.Explained(
            index,
            dataset.test.images[index].permute(1, 2, 0).numpy(),
            names[labels[index]],
            names[best],
            float(probabilities[index, best]),
            maps[index],
        )

    rows = []
    for index in shown:
        one = explained(index)
        target = one.label if config.target == "label" else one.predicted
        paths = {part: folder / f"{index:05d}-{part}.png" for part in ("input", "saliency")}
        pictures.tile_and_saliency(paths["input"], paths["saliency"], one, target)
        rows.append(
            {
                "index": index,
                "label": one.label,
                "predicted": one.predicted,
                "probability": one.probability,
                **{part: os.path.relpath(path, config.output_dir) for part, path in paths.items()},
            }
        )
    figures = {
        name: folder / f"{facts['run_id']}-{name}.png"
        for name in ("methods", "classes", "randomisation", "removal")
    }
    where = f"{facts['network']}; test tiles; class explained: {TARGETS[config.target]}"
    pictures.methods_panel(figures["methods"], [explained(index) for index in shown], title=where)
    right, wrong = ([None if index is None else explained(index) for index in side] for side in grid)
    pictures.class_grid(figures["classes"], names, right, wrong, title=where)
    by_method = {name: result["randomisation"] for name, result in checks["methods"].items()}
    n = checks["n"]
    pictures.randomisation(
        figures["randomisation"], by_method, title=f"{facts['network']}; {n['randomisation']} test tiles"
    )
    pictures.removal_curves(
        figures["removal"],
        {**checks["methods"], **checks["controls"]},
        title=f"{facts['network']}; {n['removal']} test tiles",
    )
    return figures, rows


def saliency_table(rows: list[dict[str, Any]], folder: Path) -> str:
    """The Markdown table Index / Label / Predicted / Input / Saliency, its links relative to `folder`."""
    lines = ["| Index | Label | Predicted | Input | Saliency |", "|---|---|---|---|---|"]
    for row in rows:
        name = f"tile {row['index']:05d}, {row['label']}"
        images = [
            f"![{what} of {name}](../../{row[part]})" for part, what in (("input", "Tile"), ("saliency", "Map"))
        ]
        predicted = f"{row['predicted']} ({row['probability']:.2f})"
        mark = "" if row["label"] == row["predicted"] else " ✗"
        lines.append(f"| {row['index']:05d} | {row['label']} | {predicted}{mark} | {images[0]} | {images[1]} |")
    return "\n".join(lines) + "\n"


def log_to_wandb(
    config: Task2Config,
    facts: dict[str, Any],
    rows: list[dict[str, Any]],
    checks: dict[str, Any],
    figures: dict[str, Path],
) -> None:
    """A W&B run of its own, named after Task 1's, with the table and the figures as images."""
    run = start_wandb("task2", f"{facts['run_id']}-task2", config, facts)

    def log(run: Any) -> None:
        import wandb

        data = [
            [
                row["index"],
                row["label"],
                row["predicted"],
                row["probability"],
                *(wandb.Image(str(config.output_dir / row[part])) for part in ("input", "saliency")),
            ]
            for row in rows
        ]
        columns: list[str | int] = ["index", "label", "predicted", "probability", "input", "saliency"]
        run.log({"saliency": wandb.Table(columns=columns, data=data)})
        run.log({f"figures/{name}": wandb.Image(str(path)) for name, path in figures.items()})
        run.summary.update({f"passes/{name}": result["passes"] for name, result in checks["methods"].items()})
        run.finish()

    send(run, log)


if __name__ == "__main__":
    run_script(main, Task2Config)

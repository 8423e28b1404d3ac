"""Task 2: saliency maps of Task 1's ResNet-18, and whether they can be trusted.

    python task2.py                   # explains the newest finished Task 1 run under --output_dir
    python task2.py --run_id ID       # explains that run

It shows ten test tiles (on the full test split, the coursework's ten) and their maps by Captum's Saliency in eval
mode, and by SmoothGrad, Integrated Gradients, Grad-CAM and Occlusion. Then it checks every method: do its maps
change when the network is randomised, do its pixels matter more than random pixels, and more than edges?
About two minutes on two CPU cores at 28 pixels (bench/results/one_offs.md).

Leaves NNNNN-input.png and NNNNN-saliency.png for each tile in fig/task2/<run_id>/, four figures
fig/task2/<run_id>-*.png, runs/<run_id>/saliency.md and runs/<run_id>/attribution.json.
"""

import common  # noqa: F401, I001 (before PyTorch: Ctrl-C during its import is one line)

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.attribution_records import write_records
from common.compute import Compute
from common.config import ScriptConfig, check_run_id, key, run_script
from common.data import load_dataset
from common.errors import Fault, UsageError
from common.evaluation import evaluate
from common.explained import (
    MODEL_NAME,
    TARGETS,
    choose_tiles,
    explained_tiles,
    one_of_each_class,
)
from common.models import build_model
from common.pathmnist import CLASS_NAMES
from common.records import checkpoint_folder, is_finished, read_json, run_folder
from common.tiles import DeviceTiles
from common.trained import load_trained
from common.training import derived_seed

SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Task2Config(ScriptConfig):
    """Which run to explain, and how."""

    run_id: str | None = key(
        None, "the Task 1 run to explain (default: the newest finished one with weights)", check=check_run_id
    )
    target: str = key("predicted", "the class whose logit is explained", choices=tuple(TARGETS))
    checked_tiles: int = key(256, "test tiles for the checks of the methods", at_least=3)
    seed: int = key(
        0, "seed of the choice of tiles, of noise and of random networks", at_least=0, at_most=2**32 - 1
    )


def main(config: Task2Config) -> None:
    """Task 1's run → network and tiles → maps → checks → figures, table and records."""
    compute = Compute.of(config.device, "fp32")
    compute.prepare_process()
    run = find_run(config.output_dir, config.run_id)
    run_id, trained = run["run_id"], run["config"]
    size = trained.get("resize_to") or trained["size"]
    path = checkpoint_folder(config.output_dir, run_id) / "best.pt"
    loaded = load_trained(path, compute.device)
    found, expected = (loaded.model_name, len(loaded.class_names)), (MODEL_NAME, len(CLASS_NAMES))
    if found != expected:
        raise UsageError("{}: {} with {} classes; Task 2 explains a {} with {}".format(path, *found, *expected))
    model = loaded.network
    dataset = load_dataset(trained["dataset"], trained["size"], config.data_root, trained["train_tiles"])
    if dataset.fingerprint != run["data_fingerprint"]:
        raise Fault(f"{config.data_root}: its {dataset.title} is not what run {run_id} was trained on")
    print(f"explaining run {run_id}: {MODEL_NAME} trained on {dataset.title}, test tiles, on {compute.name}")

    from common.attribution import METHODS  # Captum and matplotlib: seconds of import, so after a user's errors
    from common.attribution_checks import check_methods
    from common.attribution_figures import draw

    test = DeviceTiles(dataset.test, compute.device, resize_to=size)
    probabilities = evaluate(model, test, compute).probabilities
    labels, predicted = dataset.test.labels.numpy(), probabilities.argmax(axis=1)
    targets = torch.from_numpy(predicted) if config.target == "predicted" else dataset.test.labels

    def inputs_of(indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        where = torch.tensor(indices)
        inputs, _ = test.inputs(where.to(test.index_device))
        return inputs, targets[where].to(compute.device)

    groups = (
        choose_tiles(len(test), SHOWN, config.seed),
        one_of_each_class(labels, labels == predicted, config.seed),
        one_of_each_class(labels, labels != predicted, config.seed),
    )
    pictured = sorted({index for group in groups for index in group})
    inputs = inputs_of(pictured)
    maps = {name: way.maps(model, *inputs, config.seed).cpu().numpy() for name, way in METHODS.items()}
    explained = explained_tiles(run_id, dataset, probabilities, pictured, maps)
    shown, right, wrong = ([explained[index] for index in group] for group in groups)

    torch.manual_seed(derived_seed(config.seed, 0, "randomised network"))
    fresh = build_model(MODEL_NAME, len(dataset.class_names), size)
    checked = choose_tiles(len(test), config.checked_tiles, config.seed)
    checks = check_methods(model, fresh, *inputs_of(checked), config.seed)

    facts = {
        "run_id": run_id,
        "dataset": dataset.title,
        "synthetic": run["synthetic"],
        "network": f"{MODEL_NAME}, trained from scratch on {dataset.title}, seed {trained['seed']}",
        "target": config.target,
        "device": compute.name,
    }
    figures = draw(config.output_dir, facts, dataset.class_names, shown, right, wrong, checks)
    folder = run_folder(config.output_dir, run_id)
    write_records(folder, config, facts, shown, checks, figures)
    for result in checks["methods"].values():
        print(result["verdict"])
    print(f"records: {folder / 'saliency.md'}, {folder / 'attribution.json'}; figures:")
    for path in figures.values():
        print(f"  {path}")


def find_run(output_dir: Path, run_id: str | None) -> Mapping[str, Any]:
    """The config.json of the Task 1 run to explain: the named one, or the newest finished one with its best.pt.

    Raises UsageError if there is none, or if the named run is another task's or is not finished.
    """
    runs = output_dir / "runs"
    if run_id is None:
        finished = [read_json(path.with_name("config.json")) for path in runs.glob("*/summary.json")]
        ours = [run for run in finished if run.get("task") == "task1"]
        with_weights = [run for run in ours if (checkpoint_folder(output_dir, run["run_id"]) / "best.pt").exists()]
        if with_weights:
            return max(with_weights, key=lambda run: (run["started"], run["run_id"]))
        problem = f"no finished Task 1 run in {runs}"
        if ours:
            weights = output_dir / "checkpoints"
            problem = f"none of the {len(ours)} finished Task 1 runs in {runs} has its weights in {weights}"
        raise UsageError(f"{problem}: run python task1.py first, or name its --output_dir")
    path = run_folder(output_dir, run_id) / "config.json"
    if not path.exists():
        raise UsageError(f"--run_id {run_id}: no such run in {runs}; python task1.py makes one")
    run: Mapping[str, Any] = read_json(path)
    if run.get("task") != "task1":
        raise UsageError(f"--run_id {run_id}: a run of {run.get('task')}, not of task1; Task 2 explains Task 1's")
    if not is_finished(output_dir, run_id):
        raise UsageError(f"--run_id {run_id}: not finished; task1.py with this --run_id continues it")
    return run


if __name__ == "__main__":
    run_script(main, Task2Config)

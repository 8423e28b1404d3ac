"""Task 2: saliency maps of a trained network, and whether they can be trusted.

    python task2.py                   # Task 1's newest finished run, of those with the most training tiles
    python task2.py --run_id ID       # the network of that run: of task1.py, train.py or task5.py

It shows ten test tiles (on the full test split and with seed 0, the coursework's ten) and their maps by Captum's
Saliency in eval mode, and by SmoothGrad, Integrated Gradients, Grad-CAM and Occlusion. Then it checks every
method: do its maps change when the network is randomised, do its pixels matter more than random pixels, and more
than edges? With inputs of 64 pixels, on one core of an AMD EPYC, a ResNet-18 took six minutes, an
EfficientNet-Lite1 seven.

Leaves in my/ (see --output_dir) for each tile NNNNN-input.png and NNNNN-saliency.png in fig/task2/<run_id>/,
five figures fig/task2/<run_id>-*.png, runs/<run_id>/saliency.md and runs/<run_id>/attribution.json.
"""

from collections.abc import Sequence
from pathlib import Path

from common.cli import Fault, key, run_script  # before torch: common/__init__.py sets how its threads wait

# isort: split
import torch

from common.config import LAST_SEED, RunId, ScriptConfig
from common.data.batches import DeviceTiles
from common.data.dataset import load_dataset
from common.data.pathmnist import CLASS_NAMES
from common.explain import tiles
from common.explain.stages import grad_cam_layer
from common.finetune.trained import load_trained
from common.finetune.weights import SCRATCH
from common.records.read import best_weights, run_folder
from common.records.run import provenance
from common.training.device import Compute
from common.training.evaluation import evaluate
from common.training.loop import derived_seed

SHOWN = 10


class Task2Config(ScriptConfig):
    """Which run to explain, and how."""

    run_id: RunId | None = key(None, "the run to explain (default: Task 1's with most training tiles, the newest)")
    checked_tiles: int = key(256, "test tiles for the checks of the methods; at least 16 for a verdict", ge=6)
    seed: int = key(0, "seed of the choice of tiles, of noise and of random networks", ge=0, le=LAST_SEED)


def main(config: Task2Config) -> None:
    """A run → network and tiles → maps of the predicted class → checks → figures, table and records."""
    compute = Compute.of(config.device, "fp32").prepare_process()
    run = tiles.find_run(config.output_dir, config.run_id)
    run_id, keys = run["run_id"], run["config"]
    trained = load_trained(best_weights(config.output_dir, run_id), compute.device)
    model, size = trained.network, trained.input_size
    grad_cam_layer(model, torch.zeros(1, 3, size, size, device=compute.device))  # refuses a network without maps
    dataset = load_dataset(keys["dataset"], keys["size"], config.data_root, keys["train_tiles"])
    if dataset.fingerprint != run["data_fingerprint"]:
        problem = f"its {dataset.title} is not what run {run_id} was trained on"
        raise Fault(f"{config.data_root}: {problem}; name that data with --data_root")
    weights = Path(keys.get("weights", SCRATCH)).name  # of a file without its folders
    origin = "trained from scratch" if weights == SCRATCH else f"from {weights}, fine-tuned"
    network = f"{trained.model_name}, {origin} on {dataset.title_at(size)}, seed {keys['seed']}"
    facts = {"run_id": run_id, "dataset": dataset.title, "synthetic": run["synthetic"]}
    facts |= {"network": network, "device": compute.name}
    facts |= provenance(("captum", "torch", "torchvision", "numpy", "scipy", "matplotlib"))
    print(f"explaining run {run_id}: {network}; test tiles, on {compute.name}", flush=True)

    from common.explain.checks import FAILS, chance, check_methods, judge
    from common.explain.figures import draw
    from common.explain.maps import METHODS  # Captum and matplotlib: seconds of import, so after a user's errors

    test = DeviceTiles(dataset.test, compute.device, size)
    probabilities = evaluate(model, test).probabilities
    labels, predicted = dataset.test.labels.numpy(), probabilities.argmax(axis=1)

    def inputs_of(indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        where = torch.tensor(indices)
        return test.inputs(where)[0], torch.from_numpy(predicted)[where].to(compute.device)

    chosen = tiles.choose_tiles(len(test), SHOWN, config.seed)
    print(f"maps of {len(chosen)} tiles to show, by {len(METHODS)} methods", flush=True)
    inputs = inputs_of(chosen)
    maps = {name: way.maps(model, *inputs, config.seed).cpu().numpy() for name, way in METHODS.items()}
    shown = []
    for place, index in enumerate(chosen):
        tile = dataset.test.images[index].permute(1, 2, 0).numpy()
        label, guess = CLASS_NAMES[labels[index]], CLASS_NAMES[predicted[index]]
        own = {name: values[place] for name, values in maps.items()}
        shown.append(tiles.Explained(run_id, index, tile, label, guess, float(probabilities[index].max()), own))

    torch.manual_seed(derived_seed(config.seed, 0, "randomised network"))
    fresh = trained.untrained().to(compute.device)
    checked = tiles.choose_tiles(len(test), config.checked_tiles, config.seed)
    print(f"checks on {len(checked)} tiles:", flush=True)
    checks, means = check_methods(model, fresh, *inputs_of(checked), config.seed)

    figures = draw(config.output_dir, facts, shown, checks, means)
    folder = run_folder(config.output_dir, run_id)
    tiles.write_records(folder, config, facts, shown, checks, figures)
    for method in checks["methods"].values():
        outcome, conditions = judge(method, checks["n"])
        failed = f"not shown: {'; '.join(conditions)}" if outcome == FAILS else ""
        print(f"{method['title']:22}{outcome:24}{failed}".rstrip())
    print(chance(len(checks["methods"])))
    records = f"{folder / 'saliency.md'}, {folder / 'attribution.json'}"
    print(f"records: {records}; figures: {config.output_dir / 'fig' / 'task2' / run_id}-*.png")


if __name__ == "__main__":
    run_script(main, Task2Config)

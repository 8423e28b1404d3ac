"""Where is the gap between validation and test? An analysis of finished runs; none of its numbers is a result.

    python -m study.analysis                        # the runs of [task1], [task3] and [task5] in report.toml
    python -m study.analysis --published FILE.csv   # also compares them with MedMNIST's published predictions

1. How many test tiles does only our network classify rightly, how many only the published one? The file has a row
   for each test tile: its index and its probability of each class.
2. How much of the gap closes if the colours of the test tiles are matched to those of training tiles? This needs
   a run's checkpoint. Where it is missing now, the scores of an earlier analysis of the same run stay.
3. Which test tiles does every network get wrong?

Leaves analysis.json and fig/analysis/hard-tiles.png, which report.md shows. A record with published predictions is
not replaced by one without them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.color import lab2rgb, rgb2lab
from skimage.exposure import match_histograms

from common.cli import UsageError, first_line, key, run_script
from common.config import LAST_SEED, FolderConfig, device_key
from common.data.batches import DeviceTiles
from common.data.dataset import Dataset, Split, load_dataset
from common.files import digest, open_regular, write_json
from common.finetune.trained import load_trained
from common.records.read import Record, checkpoint_folder, read_json
from common.records.run import provenance
from common.training.device import Compute
from common.training.evaluation import Evaluation, evaluate
from common.training.metrics import accuracy, balanced_accuracy
from study.report_selection import Study

FIGURE = "fig/analysis/hard-tiles.png"
PROVENANCE = ("command", "commit", "started", "python", "platform", "versions")
SHOWN = 8  # tiles of each class in the figure
Pixels = NDArray[np.uint8]  # tiles, (N, H, W, 3)


class AnalysisConfig(FolderConfig):
    """The study to analyse, and the published predictions."""

    device: str = device_key()
    published: Path | None = key(None, "CSV file of published predictions of the test tiles: index, probabilities")
    seed: int = key(0, "seed of the choice of tiles", ge=0, le=LAST_SEED)


def main(config: AnalysisConfig) -> None:
    """Runs and data → the published predictions, matched colours, hard tiles → record and figure."""
    compute = Compute.of(config.device, "fp32")
    compute.prepare_process()
    study = Study(config.output_dir)
    records = [record for group in study.trained().values() for record in group]
    keys = records[0].config
    dataset = load_dataset(keys["dataset"], keys["size"], config.data_root, keys["train_tiles"])
    labels = dataset.test.labels.numpy()
    predicted = {}
    for record in records:
        arrays = record.arrays()
        if not np.array_equal(arrays["targets"], labels):
            raise UsageError(
                f"run {record.run_id} has other test tiles than {dataset.title} in {config.data_root}"
            )
        predicted[record.run_id] = arrays["best_logits"].argmax(axis=1)
    published = read_published(config.published, labels) if config.published else None
    path = config.output_dir / "analysis.json"
    before = read_json(path) if path.exists() else None
    if before and before["published"] and not published:
        raise UsageError(
            f"{path}: compares with {before['published']['file']}: name this file (--published), "
            "delete the record, or name another --output_dir"
        )
    content: dict[str, Any] = {
        "dataset": dataset.title,
        "synthetic": dataset.name == "phantom",
        "runs": {record.run_id: digest(record.folder / "scores.npz") for record in records},
        "published": None,
        "matched": matched_scores(records, dataset, config, compute),
        "kept": {},
        **provenance(("torch", "numpy", "scikit-image", "matplotlib")),
    }
    if before:
        keep(before, content)
    networks = list(predicted.values())
    if config.published and published:
        theirs = published.logits.argmax(axis=1)
        content["published"] = {
            "file": config.published.name,
            "sha256": digest(config.published),
            "scores": published.described(dataset.class_names),
            "only_right": {run_id: only_right(ours, theirs, labels) for run_id, ours in predicted.items()},
        }
        networks.append(theirs)
    hard = np.all([classes != labels for classes in networks], axis=0)
    counts = np.bincount(labels[hard], minlength=len(dataset.class_names)).tolist()
    content["hard"] = {
        "networks": len(networks),
        "per_class": dict(zip(dataset.class_names, counts, strict=True)),
    }
    if hard.any():
        figure = config.output_dir / FIGURE
        draw(figure, dataset, hard, most_frequent(np.stack(networks)), len(networks), config.seed)
        content["hard"] |= {"figure": FIGURE, "sha256": digest(figure)}
    write_json(path, content)
    print(f"{len(records)} runs, {hard.sum()} of {len(hard):,} test tiles are wrong in all; record: {path}")


def keep(before: Mapping[str, Any], content: dict[str, Any]) -> None:
    """Give `content` the scores on matched colours of an earlier record, for the very runs that lack a checkpoint.

    `kept` says, for each of these runs, which analysis made its scores.
    """
    made = {name: before[name] for name in PROVENANCE}
    for name, scores in content["matched"].items():
        for run_id, sha256 in content["runs"].items():
            earlier = before["matched"].get(name, {}).get(run_id)
            if run_id not in scores and earlier and before["runs"][run_id] == sha256:
                scores[run_id] = earlier
                content["kept"][run_id] = before["kept"].get(run_id, made)


def read_published(path: Path, labels: NDArray[np.int64]) -> Evaluation:
    """The predictions of a CSV file, for `labels` (N,); UsageError for a file that is not of these tiles."""
    try:
        with open_regular(path) as file:
            rows = np.loadtxt(file, delimiter=",", ndmin=2)
    except (OSError, ValueError) as error:
        raise UsageError(f"--published {path}: not a readable table ({first_line(error)})") from None
    tiles, classes = len(labels), int(labels.max()) + 1
    right = rows.shape == (tiles, classes + 1) and np.isfinite(rows).all()
    if not right or not np.array_equal(rows[:, 0], np.arange(tiles)):
        wanted = f"{tiles:,} rows of the tile's index, from 0 on, and {classes} probabilities"
        raise UsageError(f"--published {path}: must have {wanted}")
    return Evaluation(np.log(rows[:, 1:].clip(1e-30)), labels)


def only_right(ours: NDArray[Any], theirs: NDArray[Any], labels: NDArray[Any]) -> dict[str, int]:
    """How many tiles only one of two networks classifies rightly, for McNemar's test. All are (N,) classes."""
    return {
        "ours": int(((ours == labels) & (theirs != labels)).sum()),
        "theirs": int(((theirs == labels) & (ours != labels)).sum()),
    }


def most_frequent(classes: NDArray[Any]) -> NDArray[np.int64]:
    """For classes (networks, N), each column's most frequent one, (N,); the first of equals."""
    return np.array([np.bincount(column).argmax() for column in classes.T])


def match_lab(tiles: Pixels, reference: Pixels) -> Pixels:
    """Give all tiles together the mean and standard deviation of `reference` in CIELAB (Reinhard et al. 2001)."""
    source, target = rgb2lab(tiles), rgb2lab(reference)
    over = (0, 1, 2)
    scaled = (source - source.mean(over)) / source.std(over) * target.std(over) + target.mean(over)
    matched: Pixels = np.rint(lab2rgb(scaled).clip(0, 1) * 255).astype(np.uint8)
    return matched


def match_channels(tiles: Pixels, reference: Pixels) -> Pixels:
    """Give the red, green and blue of all tiles together the histograms of `reference`."""
    matched: Pixels = np.rint(match_histograms(tiles, reference, channel_axis=3)).astype(np.uint8)
    return matched


MATCHINGS: dict[str, Callable[[Pixels, Pixels], Pixels]] = {
    "mean and spread in CIELAB": match_lab,
    "histograms of red, green and blue": match_channels,
}


def matched_scores(
    records: Sequence[Record], dataset: Dataset, config: AnalysisConfig, compute: Compute
) -> dict[str, dict[str, dict[str, float]]]:
    """The ACC and balanced ACC on test tiles with matched colours, by matching and run; of runs with a checkpoint.

    The reference has as many training tiles of each class as the test split: else another mixture of tissues would
    look like other colours. The labels of the test tiles are used for this, so this is no way to classify tiles.
    """
    chosen = like(dataset.train.labels.numpy(), dataset.test.labels.numpy(), config.seed)
    given, reference = pixels(dataset.test), pixels(dataset.train, chosen)
    matched = {
        name: Split(torch.from_numpy(match(given, reference)).permute(0, 3, 1, 2), dataset.test.labels)
        for name, match in MATCHINGS.items()
    }
    scores: dict[str, dict[str, dict[str, float]]] = {name: {} for name in matched}
    for record in records:
        path = checkpoint_folder(config.output_dir, record.run_id) / "best.pt"
        if not path.exists():
            print(f"{record.run_id}: no checkpoint, so it is not scored on matched colours now")
            continue
        trained = load_trained(path, compute.device)
        for name, split in matched.items():
            tiles = DeviceTiles(split, compute.device, trained.input_size)
            found = evaluate(trained.network, tiles, compute)
            both = found.probabilities, found.targets
            scores[name][record.run_id] = {"acc": accuracy(*both), "balanced_acc": balanced_accuracy(*both)}
    return scores


def pixels(split: Split, chosen: NDArray[np.int64] | slice = slice(None)) -> Pixels:
    """The chosen tiles of a split."""
    return np.asarray(split.images.permute(0, 2, 3, 1).numpy()[chosen])


def like(labels: NDArray[np.int64], wanted: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Random indices into `labels` (N,) that give as many tiles of each class as `wanted` (M,); (M,), sorted.

    A class that has too few tiles gives some of them more than once.
    """
    draws = np.random.default_rng(seed)
    chosen = []
    for label, count in zip(*np.unique(wanted, return_counts=True), strict=True):
        tiles = np.flatnonzero(labels == label)
        chosen.append(draws.choice(tiles, count, replace=len(tiles) < count))
    return np.sort(np.concatenate(chosen))


def draw(
    path: Path, dataset: Dataset, hard: NDArray[np.bool_], wrong: NDArray[np.int64], n_networks: int, seed: int
) -> None:
    """Draw some tiles of each class that every network gets wrong, under each the most frequent wrong class.

    `hard` (N,) marks these test tiles, `wrong` (N,) has the classes.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    from common.figures import STYLE, save, wrap

    labels, images = dataset.test.labels.numpy(), pixels(dataset.test)
    draws = np.random.default_rng(seed)
    classes = np.unique(labels[hard]).tolist()
    with style.context(["default", STYLE, {"axes.grid": False}]):
        figure = Figure(figsize=(8, 1.05 * len(classes) + 0.6))
        grid = figure.subplots(len(classes), SHOWN, squeeze=False)
        for line, label in zip(grid, classes, strict=True):
            tiles = np.flatnonzero(hard & (labels == label))
            for axes in line:
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
            name = f"{wrap(dataset.class_names[label], 18)}\n({len(tiles)} of {(labels == label).sum():,})"
            line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
            for axes, tile in zip(line, np.sort(draws.permutation(tiles)[:SHOWN]), strict=False):
                axes.imshow(images[tile], interpolation="nearest")
                # The last word of a class's name identifies it.
                axes.set_title(dataset.class_names[wrong[tile]].split()[-1], fontsize=8)
        title = f"Test tiles that all {n_networks} networks get wrong · above each: the most frequent wrong class"
        figure.suptitle(f"{wrap(title, 95)}\n{dataset.title}", fontsize=10)
        save(figure, path)


if __name__ == "__main__":
    run_script(main, AnalysisConfig)

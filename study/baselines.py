"""Baselines without a network: how well a table of a tile's colours predicts its tissue.

    python -m study.baselines                                       # all training tiles of PathMNIST at 28 pixels
    python -m study.baselines --train_tiles 9000                    # a part of them, the same as for a network
    python -m study.baselines --dataset phantom --output_dir try    # generated tiles

Three classifiers of scikit-learn: logistic regression on the mean colour; gradient-boosted trees and nearest
neighbours on statistics of the colours and of their gradients. A network that is not better than these has learnt
little about shape. All tiles take about 20 minutes on one core; after a kill, the same command skips what is
finished. Each leaves the records of a run without epochs, in my/runs/<baseline>-<training tiles>-<seed>/.
"""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from common.cli import UsageError, key, run_script
from common.config import MIN_TRAIN_TILES, FolderConfig
from common.data import pathmnist
from common.data.dataset import SPLITS, Split, load_dataset
from common.data.shift import CHUNK, SHIFTS, shifted
from common.files import atomic_path, write_json, write_text
from common.records.read import is_finished, read_json, run_folder
from common.records.run import facts_of, provenance
from common.training.device import Compute
from common.training.evaluation import Evaluation, scores_of
from common.training.metrics import accuracy

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SMALLEST = 1e-12  # a probability of 0 has no logarithm
BASELINES = {  # their titles, and how many seeds: one where the seed changes nothing
    "mean_rgb": ("logistic regression on the mean colour", 1),
    "neighbours": ("nearest neighbours on colour and gradient statistics", 1),
    "boosting": ("boosted trees on colour and gradient statistics", 3),
}

Table = tuple[NDArray[np.float32], NDArray[np.int64]]  # the features (N, 28) and the labels (N,) of a split


class BaselinesConfig(FolderConfig):
    """The data set of the baselines."""

    dataset: str = key(pathmnist.NAME, "data set", choices=(pathmnist.NAME, "phantom"))
    size: int = key(28, "tile side in pixels", choices=tuple(pathmnist.MD5))
    train_tiles: int | None = key(None, "training tiles (default: all; phantom: 9,000)", ge=MIN_TRAIN_TILES)


def main(config: BaselinesConfig) -> None:
    """Data → features → each baseline and seed: choose by validation, score the test tiles once, leave records."""
    dataset = load_dataset(config.dataset, config.size, config.data_root, config.train_tiles)
    tables: dict[str, Table] = {}
    for name, (title, n_seeds) in BASELINES.items():
        for seed in range(n_seeds):
            run_id = f"{name}-{len(dataset.train)}-{seed}"
            folder = run_folder(config.output_dir, run_id)
            if is_finished(config.output_dir, run_id):
                if read_json(folder / "summary.json").get("data_fingerprint") != dataset.fingerprint:
                    raise UsageError(f"{folder}: a run on other data; use another --output_dir")
                print(f"{run_id}: finished already")
                continue
            if not tables:
                splits = {part: getattr(dataset, part) for part in SPLITS}
                splits |= dict(shifted(dataset.val, dataset.size))
                tables = {part: (features(one), one.labels.numpy()) for part, one in splits.items()}
            facts = facts_of("baselines", run_id, dataset, Compute.of("cpu", "fp32").name)
            keys = {**config.as_dict(), "baseline": name, "run_id": run_id, "seed": seed}
            source = provenance(("scikit-learn", "scipy", "numpy"))
            write_json(folder / "config.json", {"config": keys, **facts, **source})
            write_text(folder / "history.csv", "epoch\n")
            columns = slice(3) if name == "mean_rgb" else slice(None)
            seen = {part: (table[:, columns], labels) for part, (table, labels) in tables.items()}
            arrays, summary = fit_and_score(classifiers(name, seed), seen)
            with atomic_path(folder / "scores.npz") as temporary:
                np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
            write_json(folder / "summary.json", {**facts, "title": title, **summary})
            print(f"{run_id}: test/acc {summary['test/acc']:.4f}  test/auc {summary['test/auc']:.4f}", flush=True)


def classifiers(name: str, seed: int) -> dict[str, Any]:
    """The classifiers of a baseline, by their settings in words."""
    if name == "mean_rgb":
        return {"": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))}
    if name == "neighbours":
        numbers = (1, 5, 15, 45)
        return {f"{n} neighbours": make_pipeline(StandardScaler(), KNeighborsClassifier(n)) for n in numbers}
    # Without l2_regularization the leaves of rare errors grow without limit: validation ACC falls again.
    return {
        f"{n} trees, l2_regularization {strength}": HistGradientBoostingClassifier(
            max_iter=n, l2_regularization=strength, max_features=0.5, early_stopping=False, random_state=seed
        )
        for n, strength in ((100, 10), (500, 1), (500, 10))
    }


def features(split: Split) -> NDArray[np.float32]:
    """Statistics of each tile, (N, 28): of red, green, blue and of the gradient of their mean, all in 0..1.

    The columns are four means, four standard deviations, and four times each quantile. Flips and quarter turns of
    a tile do not change them.
    """
    tables = []
    for start in range(0, len(split), CHUNK):
        colours = (split.images[start : start + CHUNK].permute(0, 2, 3, 1) / 255).numpy()
        gradient = np.hypot(*np.gradient(colours.mean(axis=3), axis=(1, 2)))
        channels = np.concatenate([colours, gradient[..., None]], axis=3).reshape(len(colours), -1, 4)
        statistics = [channels.mean(axis=1), channels.std(axis=1), *np.quantile(channels, QUANTILES, axis=1)]
        tables.append(np.concatenate(statistics, axis=1).astype(np.float32))
    return np.concatenate(tables)


def fit_and_score(
    models: Mapping[str, Any], tables: Mapping[str, Table]
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays of scores.npz and the content of summary.json, as of a network; see `scores_of`.

    `tables` hold the splits, and the validation tiles under each shift. Validation ACC chooses one of the
    classifiers; only this one scores the test tiles.
    """
    started = time.perf_counter()

    def score(model: Any, name: str) -> Evaluation:
        table, labels = tables[name]
        # Boosted trees return columns one after the other, which a record does not allow.
        probabilities = np.ascontiguousarray(model.predict_proba(table))
        return Evaluation(np.log(probabilities.clip(SMALLEST)), labels, normalised=True).rounded()

    validations = {setting: score(model.fit(*tables["train"]), "val") for setting, model in models.items()}
    accuracies = {name: accuracy(one.predicted, one.targets) for name, one in validations.items()}
    setting = max(accuracies, key=accuracies.__getitem__)  # of equal ones the first
    validation, test = validations[setting], score(models[setting], "test")
    arrays = {"best_logits": test.logits, "targets": test.targets}
    arrays |= {"validate_classes": validation.predicted, "validate_targets": validation.targets}
    arrays |= {f"shifted_{name}": score(models[setting], name).predicted for name in SHIFTS}
    scores = scores_of(arrays, normalised=True)
    return arrays, {**scores, "setting": setting, "wall_seconds": time.perf_counter() - started}


if __name__ == "__main__":
    run_script(main, BaselinesConfig)

"""Baselines without a network: how well a table of a tile's colours predicts its tissue.

    python -m study.baselines                                       # all training tiles of PathMNIST at 28 pixels
    python -m study.baselines --train_tiles 9000                    # a part of them, the same as for a network
    python -m study.baselines --dataset phantom --output_dir try    # generated tiles

Three classifiers of scikit-learn: logistic regression on the mean colour; gradient-boosted trees and nearest
neighbours on statistics of the colours and of their gradients. A network that is not better than these has learnt
little about shape. All tiles take about 20 minutes on one core; after a kill, the same command skips what is
finished.

Each leaves the records of a run in runs/<baseline>-<training tiles>-<seed>/: config.json, summary.json, scores.npz
and a history.csv without epochs.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from common.cli import UsageError, key, run_script
from common.config import LAST_SEED, FolderConfig, size_key
from common.data import pathmnist
from common.data.dataset import SPLITS, Split, load_dataset
from common.data.pathmnist import PHANTOM_TRAIN_TILES
from common.data.shift import CHUNK, SHIFTS, shifted
from common.files import atomic_path, write_json, write_text
from common.records.read import COLUMNS, is_finished, read_json, run_folder
from common.records.run import provenance
from common.training.device import Compute
from common.training.evaluation import Evaluation
from common.training.metrics import accuracy

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SMALLEST = 1e-12  # a probability of 0 has no logarithm

Table = tuple[NDArray[np.float32], NDArray[np.int64]]  # the features (N, 28) and the labels (N,) of a split


@dataclass(frozen=True)
class Baseline:
    """A classifier of the first `n_columns` of `features`; validation ACC chooses one of its `settings`.

    `build` takes a seed and a setting's keys. `n_seeds` is 1 where the seed changes nothing.
    """

    title: str
    n_columns: int
    n_seeds: int
    settings: Sequence[Mapping[str, Any]]
    build: Callable[..., Any]


BASELINES = {
    "mean_rgb": Baseline(
        "logistic regression on the mean colour",
        n_columns=3,
        n_seeds=1,
        settings=[{}],
        build=lambda seed: make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
    ),
    "neighbours": Baseline(
        "nearest neighbours on colour and gradient statistics",
        n_columns=28,
        n_seeds=1,
        settings=[{"n_neighbors": n} for n in (1, 5, 15, 45)],
        build=lambda seed, **keys: make_pipeline(StandardScaler(), KNeighborsClassifier(**keys)),
    ),
    "boosting": Baseline(
        "boosted trees on colour and gradient statistics",
        n_columns=28,
        n_seeds=3,
        # Without l2_regularization the leaves of rare errors grow without limit: validation ACC falls again.
        settings=[
            {"max_iter": n, "l2_regularization": strength} for n, strength in ((100, 10), (500, 1), (500, 10))
        ],
        build=lambda seed, **keys: HistGradientBoostingClassifier(
            random_state=seed, early_stopping=False, max_features=0.5, **keys
        ),
    ),
}


class BaselinesConfig(FolderConfig):
    """The data set of the baselines."""

    dataset: str = key(pathmnist.NAME, "data set", choices=(pathmnist.NAME, "phantom"))
    size: int = size_key(28)
    train_tiles: int = key(
        lambda given: PHANTOM_TRAIN_TILES if given["dataset"] == "phantom" else pathmnist.COUNTS["train"],
        f"number of training tiles, as for a network (default: all; phantom: {PHANTOM_TRAIN_TILES})",
        ge=max(setting["n_neighbors"] for setting in BASELINES["neighbours"].settings),
        le=pathmnist.COUNTS["train"],
    )
    seed: int = key(0, "first seed", ge=0, le=LAST_SEED - 9)

    @property
    def runs(self) -> dict[str, tuple[str, int]]:
        """The baseline and the seed of each run, by its id."""
        return {
            f"{name}-{self.train_tiles}-{seed}": (name, seed)
            for name, baseline in BASELINES.items()
            for seed in range(self.seed, self.seed + baseline.n_seeds)
        }


def main(config: BaselinesConfig) -> None:
    """Data → features → each baseline and seed: choose by validation, score the test tiles once, leave records."""
    dataset = load_dataset(config.dataset, config.size, config.data_root, config.train_tiles)
    finished = [run_id for run_id in config.runs if is_finished(config.output_dir, run_id)]
    for run_id in finished:
        folder = run_folder(config.output_dir, run_id)
        if read_json(folder / "summary.json")["data_fingerprint"] != dataset.fingerprint:
            raise UsageError(f"{folder}: a run on other data; use another --output_dir")
        print(f"{run_id}: finished already")
    if len(finished) == len(config.runs):
        return
    splits = {split: getattr(dataset, split) for split in SPLITS} | dict(shifted(dataset.val, dataset.size))
    tables = {name: (features(split), split.labels.numpy()) for name, split in splits.items()}
    for run_id, (name, seed) in config.runs.items():
        if run_id in finished:
            continue
        folder = run_folder(config.output_dir, run_id)
        facts = {
            "task": "baselines",
            "run_id": run_id,
            "dataset": dataset.title,
            "synthetic": dataset.name == "phantom",
            "data_fingerprint": dataset.fingerprint,
            "tiles": {split: len(getattr(dataset, split)) for split in SPLITS},
            "device": Compute.of("cpu", "fp32").name,
        }
        keys = {**config.as_dict(), "baseline": name, "run_id": run_id, "seed": seed}
        source = provenance(("scikit-learn", "scipy", "numpy", "medmnist"))
        write_json(folder / "config.json", {"config": keys, **facts, **source})
        write_text(folder / "history.csv", ",".join(COLUMNS) + "\n")
        arrays, summary = fit_and_score(BASELINES[name], seed, tables, dataset.class_names)
        with atomic_path(folder / "scores.npz") as temporary:
            np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
        write_json(folder / "summary.json", {**facts, "title": BASELINES[name].title, **summary})
        print(f"{run_id}: test/acc {summary['test/acc']:.4f}  test/auc {summary['test/auc']:.4f}", flush=True)


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
    baseline: Baseline, seed: int, tables: Mapping[str, Table], class_names: tuple[str, ...]
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays of scores.npz and the content of summary.json, as `Trainer.test` gives them for a network.

    `tables` hold the splits, and the validation tiles under each shift. Only the chosen setting scores test tiles.
    """
    started = time.perf_counter()

    def score(model: Any, name: str) -> Evaluation:
        table, labels = tables[name]
        # Boosted trees return columns one after the other, which a record does not allow.
        probabilities = np.ascontiguousarray(model.predict_proba(table[:, : baseline.n_columns]))
        return Evaluation(np.log(probabilities.clip(SMALLEST)), labels, normalised=True).rounded()

    table, labels = tables["train"]
    models = [
        baseline.build(seed, **setting).fit(table[:, : baseline.n_columns], labels)
        for setting in baseline.settings
    ]
    validations = [score(model, "val") for model in models]
    accuracies = [accuracy(validation.logits, validation.targets) for validation in validations]
    chosen = int(np.argmax(accuracies))
    validation, test = validations[chosen], score(models[chosen], "test")
    foreign = {name: score(models[chosen], name) for name in SHIFTS}
    shifted_acc = {name: accuracy(evaluation.logits, evaluation.targets) for name, evaluation in foreign.items()}
    described = test.described(class_names)
    arrays = {
        "best_logits": test.logits,
        "targets": test.targets.astype(np.uint8),
        "validate_logits": validation.logits,
        "validate_targets": validation.targets.astype(np.uint8),
        **{f"shifted_{name}": one.logits.argmax(1).astype(np.uint8) for name, one in foreign.items()},
    }
    summary = {
        "test/auc": described["auc"]["value"],
        "test/acc": described["acc"]["value"],
        "best": described,
        "validate": validation.summary("validate"),
        "validate/shifted_acc": fmean(shifted_acc.values()),
        "shifted": shifted_acc,
        "setting": baseline.settings[chosen],
        "tried": [
            {**setting, "validate/acc": value}
            for setting, value in zip(baseline.settings, accuracies, strict=True)
        ],
        "wall_seconds": time.perf_counter() - started,
    }
    return arrays, summary


if __name__ == "__main__":
    run_script(main, BaselinesConfig)

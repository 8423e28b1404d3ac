"""Do a run's records agree? Every score is computed again from its outputs in scores.npz."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

import numpy as np

from common.data.pathmnist import COUNTS
from common.errors import Fault
from common.records.read import Record
from common.training import metrics
from common.training.evaluation import Evaluation, best_epoch

TOLERANCE = 1e-9
LOSS_ROUNDED = 1e-4  # of the outputs to float16
# The classes of PathMNIST's test and validation tiles: SHA-256 of their bytes (uint8).
LABELS = {
    "targets": "3d08a60fe2cfec1415a3f0d38aabb442c646ec290e6be54b9e0242dff38730a7",
    "validate_targets": "d8ec3b53a6e1062b7cd0558c19d4907b32aaea691a4aa77c672634aa499d9947",
}
SHARED = ("task", "run_id", "dataset", "synthetic", "data_fingerprint", "tiles", "device")
MAY_CHANGE_NOTHING = {"ablation", "early_stopping_patience", "early_stopping_delta", "run_id"}


def check_runs(records: Iterable[Record], seeds_in_names: bool) -> None:
    """Raise Fault, naming the record, where one contradicts itself or repeats another one.

    With `seeds_in_names` a run's id must end with its seed, as those of this study do.
    """
    seen: dict[str, Record] = {}
    for record in records:
        try:
            check_run(record)
        except (KeyError, TypeError) as error:
            raise _fault(record, f"a key is missing or of another type ({error})") from error
        seed = record.config["seed"]
        number = re.search(r"(?:-|seed)(\d+)$", record.run_id)
        if seeds_in_names and number and int(number[1]) != seed:
            raise _fault(record, f"its seed is {seed}, its name says {number[1]}")
        twin = seen.setdefault(hashlib.sha256(record.arrays()["best_logits"].tobytes()).hexdigest(), record)
        if twin is not record and not may_be_equal(record.config, twin.config):
            raise _fault(record, f"it has the very outputs of {twin.run_id}")


def may_be_equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two configurations can give the same networks: where early stopping stops nothing."""
    return {name for name in {**one, **other} if one.get(name) != other.get(name)} <= MAY_CHANGE_NOTHING


def check_run(record: Record) -> None:
    """Raise Fault where a run's summary is not what its outputs, its history and its configuration give."""
    summary, arrays, config = record.summary, record.arrays(), record.config
    for name in SHARED:
        if summary[name] != record.facts[name]:
            raise _fault(record, f"{name} is not that of config.json")
    if config["run_id"] != record.run_id:
        raise _fault(record, "run_id is not that of config.json")
    if config["dataset"] == "pathmnist":
        for name, sha256 in LABELS.items():
            if hashlib.sha256(arrays[name].astype(np.uint8).tobytes()).hexdigest() != sha256:
                raise _fault(record, f"{name} in scores.npz are not PathMNIST's")
        if summary["synthetic"] or (config["train_tiles"] or COUNTS["train"]) != summary["tiles"]["train"]:
            raise _fault(record, "the data are not those of config.json")
    if record.history:  # a baseline has no epochs
        best = best_epoch(record.history, config["select_on"])
        if summary["validate"] != record.history[best - 1]:
            raise _fault(record, "its validation scores are not those of the best epoch in history.csv")
        epochs = {"best": best, "tta": best, "last": len(record.history)}
        if any(summary[weights]["epoch"] != epoch for weights, epoch in epochs.items() if weights in summary):
            raise _fault(record, "its epochs are not those of history.csv")
    for weights in ("last", "best", "tta"):
        if weights in summary:
            recorded = summary[weights]
            names = tuple(recorded["auc_per_class"])
            logits, targets = arrays[f"{weights}_logits"], arrays["targets"].astype(np.int64)
            computed = Evaluation(logits, targets, normalised="baseline" in config).described(names)
            for name, value in computed.items():  # a record from before a score existed lacks it
                if name in recorded and not close(recorded[name], value, TOLERANCE):
                    raise _fault(record, f"{name} of the {weights} weights is not what scores.npz gives")
    if any(summary[f"test/{name}"] != summary["best"][name]["value"] for name in ("acc", "auc")):
        raise _fault(record, "test/acc and test/auc are not those of the best weights")
    check_validation(record, arrays)


def check_validation(record: Record, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise Fault where a validation score is not what the kept outputs give.

    The scores were computed before the outputs were rounded to float16. So a tile whose two best classes have the
    same output there may count for either, and a pair of tiles with the same output for either order. A baseline
    was scored after the rounding.
    """
    recorded, shifted = record.summary["validate"], record.summary["shifted"]
    logits, targets = arrays["validate_logits"].astype(np.float64), arrays["validate_targets"].astype(np.int64)
    second, first = np.sort(logits, axis=1)[:, -2:].T
    exact = "baseline" in record.config
    ties = 0 if exact else int((first == second).sum())
    tied = 0 if exact else tied_pairs(logits, targets)
    counts = np.bincount(targets)
    per_class = len(counts) * int(counts[counts > 0].min())
    loss = -logits[np.arange(len(targets)), targets].mean()
    computed = {
        "validate/loss": (loss, LOSS_ROUNDED * (1 + loss)),
        "validate/auc": (metrics.auc(logits, targets), tied / 2 + TOLERANCE),
        "validate/acc": (metrics.accuracy(logits, targets), ties / len(targets) + TOLERANCE),
        "validate/balanced_acc": (metrics.balanced_accuracy(logits, targets), ties / per_class + TOLERANCE),
    }
    for name, (value, tolerance) in computed.items():
        if name in recorded and not close(recorded[name], value, tolerance):
            raise _fault(record, f"{name} is {recorded[name]:.4f}, scores.npz gives {value:.4f}")
    classes = {name.removeprefix("shifted_"): values for name, values in arrays.items() if "shifted_" in name}
    found = {name: float((values == targets).mean()) for name, values in classes.items()}
    if not close(shifted, found, TOLERANCE) or not close(
        record.summary["validate/shifted_acc"], fmean(found.values()), TOLERANCE
    ):
        raise _fault(record, "the ACC on shifted validation tiles is not what scores.npz gives")


def tied_pairs(logits: np.ndarray, targets: np.ndarray) -> float:
    """The share of the pairs of a class's tile and another tile with the same output; the mean over classes."""
    shares = []
    for label, outputs in enumerate(logits.T):
        tiles, others = outputs[targets == label], np.sort(outputs[targets != label])
        if len(tiles) and len(others):
            ties = np.searchsorted(others, tiles, "right") - np.searchsorted(others, tiles, "left")
            shares.append(ties.mean() / len(others))
    return fmean(shares)


def close(recorded: Any, computed: Any, tolerance: float) -> bool:
    """Whether two JSON values are equal, numbers up to `tolerance`."""
    if isinstance(recorded, Mapping) and isinstance(computed, Mapping):
        return recorded.keys() == computed.keys() and all(
            close(recorded[name], computed[name], tolerance) for name in recorded
        )
    if isinstance(recorded, int | float) and isinstance(computed, int | float):
        return abs(recorded - computed) <= tolerance
    return bool(recorded == computed)


def _fault(record: Record, what: str) -> Fault:
    return Fault(f"{record.folder}: {what}; restore the record, or train the run again")

"""Whether a run's scores follow from its own outputs: each is computed again from scores.npz."""

import hashlib
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.data import pathmnist
from common.records.read import Record, unreadable
from common.training.evaluation import Evaluation, best_epoch

EQUAL = 1e-9
# Earlier versions took a softmax of a baseline's log-probabilities, which rounds once more.
BASELINE_EQUAL, BASELINE_CALIBRATION = 5e-5, 1e-3
# On a GPU, and where a run went on on another machine, the same weights may give slightly other outputs when they
# are scored again: a share of the tiles.
OTHER_OUTPUTS = 1e-3


def check_scores(record: Record) -> None:
    """Raise Fault, naming file and key, where a score of the record is not what scores.npz gives.

    The outputs in scores.npz are rounded. Test scores were computed from them, so they must be equal; the scores
    of validation tiles were computed before, so they must lie within what the rounding allows.
    """
    try:
        _check(record)
    except (KeyError, ValueError) as error:  # an array or a key is missing, or has another shape
        raise unreadable(record.folder / "scores.npz", f"it does not fit summary.json: {error}") from error


def _check(record: Record) -> None:
    summary, arrays, baseline = record.summary, record.arrays(), "baseline" in record.config
    n_tiles = summary["tiles"]["train"]
    for name, values in (("run_id", (record.run_id,)), ("train_tiles", (None, n_tiles))):
        if record.config[name] not in values:
            problem = f"config.{name}: it is {record.config[name]}, in summary.json {values[-1]}"
            raise unreadable(record.folder / "config.json", problem)
    targets = {"test": arrays["targets"], "val": arrays["validate_targets"]}
    if record.facts["data_fingerprint"].startswith(pathmnist.MD5[28]):
        for split, sha256 in pathmnist.LABELS_SHA256.items():
            if hashlib.sha256(targets[split].astype(np.uint8).tobytes()).hexdigest() != sha256:
                raise unreadable(record.folder / "scores.npz", f"its {split} labels are not those of PathMNIST")

    found: dict[str, Any] = {}
    for weights in ("best", "last", "tta"):
        if weights in summary:
            logits, labels = arrays[f"{weights}_logits"], targets["test"].astype(np.int64)
            scores = Evaluation(logits, labels, normalised=baseline).described(
                tuple(summary[weights]["auc_per_class"])
            )
            # A record from before a score existed lacks it.
            found[weights] = {name: value for name, value in scores.items() if name in summary[weights]}
    found |= {f"test/{name}": summary["best"][name]["value"] for name in ("auc", "acc")}
    found["shifted"] = {name: np.mean(arrays[f"shifted_{name}"] == targets["val"]) for name in summary["shifted"]}
    found["validate/shifted_acc"] = fmean(found["shifted"].values())
    if record.history:
        best = best_epoch(record.history, record.config["select_on"])
        epochs = {"best": best, "tta": best, "last": len(record.history)}
        for weights in epochs.keys() & found.keys():
            found[weights]["epoch"] = epochs[weights]
        found["validate"] = dict(record.history[best - 1])
    for name, value in found.items():
        if where := _difference(summary.get(name), value, name, BASELINE_EQUAL if baseline else EQUAL):
            raise unreadable(record.folder / "summary.json", where)

    exact = record.facts["device"].endswith(("thread", "threads")) and ", then " not in record.facts["device"]
    slack = EQUAL if exact else OTHER_OUTPUTS
    for name, (low, high) in _bounds(arrays["validate_logits"], targets["val"]).items():
        value = summary["validate"].get(name)
        if value is not None and not low - slack <= value <= high + slack:
            where = f"validate.{name}: it is {value}, scores.npz gives {low:.6f} to {high:.6f}"
            raise unreadable(record.folder / "summary.json", where)


def _difference(recorded: Any, computed: Any, key: str, tolerance: float) -> str:
    """Where two JSON values differ, numbers by more than `tolerance`, in words; an empty string without one."""
    if isinstance(recorded, Mapping) and isinstance(computed, Mapping):
        pairs = ((f"{key}.{name}", recorded.get(name), value) for name, value in computed.items())
        differing = (_difference(before, now, name, tolerance) for name, before, now in pairs)
        return next(filter(None, differing), "")
    same = recorded == computed
    if isinstance(recorded, int | float) and isinstance(computed, int | float):
        calibration = tolerance > EQUAL and key.endswith("expected_calibration_error")
        same = abs(recorded - computed) <= (BASELINE_CALIBRATION if calibration else tolerance)
    return "" if same else f"{key}: it is {recorded}, the run's outputs and history give {computed}"


def _bounds(logits: NDArray[np.floating], targets: NDArray[np.integer]) -> dict[str, tuple[float, float]]:
    """The lowest and highest scores of outputs that are `logits` (N, C) after rounding to float16.

    Rounding keeps the order of values but may make them equal. So equal values may have been in either order.
    """
    wide, places = logits.astype(np.float64), np.arange(len(targets))
    own, others = wide[places, targets], wide.copy()
    others[places, targets] = -np.inf
    counts = np.bincount(targets)
    areas, right = [], (own > others.max(1), own >= others.max(1))
    for label in np.flatnonzero((counts > 0) & (counts < len(targets))):
        positive, negative = wide[targets == label, label], np.sort(wide[targets != label, label])
        areas.append(
            [np.searchsorted(negative, positive, side).mean() / len(negative) for side in ("left", "right")]
        )
    recalls = [np.bincount(targets, one)[counts > 0] / counts[counts > 0] for one in right]
    return {
        "validate/acc": (right[0].mean(), right[1].mean()),
        "validate/balanced_acc": (recalls[0].mean(), recalls[1].mean()),
        "validate/auc": tuple(np.mean(areas, axis=0)) if areas else (0.0, 1.0),
    }

"""Whether a run's scores follow from its own outputs: each is computed again from scores.npz."""

import hashlib
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import numpy as np

from common.data import pathmnist
from common.records.read import Record, unreadable
from common.training.evaluation import Evaluation, best_epoch

EQUAL = 1e-9  # the rounding of sums


def check_scores(record: Record) -> None:
    """Raise Fault, naming file and key, where a score of the record is not what scores.npz gives."""
    summary, arrays = record.summary, record.arrays()
    for name, values in (("run_id", (record.run_id,)), ("train_tiles", (None, summary["tiles"]["train"]))):
        if record.config[name] not in values:
            problem = f"config.{name}: it is {record.config[name]}, in summary.json {values[-1]}"
            raise unreadable(record.folder / "config.json", problem)
    try:
        targets = {"test": arrays["targets"], "val": arrays["validate_targets"]}
        shifted = {name: arrays[f"shifted_{name}"] for name in summary["shifted"]}
        outputs = {name: arrays[f"{name}_logits"] for name in ("best", "last", "tta") if name in summary}
    except KeyError as error:
        raise unreadable(record.folder / "scores.npz", f"it does not fit summary.json: {error}") from error
    if record.facts["data_fingerprint"].startswith(pathmnist.MD5[28]):
        for split, sha256 in pathmnist.LABELS_SHA256.items():
            if hashlib.sha256(targets[split].astype(np.uint8).tobytes()).hexdigest() != sha256:
                raise unreadable(record.folder / "scores.npz", f"its {split} labels are not those of PathMNIST")

    def evaluation(logits: np.ndarray, split: str) -> Evaluation:
        return Evaluation(logits, targets[split].astype(np.int64), normalised="baseline" in record.config)

    found: dict[str, Any] = {}
    for weights, logits in outputs.items():
        scores = evaluation(logits, "test").described(tuple(summary[weights]["auc_per_class"]))
        # A record from before a score existed lacks it.
        found[weights] = {name: value for name, value in scores.items() if name in summary[weights]}
    found |= {f"test/{name}": summary["best"][name]["value"] for name in ("auc", "acc")}
    found["shifted"] = {name: np.mean(predicted == targets["val"]) for name, predicted in shifted.items()}
    found["validate/shifted_acc"] = fmean(found["shifted"].values())
    if record.history:
        best = best_epoch(record.history, record.config["select_on"])
        epochs = {"best": best, "tta": best, "last": len(record.history)}
        for weights in found.keys() & epochs.keys():
            found[weights]["epoch"] = epochs[weights]
        found["validate"] = dict(record.history[best - 1])
    found.setdefault("validate", {}).update(evaluation(arrays["validate_logits"], "val").summary("validate"))
    if difference := _difference(summary, found):
        raise unreadable(record.folder / "summary.json", difference)


def _difference(recorded: Any, computed: Any, key: str = "") -> str:
    """Where two JSON values differ, numbers by more than rounding, in words; an empty string without one."""
    if isinstance(computed, Mapping):
        inner = [(f"{key}.{name}".strip("."), recorded.get(name), value) for name, value in computed.items()]
        differing = (_difference(before, now, name) for name, before, now in inner)
        return next(filter(None, differing), "")
    same = recorded == computed
    if isinstance(recorded, int | float) and isinstance(computed, int | float):
        same = abs(recorded - computed) <= EQUAL
    return "" if same else f"{key}: it is {recorded}, the run's outputs and history give {computed}"

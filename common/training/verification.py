"""Whether a run's scores follow from its own outputs: each is computed again from scores.npz.

The loss and the AUC of the validation tiles do not stand there: they are those of history.csv.
"""

import hashlib

import numpy as np

from common.data import pathmnist
from common.records.read import Record, unreadable
from common.training.evaluation import score_difference, scores_of


def check_scores(record: Record) -> None:
    """Raise Fault, naming file and key, where a score of the record is not what scores.npz gives."""
    try:
        _check(record)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise unreadable(record.folder / "summary.json", error) from error


def _check(record: Record) -> None:
    summary, arrays = record.summary, record.arrays()
    for name, values in (("run_id", (record.run_id,)), ("train_tiles", (None, summary["tiles"]["train"]))):
        if record.config[name] not in values:
            problem = f"config.{name}: it is {record.config[name]}, in summary.json {values[-1]}"
            raise unreadable(record.folder / "config.json", problem)
    if (record.config["dataset"], record.config["size"]) == (pathmnist.NAME, 28):
        for split, name in (("test", "targets"), ("val", "validate_targets")):
            sha256 = hashlib.sha256(arrays[name].astype(np.uint8).tobytes()).hexdigest()
            if sha256 != pathmnist.LABELS_SHA256[split]:
                problem = f"its {split} labels are not those of {pathmnist.TITLE}"
                raise unreadable(record.folder / "scores.npz", problem)
    select_on = record.config.get("select_on", "last")  # a baseline has no epochs
    found = scores_of(arrays, "baseline" in record.config, record.history, select_on)
    if missing := {"best", "tta"} & (summary.keys() - found.keys()):
        raise unreadable(record.folder / "scores.npz", f"it has no outputs for {min(missing)!r}")
    if difference := score_difference(summary, found):
        raise unreadable(record.folder / "summary.json", difference)

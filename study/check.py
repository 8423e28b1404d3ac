"""Whether the runs of a page stand for themselves: scores follow from outputs, and no run repeats another one."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from common.cli import Fault
from common.records.read import Record
from common.training.verification import check_scores

MAY_CHANGE_NOTHING = {"ablation", "early_stopping_patience", "early_stopping_delta", "run_id"}


def check_runs(records: Iterable[Record], seeds_in_names: bool) -> None:
    """Raise Fault, naming the record, where one contradicts itself or repeats another one.

    With `seeds_in_names` a run's id must end with its seed, as those of this study do.
    """
    seen: dict[str, Record] = {}
    for record in records:
        check_scores(record)
        config, seed = record.config, record.config["seed"]
        number = re.search(r"(?:-|seed)(\d+)$", record.run_id)
        if seeds_in_names and number and int(number[1]) != seed:
            raise _fault(record, f"its seed is {seed}, its name says {number[1]}")
        outputs = record.arrays()["best_logits"].tobytes()
        twin = seen.setdefault(hashlib.sha256(outputs).hexdigest(), record)
        if twin is not record and not may_be_equal(config, twin.config):
            raise _fault(record, f"it has the very outputs of {twin.run_id}")


def may_be_equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two configurations can give the same networks: where early stopping stops nothing."""
    return {name for name in {**one, **other} if one.get(name) != other.get(name)} <= MAY_CHANGE_NOTHING


def _fault(record: Record, what: str) -> Fault:
    return Fault(f"{record.folder}: {what}; restore the record, or train the run again")

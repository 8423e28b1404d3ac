"""Two checks of the runs of a page: none is a copy of another one, and a name with a number has its seed."""

import hashlib
import re
from collections.abc import Iterable

from common.cli import Fault
from common.records.read import Record

# Two runs may have the same outputs where only these keys differ: early stopping may stop nothing.
MAY_CHANGE_NOTHING = {"ablation", "early_stopping_patience", "early_stopping_delta", "run_id"}


def check_runs(records: Iterable[Record]) -> None:
    """Raise Fault, naming the record, where one repeats another one, or a run's id does not end with its seed."""
    seen: dict[str, Record] = {}
    for record in records:
        config, problem = record.config, ""
        number = re.search(r"(?:-|seed)(\d+)$", record.run_id)
        if number and int(number[1]) != config["seed"]:
            problem = f"its seed is {config['seed']}, its name says {number[1]}"
        twin = seen.setdefault(hashlib.sha256(record.arrays()["best_logits"].tobytes()).hexdigest(), record)
        differing = {key for key in {**config, **twin.config} if config.get(key) != twin.config.get(key)}
        # Of the ablation's rows, only these two may give equal outputs.
        rows = {config.get("ablation"), twin.config.get("ablation")} - {"combined", "without_early_stopping"}
        if twin is not record and (rows or not differing <= MAY_CHANGE_NOTHING):
            problem = f"it has the very outputs of {twin.run_id}"
        if problem:
            raise Fault(f"{record.folder}: {problem}; restore the record, or train the run again")

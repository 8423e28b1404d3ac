"""A program for the tests of the sweeps: it leaves the records of a training run without training."""

import os
import time
from typing import Any

import example_records

from common.cli import Fault, Untrainable, UsageError, key, run_script
from common.config import TrainingConfig
from common.files import write_csv, write_json


class FakeConfig(TrainingConfig):
    """The keys of the fake training."""

    row: str = key("a", "a row of the grid")
    quality: float = key(0.5, "the metric of the last epoch", le=1)
    n_epochs: int = key(1, "epochs", ge=1)
    pause: float = key(0.0, "seconds per epoch; 0 where output_dir has a file no-pause")
    together: int = key(1, "wait until so many runs have started")


def main(config: FakeConfig) -> None:
    """Write all records, and a line in starts.txt and spans.txt, among others."""
    begun, folder = time.monotonic(), config.output_dir / "runs" / config.run_id

    def note(name: str, *words: Any) -> None:
        with open(config.output_dir / name, "a") as file:
            print(*words, file=file)

    note("processes.txt", os.getpid())
    note("starts.txt", config.run_id)
    note("environment.txt", *map(os.environ.get, ("WANDB_PROJECT", "WANDB_RUN_GROUP", "OMP_NUM_THREADS")))
    while len((config.output_dir / "starts.txt").read_text().split()) < config.together:
        if time.monotonic() > begun + 120:
            raise UsageError("it is alone")
        time.sleep(0.02)
    if (config.output_dir / "disk-is-full").exists():
        raise Fault("No space left on device")
    if config.quality < -1:
        raise Untrainable("the loss became nan")
    if config.quality < 0:
        raise UsageError(f"--quality {config.quality}: broken")
    facts = {**example_records.facts(config.as_dict(), "task3"), "dataset": "no data"}
    write_json(folder / "config.json", facts)
    history = []
    for epoch in range(1, config.n_epochs + 1):
        time.sleep(0 if (config.output_dir / "no-pause").exists() else config.pause)
        history.append(example_records.row(epoch, config.quality * epoch / config.n_epochs))
        write_csv(folder / "history.csv", history)
    write_json(folder / "summary.json", {})  # only its presence is asked for
    note("spans.txt", begun, time.monotonic())


if __name__ == "__main__":
    run_script(main, FakeConfig)

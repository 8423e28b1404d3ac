"""Train the trials that choose the study's recipes, and print their table.

    python -m study.recipes --data_root FOLDER             # two trials at a time, one thread each; it continues
    python -m study.recipes --data_root FOLDER --jobs 0    # the table of what is finished

recipes.yaml has the candidates and the rule of choice. The records are runs/recipe-NAME-SEED.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from common.cli import key, run_script
from common.config import FolderConfig
from common.files import read_text
from common.markdown import markdown_table
from common.records.read import is_finished, read_json, run_folder

FILE = Path(__file__).resolve().parent.parent / "recipes.yaml"


class RecipesConfig(FolderConfig):
    """How many trials run at the same time."""

    jobs: int = key(2, "trials at the same time, one thread each; 0: only print the table", ge=0, le=64)


@dataclass(frozen=True)
class Trial:
    """One candidate of one group with one seed."""

    group: str
    candidate: str
    changes: Mapping[str, Any]
    seed: int
    program: str
    keys: Mapping[str, Any]

    @property
    def run_id(self) -> str:
        """The name of the trial's run."""
        return f"recipe-{self.candidate}-{self.seed}"

    def command(self, config: RecipesConfig) -> list[str]:
        """The command that trains it."""
        folders = {"data_root": config.data_root, "output_dir": config.output_dir}
        keys = {**self.keys, **folders, "seed": self.seed, "run_id": self.run_id}
        program = FILE.parent / self.program
        return [sys.executable, str(program), *(f"--{name}={value}" for name, value in keys.items())]


def read_trials(file: Path = FILE) -> list[Trial]:
    """The trials of a recipes.yaml, seed by seed."""
    content = yaml.safe_load(read_text(file))
    return [
        Trial(group, candidate, changes, seed, part["program"], {**content["keys"], **part["keys"], **changes})
        for seed in content["seeds"]
        for group, part in content["groups"].items()
        for candidate, changes in part["candidates"].items()
    ]


def train(trial: Trial, config: RecipesConfig) -> None:
    """Train one trial; its output goes into a log file."""
    log = config.output_dir / "recipes" / f"{trial.run_id}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(trial.command(config), stdout=output, stderr=output, env=environment)
    print(f"{trial.run_id}: {'finished' if not ended.returncode else f'failed, see {log}'}", flush=True)


def ranking(trials: list[Trial], output_dir: Path) -> str:
    """A Markdown table of the finished trials, best mean score first within each group."""
    rows = []
    for group, candidate in dict.fromkeys((trial.group, trial.candidate) for trial in trials):
        found = [
            (trial, read_json(run_folder(output_dir, trial.run_id) / "summary.json"))
            for trial in trials
            if (trial.group, trial.candidate) == (group, candidate) and is_finished(output_dir, trial.run_id)
        ]
        if not found:
            continue
        changes = ", ".join(f"{name} {value}" for name, value in found[0][0].changes.items()) or "–"
        summaries = [summary for _, summary in found]
        plain = fmean(summary["validate"]["validate/acc"] for summary in summaries)
        changed = fmean(summary["validate/shifted_acc"] for summary in summaries)
        unseen = fmean(summary["shifted"][name] for name in ("gamma", "chromatic_noise") for summary in summaries)
        minutes = fmean(summary["wall_seconds"] for summary in summaries) / 60
        scores = [(plain + changed) / 2, plain, changed, unseen]
        numbers = [f"{score:.4f}" for score in scores]
        rows.append((group, -scores[0], [group, candidate, changes, str(len(found)), *numbers, f"{minutes:.0f}"]))
    columns = ["group", "candidate", "change", "seeds", "score", "validation ACC", "changed colours"]
    columns += ["without CIELAB", "minutes of a core"]
    ordered = [row for _, _, row in sorted(rows, key=lambda row: row[:2])]
    return "\n".join(markdown_table(columns, "lllrrrrrr", ordered))


def main(config: RecipesConfig) -> None:
    """Missing trials → table."""
    trials = read_trials()
    if config.jobs:
        missing = [trial for trial in trials if not is_finished(config.output_dir, trial.run_id)]
        with ThreadPoolExecutor(config.jobs) as pool:
            list(pool.map(lambda trial: train(trial, config), missing))
    print(ranking(trials, config.output_dir))


if __name__ == "__main__":
    run_script(main, RecipesConfig)

"""Train the trials that choose the study's recipes, and print their table.

    python -m study.recipes --data_root FOLDER             # two trials at a time, one thread each; it continues
    python -m study.recipes --data_root FOLDER --jobs 0    # the table of what is finished

recipes.yaml has the candidates and the rule of choice. The records are runs/recipe-NAME-SEED.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from common.cli import key, run_script
from common.config import FolderConfig
from common.files import read_text
from common.markdown import markdown_table
from common.records.read import is_finished, run_folder
from study.processes import Processes, Run, failed_runs, train_all

FILE = Path(__file__).resolve().parent.parent / "recipes.yaml"


class RecipesConfig(FolderConfig):
    """How many trials run at the same time."""

    jobs: int = key(2, "trials at the same time, one thread each; 0: only print the table", ge=0, le=64)


@dataclass(frozen=True)
class Trial(Run):
    """One candidate of one group with one seed; its values are the keys that it changes in the group's recipe."""

    group: str
    candidate: str


def read_trials(config: RecipesConfig, file: Path = FILE) -> list[Trial]:
    """The trials of a recipes.yaml, seed by seed."""
    content = yaml.safe_load(read_text(file))
    folders = {"data_root": config.data_root, "output_dir": config.output_dir}
    trials = []
    for seed in content["seeds"]:
        for group, part in content["groups"].items():
            for candidate, changes in part["candidates"].items():
                run_id = f"recipe-{candidate}-{seed}"
                keys: Mapping[str, Any] = {**content["keys"], **part["keys"], **changes, **folders}
                words = [f"--{name}={value}" for name, value in {**keys, "seed": seed, "run_id": run_id}.items()]
                command = [sys.executable, str(FILE.parent / part["program"]), *words]
                trials.append(Trial(run_id, changes, command, group, candidate))
    return trials


def ranking(trials: Sequence[Trial], output_dir: Path) -> str:
    """A Markdown table of the finished trials, best mean score first within each group."""
    found: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        if is_finished(output_dir, trial.run_id):
            found.setdefault((trial.group, trial.candidate), []).append(trial)
    rows = []
    for (group, candidate), same in found.items():
        changes = ", ".join(f"{name} {value}" for name, value in same[0].values.items()) or "–"
        paths = [run_folder(output_dir, trial.run_id) / "summary.json" for trial in same]
        summaries = [json.loads(read_text(path)) for path in paths]  # without test scores
        plain = fmean(summary["validate"]["validate/acc"] for summary in summaries)
        changed = fmean(summary["validate/shifted_acc"] for summary in summaries)
        unseen = fmean(summary["shifted"][name] for name in ("gamma", "chromatic_noise") for summary in summaries)
        minutes = fmean(summary["wall_seconds"] for summary in summaries) / 60
        scores = [(plain + changed) / 2, plain, changed, unseen]
        numbers = [f"{score:.4f}" for score in scores]
        rows.append((group, -scores[0], [group, candidate, changes, str(len(same)), *numbers, f"{minutes:.0f}"]))
    columns = ["group", "candidate", "change", "seeds", "score", "validation ACC", "changed colours"]
    columns += ["without CIELAB", "minutes of a core"]
    ordered = [row for _, _, row in sorted(rows, key=lambda row: row[:2])]
    return "\n".join(markdown_table(columns, "lllrrrrrr", ordered))


def main(config: RecipesConfig) -> None:
    """Missing trials → table."""
    trials = read_trials(config)
    processes = Processes(config.output_dir, config.output_dir / "recipes", {"OMP_NUM_THREADS": "1"})
    failed = train_all(trials, processes, config.jobs) if config.jobs else []
    print(ranking(trials, config.output_dir))
    if failed:
        raise failed_runs(failed)


if __name__ == "__main__":
    run_script(main, RecipesConfig)

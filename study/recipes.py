"""Train the trials of recipes.yaml, which choose the study's recipes, and print their table.

python -m study.recipes --data_root FOLDER    # it skips what is finished, and continues the rest
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import yaml

from common.cli import run_script
from common.config import FolderConfig
from common.files import read_text
from common.markdown import markdown_table
from common.records.read import is_finished, read_json, run_folder
from study.processes import Processes, Run, train_all, workers

FILE = Path(__file__).resolve().parent.parent / "recipes.yaml"


def read_trials(config: FolderConfig, file: Path = FILE) -> dict[tuple[str, str], list[Run]]:
    """The trials by group and candidate, one per seed. Their values are the keys that the candidate changes."""
    content = yaml.safe_load(read_text(file))
    trials: dict[tuple[str, str], list[Run]] = {}
    for group, part in content["groups"].items():
        for candidate, changes in part["candidates"].items():
            for seed in content["seeds"]:
                run_id = f"recipe-{candidate}-{seed}"
                keys = {**content["keys"], **part["keys"], **changes, "seed": seed, "run_id": run_id}
                keys |= {"data_root": config.data_root, "output_dir": config.output_dir}
                words = [f"--{name}={value}" for name, value in keys.items()]
                run = Run(run_id, changes, [sys.executable, str(FILE.parent / part["program"]), *words])
                trials.setdefault((group, candidate), []).append(run)
    return trials


def ranking(trials: Mapping[tuple[str, str], Sequence[Run]], output_dir: Path) -> list[str]:
    """A table of the finished trials, best mean score first within each group."""
    rows = []
    for (group, candidate), runs in trials.items():
        finished = [run.run_id for run in runs if is_finished(output_dir, run.run_id)]
        found = [read_json(run_folder(output_dir, run_id) / "summary.json") for run_id in finished]
        if not found:
            continue
        changes = ", ".join(f"{name} {value}" for name, value in runs[0].values.items()) or "–"
        plain = fmean(one["validate"]["validate/acc"] for one in found)
        changed = fmean(one["validate/shifted_acc"] for one in found)
        unseen = fmean(one["shifted"][name] for name in ("gamma", "chromatic_noise") for one in found)
        numbers = [f"{score:.4f}" for score in ((plain + changed) / 2, plain, changed, unseen)]
        rows.append([group, candidate, changes, str(len(found)), *numbers])
    rows.sort(key=lambda row: (row[0], -float(row[4])))
    columns = ["group", "candidate", "change", "seeds", "score", "validation ACC", "changed colours"]
    return markdown_table([*columns, "without CIELAB"], "lllrrrrr", rows)


def main(config: FolderConfig) -> None:
    """Missing trials → table."""
    trials = read_trials(config)
    runs = [run for same_seed in zip(*trials.values(), strict=True) for run in same_seed]
    n_workers, environment = workers("auto")
    processes = Processes(config.output_dir, config.output_dir / "recipes", environment)
    try:
        train_all(runs, processes, n_workers)
    finally:
        print("\n".join(ranking(trials, config.output_dir)))


if __name__ == "__main__":
    run_script(main, FolderConfig)

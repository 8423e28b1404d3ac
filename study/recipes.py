"""The trials that chose the study's recipes: recipes.yaml has them and the rule, `python -m study` trains them."""

from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import yaml

from common.files import read_text
from common.markdown import markdown_table
from common.records.read import is_finished, read_arrays, read_json, run_folder, unreadable
from common.training.evaluation import score_difference, scores_of

FILE = Path(__file__).with_name("recipes.yaml")


class Trial(NamedTuple):
    """Runs of a candidate, one for each seed: its group, the keys that it changes there, and the whole command.

    The keys of a `withdrawn` one are no longer in the code, so it cannot be trained again.
    """

    group: str
    changes: str
    command: str
    n_seeds: int
    withdrawn: bool


def read_trials(file: Path = FILE) -> dict[str, Trial]:
    """The trials by the names of their runs without the seeds, `recipe-CANDIDATE`."""
    content = yaml.safe_load(read_text(file))
    trials = {}
    for group, part in content["groups"].items():
        for candidate, changes in part["candidates"].items():
            keys = {**content["keys"], **part["keys"], **changes}
            command = " ".join([part["program"], *(f"--{name}={value}" for name, value in keys.items())])
            words = ", ".join(f"{name} {value}" for name, value in changes.items()) or "–"
            withdrawn = candidate in content["withdrawn"]
            trials[f"recipe-{candidate}"] = Trial(group, words, command, content["n_seeds"], withdrawn)
    return trials


def ranking(output_dir: Path, file: Path = FILE) -> list[str]:
    """A table of the finished trials, best mean score first within each group; scores are computed again."""
    rows = []
    for name, trial in read_trials(file).items():
        run_ids = [f"{name}-{seed}" for seed in range(trial.n_seeds)]
        folders = [run_folder(output_dir, one) for one in run_ids if is_finished(output_dir, one)]
        found = [scores_of(read_arrays(folder / "scores.npz")) for folder in folders]
        for folder, scores in zip(folders, found, strict=True):
            if difference := score_difference(read_json(folder / "summary.json"), scores):
                raise unreadable(folder / "summary.json", difference)
        if not found:
            continue
        plain = fmean(one["validate"]["validate/acc"] for one in found)
        changed = fmean(one["validate/shifted_acc"] for one in found)
        numbers = [f"{score:.4f}" for score in ((plain + changed) / 2, plain, changed)]
        rows.append([trial.group, name.removeprefix("recipe-"), trial.changes, str(len(found)), *numbers])
    rows.sort(key=lambda row: (row[0], -float(row[4])))
    columns = ["group", "candidate", "change", "seeds", "score", "validation ACC", "changed colours"]
    return markdown_table(columns, "lllrrrr", rows) if rows else []

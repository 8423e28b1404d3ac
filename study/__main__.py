"""The whole study in one command: run what is missing of Tasks 1 to 5 and the baselines, then write the report.

    python -m study                       # PathMNIST with 28 px tiles: report.md
    python -m study --size 64             # with a GPU: PathMNIST with 64 px tiles, into pathmnist-64/
    python -m study --dataset phantom     # a small study on generated tiles, into phantom-28/: some minutes

It needs the packages of `pip install -e '.[demo]'`. Each training is a process with a log in logs/ or sweeps/.
After a kill, the same command skips the runs that are finished, and continues the others after their last epoch.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from pydantic import model_validator

import task2
from common.cli import UsageError, key, parse, run_script
from common.config import ScriptConfig
from common.data import pathmnist
from common.finetune.weights import PACKAGED_WEIGHTS, packaged
from common.records.read import read_json, run_folder
from common.records.run import check_same
from study import baselines, report, sweep
from study.processes import Processes, train_all, workers
from study.recipes import read_trials
from study.sweep_spec import config_class


class Row(NamedTuple):
    """Runs ROW-0, ROW-1, … of a script; the command is without --run_id, --seed, data and folders."""

    command: str
    n_seeds: int


@dataclass(frozen=True)
class Plan:
    """What a study runs: rows, sweeps (file, keys of all runs), Task 2 on these runs, baselines on so many."""

    rows: dict[str, Row]
    sweeps: tuple[tuple[str, ...], ...]
    explained: tuple[str, ...]
    checked_tiles: int
    baselines: tuple[int | None, ...]


# A network whose ImageNet weights are in a Python package; task5.py has its chosen recipe.
TUNED = "task5.py --model_name=tf_efficientnet_lite1 --scratch=False"
SCRATCH = f"{TUNED} --weights=none"
LIKE_TUNED = "--lr=0.003 --lr_warmup_epochs=1 --backbone_lr_factor=0.1 --weight_decay=0.01"
CHOSEN = "--augmentation=stain --batch_size=64 --early_stopping_patience=None --select_on=last --ema_decay=0.99"
SCALED = "--n_epochs=12 --lr=0.0007"
PARTS = (900, 3000, 9000, 30_000)  # of the training tiles


def study_plan() -> Plan:
    """The study of PathMNIST: the trials of recipes.yaml, and the rows of report.md, some chosen by them."""
    rows = {
        # The coursework's recipes, and the chosen ones; inputs have 64 pixels where nothing else is said.
        "combined_64": Row("train.py", 5),
        "chosen": Row(f"train.py {CHOSEN} --n_epochs=24", 1),  # its training loss rises: see recipes.yaml
        "scaled": Row(f"train.py {CHOSEN} {SCALED}", 5),
        "task1_64": Row("task1.py", 5),
        "tuned": Row(TUNED, 5),
        "tuned_112": Row(f"{TUNED} --input_size=112", 3),  # best by the trials' validation ACC
        "best_scratch": Row(f"train.py {CHOSEN} {SCALED} --model_name=resnet18", 3),
        "frozen_64": Row(f"{TUNED} --train_part=classifier --n_epochs=20", 5),
        "frozen_128": Row(f"{TUNED} --train_part=classifier --n_epochs=20 --input_size=128", 5),
        # The recipe of `tuned`, so that only the weights differ; and for longer, with a recipe for random weights.
        "tuned_scratch": Row(f"{SCRATCH} {LIKE_TUNED}", 3),
        "long_scratch": Row(f"{SCRATCH} --n_epochs=16", 1),
        "combined": Row("train.py --input_size=28", 5),
        "task1": Row("task1.py --input_size=28", 5),
    }
    # Trials on 9,000 tiles, by which the chosen recipes were chosen:
    found = read_trials().items()
    trials = {name: Row(trial.command, trial.n_seeds) for name, trial in found if not trial.withdrawn}
    for row in ("task1_64", "scaled", "frozen_64"):
        for tiles in PARTS:
            rows[f"learning_curve_{row}-{tiles}"] = Row(f"{rows[row].command} --train_tiles={tiles}", 3)
    return Plan(
        trials | rows,
        # 18,000 tiles in batches of 128 give about as many steps as the coursework had.
        sweeps=(
            ("ablation.yaml", "--train_tiles=18000", "--batch_size=128"),
            ("sweep.yaml", "--train_tiles=9000"),
        ),
        explained=("task1_64-0", "task1_64-4", "tuned-0"),
        checked_tiles=256,
        baselines=(None, *PARTS),
    )


def demo_plan() -> Plan:
    """The study of the phantom."""
    tiles = 1350
    few = f"--train_tiles={tiles}"
    mobilenet = f"train.py {few} --input_size=28 --batch_size=64 --n_epochs=8"
    rows = {
        "task1": Row(f"task1.py {few} --input_size=28", 2),
        "combined": Row(mobilenet, 2),
        "with_all": Row(f"{mobilenet} --ablation=with_all", 2),
        "tuned": Row(f"{TUNED} {few} --input_size=32 --batch_size=64 --n_epochs=4", 2),
        "tuned_scratch": Row(f"{SCRATCH} {few} --input_size=32 --batch_size=64 --n_epochs=4", 2),
    }
    return Plan(rows, sweeps=(), explained=("task1-0", "tuned-0"), checked_tiles=64, baselines=(tiles,))


class StudyConfig(ScriptConfig):
    """The data set of the study, and its folder."""

    dataset: str = key(pathmnist.NAME, "data set", choices=(pathmnist.NAME, "phantom"))
    size: int = key(28, "tile side in pixels", choices=tuple(pathmnist.MD5))
    output_dir: Path = key(
        None, "folder of the study (default: DATASET-SIZE; for pathmnist at 28 the current folder)"
    )
    workers: int | None = key(None, "runs at the same time (default: 1; on a CPU one per physical core)", ge=1)

    @model_validator(mode="after")
    def _folder(self) -> Self:
        if self.output_dir is None:
            here = (self.dataset, self.size) == (pathmnist.NAME, 28)
            self._set("output_dir", Path() if here else Path(f"{self.dataset}-{self.size}"))
        return self


def main(config: StudyConfig) -> None:
    """Missing runs → report.md and report.html."""
    if not Path("task1.py").exists():
        raise UsageError("task1.py: no such file here; start the study in the repository's folder")
    for weights in PACKAGED_WEIGHTS:
        packaged(weights)  # refuses a missing package now, not after hours of training
    plan, folder = demo_plan() if config.dataset == "phantom" else study_plan(), config.output_dir
    n_workers, environment = workers(config.device)
    processes = Processes(folder, folder / "logs", environment)
    train_all(runs(plan, config), processes, config.workers or n_workers)
    place: dict[str, Any] = {"data_root": config.data_root, "output_dir": folder}
    for tiles in plan.baselines:
        keys: dict[str, Any] = {"dataset": config.dataset, "size": config.size, "train_tiles": tiles}
        baselines.main(baselines.BaselinesConfig(**place, **keys))
    for run_id in plan.explained:
        if not (run_folder(folder, run_id) / "attribution.json").exists():
            keys = {"run_id": run_id, "checked_tiles": plan.checked_tiles}
            task2.main(task2.Task2Config(**place, **keys, device=config.device, wandb=config.wandb))
    own = arguments(config, "dataset", "size", "data_root", "device", "wandb")
    for file in plan.sweeps:
        sweep.main(sweep.SweepConfig(file=(*file, *own), count=30, workers=config.workers, output_dir=folder))
    report.main(report.ReportConfig(output_dir=folder))
    print(f"the study is finished: open {(folder / 'report.html').resolve()}")


def arguments(config: StudyConfig, *names: str) -> list[str]:
    """These keys of the study as a command line has them."""
    return [f"--{name}={getattr(config, name)}" for name in names]


def runs(plan: Plan, config: StudyConfig) -> dict[str, list[str]]:
    """The command of each run of the rows, by its id. UsageError where one was started with other keys."""
    keys = arguments(config, "dataset", "size", "data_root", "output_dir", "device", "wandb")
    found = {}
    for name, row in plan.rows.items():
        for seed in range(row.n_seeds):
            run_id = f"{name}-{seed}"
            command = [*row.command.split(), *keys, f"--run_id={run_id}", f"--seed={seed}"]
            found[run_id] = [sys.executable, *command]
            if (path := run_folder(config.output_dir, run_id) / "config.json").exists():
                before = read_json(path, "config")["config"]
                now = parse(config_class(command[0]), command[1:])
                if "input_size" not in before:  # an older record has other keys: compare its data alone
                    before = now.identity() | {one: before[one] for one in ("dataset", "size")}
                check_same(now, before, "use another --output_dir")
    return found


if __name__ == "__main__":
    run_script(main, StudyConfig)

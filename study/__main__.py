"""The whole study in one command: run what is missing of Tasks 1 to 5 and the baselines, then write the report.

    python -m study                       # PathMNIST with 28 px tiles: what report.md here is made from
    python -m study --size 64             # a GPU box: PathMNIST with 64 px tiles, into pathmnist-64/
    python -m study --dataset phantom     # a small study on generated tiles, into phantom-28/: some minutes

It needs the packages of `pip install -e '.[demo]'`. Every run is a process of its own. After a kill, the same
command skips the runs that are finished, and continues the others after their last epoch.
"""

import importlib.util
import itertools
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple, Self

from pydantic import model_validator

from common.cli import Fault, Stopped, UsageError, key, run_script
from common.config import ScriptConfig, size_key
from common.records.read import checkpoint_folder, is_finished, read_json, run_folder
from study import report

# EfficientNet-Lite0, because its ImageNet weights come from a package registry.
TUNED = "task5.py --model_name=tf_efficientnet_lite0 --scratch=False"
CHOSEN = "--augmentation=stain --batch_size=64 --early_stopping_patience=None --n_epochs=12 --select_on=last"
CHOSEN += " --ema_decay=0.99"
SCRATCH = "task5.py --model_name=tf_efficientnet_lite0 --weights=none --train_part=all --backbone_lr_factor=1"


@dataclass(frozen=True)
class Plan:
    """What a study of a data set runs; the commands are without --run_id, --seed, data and folders.

    `rows` are trained with each of `n_seeds` seeds, as ROW-SEED. Of the runs `explained`, Task 2 draws the maps.
    `sweeps` are files of study.sweep with the keys of all their runs.
    """

    n_seeds: int
    rows: dict[str, str]
    explained: tuple[str, ...]
    task2: str
    baselines: tuple[str, ...]
    sweeps: dict[str, str]


STUDY = Plan(
    n_seeds=5,
    rows={
        # With inputs of 28 pixels, for contrast:
        "task1": "task1.py --input_size=28",
        "combined": "train.py --input_size=28",
        # With inputs of 64 pixels, the default:
        "task1_64": "task1.py",
        "combined_64": "train.py",
        # recipes.yaml has the candidates for the next rows, and the rule of choice.
        "chosen": f"train.py {CHOSEN}",
        "best_scratch": f"train.py --model_name=resnet18 {CHOSEN}",
        "frozen_64": f"{TUNED} --train_part=classifier --input_size=64",
        "frozen_128": f"{TUNED} --train_part=classifier --input_size=128",
        "tuned": f"{TUNED} --input_size=64 --n_epochs=6",
        "tuned_scratch": f"{SCRATCH} --input_size=64 --n_epochs=6 --lr=0.002 --lr_warmup_epochs=2",
        "long_scratch": f"{SCRATCH} --input_size=64 --n_epochs=18 --lr=0.002 --lr_warmup_epochs=2",
    },
    explained=("task1_64-0", "chosen-0", "tuned-0"),
    task2="task2.py",
    baselines=("", "--train_tiles=900", "--train_tiles=3000", "--train_tiles=9000", "--train_tiles=30000"),
    sweeps={
        # 18,000 tiles in batches of 128 give about as many steps as the coursework had.
        "ablation.yaml": "--train_tiles=18000 --batch_size=128",
        "learning_curve/task1.yaml": "",
        "learning_curve/with_all.yaml": "",
        "learning_curve/lite0.yaml": "",
    },
)
FEW = "--train_tiles=1350"
DEMO = Plan(
    n_seeds=2,
    rows={
        "task1": f"task1.py {FEW} --input_size=28",
        "combined": f"train.py {FEW} --input_size=28 --batch_size=64 --n_epochs=8",
        "with_all": f"train.py {FEW} --input_size=28 --batch_size=64 --n_epochs=8 --ablation=with_all",
        "tuned": f"{TUNED} {FEW} --input_size=32 --batch_size=64 --n_epochs=4",
        "tuned_scratch": f"{SCRATCH} {FEW} --input_size=32 --batch_size=64 --n_epochs=4 --lr=0.002",
    },
    explained=("task1-0", "tuned-0"),
    task2="task2.py --checked_tiles=64",
    baselines=(FEW,),
    sweeps={},
)


class StudyConfig(ScriptConfig):
    """The data set of the study, and its folder."""

    dataset: str = key("pathmnist", "data set", choices=("pathmnist", "phantom"))
    size: int = size_key(28)
    output_dir: Path = key(
        None, "folder of the study (default: DATASET-SIZE; for pathmnist at 28 the current folder)"
    )

    @model_validator(mode="after")
    def _folder(self) -> Self:
        if self.output_dir is None:
            here = (self.dataset, self.size) == ("pathmnist", 28)
            self._set("output_dir", Path() if here else Path(f"{self.dataset}-{self.size}"))
        return self


class Step(NamedTuple):
    """One process of the study, and whether its records are complete."""

    title: str
    command: list[str]
    finished: bool


def main(config: StudyConfig) -> None:
    """Missing runs → report.md and report.html."""
    if not Path("task1.py").exists():
        raise UsageError("task1.py: no such file here; start the study in the repository's folder")
    planned = list(steps(config))
    needs_timm = any(TUNED.split()[1] in step.command for step in planned if not step.finished)
    if needs_timm and importlib.util.find_spec("timm") is None:  # not after hours
        raise UsageError("Task 5 needs more packages: pip install -e '.[demo]' -c constraints.txt")
    for number, step in enumerate(planned, start=1):
        line = f"[{number}/{len(planned)}] {step.title}"
        if step.finished:
            print(f"{line}: finished already", flush=True)
            continue
        print(f"\n{line}: {shlex.join(['python', *step.command])}", flush=True)
        if status := run_step(step.command):
            raise Fault(f"{step.title} ended with exit status {status}; the same command continues the study")
    report.main(report.ReportConfig(output_dir=config.output_dir))
    print(f"the study is finished: open {(config.output_dir / 'report.html').resolve()}")


def steps(config: StudyConfig) -> Iterator[Step]:
    """The study's processes in their order. Raises UsageError where the folder has runs on other data."""
    plan, folder = DEMO if config.dataset == "phantom" else STUDY, config.output_dir
    place = [f"--output_dir={folder}", f"--data_root={config.data_root}"]
    logged = [f"--device={config.device}", f"--wandb={config.wandb}"]
    data = [f"--dataset={config.dataset}", f"--size={config.size}"]
    for (row, recipe), seed in itertools.product(plan.rows.items(), range(plan.n_seeds)):
        run_id = f"{row}-{seed}"
        if (path := run_folder(folder, run_id) / "config.json").exists():
            before = read_json(path)["config"]
            if (before["dataset"], before["size"]) != (config.dataset, config.size):
                what = f"{before['dataset']} at {before['size']} pixels"
                raise UsageError(f"{path}: a run on {what}; name another --output_dir")
        keys = [*data, *place, *logged, f"--run_id={run_id}", f"--seed={seed}"]
        yield Step(run_id, [*recipe.split(), *keys], is_finished(folder, run_id))
    for file, fixed in plan.sweeps.items():  # it skips what is finished itself
        command = ["-m", "study.sweep", file, place[0], "--", *data, place[1], *logged, *fixed.split()]
        yield Step(file, command, finished=False)
    for run_id in plan.explained:
        has_weights = (checkpoint_folder(folder, run_id) / "best.pt").exists()  # else they are kept elsewhere
        done = (run_folder(folder, run_id) / "attribution.json").exists()
        done = done or (is_finished(folder, run_id) and not has_weights)
        yield Step(f"maps of {run_id}", [*plan.task2.split(), *place, *logged, f"--run_id={run_id}"], done)
    for tiles in plan.baselines:  # it skips what is finished itself, and takes no time then
        yield Step(f"baselines {tiles}".strip(), ["-m", "study.baselines", *data, *place, *tiles.split()], False)


def run_step(command: Sequence[str]) -> int:
    """Run Python with these arguments; the exit status. A signal that ends the study ends this process, too."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped("SIGTERM: the study ended early", signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    with subprocess.Popen([sys.executable, *command]) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            raise


if __name__ == "__main__":
    run_script(main, StudyConfig)

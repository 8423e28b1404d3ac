"""The whole study in one command: run what is missing of Tasks 1 to 5, then write its report.

    python -m study                       # PathMNIST at 28 pixels: what report.md here was made from
    python -m study --size 64             # a GPU box: PathMNIST at 64 pixels, into pathmnist-64/
    python -m study --dataset phantom     # a miniature on generated tiles, into phantom-28/

Every run is a process of its own with a fixed run_id. After a kill the same command goes on: finished runs are
skipped, an unfinished one continues from its checkpoint. report.toml, which names the runs that the report shows,
is written where there is none, and never changed.
"""

import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from common.config import ScriptConfig, key, run_script
from common.errors import Fault, UsageError
from common.files import atomic_path
from common.records import is_finished
from study import report
from study.sweep import grid
from study.sweep_file import read_sweep
from study.trials import Workplace

REFERENCE_ROW = "combined"  # of the ablation: the coursework's configuration
FEW_ROWS = (REFERENCE_ROW, "with_all")
LITE0 = ("--model_name=tf_efficientnet_lite0",)  # whose ImageNet weights a package registry has


@dataclass(frozen=True)
class Plan:
    """What the study of a data set consists of.

    `keys` are what a step gets beside its script's defaults: those of `train` go to all runs of train.py, those of
    `ablation` and `search` to the runs of that sweep alone. `task3_rows` are rows of the ablation that run also
    without these keys; the first one is then Task 3 in the report.
    """

    n_seeds: int = 5
    rows: tuple[str, ...] = ()  # of the ablation; none: all of them
    task3_rows: tuple[str, ...] = ()  # none: Task 3 shows the ablation's reference row
    search_trials: int = 20
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


# A CPU's study of the smallest tiles: 18,000 tiles in batches of 128 are about the coursework's number of steps.
AT_28_PIXELS = Plan(
    search_trials=40,
    task3_rows=FEW_ROWS,
    keys={
        "ablation": ("--train_tiles=18000", "--batch_size=128"),
        "search": ("--train_tiles=9000",),
        "task5": LITE0,
    },
)
# The phantom's is a miniature: it shows in minutes, without any download, what a study leaves.
_FEW_TILES = "--train_tiles=1350"
PLANS = {
    "pathmnist": Plan(),
    "phantom": Plan(
        n_seeds=2,
        rows=FEW_ROWS,
        search_trials=0,
        keys={
            "task1": (_FEW_TILES,),
            "task2": ("--checked_tiles=64",),
            "train": (_FEW_TILES, "--batch_size=64", "--n_epochs=8"),
            "task5": (_FEW_TILES, *LITE0, "--batch_size=64", "--n_epochs=4", "--resize_to=32"),
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class StudyConfig(ScriptConfig):
    """On what the study is done, and where it is kept."""

    dataset: str = key("pathmnist", "data set", choices=tuple(PLANS))
    size: int = key(28, "tile side in pixels", choices=(28, 64, 128, 224))
    output_dir: Path = key(
        None, "folder of the study (default: DATASET-SIZE; this one for pathmnist at 28, whose records it has)"
    )
    seed: int = key(0, "first seed; the others count up from it", at_least=0, at_most=2**32 - 10)

    def __post_init__(self) -> None:
        """Fill in the study's folder."""
        if self.output_dir is None:
            here = (self.dataset, self.size) == ("pathmnist", 28)
            self._set("output_dir", Path() if here else Path(f"{self.dataset}-{self.size}"))
        super().__post_init__()

    @property
    def plan(self) -> Plan:
        """The plan of this data set at this size."""
        return AT_28_PIXELS if (self.dataset, self.size) == ("pathmnist", 28) else PLANS[self.dataset]

    @property
    def seeds(self) -> range:
        """The seeds of every comparison."""
        return range(self.seed, self.seed + self.plan.n_seeds)


@dataclass(frozen=True)
class Step:
    """One process of the study, and whether its records are there already."""

    title: str
    command: list[str]
    finished: Callable[[], bool]


def main(config: StudyConfig) -> None:
    """What is missing → report.toml, if there is none → report.md."""
    for program in ("task1.py", "ablation.yaml"):
        if not Path(program).exists():
            raise UsageError(f"{program}: no such file here; start the study in the repository's folder")
    todo = steps(config)
    for number, step in enumerate(todo, start=1):
        line = f"[{number}/{len(todo)}] {step.title}"
        if step.finished():
            print(f"{line}: finished already", flush=True)
            continue
        print(f"\n{line}: {shlex.join(['python', *step.command])}", flush=True)
        status = subprocess.run([sys.executable, *step.command]).returncode
        if status:
            raise Fault(f"{step.title} ended with exit status {status}; the same command goes on from there")
    selection = config.output_dir / "report.toml"
    if not selection.exists():
        with atomic_path(selection) as temporary:
            temporary.write_text(toml(config), encoding="utf-8")
    print()
    report.main(report.ReportConfig(output_dir=config.output_dir))
    print(f"the study is finished: open {(config.output_dir / 'report.md').resolve()}")


def steps(config: StudyConfig) -> list[Step]:
    """The study's processes in their order. Raises UsageError for a sweep file that cannot be run."""
    plan, runs = config.plan, config.output_dir / "runs"
    workspace = [f"--{name}={getattr(config, name)}" for name in ("output_dir", "data_root", "device", "wandb")]
    data = [f"--dataset={config.dataset}", f"--size={config.size}"]

    def script(name: str, *more: str) -> list[str]:
        # Task 2 knows its data from the run that it explains.
        return [f"{name}.py", *workspace, *([] if name == "task2" else data), *plan.keys.get(name, ()), *more]

    found = [
        Step(
            f"Task 1, seed {seed}",
            script("task1", f"--run_id=task1-{seed}", f"--seed={seed}"),
            partial(is_finished, config.output_dir, f"task1-{seed}"),
        )
        for seed in config.seeds
    ]
    explained = f"task1-{config.seed}"
    record = runs / explained / "attribution.json"
    found.append(Step("Task 2", script("task2", f"--run_id={explained}"), record.exists))
    found += [
        Step(
            f"Task 3, {row}, seed {seed}",
            script("train", f"--ablation={row}", f"--run_id={row}-{seed}", f"--seed={seed}"),
            partial(is_finished, config.output_dir, f"{row}-{seed}"),
        )
        for row in plan.task3_rows
        for seed in config.seeds
    ]

    def fixed(name: str) -> list[str]:
        # The sweep sets output_dir itself.
        return [*workspace[1:], *data, *plan.keys.get("train", ()), *plan.keys.get(name, ())]

    def sweep(name: str, file: Path, *more: str) -> list[str]:
        return ["-m", "study.sweep", str(file), workspace[0], *more, "--", *fixed(name)]

    ablation = ablation_file(config)
    found.append(
        Step(
            "Task 4, ablation",
            sweep("ablation", ablation),
            lambda: grid_finished(ablation, fixed("ablation"), config.output_dir),
        )
    )
    if plan.search_trials:
        table = config.output_dir / "sweeps" / "search" / "table.md"
        command = sweep("search", Path("sweep.yaml"), f"--count={plan.search_trials}")
        found.append(Step("Task 4, search", command, table.exists))
    seeds = [f"--seed={config.seed}", f"--n_seeds={plan.n_seeds}"]
    comparison = runs / "task5" / "comparison.json"
    found.append(Step("Task 5", script("task5", "--run_id=task5", *seeds), comparison.exists))
    return found


def ablation_file(config: StudyConfig) -> Path:
    """ablation.yaml itself, or, where the study has other rows or seeds, a copy with these in its folder."""
    original = Path("ablation.yaml")
    content: dict[str, Any] = yaml.safe_load(original.read_text(encoding="utf-8"))
    wanted: dict[str, list[Any]] = {"seed": list(config.seeds)}
    if config.plan.rows:
        wanted["ablation"] = list(config.plan.rows)
    if all(content["parameters"][name]["values"] == values for name, values in wanted.items()):
        return original
    for name, values in wanted.items():
        content["parameters"][name] = {"values": values}
    path = config.output_dir / "ablation.yaml"
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def grid_finished(file: Path, fixed: Sequence[str], output_dir: Path) -> bool:
    """Whether every run of a grid has its records and its table is made; UsageError for other records."""
    sweep = read_sweep(file, fixed)
    workplace = Workplace(sweep, output_dir)
    return (workplace.folder / "table.md").exists() and all(map(workplace.is_finished, grid(sweep)))


def toml(config: StudyConfig) -> str:
    """report.toml: the runs of this study, by section of the report."""

    def listed(names: list[str]) -> str:
        return "[" + ", ".join(f'"{name}"' for name in names) + "]"

    reference = REFERENCE_ROW if config.plan.task3_rows else f"ablation-{REFERENCE_ROW}"
    lines = [
        "# Which runs report.md shows. `python -m study.report` makes the page from them.",
        "[task1]",
        f"runs = {listed([f'task1-{seed}' for seed in config.seeds])}",
        "[task2]",
        f'run = "task1-{config.seed}"',
        "[task3]  # the coursework's configuration",
        f"runs = {listed([f'{reference}-{seed}' for seed in config.seeds])}",
        "[task4]",
        'ablation = "ablation"',
        *(['search = "search"'] if config.plan.search_trials else []),
        "[task5]",
        'comparison = "task5"',
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(main, StudyConfig)

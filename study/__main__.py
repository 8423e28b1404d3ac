"""The whole study in one command: run what is missing of Tasks 1 to 5 and baselines, then write its report.

    python -m study                       # PathMNIST at 28 pixels: what report.md here was made from
    python -m study --size 64             # a GPU box: PathMNIST at 64 pixels, into pathmnist-64/
    python -m study --dataset phantom     # a miniature on generated tiles, into phantom-28/

At 28 pixels it needs the packages of `pip install -e '.[demo]'`.

Every run is a separate process with a fixed run_id. After a kill, the same command skips the finished runs and
resumes the others from their checkpoints. report.toml names the runs that the report shows: the study writes this
file where there is none, and never changes it.
"""

import itertools
import json
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import model_validator

from common.cli import Fault, UsageError, key, parse, run_script
from common.config import LAST_SEED, ScriptConfig, size_key
from common.files import read_text, write_text
from common.finetune import weights
from common.records.read import checkpoint_folder, is_finished, read_json, read_table, run_folder
from study import report
from study.baselines import BaselinesConfig
from study.interruption import Interruption
from study.report_selection import Study, parameters
from study.sweep import grid
from study.sweep_file import read_sweep
from study.trials import BLINK, TrialRecords, locked

REFERENCE_ROW = "combined"  # of the ablation: the coursework's configuration
FEW_ROWS = (REFERENCE_ROW, "with_all")
SEARCH = Path("sweep.yaml")
LITE0 = ("--model_name=tf_efficientnet_lite0",)  # its ImageNet weights come from a package registry


@dataclass(frozen=True)
class Plan:
    """The parts of a data set's study.

    `keys` change the defaults of a script, or of the module `baselines`: those of `train` are for all runs of
    train.py, those of `ablation` and `search` only for the runs of that sweep. `task3_rows` are rows of the
    ablation that also run without the keys of `ablation`; the first one is then Task 3 in the report. `task1_rows`
    are other recipes of task1.py: the names of their runs, and the keys that each changes.
    """

    n_seeds: int = 5
    rows: tuple[str, ...] = ()  # of the ablation; empty: all of ablation.yaml
    task1_rows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    task3_rows: tuple[str, ...] = ()  # empty: Task 3 shows the ablation's reference row
    search_trials: int = 20
    curves: tuple[str, ...] = ()  # the files of learning_curve/ that run, without .yaml
    curve_tiles: tuple[int, ...] = ()  # training tiles of the baselines, beside the whole number
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


# For a CPU: 18,000 tiles in batches of 128 give about as many steps as the coursework had.
AT_28_PIXELS = Plan(
    search_trials=40,
    task1_rows={
        "stain": ("--augmentation=stain", "--ema_decay=0.99"),
        "stain_56": ("--augmentation=stain", "--ema_decay=0.99", "--input_size=56"),
    },
    task3_rows=FEW_ROWS,
    curves=("task1", "with_all", "lite0"),
    curve_tiles=(900, 3000, 9000, 30000),
    keys={
        "ablation": ("--train_tiles=18000", "--batch_size=128"),
        "search": ("--train_tiles=9000",),
        "task5": (*LITE0, "--n_epochs=4"),
    },
)
# The phantom's study is a miniature: it needs minutes and no download.
_FEW_TILES = "--train_tiles=1350"
PLANS = {
    "pathmnist": Plan(),
    "phantom": Plan(
        n_seeds=2,
        rows=FEW_ROWS,
        search_trials=0,
        keys={
            "baselines": (_FEW_TILES,),
            "task1": (_FEW_TILES,),
            "task2": ("--checked_tiles=64",),
            "train": (_FEW_TILES, "--batch_size=64", "--n_epochs=8"),
            "task5": (_FEW_TILES, *LITE0, "--batch_size=64", "--n_epochs=4", "--input_size=32"),
        },
    ),
}


class StudyConfig(ScriptConfig):
    """The data set of the study, and its folder."""

    dataset: str = key("pathmnist", "data set", choices=tuple(PLANS))
    size: int = size_key(28)
    output_dir: Path = key(
        None, "folder of the study (default: DATASET-SIZE; for pathmnist at 28 the current folder)"
    )
    seed: int = key(0, "first seed; the others follow it", ge=0, le=LAST_SEED - 9)

    @model_validator(mode="after")
    def _folder(self) -> Self:
        if self.output_dir is None:
            here = (self.dataset, self.size) == ("pathmnist", 28)
            self._set("output_dir", Path() if here else Path(f"{self.dataset}-{self.size}"))
        return self

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
    """One process of the study, and whether its records are complete."""

    title: str
    command: list[str]
    finished: bool


def main(config: StudyConfig) -> None:
    """report.toml, where there is none → missing runs → report.md."""
    for program in ("task1.py", "ablation.yaml"):
        if not Path(program).exists():
            raise UsageError(f"{program}: no such file here; start the study in the repository's folder")
    # Every step's process inherits the lock: a step may live longer than a study that was killed.
    path = config.output_dir / ".study.lock"
    with locked(path) as lock:
        if lock is None:
            print(f"{config.output_dir}: a study is running here, or a step of a killed one; waiting", flush=True)
    with locked(path, wait=True) as lock:
        assert lock is not None
        selection = config.output_dir / "report.toml"
        if not selection.exists():
            write_text(selection, toml(config))
        run_steps(config, lock)
    print()
    report.main(report.ReportConfig(output_dir=config.output_dir))
    print(f"the study is finished: open {(config.output_dir / 'report.md').resolve()}")


def run_steps(config: StudyConfig, lock: int) -> None:
    """Run what is not finished, one step after the other; Fault where one fails.

    Raises UsageError where a package of a later step is missing: not after hours.
    """
    planned = list(steps(config))
    if any(set(LITE0) <= set(step.command) for step in planned if not step.finished):
        if problem := weights.check_network(weights.LITE0):
            raise UsageError(f"Task 5: {problem}")
        weights.load_weights(weights.LITE0_WEIGHTS, weights.LITE0, config.output_dir)
    for number, step in enumerate(steps(config), start=1):
        line = f"[{number}/{len(planned)}] {step.title}"
        if step.finished:
            print(f"{line}: finished already", flush=True)
            continue
        print(f"\n{line}: {shlex.join(['python', *step.command])}", flush=True)
        status = run_step(step.command, lock)
        if status:
            raise Fault(f"{step.title} ended with exit status {status}; the same command continues the study")


def run_step(command: Sequence[str], lock: int) -> int:
    """Run Python with these arguments; the exit status. Raises Stopped after Ctrl-C or SIGTERM.

    The process may then finish its current step of training. Ctrl-C in a terminal reaches it, too; SIGTERM is
    passed on.
    """
    with Interruption() as interruption:
        process = subprocess.Popen([sys.executable, *command], pass_fds=[lock])
        while (status := process.poll()) is None:
            if interruption.came == signal.SIGTERM:
                process.terminate()
                process.wait()
            time.sleep(BLINK)
    if interruption.came:
        raise interruption.error("the study ended early")
    return status


def steps(config: StudyConfig) -> Iterator[Step]:
    """The study's processes in their order, as the finished ones have left it: a search names a later step's keys.

    Raises UsageError for a sweep that cannot be run.
    """
    plan = config.plan
    output = f"--output_dir={config.output_dir}"
    place = [f"--{name}={getattr(config, name)}" for name in ("data_root", "device")]
    shared = [*place, f"--wandb={config.wandb}"]
    data = [f"--dataset={config.dataset}", f"--size={config.size}"]

    def run(title: str, script: str, run_id: str, *keys: str, last: str = "summary.json") -> Step:
        command = [f"{script}.py", output, *shared, *plan.keys.get(script, ()), f"--run_id={run_id}", *keys]
        folder = run_folder(config.output_dir, run_id)
        if (folder / "config.json").exists():
            before = read_json(folder / "config.json")["config"]
            if (before["dataset"], before["size"]) != (config.dataset, config.size):
                what = f"{before['dataset']} at {before['size']} pixels, not {config.dataset} at {config.size}"
                raise UsageError(f"{folder}: a run on {what}: name another --output_dir")
        finished = (folder / last).exists()
        if finished and last == "comparison.json":
            finished = min(map(len, read_json(folder / last)["runs"].values())) >= plan.n_seeds
        return Step(title, command, finished)

    def sweep(title: str, file: Path, plan_keys: Sequence[str], count: int | None = None) -> Step:
        fixed = [*shared, *data, *plan_keys]
        keys = [f"--count={count}"] if count else []
        command = ["-m", "study.sweep", str(file), output, *keys, "--", *fixed]
        return Step(title, command, sweep_finished(file, fixed, config.output_dir, count))

    for name, changes in {"task1": (), **plan.task1_rows}.items():
        for seed in config.seeds:
            yield run(f"Task 1, {name}, seed {seed}", "task1", f"{name}-{seed}", *data, *changes, f"--seed={seed}")
    for row in plan.task3_rows:
        for seed in config.seeds:
            keys = [*data, f"--ablation={row}", f"--seed={seed}"]
            yield run(f"Task 3, {row}, seed {seed}", "train", f"{row}-{seed}", *keys)
    train = plan.keys.get("train", ())
    yield sweep("Task 4, ablation", ablation_file(config), (*train, *plan.keys.get("ablation", ())))
    if plan.search_trials:
        of_trial = (*train, *plan.keys.get("search", ()))
        yield sweep("Task 4, search", SEARCH, of_trial, plan.search_trials)
        for seed in config.seeds:
            keys = [*data, *winner(config.output_dir), f"--seed={seed}"]
            yield run(f"Task 4, the search's winner, seed {seed}", "train", f"winner-{seed}", *keys)
    seeds = [f"--seed={config.seed}", f"--n_seeds={plan.n_seeds}"]
    yield run("Task 5", "task5", "task5", *data, *seeds, last="comparison.json")
    for run_id in explained(config):
        best = checkpoint_folder(config.output_dir, run_id) / "best.pt"
        if best.exists() or not is_finished(config.output_dir, run_id):  # else the weights are kept elsewhere
            yield run(f"Task 2, {run_id}", "task2", run_id, last="attribution.json")  # on the data of that run
    for arguments in baseline_arguments(config):
        runs = parse(BaselinesConfig, arguments, "").runs
        complete = all(is_finished(config.output_dir, run_id) for run_id in runs)
        yield Step(f"baselines, {next(iter(runs))}", ["-m", "study.baselines", *arguments], complete)
    for name in plan.curves:
        yield sweep(f"learning curve, {name}", Path(f"learning_curve/{name}.yaml"), ())
    analysed = (config.output_dir / "analysis.json").exists()
    yield Step("analysis", ["-m", "study.analysis", output, *place], analysed)


def explained(config: StudyConfig) -> list[str]:
    """The runs whose maps the report shows: those of report.toml, or of the one that this study will write."""
    exists = (config.output_dir / "report.toml").exists()
    study = Study(config.output_dir, None if exists else tomllib.loads(toml(config)))
    return study.explained()


def winner(output_dir: Path) -> list[str]:
    """The arguments of train.py for the configuration of the search's best trial; none before the search."""
    sweep = read_sweep(SEARCH)
    table = output_dir / "sweeps" / sweep.name / "table.csv"
    best = next(iter(read_table(table)), None) if table.exists() else None
    if not best:
        return []
    if set(parameters(best)) != set(sweep.swept):
        raise UsageError(f"{SEARCH}: {table} has trials of other parameters; use another --output_dir")
    return sweep.recipe(parameters(best))


def baseline_arguments(config: StudyConfig) -> list[list[str]]:
    """The arguments of each call of study/baselines.py, with the largest number of training tiles first."""
    names = ("data_root", "output_dir", "dataset", "size", "seed")
    whole = [*(f"--{name}={getattr(config, name)}" for name in names), *config.plan.keys.get("baselines", ())]
    return [whole, *([*whole, f"--train_tiles={tiles}"] for tiles in config.plan.curve_tiles)]


def ablation_file(config: StudyConfig) -> Path:
    """ablation.yaml; where the study has other rows or seeds, a changed copy in the study's folder sweeps/."""
    original = Path("ablation.yaml")
    content: dict[str, Any] = yaml.safe_load(read_text(original))
    parameters = {**content["parameters"], "seed": {"values": list(config.seeds)}}
    if config.plan.rows:
        parameters["ablation"] = {"values": list(config.plan.rows)}
    if parameters == content["parameters"]:
        return original
    path = config.output_dir / "sweeps" / "ablation.yaml"
    write_text(path, yaml.safe_dump({**content, "parameters": parameters}, sort_keys=False))
    return path


def sweep_finished(file: Path, fixed: Sequence[str], output_dir: Path, count: int | None = None) -> bool:
    """Whether the sweep's table has every run of a grid, or `count` trials of a search.

    Raises UsageError for a grid's runs of another configuration.
    """
    records = TrialRecords(read_sweep(file, fixed), output_dir)
    trials = [] if count else grid(records.sweep)
    if not all(map(records.is_finished, trials)) or not (records.folder / "table.md").exists():
        return False
    table = read_table(records.folder / ("table.csv" if count else "runs.csv"))
    return len(table) >= (count or len(trials))


def toml(config: StudyConfig) -> str:
    """report.toml: the runs of this study, by section of the report."""
    task1 = [f"task1-{seed}" for seed in config.seeds]
    reference = REFERENCE_ROW if config.plan.task3_rows else f"ablation-{REFERENCE_ROW}"
    task3 = [f"{reference}-{seed}" for seed in config.seeds]
    whole, *parts = [list(parse(BaselinesConfig, keys, "").runs) for keys in baseline_arguments(config)]
    stained = list(config.plan.task1_rows)
    others = [*stained, *config.plan.task3_rows[1:], *(["winner"] if config.plan.search_trials else [])]
    further = [f"{name}-{seed}" for name in others for seed in config.seeds]
    curve = {
        "sweeps": [f"learning-curve-{name}" for name in config.plan.curves],
        "runs": list(itertools.chain(*parts)),
    }
    lines = [
        "# Which runs report.md shows. `python -m study.report` makes the page from them.",
        "[task1]",
        f"runs = {json.dumps(task1)}",
        "[task2]",
        f'run = "{task1[0]}"',
        f"also = {json.dumps([*(f'{name}-{config.seed}' for name in stained), 'task5'])}",
        "[task3]  # the coursework's configuration",
        f"runs = {json.dumps(task3)}",
        "[task4]",
        'ablation = "ablation"',
        *(['search = "search"'] if config.plan.search_trials else []),
        "[task5]",
        'comparison = "task5"',
        *(["[networks]  # other recipes on all tiles", f"runs = {json.dumps(further)}"] if further else []),
        "[baselines]",
        f"runs = {json.dumps(whole)}",
        *(["[learning_curve]", *(f"{name} = {json.dumps(ids)}" for name, ids in curve.items())] if parts else []),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(main, StudyConfig)

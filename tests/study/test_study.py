"""The study in one command: its steps, and a small study from start to end; and the table of runs."""

import dataclasses
import importlib.util
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from example_records import CONFIG, write_run
from processes import end, start

import task1
import task2
import task5
import train
from common.cli import Keys, UsageError, parse, run_script
from study import __main__ as study
from study import baselines, runs, sweep
from study.groups import ROWS

SCRIPTS: dict[str, type[Keys]] = {
    "task1.py": task1.Task1Config,
    "task2.py": task2.Task2Config,
    "task5.py": task5.Task5Config,
    "train.py": train.TrainConfig,
}


def config_of(*arguments: str) -> study.StudyConfig:
    return parse(study.StudyConfig, arguments, "")


@pytest.mark.parametrize("dataset", ["pathmnist", "phantom"])
def test_every_step_is_a_command_that_its_script_accepts(dataset: str, tmp_path: Path) -> None:
    config = config_of(f"--dataset={dataset}", f"--output_dir={tmp_path}")
    trained = []
    for step in study.steps(config):
        program, *arguments = step.command
        if program in SCRIPTS:
            made: Any = parse(SCRIPTS[program], arguments, "")
            trained += [made.run_id] if program != "task2.py" else []
        elif arguments[0] == "study.baselines":
            made = parse(baselines.BaselinesConfig, arguments[1:], "")
        else:
            made = parse(sweep.SweepConfig, arguments[1:], "")
        assert made.output_dir == tmp_path
    plan = study.STUDY if dataset == "pathmnist" else study.DEMO
    assert trained == [f"{row}-{seed}" for row in plan.rows for seed in range(plan.n_seeds)]
    assert dataset == "phantom" or set(plan.rows) <= set(ROWS)  # those of the page


def test_what_is_finished_is_not_run_again_and_other_data_are_refused(tmp_path: Path) -> None:
    config = config_of(f"--output_dir={tmp_path}")
    write_run(tmp_path, {**CONFIG, "dataset": "pathmnist", "run_id": "task1_64-0"})
    found = {step.title: step.finished for step in study.steps(config)}
    assert found["task1_64-0"]
    assert not found["task1_64-1"]
    assert found["maps of task1_64-0"]  # its weights are elsewhere
    (tmp_path / "checkpoints/task1_64-0").mkdir(parents=True)
    (tmp_path / "checkpoints/task1_64-0/best.pt").touch()
    assert not {step.title: step.finished for step in study.steps(config)}["maps of task1_64-0"]
    with pytest.raises(UsageError, match="a run on pathmnist at 28 pixels; name another --output_dir"):
        list(study.steps(config_of("--size=64", f"--output_dir={tmp_path}")))


def test_only_the_study_of_pathmnist_at_28_pixels_is_written_into_the_current_folder() -> None:
    assert config_of().output_dir == Path()
    assert config_of("--size=64").output_dir == Path("pathmnist-64")
    assert config_of("--dataset=phantom").output_dir == Path("phantom-28")


@pytest.mark.timeout(600)
def test_a_study_ends_with_its_report_and_a_second_start_trains_nothing(
    phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny = {
        row: re.sub(r"--train_tiles=\d+", "--train_tiles=90 --n_epochs=1", command)
        for row, command in study.DEMO.rows.items()
        if row in ("task1", "tuned")
    }
    tiny = {row: re.sub(r"--(n_epochs=4|batch_size=\d+)", "", command) for row, command in tiny.items()}
    plan = dataclasses.replace(
        study.DEMO,
        n_seeds=1,
        rows=tiny,
        explained=("tuned-0",),
        task2="task2.py --checked_tiles=6",
        baselines=("--train_tiles=90",),
    )
    monkeypatch.setattr(study, "DEMO", plan)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--dataset=phantom", f"--data_root={phantom_root}", f"--output_dir={tmp_path}"]
    run_script(study.main, study.StudyConfig, arguments)
    last = capfd.readouterr().out.strip().splitlines()[-1]
    assert last == f"the study is finished: open {tmp_path / 'report.html'}"
    page = (tmp_path / "report.md").read_text()
    for heading in ("Scores", "Training", "Saliency maps of tuned-0", "Records"):
        assert f"\n## {heading}\n" in page
    assert "They are not tissue" in page
    started: list[Any] = []
    monkeypatch.setattr(study, "run_step", lambda command: started.append(command) or 0)
    run_script(study.main, study.StudyConfig, arguments)
    assert [command[1] for command in started] == ["study.baselines"]


def test_a_failed_step_ends_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = [study.Step("a step", ["-c", "raise SystemExit(7)"], False), study.Step("b", ["-c", "1 / 0"], False)]
    monkeypatch.setattr(study, "steps", lambda config: steps)
    with pytest.raises(SystemExit) as ended:
        run_script(study.main, study.StudyConfig, ["--dataset=phantom", f"--output_dir={tmp_path}"])
    assert ended.value.code == 1
    error = capsys.readouterr().err.strip()
    assert error.endswith("a step ended with exit status 7; the same command continues the study")


def test_a_missing_package_is_named_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "timm" else installed(name))
    monkeypatch.setattr(study, "run_step", lambda command: pytest.fail("a step was started"))
    with pytest.raises(UsageError, match=r"pip install -e '\.\[demo\]'"):
        study.main(config_of("--dataset=phantom", f"--output_dir={tmp_path}"))


@pytest.mark.parametrize(("number", "send"), [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)])
def test_a_signal_ends_the_study_and_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, send: Callable[[int, int], None]
) -> None:
    begun, late = tmp_path / "begun", tmp_path / "late"
    code = f"import time; open({str(begun)!r}, 'w'); time.sleep(5); open({str(late)!r}, 'w')"
    monkeypatch.setattr(study, "steps", lambda config: [study.Step("a step", ["-c", code], False)])
    arguments = ["--dataset=phantom", f"--output_dir={tmp_path}"]
    command = start(lambda: run_script(study.main, study.StudyConfig, arguments), tmp_path / "log")
    while not begun.exists():
        time.sleep(0.05)
    send(command, number)
    assert end(command, 4) == 128 + number
    time.sleep(5)
    assert not late.exists()


def test_the_table_of_runs_says_what_is_finished_stopped_and_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path, {**CONFIG, "run_id": "done"})
    (write_run(tmp_path, {**CONFIG, "run_id": "half"}) / "summary.json").unlink()
    (write_run(tmp_path, {**CONFIG, "run_id": "torn"}) / "config.json").write_text("{")
    choice = write_run(tmp_path, {**CONFIG, "run_id": "choice"}) / "summary.json"  # a run of --test=False
    scores = json.loads(choice.read_text())
    del scores["best"], scores["last"], scores["test/acc"]
    choice.write_text(json.dumps(scores))
    runs.main(runs.RunsConfig(output_dir=tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["started", "run"], ["torn", "damaged"]]
    ends = {line.split()[1]: line.split(" px)")[1].split()[1:] for line in lines[2:]}
    assert ends == {
        "done": ["finished", "(no", "weights)", "0.5000", "0.5000"],
        "half": ["stopped", "(2", "epochs)", "0.5000"],
        "choice": ["finished", "(no", "weights)", "0.5000", "not", "scored"],
    }

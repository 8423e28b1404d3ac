"""What may stand together in a report, the selection of what is finished, and the table of runs."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_input import damaged
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.config import run_script
from common.errors import Fault, UsageError
from common.files import write_csv
from common.records.read import Record
from common.statistics import spread
from study import runs
from study.groups import Group, share
from study.report import build
from study.report_check import check_study
from study.report_collect import collect
from study.report_facts import Analysed, facts, mcnemar
from study.report_selection import Study


def add(folder: Path, run_id: str, *, config: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Copy the record of the committed run task1-0 under another name, with other facts and keys."""
    run: Path = shutil.copytree(ROOT / "runs/task1-0", folder / "runs" / run_id)
    if "attribution" in changes:
        changes.pop("attribution")
        content = json.loads((run / "attribution.json").read_text())
        (run / "attribution.json").write_text(json.dumps({**content, "run_id": run_id}))
    else:
        (run / "attribution.json").unlink()
    for name in ("config.json", "summary.json"):
        content = json.loads((run / name).read_text()) | {"run_id": run_id, **changes}
        if name == "config.json":
            content["config"] |= {"run_id": run_id, **(config or {})}
        (run / name).write_text(json.dumps(content))
    return run


def selected(folder: Path, text: str) -> None:
    (folder / "report.toml").write_text(text)
    facts(Study(folder))


def test_the_largest_group_of_each_task_is_selected_and_the_rest_is_named_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(tmp_path, "old", started="2026-01-01")
    add(tmp_path, "new", started="2026-01-02", attribution=True)
    add(tmp_path, "other-seed", started="2026-01-03", config={"seed": 1})
    add(tmp_path, "other-lr", started="2026-01-04", config={"lr": 0.1}, attribution=True)
    add(tmp_path, "phantom", started="2026-01-05", synthetic=True)
    add(tmp_path, "large", started="2026-01-06", config={"size": 64})
    add(tmp_path, "three", started="2026-01-07", task="task3", config={"ablation": "combined"})
    add(tmp_path, "row", started="2026-01-08", task="task3", config={"ablation": "with_ema"})
    add(tmp_path, "trial", started="2026-01-09", task="task3", config={"ablation": "combined", "lr": 0.2})
    tuned = {"weights": "w.pth", "train_part": "all"}
    add(tmp_path, "tuned", started="2026-01-10", task="task5", config=tuned)
    add(tmp_path, "colours", started="2026-01-11", task="baselines", config={"baseline": "mean_rgb"})
    add(tmp_path, "few-colours", started="2026-01-12", task="baselines", data_fingerprint="few")
    (add(tmp_path, "torn") / "history.csv").unlink()
    (add(tmp_path, "stopped") / "summary.json").unlink()
    (tmp_path / "sweeps" / "search").mkdir(parents=True)
    write_csv(tmp_path / "sweeps" / "search" / "table.csv", [{"run_id": "trial", "lr": 0.2}])
    for name, run_id in (("curve", "point"), ("lr-grid", "point-of-old-curve")):
        add(tmp_path, run_id, started="2026-01-13", config={"train_tiles": 900}, data_fingerprint="few")
        (tmp_path / "sweeps" / name).mkdir()
        values = {"train_tiles": 900} if name == "curve" else {"lr": 0.1}
        write_csv(tmp_path / "sweeps" / name / "runs.csv", [{"run_id": run_id, **values}])
    add(tmp_path, "few", started="2026-01-14", config={"train_tiles": 900}, data_fingerprint="few")
    collect(tmp_path)
    text = (tmp_path / "report.toml").read_text()
    assert text.splitlines()[1:] == [
        *(
            "[baselines]",
            'runs = ["colours"]',
            "[learning_curve]",
            'sweeps = ["curve"]',
            'runs = ["new", "other-seed", "three"]',
            "[networks]",
            'runs = ["other-lr", "row", "tuned"]',
            "[task1]",
            'runs = ["new", "other-seed"]',
            "[task2]",
            'run = "new"',
            'also = ["other-lr"]',
            "[task3]",
            'runs = ["three"]',
        ),
    ]
    facts(Study(tmp_path))
    printed = capsys.readouterr().out
    for run_ids, reason in (
        ("stopped", "not finished"),
        ("torn", r".*history\.csv: not a readable record"),
        ("phantom, large", "other tiles than the page's"),
        ("old", "an older run of the same seed"),
        ("trial, point-of-old-curve", "of a sweep that the page does not show"),
        ("few, few-colours", "on other training tiles than the page's networks"),
    ):
        assert re.search(f"^left out: {run_ids}: {reason}", printed, re.MULTILINE), run_ids


def test_runs_that_cannot_make_a_page_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (add(tmp_path, "torn") / "history.csv").unlink()
    with pytest.raises(UsageError, match="no finished run of a task"):
        collect(tmp_path)
    assert "left out: torn: " in capsys.readouterr().out


def test_published_scores_are_shown_where_a_task_has_all_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Study, "link", lambda study, path, text: f"[{text}]({path})")
    few = json.loads((ROOT / "runs/task1-0/summary.json").read_text())["tiles"] | {"train": 900}
    add(tmp_path, "few", tiles=few, data_fingerprint="few", config={"train_tiles": 900})
    add(tmp_path, "all", task="task3")
    for text, published in (
        ('[task1]\nruns = ["few"]\n[task3]\nruns = ["all"]\n', True),
        ('[task1]\nruns = ["few"]\n', False),
    ):
        (tmp_path / "report.toml").write_text(text)
        study = Study(tmp_path)
        page = build(study, facts(study))
        assert ("so they are not shown here" in page) != published
        assert (", and figures of others" in page) == published
        assert ("beside the coursework's" in page) == published
        assert "baseline" not in page


def test_only_generated_tiles_make_a_page_too_and_no_run_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no finished run of a task to show; python task1\.py makes one"):
        collect(tmp_path)
    add(tmp_path, "phantom", synthetic=True)
    collect(tmp_path)
    assert Study(tmp_path).selection == {"task1": {"runs": ["phantom"]}}
    add(tmp_path, "real", started="2026-01-01")  # it is older than the phantom's run
    collect(tmp_path)
    assert Study(tmp_path).selection == {"task1": {"runs": ["real"]}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task1 = 3", r"task1 must be a section, \[task1\] on a line"),
        ('[task1]\nrun = ["a"]', r"unknown key run in \[task1\]; did you mean runs\?"),
        ('[task2]\nseeds = "a"', r"unknown key seeds in \[task2\]; known: run"),
        ("[task1]\nruns = [1]", r'\[task1\] needs runs = \["RUN_ID", …\]'),
        ('[task1]\nruns = ["a", "a"]', "of the runs a, a, two have the same seed"),
        ('[task1]\nruns = ["a", "copy"]', "of the runs a, copy, two have the same seed"),
        ('[task1]\nruns = ["a", "lr"]', "the runs a, lr differ in lr"),
        ('[task1]\nruns = ["a", "network"]', "the runs a, network differ in model_name"),
        ('[task1]\nruns = ["a", "three"]', r"run three in \[task1\] is a run of task3"),
        ('[task1]\nruns = ["a"]\n[task3]\nruns = ["phantom-3"]', "generated tiles and tiles of PathMNIST"),
        ('[task1]\nruns = ["a"]\n[task2]\nrun = "phantom"', "generated tiles and tiles of PathMNIST"),
        ('[task1]\nruns = ["a"]\n[task2]\nrun = "lr"', "not explained yet"),
        ('[task1]\nruns = ["a"]\n[networks]\nruns = ["large"]', "tiles of different sizes"),
    ],
)
def test_what_may_not_stand_together_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    add(tmp_path, "a", attribution=True)
    add(tmp_path, "copy")
    add(tmp_path, "lr", config={"seed": 1, "lr": 0.1})
    add(tmp_path, "network", config={"seed": 1, "model_name": "resnet34"})
    add(tmp_path, "three", task="task3", attribution=True)
    add(tmp_path, "phantom", synthetic=True, attribution=True)
    add(tmp_path, "phantom-3", task="task3", synthetic=True)
    add(tmp_path, "large", config={"size": 64})
    with pytest.raises(UsageError, match=message):
        selected(tmp_path, text)


def test_a_search_on_other_tiles_is_refused(tmp_path: Path) -> None:
    add(tmp_path, "a")
    add(tmp_path, "trial", task="task3", synthetic=True)
    write_csv(tmp_path / "sweeps" / "s" / "table.csv", [{"rank": 1, "run_id": "trial"}])
    study = Study(tmp_path, {"task1": {"runs": ["a"]}, "task4": {"search": "s"}})
    study.trained()
    with pytest.raises(UsageError, match="trial trial and run a have other tiles"):
        study.search()


def test_the_table_of_runs_has_each_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(tmp_path, "done", started="2026-01-02T00:00:00+00:00")
    for run_id, started in (("running", "2026-01-03T00:00:00+00:00"), ("stopped", "2026-01-01T00:00:00+00:00")):
        run = add(tmp_path, run_id, started=started)
        (run / "summary.json").unlink()
        (run / ".lock").touch()
    (add(tmp_path, "torn") / "config.json").write_text("{")
    boosting = shutil.copytree(ROOT / "runs/boosting-89996-0", tmp_path / "runs/boosting")
    (boosting / "summary.json").unlink()
    config = json.loads((boosting / "config.json").read_text())
    (boosting / "config.json").write_text(json.dumps({**config, "run_id": "boosting"}))
    hold = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); print(); input()"
    command = [sys.executable, "-c", hold, str(tmp_path / "runs/running/.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        run_script(runs.main, runs.RunsConfig, [f"--output_dir={tmp_path}"])
        process.communicate(b"\n")
    table = capsys.readouterr().out
    assert "\x1b" not in table  # no colour outside a terminal
    lines = [line.split() for line in table.splitlines()]
    assert [line[0] for line in lines] == ["run", "torn", "stopped", "done", "running", "boosting"]
    assert lines[1][1:] == ["damaged"]
    assert "stopped (5 of 5 epochs)" in " ".join(lines[2])
    assert "not finished" in table.split("\nboosting")[1].split("\n")[0]
    scores = json.loads((ROOT / "runs/task1-0/summary.json").read_text())
    numbers = f"{scores['validate']['validate/acc']:.4f} {scores['test/acc']:.4f}"
    assert f"finished (no weights) {numbers}" in " ".join(lines[3])
    assert "running (5 of 5 epochs)" in " ".join(lines[4])
    weights = tmp_path / "checkpoints/done/best.pt"
    weights.parent.mkdir(parents=True)
    weights.touch()
    run_script(runs.main, runs.RunsConfig, [f"--output_dir={tmp_path}"])
    assert re.search(rf"^done .* finished  +{numbers[:6]}", capsys.readouterr().out, re.MULTILINE)


def test_states_are_coloured_on_a_terminal_only_and_not_where_no_color_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert runs.in_colour()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not runs.in_colour()
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not runs.in_colour()


def test_a_folder_without_runs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_script(runs.main, runs.RunsConfig, [f"--output_dir={tmp_path}"])
    assert ended.value.code == 2
    assert "no runs here; python task1.py makes one" in capsys.readouterr().err


def test_sweeps_on_other_tiles_do_not_take_the_place_of_the_page_s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(tmp_path, "first")
    for name, changes in (("a", {}), ("z", {"synthetic": True})):
        add(tmp_path, f"{name}-0", task="task3", config={"ablation": "combined"}, **changes)
        run = {"run_id": f"{name}-0", "ablation": "combined", "seed": 0}
        write_csv(tmp_path / "sweeps" / name / "runs.csv", [run])
        write_csv(tmp_path / "sweeps" / name / "table.csv", [{"row": "combined"}])
    add(tmp_path, "tried", task="task3")
    write_csv(tmp_path / "sweeps/search/table.csv", [{"rank": 1, "run_id": "tried", "lr": 0.1}])
    collect(tmp_path)
    assert Study(tmp_path).selection["task4"] == {"ablation": "a", "search": "search"}
    shutil.rmtree(tmp_path / "sweeps" / "a")
    capsys.readouterr()
    collect(tmp_path)
    assert "task4" not in Study(tmp_path).selection
    assert "left out: tried: of a sweep that the page does not show" in capsys.readouterr().out


def test_the_runs_of_a_section_that_cannot_be_shown_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(tmp_path, "first", attribution=True)
    (tmp_path / "runs/first/attribution.json").write_text("{")
    add(tmp_path, "point")
    write_csv(
        tmp_path / "sweeps/curve/runs.csv", [{"run_id": run_id, "train_tiles": 9} for run_id in ("point", "gone")]
    )
    collect(tmp_path)
    assert Study(tmp_path).selection.keys() == {"task1"}
    printed = capsys.readouterr().out
    assert re.search(r"left out: first: .*attribution\.json: not a readable record", printed)
    assert "left out: point, gone: report.toml names run gone, which is not finished" in printed


def test_baselines_are_shown_beside_task_5_alone(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "runs/task5", tmp_path / "runs/task5")
    shutil.copytree(ROOT / "runs/task5-scratch", tmp_path / "runs/task5-scratch")
    comparison = json.loads((tmp_path / "runs/task5/comparison.json").read_text())
    comparison["runs"] = {kind: runs[:1] for kind, runs in comparison["runs"].items()}
    (tmp_path / "runs/task5/comparison.json").write_text(json.dumps(comparison))
    shutil.copytree(ROOT / "runs/mean_rgb-89996-0", tmp_path / "runs/mean_rgb-89996-0")
    collect(tmp_path)
    assert Study(tmp_path).selection.keys() == {"task5", "baselines"}


def test_matched_colours_are_compared_over_the_runs_that_have_checkpoints(tmp_path: Path) -> None:
    for seed in (0, 1):
        add(tmp_path, f"r{seed}", config={"seed": seed})
    group = Group([Record.read(tmp_path, f"r{seed}") for seed in (0, 1)])
    matched = {"m": {"r1": {"acc": 0.5, "balanced_acc": 0.5}}, "none": {}}
    analysed = Analysed.of(group, {"published": None, "matched": matched})
    (scored, accuracy, _), *others = analysed.matched.values()
    assert not others
    assert [record.run_id for record in scored.records] == ["r1"]
    assert accuracy.value == 0.5


def test_the_analysis_of_a_task_is_that_of_its_runs(tmp_path: Path) -> None:
    for seed in (0, 1):
        add(tmp_path, f"r{seed}", config={"seed": seed})
    group = Group([Record.read(tmp_path, f"r{seed}") for seed in (0, 1)])
    before, goal = (group.first.scores[name] for name in ("test/acc", "validate/acc"))
    scores = {f"r{seed}": {"acc": before + 0.25 * (goal - before)} for seed in (0, 1)}

    def analysed(*only_right: tuple[int, int]) -> Analysed:
        pairs = {
            f"r{seed}": dict(zip(("ours", "theirs"), pair, strict=True)) for seed, pair in enumerate(only_right)
        }
        return Analysed.of(group, {"published": {"only_right": pairs}, "matched": {"m": scores}})

    found = analysed((90, 10), (70, 20))
    assert (found.verdict, found.only_right) == ("better", {"ours": 80, "theirs": 15})
    assert found.p == mcnemar(70, 20) > mcnemar(90, 10)
    assert found.matched["m"][2].mean == pytest.approx(0.25)  # a quarter of the gap closes
    assert analysed((10, 90), (20, 70)).verdict == "worse"
    assert analysed((90, 10), (10, 90)).verdict == "cannot be decided"
    assert analysed((90, 10), (12, 10)).verdict == "cannot be decided"


def test_a_score_that_a_run_lacks_has_no_mean_and_an_interval_ends_at_1() -> None:
    records = [
        Record(Path(), {"config": {"seed": seed}}, {"run_id": f"r{seed}", "tta": tta}, [])
        for seed, tta in enumerate(({}, {"acc": 1}))
    ]
    group = Group(records)
    assert group.score("tta", "acc") is None
    assert share(spread([0.9, 1.0, 1.0])).high == 1


def test_the_check_computes_task_5_s_comparison_again(tmp_path: Path) -> None:
    for folder in (ROOT / "runs").glob("task5*"):
        shutil.copytree(folder, tmp_path / "runs" / folder.name)
    path = tmp_path / "runs/task5/comparison.json"
    study = Study(tmp_path, {"task5": {"comparison": "task5"}})
    compared = study.compared()
    study.read.clear()  # the runs themselves are not checked here
    check_study(study, {}, compared)
    content = json.loads(path.read_text())
    content["differences"]["test/acc"]["mean"] += 0.001
    path.write_text(json.dumps(content))
    with pytest.raises(
        Fault, match=r"comparison\.json: differences test/acc mean is .*, its runs give another value"
    ):
        check_study(study, {}, compared)


def test_more_training_tiles_come_before_more_seeds(tmp_path: Path) -> None:
    add(tmp_path, "all")
    few = json.loads((tmp_path / "runs/all/summary.json").read_text())["tiles"] | {"train": 900}
    for seed in (0, 1):
        keys = {"seed": seed, "train_tiles": 900}
        add(tmp_path, f"few-{seed}", config=keys, tiles=few, data_fingerprint="few")
    collect(tmp_path)
    assert Study(tmp_path).selection == {"task1": {"runs": ["all"]}}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_of_report_toml_is_refused_or_leaves_a_selection(data: st.DataObject, tmp_path: Path) -> None:
    text = b'[task1]\nruns = ["a", "b"]\n[task2]\nrun = "a"\n[task4]\nablation = "g"\n'
    (tmp_path / "report.toml").write_bytes(damaged(text, data))
    with suppress(UsageError):
        study = Study(tmp_path)
        study.named("task1", "runs")
        study.attribution(study.named("task2", "run"))


def test_a_class_is_taken_for_another_one_and_a_probability_may_be_too_high(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrices = [[[5, 3, 1], [0, 9, 0], [0, 0, 9]], [[9, 0, 4], [0, 9, 0], [0, 0, 9]]]
    names = dict.fromkeys("abc")
    records = [
        Record(Path(), {"config": {"seed": n}}, {"run_id": f"r{n}", "best": best}, [])
        for n, best in enumerate({"confusion_matrix": one, "auc_per_class": names} for one in matrices)
    ]
    group = Group(records)
    assert group.mistaken("a") == ("c", pytest.approx(5 / 22))  # over both runs, not those of the first one
    logits = np.log([[0.7, 0.2, 0.1], [0.05, 0.05, 0.9]])
    monkeypatch.setattr(Record, "arrays", lambda record: {"best_logits": logits})
    assert group.confidence() == pytest.approx(0.8)


def test_an_ensemble_is_scored_by_the_mean_of_its_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    # Probabilities of the first tile's class: their mean is 0.507, but the mean logit speaks for the other class.
    over_views = {"r0": 0.7, "r1": 0.7, "r2": 0.12}
    records = [
        Record(Path(), {"config": {"seed": n}}, {"run_id": run_id}, []) for n, run_id in enumerate(over_views)
    ]

    def arrays(record: Record) -> dict[str, np.ndarray]:
        first = over_views[record.run_id]
        logits = np.log([[first, 1 - first], [0.2, 0.8]])
        return {"best_logits": logits[:, ::-1], "tta_logits": logits, "targets": np.array([0, 1])}

    monkeypatch.setattr(Record, "arrays", arrays)
    assert Group(records).ensemble("tta").value == 1
    assert Group(records).ensemble().value == 0
    assert 0 < Group(records).ensemble("tta").low < 1

"""report.md from real records of small phantom runs: complete, traceable, and checked against them."""

import csv
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
import numpy as np
import pytest
import yaml
from conftest import ROOT

import task1
import train
from common import statistics
from common.config import run_script
from common.files import write_csv
from common.records.read import Record
from study import baselines, forecast, groups, report, report_facts, report_figures, sweep
from study.report_facts import REFERENCES, facts, rescued, together
from study.report_selection import Study

PHANTOM = ["--dataset=phantom", "--size=28", "--input_size=28", "--train_tiles=90", "--wandb=disabled"]


@pytest.fixture(scope="module")
def finished(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of six small runs, four of them an ablation, and two baselines; with figures but without a page."""
    folder = tmp_path_factory.mktemp("study")
    where = [f"--data_root={phantom_root}", f"--output_dir={folder}"]
    fixed = [f"--data_root={phantom_root}", *PHANTOM, "--n_epochs=2", "--batch_size=45"]
    for seed in (0, 1):
        same = [*PHANTOM, *where, "--n_epochs=2", f"--seed={seed}"]
        run_script(task1.main, task1.Task1Config, [*same, f"--run_id=first-{seed}"])
        for row in ("combined", "with_ema"):
            names = [f"--output_dir={folder}", f"--run_id=small-{row}-{seed}", f"--ablation={row}"]
            run_script(train.main, train.TrainConfig, [*fixed, *names, f"--seed={seed}"])
    file = folder / "small.yaml"
    parameters = {"ablation": {"values": ["combined", "with_ema"]}, "seed": {"values": [0, 1]}}
    file.write_text(yaml.safe_dump({"program": "train.py", "method": "grid", "parameters": parameters}))
    arguments = [f"--file={file}", f"--output_dir={folder}", "--table_only", f"--fixed={' '.join(fixed)}"]
    run_script(sweep.main, sweep.SweepConfig, arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(baselines.BASELINES, "boosting")  # takes seconds
        run_script(baselines.main, baselines.BaselinesConfig, [*PHANTOM[:3], *where])
    (folder / "report.toml").write_text(
        '[task1]\nruns = ["first-0", "first-1"]\n'
        '[task3]\nruns = ["small-combined-0", "small-combined-1"]\n'
        '[task4]\nablation = "small"\n'
        '[baselines]\nruns = ["mean_rgb-90-0", "neighbours-90-0"]\n'
    )
    make(folder)
    (folder / "report.md").unlink()
    return folder


@pytest.fixture
def study(finished: Path, tmp_path: Path) -> Path:
    folder: Path = shutil.copytree(finished, tmp_path / "study", ignore=shutil.ignore_patterns("checkpoints"))
    return folder


def make(folder: Path, *more: str) -> None:
    run_script(report.main, report.ReportConfig, [f"--output_dir={folder}", *more])


def built(folder: Path) -> str:
    study = Study(folder)
    return report.build(study, facts(study))


def fails(folder: Path, status: int, message: str, capsys: pytest.CaptureFixture[str], *more: str) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        make(folder, *more)
    error = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == status
    assert len(error) == 1
    assert re.search(message, error[0]), error[0]


def test_the_page_shows_every_run_with_its_scores_and_every_link_leads_somewhere(study: Path) -> None:
    make(study)
    page = (study / "report.md").read_text()
    for run_id in ("first-0", "first-1", "small-combined-0", "small-combined-1"):
        summary = json.loads((study / "runs" / run_id / "summary.json").read_text())
        scores = summary["best"]["acc"]
        line = next(line for line in page.splitlines() if f"[{run_id}](runs/{run_id}/)" in line)
        assert f"{scores['value']:.4f}" in line
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert len(links) > 12
    anchors = {f"#{heading.lower().replace(' ', '-')}" for heading in re.findall(r"^#+ (.+)", page, re.MULTILINE)}
    for link in links:
        assert link in anchors or (study / link).exists(), link
    for alt in re.findall(r"!\[([^\]]*)\]", page):
        assert len(alt) > 10
    assert "phantom (90 training tiles, 28 px)" in page
    assert "not tissue" in page


def test_a_page_of_generated_tiles_shows_no_published_score(study: Path) -> None:
    page = built(study)
    assert "so they are not shown here" in page
    for published in itertools.chain(*REFERENCES.values()):
        assert f"| {published.source}: {published.network} |" not in page


def test_the_page_shows_only_the_selected_sections(study: Path) -> None:
    (study / "report.toml").write_text('[task3]\nruns = ["small-combined-1"]\n')
    page = built(study)
    sections = re.findall(r"^## (.+)", page, flags=re.MULTILINE)
    assert [section.split(":")[0] for section in sections] == [
        "Summary",
        "Task 3",
        "Beyond the scores",
        "What this study cannot say",
        "Provenance and reproduction",
    ]
    assert "Task 1 |" not in page


def test_balanced_acc_is_the_record_s_or_the_mean_of_the_recalls(study: Path) -> None:
    expected = []
    for run_id in ("first-0", "first-1"):
        path = study / "runs" / run_id / "summary.json"
        summary = json.loads(path.read_text())
        summary["best"].pop("balanced_acc", None)
        if run_id == "first-1":
            summary["best"]["balanced_acc"] = {"value": 0.4321, "low": 0.3, "high": 0.5}
        path.write_text(json.dumps(summary))
        rows = summary["best"]["confusion_matrix"]
        recalls = [row[label] / sum(row) for label, row in enumerate(rows) if sum(row)]
        expected.append(f"{sum(recalls) / len(recalls):.4f}")
    expected[1] = "0.4321"
    page = built(study)
    line = next(line for line in page.splitlines() if "[first-0](" in line)
    assert line.split("|")[7] == f" {', '.join(expected)} "


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.85, 0.95, "higher"), (0.5, 0.85, "not clearly different"), (0.3, 0.6, "lower")],
)
def test_the_page_compares_a_network_with_the_strongest_baseline(
    low: float, high: float, verdict: str, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (study / "report.toml").write_text(
        '[task1]\nruns = ["first-0"]\n[baselines]\nruns = ["mean_rgb-90-0", "neighbours-90-0"]\n'
    )
    scores = {"first-0": (0.5, low, high), "mean_rgb-90-0": (0.1, 0.0, 0.2), "neighbours-90-0": (0.7, 0.65, 0.8)}
    for run_id, ends in scores.items():
        estimate = dict(zip(("value", "low", "high"), ends, strict=True))
        summary("best", "acc", value=estimate)(study / "runs" / run_id)
    title = json.loads((study / "runs/neighbours-90-0/summary.json").read_text())["title"]
    best = f"- The baseline with the highest test ACC is {title}: 0.7000 [0.6500, 0.8000]."
    assert f"{best} Task 1 has 0.5000 (one seed).\n" in built(study)  # too few seeds for a verdict
    monkeypatch.setattr(report_facts, "LEAST_SEEDS", 1)
    page = built(study)
    assert f"{best} Task 1 is {verdict}.\n" in page
    assert f"| Baseline | {title} | 90 | 1 | 0.700 [0.650, 0.800] |" in page


def test_the_page_shows_a_recipe_and_a_baseline_on_fewer_tiles(study: Path) -> None:
    def fewer(run_id: str, other: str, value: float) -> None:
        folder = shutil.copytree(study / "runs" / run_id, study / "runs" / other)
        path = folder / "config.json"
        content = json.loads(path.read_text())
        content["config"] |= {"train_tiles": 45, "run_id": other}
        content["run_id"] = other
        path.write_text(json.dumps(content))
        summary("run_id", value=other)(folder)
        summary("tiles", "train", value=45)(folder)
        summary("best", "acc", value={"value": value, "low": value, "high": value})(folder)

    for seed in (0, 1):
        fewer(f"first-{seed}", f"curve-45-{seed}", 0.25)
    fewer("neighbours-90-0", "neighbours-45-0", 0.125)
    (study / "sweeps" / "curve").mkdir()
    (study / "sweeps" / "curve" / "runs.csv").write_text("run_id,seed\ncurve-45-0,0\ncurve-45-1,1\n")
    with open(study / "report.toml", "a") as file:
        file.write('[learning_curve]\nsweeps = ["curve"]\nruns = ["neighbours-45-0"]\n')
    report_figures.draw(study, facts(Study(study)))
    page = built(study)
    whole = np.mean(
        [json.loads((study / f"runs/first-{seed}/summary.json").read_text())["test/acc"] for seed in (0, 1)]
    )
    assert "| test ACC of | 45 tiles | 90 tiles | last step |" in page
    table = page[page.index("| test ACC of |") :].split("\n\n")[0]
    row = f"| ResNet-18 from scratch | 0.250 | {whole:.3f} | {whole - 0.25:+.3f} |\n"
    assert row in table  # two seeds: no interval
    assert "| nearest neighbours on colour and gradient statistics | 0.125 | " in table
    assert "MobileNetV3-Large" not in table  # has one number of tiles
    assert "this page has 6 and 3." in page  # the runs on fewer tiles are no runs of the tasks


def test_the_page_says_which_trial_of_a_search_is_the_best_and_on_which_tiles(study: Path) -> None:
    for number in (3, 7):
        shutil.copytree(study / "runs/small-combined-0", study / f"runs/search-{number}")
        path = study / f"runs/search-{number}/config.json"
        text = path.read_text().replace("small-combined-0", f"search-{number}")
        path.write_text(text.replace("phantom (90 ", "phantom (45 of 90 "))
    (study / "sweeps" / "search").mkdir()
    (study / "sweeps" / "search" / "table.md").write_text("")
    (study / "sweeps" / "search" / "table.csv").write_text(
        "rank,run_id,state,validate/acc,best epoch,epochs,augmentation,lr,model_name\n"
        "1,search-7,finished,0.5,2,2,stain,0.00123456,timm:x.in1k\n2,search-3,pruned,0.4,1,1,none,0.1,vgg11\n"
    )
    figure, importance = (
        study / f"fig/task4/search-{name}.png" for name in ("parallel-coordinates", "importance")
    )
    shutil.copy(study / "fig/report/summary.png", figure)
    toml = study / "report.toml"
    toml.write_text(toml.read_text().replace("[task4]\n", '[task4]\nsearch = "search"\n'))
    page = built(study)
    data = "phantom (45 of 90 training tiles, 28 px)"
    assert f"Of 2 trials on {data}, one has the best validation ACC, 0.5000 in epoch 2: [search-7](" in page
    assert (
        "with augmentation stain, learning rate 0.001235, model name timm:x.in1k. The search stopped 1 of" in page
    )
    assert f"(fig/task4/{figure.name})" in page
    assert f"; 2 trials on {data}.*" in page
    assert "See [all trials](sweeps/search/table.md).\n" in page  # two trials do not tell which parameter matters
    shutil.copy(figure, importance)
    assert f", [how much each parameter matters](fig/task4/{importance.name}).\n" in built(study)
    table = study / "sweeps/search/table.csv"
    table.write_text(table.read_text().replace("finished", "failed"))
    assert "### Search" not in built(study)  # there is no best trial


def test_the_page_compares_the_search_s_best_recipe_with_task_3_s(study: Path) -> None:
    copied(study, "small-combined-0", "search-1", lr=0.5, train_tiles=45)  # the search had fewer tiles
    for seed in (0, 1):
        copied(study, "small-combined-0", f"winner-{seed}", lr=0.5, seed=seed)
        copied(study, "small-combined-0", f"other-{seed}", lr=0.4, seed=seed)
        summary("best", "acc", "value", value=0.75)(study / f"runs/winner-{seed}")
        summary("best", "acc", "value", value=0.5)(study / f"runs/small-combined-{seed}")
    found = {"state": "finished", "validate/acc": 0.5, "best epoch": 1, "epochs": 2, "lr": 0.5}
    write_csv(study / "sweeps/search/table.csv", [{"rank": 1, "run_id": "search-1", **found}])
    shutil.copy(study / "fig/report/summary.png", study / "fig/task4/search-parallel-coordinates.png")
    toml = study / "report.toml"
    text = toml.read_text().replace("[task4]\n", '[task4]\nsearch = "search"\n')
    toml.write_text(text + '[networks]\nruns = ["other-0", "other-1", "winner-0", "winner-1"]\n')
    page = built(study)
    assert "| Further | MobileNetV3-Large from scratch, the search's best recipe | 90 | 2 |" in page
    assert "| Further | MobileNetV3-Large from scratch | 90 | 2 |" in page
    assert "Trained on 90 tiles, this recipe reaches test ACC" in page
    assert "seed by seed, is +0.250: cannot be decided with 2 seeds." in page
    path = study / "runs/search-1/config.json"
    content = json.loads(path.read_text())
    content["config"]["lr"] = 0.6
    path.write_text(json.dumps(content))
    page = built(study)
    assert "the search's best recipe" not in page
    assert "this recipe reaches" not in page


def test_the_check_compares_the_search_s_trials_with_their_runs(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(study / "runs/small-combined-0", study / "runs/search-0")
    for name in ("config.json", "summary.json"):
        path = study / "runs/search-0" / name
        path.write_text(path.read_text().replace("small-combined-0", "search-0"))
    with open(study / "runs/search-0/history.csv", newline="") as file:
        best = max(csv.DictReader(file), key=lambda row: float(row["validate/acc"]))
    found = {"validate/acc": best["validate/acc"], "best epoch": int(float(best["epoch"])), "epochs": 2, "lr": 0.1}
    trials = [{"rank": 1, "run_id": "search-0", "state": "finished", **found}]
    # Of another machine, and one that failed before it left a record.
    trials.append({**trials[0], "run_id": "search-1"})
    trials.append({**trials[0], "run_id": "search-2", "state": "failed", "validate/acc": "", "best epoch": ""})
    (study / "sweeps/search").mkdir()
    (study / "sweeps/search/table.md").touch()
    toml = study / "report.toml"
    toml.write_text(toml.read_text().replace("[task4]\n", '[task4]\nsearch = "search"\n'))
    write_csv(study / "sweeps/search/table.csv", trials)
    make(study)
    trials[0]["validate/acc"] = 0.987
    write_csv(study / "sweeps/search/table.csv", trials)
    fails(study, 1, "trial search-0 is not its run's", capsys, "--check")


def test_the_reference_of_the_ablation_is_that_of_its_table(study: Path) -> None:
    path = study / "sweeps/small/runs.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "small-combined-0" not in line))
    page = built(study)
    assert "| reference | 1 |" in page
    assert page.index("| reference | 1 |") < page.index("| with averaged weights (EMA) | 2 |")
    assert "none has more than one seed" in page


def test_an_ablation_of_the_reference_alone_has_no_verdict(study: Path) -> None:
    path = study / "sweeps/small/runs.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "with_ema" not in line))
    for record in study.glob("runs/small-combined-*/summary.json"):
        scores = json.loads(record.read_text())
        del scores["tta"]  # else the reference over 8 views would be compared
        record.write_text(json.dumps(scores))
    assert "| reference | 2 |" in (page := built(study))
    assert "- Task 4: " not in page


def test_validation_chooses_the_best_row_and_equal_networks_are_identical(study: Path) -> None:
    for seed in (0, 1):
        one, other = (study / "runs" / f"small-{row}-{seed}" for row in ("combined", "with_ema"))
        shutil.copy(one / "scores.npz", other)
        content = json.loads((one / "summary.json").read_text())
        (other / "summary.json").write_text(json.dumps({**content, "run_id": other.name}))
    assert facts(Study(study))["verdicts"]["with_ema"].verdict == "identical"
    for seed in (0, 1):
        summary("best", "acc", value={"value": 0.9, "low": 0.8, "high": 1})(study / f"runs/small-with_ema-{seed}")
        summary("validate", "validate/acc", value=0.99)(study / f"runs/small-combined-{seed}")
    found = facts(Study(study))
    assert found["best_row"] == "combined"
    assert found["verdicts"]["with_ema"].verdict == "too few seeds"


def copied(study: Path, run_id: str, other: str, **keys: Any) -> None:
    """Copy a run under another id, with other keys."""
    folder = shutil.copytree(study / "runs" / run_id, study / "runs" / other)
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["config"] |= {"run_id": other, **keys}
    path.write_text(json.dumps({**content, "run_id": other}))
    summary("run_id", value=other)(folder)


def test_a_run_of_task_3_and_one_of_the_ablation_may_have_the_same_recipe_and_seed(study: Path) -> None:
    copied(study, "small-combined-0", "mine")
    toml = study / "report.toml"
    toml.write_text(toml.read_text().replace('["small-combined-0", "small-combined-1"]', '["mine"]'))
    assert "this page has 6 and 3." in built(study)  # `mine` repeats small-combined-0


def test_networks_whose_recipes_have_the_same_name_are_all_shown(study: Path) -> None:
    copied(study, "first-0", "same", seed=7)
    copied(study, "first-0", "fast", lr=0.5)
    with open(study / "report.toml", "a") as file:
        file.write('[networks]\nruns = ["same", "fast"]\n')
    page = built(study)
    for run_id in ("same", "fast"):
        assert f"[{run_id}](runs/{run_id}/)" in page
    assert "**: the recipe of Task 1.\n" in page
    assert "**: the recipe of Task 1, but with learning rate: 0.5.\n" in page


def parts(**more: Any) -> Any:
    """The macros of report_parts.md.j2."""
    loader = jinja2.FileSystemLoader(ROOT / "study")
    environment = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True)
    helpers = {"interval": statistics.interval, "counted": statistics.counted, "named": groups.named}
    return environment.get_template("report_parts.md.j2").make_module({**helpers, **more})


def test_a_baseline_of_two_seeds_has_no_interval_and_gives_no_verdict() -> None:
    def group(*values: float) -> Any:
        score = groups.share(statistics.spread(values))
        by_seed = dict(enumerate(values))
        return SimpleNamespace(records=values, score=lambda *_: score, by_seed=lambda *_: by_seed)

    beside = parts(least_seeds=3).beside
    assert (
        beside("Task 1", group(0.9, 0.9, 0.9), group(0.1, 0.1))
        == "Task 1 has 0.9000 and 0.9000 and 0.9000 (3 seeds)"
    )
    assert beside("Task 1", group(0.9, 0.9, 0.9), group(0.1, 0.1, 0.1)) == "Task 1 is higher"


@pytest.mark.parametrize(("part", "said"), [("all", True), ("classifier", False)])
def test_the_recipe_names_the_factor_of_the_learning_rate_only_where_it_counts(part: str, said: bool) -> None:
    config = {**Record.read(ROOT, "task5").config, "train_part": part, "backbone_lr_factor": 0.1}
    text = parts().recipe(SimpleNamespace(first=SimpleNamespace(config=config)))
    assert ("; 0.1 times this in the first block, more in each later one" in text) == said


def test_the_nearest_recipe_has_no_key_that_the_other_lacks() -> None:
    def group(**config: Any) -> Any:
        return SimpleNamespace(first=SimpleNamespace(config={"lr": 0.1, **config}))

    others = {"fine-tuned": group(weights="w"), "Task 3": group(lr=0.2, ablation="combined")}
    assert groups.nearest(group(), {"fine-tuned": others["fine-tuned"]}) == ("fine-tuned", {"weights": None})
    others["fine-tuned"] = group(weights="w", train_part="all")
    assert groups.nearest(group(seed=3), others) == ("Task 3", {"lr": 0.1})


@pytest.mark.parametrize(
    ("keys", "title"),
    [
        ({}, "ResNet-18 from scratch"),
        ({"ema_decay": 0.99}, "ResNet-18 from scratch with averaged weights"),
        (
            {"augmentation": "flip,stain", "ema_decay": 0.99, "input_size": 56},
            "ResNet-18 from scratch with flip and stain augmentation and averaged weights, resized to 56 px",
        ),
    ],
)
def test_a_title_says_what_a_recipe_adds_to_task_1(keys: dict[str, Any], title: str) -> None:
    config = {"seed": 0, "model_name": "resnet18", "augmentation": "none", "ema_decay": 0.0, "input_size": None}
    record: Any = SimpleNamespace(run_id="one", config={**config, **keys})
    assert groups.Group([record]).title == title


def test_the_page_shows_further_networks_and_readme_the_results(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(study / "report.toml", "a") as file:
        file.write('[networks]\nruns = ["small-with_ema-0", "small-with_ema-1"]\n')
    readme = study / "README.md"
    readme.write_text("before\n<!-- results: begin -->\nold\n<!-- results: end -->\nafter\n")
    make(study)
    page = (study / "report.md").read_text()
    title = "MobileNetV3-Large from scratch with averaged weights (EMA)"
    assert f"| Further | {title} | 90 | 2 |" in page
    assert f"- **{title}**: the recipe of Task 3, but with averaged weights (EMA decay): 0.99.\n" in page
    runs = "0: [small-with_ema-0](runs/small-with_ema-0/), 1: [small-with_ema-1](runs/small-with_ema-1/)"
    assert f"\n| {title} | {runs} | " in page
    assert "- **Task 3**: dataset: phantom · size: 28 · " in page
    assert f"| {title} | 2 | " in page[page.index("### Validation against test") :]
    assert re.search(r"^\| .*Further networks.* \| \d+ \| ", page, re.MULTILINE)
    before, *lines, after = readme.read_text().splitlines()
    assert (before, lines[0], lines[-1], after) == (
        "before",
        "<!-- results: begin -->",
        "<!-- results: end -->",
        "after",
    )
    assert lines[1:-1] == [line for line in page.split("\n## ")[1].splitlines() if line.startswith("- ")]
    assert any(line.startswith("- The baseline with the highest test ACC is ") for line in lines)
    (study / "findings.md.j2").write_text("{% if section == 'Summary' %}\n- Learnt.\n{% endif %}")
    make(study)
    assert readme.read_text().splitlines()[1:-1] == [lines[0], "- Learnt.", lines[-1]]
    readme.write_text(readme.read_text().replace("Learnt", "Known"))
    fails(study, 1, r"README\.md is out of date: line 3 says", capsys, "--check")


def test_tasks_share_a_row_of_provenance_only_if_commit_and_python_are_the_same() -> None:
    run = {"commit": "a", "python": "3.11", "started": "2026", "versions": {"torch": "2"}}
    sources: dict[str, list[Any]] = {"Task 1": [run, run], "Task 2": []}
    for task, change in (("A", {"commit": "b"}), ("B", {"python": "3.12"}), ("C", {"versions": {"torch": "3"}})):
        sources[task] = [run | change]
    sources["B"].append(run)  # the runs of a task may differ
    rows = {(row.commit, row.python): row for row in together(sources)}
    assert {key: list(row.tasks) for key, row in rows.items()} == {
        ("b", "3.11"): ["A"],
        ("a", "3.12"): ["B"],
        ("a", "3.11"): ["B", "C", "Task 1"],
    }
    assert len(rows["a", "3.11"].started) == 4
    assert list(rows["a", "3.11"].versions["torch"]) == ["2", "3"]


def test_the_page_compares_the_checks_of_saliency_on_several_networks(tmp_path: Path) -> None:
    for run_id in ("task1-0", "stained"):
        shutil.copytree(ROOT / "runs" / "task1-0", tmp_path / "runs" / run_id)
    for name in ("config.json", "summary.json", "attribution.json"):
        path = tmp_path / "runs" / "stained" / name
        content = json.loads(path.read_text()) | {"run_id": "stained"}
        if name == "config.json":
            content["config"]["augmentation"] = "stain"
        if name == "attribution.json":
            for method in ("saliency", "smoothgrad", "occlusion"):
                content["methods"][method]["passes"] = method != "occlusion"
        path.write_text(json.dumps(content))
    shutil.copytree(ROOT / "fig", tmp_path / "fig")
    (tmp_path / "report.toml").write_text(
        '[task1]\nruns = ["task1-0"]\n[task2]\nrun = "task1-0"\nalso = ["stained"]\n'
    )
    make(tmp_path)
    page = (tmp_path / "report.md").read_text()
    passed = {
        run_id: [method["title"] for method in record["methods"].values() if method["passes"]]
        for run_id in ("task1-0", "stained")
        for record in [json.loads((tmp_path / "runs" / run_id / "attribution.json").read_text())]
    }
    assert f"- Passed: {', '.join(passed['task1-0'])}. Passing means" in page
    [line] = [line for line in page.splitlines() if line.startswith("- [stained](runs/stained/)")]
    assert ", ResNet-18 from scratch with stain augmentation (test ACC 0.8" in line
    methods = ", ".join(passed["stained"])
    assert f"Passed: {methods} ([all numbers](runs/stained/attribution.json)). See [its maps](fig/task2/" in line


def test_the_page_compares_the_validation_scores_where_there_are_enough_runs(
    study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "at least 10 runs and 5 configurations; this page has 6 and 3." in built(study)
    monkeypatch.setattr(forecast, "LEAST_RUNS", 6)
    monkeypatch.setattr(forecast, "LEAST_GROUPS", 3)
    for number, path in enumerate(sorted(study.glob("runs/*/summary.json"))):
        record = json.loads(path.read_text())
        record["best"]["acc"]["value"] = record["validate"]["validate/acc"] = number / 10
        record["validate"]["validate/loss"] = number / 10
        path.write_text(json.dumps(record))
    monkeypatch.setattr(report, "check_study", lambda *records: None)
    make(study)
    page = (study / "report.md").read_text()
    assert "| validation score | all 6 runs |\n" in page  # all have as many training tiles
    assert "| validation ACC | 1.00 [1.00, 1.00] |\n" in page
    assert "| validation loss (sign turned) | -1.00 [-1.00, -1.00] |\n" in page
    assert "*3 configurations; brackets" in page
    assert "fig/report/forecast.png" in page


@pytest.mark.parametrize(
    ("scores", "verdict"),
    [
        ((0.6, 0.601), "better"),
        ((0.4, 0.401), "worse"),
        ((0.6, 0.4), "not decided"),
        ((0.6, 0.6), "not decided"),  # equal differences have no t test
        ((0.5, 0.5), "the same"),
    ],
)
def test_the_verdict_on_a_technique_follows_from_its_scores(
    scores: tuple[float, float], verdict: str, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (statistics, report_facts):
        monkeypatch.setattr(module, "LEAST_SEEDS", 2)  # the study has two seeds
    for row, accuracies in (("combined", (0.5, 0.5)), ("with_ema", scores)):
        for seed, accuracy in enumerate(accuracies):
            path = study / "runs" / f"small-{row}-{seed}" / "summary.json"
            summary = json.loads(path.read_text())
            summary["best"]["acc"]["value"] = summary["test/acc"] = accuracy
            path.write_text(json.dumps(summary))
    page = built(study)
    line = next(line for line in page.splitlines() if line.startswith("| with averaged weights (EMA) | 2 |"))
    assert line.endswith(f"| {verdict} |")
    summary_line = next(line for line in page.splitlines() if line.startswith("- Task 4 (90 training tiles): "))
    named = re.search(r"better than the reference: (.*)\. Worse: (.*)\. Not", summary_line)
    assert named
    assert ("with averaged weights" in named[1]) == (verdict == "better")
    assert ("with averaged weights" in named[2]) == (verdict == "worse")


def test_the_study_s_findings_stand_in_their_sections_with_the_same_facts(study: Path) -> None:
    (study / "findings.md.j2").write_text(
        "- {{ section }} has {{ seeds(tasks['Task 1'].records | length) }}: "
        "{{ shown(tasks['Task 1'].score('best', 'acc')) }}.\n"
        "{% if section == 'Limits' %}\n- A limit.\n{% endif %}\n"
    )
    page = built(study)
    values = [json.loads(path.read_text())["test/acc"] for path in study.glob("runs/first-*/summary.json")]
    for section, heading in (
        ("Summary", "Summary"),
        ("Task 1", "Task 1"),
        ("Task 3", "Task 3"),
        ("Task 4", "Task 4"),
    ):
        text = re.split("^## ", page[page.index(f"\n## {heading}") + 4 :], flags=re.MULTILINE)[0]
        assert f"### What we learnt\n\n- {section} has 2 seeds: {sum(values) / 2:.4f}.\n" in text
    assert "- A limit." in page[page.index("## What this study cannot say") :]
    (study / "findings.md.j2").unlink()
    assert "What we learnt" not in built(study)


@pytest.mark.parametrize("text", ["fine\n{{ unknown }}\n", "fine\n{% if %}\n", "fine\n{{ 1 + 'a' }}\n"])
def test_an_error_in_the_findings_is_one_line_that_names_the_place(
    text: str, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (study / "findings.md.j2").write_text(text)
    fails(study, 1, r"findings\.md\.j2, line 2: ", capsys, "--check")


def test_the_check_names_the_first_difference(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(study)
    make(study, "--check")
    page = re.sub(r"(?m)^(\| Task 1 .*)0\.(\d)", r"\g<1>0.9\2", (study / "report.md").read_text(), count=1)
    (study / "report.md").write_text(page)
    fails(study, 1, r"out of date: line \d+ says '\| Task 1 .*, the records give '\| Task 1 ", capsys, "--check")
    assert (study / "report.md").read_text() == page


def npz(change: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        with np.load(folder / "scores.npz") as file:
            arrays = dict(file)
        change(arrays)
        np.savez_compressed(folder / "scores.npz", **arrays)  # type: ignore[arg-type]

    return changed


def summary(*keys: str, value: Any) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        content = json.loads((folder / "summary.json").read_text())
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        (folder / "summary.json").write_text(json.dumps(content))

    return changed


def reverse(name: str) -> Callable[[Path], None]:
    return npz(lambda arrays: arrays.update({name: arrays[name][::-1]}))


def two_more_right(folder: Path) -> None:
    def change(arrays: dict[str, np.ndarray]) -> None:
        wrong = np.flatnonzero(arrays["shifted_gamma"] != arrays["validate_targets"])[:2]
        arrays["shifted_gamma"][wrong] = arrays["validate_targets"][wrong]

    npz(change)(folder)


def repaint(folder: Path) -> None:
    figure = folder.parents[1] / "fig/task1/first-1-confusion.png"
    figure.write_bytes((folder.parents[1] / "fig/task1/first-0-confusion.png").read_bytes())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (reverse("best_logits"), "summary.json: best, .*, scores.npz gives another value"),
        (reverse("tta_logits"), "summary.json: tta, .*, scores.npz gives another value"),
        (
            npz(lambda arrays: arrays.update(validate_logits=np.eye(9)[arrays["validate_targets"]])),
            "validate/acc is .*, scores.npz gives",
        ),
        (
            npz(lambda arrays: arrays.update(shifted_gamma=arrays["validate_targets"])),
            "shifted gamma is .*, scores.npz gives",
        ),
        (two_more_right, "shifted gamma is .*, scores.npz gives"),
        (npz(lambda arrays: arrays.pop("validate_logits")), "runs/first-1: a record lacks 'validate_logits'"),
        (npz(lambda arrays: arrays.pop("last_logits")), "does not hold the outputs of the last weights"),
        (lambda folder: (folder / "scores.npz").unlink(), "scores.npz: not a readable record"),
        (summary("best", "acc", "value", value=0.99), "best, acc value is 0.99, scores.npz gives another value"),
        (summary("tta", "auc", "low", value=0.1), "tta, auc low is 0.1, scores.npz gives another value"),
        (summary("test/acc", value=0.99), "test/acc and test/auc are not those of the best weights"),
        (summary("best", "epoch", value=7), "its best epoch is not that of history.csv"),
        (summary("validate", "validate/auc", value=0.99), "its best epoch is not that of history.csv"),
        (repaint, "first-1-confusion.png: not the figure that run first-1 has drawn"),
    ],
)
def test_the_check_refuses_records_that_contradict_one_another(
    change: Callable[[Path], None], message: str, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(study)
    change(study / "runs" / "first-1")
    fails(study, 1, message, capsys, "--check")


def test_the_check_computes_a_baseline_s_scores_again(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(study)
    reverse("best_logits")(study / "runs" / "mean_rgb-90-0")
    fails(study, 1, "mean_rgb-90-0/summary.json: best, .*, scores.npz gives another value", capsys, "--check")


def test_the_check_compares_the_ablations_table_with_its_runs(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = study / "sweeps/small/table.csv"
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    lines[1]["test/auc mean"] = "0.99"
    write_csv(path, lines)
    fails(study, 1, "table.csv: test/auc of with_ema is not its runs'", capsys, "--check")


def test_runs_of_a_row_differ_in_the_seed_alone(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = study / "runs" / "first-1" / "config.json"
    content = json.loads(path.read_text())
    content["config"]["lr"] = 0.9
    path.write_text(json.dumps(content))
    fails(study, 2, "the runs first-0, first-1 differ in lr, not in the seed alone", capsys)


def test_a_run_of_another_task_and_data_of_another_kind_are_refused(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (study / "report.toml").write_text('[task3]\nruns = ["first-0"]\n')
    fails(study, 2, r"run first-0 in \[task3\] is a run of task1", capsys)
    (study / "report.toml").write_text('[task1]\nruns = ["first-0"]\n[task3]\nruns = ["small-combined-0"]\n')
    summary("synthetic", value=False)(study / "runs" / "small-combined-0")
    fails(study, 2, "generated tiles and tiles of PathMNIST cannot stand on one page", capsys)


def test_the_same_records_give_the_same_page(study: Path) -> None:
    make(study)
    page = (study / "report.md").read_bytes()
    make(study)
    assert (study / "report.md").read_bytes() == page


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (None, "report.toml: no such file"),
        ("[task1", "report.toml: "),
        ("[task9]\n", "unknown section task9; known are task1"),
        ("", r"needs at least one of \[task1\]"),
        ("[task1]\n", r"\[task1\] needs runs = \[\"RUN_ID\""),
        ('[task1]\nruns = ["gone"]\n', "names run gone, which is not finished"),
        ('[task1]\nruns = ["first-0", "first-0"]\n', "of the runs first-0, first-0, two have the same seed"),
        ('[task1]\nruns = ["first-0"]\n[task2]\nrun = "first-0"\n', "which is not explained yet"),
        (
            '[task3]\nruns = ["small-combined-0"]\n[task4]\nablation = "gone"\n',
            "runs.csv: missing; python -m study.sweep",
        ),
        ('[task3]\nruns = ["small-combined-0"]\n[task4]\nablation = "g"\n', "report.toml: g is no ablation"),
        (
            '[task3]\nruns = ["small-combined-0"]\n[task4]\nablation = "small"\nsearch = "small"\n',
            "report.toml: small is no search",
        ),
        (
            '[task1]\nruns = ["first-0"]\n[networks]\nruns = ["mean_rgb-90-0"]\n',
            r"mean_rgb-90-0 is a baseline: move it to \[baselines\]",
        ),
        (
            '[task1]\nruns = ["first-0"]\n[learning_curve]\nsweeps = "g"\n',
            r"\[learning_curve\] needs sweeps = ",
        ),
        (
            '[task1]\nruns = ["first-0"]\n[task5]\ncomparison = "gone"\n',
            "comparison.json: missing; python task5.py",
        ),
    ],
)
def test_a_selection_that_cannot_be_shown_is_refused_in_one_line(
    selection: str | None, message: str, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("runs", "table"):
        write_csv(study / "sweeps/g" / f"{name}.csv", [{"run_id": "small-combined-0", "row": "0.1", "lr": 0.1}])
    (study / "report.toml").unlink()
    if selection is not None:
        (study / "report.toml").write_text(selection)
    fails(study, 2, message, capsys)
    assert not (study / "report.md").exists()


def test_a_missing_figure_and_a_missing_page_are_faults(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (study / "fig" / "report" / "calibration.png").unlink()
    fails(
        study, 1, "fig/report/calibration.png: the report shows this figure, and it is missing", capsys, "--check"
    )
    make(study)
    next((study / "fig" / "task3").glob("small-combined-0-*")).unlink()
    fails(study, 1, "fig/task3/small-combined-0-.*: the report shows this figure", capsys, "--check")


def test_runs_of_different_data_are_not_mixed(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = study / "runs" / "first-1" / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "data_fingerprint": "another"}))
    fails(study, 2, r"the runs of \[task1\] come from different data sets", capsys)


def test_the_repository_s_own_report_is_what_its_records_give(capsys: pytest.CaptureFixture[str]) -> None:
    make(ROOT, "--check")
    assert "report.md is what the records give" in capsys.readouterr().out
    page = (ROOT / "report.md").read_text()
    assert len(page.splitlines()) <= 400
    assert "| coursework, one seed: ResNet-18 from scratch | 64 px |" in page


def test_the_repository_holds_the_figures_that_its_pages_show_and_stays_small() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "runs", "sweeps", "fig"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    if not listed:
        pytest.skip("not a git checkout")
    pages = [ROOT / "report.md", *(ROOT / path for path in listed if path.endswith("/saliency.md"))]
    shown = {path for page in pages for path in re.findall(r"\]\((?:../../)?(fig/[^)]+)\)", page.read_text())}
    assert {path for path in listed if path.startswith("fig/")} == shown
    assert sum((ROOT / path).stat().st_size for path in listed) < 96e6
    assert not [path for path in listed if path.endswith((".pt", ".npy"))]


def test_an_installed_package_has_the_templates(tmp_path: Path) -> None:
    for path in ("pyproject.toml", "README.md", "LICENSE", "common", "study"):
        copy = shutil.copytree if (ROOT / path).is_dir() else shutil.copy
        copy(ROOT / path, tmp_path / path)
    setup = [sys.executable, "-c", "import setuptools; setuptools.setup(py_modules=[])"]
    subprocess.run([*setup, "build_py", "--build-lib=built"], cwd=tmp_path, check=True, capture_output=True)
    templates = {path.name for path in (ROOT / "study").glob("*.j2")}
    assert {path.name for path in (tmp_path / "built" / "study").glob("*.j2")} == templates
    assert "report.md.j2" in templates


def test_networks_are_averaged_seed_by_seed() -> None:
    def group(**by_seed: list[float]) -> Any:
        """Groups whose runs give each of two tiles this probability of class 0; the tiles have classes 0 and 1."""
        runs = [np.array([[one, 1 - one] for one in tiles]) for tiles in by_seed.values()]
        records = [
            SimpleNamespace(config={"seed": seed}, arrays=lambda: {"targets": np.array([0, 1])})
            for seed in by_seed
        ]
        return SimpleNamespace(records=records, first=records[0], probabilities=lambda scores: runs)

    one, other = group(a=[0.4, 0.9], b=[0.9, 0.4], c=[0.0, 1.0]), group(b=[0.3, 0.0], a=[0.7, 0.0])
    found = groups.averaged([one, other])  # seed a: 0.55 and 0.45; seed b: 0.6 and 0.2; all right
    assert (found.n, found.mean) == (2, 1.0)


def test_the_tiles_that_all_runs_of_a_group_get_wrong_and_who_gets_them_right() -> None:
    targets = np.array([0, 1, 2, 3])

    class Run:
        def __init__(self, *predicted: int) -> None:
            self.predicted = np.array(predicted)

        def arrays(self) -> dict[str, np.ndarray]:
            return {"best_logits": np.eye(9)[self.predicted], "targets": targets}

    def group(title: str, *records: Run) -> Any:
        return SimpleNamespace(title=title, records=records)

    ours = group("ours", Run(0, 0, 0, 3), Run(1, 0, 0, 0))  # both are wrong on tiles 1 and 2
    other = group("other", Run(0, 1, 0, 0), Run(5, 1, 2, 5))
    assert rescued(ours, [other, group("none", Run(0, 0, 0, 0))]) == (2, {"other": 0.75, "none": 0.0})
    assert rescued(group("right", Run(0, 1, 2, 3)), [other]) == (0, {})

"""The page: its blocks, numbers and figures are those of the records."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from example_records import CONFIG, TILES, facts, row, summary, write_run
from matplotlib.figure import Figure

from common.cli import Fault, run_script
from common.data.shift import SHIFTS
from common.files import write_json
from common.records.read import Record
from common.statistics import spread
from common.training.evaluation import scores_of
from study import figures, report
from study.facts import cost
from study.groups import Group, Runs, convergence_epoch
from study.report import fill, own_page
from study.tables import Tables

PAGE = """# A study

Task 1 has <!-- = task1 acc -->?<!-- -->, at most <!-- = most task1 acc -->?<!-- -->.

![The ladder](fig/report/ladder.png) ![a picture by its address](https://example.org/a.png)

<!-- results task1 task1_64 published_task1: begin -->
<!-- results task1 task1_64 published_task1: end -->

<!-- maps tuned-0: begin -->
<!-- maps tuned-0: end -->
"""
SOURCES = "<!-- records ../: begin -->\n<!-- records ../: end -->\n"
SHOWN = ("task1-0", "task1-1", "task1-2", "tuned-0", "neighbours-89996-0")


def make(folder: Path, *more: str) -> None:
    run_script(report.main, report.ReportConfig, [f"--output_dir={folder}", *more])


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The one line with which the report ends; its exit status must be 1."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        make(folder, *more)
    [line] = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 1
    return line


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    for run_id in SHOWN:
        shutil.copytree(ROOT / "runs" / run_id, folder / "runs" / run_id)
    (folder / "report.md").write_text(PAGE)
    (folder / "docs").mkdir()
    (folder / "docs" / "sources.md").write_text(SOURCES)
    make(folder)
    return folder


@pytest.fixture
def study(finished: Path, tmp_path: Path) -> Path:
    folder: Path = shutil.copytree(finished, tmp_path / "study")
    return folder


@pytest.fixture(scope="module")
def tables() -> Tables:
    """Those of the repository's records."""
    runs = Runs(ROOT)
    return Tables(runs, runs.groups(), runs.ablation(), runs.curves())


def test_a_page_is_filled_from_the_records(study: Path) -> None:
    page = (study / "report.md").read_text()
    accuracies = [
        json.loads((ROOT / f"runs/task1-{seed}/summary.json").read_text())["test/acc"] for seed in (0, 1, 2)
    ]
    over = spread(accuracies)
    assert f"Task 1 has <!-- = task1 acc -->{over.mean:.3f}<!-- -->, at most" in page
    assert f"| 28 px | 89,996 | 3 | {over.mean:.3f} [{over.low:.3f}, {over.high:.3f}] |" in page
    assert "| coursework, one seed: ResNet-18 from scratch | 64 px | 89,996 |  | 0.895 |" in page
    assert "\n| Saliency | no | 0.09 [0.06, 0.12] | -0.05 [-0.06, -0.03] |" in page
    assert "| Random order |  |  |  |  | 0.10 [0.05, 0.14] |" in page
    assert "\n\n15 tests, not corrected for their number: " in page
    assert "Tiles: 32 for random weights, 256 for removed pixels, 64 for infidelity." in page
    assert "More of run tuned-0: [the tiles in words](runs/tuned-0/saliency.md)." in page
    assert "task1_64-" not in page  # has no runs
    assert (study / "docs/sources.md").read_text().count("[task1-0](../runs/task1-0/) and 2 more") == 1
    assert "data:image/png;base64," in (study / "report.html").read_text()
    make(study)
    assert (study / "report.md").read_text() == page


def test_a_changed_file_of_a_record_is_noticed(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(study, "--check")
    for name in ("config.json", "summary.json", "history.csv", "scores.npz", "attribution.json", "saliency.md"):
        path = study / "runs/tuned-0" / name
        whole = path.read_bytes()
        path.write_bytes(whole + b"\n")  # it can still be read
        assert "sources.md is out of date: line " in refused(study, capsys, "--check"), name
        path.write_bytes(whole)


def test_an_edited_figure_and_a_torn_record_are_one_line_each(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ladder, summary = study / "fig/report/ladder.png", study / "runs/task1-0/summary.json"
    content = ladder.read_bytes()
    ladder.write_bytes(content + b"x")
    assert "report.md is out of date: " in refused(study, capsys, "--check")
    ladder.write_bytes(content)
    whole = summary.read_text()
    summary.write_text(whole.replace('"test/acc": 0.', '"test/acc": 0.1'))
    assert "summary.json: not a readable record (test/acc: it is 0.18" in refused(study, capsys)
    summary.write_text("{")
    assert "summary.json: not a readable record" in refused(study, capsys, "--check")
    summary.write_text(whole)
    config = study / "runs/task1-1/config.json"
    config.write_text(config.read_text().replace('"seed": 1,', '"seed": 7,'))
    assert "task1-1: its seed is 7, its name says 1" in refused(study, capsys)


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- = task1 speed -->1<!-- -->\n", "asks for 'task1 speed'"),
        ("<!-- = task9 acc -->1<!-- -->\n", "asks for 'task9 acc'"),
        ("<!-- = task1 acc -->1\n", "not closed"),
        ("<!-- = task1 acc intervall -->1<!-- -->\n", "asks for 'task1 acc intervall'"),
        ("<!-- results tsak1 task1: begin -->\n<!-- results tsak1 task1: end -->\n", "asks for the row 'tsak1'"),
        ("<!-- nothing: begin -->\n<!-- nothing: end -->\n", "there is no table nothing"),
        ("<!-- results task1: begin -->\n<!-- results: end -->\n", "ends as 'results'"),
        ("![x](fig/none.png)\n", "none.png: No such file"),
    ],
)
def test_a_mistake_in_a_page_is_named(
    page: str, message: str, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(study / "report.md", "a") as file:
        file.write(page)
    assert message in refused(study, capsys)


def test_a_page_about_own_runs_has_no_words_of_a_study(tmp_path: Path) -> None:
    for run_id in ("task1-0", "combined-0", "tuned-0", "ablation-combined-0", "ablation-with_ema-0"):
        shutil.copytree(ROOT / "runs" / run_id, tmp_path / "runs" / run_id)
    table = tmp_path / "sweeps/try/table.md"
    table.parent.mkdir(parents=True)
    table.write_text("| rank |\n| --- |\n| 1 |\n")
    make(tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "| ResNet-18 from scratch | 28 px | 89,996 | 1 | 0.810 [0.800, 0.819] |" in page
    assert "test ACC [95 %, over tiles]" in page
    assert "## Ablation\n\n| row | seeds |" in page
    assert "## Sweep try\n\n| rank |" in page
    for word in ("coursework", "over seeds", "Yang", "begin -->"):
        assert word not in page
    for link in re.findall(r"\]\(([^)]+)\)", page):
        assert (tmp_path / link).exists(), link
    make(tmp_path, "--check")
    shutil.copytree(ROOT / "runs/task1-1", tmp_path / "runs/task1-1")
    make(tmp_path)
    assert "| ResNet-18 from scratch | 28 px | 89,996 | 2 | 0.810 |" in (tmp_path / "report.md").read_text()


def test_a_page_with_own_words_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(ROOT / "runs/task1-0", tmp_path / "runs/task1-0")
    with pytest.raises(SystemExit):
        make(tmp_path, "--check")
    assert "report.md: there is no page yet; without --check" in capsys.readouterr().err
    (tmp_path / "report.md").write_text("# My homework\n")
    with pytest.raises(SystemExit) as ended:
        make(tmp_path)
    assert ended.value.code == 2
    assert "report.md: not a page of this command" in capsys.readouterr().err
    assert (tmp_path / "report.md").read_text() == "# My homework\n"


def test_text_of_a_record_cannot_become_html_or_a_column(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "runs/task1-0", tmp_path / "runs/task1-0")
    for name in ("config.json", "summary.json"):
        path = tmp_path / "runs/task1-0" / name
        path.write_text(path.read_text().replace('"device": "', '"device": "<script>alert(1)</script> | [x](y) '))
    make(tmp_path)
    page, html = ((tmp_path / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert r"&lt;script&gt;alert(1)&lt;/script&gt; \| \[x](y)" in page
    assert "<script>alert" not in html


def test_the_repository_s_page_is_short_and_what_the_records_give(capsys: pytest.CaptureFixture[str]) -> None:
    make(ROOT, "--check")
    page = (ROOT / "report.md").read_text()
    prose = re.sub(r"<!--.*?-->|^\|.*$|!\[.*?\)", "", page, flags=re.MULTILINE)
    assert len(prose.split()) <= 3500
    assert len(page.splitlines()) <= 300


def test_runs_of_a_group_differ_in_their_seed_alone(tmp_path: Path) -> None:
    runs = [{**CONFIG, "run_id": f"r-{seed}", "seed": seed, "lr": lr} for seed, lr in ((0, 1), (1, 1), (1, 2))]
    for number, config in enumerate(runs):
        write_run(tmp_path / str(number), config)
    first, second, third = (Record.read(tmp_path / str(number), run["run_id"]) for number, run in enumerate(runs))
    assert Group("", [first, second]).seeds == [0, 1]
    second.summary["config"]["mixup"] = 0.0  # off; the older run does not have this key
    assert Group("", [first, second]).seeds == [0, 1]
    with pytest.raises(Fault, match="have the same seed"):
        Group("", [second, second])
    with pytest.raises(Fault, match="differ in lr, not in the seed alone: move one out"):
        Group("", [first, third])
    fewer = {**second.summary, "tiles": {**TILES, "train": 89}}
    with pytest.raises(Fault, match="differ in training tiles"):
        Group("", [first, dataclasses.replace(second, summary=fewer)])
    for other, name in ({"weights": {"sha256": "a"}}, "file of weights"), ({"data_fingerprint": "g"}, "data set"):
        with pytest.raises(Fault, match=f"differ in {name}"):
            Group("", [first, dataclasses.replace(second, summary={**second.summary, **other})])


def group_of(**accuracies: float) -> Group:
    """Made-up runs, seed7=0.5 for example. Of seed 7, the first class is taken for the others in other ways."""
    records = []
    for name, acc in accuracies.items():
        seed, first_row = int(name.removeprefix("seed")), [2, 0, 8] if name == "seed7" else [8, 2, 0]
        origin = facts({**CONFIG, "seed": seed})
        content = {**origin, **summary(origin, [row(1)], acc=acc)}
        scores = {
            "confusion_matrix": [first_row, [0, 10, 0], [0, 0, 10]],
            "auc_per_class": dict.fromkeys("abc", 0.5),
        }
        content = {**content, "best": {**content["best"], **scores}}
        records.append(Record(Path(), content, [row(1)]))
    return Group("", records)


def test_the_scores_of_a_group_are_by_the_number_of_the_seed() -> None:
    group, other = group_of(seed7=0.5, seed2=0.6, seed4=0.9), group_of(seed4=0.7, seed7=0.2)
    assert group.by_seed("acc") == {7: 0.5, 2: 0.6, 4: 0.9}
    assert group.minus(other, "acc").mean == pytest.approx((0.3 + 0.2) / 2)  # type: ignore[union-attr]
    assert group.recalls() == pytest.approx({"a": (0.2 + 0.8 + 0.8) / 3, "b": 1, "c": 1})  # no median
    assert group.mistaken("a") == ("c", 8 / 30)  # 4 are taken for b
    views = {**group.first.summary, "tta": group.first.summary["best"]}
    some = Group("", [dataclasses.replace(group.first, summary=views), *group.records[1:]])
    assert (some.by_seed("views"), some.spread("views")) == ({7: 0.5}, None)


def made(folder: Path, run_id: str, acc: float = 0.5, tiles: int = 90, **keys: Any) -> Record:
    """A made-up run."""
    path = write_run(folder, {**CONFIG, "run_id": run_id, **keys})
    for file in path.glob("*.json"):
        content = file.read_text().replace('"train": 90', f'"train": {tiles}')
        file.write_text(content.replace("0.5", str(acc)) if file.name == "summary.json" else content)
    return Record.read(folder, run_id)


def test_runs_are_in_the_order_of_their_seeds_and_own_recipes_of_their_scores(tmp_path: Path) -> None:
    for seed in (10, 2):
        made(tmp_path / "study", f"task1-{seed}", seed=seed)
    assert Runs(tmp_path / "study").groups()["task1"].seeds == [2, 10]
    path = made(tmp_path, "a", 0.6).folder / "config.json"
    path.write_text(path.read_text().replace("2026-01-01", "2026-01-02"))
    made(tmp_path, "b", 0.5)  # the same, but older
    made(tmp_path, "c", 0.7, weights="imagenet", augmentation="stain", ema_decay=0.99)
    made(tmp_path, "d", 0.4, size=64)
    made(tmp_path, "e", 0.2, weights="imagenet", train_part="head")
    (made(tmp_path, "untested").folder / "summary.json").write_text('{"run_id": "untested", "wall_seconds": 1}')
    made(tmp_path, "ablation_test-0", 0.3, size=64, ablation="with_ema")  # no run of the study
    recipes = Runs(tmp_path).recipes()
    assert [(name, group.by_seed("acc")) for name, group in recipes.items()] == [
        ("c", {0: 0.7}),
        ("a", {0: 0.6}),
        ("d", {0: 0.4}),
        ("ablation_test-0", {0: 0.3}),
        ("e", {0: 0.2}),
    ]
    titles = ["ResNet-18 fine-tuned, stain augmentation and averaged weights, phantom"]
    titles += [f"ResNet-18 from scratch, phantom, run {run_id}" for run_id in "ad"]
    titles += [
        "ResNet-18 from scratch, row with_ema, phantom",
        "ResNet-18 pretrained, only its head trained, phantom",
    ]
    assert [group.title for group in recipes.values()] == titles


def test_a_page_of_own_runs_has_the_table_of_the_ablation(tmp_path: Path) -> None:
    made(tmp_path, "ablation-mine", lr=0.2)  # of task1.py
    made(tmp_path, "ablation_64-mine")
    made(tmp_path, "ablation_64-with_ema-0", 0.6, ablation="with_ema")
    made(tmp_path, "ablation_64-0.1-combined-0", ablation="combined", lr=0.1)  # of a grid with another key
    assert Runs(tmp_path).ablation() == {}  # without the reference
    others = ["ablation-mine", "ablation_64-mine", "ablation_64-0.1-combined-0"]
    assert set(Runs(tmp_path).recipes()) == {"ablation_64-with_ema-0", *others}
    made(tmp_path, "ablation_64-combined-0", 0.5, ablation="combined")
    runs = Runs(tmp_path)
    tables = Tables(runs, runs.recipes(), runs.ablation())
    assert set(tables.rows) == set(others)
    names = ("validate_classes", "validate_targets", *(f"shifted_{name}" for name in SHIFTS))
    folder, arrays = made(tmp_path, "recipe-resnet18-0").folder, dict.fromkeys(names, np.zeros(10))
    np.savez(folder / "scores.npz", **arrays)
    write_json(folder / "summary.json", {"wall_seconds": 1, **scores_of(arrays)})
    page = fill(own_page(tables), tables)
    assert "## Trials" in page
    assert "| resnet18 | " in page
    assert re.search(r"\| with averaged weights \(EMA\), phantom \| 1 \| .* \| 0.600 \| .* \| \+0.100 \|", page)


def test_a_table_over_two_data_sets_has_the_test_tiles_of_both(tables: Tables, tmp_path: Path) -> None:
    both = {"real": tables.rows["task1"], "made": Group("phantom", [made(tmp_path, "a")])}
    assert Tables(tables.runs, both).classes("real", "made")[2].startswith("| adipose | 2 / 1,338 | ")
    assert tables.classes("task1")[2].startswith("| adipose | 1,338 | ")


def test_curves_have_a_group_per_number_of_tiles_and_the_old_ablation_comes_first(tmp_path: Path) -> None:
    for run_id, tiles in {"a": 90, "b": 90, "c": 45}.items():
        made(tmp_path / "mine", f"task1_64-{run_id}", tiles=tiles)
    assert Runs(tmp_path / "mine").curves() == {}
    made(tmp_path, "learning_curve_task1_64-9000-0", tiles=9000)
    made(tmp_path, "task1_64-0", tiles=900)
    runs = Runs(tmp_path)
    lines = Tables(runs, runs.recipes(), curves={"short": [runs.recipes()["task1_64-0"]]}).records()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| ResNet-18 from scratch, phantom, 28 px"]
    for path in made(tmp_path, "task1_64-1", tiles=3000).folder.glob("*.json"):
        path.write_text(path.read_text().replace('"synthetic": true', '"synthetic": false'))
    curves = {title: [group.tiles for group in groups] for title, groups in Runs(tmp_path).curves().items()}
    assert curves == {"Task 1: ResNet-18, phantom, 28 px": [900, 9000]}  # without the real tiles
    page = own_page(Tables(runs, {}, curves=runs.curves()))
    assert "\n## Records\n" in page
    assert "## Fewer training tiles\n\n![Test ACC and validation ACC](fig/report/learning_curve.png)" in page
    for name in ("ablation_64", "ablation"):
        made(tmp_path, f"{name}-combined-0", ablation="combined")
        assert Runs(tmp_path).ablation()["combined"].first.run_id == f"{name}-combined-0"


def test_a_run_has_converged_within_half_a_point_of_its_best_epoch() -> None:
    assert convergence_epoch([row(1, 0.0295), row(2, 0.03), row(3, 0.035)]) == 2  # .035 - .03 in floats, too


def test_a_row_names_the_side_of_its_tiles_and_that_of_its_inputs(tables: Tables) -> None:
    assert tables.rows["task1"].name == "Task 1: ResNet-18, 28 px"
    assert tables.rows["combined_64"].sides == "28 → 64 px"


def test_the_maps_say_how_often_smoothgrads_noise_keeps_the_class(tables: Tables) -> None:
    kept = "With SmoothGrad's noise, 10% of the copies of a tile keep its class."
    assert any(line.endswith(kept) for line in tables.maps("task1_64-4"))


def test_numbers_of_the_prose(tables: Tables) -> None:
    tuned, scratch = tables.rows["tuned"], tables.rows["tuned_scratch"]
    differences = [tuned.by_seed("acc")[seed] - scratch.by_seed("acc")[seed] for seed in range(3)]
    over = spread(differences)
    expected = f"{over.mean:+.3f} [{over.low:+.3f}, {over.high:+.3f}]"
    assert tables.number("tuned - tuned_scratch acc interval") == expected
    assert [tables.number(f"{which} combined acc") for which in ("least", "most")] == ["0.627", "0.726"]
    assert tables.number("combined seeds") == "5"
    assert tables.number("task1 recall debris") == "0.79"
    assert tables.number("task1 taken cancer-associated stroma") == "debris (33%)"
    assert tables.number("published task3") == "0.913"


def test_the_ablation_compares_a_row_with_the_one_that_it_changes(tables: Tables) -> None:
    lines = tables.techniques()
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[6:] for line in lines}
    scores = [tables.ablation[name].by_seed("acc") for name in ("with_stain_only", "with_all")]
    over = spread([scores[1][seed] - scores[0][seed] for seed in range(5)])
    change = f"{over.mean:+.3f} [{over.low:+.3f}, {over.high:+.3f}]"
    difference, p, verdict = rows["with stain augmentation and averaged weights"]
    assert difference == f"{change} against 'with stain augmentation, without that of Task 3'"
    assert (p, verdict) == ("1.000", "not decided |")
    assert rows["without data augmentation"] == ["+0.081 [+0.052, +0.110]", "0.016", "better |"]
    assert rows["all techniques of Task 3"] == ["", "", " |"]
    assert any("of average spread needs a true difference of 0.162 in test ACC. " in line for line in lines)


def test_the_ladder_is_sorted_and_has_room_for_every_interval(tmp_path: Path, drawn: list[Figure]) -> None:
    low, high = group_of(seed0=0.5, seed1=0.6, seed2=0.7), group_of(seed0=0.85)
    rows = {"high": Group("high", high.records), "low": Group("low", low.records)}
    figures.draw_ladder(tmp_path / "ladder.png", rows)
    [axes] = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["low, 28 px", "high, 28 px"]
    line, dot, _, other = axes.get_lines()
    half = 4.302653 * 0.1 / 3**0.5  # t(.975, 2) · sd / √n
    assert list(line.get_xdata()) == pytest.approx([0.6 - half, 0.6 + half])
    assert (list(dot.get_xdata()), list(other.get_xdata())) == ([pytest.approx(0.6)], [0.85])
    assert axes.get_xlim()[0] < 0.6 - half < 0.85 < axes.get_xlim()[1]
    assert [text.get_text() for text in axes.texts] == ["34 M", "34 M"]
    assert axes.get_xlabel() == "Test ACC, phantom (90 training tiles, 28 px)"


def test_the_studys_own_ladder_has_the_aim_and_the_8_views_of_its_best_row(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    group = group_of(seed0=0.85)
    group.first.summary["tta"] = {"acc": 0.875}
    rows = {"two": Group("two", group_of(seed0=0.5).records), "one": Group("one", group.records)}
    figures.draw_ladder(tmp_path / "ladder.png", rows, aim=0.9)
    squares = [line.get_xdata()[0] for line in drawn[0].axes[0].get_lines() if line.get_marker() == "s"]
    assert squares == [0.889, 0.8951, 0.907, 0.911, 0.9123, 0.9132, 0.938]
    texts = [text.get_text() for text in drawn[0].axes[0].texts]
    assert texts == ["34 M", "34 M", "274 M", "the aim: 0.9"]
    names = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    assert names[-2:] == ["one, 28 px, one seed", "one, 28 px, mean of 8 views"]


def test_the_curves_show_every_seed_the_kept_epochs_and_the_mean(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = []
    for seed, accuracies in enumerate(((0.2, 0.6, 0.4), (0.4, 0.8))):
        record = made(tmp_path, f"r-{seed}", seed=seed)
        history = [row(epoch, acc) for epoch, acc in enumerate(accuracies, start=1)]
        runs.append(
            dataclasses.replace(record, history=history, summary={**record.summary, "validate": history[1]})
        )
    figures.draw_curves(tmp_path / "curves.png", {"name": runs}, "data")
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in drawn[0].axes[3].get_lines()]
    assert lines[:4] == [([1, 2, 3], [0.2, 0.6, 0.4]), ([2], [0.6]), ([1, 2], [0.4, 0.8]), ([2], [0.8])]
    assert lines[4:] == [([1, 2], pytest.approx([0.3, 0.7]))]
    assert drawn[0].legends[0].get_texts()[0].get_text() == "name, 2 seeds"


def test_a_learning_curve_has_test_and_validation_acc_by_tiles(tmp_path: Path, drawn: list[Figure]) -> None:
    few = [made(tmp_path, f"r-900-{seed}", acc, 900, seed=seed) for seed, acc in enumerate((0.58, 0.6, 0.62))]
    groups = [Group("", few), Group("", [made(tmp_path, "r-3000", 0.7, 3000)])]
    for record in (*few, groups[1].first):
        record.summary["validate"]["validate/acc"] = 0.9
    figures.draw_learning_curve(tmp_path / "curve.png", {"ResNet": groups})
    found = {axes.get_ylabel(): axes for axes in drawn[0].axes}
    for name, expected in {"Test ACC": [0.6, 0.7], "Validation ACC": [0.9, 0.9]}.items():
        line = found[name].get_lines()[0]
        assert (list(line.get_xdata()), list(line.get_ydata())) == ([900, 3000], expected)
        assert found[name].get_xlabel() == "Training tiles of phantom (logarithmic)"
    assert drawn[0].legends[0].get_texts()[0].get_text() == "ResNet"
    [bars] = found["Test ACC"].containers[0].lines[2]
    half = 4.302653 * 0.02 / 3**0.5  # t(.975, 2) · sd / √n
    assert bars.get_segments()[0][:, 1] == pytest.approx([0.6 - half, 0.6 + half])


def test_a_network_has_one_colour_in_all_figures() -> None:
    configs = [
        {"model_name": "resnet18", "weights": "none"},
        {"model_name": "mobilenet_v3_large"},
        {"model_name": "resnet18", "weights": "imagenet"},
        {"model_name": "resnet50"},
        {"baseline": "colour"},
    ]
    colours = [figures.colour_of(Record(Path(), {"config": config}, [])) for config in configs]
    assert colours == ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777"]


def test_the_augmentations_are_drawn_beside_the_original_tile(tmp_path: Path, drawn: list[Figure]) -> None:
    tile = torch.randint(256, (3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    figures.draw_augmentations(tmp_path / "augmentations.png", tile)
    images = {axes.get_title() or axes.get_ylabel(): axes.get_images() for axes in drawn[0].axes}
    changes = {"other staining", "other brightness", "colour noise"}
    assert images.keys() == {"original", "TrivialAugment", "stain", *changes, ""}
    assert np.array_equal(images["original"][0].get_array(), tile.permute(1, 2, 0))
    assert sum(bool(axes.get_images()) for axes in drawn[0].axes) == 1 + 5 * 6


def test_a_network_s_cost_is_counted_at_the_side_of_its_inputs() -> None:
    parameters, at_28 = cost("resnet18", 28)
    assert parameters == 11_181_129
    assert cost("resnet18", 224)[1] == pytest.approx(1.81e9, rel=0.01)  # He et al. 2016: 1.8 × 10⁹
    assert at_28 == pytest.approx(34.2e6, rel=0.01)
    assert cost("regnet_y_400mf", 224)[1] == pytest.approx(0.4e9, rel=0.01)  # Radosavovic et al. 2020

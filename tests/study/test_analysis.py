"""Where the gap is: matched colours, the published predictions, the hard tiles, and the record of all three."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from skimage.color import rgb2lab

import task1
import task5
from common.config import run_script
from common.data.dataset import load_dataset
from common.records.read import Record
from common.training.device import Compute
from study import analysis, report
from study.analysis import (
    AnalysisConfig,
    like,
    match_channels,
    match_lab,
    matched_scores,
    most_frequent,
    only_right,
)
from study.report_facts import mcnemar

DRAWS = np.random.default_rng(0)
DARK = DRAWS.integers(60, 120, (40, 8, 8, 3)).astype(np.uint8)
LIGHT = np.minimum(DRAWS.integers(100, 220, (60, 8, 8, 3)) + np.array([20, 0, 10]), 255).astype(np.uint8)


def test_matched_tiles_have_the_colours_of_the_reference() -> None:
    lab = rgb2lab(match_lab(DARK, LIGHT))
    np.testing.assert_allclose(lab.mean((0, 1, 2)), rgb2lab(LIGHT).mean((0, 1, 2)), atol=1)
    np.testing.assert_allclose(lab.std((0, 1, 2)), rgb2lab(LIGHT).std((0, 1, 2)), rtol=0.05)
    matched = match_channels(DARK, LIGHT)
    quantiles = (0.1, 0.5, 0.9)
    expected = np.quantile(LIGHT, quantiles, axis=(0, 1, 2))
    np.testing.assert_allclose(np.quantile(matched, quantiles, axis=(0, 1, 2)), expected, atol=3)


@pytest.mark.parametrize("match", analysis.MATCHINGS.values(), ids=analysis.MATCHINGS)
def test_tiles_that_match_already_do_not_change(match: Any) -> None:
    assert np.abs(match(LIGHT, LIGHT).astype(int) - LIGHT).max() <= 1


def test_the_reference_has_as_many_tiles_of_each_class_as_the_test_split() -> None:
    labels, wanted = np.arange(300) % 3, np.repeat([0, 1, 2], [5, 120, 30])
    chosen = like(labels, wanted, 0)
    np.testing.assert_array_equal(np.bincount(labels[chosen]), [5, 120, 30])
    assert len(np.unique(chosen[labels[chosen] != 1])) == 35  # no tile twice where there are enough
    assert not np.array_equal(chosen, like(labels, wanted, 1))


def test_mcnemar_s_test_needs_the_tiles_that_only_one_network_gets_right() -> None:
    labels = np.array([0, 1, 2, 0, 1, 2])
    ours, theirs = np.array([0, 1, 2, 1, 0, 2]), np.array([0, 0, 0, 0, 2, 2])
    assert only_right(ours, theirs, labels) == {"ours": 2, "theirs": 1}
    assert mcnemar(10, 2) == pytest.approx(2 * sum((1, 12, 66)) / 2**12)
    assert mcnemar(5, 5) == mcnemar(0, 0) == 1


def test_the_most_frequent_class_is_that_of_most_networks() -> None:
    np.testing.assert_array_equal(most_frequent(np.array([[0, 5, 8], [7, 5, 8], [7, 5, 3]])), [7, 5, 8])


@pytest.fixture(scope="module")
def finished(phantom_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of one run of Task 1, beside a fine-tuned run, with their checkpoints."""
    folder = tmp_path_factory.mktemp("study")
    keys = [
        f"--data_root={phantom_root}",
        f"--output_dir={folder}",
        "--dataset=phantom",
        "--size=28",
        "--input_size=28",
    ]
    keys += ["--train_tiles=90", "--n_epochs=1", "--batch_size=45"]
    run_script(task1.main, task1.Task1Config, [*keys, "--run_id=first"])
    tuned = ["--run_id=tuned", "--weights=first", "--model_name=resnet18", "--scratch=False", "--input_size=32"]
    run_script(task5.main, task5.Task5Config, [*keys, *tuned])
    (folder / "report.toml").write_text('[task1]\nruns = ["first"]\n')
    return folder


@pytest.fixture
def study(finished: Path, tmp_path: Path) -> Path:
    folder: Path = shutil.copytree(finished, tmp_path / "study")
    return folder


def analyse(folder: Path, root: Path, *more: str) -> dict[str, Any]:
    run_script(analysis.main, AnalysisConfig, [f"--output_dir={folder}", f"--data_root={root}", *more])
    content: dict[str, Any] = json.loads((folder / "analysis.json").read_text())
    return content


def test_the_networks_are_those_of_the_runs(
    finished: Path, phantom_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analysis, "MATCHINGS", {"unchanged": lambda tiles, reference: tiles})
    dataset = load_dataset("phantom", 28, phantom_root, 90)
    records = [Record.read(finished, run_id) for run_id in ("first", "tuned")]
    config = AnalysisConfig(output_dir=finished)
    scores = matched_scores(records, dataset, config, Compute.of("cpu", "fp32"))["unchanged"]
    for record in records:
        before = record.summary["best"]
        for name in ("acc", "balanced_acc"):
            assert scores[record.run_id][name] == pytest.approx(before[name]["value"], abs=0.001)


def published(folder: Path, classes: np.ndarray) -> Path:
    path = folder / "published.csv"
    np.savetxt(path, np.column_stack([np.arange(len(classes)), np.eye(9)[classes] * 0.9 + 0.01]), delimiter=",")
    return path


def test_the_page_shows_the_analysis_and_the_check_compares_it_with_the_runs(
    study: Path, phantom_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = Record.read(study, "first").arrays()
    targets, ours = arrays["targets"], arrays["best_logits"].argmax(1)
    theirs = targets.copy()
    theirs[::3] = (theirs[::3] + 1) % 9  # a third is wrong
    content = analyse(study, phantom_root, f"--published={published(study, theirs)}")
    only_ours = int(((ours == targets) & (theirs != targets)).sum())
    only_theirs = int(((ours != targets) & (theirs == targets)).sum())
    assert content["published"]["only_right"]["first"] == {"ours": only_ours, "theirs": only_theirs}
    hard = int(((ours != targets) & (theirs != targets)).sum())
    assert sum(content["hard"]["per_class"].values()) == hard > 0
    for scores in content["matched"].values():
        assert set(scores) == {"first"}

    run_script(report.main, report.ReportConfig, [f"--output_dir={study}"])
    page = (study / "report.md").read_text()
    assert re.search(
        r"^- One published run .* on the same 18 tiles of phantom .*\. Task 1, one seed, ",
        page,
        re.MULTILINE,
    )
    assert f"ours alone is right on {only_ours} tiles, the published one alone on {only_theirs} (p " in page
    assert page.count("- Task 1: we matched the colours of all test tiles together ") == 1
    assert (
        f"All 2 networks (of Task 1, and the published one) are wrong on {hard} of {len(targets)} test tiles."
        in page
    )
    assert "fig/analysis/hard-tiles.png" in page
    assert "| published: recall |" in page

    path = study / "analysis.json"
    for change, message in (
        (lambda record: record["published"]["only_right"]["first"].update(ours=only_ours + 1), "only one network"),
        (lambda record: record["hard"]["per_class"].update(adipose=99), "all networks get wrong"),
        (lambda record: record["hard"].update(sha256="0"), "hard-tiles.png: not the figure"),
        (lambda record: record["runs"].update(first="0"), "run first had other outputs when it was analysed"),
    ):
        changed = json.loads(json.dumps(content))
        change(changed)
        path.write_text(json.dumps(changed))
        with pytest.raises(SystemExit):
            run_script(report.main, report.ReportConfig, [f"--output_dir={study}", "--check"])
        assert message in capsys.readouterr().err


def test_without_checkpoints_and_published_predictions_the_rest_is_analysed(
    study: Path, phantom_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(study / "checkpoints")
    content = analyse(study, phantom_root)
    assert content["runs"].keys() == {"first"}
    assert "first: no checkpoint" in capsys.readouterr().out
    assert content["published"] is None
    assert not any(content["matched"].values())
    run_script(report.main, report.ReportConfig, [f"--output_dir={study}"])
    page = (study / "report.md").read_text()
    assert "The network is wrong on" in page
    assert "Up to 8 test tiles of each class that the network gets wrong" in page
    most = max(content["hard"]["per_class"], key=content["hard"]["per_class"].__getitem__)
    content["hard"]["per_class"][most] -= 1
    (study / "analysis.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        run_script(report.main, report.ReportConfig, [f"--output_dir={study}", "--check"])
    assert "all networks get wrong are not those of the runs" in capsys.readouterr().err
    assert "got the colours" not in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:-1], "must have 18 rows"),
        (lambda lines: lines[::-1], "must have 18 rows"),
        (lambda lines: ["a,b", *lines[1:]], "not a readable table"),
        (lambda lines: [*lines[:-1], lines[-1].replace(lines[-1].split(",")[1], "nan")], "must have 18 rows"),
    ],
)
def test_predictions_of_other_tiles_are_refused(
    change: Any, message: str, study: Path, phantom_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = published(study, Record.read(study, "first").arrays()["targets"])
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(SystemExit) as ended:
        analyse(study, phantom_root, f"--published={path}")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_record_with_published_predictions_is_not_replaced_by_one_without_them(
    study: Path, phantom_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = Record.read(study, "first").arrays()["targets"]
    before = analyse(study, phantom_root, f"--published={published(study, targets)}")
    with pytest.raises(SystemExit) as ended:
        analyse(study, phantom_root)
    assert ended.value.code == 2
    assert re.search(r"compares with published\.csv: name this file \(--published\)", capsys.readouterr().err)
    assert json.loads((study / "analysis.json").read_text()) == before


def test_the_scores_of_an_earlier_analysis_stay_where_the_run_is_the_same_and_its_checkpoint_is_gone(
    study: Path, phantom_root: Path
) -> None:
    first = analyse(study, phantom_root)
    assert first["kept"] == {}
    (study / "checkpoints/first/best.pt").unlink()
    second = analyse(study, phantom_root)
    assert second["matched"] == first["matched"]
    assert second["kept"]["first"]["started"] == first["started"]
    # The analysis that made the scores stays named, also after a third one.
    first["started"] = second["kept"]["first"]["started"] = "2001-01-01T00:00:00+00:00"
    (study / "analysis.json").write_text(json.dumps(second))
    third = analyse(study, phantom_root)
    assert third["kept"] == second["kept"]
    run_script(report.main, report.ReportConfig, [f"--output_dir={study}"])
    page = (study / "report.md").read_text()
    assert re.search(r"^\| Analysis, Matched colours.* \| .* \| 2001-01-01 to ", page, re.MULTILINE)
    # A run that was trained again is another one.
    third["runs"]["first"] = "0"
    (study / "analysis.json").write_text(json.dumps(third))
    assert not any(analyse(study, phantom_root)["matched"].values())

"""The baselines: their features, the choice by validation, and their records."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingClassifier

from common.cli import run_script
from common.data.dataset import Split
from common.data.shift import SHIFTS
from common.records.read import Record
from common.training.verification import check_scores
from study import baselines
from study.baselines import features, fit_and_score


def test_the_features_are_the_statistics_of_colours_and_gradient() -> None:
    tile = torch.zeros(1, 3, 28, 28, dtype=torch.uint8)
    tile[:, 0] = 255  # all red
    tile[:, 1, :, 14:] = 255  # the right half is yellow
    [table] = features(Split(tile, torch.zeros(1, dtype=torch.int64)))
    [turned] = features(Split(tile.rot90(1, (2, 3)), torch.zeros(1, dtype=torch.int64)))
    assert turned == pytest.approx(table, abs=1e-6)
    edge = 2 * 28 * (1 / 3 / 2) / 28**2  # two columns beside the edge, each with half of its step
    assert table.shape == (28,)
    assert table[:4] == pytest.approx([1, 0.5, 0, edge])
    assert table[4:7] == pytest.approx([0, 0.5, 0])
    assert table[8:12] == pytest.approx([1, 0, 0, 0])  # the lowest quantile
    assert table[24:28] == pytest.approx([1, 1, 0, 1 / 6])  # the highest one


class Column:
    """A classifier that returns a column of the table as the class."""

    def __init__(self, column: int) -> None:
        self.column = column

    def fit(self, table: np.ndarray, labels: np.ndarray) -> "Column":
        return self

    def predict_proba(self, table: np.ndarray) -> np.ndarray:
        return np.eye(9)[table[:, self.column].astype(int)]


def test_nearest_neighbours_see_standardised_features_and_there_are_four_numbers_of_them() -> None:
    found = baselines.classifiers("neighbours", 0)
    assert list(found) == ["1 neighbours", "5 neighbours", "15 neighbours", "45 neighbours"]
    assert {tuple(model.named_steps) for model in found.values()} == {("standardscaler", "kneighborsclassifier")}
    assert [model.steps[1][1].n_neighbors for model in found.values()] == [1, 5, 15, 45]
    assert [model.random_state for model in baselines.classifiers("boosting", 2).values()] == [2, 2, 2]


def test_validation_alone_chooses_the_setting() -> None:
    labels = np.arange(90) % 9
    right, wrong = labels, (labels + 1) % 9
    by_validation = (np.stack([wrong, right], axis=1), labels)
    by_test = (np.stack([right, wrong], axis=1), labels)
    tables: Any = {"train": by_test, "val": by_validation, "test": by_test, **dict.fromkeys(SHIFTS, by_test)}
    models = {"the first column": Column(0), "the second column": Column(1)}
    arrays, summary = fit_and_score(models, tables)
    assert summary["setting"] == "the second column"
    assert (summary["validate"]["validate/acc"], summary["test/acc"], summary["validate/shifted_acc"]) == (1, 0, 0)
    np.testing.assert_array_equal(arrays["best_logits"].argmax(1), wrong)


def test_each_baseline_leaves_the_records_of_a_run_and_a_second_start_fits_nothing(
    phantom_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def quick(name: str, seed: int) -> dict[str, Any]:
        boosted = {"": HistGradientBoostingClassifier(max_iter=2, max_features=0.5, random_state=seed)}
        return boosted if name == "boosting" else every(name, seed)

    every, widths = baselines.classifiers, list[int]()
    monkeypatch.setattr(baselines, "classifiers", quick)
    monkeypatch.setattr(
        baselines,
        "fit_and_score",
        lambda *given: widths.append(given[1]["val"][0].shape[1]) or fit_and_score(*given),
    )
    data = ["--dataset=phantom", "--size=28", f"--data_root={phantom_root}"]
    arguments = [*data, f"--output_dir={tmp_path}", "--train_tiles=90"]
    run_script(baselines.main, baselines.BaselinesConfig, arguments)
    assert widths == [3, 28, 28, 28, 28]
    names = ["mean_rgb-90-0", "neighbours-90-0", *(f"boosting-90-{seed}" for seed in range(3))]
    assert {path.name for path in (tmp_path / "runs").iterdir()} == set(names)
    for name in names:  # the ties of equal neighbours must be in the record's scores too
        check_scores(Record.read(tmp_path, name))
    probabilities = []
    for seed in range(3):
        record = Record.read(tmp_path, f"boosting-90-{seed}")
        arrays = record.arrays()
        assert record.history == []
        assert record.config["seed"] == seed
        assert record.summary["tiles"]["train"] == 90
        assert record.summary["test/acc"] == np.mean(arrays["best_logits"].argmax(1) == arrays["targets"])
        probabilities.append(arrays["best_logits"])
    assert not np.array_equal(*probabilities[:2])

    monkeypatch.setattr(baselines, "fit_and_score", None)
    run_script(baselines.main, baselines.BaselinesConfig, arguments)
    assert "boosting-90-2: finished already" in capsys.readouterr().out
    path = tmp_path / "runs/mean_rgb-90-0/summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "data_fingerprint": "another"}))
    with pytest.raises(SystemExit) as ended:
        run_script(baselines.main, baselines.BaselinesConfig, arguments)
    assert ended.value.code == 2
    assert "mean_rgb-90-0: a run on other data" in capsys.readouterr().err

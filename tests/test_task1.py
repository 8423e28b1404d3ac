import csv
import json
from pathlib import Path

import numpy as np
import pytest

import task1
from common.cli import UsageError, parse
from common.data.dataset import load_dataset
from common.finetune.trained import load_trained
from common.training.metrics import accuracy, auc, softmax

KEYS = ("--dataset=phantom", "--size=28", "--input_size=28", "--train_tiles=90", "--run_id=r", "--wandb=disabled")


def run_task1(*arguments: str) -> None:
    task1.main(parse(task1.Task1Config, arguments, ""))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, phantom_root: Path) -> Path:
    """The output folder of a finished run `r` on a small phantom."""
    output = tmp_path_factory.mktemp("output")
    run_task1(
        *KEYS,
        "--n_epochs=2",
        f"--data_root={phantom_root}",
        f"--output_dir={output}",
    )
    return output


def test_the_defaults_are_the_courseworks_configuration() -> None:
    config = task1.Task1Config()
    assert (config.model_name, config.optimizer, config.lr, config.batch_size) == ("resnet18", "adam", 1e-3, 64)
    assert (config.n_epochs, config.lr_min, config.size) == (5, 0, 64)


def test_a_run_writes_its_records_checkpoints_and_figures_and_no_other_file(finished: Path) -> None:
    files = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert files == {
        "runs/r/config.json",
        "runs/r/history.csv",
        "runs/r/summary.json",
        "runs/r/scores.npz",
        "checkpoints/r/best.pt",
        "fig/task1/r-train-loss.png",
        "fig/task1/r-validate-auc.png",
        "fig/task1/r-validate-acc.png",
        "fig/task1/r-confusion.png",
    }


def test_the_records_agree_with_one_another(finished: Path) -> None:
    summary = json.loads((finished / "runs/r/summary.json").read_text())
    with open(finished / "runs/r/history.csv", newline="") as file:
        history = list(csv.DictReader(file))
    assert [row["epoch"] for row in history] == ["1", "2"]
    assert summary["dataset"] == "phantom (90 training tiles, 28 px)"
    assert summary["synthetic"] is True
    with np.load(finished / "runs/r/scores.npz", allow_pickle=False) as scores:
        assert scores["best_logits"].shape == (18, 9)
        for weights in ("best", "last"):
            probabilities = softmax(scores[f"{weights}_logits"])
            described = summary[weights]
            assert described["n"] == 18
            assert described["acc"]["value"] == accuracy(probabilities, scores["targets"])
            assert described["auc"]["value"] == auc(probabilities, scores["targets"])
            for measure in ("acc", "auc"):
                interval = described[measure]
                assert 0 <= interval["low"] <= interval["value"] <= interval["high"] <= 1
            assert np.sum(described["confusion_matrix"]) == 18
    assert summary["test/acc"] == summary["best"]["acc"]["value"]
    assert summary["test/auc"] == summary["best"]["auc"]["value"]
    best = history[summary["best"]["epoch"] - 1]
    assert float(best["validate/acc"]) == max(float(row["validate/acc"]) for row in history)
    assert summary["validate"]["validate/acc"] == float(best["validate/acc"])
    assert summary["last"]["epoch"] == 2
    assert summary["wall_seconds"] >= sum(float(row["seconds"]) for row in history)


def test_the_best_checkpoint_labels_the_test_tiles_as_the_run_did(finished: Path, phantom_root: Path) -> None:
    trained = load_trained(finished / "checkpoints/r/best.pt")
    probabilities = trained(load_dataset("phantom", 28, phantom_root, 90).test.images)
    with np.load(finished / "runs/r/scores.npz") as scores:
        np.testing.assert_allclose(probabilities, softmax(scores["best_logits"]), atol=2e-3)
    assert len(trained.class_names) == 9


def test_a_finished_run_is_not_overwritten(finished: Path, phantom_root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(UsageError, match="run r is finished already"):
        run_task1(*KEYS, f"--data_root={phantom_root}", f"--output_dir={finished}")
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}

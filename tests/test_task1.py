from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax

import task1
from common.cli import UsageError, parse
from common.data.dataset import load_dataset
from common.finetune.trained import load_trained

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


def test_the_best_checkpoint_labels_the_test_tiles_as_the_run_did(finished: Path, phantom_root: Path) -> None:
    trained = load_trained(finished / "checkpoints/r/best.pt")
    probabilities = trained(load_dataset("phantom", 28, phantom_root, 90).test.images)
    with np.load(finished / "runs/r/scores.npz") as scores:
        np.testing.assert_allclose(probabilities, softmax(scores["best_logits"].astype(float), axis=1), atol=2e-3)
    assert len(trained.class_names) == 9


def test_a_finished_run_is_not_overwritten(finished: Path, phantom_root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    with pytest.raises(UsageError, match="run r is finished already"):
        run_task1(*KEYS, f"--data_root={phantom_root}", f"--output_dir={finished}")
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}

from pathlib import Path

import numpy as np
import torch
from scipy.special import softmax

import task1
from common.cli import parse
from common.data.dataset import load_dataset
from common.finetune.trained import load_trained
from common.training.models import build_model

KEYS = ("--dataset=phantom", "--size=28", "--input_size=28", "--train_tiles=90", "--run_id=r", "--wandb=disabled")


def test_the_defaults_are_the_courseworks_configuration() -> None:
    config = task1.Task1Config()
    assert (config.model_name, config.optimizer, config.lr, config.batch_size) == ("resnet18", "adam", 1e-3, 64)
    assert (config.n_epochs, config.lr_min, config.size) == (5, 0, 64)
    assert (config.select_on, config.augmentation, config.reestimate_batchnorm) == ("validate/acc", "none", False)
    assert (config.lr_warmup_epochs, config.lr_warmup_decay) == (0, 0.1)


def test_a_run_writes_its_files_and_no_other_and_its_best_checkpoint_labels_the_test_tiles_as_it_did(
    tmp_path: Path, phantom_root: Path
) -> None:
    where = [f"--data_root={phantom_root}", f"--output_dir={tmp_path}", "--device=cpu"]
    task1.main(parse(task1.Task1Config, [*KEYS, "--n_epochs=2", "--seed=7", "--lr=1e-12", *where]))
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        *(f"runs/r/{name}" for name in ("config.json", "history.csv", "summary.json", "scores.npz")),
        "checkpoints/r/best.pt",
        *(f"fig/task1/r-{name}.png" for name in ("train-loss", "validate-auc", "validate-acc", "confusion")),
    }
    trained = load_trained(tmp_path / "checkpoints/r/best.pt")
    probabilities = trained(load_dataset("phantom", 28, phantom_root, 90).test.images)
    with np.load(tmp_path / "runs/r/scores.npz") as scores:
        np.testing.assert_allclose(probabilities, softmax(scores["best_logits"].astype(float), axis=1), atol=2e-3)
    assert len(trained.class_names) == 9
    torch.manual_seed(7)  # with this learning rate they stay as they began
    assert torch.allclose(trained.network.fc.weight, build_model("resnet18", 9, 28).fc.weight)

"""Task 5: its keys and recipes, the cache of features, and a comparison from start to end."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU
from scipy.special import softmax

import task5
from common.cli import UsageError, parse
from common.data.batches import DeviceTiles, device_splits
from common.data.dataset import load_dataset
from common.data.shift import SHIFTS
from common.finetune import features, network
from common.finetune.weights import load_weights
from common.records import checkpoint
from common.training.evaluation import evaluate
from common.training.models import build_model

SMALL = "mobilenet_v3_small"


def read(*arguments: str) -> task5.Task5Config:
    return parse(task5.Task5Config, arguments)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of generated weights: of the right layout, trained on nothing."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(build_model(SMALL, 1000, 32).state_dict(), path)
    return path


def keys(root: Path, output: Path, weights: Path | str, *more: str) -> list[str]:
    return [
        *("--dataset=phantom", "--size=28", "--train_tiles=90", "--device=cpu"),
        *(f"--model_name={SMALL}", f"--weights={weights}", "--input_size=32", "--n_epochs=2", "--batch_size=32"),
        *("--lr=0.01", "--run_id=r", "--wandb=disabled", f"--data_root={root}", f"--output_dir={output}", *more),
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, phantom_root: Path, weights: Path) -> Path:
    """The output folder of a comparison."""
    output = tmp_path_factory.mktemp("output")
    task5.main(read(*keys(phantom_root, output, weights)))
    return output


def test_a_network_gets_its_seed_s_head_and_the_learning_rates_of_its_layers(
    phantom_root: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(task5, "Trainer", lambda model, *_, lr_factors: given.extend([model, lr_factors]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        more = ("--train_part=all", "--backbone_lr_factor=0.5", "--seed=7")
        task5.main(read(*keys(phantom_root, tmp_path, weights, *more)))
    assert given[1]["network.features.0.0.weight"] == 0.5
    torch.manual_seed(7)
    model = network.build_fine_tuned(SMALL, load_weights(str(weights), SMALL), 32)
    assert torch.equal(given[0].head[3].weight, model.head[3].weight)


def test_runs_without_test_scores_are_not_compared(
    phantom_root: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    monkeypatch.setattr(task5, "train", lambda config, *_: trained.append(config.run_id))
    task5.main(read(*keys(phantom_root, tmp_path, weights, "--test=False")))
    assert trained == ["r", "r-scratch"]


def test_the_defaults_are_the_courseworks() -> None:
    config = read()
    assert config.model_name == "mobilenet_v3_large"
    assert config.weights == "MobileNet_V3_Large_Weights.IMAGENET1K_V2"
    assert (config.train_part, config.input_size) == ("classifier", 224)
    assert (config.n_epochs, config.batch_size, config.label_smoothing) == (20, 512, 0.1)
    assert (config.optimizer, config.lr, config.lr_min, config.weight_decay) == (
        "adamw",
        5e-4,
        0.1,
        1.0640579453275e-06,
    )
    assert (config.augmentation, config.reestimate_batchnorm) == ("dihedral", True)


def test_weights_imply_their_network_and_a_network_implies_its_weights() -> None:
    assert read("--weights=ResNet18_Weights.IMAGENET1K_V1").model_name == "resnet18"
    assert read("--weights=efficientnet_lite0_imagenet").model_name == "tf_efficientnet_lite0"
    assert read("--model_name=tf_efficientnet_lite0").weights == "efficientnet_lite0_imagenet"
    assert read("--model_name=resnet50").weights == "ResNet50_Weights.IMAGENET1K_V2"


def test_the_recipe_of_the_network_is_implied_and_can_be_overridden() -> None:
    recipe = {
        "augmentation": "stain",
        "batch_size": 64,
        "ema_decay": 0.99,
        "input_size": 64,
        "label_smoothing": 0.1,
        "lr": 0.003,
        "lr_min": 0.0,
        "lr_warmup_epochs": 1,
        "n_epochs": 6,
        "optimizer": "adamw",
        "select_on": "last",
        "train_part": "all",
        "weight_decay": 0.01,
    }
    for arguments in (["--weights=efficientnet_lite0_imagenet"], ["--model_name=tf_efficientnet_lite0"]):
        values = read("--dataset=phantom", *arguments).as_dict()
        assert {name: values[name] for name in recipe} == recipe
    assert read("--model_name=tf_efficientnet_lite0", "--lr=0.5").lr == 0.5
    assert read("--model_name=resnet18").lr == task5.Task5Config().lr


def test_the_run_from_scratch_differs_in_what_scratch_needs_and_shares_seed_and_budget() -> None:
    tuned, scratch = read("--run_id=r", "--seed=3", "--augmentation=stain").runs()
    one, other = tuned.as_dict(), scratch.as_dict()
    assert {name: other[name] for name in one if one[name] != other[name]} == {
        "weights": "none",
        "run_id": "r-scratch",
        "train_part": "all",
        "backbone_lr_factor": 1.0,
        "lr": 0.0019976195957370426,
        "lr_warmup_epochs": 2,
    }
    direct = read("--weights=none", "--run_id=r-scratch", "--seed=3", "--augmentation=stain")
    assert direct.as_dict() == other
    assert direct.runs() == [direct]


def test_a_comparison_leaves_its_records_and_figures_and_nothing_else(finished: Path, weights: Path) -> None:
    files = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    expected = {"runs/r/comparison.md", "fig/task5/r-comparison.png"}
    for run_id in ("r", "r-scratch"):
        expected |= {
            f"runs/{run_id}/{name}" for name in ("config.json", "history.csv", "summary.json", "scores.npz")
        }
        expected.add(f"checkpoints/{run_id}/best.pt")
        for name in ("train-loss", "validate-auc", "validate-acc", "confusion"):
            expected.add(f"fig/task5/{run_id}-{name}.png")
    assert files == expected
    for name in ("config.json", "summary.json"):
        record = json.loads((finished / "runs/r" / name).read_text())
        assert record["task"] == "task5"
        assert record["weights"]["source"] == str(weights)
        assert len(record["weights"]["sha256"]) == 64
    assert json.loads((finished / "runs/r-scratch/config.json").read_text())["weights"]["sha256"] is None


def test_the_best_checkpoint_is_the_network_that_was_scored(finished: Path, phantom_root: Path) -> None:
    test = DeviceTiles(load_dataset("phantom", 28, phantom_root, 90).test, CPU.device, input_size=32)
    for run_id in ("r", "r-scratch"):
        model = network.build_fine_tuned(SMALL, load_weights("none", SMALL), 32)
        model.load_state_dict(checkpoint.load(finished / f"checkpoints/{run_id}/best.pt")["state_dict"])
        with np.load(finished / f"runs/{run_id}/scores.npz", allow_pickle=False) as scores:
            scored = evaluate(model, test)
            np.testing.assert_allclose(
                scored.probabilities, softmax(scores["best_logits"].astype(float), axis=1), atol=1e-3
            )
            views = evaluate(model, test, tta=True).predicted
            np.testing.assert_array_equal(scores["tta_classes"], views)


def test_the_comparison_is_that_of_the_records(finished: Path) -> None:
    lines = (finished / "runs/r/comparison.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0] == ["", "fine-tuned", "from scratch", "difference"]
    summaries = [
        json.loads((finished / f"runs/{run_id}/summary.json").read_text()) for run_id in ("r", "r-scratch")
    ]
    tuned, scratch = (summary["test/acc"] for summary in summaries)
    assert ["seeds", "1", "1", "1 in common"] in rows
    assert ["test ACC", f"{tuned:.3f}", f"{scratch:.3f}", f"{tuned - scratch:+.3f}"] in rows


def test_the_command_again_skips_what_is_finished_and_compares_again(
    finished: Path, phantom_root: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "runs/r/comparison.md").read_text()
    trained = {path: path.stat().st_mtime_ns for path in finished.rglob("summary.json")}
    task5.main(read(*keys(phantom_root, finished, weights)))
    assert trained == {path: path.stat().st_mtime_ns for path in finished.rglob("summary.json")}
    assert (finished / "runs/r/comparison.md").read_text() == before
    assert "run r-scratch is finished already" in capsys.readouterr().out
    (finished / "checkpoints/r/last.pt").touch()  # a kill at the end may leave it
    with pytest.raises(UsageError, match="run r is finished already"):
        task5.main(read(*keys(phantom_root, finished, weights, "--scratch=False")))
    assert not (finished / "checkpoints/r/last.pt").exists()
    with pytest.raises(UsageError, match=r"run r was started with another .*lr was 0\.01"):
        task5.main(read(*keys(phantom_root, finished, weights, "--lr=0.02")))
    shutil.copytree(finished / "runs/r-scratch", tmp_path / "runs/r-scratch")
    with pytest.raises(UsageError, match=r"run r-scratch was started with another .*seed was 0"):
        task5.main(read(*keys(phantom_root, tmp_path, weights, "--seed=1")))
    assert not (tmp_path / "runs/r").exists()  # nothing was trained before


def test_the_cache_changes_how_long_a_run_takes_and_not_what_it_finds(
    finished: Path, phantom_root: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task5, "cached_splits", lambda _, *others: device_splits(*others))
    clock = iter([0.0, 1000.0])  # before and after the tiles are made ready
    monkeypatch.setattr(task5, "time", SimpleNamespace(perf_counter=clock.__next__))
    task5.main(read(*keys(phantom_root, tmp_path, weights, "--scratch=False")))
    assert 1000 < json.loads((tmp_path / "runs/r/summary.json").read_text())["wall_seconds"] < 2000
    arrays = []
    for folder in (finished, tmp_path):
        with np.load(folder / "runs/r/scores.npz", allow_pickle=False) as scores:
            arrays.append({name: scores[name] for name in scores.files})
    assert arrays[0].keys() == arrays[1].keys()
    for name in arrays[0]:
        np.testing.assert_allclose(arrays[0][name], arrays[1][name], atol=1e-4)
    assert not (tmp_path / "runs/r/comparison.md").exists()


def test_a_cache_that_takes_more_than_60_percent_of_the_memory_is_refused(
    phantom_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read("--dataset=phantom", f"--model_name={SMALL}", "--input_size=32")
    dataset = load_dataset("phantom", 28, phantom_root, 90)
    model = network.build_fine_tuned(SMALL, load_weights("none", SMALL), 32)
    size = (8 * 90 + 10 + 8 * 18) * 576 * 4  # views of training, validation and test tiles; 4 bytes a float32
    pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": int(size / 0.6) + 1}
    monkeypatch.setattr(features.os, "sysconf", pages.get)
    features.cached_splits(model, dataset, config, CPU.device)
    pages["SC_PHYS_PAGES"] -= 2
    remedy = "with another --run_id, lower --train_tiles, or use --tta=False or --train_part=all"
    with pytest.raises(UsageError, match=rf"features of all tiles take 0\.0 GB .*; {remedy}$"):
        features.cached_splits(model, dataset, config, CPU.device)
    features.cached_splits(model, dataset, config.replaced(tta=False), CPU.device)  # a test tile has one view then
    features.cached_splits(model, dataset, config.replaced(test=False), CPU.device)  # and here none


@pytest.mark.parametrize(
    ("augmentation", "tta", "views"),
    [("none", True, (1, 8)), ("dihedral", False, (8, 1)), ("stain", True, (8, 8))],
)
def test_cached_splits_have_the_views_that_training_and_test_time_augmentation_need(
    augmentation: str, tta: bool, views: tuple[int, int], phantom_root: Path
) -> None:
    arguments = ["--dataset=phantom", f"--model_name={SMALL}", "--input_size=32", f"--tta={tta}"]
    config = read(*arguments, f"--augmentation={augmentation}")
    model = network.build_fine_tuned(SMALL, load_weights("none", SMALL), 32)
    for module in model.modules():  # else random weights give almost the same features for all tiles
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(0.1)
    dataset, first = load_dataset("phantom", 28, phantom_root, 90), torch.arange(5)
    splits = features.cached_splits(model, dataset, config, CPU.device)
    test = splits.test()
    assert (len(splits.train.features), len(test.features)) == views
    assert [name for name, _ in splits.shifted()] == list(SHIFTS)
    assert model.takes_features
    for cached, split in ((splits.train, dataset.train), (splits.val, dataset.val), (test, dataset.test)):
        assert len(cached.features[:, first].unique(dim=0)) == len(cached.features)
        inputs, _ = DeviceTiles(split, CPU.device, 32).inputs(torch.arange(len(split)))
        with torch.no_grad():  # of as many tiles at once: other kernels round differently
            torch.testing.assert_close(cached.features[0], model.features(inputs))
    if augmentation == "stain":
        seeds = [features.cached_splits(model, dataset, config.replaced(seed=seed), CPU.device) for seed in (0, 1)]
        same = [torch.equal(splits.train.features, other.train.features) for other in seeds]
        assert same == [True, False]

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU

import task5
from common.cli import UsageError, parse
from common.data.batches import DeviceTiles
from common.data.dataset import load_dataset
from common.finetune import features, network
from common.finetune.keys import RANDOM_VIEWS
from common.finetune.weights import load_weights
from common.records import checkpoint
from common.training.evaluation import evaluate
from common.training.metrics import softmax
from common.training.models import build_model
from study.groups import convergence_epoch

SMALL = "mobilenet_v3_small"


def read(*arguments: str) -> task5.Task5Config:
    return parse(task5.Task5Config, arguments, "")


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of generated weights: of the right layout, trained on nothing."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(build_model(SMALL, 1000, 32).state_dict(), path)
    return path


def keys(root: Path, output: Path, weights: Path | str, *more: str) -> list[str]:
    return [
        "--dataset=phantom",
        "--size=28",
        "--input_size=28",
        "--train_tiles=90",
        f"--model_name={SMALL}",
        f"--weights={weights}",
        "--input_size=32",
        "--n_epochs=2",
        "--batch_size=32",
        "--lr=0.01",
        "--run_id=r",
        "--wandb=disabled",
        f"--data_root={root}",
        f"--output_dir={output}",
        *more,
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, phantom_root: Path, weights: Path) -> Path:
    """The output folder of a comparison over two seeds."""
    output = tmp_path_factory.mktemp("output")
    task5.main(read(*keys(phantom_root, output, weights, "--n_seeds=2")))
    return output


def test_the_defaults_are_the_courseworks() -> None:
    config = read()
    assert config.model_name == "mobilenet_v3_large"
    assert config.weights == "MobileNet_V3_Large_Weights.IMAGENET1K_V2"
    assert (config.train_part, config.adapt_batchnorm, config.cache_features) == ("classifier", False, None)
    assert (config.n_epochs, config.batch_size, config.label_smoothing) == (20, 512, 0.1)
    assert config.lr < task5.FROM_SCRATCH["lr"]


def test_weights_imply_their_network_and_a_network_implies_its_weights() -> None:
    assert read("--weights=ResNet18_Weights.IMAGENET1K_V1").model_name == "resnet18"
    assert read("--weights=efficientnet_lite0_imagenet").model_name == "tf_efficientnet_lite0"
    assert read("--model_name=tf_efficientnet_lite0").weights == "efficientnet_lite0_imagenet"
    assert read("--model_name=resnet50").weights == "ResNet50_Weights.IMAGENET1K_V2"
    with pytest.raises(
        UsageError,
        match="--model_name resnet19: torchvision has no classification model of this name; did you mean resnet1",
    ):
        read("--model_name=resnet19")


def test_the_recipe_of_the_network_is_implied_and_can_be_overridden() -> None:
    recipe = task5.LITE
    for arguments in (["--weights=efficientnet_lite0_imagenet"], ["--model_name=tf_efficientnet_lite0"]):
        values = read("--dataset=phantom", *arguments).as_dict()
        assert {name: values[name] for name in recipe} == recipe
    assert read("--model_name=tf_efficientnet_lite0", "--lr=0.5").lr == 0.5
    assert read("--model_name=resnet18").lr == task5.Task5Config().lr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights=none", "--train_part=head"], "--train_part head: random weights cannot stay frozen"),
        (["--train_part=all", "--adapt_batchnorm"], "--adapt_batchnorm: with --train_part all"),
        (["--unfreeze_epoch=3"], "--unfreeze_epoch 3: only --train_part all unfreezes"),
        (["--train_part=all", "--cache_features"], "--cache_features: not possible with --train_part all"),
        (["--mixup_alpha=1", "--cache_features"], "--cache_features: not possible with mixup or cutmix"),
        (
            ["--cache_features=False", "--feature_views=2"],
            "--feature_views 2: no features are cached here",
        ),
        (
            ["--augmentation=dihedral", "--feature_views=3"],
            "--feature_views 3: with augmentation dihedral it is 8",
        ),
        (["--weights=ResNet18_Weights.V9"], "--weights ResNet18_Weights.V9: torchvision has no such weights"),
    ],
)
def test_contradictions_are_refused_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(*arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_features_are_cached_where_that_is_possible() -> None:
    assert read("--augmentation=none").feature_views == 1
    assert read("--augmentation=dihedral").feature_views == 8
    assert read("--augmentation=stain").feature_views == RANDOM_VIEWS
    for arguments in (["--train_part=all"], ["--adapt_batchnorm"], ["--cutmix_alpha=1"], ["--weights=none"]):
        config = read(*arguments)
        assert (config.cache_features, config.feature_views) == (False, None)


def test_the_runs_from_scratch_differ_in_what_scratch_needs_and_share_seed_and_budget() -> None:
    runs = read("--run_id=r", "--n_seeds=2", "--seed=3", "--augmentation=stain").runs()
    assert [run.run_id for run in runs] == ["r", "r-scratch", "r-seed4", "r-scratch-seed4"]
    for tuned, scratch in ((runs[0], runs[1]), (runs[2], runs[3])):
        one, other = tuned.as_dict(), scratch.as_dict()
        differing = {name for name in one if one[name] != other[name]}
        assert differing <= {*task5.FROM_SCRATCH, "weights", "run_id"}
        assert scratch.train_part == "all"
        assert tuned.seed == scratch.seed
    alone = read("--weights=none", "--run_id=r")
    assert [run.run_id for run in alone.runs()] == ["r"]
    made = runs[1].as_dict()
    direct = read("--weights=none", "--run_id=r-scratch", "--seed=3", "--augmentation=stain", "--n_seeds=2")
    assert direct.as_dict() == made


def test_a_comparison_leaves_its_records_and_figures_and_nothing_else(finished: Path) -> None:
    files = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    expected = {"runs/r/comparison.md", "fig/task5/r-comparison.png"}
    for run_id in ("r", "r-scratch", "r-seed1", "r-scratch-seed1"):
        expected |= {
            f"runs/{run_id}/{name}" for name in ("config.json", "history.csv", "summary.json", "scores.npz")
        }
        expected.add(f"checkpoints/{run_id}/best.pt")
        for name in ("train-loss", "validate-auc", "validate-acc", "confusion"):
            expected.add(f"fig/task5/{run_id}-{name}.png")
    assert files == expected


def test_the_records_name_the_weights_and_where_they_came_from(finished: Path, weights: Path) -> None:
    for name in ("config.json", "summary.json"):
        record = json.loads((finished / "runs/r" / name).read_text())
        assert record["task"] == "task5"
        assert record["weights"]["source"] == str(weights)
        assert len(record["weights"]["sha256"]) == 64
    assert json.loads((finished / "runs/r-scratch/config.json").read_text())["weights"]["sha256"] is None


def test_the_best_checkpoint_is_the_network_that_was_scored(finished: Path, phantom_root: Path) -> None:
    test = DeviceTiles(load_dataset("phantom", 28, phantom_root, 90).test, CPU.device, input_size=32)
    for run_id in ("r", "r-scratch"):
        model = network.build_fine_tuned(SMALL, 9, load_weights("none", SMALL, finished), 32)
        model.load_state_dict(checkpoint.load(finished / f"checkpoints/{run_id}/best.pt")["state_dict"])
        with np.load(finished / f"runs/{run_id}/scores.npz", allow_pickle=False) as scores:
            scored = evaluate(model, test, CPU)
            np.testing.assert_allclose(scored.probabilities, softmax(scores["best_logits"]), atol=1e-3)
            views = evaluate(model, test, CPU, tta=True).logits
            np.testing.assert_allclose(softmax(views), softmax(scores["tta_logits"]), atol=1e-3)


def test_the_frozen_part_of_a_whole_run_is_that_of_the_file(finished: Path, weights: Path) -> None:
    before = checkpoint.load(weights)
    after = checkpoint.load(finished / "checkpoints/r/best.pt")["state_dict"]
    frozen = [name for name in before if not name.startswith("classifier")]
    assert len(frozen) > 200
    assert all(torch.equal(after[f"network.{name}"], before[name]) for name in frozen)


def test_the_comparison_is_that_of_the_records(finished: Path) -> None:
    lines = (finished / "runs/r/comparison.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert rows[0] == ["", "fine-tuned", "from scratch", "difference"]
    scores = [
        [json.loads((finished / f"runs/{run_id}/summary.json").read_text())["test/acc"] for run_id in run_ids]
        for run_ids in (("r", "r-seed1"), ("r-scratch", "r-scratch-seed1"))
    ]
    tuned, scratch = map(np.mean, scores)
    assert ["test ACC", f"{tuned:.3f}", f"{scratch:.3f}", f"{tuned - scratch:+.3f}"] in rows


def test_the_command_again_skips_what_is_finished_and_compares_again(
    finished: Path, phantom_root: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "runs/r/comparison.md").read_text()
    trained = {path: path.stat().st_mtime_ns for path in finished.rglob("summary.json")}
    task5.main(read(*keys(phantom_root, finished, weights, "--n_seeds=2")))
    assert trained == {path: path.stat().st_mtime_ns for path in finished.rglob("summary.json")}
    assert (finished / "runs/r/comparison.md").read_text() == before
    assert "run r-scratch-seed1 is finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("run_id", "change", "message"),
    [
        (
            "r-scratch-seed1",
            {"config": {"lr": 0.123}},
            r"run r-scratch-seed1 was started with another .*lr was 0\.123",
        ),
        ("r", {"data_fingerprint": "other"}, "data_fingerprint was other"),
        ("r", {"weights": {"name": "w", "source": "s", "sha256": "0"}}, "weights_sha256 was 0"),
    ],
)
def test_finished_runs_of_another_kind_are_refused_before_anything_is_trained(
    run_id: str,
    change: dict[str, Any],
    message: str,
    finished: Path,
    phantom_root: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = finished / f"runs/{run_id}/config.json"
    before = path.read_text()
    record = json.loads(before)
    if "config" in change:
        change = {"config": {**record["config"], **change["config"]}}
    path.write_text(json.dumps({**record, **change}))
    monkeypatch.setattr(task5, "train", lambda *_: pytest.fail("nothing may be trained"))
    with pytest.raises(UsageError, match=message):
        task5.main(read(*keys(phantom_root, finished, weights, "--n_seeds=3")))
    path.write_text(before)


def test_resume_is_asked_of_the_first_run_alone_and_a_finished_one_is_refused(
    finished: Path, phantom_root: Path, weights: Path, tmp_path: Path
) -> None:
    runs = read("--run_id=r", "--resume", "--n_seeds=2").runs()
    assert [run.resume for run in runs] == [True, False, False, False]
    with pytest.raises(UsageError, match="--resume: run r has no checkpoint"):
        task5.main(read(*keys(phantom_root, tmp_path, weights, "--resume")))
    with pytest.raises(UsageError, match="run r is finished already"):
        task5.main(read(*keys(phantom_root, finished, weights, "--scratch=False")))


def test_several_runs_from_random_weights_have_nothing_to_compare(phantom_root: Path, tmp_path: Path) -> None:
    task5.main(read(*keys(phantom_root, tmp_path, "none", "--n_seeds=2", "--n_epochs=1")))
    assert all((tmp_path / f"runs/{run_id}/summary.json").exists() for run_id in ("r", "r-seed1"))
    assert not (tmp_path / "runs/r/comparison.md").exists()


def test_the_cache_changes_how_long_a_run_takes_and_not_what_it_finds(
    finished: Path, phantom_root: Path, weights: Path, tmp_path: Path
) -> None:
    task5.main(read(*keys(phantom_root, tmp_path, weights, "--scratch=False", "--cache_features=False")))
    arrays = []
    for folder in (finished, tmp_path):
        with np.load(folder / "runs/r/scores.npz", allow_pickle=False) as scores:
            arrays.append({name: scores[name] for name in scores.files})
    assert arrays[0].keys() == arrays[1].keys()
    for name in arrays[0]:
        np.testing.assert_allclose(arrays[0][name], arrays[1][name], atol=1e-4)
    assert not (tmp_path / "runs/r/comparison.md").exists()


def test_features_are_cached_where_they_fit_into_60_percent_of_the_free_memory(
    phantom_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Of 90 training tiles in 8 views, 10 validation tiles plain and under 3 shifts, and 18 test tiles in 8 views:
    # 904 rows of 576 float32 values.
    size = 904 * 576 * 4
    config = read(*keys(phantom_root, tmp_path, "w.pth"))
    dataset = load_dataset("phantom", 28, phantom_root, 90)
    assert 10**7 < features.free_memory(CPU.device) < 10**14
    for free, found in ((size / 0.6 + 1, (True, 8)), (size / 0.6 - 1, (False, None))):
        monkeypatch.setattr(features, "free_memory", lambda device, free=free: free)
        decided = features.decide_caching(config, (576,), dataset, CPU.device)
        assert (decided.cache_features, decided.feature_views) == found
    problem = "the features of all tiles take 0.0 GB, more than 60% of the 0.0 GB of free memory"
    assert capsys.readouterr().out == f"features are not cached: {problem}\n"
    with pytest.raises(UsageError, match=f"--cache_features: {problem}; lower --input_size or --feature_views"):
        wanted = config.replaced(cache_features=True)
        features.decide_caching(wanted, (576,), dataset, CPU.device)


@pytest.mark.parametrize(
    ("augmentation", "tta", "views"),
    [("none", True, (1, 8)), ("dihedral", False, (8, 1)), ("stain", True, (16, 8))],
)
def test_cached_splits_have_the_views_that_training_and_test_time_augmentation_need(
    augmentation: str,
    tta: bool,
    views: tuple[int, int],
    phantom_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = read(
        "--dataset=phantom", f"--model_name={SMALL}", "--input_size=32", f"--augmentation={augmentation}"
    )
    config = config.replaced(tta=tta)
    untrained = load_weights("none", SMALL, tmp_path)
    model = network.build_fine_tuned(SMALL, 9, untrained, 32)
    splits = features.cached_splits(model, load_dataset("phantom", 28, phantom_root, 90), config, CPU)
    first = torch.arange(5)
    assert capsys.readouterr().out == "computing the features of all tiles, once for all epochs\n"
    assert model.takes_features
    assert (len(splits.train.features), len(splits.test().features)) == views
    assert len(list(splits.val.views(first)[0])) == 1
    assert [name for name, _ in splits.shifted()] == list(features.SHIFTS)
    for tiles in (splits.train, splits.test()):
        plain, *others = tiles.features[:, first]
        assert torch.equal(plain, tiles.inputs(first)[0])
        assert not any(torch.equal(plain, other) for other in others)


def test_a_run_starts_from_another_runs_weights(finished: Path, phantom_root: Path) -> None:
    task5.main(read(*keys(phantom_root, finished, "r", "--scratch=False", "--run_id=second")))
    record = json.loads((finished / "runs/second/config.json").read_text())
    assert record["weights"]["source"] == "run r of this project, best.pt"
    first = checkpoint.load(finished / "checkpoints/r/best.pt")["state_dict"]
    second = checkpoint.load(finished / "checkpoints/second/best.pt")["state_dict"]
    assert torch.equal(first["mean"], second["mean"])
    assert torch.equal(first["network.features.3.block.0.0.weight"], second["network.features.3.block.0.0.weight"])


def test_more_than_the_classifier_is_trained_only_from_the_unfreezing_epoch_on(
    phantom_root: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    original = task5.Run.log_epoch

    def noted(self: task5.Run, history: Any) -> None:
        original(self, history)
        seen.append(checkpoint.load(self.checkpoints / "last.pt")["evaluated_state_dict"])

    monkeypatch.setattr(task5.Run, "log_epoch", noted)
    more = ["--train_part=all", "--unfreeze_epoch=3", "--n_epochs=3", "--ema_decay=0.9", "--scratch=False"]
    task5.main(read(*keys(phantom_root, tmp_path, weights, *more, "--weight_decay=0.1")))
    before = checkpoint.load(weights)
    frozen = [name for name in before if not name.startswith("classifier")]
    for epoch in (0, 1):
        assert all(torch.equal(seen[epoch][f"network.{name}"], before[name]) for name in frozen)
    moved = {name for name in frozen if not torch.equal(seen[2][f"network.{name}"], before[name])}
    assert {name.rpartition(".")[2] for name in moved} >= {"weight", "bias", "running_mean", "running_var"}
    assert not torch.equal(seen[0]["network.classifier.0.weight"], before["classifier.0.weight"])


@pytest.mark.parametrize(
    ("accuracies", "epoch"),
    [
        ([0.5, 0.8, 0.7], 2),
        ([0.5, 0.894, 0.895, 0.9], 3),  # 0.5 points below the best count, 0.6 do not
        ([0.9, 0.2, 0.9], 1),
        ([0.7], 1),
    ],
)
def test_a_run_has_converged_where_its_accuracy_first_comes_within_half_a_point_of_its_best(
    accuracies: list[float], epoch: int
) -> None:
    assert convergence_epoch([{"validate/acc": accuracy} for accuracy in accuracies]) == epoch

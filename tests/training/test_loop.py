import contextlib
import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, trainer_of
from example_records import row
from processes import plain

from common.cli import Fault, Untrainable
from common.data import batches as batches_module
from common.data.augment import dihedral_view
from common.data.batches import DeviceTiles
from common.data.dataset import Dataset
from common.data.shift import shifted
from common.records import checkpoint
from common.training import loop
from common.training.device import Compute
from common.training.evaluation import Evaluation, evaluate
from common.training.loop import Trainer
from common.training.optimizer import learning_rate_factor


def fitted(dataset: Dataset, folder: Path, **keys: Any) -> Trainer:
    """A small network, trained on the tiny data set."""
    trainer = trainer_of(dataset, folder, **keys)
    trainer.fit()
    return trainer


def best(trainer: Trainer) -> dict[str, Any]:
    return checkpoint.load(trainer.run.checkpoints / "best.pt")


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def trained(tiny: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return fitted(tiny, tmp_path_factory.mktemp("trained"), seed=3, n_epochs=2)


def test_training_learns(tiny: Dataset, tmp_path: Path) -> None:
    # Three seeds ended at 0.02 to 0.15 of the first epoch's loss, and reached 0.73 to 0.84 in validation ACC.
    trainer = fitted(tiny, tmp_path, n_epochs=8, lr=0.003, reestimate_batchnorm=True)
    history = trainer.history
    assert history[-1]["train/loss"] < 0.5 * history[0]["train/loss"]
    assert max(row["validate/acc"] for row in history) > 0.5  # chance is 0.11
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6, 7, 8]
    validated = ["validate/loss", "validate/auc", "validate/acc", "validate/balanced_acc"]
    assert list(history[0]) == ["epoch", "train/loss", *validated, "lr", "tiles_per_second", "seconds"]
    assert all(row["tiles_per_second"] * row["seconds"] > 130 for row in history)


def test_the_same_seed_gives_the_same_history_and_weights(tiny: Dataset, tmp_path: Path, trained: Trainer) -> None:
    torch.rand(7)  # whatever else drew from the global generator must not matter
    again = fitted(tiny, tmp_path / "again", seed=3, n_epochs=2)
    other = fitted(tiny, tmp_path / "other", seed=4, n_epochs=2)
    assert plain(again.history) == plain(trained.history)
    assert_same_weights(best(again)["state_dict"], best(trained)["state_dict"])
    assert plain(other.history) != plain(trained.history)
    streams = ((3, 1, "shuffle"), (4, 1, "shuffle"), (3, 2, "shuffle"), (3, 1, "augment"))
    assert len({loop.derived_seed(*one) for one in streams}) == 4
    assert loop.derived_seed(3, 1, "shuffle") == 2175231517928192371  # else no recorded run can be repeated


def test_training_takes_turned_tiles_in_random_order_and_validation_plain_ones(
    tiny: Dataset, tmp_path: Path
) -> None:
    trainer = trainer_of(tiny, tmp_path, augmentation="dihedral", batch_size=130)  # one step
    seen: list[torch.Tensor] = []
    trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    trainer.train_and_validate(1)
    order = torch.randperm(130, generator=loop.generator(0, 1, "shuffle")).tolist()
    views = torch.randint(8, (130,), generator=loop.generator(0, 1, "augment")).tolist()
    pairs = zip(order, views, strict=True)
    turned = torch.cat([dihedral_view(tiny.train.images[place : place + 1], view) for place, view in pairs])
    assert torch.equal(seen[0], batches_module.normalise(turned))
    assert torch.equal(seen[1], batches_module.normalise(tiny.val.images))


def test_training_stops_early(tiny: Dataset, tmp_path: Path) -> None:
    trainer = fitted(tiny, tmp_path, n_epochs=9, early_stopping_patience=1, early_stopping_delta=1.0)
    assert len(trainer.history) == 2  # no rise of ACC is larger than 1
    stopped = "early stopping: since epoch 1, validate/acc has not improved by more than 1"
    assert trainer.test()["stopped"] == stopped


def test_the_best_weights_are_kept_and_scored_not_the_last(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[int, dict[str, torch.Tensor]] = {}
    accuracies = {1: 0.3, 2: 0.9, 3: 0.5}
    original, original_epoch = Evaluation.epoch_scores, Trainer.train_epoch

    def pretended(self: Evaluation) -> dict[str, float]:
        return {**original(self), "validate/acc": accuracies[len(kept)]}

    def noted(trainer: Trainer, epoch: int) -> float:
        loss = original_epoch(trainer, epoch)
        kept[epoch] = copy.deepcopy(trainer.model.state_dict())
        return loss

    monkeypatch.setattr(Evaluation, "epoch_scores", pretended)
    monkeypatch.setattr(Trainer, "train_epoch", noted)
    trainer = fitted(tiny, tmp_path)
    run, model = trainer.run, trainer.model
    assert trainer.best_epoch == 2
    assert_same_weights(model.state_dict(), kept[3])
    saved = best(trainer)
    assert saved["config"] == trainer.config.as_dict()
    assert_same_weights(saved["state_dict"], kept[2])
    assert_same_weights(checkpoint.load(run.checkpoints / "last.pt")["state_dict"], kept[3])

    summary = trainer.test()
    assert summary["stopped"] == "all epochs done"
    assert summary["wall_seconds"] > sum(row["seconds"] for row in trainer.history)
    assert_same_weights(model.state_dict(), kept[2])
    assert {name: summary[name]["epoch"] for name in ("best", "tta")} == {"best": 2, "tta": 2}
    with np.load(run.folder / "scores.npz", allow_pickle=False) as arrays:
        test = DeviceTiles(tiny.test, CPU.device, 28)
        expected = evaluate(model, test).rounded()
        np.testing.assert_array_equal(arrays["best_logits"], expected.logits)
        assert arrays["best_logits"].dtype == np.float16
        assert summary["best"] == {"epoch": 2, **expected.test_scores()}
        views = evaluate(model, test, tta=True).logits.argmax(1)
        np.testing.assert_array_equal(arrays["tta_classes"], views)
        assert summary["tta"]["acc"]["value"] == np.mean(views == tiny.test.labels.numpy())
        np.testing.assert_array_equal(arrays["targets"], tiny.test.labels)
        np.testing.assert_array_equal(arrays["validate_targets"], tiny.val.labels)
        for name, split in [("validate_classes", tiny.val), *shifted(tiny.val, 28)]:
            predicted = evaluate(model, DeviceTiles(split, CPU.device, 28)).logits.argmax(1)
            np.testing.assert_array_equal(arrays[name if split is tiny.val else f"shifted_{name}"], predicted)
            scores = {"validate_classes": summary["validate"]["validate/acc"], **summary["shifted"]}
            assert scores[name] == np.mean(predicted == tiny.val.labels.numpy())
    assert summary["validate/shifted_acc"] == pytest.approx(np.mean(list(summary["shifted"].values())))


def test_a_run_that_serves_to_choose_a_recipe_never_reads_a_test_tile(tiny: Dataset, tmp_path: Path) -> None:
    trainer = trainer_of(tiny, tmp_path, n_epochs=1, test=False)
    trainer.splits = replace(trainer.splits, test=lambda: pytest.fail("the test tiles were asked for"))
    trainer.fit()
    summary = trainer.test()
    assert not [name for name in summary if name.startswith("test/") or name in ("best", "tta")]
    assert set(summary["shifted"]) == {"lab_statistics", "gamma", "chromatic_noise"}
    with np.load(trainer.run.folder / "scores.npz", allow_pickle=False) as arrays:
        names = {"validate_classes", "validate_targets", *(f"shifted_{name}" for name in summary["shifted"])}
        assert set(arrays.files) == names


def test_checkpoints_of_another_program_are_refused(tiny: Dataset, tmp_path: Path) -> None:
    trainer = trainer_of(tiny, tmp_path)
    nearly = dict.fromkeys(("state_dict", "evaluated_state_dict", "optimizer"))
    for name, read, content in (("best.pt", trainer.test, {"config": {}}), ("last.pt", trainer.restore, nearly)):
        checkpoint.save(trainer.run.checkpoints / name, content)
        with pytest.raises(Fault, match=f"{name}: not a checkpoint of this project"):
            read()
    trainer.history = [row(1, 0.9), row(2)]
    trainer.save_last()
    (trainer.run.checkpoints / "best.pt").unlink()
    with pytest.raises(Fault, match=r"best\.pt: missing; restore it"):
        trainer.restore()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = batches_module.normalise, []

    def poisoned(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        # The second epoch's first step; an epoch is 5 steps and an evaluation.
        return original(images) * (math.nan if len(calls) == 7 else 1)

    monkeypatch.setattr(batches_module, "normalise", poisoned)
    with pytest.raises(Untrainable, match="the loss became nan in epoch 2; start a new run with a lower --lr"):
        fitted(tiny, tmp_path)
    saved = checkpoint.load(tmp_path / "checkpoints" / "r" / "last.pt")
    assert len(saved["history"]) == 1
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_every_step_has_its_learning_rate_and_every_epoch_its_random_numbers(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[Any] = []
    monkeypatch.setattr(loop, "derived_seed", lambda *key: keys.append(key) or len(keys))
    trainer = trainer_of(tiny, tmp_path, seed=5, n_epochs=3, lr=0.01, lr_warmup_epochs=1, label_smoothing=0.99)
    rates: list[float] = []
    groups = trainer.optimizer.param_groups
    trainer.optimizer.register_step_pre_hook(lambda *_: rates.append(groups[0]["lr"]))
    trainer.fit()
    steps = trainer.steps_per_epoch
    expected = [0.01 * learning_rate_factor(step, steps, trainer.config) for step in range(3 * steps)]
    assert rates == pytest.approx(expected)
    assert len(set(rates)) > 2 * steps
    assert keys == [(5, epoch, use) for epoch in (1, 2, 3) for use in ("augment", "dropout", "shuffle")]
    assert all(2.1 < row["train/loss"] < 3 for row in trainer.history)  # the entropy of the targets is 2.19


def test_batchnorm_is_measured_on_random_training_tiles_the_same_in_every_epoch(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tiny, tmp_path, augmentation="ta_wide")
    trainer.splits.train.at_once = 43
    assert sorted(map(len, trainer.clean_inputs())) == [32, 32, 33, 33]  # 130 tiles; not 43, 43, 43 and 1
    monkeypatch.setattr(loop, "BATCHNORM_TILES", 40)
    seen = torch.cat(list(trainer.clean_inputs()))
    assert torch.equal(seen, torch.cat(list(trainer.clean_inputs())))
    rows = batches_module.normalise(tiny.train.images).flatten(1)
    places = [int((rows == row).all(1).nonzero()[0]) for row in seen.flatten(1)]
    assert len(set(places)) == 40
    assert max(places) > 100


def test_an_averages_batchnorm_is_always_measured_and_its_steps_count_through_the_run(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tiny, tmp_path, n_epochs=2, ema_decay=0.9)
    measured: list[Any] = []
    steps: list[int] = []
    monkeypatch.setattr(loop, "reestimate_batchnorm", lambda model, inputs: measured.append(model))
    assert trainer.average is not None
    assert trainer.average.decay == pytest.approx(0.9 ** (1000 / 10))
    monkeypatch.setattr(trainer.average, "update", lambda model, step: steps.append(step))
    trainer.fit()
    assert measured == [trainer.average.model] * 2
    assert steps == list(range(2 * trainer.steps_per_epoch))


def test_training_computes_in_the_precision_that_was_asked_for_and_measuring_and_scoring_in_float32(
    tiny: Dataset, tmp_path: Path
) -> None:
    compute = replace(CPU, dtype=torch.bfloat16)
    trainer = trainer_of(tiny, tmp_path, compute=compute, n_epochs=2, reestimate_batchnorm=True)
    seen: set[tuple[torch.dtype, bool, bool]] = set()
    first = next(module for module in trainer.model.modules() if isinstance(module, torch.nn.Conv2d))
    norm = next(module for module in trainer.model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    first.register_forward_hook(
        lambda module, inputs, outputs: seen.add((outputs.dtype, norm.training, torch.is_grad_enabled()))
    )
    trainer.fit()
    assert seen == {  # a training step, BatchNorm's measurement, and an evaluation
        (torch.bfloat16, True, True),
        (torch.float32, True, False),
        (torch.float32, False, False),
    }


class Unreadable(Compute):
    """PyTorch's "meta" device: its tensors have shapes and no values, as a busy GPU's have none yet."""

    def autocast(self) -> Any:
        return contextlib.nullcontext()  # autocast does not know the device


@pytest.mark.parametrize("augmentation", ["auto", "ta_wide,stain", "dihedral"])
def test_no_training_step_reads_a_value_from_the_device(
    augmentation: str, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Unreadable(torch.device("meta"), torch.float32)
    monkeypatch.setattr(loop, "read_loss", lambda total, epoch: 0.0)  # once a second, and at the epoch's end
    tiles = DeviceTiles(tiny.train, CPU.device, 28, augmentation)
    tiles.tiles, tiles.labels = tiles.tiles.to("meta"), tiles.labels.to("meta")
    tiles.device = compute.device
    monkeypatch.setattr(  # "meta" has no fused optimiser
        loop, "build_optimizer", lambda model, *_: torch.optim.Adam(model.parameters(), foreach=True)
    )
    keys = {"batch_size": 130, "label_smoothing": 0.1, "ema_decay": 0.99}
    trainer = trainer_of(tiny, tmp_path, compute=compute, **keys)
    trainer.splits = replace(trainer.splits, train=tiles)
    trainer.train_epoch(1)  # reading a value raises here


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_cuda_agrees_with_the_cpu(tiny: Dataset, tmp_path: Path) -> None:
    on_cpu = fitted(tiny, tmp_path, n_epochs=1, run_id="cpu")
    on_gpu = fitted(tiny, tmp_path, n_epochs=1, run_id="gpu", compute=Compute.of("cuda", "fp32"))
    losses = [trainer.history[0]["train/loss"] for trainer in (on_cpu, on_gpu)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)

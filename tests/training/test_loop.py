import contextlib
import copy
import dataclasses
import io
import itertools
import math
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, MODEL, trainer_of
from processes import without_timings
from torchvision.transforms.v2 import functional

from common.config import TrainingConfig
from common.data import batches as batches_module
from common.data.batches import DeviceTiles, batches
from common.data.dataset import Dataset, Split
from common.data.shift import shifted
from common.errors import Fault, Untrainable, UsageError
from common.records import checkpoint
from common.records.read import COLUMNS
from common.training import evaluation, loop
from common.training.device import Compute
from common.training.evaluation import Evaluation, best_epoch, evaluate, reason_to_stop
from common.training.loop import Trainer
from common.training.models import build_model
from common.training.optimizer import build_optimizer, learning_rate_factor


def fitted(dataset: Dataset, folder: Path, **keys: Any) -> Trainer:
    """A small network, trained on the tiny data set."""
    trainer = trainer_of(dataset, folder, **keys)
    trainer.fit()
    return trainer


def best_weights(trainer: Trainer) -> Any:
    return checkpoint.load(trainer.run.checkpoints / "best.pt")["state_dict"]


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_training_learns(tiny: Dataset, tmp_path: Path) -> None:
    # Three seeds ended at 0.02 to 0.15 of the first epoch's loss, and reached 0.73 to 0.84 in validation ACC.
    trainer = fitted(tiny, tmp_path, n_epochs=8, lr=0.003, reestimate_batchnorm=True)
    history = trainer.history
    assert history[-1]["train/loss"] < 0.5 * history[0]["train/loss"]
    assert max(row["validate/acc"] for row in history) > 0.5  # chance is 0.11
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert tuple(history[0]) == COLUMNS
    assert trainer.end_reason == "all epochs done"


def test_batchnorm_is_never_measured_on_a_few_leftover_tiles(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "EVALUATION_BATCH", 43)
    trainer = trainer_of(tiny, tmp_path, reestimate_batchnorm=True)
    assert sorted(map(len, trainer.clean_inputs())) == [32, 32, 33, 33]  # 130 tiles; not 43, 43, 43 and 1


def test_the_same_seed_gives_the_same_history_and_weights(tiny: Dataset, tmp_path: Path) -> None:
    one = fitted(tiny, tmp_path / "one", seed=3)
    torch.rand(7)  # whatever else drew from the global generator must not matter
    two = fitted(tiny, tmp_path / "two", seed=3)
    other = fitted(tiny, tmp_path / "other", seed=4)
    assert without_timings(one.history) == without_timings(two.history)
    assert_same_weights(one.evaluated.state_dict(), two.evaluated.state_dict())
    assert_same_weights(best_weights(one), best_weights(two))
    assert without_timings(one.history) != without_timings(other.history)


def test_resume_after_a_stop_gives_the_same_weights(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fitted(tiny, tmp_path / "whole", n_epochs=4)
    original = Trainer.train_epoch

    def killed(trainer: Trainer, epoch: int) -> float:
        if epoch == 3:
            raise KeyboardInterrupt
        return original(trainer, epoch)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "train_epoch", killed)
        fitted(tiny, tmp_path / "parts", n_epochs=4)
    parts = fitted(tiny, tmp_path / "parts", n_epochs=4, resume=True)
    assert without_timings(whole.history) == without_timings(parts.history)
    assert whole.best_epoch == parts.best_epoch
    assert_same_weights(whole.evaluated.state_dict(), parts.evaluated.state_dict())
    assert_same_weights(best_weights(whole), best_weights(parts))


def test_the_best_weights_are_kept_and_tested_not_the_last(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[int, dict[str, torch.Tensor]] = {}
    accuracies = {1: 0.3, 2: 0.9, 3: 0.5}
    original = Evaluation.summary

    def pretended(self: Evaluation, split: str) -> dict[str, float]:
        return {**original(self, split), "validate/acc": accuracies[len(kept)]}

    original_epoch = Trainer.train_epoch

    def noted(trainer: Trainer, epoch: int) -> float:
        loss = original_epoch(trainer, epoch)
        kept[epoch] = copy.deepcopy(trainer.model.state_dict())
        return loss

    monkeypatch.setattr(Evaluation, "summary", pretended)
    monkeypatch.setattr(Trainer, "train_epoch", noted)
    trainer = fitted(tiny, tmp_path)
    run, model = trainer.run, trainer.model
    assert trainer.best_epoch == 2
    assert_same_weights(model.state_dict(), kept[3])
    saved = checkpoint.load(run.checkpoints / "best.pt")
    assert saved["epoch"] == 2
    assert_same_weights(saved["state_dict"], kept[2])
    assert_same_weights(checkpoint.load(run.checkpoints / "last.pt")["state_dict"], kept[3])

    summary = trainer.test()
    assert_same_weights(model.state_dict(), kept[2])
    scores = evaluate(model, DeviceTiles(tiny.test, CPU.device, 28), CPU).rounded()
    assert summary["best"]["epoch"] == 2
    assert summary["last"]["epoch"] == 3
    assert summary["test/acc"] == np.mean(scores.logits.argmax(1) == scores.targets)
    with np.load(run.folder / "scores.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["best_logits"], scores.logits)
        np.testing.assert_array_equal(arrays["targets"], tiny.test.labels)
        assert not np.array_equal(arrays["last_logits"], scores.logits)
        for name, split in shifted(
            tiny.val, 28
        ):  # of the best weights, and without any training tile's augmentation
            expected = evaluate(model, DeviceTiles(split, CPU.device, 28), CPU).logits.argmax(1)
            np.testing.assert_array_equal(arrays[f"shifted_{name}"], expected)
            assert summary["shifted"][name] == np.mean(expected == tiny.val.labels.numpy())
    assert summary["validate/shifted_acc"] == pytest.approx(np.mean(list(summary["shifted"].values())))


def test_the_test_tiles_are_asked_for_when_they_are_scored(tiny: Dataset, tmp_path: Path) -> None:
    trainer, asked = trainer_of(tiny, tmp_path, n_epochs=1), []
    tiles = trainer.splits.test
    trainer.splits = dataclasses.replace(trainer.splits, test=lambda: asked.append(1) or tiles())
    trainer.fit()
    assert not asked
    trainer.test()
    assert asked == [1]


@pytest.mark.parametrize(
    ("select_on", "best"),
    [("validate/acc", 2), ("validate/auc", 1), ("validate/loss", 3), ("last", 4)],
)
def test_selection_follows_its_metric_and_keeps_the_first_of_equals(select_on: str, best: int) -> None:
    rows = [(0.9, 0.5, 2.0), (0.8, 0.7, 3.0), (0.9, 0.7, 1.0), (0.7, 0.1, 1.0)]
    history = [dict(zip(("validate/auc", "validate/acc", "validate/loss"), row, strict=True)) for row in rows]
    assert best_epoch(history, select_on) == best


def stopping_epoch(accuracies: list[float], **keys: Any) -> int:
    """The number of epochs after which training on these validation accuracies ends."""
    config = TrainingConfig(n_epochs=len(accuracies), **keys)
    history = [{"validate/acc": accuracy, "validate/loss": 1 - accuracy} for accuracy in accuracies]
    return next(n for n in range(1, len(history) + 1) if reason_to_stop(history[:n], config))


def test_early_stopping_waits_for_patience_and_asks_for_a_rise_of_delta() -> None:
    flat = [0.5, 0.6, 0.6, 0.59, 0.6, 0.6, 0.6]
    assert stopping_epoch(flat) == 7
    assert stopping_epoch(flat, early_stopping_patience=3) == 5
    # The delta is a difference of ACC: 0.98 is the last rise of more than 0.01.
    rising = [0.96, 0.98, 0.985, 0.989, 0.9899, 0.99875]
    assert stopping_epoch(rising, early_stopping_patience=2, early_stopping_delta=0.01) == 4
    # The rise is counted from the last improvement, not from the epoch before.
    slow = [0.5, 0.506, 0.512, 0.518, 0.524]
    assert stopping_epoch(slow, early_stopping_patience=2, early_stopping_delta=0.01) == 5
    creeping = [0.5, 0.501, 0.502, 0.503, 0.504]
    assert stopping_epoch(creeping, early_stopping_patience=3, early_stopping_delta=0.01) == 4
    assert stopping_epoch(creeping, early_stopping_patience=3) == 5


def test_the_reason_to_stop_names_the_metric_and_the_delta() -> None:
    config = TrainingConfig(early_stopping_patience=1, early_stopping_delta=0.005)
    history = [{"validate/acc": 0.5}, {"validate/acc": 0.501}]
    reason = "early stopping after epoch 2: since epoch 1 no epoch has improved validate/acc by more than 0.005"
    assert reason_to_stop(history, config) == reason


def test_early_stopping_does_not_count_the_warm_up() -> None:
    late = [0.5, 0.4, 0.4, 0.4, 0.6, 0.6, 0.6, 0.6]
    assert stopping_epoch(late, early_stopping_patience=2) == 3
    assert stopping_epoch(late, early_stopping_patience=2, lr_warmup_epochs=3) == 7
    assert stopping_epoch(late, early_stopping_patience=2, lr_warmup_epochs=3, select_on="last") == 7


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = batches_module.normalise
    calls = []

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


def test_a_run_is_continued_only_with_its_own_configuration(tiny: Dataset, tmp_path: Path) -> None:
    fitted(tiny, tmp_path, n_epochs=1)
    with pytest.raises(UsageError, match=r"another configuration \(lr was 0.001\)"):
        fitted(tiny, tmp_path, n_epochs=1, lr=0.5)


def test_resume_without_a_checkpoint_is_refused(tiny: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run r has no checkpoint"):
        fitted(tiny, tmp_path, resume=True)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("n_tiles", "batch_size"), [(130, 32), (129, 32), (33, 32), (45, 2), (2, 64), (64, 2)])
def test_every_tile_is_drawn_once_an_epoch_in_batches_of_one_size(n_tiles: int, batch_size: int) -> None:
    parts = batches(n_tiles, batch_size, CPU.device, torch.Generator().manual_seed(0))
    assert sorted(torch.cat(parts).tolist()) == list(range(n_tiles))
    sizes = {len(part) for part in parts}
    assert min(sizes) >= 2
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= max(batch_size, 3)


def test_every_epoch_is_shuffled_differently() -> None:
    orders = [
        torch.cat(batches(100, 10, CPU.device, loop.generator(seed, epoch, "shuffle"))).tolist()
        for seed in (0, 1)
        for epoch in (1, 2)
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_the_learning_rate_falls_along_a_half_cosine() -> None:
    config = TrainingConfig(n_epochs=10, lr_min=0.1)
    factors = [learning_rate_factor(step, 10, config) for step in range(100)]
    assert factors[0] == 1
    assert factors[49] + factors[50] == pytest.approx(1.1)
    assert factors[99] == pytest.approx(0.1)
    assert factors == sorted(factors, reverse=True)
    constant = TrainingConfig(n_epochs=10, lr_min=1.0)
    assert {learning_rate_factor(step, 10, constant) for step in range(100)} == {1}


def test_the_warm_up_rises_in_a_straight_line_to_the_peak() -> None:
    config = TrainingConfig(n_epochs=10, lr_min=0.1, lr_warmup_epochs=2, lr_warmup_decay=0.1)
    factors = [learning_rate_factor(step, 10, config) for step in range(100)]
    np.testing.assert_allclose(np.diff(factors[:21]), 0.9 / 20)
    assert factors[0] == pytest.approx(0.1)
    assert factors[20] == 1 == max(factors)
    assert factors[99] == pytest.approx(0.1)


def test_norms_and_biases_are_decayed_apart() -> None:
    model = build_model(MODEL, 9, 28)
    config = TrainingConfig(weight_decay=0.3, norm_weight_decay=0.0, optimizer="adamw", amsgrad=True)
    groups = build_optimizer(model, config).param_groups
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert len(decays) == len(list(model.parameters()))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_matrix = isinstance(module, torch.nn.Conv2d | torch.nn.Linear) and name == "weight"
            assert decays[id(parameter)] == (0.3 if is_matrix else 0.0)
    assert all(group["amsgrad"] for group in groups)
    same = build_optimizer(model, TrainingConfig(weight_decay=0.3)).param_groups
    assert {group["weight_decay"] for group in same} == {0.3}


def test_evaluation_is_in_order_in_eval_mode_and_counts_every_tile(
    tiny: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(MODEL, 9, 28)
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", 7)
    before = copy.deepcopy(model.state_dict())
    one = evaluate(model, DeviceTiles(tiny.test, CPU.device, 28), CPU)
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", 63)
    other = evaluate(model, DeviceTiles(tiny.test, CPU.device, 28), CPU)
    np.testing.assert_allclose(one.logits, other.logits, atol=1e-5)
    np.testing.assert_array_equal(one.targets, tiny.test.labels)
    assert_same_weights(before, model.state_dict())


def test_summary_of_an_evaluation_is_that_of_its_logits() -> None:
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.6, 0.1], [0.1, 0.2, 0.7]], np.float32))
    summary = Evaluation(logits, np.array([0, 1, 0, 2])).summary("validate")
    assert summary["validate/acc"] == 0.75
    assert summary["validate/loss"] == pytest.approx(-np.mean(np.log([0.7, 0.8, 0.3, 0.7])))
    assert summary["validate/auc"] == 1.0


def test_bf16_is_close_to_fp32(tiny: Dataset) -> None:
    torch.manual_seed(0)
    model = build_model(MODEL, 9, 28)
    tiles = DeviceTiles(tiny.val, CPU.device, 28)
    full = evaluate(model, tiles, CPU).logits
    half = evaluate(model, tiles, dataclasses.replace(CPU, dtype=torch.bfloat16)).logits
    assert half.dtype == np.float32
    assert 0 < np.abs(full - half).max() < 0.1 * np.abs(full).max()


class Unreadable(Compute):
    """PyTorch's "meta" device: its tensors have shapes and no values, as a busy GPU's have none yet."""

    def autocast(self) -> Any:
        return contextlib.nullcontext()  # autocast does not know the device


@pytest.mark.parametrize("augmentation", ["auto", "ta_wide,stain", "dihedral,channel,scale"])
def test_no_training_step_reads_a_value_from_the_device(
    augmentation: str, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Unreadable(torch.device("meta"), torch.float32)
    monkeypatch.setattr(loop, "read_loss", lambda total, epoch: 0.0)  # once a second, and at the epoch's end
    tiles = DeviceTiles(tiny.train, CPU.device, 28, augmentation)
    tiles.tiles, tiles.labels = tiles.tiles.to("meta"), tiles.labels.to("meta")
    tiles.device = tiles.index_device = compute.device
    monkeypatch.setattr(  # "meta" has no fused optimiser
        loop, "build_optimizer", lambda model, *_: torch.optim.Adam(model.parameters(), foreach=True)
    )
    keys = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0, "label_smoothing": 0.1, "ema_decay": 0.99}
    trainer = trainer_of(tiny, tmp_path, train=tiles, compute=compute, **keys)
    trainer.train_epoch(1)  # reading a value raises here


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_cuda_agrees_with_the_cpu(tiny: Dataset, tmp_path: Path) -> None:
    on_cpu = fitted(tiny, tmp_path, n_epochs=1, run_id="cpu")
    on_gpu = fitted(tiny, tmp_path, n_epochs=1, run_id="gpu", compute=Compute.of("cuda", "fp32"))
    losses = [trainer.history[0]["train/loss"] for trainer in (on_cpu, on_gpu)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_tta_averages_the_probabilities_of_the_eight_views_and_so_ignores_the_tiles_orientation(
    tiny: Dataset,
) -> None:
    torch.manual_seed(0)
    model = build_model("resnet18", 9, 28)
    plain = DeviceTiles(tiny.val, CPU.device, 28)
    images = tiny.val.images
    views = [turned for k in range(4) for turned in (images.rot90(k, (2, 3)), images.rot90(k, (2, 3)).flip(3))]
    model.eval()
    with torch.no_grad():
        expected = torch.stack([model(batches_module.normalise(view)).softmax(1) for view in views]).mean(0)
    averaged = evaluate(model, plain, CPU, tta=True)
    np.testing.assert_allclose(averaged.probabilities, expected, atol=1e-5)
    turned = DeviceTiles(dataclasses.replace(tiny.val, images=images.rot90(1, (2, 3))), CPU.device, 28)
    np.testing.assert_allclose(evaluate(model, turned, CPU, tta=True).logits, averaged.logits, atol=1e-4)
    assert np.abs(evaluate(model, turned, CPU).logits - evaluate(model, plain, CPU).logits).max() > 1e-3


def test_the_scores_of_a_run_can_be_computed_again_from_its_file_of_scores(tiny: Dataset, tmp_path: Path) -> None:
    trainer = fitted(tiny, tmp_path)
    summary = trainer.test()
    with np.load(trainer.run.folder / "scores.npz", allow_pickle=False) as arrays:
        for name in ("last", "best", "tta"):
            again = Evaluation(arrays[f"{name}_logits"], arrays["targets"].astype(np.int64))
            assert again.logits.dtype == np.float16
            assert summary[name] == {"epoch": summary[name]["epoch"], **again.described(tiny.class_names)}


def test_rounded_scores_are_finite_and_close_to_the_networks() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (200, 9)).astype(np.float32)
    logits[0, 0] = 1e9  # a network that has diverged
    exact = Evaluation(logits, np.zeros(200, np.int64))
    rounded = exact.rounded()
    assert np.isfinite(rounded.logits).all()
    np.testing.assert_allclose(rounded.probabilities, exact.probabilities, atol=1e-3)


def test_best_weights_of_another_training_are_refused(tiny: Dataset, tmp_path: Path) -> None:
    trainer = fitted(tiny, tmp_path)
    path = trainer.run.checkpoints / "best.pt"
    saved = checkpoint.load(path)
    saved["history"][0]["train/loss"] += 1e-9
    checkpoint.save(path, saved)
    with pytest.raises(Fault, match=r"best.pt: not the weights of epoch"):
        trainer.test()


def test_best_weights_follow_the_last_checkpoint_when_a_kill_came_between_the_two(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_best, saves = Trainer.save_best, []

    def dying(trainer: Trainer) -> None:
        saves.append(len(trainer.history))
        if len(saves) == 2:
            raise KeyboardInterrupt
        save_best(trainer)

    monkeypatch.setattr(Trainer, "save_best", dying)
    with pytest.raises(KeyboardInterrupt):
        fitted(tiny, tmp_path, select_on="last")
    assert checkpoint.load(tmp_path / "checkpoints/r/best.pt")["epoch"] < saves[-1]
    monkeypatch.undo()
    resumed = trainer_of(tiny, tmp_path, select_on="last")
    saved = checkpoint.load(tmp_path / "checkpoints/r/best.pt")
    assert saved["history"] == resumed.history
    assert_same_weights(saved["state_dict"], resumed.evaluated.state_dict())


@pytest.mark.parametrize("side", [64, 14])
@pytest.mark.parametrize("augmentation", ["none", "ta_wide", "stain"])
def test_inputs_are_those_of_tiles_that_were_resized_in_the_file(
    tiny: Dataset, side: int, augmentation: str
) -> None:
    in_file = functional.resize(tiny.train.images.float(), [side, side], antialias=True)  # torchvision's
    beforehand = Split(in_file.round().to(torch.uint8), tiny.train.labels)
    expected, found = (DeviceTiles(split, CPU.device, side, augmentation) for split in (beforehand, tiny.train))
    indices, draws = torch.arange(9), [torch.Generator().manual_seed(0) for _ in range(2)]
    assert torch.equal(found.inputs(indices, draws[0])[0], expected.inputs(indices, draws[1])[0])
    assert torch.equal(torch.stack(list(found.views(indices)[0])), torch.stack(list(expected.views(indices)[0])))
    assert found.inputs(indices)[0].shape == (9, 3, side, side)


def test_a_network_can_be_trained_on_resized_tiles(tiny: Dataset, tmp_path: Path) -> None:
    trainer = fitted(tiny, tmp_path, model_name="squeezenet1_1", input_size=40, n_epochs=1)
    assert {"shifted", "best"} <= trainer.test().keys()


def test_every_step_has_the_schedules_learning_rate(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tiny, tmp_path, n_epochs=2, lr=0.01, lr_warmup_epochs=1)
    rates: list[float] = []
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    trainer.fit()
    steps = trainer.steps_per_epoch
    expected = [0.01 * learning_rate_factor(step, steps, trainer.config) for step in range(2 * steps)]
    assert rates == pytest.approx(expected)
    assert len(set(rates)) > steps


def test_batchnorm_is_measured_on_random_training_tiles_the_same_in_every_epoch(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "BATCHNORM_TILES", 40)
    trainer = trainer_of(tiny, tmp_path, augmentation="ta_wide")
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
    monkeypatch.setattr(trainer.average, "update", lambda model, step: steps.append(step))
    trainer.fit()
    assert measured == [trainer.average.model] * 2
    assert steps == list(range(2 * trainer.steps_per_epoch))


def test_training_measuring_and_scoring_compute_in_the_precision_that_was_asked_for(
    tiny: Dataset, tmp_path: Path
) -> None:
    compute = dataclasses.replace(CPU, dtype=torch.bfloat16)
    trainer = trainer_of(tiny, tmp_path, compute=compute, n_epochs=1, reestimate_batchnorm=True)
    seen: set[tuple[torch.dtype, bool, bool]] = set()
    first = next(module for module in trainer.model.modules() if isinstance(module, torch.nn.Conv2d))
    norm = next(module for module in trainer.model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    first.register_forward_hook(
        lambda module, inputs, outputs: seen.add((outputs.dtype, norm.training, torch.is_grad_enabled()))
    )
    trainer.fit()
    assert seen == {  # a training step, BatchNorm's measurement, and an evaluation
        (torch.bfloat16, True, True),
        (torch.bfloat16, True, False),
        (torch.bfloat16, False, False),
    }


def test_augmentation_differs_by_seed_and_epoch(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: set[int] = set()
    mix = loop.mix

    def noted(inputs: torch.Tensor, draws: torch.Generator, *alphas: float) -> Any:
        seeds.add(draws.initial_seed())
        return mix(inputs, draws, *alphas)

    monkeypatch.setattr(loop, "mix", noted)
    for seed in (0, 1):
        fitted(tiny, tmp_path / str(seed), seed=seed, n_epochs=2)
    assert len(seeds) == 4


def test_the_file_of_scores_has_the_validation_tiles_of_the_best_weights(tiny: Dataset, tmp_path: Path) -> None:
    trainer = fitted(tiny, tmp_path)
    trainer.test()
    expected = evaluate(trainer.evaluated, DeviceTiles(tiny.val, CPU.device, 28), CPU).rounded()
    with np.load(trainer.run.folder / "scores.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["validate_logits"], expected.logits)
        np.testing.assert_array_equal(arrays["validate_targets"], expected.targets)


def test_on_a_terminal_a_bar_counts_the_runs_tiles_and_elsewhere_there_is_a_line_an_epoch_alone(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted(tiny, tmp_path / "pipe", n_epochs=2)
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()] == ["run", "epoch", "epoch", "training"]
    assert not printed.err
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    clock = SimpleNamespace(monotonic=itertools.count(step=2).__next__, perf_counter=time.perf_counter)
    monkeypatch.setattr(loop, "time", clock)  # as if each step took two seconds
    monkeypatch.setattr(sys, "stderr", terminal)
    fitted(tiny, tmp_path / "terminal", n_epochs=2)
    assert re.search(r"epoch 2/2: .*/260 .*loss=\d", terminal.getvalue())

"""Scores of a split, the best epoch, and early stopping."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, MODEL
from sklearn.metrics import roc_auc_score

from common.cli import Untrainable
from common.config import TrainingConfig
from common.data.batches import DeviceTiles, normalise
from common.data.dataset import Dataset
from common.training.evaluation import Evaluation, best_epoch, evaluate, reason_to_stop
from common.training.models import build_model


@pytest.mark.parametrize(
    ("select_on", "best"), [("validate/acc", 2), ("validate/auc", 1), ("validate/loss", 3), ("last", 4)]
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


def test_early_stopping_does_not_count_the_warm_up() -> None:
    late = [0.5, 0.4, 0.4, 0.4, 0.6, 0.6, 0.6, 0.6]
    assert stopping_epoch(late, early_stopping_patience=2) == 3
    assert stopping_epoch(late, early_stopping_patience=2, lr_warmup_epochs=3) == 7
    assert stopping_epoch(late, early_stopping_patience=2, lr_warmup_epochs=3, select_on="last") == 7
    config = TrainingConfig(early_stopping_patience=2, select_on="last")
    history = [{"validate/acc": acc, "validate/loss": 1.0} for acc in (0.1, 0.2, 0.3)]
    assert reason_to_stop(history, config) == (
        "early stopping: since epoch 1, validate/loss has not improved by more than 0"
    )


def test_evaluation_is_in_order_in_eval_mode_and_counts_every_tile(tiny: Dataset) -> None:
    model = build_model(MODEL, 9, 28)
    tiles, before = DeviceTiles(tiny.test, CPU.device, 28), copy.deepcopy(model.state_dict())
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    tiles.at_once = 7
    one = evaluate(model, tiles)
    assert max(sizes) == 7
    tiles.at_once = 63
    other = evaluate(model, tiles)
    np.testing.assert_allclose(one.logits, other.logits, atol=1e-5)
    np.testing.assert_array_equal(one.targets, tiny.test.labels)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    torch.nn.init.constant_(model.classifier[3].bias, torch.inf)
    with pytest.raises(Untrainable, match="outputs are no longer finite"):
        evaluate(model, tiles)


def test_summary_of_an_evaluation_is_that_of_its_logits() -> None:
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.6, 0.1], [0.1, 0.2, 0.7]], np.float32))
    summary = Evaluation(logits, np.array([0, 1, 0, 2])).epoch_scores()
    assert summary["validate/acc"] == 0.75
    assert summary["validate/loss"] == pytest.approx(-np.mean(np.log([0.7, 0.8, 0.3, 0.7])))
    assert summary["validate/auc"] == 1.0
    assert summary["validate/balanced_acc"] == pytest.approx((0.5 + 1 + 1) / 3)


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
        expected = torch.stack([model(normalise(view)).softmax(1) for view in views]).mean(0)
    averaged = evaluate(model, plain, tta=True)
    np.testing.assert_allclose(averaged.probabilities, expected, atol=1e-5)
    turned = DeviceTiles(replace(tiny.val, images=images.rot90(1, (2, 3))), CPU.device, 28)
    np.testing.assert_allclose(evaluate(model, turned, tta=True).logits, averaged.logits, atol=1e-4)
    assert np.abs(evaluate(model, turned).logits - evaluate(model, plain).logits).max() > 1e-3


def test_rounded_scores_are_finite_and_close_to_the_networks() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (200, 9)).astype(np.float32)
    logits[0, 0] = 1e9  # a network that has diverged
    exact = Evaluation(logits, np.zeros(200, np.int64))
    rounded = exact.rounded()
    assert np.isfinite(rounded.logits).all()
    np.testing.assert_allclose(rounded.probabilities, exact.probabilities, atol=1e-3)


def test_tied_probabilities_stay_tied_where_no_softmax_is_taken_of_their_logarithms() -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(9, size=300)
    votes = (targets[:, None] + rng.choice([0, 0, 0, 1, 3], size=(300, 5))) % 9  # of five nearest neighbours
    probabilities = np.stack([(votes == label).mean(axis=1) for label in range(9)], axis=1)
    expected = roc_auc_score(targets, probabilities, multi_class="ovr", average="macro")
    logarithms = np.log(probabilities.clip(1e-7))
    recorded = Evaluation(logarithms, targets, normalised=True).rounded()
    assert recorded.logits.dtype == np.float16
    assert recorded.epoch_scores()["validate/auc"] == pytest.approx(expected, abs=1e-12)
    assert recorded.test_scores()["auc"]["value"] == pytest.approx(expected, abs=1e-12)
    ranked_at_random = Evaluation(logarithms, targets).rounded().epoch_scores()["validate/auc"]
    assert abs(ranked_at_random - expected) > 1e-5


def test_a_class_without_tiles_has_no_auc() -> None:
    areas = Evaluation(np.zeros((9, 9), np.float32), np.arange(9) % 8).test_scores()["auc_per_class"]
    assert (areas["cancer-associated stroma"], areas["colorectal adenocarcinoma epithelium"]) == (0.5, None)

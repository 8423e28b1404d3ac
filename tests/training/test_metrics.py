"""The measures against medmnist's, sklearn's and scipy's, and the intervals against simulation."""

import numpy as np
import pytest
from medmnist.evaluator import getACC, getAUC
from scipy.special import softmax
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix

from common.training import metrics


def sample(seed, tiles, classes=9, signal=1.0, decimals=None):
    """Random probabilities and targets; a higher `signal` gives better predictions, and every class has tiles."""
    generator = np.random.default_rng(seed)
    targets = np.concatenate([np.arange(classes), generator.integers(classes, size=tiles - classes)])
    logits = generator.normal(size=(tiles, classes)) + signal * np.eye(classes)[targets]
    probabilities = softmax(logits, axis=1)
    return (probabilities if decimals is None else probabilities.round(decimals)), targets


def one_hot(predictions, classes=9):
    return np.eye(classes)[predictions]


TARGETS = sample(0, 500)[1]
SCORES = {
    "large": sample(1, 7180),
    "float32": (sample(2, 400)[0].astype(np.float32), sample(2, 400)[1]),
    "two classes": sample(3, 60, classes=2),
    "tied": sample(4, 500, decimals=1),
    "constant": (np.full((500, 9), 1 / 9), TARGETS),
    "perfect": (one_hot(TARGETS), TARGETS),
    "always wrong": (one_hot((TARGETS + 1) % 9), TARGETS),
    "one-hot": (one_hot(sample(5, 500)[0].argmax(axis=1)), sample(5, 500)[1]),
    "smallest": (np.array([[0.2, 0.8], [0.2, 0.8]]), np.array([0, 1])),
    "uint8 targets": (sample(6, 300, classes=40)[0], sample(6, 300, classes=40)[1].astype(np.uint8)),
}


@pytest.mark.parametrize("case", SCORES)
def test_the_measures_equal_those_of_medmnist_and_sklearn_and_lie_in_their_intervals(case):
    probabilities, targets = SCORES[case]
    predictions, classes = probabilities.argmax(axis=1), range(probabilities.shape[1])
    area = getAUC(targets[:, None], probabilities, "multi-class")
    right = getACC(targets[:, None], probabilities, "multi-class")
    assert metrics.auc(probabilities, targets) == pytest.approx(area, abs=1e-9)
    assert metrics.accuracy(predictions, targets) == pytest.approx(right, abs=1e-9)
    expected = balanced_accuracy_score(targets, predictions)
    assert metrics.balanced_accuracy(predictions, targets) == pytest.approx(expected, abs=1e-9)
    estimates = (metrics.auc_estimate(probabilities, targets), metrics.accuracy_estimate(predictions, targets))
    for estimate, value in zip(estimates, (area, right), strict=True):
        assert estimate.value == pytest.approx(value, abs=1e-9)
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    matrix = metrics.confusion_matrix(predictions, targets, len(classes))
    np.testing.assert_array_equal(matrix, sklearn_confusion_matrix(targets, predictions, labels=classes))


def test_balanced_accuracy_leaves_out_classes_without_tiles():
    targets = np.array([0, 0, 2, 2, 2])
    predictions = np.array([0, 1, 2, 2, 2])
    assert metrics.balanced_accuracy(predictions, targets) == pytest.approx((1 / 2 + 1) / 2)


def test_classes_without_tiles_have_no_auc_and_the_mean_leaves_them_out():
    probabilities, targets = sample(7, 200)
    keep = (targets != 3) & (targets != 8)
    probabilities, targets = probabilities[keep], targets[keep]
    per_class = metrics.auc_per_class(probabilities, targets)
    assert np.flatnonzero(np.isnan(per_class)).tolist() == [3, 8]
    assert metrics.auc(probabilities, targets) == pytest.approx(np.delete(per_class, [3, 8]).mean(), abs=1e-12)
    # The interval does not depend on the absent classes' columns.
    fewer, renumbered = np.delete(probabilities, [3, 8], axis=1), targets - (targets > 3)
    assert metrics.auc_estimate(probabilities, targets) == metrics.auc_estimate(fewer, renumbered)


@pytest.mark.parametrize(("right", "tiles"), [(0, 7), (1, 7), (81, 263), (6750, 7180), (7180, 7180)])
def test_accuracy_interval_is_wilsons(right, tiles):
    targets = (np.arange(tiles) < right).astype(int)
    estimate = metrics.accuracy_estimate(np.ones(tiles, dtype=int), targets)
    expected = binomtest(right, tiles).proportion_ci(0.95, method="wilson")
    assert estimate.value == right / tiles
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def delong_interval(scores, positive):
    """The paper's variance for one AUC, by comparing every pair, and its interval on the logit scale."""
    wins = np.sign(scores[positive][:, None] - scores[~positive]) / 2 + 0.5
    area = wins.mean()
    variance = wins.mean(axis=1).var(ddof=1) / positive.sum() + wins.mean(axis=0).var(ddof=1) / (~positive).sum()
    ends = np.log(area / (1 - area)) + np.array([-1, 1]) * 1.959964 * np.sqrt(variance) / (area * (1 - area))
    return 1 / (1 + np.exp(-ends))


@pytest.mark.parametrize("decimals", [None, 1])
def test_two_classes_have_the_classical_delong_interval(decimals):
    first, targets = sample(10, 80, classes=2, decimals=decimals)
    estimate = metrics.auc_estimate(first, targets)
    assert (estimate.low, estimate.high) == pytest.approx(delong_interval(first[:, 0], targets == 0), abs=1e-6)


@pytest.mark.parametrize("signal", [1.0, 3.0])
def test_auc_interval_covers_the_truth_95_times_in_100(signal):
    truth = metrics.auc(*sample(13, 200_000, signal=signal))
    estimates = [metrics.auc_estimate(*sample(seed, 800, signal=signal)) for seed in range(400)]
    coverage = np.mean([estimate.low <= truth <= estimate.high for estimate in estimates])
    assert coverage == pytest.approx(0.95, abs=0.025)


@pytest.mark.parametrize(
    ("scores", "low", "high"),
    [(np.eye(3), 10 / 13.8415, 1), (np.full((3, 3), 1 / 3), 0.2366, 0.7634), (-np.eye(3), 0, 3.8415 / 13.8415)],
)
def test_without_variance_the_auc_interval_is_wilsons_for_the_rarest_class(scores, low, high):
    # By hand, for the 10 tiles of class 1: n / (n + z²) at 1, and ½ ± ½ z / √(n + z²) at ½.
    targets = np.repeat([0, 1, 2], [20, 10, 30])
    estimate = metrics.auc_estimate(scores[targets], targets)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=1e-4)

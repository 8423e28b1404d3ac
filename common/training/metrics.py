"""The measures of a classifier's predictions, with 95 % intervals.

AUC and accuracy equal those of `medmnist.Evaluator`, so they compare with the published PathMNIST numbers.
`probabilities` is always an (N, C) float array with a row per tile and a column per class, `predicted` the (N,)
integer array of predicted classes, and `targets` that of true classes.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z = 1.959963984540054  # 95 % of the standard normal distribution lies between −Z and Z


@dataclass(frozen=True)
class Estimate:
    """A value and the two ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float


def auc_per_class(probabilities: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
    """The area under the ROC curve of each class against all others, (C,) float64.

    It is NaN for a class that has no tiles or has all of them.
    """
    # The mean placement is the AUC over the class's tiles and over the other tiles, so over all tiles too.
    return np.asarray(_placements(probabilities, targets).mean(axis=0))


def auc(probabilities: NDArray[Any], targets: NDArray[Any]) -> float:
    """The unweighted mean over the classes that have an AUC, as `medmnist.Evaluator` reports it."""
    return float(np.nanmean(auc_per_class(probabilities, targets)))


def accuracy(predicted: NDArray[Any], targets: NDArray[Any]) -> float:
    """The share of tiles whose predicted class is the true one."""
    return float((predicted == targets).mean())


def balanced_accuracy(predicted: NDArray[Any], targets: NDArray[Any]) -> float:
    """The unweighted mean of the recalls of the classes that have tiles."""
    return float(np.mean([accuracy(predicted[targets == label], label) for label in np.unique(targets)]))


def confusion_matrix(predicted: NDArray[Any], targets: NDArray[Any], classes: int) -> NDArray[np.int64]:
    """The number of tiles by true class (row) and predicted class (column), (C, C) int64."""
    # MedMNIST stores targets as uint8, in which the product would overflow.
    cells = targets.astype(np.int64) * classes + predicted
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes).astype(np.int64)


def recalls(matrix: ArrayLike) -> NDArray[np.float64]:
    """Each class's share of right predictions, (C,), from a confusion matrix (C, C); NaN for one without tiles."""
    counts = np.sum(matrix, axis=1)
    return np.where(counts > 0, np.diagonal(matrix) / np.maximum(counts, 1), np.nan)


def accuracy_estimate(predicted: NDArray[Any], targets: NDArray[Any]) -> Estimate:
    """The accuracy with its Wilson score interval (E. B. Wilson, JASA 22, 1927)."""
    return _wilson(accuracy(predicted, targets), len(targets))


def auc_estimate(probabilities: NDArray[Any], targets: NDArray[Any]) -> Estimate:
    """The mean AUC, as `auc` computes it, with DeLong's interval on the logit scale.

    E. R. DeLong, D. M. DeLong and D. L. Clarke-Pearson, Biometrics 44, 1988: the error of an AUC is the sum of the
    tiles' contributions, each a placement minus the AUC. A tile contributes to the AUC of every class, so its
    contributions are added before they are squared; this includes the covariance between classes. If a class has a
    single tile, the interval is too narrow. If the variance is 0 (perfect separation, constant scores), it is
    Wilson's for the number of tiles of the rarest class: too wide rather than too narrow.
    """
    placements = _placements(probabilities, targets)
    areas = placements.mean(axis=0)
    value, defined = float(np.nanmean(areas)), ~np.isnan(areas)
    positive = targets[:, None] == np.flatnonzero(defined)
    positives = positive.sum(axis=0)
    # The number n of tiles on the same side of a class. A sum of squares divided by n (n − 1) is the unbiased
    # variance of a mean; max() prevents 0/0 for a single tile.
    same_side = np.where(positive, positives, len(targets) - positives)
    scale = np.sqrt(same_side * np.maximum(same_side - 1, 1))
    contributions = ((placements[:, defined] - areas[defined]) / scale).mean(axis=1)
    variance = float(np.square(contributions).sum())
    if variance == 0 or value in (0, 1):
        return _wilson(value, int(same_side.min()))
    half_width = Z * math.sqrt(variance) / (value * (1 - value))
    centre = math.log(value / (1 - value))
    # ½ (1 + tanh(x / 2)) is the logistic function in a form that cannot overflow.
    low, high = (0.5 * (1 + math.tanh(end / 2)) for end in (centre - half_width, centre + half_width))
    return Estimate(value, low, high)


def _placements(probabilities: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
    """For each tile and class, the share of tiles on the class's other side that are ranked correctly against it.

    A tile of the class must have a higher score than a tile of another class; a tie counts half, as in the
    trapezoidal ROC area. (N, C) float64; NaN for a class without an AUC.
    """
    placements = np.full(probabilities.shape, np.nan)
    for label, scores in enumerate(probabilities.T):
        positive = targets == label
        if positive.any() and not positive.all():
            placements[positive, label] = _share_below(scores[positive], scores[~positive])
            placements[~positive, label] = 1 - _share_below(scores[~positive], scores[positive])
    return placements


def _share_below(scores: NDArray[Any], others: NDArray[Any]) -> NDArray[np.float64]:
    """For each score, the share of `others` below it, a tie counting half."""
    ordered = np.sort(others)
    below, not_above = np.searchsorted(ordered, scores, "left"), np.searchsorted(ordered, scores, "right")
    return np.asarray((below + not_above) / (2 * len(ordered)))


def _wilson(share: float, count: int) -> Estimate:
    """Wilson's interval of a share of `count` tiles."""
    shrink = 1 / (1 + Z**2 / count)
    centre = shrink * (share + Z**2 / (2 * count))
    half_width = shrink * Z * math.sqrt(share * (1 - share) / count + (Z / (2 * count)) ** 2)
    # 0 ≤ low ≤ share ≤ high ≤ 1 but for rounding errors.
    low, high = max(0.0, min(share, centre - half_width)), min(1.0, max(share, centre + half_width))
    return Estimate(share, low, high)

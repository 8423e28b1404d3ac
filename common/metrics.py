"""The measures of a classifier's test probabilities, each a pure function of arrays, with 95 % intervals.

AUC and accuracy are those of `medmnist.Evaluator`, so they compare with the published PathMNIST numbers.
Throughout, `probabilities` is an (N, C) float array, one row a tile and one column a class, and `targets`
is the (N,) integer array of true classes. Every function that takes the pair raises ValueError when the
shapes disagree, N is 0, a probability is not finite, or a target is not an integer of 0 … C − 1. numpy is
the only import because the command line waits for this module.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The standard normal's 97.5 % point: 95 % of it lies within ± this.
Z = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A value and the two ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Turn (N, C) logits of any float type into (N, C) float64 probabilities whose rows sum to 1.

    Raises ValueError for another shape or a logit that is not finite.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must have shape (N, C), not {logits.shape}")
    if not np.isfinite(logits).all():
        raise ValueError("logits contain NaN or infinity")
    # float64 first: less the row's maximum, exp cannot overflow, but in float16 the difference itself could.
    wide = logits.astype(np.float64)
    exponentials = np.exp(wide - wide.max(axis=1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=1, keepdims=True))


def auc_per_class(probabilities: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
    """Each class's area under the ROC curve, one class against the rest: (C,) float64.

    A class that is absent from the targets, or is all there is, has no AUC and gets NaN.
    """
    _check(probabilities, targets)
    # A class's placements average to its AUC over its own tiles and over all others, so over all tiles too.
    return np.asarray(_placements(probabilities, targets).mean(axis=0))


def auc(probabilities: NDArray[Any], targets: NDArray[Any]) -> float:
    """The unweighted mean of `auc_per_class`, as `medmnist.Evaluator` reports it.

    Classes without an AUC are left out with a UserWarning that names them; without any class it is NaN.
    """
    return _mean_of_defined(auc_per_class(probabilities, targets))


def accuracy(probabilities: NDArray[Any], targets: NDArray[Any]) -> float:
    """The share of tiles whose most probable class is the true one (of equals, the first class counts)."""
    _check(probabilities, targets)
    return float((probabilities.argmax(axis=1) == targets).mean())


def balanced_accuracy(probabilities: NDArray[Any], targets: NDArray[Any]) -> float:
    """The unweighted mean of the recalls of the classes that have tiles.

    The recall of a class is the accuracy over its tiles.
    """
    return float(_recalls(probabilities, targets)[0].mean())


def confusion_matrix(probabilities: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.int64]:
    """Count the tiles by true class (row) and predicted class (column): (C, C) int64."""
    _check(probabilities, targets)
    classes = probabilities.shape[1]
    # Wide integers first: a uint8 target, as MedMNIST stores it, times C would wrap around.
    cells = targets.astype(np.int64) * classes + probabilities.argmax(axis=1)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes).astype(np.int64)


def expected_calibration_error(probabilities: NDArray[Any], targets: NDArray[Any], bins: int = 15) -> float:
    """The mean gap between confidence and accuracy, over equal-width bins of the top probability.

    Bin m of M holds the confidences in ((m − 1)/M, m/M], and weighs as its share of the tiles: C. Guo et
    al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3. Raises ValueError also when
    `bins` is below 1 or a row is no probability distribution (logits, say).
    """
    _check(probabilities, targets)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")
    sums = probabilities.sum(axis=1, dtype=np.float64)
    if probabilities.min() < 0 or not np.allclose(sums, 1, atol=1e-3):
        raise ValueError("each row of probabilities must be non-negative and sum to 1")
    confidence = probabilities.max(axis=1).astype(np.float64)
    correct = probabilities.argmax(axis=1) == targets
    inner_edges = np.arange(1, bins) / bins
    # Within a bin, |accuracy − confidence| times the bin's share is |sum of the differences| / N.
    gaps = np.bincount(np.searchsorted(inner_edges, confidence), weights=correct - confidence)
    return float(np.abs(gaps).sum() / len(targets))


def accuracy_estimate(probabilities: NDArray[Any], targets: NDArray[Any]) -> Estimate:
    """The accuracy with its Wilson score interval (E. B. Wilson, JASA 22, 1927)."""
    return _wilson(accuracy(probabilities, targets), len(targets))


def balanced_accuracy_estimate(probabilities: NDArray[Any], targets: NDArray[Any]) -> Estimate:
    """The balanced accuracy with its Wilson score interval for the effective number of tiles.

    The effective number is the number of tiles for which a plain accuracy of the same value has the variance
    that the mean of the recalls has: C. Franco, R. J. A. Little, T. A. Louis and E. V. Slud, Journal of Survey
    Statistics and Methodology 7, 2019. The number of tiles of each class counts as fixed. The variance is that of
    recalls with one right and one wrong tile added to each class: a class of few tiles that are all right is
    not certain. With one class, or classes of equal size and recall, the effective number is the number of tiles.
    """
    recalls, counts = _recalls(probabilities, targets)
    adjusted = (recalls * counts + 1) / (counts + 2)
    variance = (adjusted * (1 - adjusted) / counts).sum() / len(counts) ** 2
    mean = adjusted.mean()
    return _wilson(float(recalls.mean()), float(mean * (1 - mean) / variance))


def auc_estimate(probabilities: NDArray[Any], targets: NDArray[Any]) -> Estimate:
    """The mean AUC, as `auc` gives it and with its warning, with DeLong's interval on the logit scale.

    E. R. DeLong, D. M. DeLong and D. L. Clarke-Pearson, Biometrics 44, 1988: an AUC's error is the sum of
    what each tile contributes, its placement minus the AUC. Here a tile contributes to every class's AUC
    at once, positive for one and negative for the others, so the contributions are added up before they
    are squared; that is what carries the covariance between classes. With two classes, whose AUCs are
    equal, it is the paper's variance S10/m + S01/n. The tiles count as independent random draws, class
    included; a test set drawn to fixed numbers a class has somewhat less variance. A class with a single
    tile adds nothing to the variance of its own side, so the interval is then too narrow.

    Where that variance is 0 (perfect separation, constant scores), it says nothing about the error, and
    the interval is Wilson's for as many independent pairs of tiles as the rarest class offers: cautious,
    because the AUC uses all pairs. Without any class to average, all three numbers are NaN.
    """
    _check(probabilities, targets)
    placements = _placements(probabilities, targets)
    areas = placements.mean(axis=0)
    value = _mean_of_defined(areas)
    if math.isnan(value):
        return Estimate(value, value, value)
    defined = ~np.isnan(areas)
    positive = targets[:, None] == np.flatnonzero(defined)
    positives = positive.sum(axis=0)
    # The tiles on the same side of a class. Dividing a contribution by √(n (n − 1)), not n, makes the sum
    # of its squares the unbiased variance (n − 1 below) of the mean; max() spares a single tile 0/0.
    same_side = np.where(positive, positives, len(targets) - positives)
    scale = np.sqrt(same_side * np.maximum(same_side - 1, 1))
    contributions = ((placements[:, defined] - areas[defined]) / scale).mean(axis=1)
    variance = float(np.square(contributions).sum())
    if variance == 0 or value in (0, 1):
        return _wilson(value, int(same_side.min()))
    half_width = Z * math.sqrt(variance) / (value * (1 - value))
    centre = math.log(value / (1 - value))
    # Back from the logit by ½ (1 + tanh(x / 2)), the logistic function in a form that cannot overflow.
    low, high = (0.5 * (1 + math.tanh(end / 2)) for end in (centre - half_width, centre + half_width))
    return Estimate(value, low, high)


def _check(probabilities: NDArray[Any], targets: NDArray[Any]) -> None:
    """Raise ValueError for anything that the module's docstring rules out."""
    if probabilities.ndim != 2 or targets.shape != probabilities.shape[:1]:
        shapes = f"{probabilities.shape} and {targets.shape}"
        raise ValueError(f"probabilities and targets must have shapes (N, C) and (N,), not {shapes}")
    if probabilities.size == 0:
        raise ValueError(f"there is nothing to measure: probabilities have shape {probabilities.shape}")
    if not np.isfinite(probabilities).all():
        raise ValueError("probabilities contain NaN or infinity")
    if not np.issubdtype(targets.dtype, np.integer):
        raise ValueError(f"targets must be integers, not {targets.dtype}")
    classes = probabilities.shape[1]
    if targets.min() < 0 or targets.max() >= classes:
        raise ValueError(f"targets must lie in 0 … {classes - 1}, not {targets.min()} … {targets.max()}")


def _recalls(probabilities: NDArray[Any], targets: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The recall and the number of tiles of each class that has tiles."""
    matrix = confusion_matrix(probabilities, targets)
    counts = matrix.sum(axis=1)
    present = counts > 0
    return matrix.diagonal()[present] / counts[present], counts[present]


def _placements(probabilities: NDArray[Any], targets: NDArray[Any]) -> NDArray[np.float64]:
    """For each tile and class, the share of the other side that the tile is ranked rightly against.

    A class's tile is ranked rightly against a tile of another class that scores lower; a tie counts half,
    as in the trapezoidal ROC area. (N, C) float64; the columns of classes without an AUC are NaN.
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


def _mean_of_defined(areas: NDArray[np.float64]) -> float:
    """Average the AUCs that are not NaN; warn of those that are, at the line that called this module."""
    undefined, defined = np.flatnonzero(np.isnan(areas)), areas[~np.isnan(areas)]
    if len(undefined):
        reason = f"no AUC for class {', '.join(map(str, undefined))} (absent from the targets, or all there is)"
        rest = f"the mean is over the other {len(defined)} of {len(areas)} classes"
        warnings.warn(f"{reason}: {rest}", UserWarning, stacklevel=3)
    return float(defined.mean()) if len(defined) else math.nan


def _wilson(share: float, count: float) -> Estimate:
    shrink = 1 / (1 + Z**2 / count)
    centre = shrink * (share + Z**2 / (2 * count))
    half_width = shrink * Z * math.sqrt(share * (1 - share) / count + (Z / (2 * count)) ** 2)
    # In exact arithmetic 0 ≤ low ≤ share ≤ high ≤ 1; at shares of 0 and 1 rounding may break that.
    low, high = max(0.0, min(share, centre - half_width)), min(1.0, max(share, centre + half_width))
    return Estimate(share, low, high)

"""Score a split: the logits of every tile, and the measures that follow; which epoch is best, and when to stop."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.cli import Untrainable, progress
from common.config import TrainingConfig
from common.data.batches import Tiles, batches
from common.data.pathmnist import CLASS_NAMES
from common.data.shift import SHIFTS
from common.training import metrics

LOWEST = float(np.finfo(np.float16).min)
EQUAL = 1e-9  # the last digits of a sum differ between kinds of CPU

History = Sequence[Mapping[str, float]]  # one row for each epoch, as in history.csv


@dataclass(frozen=True)
class Evaluation:
    """The logits (N, C), float32 or float16, and the targets (N,) int64 of a split, in its order.

    If `normalised` is set, the logits are log-probabilities of a baseline. Then exp gives the probabilities: the
    rounding in a softmax would rank tied tiles at random.
    """

    logits: np.ndarray
    targets: np.ndarray
    normalised: bool = False

    def rounded(self) -> "Evaluation":
        """The same as scores.npz keeps it: the logits are log-probabilities in float16, three digits of each."""
        logarithms = torch.from_numpy(self.logits).double()
        logarithms = logarithms if self.normalised else logarithms.log_softmax(1)
        return replace(self, logits=logarithms.clamp(min=LOWEST).numpy().astype(np.float16))

    @property
    def predicted(self) -> np.ndarray:
        """The class with the highest logit, of equal ones the first, (N,) uint8."""
        return np.asarray(self.logits.argmax(1), np.uint8)

    @property
    def probabilities(self) -> np.ndarray:
        """Softmax of the logits, or their exponentials if they are `normalised`, (N, C) float64."""
        logits = torch.from_numpy(self.logits).double()
        return (logits.exp() if self.normalised else logits.softmax(1)).numpy()

    def epoch_scores(self) -> dict[str, float]:
        """The validation scores by the coursework's keys: mean cross-entropy (nats), AUC, ACC and balanced ACC."""
        logits, probabilities, targets = torch.from_numpy(self.logits), self.probabilities, self.targets
        return {
            "validate/loss": F.cross_entropy(logits.float(), torch.from_numpy(targets)).item(),
            "validate/auc": metrics.auc(probabilities, targets),
            "validate/acc": metrics.accuracy(self.predicted, targets),
            "validate/balanced_acc": metrics.balanced_accuracy(self.predicted, targets),
        }

    def test_scores(self) -> dict[str, Any]:
        """All measures of the test split, AUC and ACC with their intervals, ready for JSON."""
        probabilities, targets = self.probabilities, self.targets
        areas = [None if math.isnan(a) else a for a in metrics.auc_per_class(probabilities, targets).tolist()]
        return {
            **scores_of_classes(self.predicted, targets),
            "auc": vars(metrics.auc_estimate(probabilities, targets)),
            "auc_per_class": dict(zip(CLASS_NAMES, areas, strict=True)),
        }


def scores_of_classes(predicted: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """The measures of the test split that follow from the predicted classes (N,), ready for JSON."""
    return {
        "n": len(targets),
        "acc": vars(metrics.accuracy_estimate(predicted, targets)),
        "balanced_acc": {"value": metrics.balanced_accuracy(predicted, targets)},
        "confusion_matrix": metrics.confusion_matrix(predicted, targets, len(CLASS_NAMES)).tolist(),
    }


def scores_of(
    arrays: Mapping[str, np.ndarray], normalised: bool = False, history: History = (), select_on: str = "last"
) -> dict[str, Any]:
    """The scores of summary.json: they follow from the arrays of scores.npz, and from the history if there is one.

    These are, of the test tiles, `best_logits` (N, C) float16, as `Evaluation.rounded` gives them, the predicted
    classes `tta_classes` and `targets`; of the validation tiles the predicted classes `validate_classes`,
    `shifted_*` and `validate_targets`. Classes are (N,) integers. Those of the test tiles may be missing.
    """
    summary: dict[str, Any] = {}
    if "best_logits" in arrays:
        targets = arrays["targets"].astype(np.int64)
        summary["best"] = Evaluation(arrays["best_logits"], targets, normalised).test_scores()
        summary |= {f"test/{name}": summary["best"][name]["value"] for name in ("auc", "acc")}
    if "tta_classes" in arrays:
        summary["tta"] = scores_of_classes(arrays["tta_classes"], arrays["targets"])
    predicted, targets = arrays["validate_classes"], arrays["validate_targets"]
    summary["validate"] = {
        "validate/acc": metrics.accuracy(predicted, targets),
        "validate/balanced_acc": metrics.balanced_accuracy(predicted, targets),
    }
    shifted = {name: metrics.accuracy(arrays[f"shifted_{name}"], targets) for name in SHIFTS}
    if history:
        best = best_epoch(history, select_on)
        summary["validate"] = {**history[best - 1], **summary["validate"]}
        for name in summary.keys() & {"best", "tta"}:
            summary[name]["epoch"] = best
    return {**summary, "shifted": shifted, "validate/shifted_acc": fmean(shifted.values())}


def score_difference(recorded: Any, computed: Any, key: str = "") -> str:
    """Where two JSON values differ, numbers by more than rounding, in words; an empty string without one."""
    if isinstance(computed, Mapping) and isinstance(recorded, Mapping):
        inner = [(f"{key}.{name}".strip("."), recorded.get(name), value) for name, value in computed.items()]
        differing = (score_difference(before, now, name) for name, before, now in inner)
        return next(filter(None, differing), "")
    same = recorded == computed
    if isinstance(recorded, int | float) and isinstance(computed, int | float):
        same = abs(recorded - computed) <= EQUAL
    return "" if same else f"{key}: it is {recorded}, the run's outputs and history give {computed}"


@torch.no_grad()
def evaluate(model: nn.Module, tiles: Tiles, tta: bool = False) -> Evaluation:
    """The logits of every tile in order, computed in float32; the model is put into eval mode.

    With `tta` the logits are the logarithm of the mean probability over the 8 dihedral views of the tile.
    Raises Untrainable where a logit is not finite.
    """
    model.eval()
    logits, targets = [], []
    for batch in progress(batches(len(tiles), tiles.at_once), desc="evaluate", unit=" batches", leave=False):
        if tta:
            inputs, labels = tiles.views(batch)
            views = [model(view).log_softmax(1) for view in inputs]
            logits.append(torch.stack(views).logsumexp(0) - math.log(len(views)))
        else:
            images, labels = tiles.inputs(batch)
            logits.append(model(images))
        targets.append(labels)
    scores = torch.cat(logits)
    if not scores.isfinite().all():
        raise Untrainable("the network's outputs are no longer finite; start a new run with a lower --lr")
    return Evaluation(scores.cpu().numpy(), torch.cat(targets).cpu().numpy())


def best_epoch(history: History, select_on: str) -> int:
    """The number of the epoch with the smallest error by `select_on` (of equal ones the first), or of the last."""
    if select_on == "last":
        return len(history)
    errors = [_error(row, select_on) for row in history]
    return errors.index(min(errors)) + 1


def reason_to_stop(history: History, config: TrainingConfig) -> str:
    """Why training ends after these epochs, or an empty string where it continues.

    Early stopping counts the epochs after the warm-up since the last improvement by more than the delta, as in
    Keras and Lightning. With `select_on=last` the score is the validation loss.
    """
    if len(history) >= config.n_epochs:
        return "all epochs done"
    if config.early_stopping_patience is None:
        return ""
    metric = "validate/loss" if config.select_on == "last" else config.select_on
    reference, reference_epoch = math.inf, config.lr_warmup_epochs
    for epoch, row in enumerate(history, start=1):
        error = _error(row, metric)
        if error < reference - config.early_stopping_delta:
            reference, reference_epoch = error, max(epoch, config.lr_warmup_epochs)
    if len(history) - reference_epoch < config.early_stopping_patience:
        return ""
    delta = f"{config.early_stopping_delta:g}"
    return f"early stopping: since epoch {reference_epoch}, {metric} has not improved by more than {delta}"


def _error(row: Mapping[str, float], metric: str) -> float:
    """The loss, or 1 - AUC, or 1 - ACC: smaller is better."""
    return row[metric] if metric == "validate/loss" else 1 - row[metric]

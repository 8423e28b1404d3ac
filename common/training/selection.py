"""Which epoch is the best one, and when training ends: the history alone decides both."""

import math
from collections.abc import Mapping, Sequence

from common.config import TrainingConfig

History = Sequence[Mapping[str, float]]  # one row for each epoch, as in history.csv


def best_epoch(history: History, select_on: str) -> int:
    """The number of the epoch with the smallest error by `select_on` (of equal ones the first), or of the last."""
    if select_on == "last":
        return len(history)
    errors = [_error(row, select_on) for row in history]
    return errors.index(min(errors)) + 1


def reason_to_stop(history: History, config: TrainingConfig) -> str:
    """Why training ends after these epochs, or an empty string where it continues.

    Early stopping counts the epochs since the score last improved by more than `early_stopping_delta` over the
    last improvement, as in Keras and Lightning. Epochs of the warm-up do not count. With `select_on=last` the
    score is the validation loss.
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
    return (
        f"early stopping after epoch {len(history)}: since epoch {reference_epoch} no epoch has "
        f"improved {metric} by more than {config.early_stopping_delta:g}"
    )


def _error(row: Mapping[str, float], metric: str) -> float:
    """The loss, or 1 - AUC, or 1 - ACC: smaller is better."""
    return row[metric] if metric == "validate/loss" else 1 - row[metric]

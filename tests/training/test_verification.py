"""A score of a record that its own outputs do not give is a Fault that names file and key."""

import numpy as np
import pytest
from conftest import ROOT

from common.cli import Fault
from common.records.read import Record
from common.training.verification import check_scores


def task1(**replaced: np.ndarray | None) -> Record:
    """The record of task1-0, some of whose arrays are replaced, or missing where None replaces them."""
    record = Record.read(ROOT, "task1-0")
    arrays = {name: one for name, one in {**record.arrays(), **replaced}.items() if one is not None}
    object.__setattr__(record, "arrays", lambda: arrays)
    return record


@pytest.mark.parametrize("name", ["validate/acc", "validate/balanced_acc"])
def test_a_validation_score_that_the_history_but_not_the_outputs_give_is_named(name: str) -> None:
    record = task1()
    record.summary["validate"][name] -= 2e-3
    record.history[-1][name] -= 2e-3
    with pytest.raises(Fault, match=rf"summary\.json: .*validate\.{name}: it is 0\.\d+, the run's outputs"):
        check_scores(record)


@pytest.mark.parametrize("split", ["test", "val"])
def test_replaced_and_permuted_labels_are_noticed(split: str) -> None:
    name = {"test": "targets", "val": "validate_targets"}[split]
    labels = task1().arrays()[name]
    replaced, permuted = labels.copy(), np.roll(labels, 1)
    replaced[:300] = (replaced[:300] + 1) % 9
    for other in (replaced, permuted):
        changed = task1(**{name: other})
        with pytest.raises(Fault, match=rf"scores\.npz: .*its {split} labels are not those of PathMNIST"):
            check_scores(changed)


@pytest.mark.parametrize(
    ("array", "message"),
    [("shifted_gamma", "'shifted_gamma'"), ("tta_classes", "no outputs for 'tta'"), ("best_logits", "for 'best'")],
)
def test_a_record_that_lacks_an_array_is_named(array: str, message: str) -> None:
    with pytest.raises(Fault, match=message):
        check_scores(task1(**{array: None}))


def test_the_last_digits_of_a_score_may_be_those_of_another_kind_of_cpu() -> None:
    record = task1()
    record.summary["best"]["auc"]["low"] += 1e-12
    check_scores(record)

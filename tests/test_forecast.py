"""The rank correlations of validation scores with the test ACC, and their intervals over configurations."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from study.forecast import rank_correlations

DRAWS = np.random.default_rng(3)
COMMON = DRAWS.normal(size=(12, 1))
GROUPS = [
    runs[None] for runs in COMMON + DRAWS.normal(size=(12, 3)) * [0.1, 0.1, 5]
]  # 12 configurations, one run each


def test_the_correlations_are_spearman_s_and_their_intervals_tell_a_relation_from_none() -> None:
    related, unrelated = rank_correlations(GROUPS)
    runs = np.concatenate(GROUPS)
    assert related.value == pytest.approx(spearmanr(runs[:, 0], runs[:, 1]).statistic)
    assert 0.5 < related.low < related.value < related.high <= 1
    assert unrelated.low < 0 < unrelated.high
    # Fisher's z of n = 12 pairs has the standard error 1 / sqrt(n - 3).
    assert unrelated.high - unrelated.low == pytest.approx(2 * 1.96 / 3, rel=0.25)


def test_more_seeds_of_the_same_configurations_do_not_narrow_the_interval() -> None:
    repeated = rank_correlations([np.repeat(runs, 5, axis=0) for runs in GROUPS])
    for once, often in zip(rank_correlations(GROUPS), repeated, strict=True):
        assert (often.low, often.high) == pytest.approx((once.low, once.high))

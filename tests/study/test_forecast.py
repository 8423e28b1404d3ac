"""The rank correlations of validation scores with the test ACC, and their intervals over configurations."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from study.forecast import SCORES, forecast, rank_correlations

DRAWS = np.random.default_rng(3)
COMMON = DRAWS.normal(size=(12, 1))
GROUPS = [
    runs[None] for runs in COMMON + DRAWS.normal(size=(12, 3)) * [0.1, 0.1, 5]
]  # 12 configurations, one run each


def test_the_correlations_are_spearman_s_and_their_intervals_tell_a_relation_from_none() -> None:
    related, unrelated = rank_correlations(GROUPS)[0]
    runs = np.concatenate(GROUPS)
    assert related.value == pytest.approx(spearmanr(runs[:, 0], runs[:, 1]).statistic)
    assert 0.5 < related.low < related.value < related.high <= 1
    assert unrelated.low < 0 < unrelated.high
    # Fisher's z of n = 12 pairs has the standard error 1 / sqrt(n - 3).
    assert unrelated.high - unrelated.low == pytest.approx(2 * 1.96 / 3, rel=0.25)


def test_a_difference_of_two_correlations_is_drawn_together_with_both() -> None:
    near = [np.append(runs, runs[:, [1]] + 1e-3 * DRAWS.normal(size=(1, 1)), axis=1) for runs in GROUPS]
    correlations, gains = rank_correlations(near, usual=1)
    assert gains[1].value == gains[1].low == gains[1].high == 0
    assert [one.value for one in gains] == [one.value - correlations[1].value for one in correlations]
    assert gains[0].low > 0  # score 0 is related to the test score, score 1 is not
    # Scores 0 and 2 are nearly the same: their difference is known better than either of them.
    between = rank_correlations(near, usual=2)[1][0]
    assert between.high - between.low < 0.3 * (correlations[0].high - correlations[0].low)


def test_a_draw_of_one_configuration_alone_has_no_correlation_and_does_not_count() -> None:
    few = GROUPS[:5]  # about three of 2,000 draws hold one of them five times
    assert all(np.isfinite(list(vars(one).values())).all() for part in rank_correlations(few) for one in part)


def test_more_seeds_of_the_same_configurations_do_not_narrow_the_interval() -> None:
    repeated = rank_correlations([np.repeat(runs, 5, axis=0) for runs in GROUPS])[0]
    for once, often in zip(rank_correlations(GROUPS)[0], repeated, strict=True):
        assert (often.low, often.high) == pytest.approx((once.low, once.high))


class Configuration:
    """Runs with given scores (runs, 1 + scores): the test ACC and SCORES; their seeds are 0, 1 and so on."""

    def __init__(self, runs: np.ndarray) -> None:
        self.runs = runs

    def by_seed(self, *keys: str) -> dict[int, float]:
        column = [("best", "acc"), *SCORES.values()].index(keys)
        return dict(enumerate(self.runs[:, column]))


def test_a_run_that_repeats_an_earlier_one_to_the_last_digit_counts_once() -> None:
    groups = [Configuration(DRAWS.random((2, 1 + len(SCORES)))) for _ in range(5)]
    without = forecast(groups)  # type: ignore[arg-type]
    half = np.concatenate([groups[0].runs[:1], DRAWS.random((1, 1 + len(SCORES)))])
    found = forecast([*groups, Configuration(groups[1].runs.copy()), Configuration(half)])  # type: ignore[arg-type]
    assert (without.n_runs, len(without.groups)) == (10, 5)
    assert (found.n_runs, len(found.groups)) == (11, 6)
    assert forecast([*groups[:4], Configuration(groups[3].runs.copy())]).correlations == {}  # type: ignore[arg-type]

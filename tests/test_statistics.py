import math

import pytest
from scipy import stats

from common.statistics import SIGNIFICANT, compare, holm, interval, paired_p, spread


def test_a_spread_has_the_t_interval_of_the_mean() -> None:
    values = [0.52, 0.61, 0.75, 0.58]
    over = spread(values)
    assert (over.n, over.mean) == (4, pytest.approx(0.615))
    assert over.sd == pytest.approx(stats.tstd(values))
    assert (over.low, over.high) == pytest.approx(stats.t.interval(0.95, 3, 0.615, stats.sem(values)))


def test_fewer_than_three_values_have_no_interval_and_no_test() -> None:
    one, two = spread([0.5]), spread([0.5, 0.7])
    assert (one.n, one.mean, two.mean, two.sd) == (1, 0.5, pytest.approx(0.6), pytest.approx(0.02**0.5))
    assert all(math.isnan(value) for value in (one.sd, one.low, two.low, two.high, paired_p([0.1, 0.2])))
    assert not math.isnan(spread([0.5, 0.6, 0.7]).low)


def test_differences_that_are_equal_up_to_rounding_are_equal() -> None:
    assert math.isnan(paired_p([0.3 - 0.2, 0.4 - 0.3, 0.1]))  # 0.09999999999999998 and 0.10000000000000003
    assert math.isnan(paired_p([0.3 - 0.2 - 0.1, 0.0, 0.0]))
    assert 0 < paired_p([0.1, 0.1, 0.1 + 1 / 7180]) < 0.001  # one test tile


def test_rows_are_compared_over_the_seeds_that_both_have() -> None:
    rows = {
        "a": {0: 0.50, 1: 0.60, 2: 0.70, 3: 0.1},
        "b": {2: 0.75, 0: 0.52, 1: 0.61, 9: 1.0},
        "c": {7: 0.5},
        "d": {1: 0.5},
    }
    compared = compare(rows)
    assert list(compared) == ["b", "d"]  # c has no seed of a's
    assert compared["b"].differences.n == 3
    assert compared["b"].differences.mean == pytest.approx((0.02 + 0.01 + 0.05) / 3)
    assert compared["b"].p_holm == pytest.approx(stats.ttest_rel([0.52, 0.61, 0.75], [0.5, 0.6, 0.7]).pvalue)
    assert compared["b"].verdict == "not decided"
    assert compared["d"].verdict == "too few seeds"


def test_holms_correction() -> None:
    # By hand: .01 × 4, .02 × 3, .03 × 2 — kept monotonic — and .5 × 1.
    assert holm([0.5, 0.01, 0.03, math.nan, 0.02])[:3] == pytest.approx([0.5, 0.04, 0.06])
    assert holm([0.5, 0.01, 0.03, math.nan, 0.02])[4] == pytest.approx(0.06)
    assert math.isnan(holm([0.5, math.nan])[1])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_the_verdict_uses_the_corrected_p_value() -> None:
    rows = {"a": [0.5, 0.5, 0.5], "b": [0.51, 0.515, 0.52], "c": [0.5, 0.51, 0.49], "d": [0.51, 0.53, 0.56]}
    compared = compare({row: dict(enumerate(values)) for row, values in rows.items()})
    assert paired_p([0.01, 0.015, 0.02]) < SIGNIFICANT < compared["b"].p_holm
    assert compared["b"].verdict == "not decided"


def test_rows_with_equal_differences_are_no_tests_and_do_not_count_in_holms_correction() -> None:
    rows = {"a": [0.5, 0.25, 0.25], "b": [0.51, 0.265, 0.27], "c": [0.5, 0.25, 0.25], "d": [0.75, 0.5, 0.5]}
    compared = compare({row: dict(enumerate(values)) for row, values in rows.items()})
    assert compared["b"].p_holm == paired_p([0.51 - 0.5, 0.265 - 0.25, 0.27 - 0.25]) < 0.05
    assert (compared["c"].verdict, math.isnan(compared["c"].p_holm)) == ("the same", True)
    assert (compared["d"].verdict, math.isnan(compared["d"].p_holm)) == ("not decided", True)


def test_a_row_may_be_compared_with_another_than_the_first_one() -> None:
    rows = {"a": [0.5, 0.5, 0.5], "b": [0.7, 0.7, 0.8], "c": [0.71, 0.72, 0.84]}
    values = {row: dict(enumerate(numbers)) for row, numbers in rows.items()}
    assert compare(values)["c"].differences.mean == pytest.approx(0.77 / 3)
    assert compare(values, against={"c": "b"})["c"].differences.mean == pytest.approx(0.07 / 3)


def test_an_interval_is_written_with_its_value() -> None:
    assert interval(0.51234, 0.4, 0.6, 4) == "0.5123 [0.4000, 0.6000]"
    assert interval(0.5, -0.4, 0.6, 2, "+") == "+0.50 [-0.40, +0.60]"
    assert interval(-0.001, -0.4, 0.004, 2) == "0.00 [-0.40, 0.00]"
    assert interval(0.5, math.nan, math.nan, 4) == "0.5000"

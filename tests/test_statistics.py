import math
from pathlib import Path

import example_records
import pytest
from scipy import stats

from common.records.read import Record
from common.statistics import SIGNIFICANT, compare, counted, holm, interval, paired_p, spread
from study.comparison import comparison, convergence_epoch


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
    assert paired_p([0.3 - 0.2 - 0.1, 0.0, 0.0]) == 1.0
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
    assert compared["b"].p == pytest.approx(stats.ttest_rel([0.52, 0.61, 0.75], [0.5, 0.6, 0.7]).pvalue)
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
    assert compared["b"].p < SIGNIFICANT < compared["b"].p_holm
    assert compared["b"].verdict == "not decided"


def test_identical_rows_are_no_tests_and_do_not_count_in_holms_correction() -> None:
    rows = {"a": [0.5, 0.5, 0.5], "b": [0.51, 0.515, 0.52], "c": [0.5, 0.5, 0.5]}
    values = {row: dict(enumerate(numbers)) for row, numbers in rows.items()}
    compared = compare(values, identical={"c"})
    assert compared["b"].p_holm == compared["b"].p
    assert (compared["c"].verdict, math.isnan(compared["c"].p)) == ("identical", True)
    assert compare(values)["b"].p_holm == 2 * compared["b"].p


def test_equal_differences_have_no_division_by_zero() -> None:
    rows = {"a": [0.5, 0.25, 0.25], "b": [0.5, 0.25, 0.25], "c": [0.75, 0.5, 0.5]}
    same = compare({row: dict(enumerate(values)) for row, values in rows.items()})
    assert (same["b"].verdict, same["b"].p) == ("the same", 1.0)
    assert (same["c"].verdict, math.isnan(same["c"].p)) == ("not decided", True)


def test_two_seeds_give_no_verdict_and_do_not_count_for_the_correction() -> None:
    values = {"a": [0.5, 0.5, 0.5], "b": [0.61, 0.62, 0.63], "two": [0.7, 0.7]}
    compared = compare({row: dict(enumerate(scores)) for row, scores in values.items()})
    assert (compared["two"].verdict, math.isnan(compared["two"].p)) == ("too few seeds", True)
    assert compared["b"].verdict == "better"
    assert compared["b"].p_holm == compared["b"].p


def test_a_comparison_is_paired_by_seed_and_names_runs_that_might_converge_later() -> None:
    def run(seed: int, *accuracies: float) -> Record:
        history = [example_records.row(epoch, acc) for epoch, acc in enumerate(accuracies, start=1)]
        facts = {**example_records.facts({**example_records.CONFIG, "seed": seed}), "weights": {}}
        content = {**example_records.summary(facts, history, acc=max(accuracies)), "weights": {}}
        return Record(Path(), facts, content, history)

    # 0.920 - 0.915 is above 0.005 in floating point.
    scratch = [run(0, 0.1, 0.3), run(1, 0.5, 0.6)]
    content = comparison({"from scratch": scratch, "fine-tuned": [run(1, 0.5, 0.7), run(0, 0.915, 0.92)]})
    assert [one["censored"] for one in content["runs"]["from scratch"]] == [True, True]
    assert [one["convergence_epoch"] for one in content["runs"]["fine-tuned"]] == [2, 1]
    assert convergence_epoch([example_records.row(1, 0.03), example_records.row(2, 0.035)]) == 1  # in floats, too
    assert [one["censored"] for one in content["runs"]["fine-tuned"]] == [True, False]
    difference = content["differences"]["test/acc"]
    assert (difference["n"], difference["mean"]) == (2, pytest.approx((0.62 + 0.1) / 2))
    assert difference["sd"] == pytest.approx(abs(0.62 - 0.1) / 2**0.5)
    assert (difference["low"], difference["p"]) == (None, None)


def test_an_interval_is_written_with_its_value() -> None:
    assert interval(0.51234, 0.4, 0.6) == "0.5123 [0.4000, 0.6000]"
    assert interval(0.5, -0.4, 0.6, 2, "+") == "+0.50 [-0.40, +0.60]"
    assert interval(0.5, None, None) == interval(0.5, math.nan, math.nan) == "0.5000"


def test_a_single_thing_is_in_the_singular() -> None:
    assert [counted(number, "epoch") for number in (0, 1, 1000)] == ["0 epochs", "1 epoch", "1,000 epochs"]

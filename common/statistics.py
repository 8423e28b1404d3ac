"""Statistics over several runs: the mean with its interval, and paired comparisons."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SIGNIFICANT = 0.05
LEAST_SEEDS = 3  # of an interval and a test: from two values alone, a t interval is very wide, or narrow by chance
ROUNDING = 1e-9  # far below one tile's share of an ACC, far above what floating point adds


@dataclass(frozen=True)
class Spread:
    """The mean of n values, their standard deviation (n - 1; NaN for one) and the mean's 95 % t interval."""

    n: int
    mean: float
    sd: float
    low: float  # NaN for fewer than LEAST_SEEDS values, as `high`
    high: float


@dataclass(frozen=True)
class Comparison:
    """The differences between two rows, seed by seed; the paired t test's p after Holm's correction, or NaN."""

    differences: Spread
    p_holm: float

    @property
    def verdict(self) -> str:
        """The comparison in words."""
        if self.differences.n < LEAST_SEEDS:
            return "too few seeds"
        if self.differences.mean == 0 == self.differences.sd:
            return "the same"
        if not self.p_holm < SIGNIFICANT:  # NaN, too
            return "not decided"
        return "better" if self.differences.mean > 0 else "worse"


def spread(values: Sequence[float]) -> Spread:
    """Mean, standard deviation and interval of at least one value."""
    from scipy.stats import t  # half a second of import

    n, mean = len(values), statistics.fmean(values)
    sd = statistics.stdev(values) if n > 1 else math.nan
    half = math.nan if n < LEAST_SEEDS else float(t.ppf(0.975, n - 1)) * sd / math.sqrt(n)
    return Spread(n, mean, sd, mean - half, mean + half)


def paired_p(differences: Sequence[float]) -> float:
    """The two-sided p value of the paired t test; NaN for fewer than LEAST_SEEDS pairs, or equal differences."""
    from scipy.stats import ttest_1samp

    if len(differences) < LEAST_SEEDS or max(differences) - min(differences) < ROUNDING:
        return math.nan  # there the t statistic is not defined
    return float(ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction of p values (Scand. J. Statistics 6, 1979); a NaN means no test and stays NaN."""
    order = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    corrected, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(order):
        corrected[place] = largest = max(largest, min(1.0, p * (len(order) - rank)))
    return corrected


def compare(rows: Mapping[str, Mapping[int, float]], against: Mapping[str, str] = {}) -> dict[str, Comparison]:
    """Compare each row with the row that `against` names for it, else with the first one, over their common seeds.

    `rows[row][seed]` is a value. Rows without a common seed are left out. Rows for which `paired_p` gives no
    value do not count in Holm's correction.
    """
    reference, *others = rows
    differences = {}
    for row in others:
        other = rows[against.get(row, reference)]
        if values := [value - other[seed] for seed, value in rows[row].items() if seed in other]:
            differences[row] = values
    p_values = holm(list(map(paired_p, differences.values())))
    pairs = zip(differences.items(), p_values, strict=True)
    return {row: Comparison(spread(values), p_holm) for (row, values), p_holm in pairs}


def smallest_difference(sd: float, n: int, family: int) -> float:
    """The smallest true difference that a paired t test of `n` seeds shows with a probability of 0.8 (its power).

    `sd` is that of the paired differences. The test is at the most severe step of Holm's correction over `family`
    tests. The square of t has the noncentral F distribution (Cohen, Statistical Power Analysis, 1988).
    """
    from scipy.optimize import brentq
    from scipy.special import ncfdtr
    from scipy.stats import f

    limit = float(f.isf(SIGNIFICANT / family, 1, n - 1))
    shift = brentq(lambda shift: 0.2 - ncfdtr(1, n - 1, shift**2, limit), 0, 3 * math.sqrt(limit))
    return float(shift) * sd / math.sqrt(n)


def interval(value: float, low: float, high: float, digits: int, sign: str = "") -> str:
    """`value [low, high]`; only the value if the interval is NaN. `sign="+"` adds plus signs."""
    number = f"{sign}z.{digits}f"  # z: no -0.00
    if math.isnan(low):  # `high` is, too
        return f"{value:{number}}"
    return f"{value:{number}} [{low:{number}}, {high:{number}}]"

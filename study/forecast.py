"""Which validation score forecasts the test ACC: rank correlations over the runs of a study."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.training.metrics import Estimate
from study.groups import Group

SCORES = {  # of the selected epoch's weights, by what the page calls them
    "validation ACC": ("validate", "validate/acc"),
    "validation AUC": ("validate", "validate/auc"),
    "validation loss": ("validate", "validate/loss"),
    "ACC under changed colours": ("validate/shifted_acc",),
}
USUAL, SHIFTED = "validation ACC", "ACC under changed colours"  # the page compares these two
LOWER_IS_BETTER = "validation loss"  # its correlation has the sign turned
LEAST_RUNS, LEAST_GROUPS = 10, 5
DRAWS = 2000


@dataclass(frozen=True)
class Forecast:
    """The runs that have every score, by configuration, and each score's rank correlation with the test ACC.

    `values` are (runs, 1 + scores): the test ACC and SCORES. `gains` are the differences from the correlation of
    USUAL. Without enough runs there are neither correlations nor gains.
    """

    groups: Sequence[Group]
    values: Sequence[NDArray[np.float64]]
    correlations: Mapping[str, Estimate]
    gains: Mapping[str, Estimate]

    @property
    def n_runs(self) -> int:
        """The number of runs."""
        return sum(map(len, self.values))


def forecast(groups: Sequence[Group]) -> Forecast:
    """The correlations over the runs of these configurations; runs without one of the scores are left out.

    A run with the very scores of an earlier one is left out, too: the change of its configuration had no effect.
    """
    found, values, seen = [], [], set[tuple[float, ...]]()
    for group in groups:
        columns = [group.by_seed("best", "acc"), *(group.by_seed(*keys) for keys in SCORES.values())]
        seeds = set.intersection(*map(set, columns))
        rows = dict.fromkeys(tuple(column[seed] for column in columns) for seed in sorted(seeds))
        if new := [row for row in rows if row not in seen]:
            found.append(group)
            values.append(np.array(new))
            seen.update(new)
    if len(values) < LEAST_GROUPS or sum(map(len, values)) < LEAST_RUNS:
        return Forecast(found, values, {}, {})
    signs = np.array([1, *(-1 if name == LOWER_IS_BETTER else 1 for name in SCORES)])
    correlations, gains = rank_correlations([runs * signs for runs in values], usual=list(SCORES).index(USUAL))
    return Forecast(found, values, *(dict(zip(SCORES, part, strict=True)) for part in (correlations, gains)))


def rank_correlations(
    groups: Sequence[NDArray[np.float64]], usual: int = 0
) -> tuple[list[Estimate], list[Estimate]]:
    """Spearman's correlation of the test score with each other score, and its difference from that of `usual`.

    A group (runs, 1 + scores) holds the runs of one configuration, the test score first. The 95 % intervals are
    percentiles of a bootstrap (Efron and Tibshirani 1993) that draws whole groups, because runs that differ in the
    seed alone resemble one another. A difference is taken in each draw: two correlations of the same runs rise and
    fall together, so their own intervals say little about it.
    """
    from scipy.stats import rankdata  # half a second of import

    def correlations(chosen: Sequence[int]) -> NDArray[np.float64]:
        ranks = rankdata(np.concatenate([groups[place] for place in chosen]), axis=0)
        return np.asarray(np.corrcoef(ranks, rowvar=False)[0, 1:])

    def estimates(value: NDArray[np.float64], drawn: NDArray[np.float64]) -> list[Estimate]:
        low, high = np.nanquantile(drawn, (0.025, 0.975), axis=0)
        return [Estimate(*map(float, ends)) for ends in zip(value, low, high, strict=True)]

    draws = np.random.default_rng(0).integers(len(groups), size=(DRAWS, len(groups)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a draw of one group again and again may have no order
        drawn = np.array([correlations(chosen) for chosen in draws])
        value = correlations(range(len(groups)))
    return estimates(value, drawn), estimates(value - value[usual], drawn - drawn[:, [usual]])

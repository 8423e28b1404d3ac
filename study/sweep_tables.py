"""The table of the ablation, whose rows are compared over the seeds."""

import math
from collections.abc import Mapping

from common.markdown import markdown_table, text
from common.statistics import SIGNIFICANT, Comparison, compare, interval, smallest_difference
from study.groups import AGAINST, Group, identical

COLUMNS = {"validation": "validation ACC", "acc": "test ACC", "auc": "test AUC", "views": "test ACC, 8 views"}
NOTE = (
    "± is the standard deviation over the seeds (n - 1). Differences are to the first row, or to the row that is "
    "named, seed by seed. "
    "Intervals are t intervals over the seeds alone: they do not tell how the numbers would change with other "
    "tiles. p is the paired t test's with Holm's correction over the rows; the verdict is by it, at "
    f"{SIGNIFICANT}. Not decided means: these seeds could not see a difference. There may be one."
)
IDENTICAL = (
    "Identical: the selected networks of both rows give the same outputs, so there is nothing to test. For "
    "example, early stopping changes nothing where no run stops early."
)


def grid_table(rows: Mapping[str, Group]) -> list[str]:
    """The scores of every row and its difference in test ACC, and what these seeds could not see."""
    first, *others = rows
    against = {row: AGAINST[row] if AGAINST.get(row) in rows else first for row in others}
    same = {row for row, other in against.items() if identical(rows[row], rows[other])}
    comparisons = compare({row: group.by_seed("acc") for row, group in rows.items()}, same, against)
    lines = []
    for row, group in rows.items():
        one = comparisons.get(row)
        cells = [_mean_sd(group, score) for score in COLUMNS] + (_difference(one) if one else ["", "", ""])
        if against.get(row, first) != first:
            cells[len(COLUMNS)] += f" against '{text(rows[against[row]].title)}'"
        lines.append([text(group.title), str(len(group.records)), *cells])
    columns = ["row", "seeds", *COLUMNS.values(), "difference in test ACC [95 % interval]", "p (Holm)", "verdict"]
    found = markdown_table(columns, "lrrrrrrrl", lines)
    if views := rows[first].by_seed("views"):  # no training: outside the family of Holm's correction
        change, p, _ = _difference(compare({"one": rows[first].by_seed("acc"), "8": views})["8"])
        p = f", p = {p}".replace("= <", "<") if p else ""
        found += ["", f"8 views of each test tile (flips, quarter turns) instead of one, first row: {change}{p}."]
    tested = [one.differences for one in comparisons.values() if not math.isnan(one.p_holm)]
    if pooled := math.sqrt(sum(one.sd**2 for one in tested) / max(len(tested), 1)):
        smallest = smallest_difference(pooled, min(one.n for one in tested), len(tested))
        found += [
            "",
            f"These seeds could show a difference in test ACC of {smallest:.3f} or more (in 8 of 10 such studies, "
            "at Holm's most severe step, with the pooled spread of these paired differences).",
        ]
    return [*found, "", NOTE, *(["", IDENTICAL] if same else [])]


def _difference(one: Comparison) -> list[str]:
    values = one.differences
    p = "" if math.isnan(one.p_holm) else "< 0.001" if one.p_holm < 0.001 else f"{one.p_holm:.3f}"
    return [interval(values.mean, values.low, values.high, digits=3, sign="+"), p, one.verdict]


def _mean_sd(group: Group, score: str) -> str:
    over_seeds = group.spread(score)
    if over_seeds is None:
        return ""
    return f"{over_seeds.mean:.3f}" + (f" ± {over_seeds.sd:.3f}" if over_seeds.n > 1 else "")

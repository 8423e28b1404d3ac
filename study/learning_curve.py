"""The learning curve: the test scores of a recipe that is trained on ever more tiles."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.records.read import Record
from common.statistics import Spread, spread
from study.groups import APART, Group, alike, distinct


@dataclass(frozen=True)
class Curve:
    """The runs of one recipe; each group has another number of training tiles, the smallest first."""

    groups: Sequence[Group]

    @property
    def title(self) -> str:
        """The recipe in words."""
        return self.groups[0].title

    def at(self, tiles: int) -> Group | None:
        """The runs with this number of training tiles, if there are any."""
        return next((group for group in self.groups if n_tiles(group.first) == tiles), None)

    @property
    def last_gain(self) -> Spread | None:
        """The change of test ACC by the last step to more tiles, over the seeds; None without a common seed."""
        before, after = (group.by_seed("best", "acc") for group in self.groups[-2:])
        common = [after[seed] - before[seed] for seed in after if seed in before]
        return spread(common) if common else None

    @property
    def tiles(self) -> list[int]:
        """The numbers of training tiles."""
        return [n_tiles(group.first) for group in self.groups]


def n_tiles(record: Record) -> int:
    """The number of training tiles of a run."""
    return int(record.summary["tiles"]["train"])


def learning_curves(records: Iterable[Record]) -> list[Curve]:
    """A curve for each recipe that was trained on at least two numbers of tiles; the baselines are last."""
    curves = []
    for same in alike(distinct(records), APART | {"train_tiles"}):
        parts: dict[int, list[Record]] = {}
        for record in same:
            parts.setdefault(n_tiles(record), []).append(record)
        if len(parts) > 1:
            curves.append(Curve([Group(parts[tiles]) for tiles in sorted(parts)]))
    return sorted(curves, key=lambda curve: "baseline" in curve.groups[0].first.config)

"""The tables and numbers of the page, each made from the records alone."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.cli import Fault
from common.files import digest
from common.markdown import markdown_table, text
from common.records.read import Record, read_json, unreadable
from common.statistics import SIGNIFICANT, Comparison, compare, interval, smallest_difference
from study.facts import PUBLISHED, cost
from study.groups import AGAINST, ROWS, SCORES, Group, Runs, convergence_epoch
from study.recipes import ranking

BLOCKS = ("results", "recipes", "classes", "colours", "techniques", "difference", "maps", "trials", "records")
MAPS = {  # figures of Task 2, and what they show
    "methods": "maps by each method",
    "all_methods": "the maps of all ten tiles",
    "means": "mean maps, also of an untrained network",
    "randomisation": "random weights",
    "removal": "removed pixels",
}
WATTS = 10  # of a core, an assumption
COLUMNS = {  # scores of the ablation's table
    "validation": "validation ACC",
    "acc": "test ACC",
    "auc": "test AUC",
    "views": "test ACC, 8 views",
}
NOTE = (
    "± is the standard deviation over the seeds (n - 1). Differences are to the first row, or to the row that is "
    "named, seed by seed, with t intervals over the seeds. p is of a paired t test, made larger because many rows "
    f"are tested on the same tiles (Holm's correction); it decides the verdict, at {SIGNIFICANT}. Intervals are "
    "not corrected, so some leave out 0 though their row is not decided. Not decided means: there may be a "
    "difference, but these seeds do not show it."
)
RECORDS = ("config.json", "history.csv", "scores.npz", "summary.json", "attribution.json", "saliency.md")


@dataclass
class Tables:
    """The tables over the groups of runs of a folder: rows, those of the ablation, and learning curves."""

    runs: Runs
    rows: Mapping[str, Group]
    ablation: Mapping[str, Group] = field(default_factory=dict)
    curves: Mapping[str, Sequence[Group]] = field(default_factory=dict)

    def block(self, words: str) -> list[str]:
        """The lines of a block: one of BLOCKS, which are methods, then the names of rows.

        Rows without a finished run are left out. Raises Fault for a name that there is not.
        """
        name, *arguments = words.split()
        if name not in BLOCKS:
            raise Fault(f"the page has a block {words!r}, but there is no table {name}")
        return list(getattr(self, name)(*arguments))

    def chosen(self, names: Sequence[str]) -> list[Group]:
        """The rows of these names that have runs. Raises Fault for an unknown name."""
        if unknown := set(names) - self.rows.keys() - ROWS.keys() - PUBLISHED.keys():
            raise Fault(f"the page asks for the row {min(unknown)!r}, but there is none in study/groups.py")
        return [self.rows[name] for name in names if name in self.rows]

    def results(self, *names: str) -> list[str]:
        """The scores of each row over its seeds, and published ones."""
        groups = self.chosen(names)
        single = all(len(group.records) == 1 for group in groups)
        lines = []
        for group in groups:
            cells = [_over(group, score, single) for score in ("acc", "balanced", "auc", "views")]
            sizes = [group.sides, f"{group.tiles:,}", str(len(group.records))]
            lines.append([text(group.title), *sizes, *cells])
        for name in names:
            lines += [
                [network, sides, "89,996", "", f"{acc:.3f}", "", f"{auc:.3f}", ""]
                for network, sides, acc, auc in PUBLISHED.get(name, [])
            ]
        of = "[95 %, over tiles]" if single else "[95 %, over seeds]"
        columns = ["network", "tile → input", "training tiles", "seeds"]
        columns += [f"test ACC {of}", "balanced ACC", "test AUC", "ACC, 8 views"]
        return markdown_table(columns, "lrrrrrrr", lines)

    def recipes(self, *names: str) -> list[str]:
        """What each row trains, and what it costs."""
        lines = []
        for group in self.chosen(names):
            config = group.first.config
            if "model_name" not in config:
                continue
            parameters, multiplications = cost(config["model_name"], group.side)
            lengths = sorted({len(record.history) for record in group.records})
            line = [text(group.title), f"{parameters / 1e6:.1f} M", f"{multiplications / 1e6:,.0f} M"]
            line += [group.sides, f"{lengths[0]} to {lengths[-1]}" if lengths[1:] else str(lengths[0])]
            line += [str(config.get("batch_size", ""))]
            rate, slower = config.get("lr", math.nan), config.get("backbone_lr_factor", 1.0)
            first = f"{slower * rate:.2g} to " if slower < 1 and config["train_part"] == "all" else ""
            line += [text(f"{config.get('optimizer')}, {first}{rate:.2g}")]
            line += [text(config.get("augmentation", "").replace(",", ", "))]
            lines.append([*line, "yes" if config.get("ema_decay") else "no"])
        columns = ["network", "parameters", "multiply-adds of a tile", "tile → input", "epochs", "batch"]
        columns += ["optimiser, learning rate", "augmentation", "averaged weights"]
        return markdown_table(columns, "lrrrrrlll", lines)

    def classes(self, *names: str) -> list[str]:
        """The recall of each class."""
        if not (groups := self.chosen(names)):
            return []
        recalls = [group.recalls() for group in groups]
        counts = np.transpose([np.sum(group.matrices[0], axis=1) for group in groups]).tolist()
        lines = []
        for name, found in zip(recalls[0], counts, strict=True):
            tiles = " / ".join(f"{count:,}" for count in sorted(set(found)))  # rows may be of several data sets
            lines.append([text(name), tiles, *(f"{one[name]:.2f}" for one in recalls)])
        columns = ["class", "test tiles", *(text(group.name) for group in groups)]
        return markdown_table(columns, "lr" + "r" * len(groups), lines)

    def colours(self, *names: str) -> list[str]:
        """Validation ACC, also under changed colours, beside test ACC."""
        scores = ("validation", "staining", "brightness", "noise", "acc")
        lines = [
            [text(group.title), group.sides, *(_mean(group, score) for score in scores)]
            for group in self.chosen(names)
        ]
        columns = ["network", "tile → input", "validation ACC", "other staining", "other brightness"]
        return markdown_table([*columns, "colour noise", "test ACC"], "lrrrrrr", lines)

    def techniques(self) -> list[str]:
        """The ablation: each row against the reference, or against the row that it changes."""
        return grid_table(self.ablation) if self.ablation else []

    def difference(self, *names: str) -> list[str]:
        """These two rows side by side."""
        groups = self.chosen(names)
        return difference_table(*groups) if len(groups) == 2 else []

    def maps(self, run_id: str) -> list[str]:
        """The maps of a run that Task 2 has explained, and the checks of every method."""
        folder, records, lines = self.runs.folder, Path("runs") / run_id, []
        if not (path := folder / records / "attribution.json").exists():
            return []
        from common.explain.checks import FAILS, PASSES, chance, judge  # Captum: seconds

        content = read_json(path)
        try:
            for method in content["methods"].values():
                *_, last = method["randomisation"].values()
                scores = [last, method["margin_over_random"], method["margin_over_sobel"], method["infidelity"]]
                outcome, _ = judge(method, content["n"])
                passes = {PASSES: "yes", FAILS: "no"}.get(outcome, outcome)
                cells = [interval(one["value"], one["low"], one["high"], 2) for one in scores]
                lines.append([text(method["title"]), passes, *cells])
            tests, n = chance(len(lines)), content["n"]
            tests += f" Tiles: {n['randomisation']} for random weights, {n['removal']} for removed pixels, "
            tests += f"{n['infidelity']} for infidelity."
            for control in content["controls"].values():  # what a map without any knowledge has
                one = control["infidelity"]
                shown = interval(one["value"], one["low"], one["high"], 2)
                lines.append([text(control["title"]), *[""] * 4, shown])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise unreadable(path, error) from error
        if noise := content.get("smoothgrad_keeps_class"):
            tests += f" With SmoothGrad's noise, {noise['value']:.0%} of the copies of a tile keep its class."
        columns = ["method", "passes", "correlation with the map of random weights"]
        columns += ["better than a random order", "better than edges", "infidelity"]
        table = markdown_table(columns, "llrrrr", lines)
        paths = {name: Path("fig") / "task2" / f"{run_id}-{name}.png" for name in MAPS}
        links = [f"[{MAPS[name]}]({path})" for name, path in paths.items() if (folder / path).exists()]
        if (folder / paths["methods"]).exists():
            table = [f"!{links.pop(0)}", "", *table]
        links.append(f"[the tiles in words]({records / 'saliency.md'})")
        return [*table, "", tests, "", f"More of run {run_id}: {', '.join(links)}."]

    def trials(self) -> list[str]:
        """The trials that chose the recipes."""
        return ranking(self.runs.folder)

    def records(self, root: str = "") -> list[str]:
        """Where each row comes from: runs, linked from `root`, commits, days, devices, a digest of all files."""
        rows = [(group.name, list(group.records)) for group in self.rows.values()]
        rows.append(("ablation", [record for group in self.ablation.values() for record in group.records]))
        known = {record.run_id for _, records in rows for record in records}
        for title, groups in self.curves.items():
            records = [record for group in groups for record in group.records if record.run_id not in known]
            rows.append((f"fewer tiles: {title}", records))
        lines = []
        for title, records in (row for row in rows if row[1]):
            facts = [record.summary for record in records]
            days = sorted(str(one["started"])[:10] for one in facts)
            first, *others = (record.run_id for record in records)
            runs = f"[{first}]({root}runs/{first}/)" + (f" and {len(others)} more" if others else "")
            words = (" / ".join(sorted({str(one.get(key)) for one in facts})) for key in ("commit", "device"))
            commits, devices = map(text, words)
            dates = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
            lines.append([text(title), runs, commits, dates, devices, digest_of(records)])
        return markdown_table(["row", "runs", "commit", "days", "device", "SHA-256"], "llllll", lines)

    def number(self, key: str) -> str:
        """A number of the prose. Raises Fault for a key that the records do not answer.

        ROW SCORE: the mean over the seeds · ROW SCORE interval: with its interval · ROW - ROW SCORE: the mean
        difference by seed, or with its interval · ROW seeds · least or most ROW SCORE: of the seeds · ROW recall
        CLASS · ROW taken CLASS: for what, and its share · published TASK: the coursework's ACC · hours: of all
        runs · energy: kWh of these hours. SCORE is one of SCORES in study/groups.py; a row of the ablation is
        ablation.NAME.
        """
        try:
            match key.split():
                case ["published", task]:
                    return f"{PUBLISHED[f'published_{task}'][0][2]:.3f}"
                case ["hours" | "energy"]:
                    hours = self.runs.hours
                    return f"{hours:,.0f}" if key == "hours" else f"{hours * WATTS / 1000:.1f}"
                case [name, "seeds"]:
                    return str(len(self._row(name).records))
                case ["least" | "most" as which, name, score]:
                    values = self._row(name).by_seed(score).values()
                    return f"{min(values) if which == 'least' else max(values):.3f}"
                case [name, "recall", *words]:
                    return f"{self._row(name).recalls()[' '.join(words)]:.2f}"
                case [name, "taken", *words]:
                    taken, share = self._row(name).mistaken(" ".join(words))
                    return f"{taken} ({share:.0%})"
                case [name, "-", other, score, *shown] if shown in ([], ["interval"]):
                    over, sign = self._row(name).minus(self._row(other), score), "+"
                case [name, score, *shown] if shown in ([], ["interval"]):
                    over, sign = self._row(name).spread(score), ""
                case _:
                    raise ValueError("there is no such number")
            if over is None:
                raise ValueError("not every seed has this score")
            low, high = (over.low, over.high) if shown == ["interval"] else (math.nan, math.nan)
            return interval(over.mean, low, high, 3, sign)
        except (KeyError, ValueError) as error:
            raise Fault(f"the page asks for {key!r}, which the records do not answer ({error})") from None

    def _row(self, name: str) -> Group:
        row = name.removeprefix("ablation.")
        return self.rows[name] if row == name else self.ablation[row]


def difference_table(one: Group, other: Group) -> list[str]:
    """Two rows side by side: seeds, epoch of convergence, scores, and the first minus the second one by seed."""
    epochs = [np.mean([convergence_epoch(run.history) for run in group.records]) for group in (one, other)]
    seeds, others = set(one.seeds), set(other.seeds)
    lines = [["seeds", str(len(seeds)), str(len(others)), f"{len(seeds & others)} in common"]]
    lines += [["epoch of convergence", *(f"{epoch:.1f}" for epoch in epochs), ""]]
    for score in ("validation", "acc", "auc"):
        found = one.minus(other, score)
        change = interval(found.mean, found.low, found.high, 3, "+") if found else ""
        lines.append([COLUMNS[score], _over(one, score), _over(other, score), change])
    return markdown_table(["", text(one.title), text(other.title), "difference"], "lrrr", lines)


def grid_table(rows: Mapping[str, Group]) -> list[str]:
    """The scores of every row and its difference in test ACC, and what these seeds could not see."""
    first = next(iter(rows))
    against = {row: other for row, other in AGAINST.items() if other in rows}
    comparisons = compare({row: group.by_seed("acc") for row, group in rows.items()}, against)
    lines = []
    for row, group in rows.items():
        change, p, verdict = _change(comparisons[row]) if row in comparisons else ("", "", "")
        if change and row in against:
            change += f" against '{text(rows[against[row]].title)}'"
        cells = [_mean(group, score, with_sd=True) for score in COLUMNS]
        lines.append([text(group.title), str(len(group.records)), *cells, change, p, verdict])
    columns = ["row", "seeds", *COLUMNS.values(), "difference in test ACC [95 % interval]", "p (Holm)", "verdict"]
    found = markdown_table(columns, "lrrrrrrrl", lines)
    if views := rows[first].by_seed("views"):  # no training: outside the family of Holm's correction
        change, p, _ = _change(compare({"one": rows[first].by_seed("acc"), "8": views})["8"])
        p = f", p = {p}".replace("= <", "<") if p else ""
        found += [
            "",
            f"In the first row, 8 views of a test tile (flips, quarter turns) change its ACC by {change}{p}.",
        ]
    tested = [one.differences for one in comparisons.values() if not math.isnan(one.p_holm)]
    if pooled := math.sqrt(sum(one.sd**2 for one in tested) / max(len(tested), 1)):
        smallest = smallest_difference(pooled, min(one.n for one in tested), len(tested))
        found += [
            "",
            "So few seeds show only large differences. To be decided in 8 of 10 such studies, a row of average "
            f"spread needs a true difference of {smallest:.3f} in test ACC. Rows that vary less need less.",
        ]
    return [*found, "", NOTE]


def _change(one: Comparison) -> tuple[str, str, str]:
    values = one.differences
    p = "" if math.isnan(one.p_holm) else "< 0.001" if one.p_holm < 0.001 else f"{one.p_holm:.3f}"
    return interval(values.mean, values.low, values.high, 3, "+"), p, one.verdict


def _mean(group: Group, score: str, with_sd: bool = False) -> str:
    found = group.spread(score)
    if found is None:
        return ""
    return f"{found.mean:.3f}" + (f" ± {found.sd:.3f}" if with_sd and found.n > 1 else "")


def _over(group: Group, score: str, over_tiles: bool = False) -> str:
    """The mean over the seeds with its interval; with `over_tiles`, a single run's with that over the tiles."""
    part, name = SCORES[score]
    one = group.first.summary.get(part, {}).get(name, {})
    if over_tiles and "low" in one:
        return interval(one["value"], one["low"], one["high"], 3)
    found = group.spread(score)
    return interval(found.mean, found.low, found.high, 3) if found else ""


def digest_of(records: Sequence[Record]) -> str:
    """The first digits of a SHA-256 over these runs' files: it changes with every key of every file."""
    every = hashlib.sha256()
    for record in records:
        for path in (record.folder / name for name in RECORDS):
            if path.exists():
                every.update(f"{path.name} {digest(path)}".encode())
    return every.hexdigest()[:12]

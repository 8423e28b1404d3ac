"""The tables and numbers of the page, each made from the records alone."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import Fault
from common.files import digest
from common.markdown import markdown_table, text
from common.records.read import Record, read_json
from common.statistics import Spread, interval
from study.facts import PUBLISHED, cost
from study.groups import UNTIL, Group, Runs, convergence_epoch
from study.sweep_tables import grid_table

BLOCKS = ("results", "recipes", "classes", "colours", "techniques", "difference", "curve", "maps", "records")
MAPS = {  # figures of Task 2, and what they show
    "methods": "maps by each method",
    "all_methods": "the maps of all ten tiles",
    "classes": "one right and one wrong tile of each class",
    "means": "mean maps, also of an untrained network",
    "randomisation": "random weights",
    "removal": "removed pixels",
}
WATTS = 10  # of a core, an assumption
RECORDS = ("config.json", "history.csv", "scores.npz", "summary.json", "attribution.json")


@dataclass
class Tables:
    """The tables over the groups of runs of a folder: rows, those of the ablation, and learning curves."""

    runs: Runs
    rows: Mapping[str, Group]
    ablation: Mapping[str, Group] = field(default_factory=dict)
    curves: Mapping[str, Sequence[Group]] = field(default_factory=dict)

    @property
    def shown(self) -> dict[str, Group]:
        """The rows without those of an earlier version that have been replaced."""
        return {name: group for name, group in self.rows.items() if UNTIL.get(name) not in self.rows}

    def block(self, words: str) -> list[str]:
        """The lines of a block: one of BLOCKS, which are methods, then the names of rows.

        Rows without a finished run are left out. Raises Fault for a name that there is not.
        """
        name, *arguments = words.split()
        if name not in BLOCKS:
            raise Fault(f"the page has a block {words!r}, but there is no table {name}")
        lines: list[str] = getattr(self, name)(*arguments)
        return lines

    def chosen(self, names: Sequence[str]) -> list[Group]:
        """The rows of these names that are shown; all of them where there are no names."""
        return [self.shown[name] for name in names or self.shown if name in self.shown]

    def results(self, *names: str) -> list[str]:
        """The scores of each row over its seeds, and published ones."""
        groups = self.chosen(names)
        single = all(len(group.records) == 1 for group in groups)
        lines = []
        for group in groups:
            cells = [_over(group, score, single) for score in ("acc", "balanced", "auc", "views")]
            sizes = [_side(group), f"{group.tiles:,}", str(len(group.records))]
            lines.append([text(group.title), *sizes, *cells])
        for name in names:
            lines += [
                [network, f"{side} px", "89,996", "", f"{acc:.3f}", "", f"{auc:.3f}", ""]
                for network, side, acc, auc in PUBLISHED.get(name, [])
            ]
        of = "[95 %, over tiles]" if single else "[95 %, over seeds]"
        columns = ["network", "input", "training tiles", "seeds"]
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
            line += [_side(group), f"{lengths[0]} to {lengths[-1]}" if lengths[1:] else str(lengths[0])]
            line += [str(config.get("batch_size", ""))]
            line += [text(f"{config.get('optimizer')}, {config.get('lr', math.nan):.2g}")]
            line += [text(config.get("augmentation", "").replace(",", ", "))]
            lines.append([*line, "yes" if config.get("ema_decay") else "no"])
        columns = ["network", "parameters", "multiply-adds of a tile", "input", "epochs", "batch"]
        columns += ["optimiser, learning rate", "augmentation", "averaged weights"]
        return markdown_table(columns, "lrrrrrlll", lines)

    def classes(self, *names: str) -> list[str]:
        """The recall of each class."""
        groups = self.chosen(names)
        matrix = groups[0].first.summary["best"]["confusion_matrix"]
        counts = dict(zip(groups[0].recalls(), np.sum(matrix, axis=1).tolist(), strict=True))
        lines = [
            [text(name), f"{count:,}", *(f"{group.recalls()[name]:.2f}" for group in groups)]
            for name, count in counts.items()
        ]
        columns = ["class", "test tiles", *(text(f"{group.title}, {group.side} px") for group in groups)]
        return markdown_table(columns, "lr" + "r" * len(groups), lines)

    def colours(self, *names: str) -> list[str]:
        """Validation ACC, also under changed colours, beside test ACC, and the calibration error."""
        scores = ("validation", "staining", "brightness", "noise", "acc", "calibration")
        lines = [
            [text(group.title), _side(group), *(_mean(group, score) for score in scores)]
            for group in self.chosen(names)
        ]
        columns = ["network", "input", "validation ACC", "other staining", "other brightness", "colour noise"]
        return markdown_table([*columns, "test ACC", "calibration error"], "lrrrrrrr", lines)

    def techniques(self) -> list[str]:
        """The ablation: each row against the reference, or against the row that it changes."""
        return grid_table(self.ablation) if "combined" in self.ablation else []

    def difference(self, *names: str) -> list[str]:
        """The first two of these rows side by side."""
        groups = self.chosen(names)
        return difference_table(*groups[:2]) if len(groups) > 1 else []

    def curve(self) -> list[str]:
        """The test ACC of each recipe by its number of training tiles."""
        tiles = sorted({group.tiles for groups in self.curves.values() for group in groups})
        lines = []
        for title, groups in self.curves.items():
            found = {group.tiles: _mean(group, "acc") for group in groups}
            lines.append([title, _side(groups[0]), *(found.get(number, "") for number in tiles)])
        return markdown_table(
            ["test ACC", "input", *(f"{number:,} tiles" for number in tiles)], "lr" + "r" * len(tiles), lines
        )

    def maps(self, *run_ids: str) -> list[str]:
        """The maps of the first of these runs that Task 2 has explained, and the checks of every method."""
        folder = self.runs.folder
        explained = [one for one in run_ids if (folder / "runs" / one / "attribution.json").exists()]
        if not explained:
            return []
        from common.explain.checks import FAILS, PASSES, chance, judge  # Captum: seconds

        records = Path("runs") / explained[0]
        content = read_json(folder / records / "attribution.json")
        check_attribution(content, str(folder / records / "attribution.json"))
        lines = []
        for method in content["methods"].values():
            *_, last = method["randomisation"].values()
            scores = [last, method["margin_over_random"], method["margin_over_sobel"]]
            outcome = judge(method, content["n"]).outcome
            passes = {PASSES: "yes", FAILS: "no"}.get(outcome, outcome)
            cells = [*map(_estimate, scores), f"{method['infidelity']['value']:.2f}"]
            lines.append([text(method["title"]), passes, *cells])
        columns = ["method", "passes", "correlation with the map of random weights", "better than a random order"]
        table = markdown_table([*columns, "better than edges", "infidelity"], "llrrrr", lines)
        paths = {name: Path("fig") / "task2" / f"{explained[0]}-{name}.png" for name in MAPS}
        links = [f"[{MAPS[name]}]({path})" for name, path in paths.items() if (folder / path).exists()]
        if (folder / paths["methods"]).exists():
            table = [f"!{links.pop(0)}", "", *table]
        links.append(f"[the tiles in words]({records / 'saliency.md'})")
        return [*table, "", chance(len(lines)), "", f"More of run {explained[0]}: {', '.join(links)}."]

    def records(self) -> list[str]:
        """Where the numbers come from: each row's runs, commits, days and devices, and a digest of its records."""
        rows = {group.title + f", {group.side} px": list(group.records) for group in self.shown.values()}
        if self.ablation:
            rows["ablation"] = [record for group in self.ablation.values() for record in group.records]
        known = {record.run_id for records in rows.values() for record in records}
        for title, groups in self.curves.items():
            records = [record for group in groups for record in group.records]
            rows[f"fewer tiles: {title}"] = [one for one in records if one.run_id not in known]
        lines = []
        for title, records in rows.items():
            facts = [record.facts for record in records]
            days = sorted(str(one["started"])[:10] for one in facts)
            first, *others = (record.run_id for record in records)
            runs = f"[{first}](runs/{first}/)" + (f" and {len(others)} more" if others else "")
            words = (" / ".join(sorted({str(one.get(key))[:40] for one in facts})) for key in ("commit", "device"))
            commits, devices = map(text, words)
            dates = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
            lines.append([text(title), runs, commits, dates, devices, digest_of(records)])
        return markdown_table(["row", "runs", "commit", "days", "device", "SHA-256"], "llllll", lines)

    def number(self, key: str) -> str:
        """A number of the prose. Raises Fault for a key that the records do not answer.

        ROW SCORE: the mean over the seeds · ROW SCORE interval: with its interval · ROW - ROW SCORE: the mean
        difference by seed, or with its interval · least ROW SCORE, most ROW SCORE: of the seeds · ROW seeds: their
        number · ROW recall CLASS · ROW taken CLASS: for what, and its share · hard: test tiles that all networks
        get wrong · hours: of all runs · energy: kWh of these hours. SCORE is one of SCORES; a row of the ablation
        is ablation.NAME.
        """
        try:
            return self._number(key)
        except (KeyError, ValueError, IndexError) as error:
            raise Fault(f"the page asks for {key!r}, which the records do not answer ({error})") from None

    def _number(self, key: str) -> str:
        if key == "hard":
            return f"{self.hard():,}"
        if key in ("hours", "energy"):
            folder = self.runs.folder / "runs"
            summaries = (read_json(folder / run_id / "summary.json") for run_id in self.runs.finished)
            seconds = sum(summary["wall_seconds"] for summary in summaries)
            return f"{seconds / 3600:,.0f}" if key == "hours" else f"{seconds / 3600 * WATTS / 1000:.1f}"
        name, *words = key.split()
        if name in ("least", "most"):
            values = self._row(words[0]).by_seed(words[1]).values()
            return f"{(min if name == 'least' else max)(values):.3f}"
        group = self._row(name)
        if words[0] == "seeds":
            return str(len(group.records))
        if words[0] == "recall":
            return f"{group.recalls()[' '.join(words[1:])]:.2f}"
        if words[0] == "taken":
            taken, share = group.mistaken(" ".join(words[1:]))
            return f"{taken} ({share:.0%})"
        sign = ""
        over: Spread | None
        if words[0] == "-":
            over, sign, words = group.minus(self._row(words[1]), words[2]), "+", words[2:]
        else:
            over = group.spread(words[0])
        if over is None:
            raise ValueError("no seed has this score")
        low, high = (over.low, over.high) if words[1:] == ["interval"] else (None, None)
        return interval(over.mean, low, high, 3, sign)

    def _row(self, name: str) -> Group:
        row = name.removeprefix("ablation.")
        return self.rows[name] if row == name else self.ablation[row]

    def hard(self) -> int:
        """How many test tiles all networks of the rows get wrong."""
        wrong = []
        for group in self.shown.values():
            for record in group.records if "model_name" in group.first.config else ():
                arrays = record.arrays()
                wrong.append(arrays["best_logits"].argmax(1) != arrays["targets"])
        return int(np.all(wrong, axis=0).sum())


def difference_table(one: Group, other: Group) -> list[str]:
    """Two rows side by side: when they converge, their scores, and the first minus the second one by seed."""
    epochs = [np.mean([convergence_epoch(run.history) for run in group.records]) for group in (one, other)]
    lines = [["epoch of convergence", *(f"{epoch:.1f}" for epoch in epochs), ""]]
    for score, title in (("validation", "validation ACC"), ("acc", "test ACC"), ("auc", "test AUC")):
        found = one.minus(other, score)
        change = interval(found.mean, found.low, found.high, 3, "+") if found else ""
        lines.append([title, _over(one, score), _over(other, score), change])
    return markdown_table(["", text(one.title), text(other.title), "difference"], "lrrr", lines)


def _side(group: Group) -> str:
    return f"{group.side} px"


def _mean(group: Group, score: str) -> str:
    found = group.spread(score)
    return f"{found.mean:.3f}" if found else ""


def _over(group: Group, score: str, over_tiles: bool = False) -> str:
    """The mean over the seeds with its interval; with `over_tiles` the single run's, with that over the tiles."""
    if over_tiles and (one := group.over_tiles(score)):
        return interval(one.value, one.low, one.high, 3)
    found = group.spread(score)
    return interval(found.mean, found.low, found.high, 3) if found else ""


def _estimate(value: Mapping[str, float]) -> str:
    return interval(value["value"], value["low"], value["high"], 2)


def check_attribution(content: Mapping[str, Any], path: str) -> None:
    """Raise Fault where a map's areas are not those of its curves."""
    for name, method in {**content["methods"], **content["controls"]}.items():
        areas = {
            kind: np.trapezoid([point["value"] for point in method[f"{kind}_curve"]], content["fractions"])
            for kind in ("deletion", "insertion")
        }
        margins = {"margin": areas["insertion"] - areas["deletion"], **areas}
        for control, values in content["controls"].items():
            if f"margin_over_{control}" in method:
                margins[f"margin_over_{control}"] = margins["margin"] - values["margin"]["value"]
        for kind, value in margins.items():
            if abs(method[kind]["value"] - value) > 1e-6:
                raise Fault(f"{path}: {name}, {kind} is not that of its curves; run task2.py again")


def digest_of(records: Sequence[Record]) -> str:
    """The first digits of a SHA-256 over all files of these records: it changes with every key of every file."""
    every = hashlib.sha256()
    for record in records:
        for path in (record.folder / name for name in RECORDS):
            if path.exists():
                every.update(f"{path.name} {digest(path)}".encode())
    return every.hexdigest()[:12]

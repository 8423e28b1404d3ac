"""A report.toml of what is finished in runs/ and sweeps/: of each task the largest set of comparable runs."""

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.errors import Fault, UsageError
from common.files import write_text
from common.records.read import Record, is_finished, read_json, read_table
from study.groups import APART, alike
from study.report_facts import facts
from study.report_selection import Study

HEADER = "# Which runs report.md shows. `python -m study.report --collect` wrote this file; edit it as you like.\n"
OTHER_TILES = "on other training tiles than the page's networks"
Selection = dict[str, dict[str, Any]]


def collect(folder: Path) -> None:
    """Write report.toml, and print which runs it names and which it leaves out, with the reason.

    Raises UsageError where no run of Tasks 1, 3 or 5 is finished.
    """
    left: dict[str, str] = {}  # by run
    records = comparable(finished(folder, left), left)
    selection: Selection = {}
    for section, content, run_ids in candidates(folder, records, left):
        try:
            facts(Study(folder, {**selection, section: content}))
        except (UsageError, Fault) as error:
            left |= dict.fromkeys(run_ids, str(error))
        else:
            selection[section] = content
    for reason in dict.fromkeys(left.values()):
        print(f"left out: {', '.join(run_id for run_id in left if left[run_id] == reason)}: {reason}")
    if not selection:
        raise UsageError(f"{folder / 'runs'}: no finished run of a task to show; python task1.py makes one")
    text = HEADER
    for section, content in sorted(selection.items()):
        text += f"[{section}]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in content.items())
    write_text(folder / "report.toml", text)
    print(f"{folder / 'report.toml'}:\n{text.removeprefix(HEADER)}", end="")


def finished(folder: Path, left: dict[str, str]) -> list[Record]:
    """The records of the finished runs, the oldest first; `left` gets the others."""
    records = []
    for path in (folder / "runs").glob("*/config.json"):
        run_id = path.parent.name
        try:
            if is_finished(folder, run_id):
                records.append(Record.read(folder, run_id))
            else:
                left[run_id] = "not finished"
        except Fault as fault:
            left[run_id] = str(fault)
    return sorted(records, key=started)


def comparable(records: Sequence[Record], left: dict[str, str]) -> list[Record]:
    """The records of one kind of tiles and one size, because one page shows only such; `left` gets the others.

    Real tiles come before generated ones, then the size that most tasks have, then the newest.
    """

    def tiles(record: Record) -> tuple[bool, int]:
        return record.summary["synthetic"], record.config["size"]

    def preference(kind: tuple[bool, int]) -> tuple[bool, int, str]:
        of_kind = [record for record in records if tiles(record) == kind]
        return not kind[0], len({record.facts["task"] for record in of_kind}), started(of_kind[-1])

    best = max(map(tiles, records), key=preference, default=None)
    left |= {record.run_id: "other tiles than the page's" for record in records if tiles(record) != best}
    return [record for record in records if tiles(record) == best]


def candidates(
    folder: Path, records: Sequence[Record], left: dict[str, str]
) -> Iterable[tuple[str, dict[str, Any], list[str]]]:
    """The section, its content, and the runs that it shows; `left` gets the runs that stand in no section.

    Task 1 and Task 3 show their best group of runs (`preference_of`), Task 5 its best comparison; the other groups
    on the same training tiles are further networks.
    """
    tables = {path: read_table(path) for path in sorted((folder / "sweeps").glob("*/*.csv"))}
    runs_of = {  # a grid's runs.csv and a search's table.csv name their runs
        path: [line["run_id"] for line in lines]
        for path, lines in tables.items()
        if lines and "run_id" in lines[0]
    }
    swept = set(itertools.chain(*runs_of.values()))
    finished_runs = {record.run_id for record in records}
    sweeps = [path for path in runs_of if not finished_runs.isdisjoint(runs_of[path])]  # else: on other tiles
    grids = [path for path in sweeps if path.name == "runs.csv"]
    curves = [path for path in grids if "train_tiles" in tables[path][0]]
    ablations = [path for path in grids if "ablation" in tables[path][0] and path not in curves]
    searches = [path for path in sweeps if path.name == "table.csv" and ablations]  # in the ablation's section
    compared = {
        path.parent.name: [run["run_id"] for runs in read_json(path)["runs"].values() for run in runs]
        for path in (folder / "runs").glob("*/comparison.json")
    }
    shown: list[Record] = []  # of Tasks 1 and 3
    others: list[Record] = []
    for section in ("task1", "task3"):
        groups = newest_of_each_seed(
            [one for one in records if one.facts["task"] == section and one.run_id not in swept]
        )
        best = max(groups, key=preference_of, default=[])
        others += [record for group in groups if group is not best for record in group]
        shown += best
        if best:
            run_ids = [record.run_id for record in best]
            yield section, {"runs": run_ids}, run_ids
    tuned = [record for record in records if record.facts["task"] == "task5" and record.run_id not in swept]
    paired: list[Record] = []  # of Task 5
    if compared:
        pairs = {name: [one for one in tuned if one.run_id in run_ids] for name, run_ids in compared.items()}
        chosen = max(pairs, key=lambda name: preference_of(pairs[name]))
        yield "task5", {"comparison": chosen}, compared[chosen]
        paired = pairs[chosen]
        tuned = [record for record in tuned if record not in paired]
    others += [record for group in newest_of_each_seed(tuned) for record in group]
    tiles = {record.summary["data_fingerprint"] for record in shown or paired}
    baselines = [record for record in records if record.facts["task"] == "baselines"]
    for section, members in (("networks", others), ("baselines", baselines)):
        run_ids = [record.run_id for record in members if record.summary["data_fingerprint"] in tiles]
        if run_ids:
            yield section, {"runs": run_ids}, run_ids
        left |= {record.run_id: OTHER_TILES for record in members if record.run_id not in run_ids}
    for path in ablations[-1:]:
        names = {"ablation": path.parent.name}
        if searches:
            names["search"] = searches[-1].parent.name
        yield "task4", names, runs_of[path]
    if curves:
        largest = [record.run_id for record in shown]  # the curves' last points, if these have their recipes
        content = {"sweeps": [path.parent.name for path in curves], "runs": largest}
        yield "learning_curve", content, list(itertools.chain(*map(runs_of.__getitem__, curves)))
    explained = [one for one in records if (one.folder / "attribution.json").exists()]
    explained.sort(key=lambda one: one.facts["task"] == "task1" and one in shown)  # the page's Task 1 comes first
    if explained:
        also = [record.run_id for record in explained[:-1]]
        run_ids = [record.run_id for record in explained]
        yield "task2", {"run": run_ids[-1], **({"also": also} if also else {})}, run_ids
    of_page = set(itertools.chain(*(runs_of[path] for path in (*ablations[-1:], *searches[-1:], *curves))))
    named = {record.run_id for record in (*shown, *others, *baselines)}.union(of_page, *compared.values())
    for record in records:
        if record.run_id in swept - of_page:
            left[record.run_id] = "of a sweep that the page does not show"
        elif record.run_id not in named:
            left[record.run_id] = "an older run of the same seed"


def newest_of_each_seed(records: Iterable[Record]) -> list[list[Record]]:
    """Groups of runs that differ in their seed alone, sorted by seed; `records` are sorted by time."""
    groups = [{record.config["seed"]: record for record in same} for same in alike(records, APART)]
    return [[group[seed] for seed in sorted(group)] for group in groups]


def preference_of(group: Sequence[Record]) -> tuple[Any, ...]:
    """The larger, the rather a group is shown: Task 3's reference row, then training tiles, seeds, the newest."""
    if not group:
        return (False,)
    reference = group[0].config.get("ablation", "combined") == "combined"
    return reference, group[0].summary["tiles"]["train"], len(group), max(map(started, group))


def started(record: Record) -> str:
    """When a run was started, in a form that sorts by time."""
    return str(record.facts["started"])

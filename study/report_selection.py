"""The runs of a finished study that report.toml selects for its report."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import Fault, UsageError, closest, first_line
from common.files import read_text
from common.records.read import Record, is_finished, read_json, read_table, run_folder

SECTIONS: dict[str, dict[str, type]] = {  # the keys of each section
    "task1": {"runs": list},
    "task2": {"run": str, "also": list},  # the run whose maps are shown, and others that were checked
    "task3": {"runs": list},
    "task4": {"ablation": str, "search": str},
    "task5": {"comparison": str},
    "networks": {"runs": list},  # trained in another way than the tasks
    "baselines": {"runs": list},
    "learning_curve": {"sweeps": list, "runs": list},
}
TASKS = {  # of the runs in a section
    "task1": "task1",
    "task3": "task3",
    "task4": "task3",
    "task5": "task5",
    "baselines": "baselines",
}


def parameters(trial: Mapping[str, str]) -> dict[str, str]:
    """The parameters of a search's trial: in its line they follow rank, run, state, metric and two epochs."""
    return dict(list(trial.items())[6:])


class Study:
    """A study's folder: reads the records that a selection names, and remembers which figures the page shows."""

    def __init__(self, folder: Path, selection: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Read report.toml, unless `selection` has its content; UsageError names an unknown section or key."""
        self.folder = folder
        self.linked: list[str] = []
        self.read: dict[str, Record] = {}  # every run that the page shows, by its id
        path = folder / "report.toml"
        try:
            self.selection = selection or tomllib.loads(read_text(path))
        except FileNotFoundError:
            raise UsageError(
                f"{path}: no such file; it names the runs to show; "
                "python -m study.report --collect writes it from the finished runs"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{path}: {first_line(error)}") from None
        for section, keys in self.selection.items():
            if section not in SECTIONS:
                raise UsageError(f"{path}: unknown section {section}; known are {', '.join(SECTIONS)}")
            if not isinstance(keys, Mapping):
                raise UsageError(f"{path}: {section} must be a section, [{section}] on a line")
            for name in keys:
                if name not in SECTIONS[section]:
                    hint = closest(name, list(SECTIONS[section])) or f"; known: {', '.join(SECTIONS[section])}"
                    raise UsageError(f"{path}: unknown key {name} in [{section}]{hint}")

    def named(self, section: str, name: str) -> Any:
        """The value of a key of report.toml; UsageError where it is missing or of another type."""
        value, kind = self.selection.get(section, {}).get(name), SECTIONS[section][name]
        names = value if isinstance(value, list) else [value]
        if not isinstance(value, kind) or not value or not all(isinstance(one, str) for one in names):
            example = '["RUN_ID", …]' if kind is list else f'"{name.upper()}"'
            raise UsageError(f"{self.folder / 'report.toml'}: [{section}] needs {name} = {example}")
        return value

    def runs(self, section: str, run_ids: Sequence[str]) -> list[Record]:
        """The records of finished runs; UsageError where one is missing, of another task, or of other data."""
        for run_id in run_ids:
            if not is_finished(self.folder, run_id):
                runs = self.folder / "runs"
                raise UsageError(
                    f"report.toml names run {run_id}, which is not finished in {runs}: finish or remove it"
                )
        records = [self.read.get(run_id) or Record.read(self.folder, run_id) for run_id in run_ids]
        if len({record.summary["data_fingerprint"] for record in records}) > 1:
            raise UsageError(f"report.toml: the runs of [{section}] come from different data sets")
        for record in records:
            if section == "networks" and "baseline" in record.config:
                raise UsageError(f"report.toml: run {record.run_id} is a baseline: move it to [baselines]")
            if record.facts["task"] != TASKS.get(section, record.facts["task"]):
                raise UsageError(
                    f"report.toml: run {record.run_id} in [{section}] is a run of {record.facts['task']}"
                )
            self.read[record.run_id] = record
        return records

    def trained(self) -> dict[str, list[Record]]:
        """The runs of every section that trains, by the task's name."""
        everything = {
            title: self.runs(section, self.named(section, "runs"))
            for title, section in (("Task 1", "task1"), ("Task 3", "task3"))
            if section in self.selection
        }
        if "task5" in self.selection:
            everything["Task 5"] = self.compared()["fine-tuned"]
        if not everything:
            raise UsageError("report.toml: needs at least one of [task1], [task3] and [task5]")
        return everything

    def explained(self) -> list[str]:
        """The runs of Task 2, the one whose maps are shown first; none without this section."""
        section = self.selection.get("task2", {})
        main = [self.named("task2", "run")] if section else []
        return [*main, *(self.named("task2", "also") if "also" in section else [])]

    def attribution(self, run_id: str) -> Mapping[str, Any]:
        """The record of Task 2 for a run; UsageError where it is missing."""
        path = self.folder / "runs" / run_id / "attribution.json"
        if not path.exists():
            raise UsageError(
                f"report.toml names run {run_id} for Task 2, which is not explained yet: {path} is missing; "
                f"python task2.py --run_id {run_id} makes it"
            )
        self.runs("task2", [run_id])
        content: Mapping[str, Any] = read_json(path)
        return content

    def ablation(self) -> dict[str, list[Record]]:
        """The ablation's runs by row, the reference first; UsageError where it has no table."""
        lines, table = (self.sweep_table("ablation", file, "ablation.yaml") for file in ("runs.csv", "table.csv"))
        # In the order of the table: the first run may be one of another row.
        rows: dict[str, list[Record]] = {line["row"]: [] for line in table}
        for line, record in zip(lines, self.runs("task4", [line["run_id"] for line in lines]), strict=True):
            if "ablation" not in line:
                raise UsageError(f"report.toml: {self.named('task4', 'ablation')} is no ablation; name one")
            rows.setdefault(line["ablation"], []).append(record)
        return {row: records for row, records in rows.items() if records}

    def search(self) -> list[dict[str, str]]:
        """The search's trials, the best one first; none where report.toml names no search."""
        if not self.selection.get("task4", {}).get("search"):
            return []
        lines = self.sweep_table("search", "table.csv", "sweep.yaml")
        if any("rank" not in line for line in lines):
            raise UsageError(f"report.toml: {self.named('task4', 'search')} is no search; name one")
        for shown in list(self.read.values())[:1]:  # the page has one kind of tiles
            for facts in self.provenance(lines):
                tiles = (shown.summary["synthetic"], shown.config["size"])
                if (facts["synthetic"], facts["config"]["size"]) != tiles:
                    raise UsageError(
                        f"report.toml: trial {facts['run_id']} and run {shown.run_id} have other tiles"
                    )
        return lines

    def provenance(self, trials: Sequence[Mapping[str, str]]) -> list[Mapping[str, Any]]:
        """The config.json of the trials that have one: some failed at once, or ran on another machine."""
        paths = [run_folder(self.folder, trial["run_id"]) / "config.json" for trial in trials]
        return [read_json(path) for path in paths if path.exists()]

    def comparison(self) -> Mapping[str, Any]:
        """Task 5's comparison; UsageError where it is missing."""
        name = self.named("task5", "comparison")
        path = self.folder / "runs" / name / "comparison.json"
        if not path.exists():
            raise UsageError(f"{path}: missing; python task5.py --run_id {name} makes it")
        content: Mapping[str, Any] = read_json(path)
        return content

    def compared(self) -> dict[str, list[Record]]:
        """The runs of Task 5's comparison: `from scratch` and `fine-tuned`."""
        kinds = self.comparison()["runs"]
        return {kind: self.runs("task5", [run["run_id"] for run in runs]) for kind, runs in kinds.items()}

    def learning_curve(self) -> list[Record]:
        """The runs of the learning curve, of any task and number of training tiles; none without a curve."""
        sweeps, more = (
            self.named("learning_curve", name) if self.selection.get("learning_curve", {}).get(name) else []
            for name in ("sweeps", "runs")
        )
        lines = [line for name in sweeps for line in self._lines(name, "runs.csv", "learning_curve/…")]
        run_ids = [*(line["run_id"] for line in lines), *more]
        return [self.runs("learning_curve", [run_id])[0] for run_id in run_ids]

    def analysis(self) -> Mapping[str, Any] | None:
        """The record of study/analysis.py; None where the study has none."""
        return read_json(self.folder / "analysis.json") if self.has("analysis.json") else None

    def has(self, path: str) -> bool:
        """Whether the study has this file."""
        return (self.folder / path).is_file()

    def link(self, path: str, text: str) -> str:
        """Markdown of a link to a figure; Fault where its file is missing."""
        if not self.has(path):
            raise Fault(
                f"{self.folder / path}: the report shows this figure, and it is missing: restore it "
                "(python -m study.report draws those in fig/report)"
            )
        self.linked.append(path)
        return f"[{text}]({path})"

    def image(self, path: str, alt: str) -> str:
        """Markdown of a figure; Fault where its file is missing."""
        return f"!{self.link(path, alt)}"

    def sweep_table(self, key: str, file: str, sweep: str) -> list[dict[str, str]]:
        """The lines of a table of the ablation or the search; UsageError where it is missing."""
        return self._lines(self.named("task4", key), file, sweep)

    def _lines(self, name: str, file: str, sweep: str) -> list[dict[str, str]]:
        path = self.folder / "sweeps" / name / file
        if not path.exists():
            raise UsageError(f"{path}: missing; python -m study.sweep {sweep} makes it")
        return read_table(path)

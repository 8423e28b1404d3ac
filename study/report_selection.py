"""The runs of a finished study that report.toml selects for its report."""

import csv
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import Fault, UsageError
from common.records import Record, is_finished, read_json

SECTIONS = ("task1", "task2", "task3", "task4", "task5")


class Study:
    """A study's folder: reads what the selection names, and remembers which files the page links to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.linked: list[str] = []
        path = folder / "report.toml"
        try:
            self.selection = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(f"{path}: no such file; it names the runs to show (make report writes one)") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: {error}") from None
        for name in self.selection:
            if name not in SECTIONS:
                raise UsageError(f"{path}: unknown section {name}; known are {', '.join(SECTIONS)}")

    def named(self, section: str, name: str, kind: type) -> Any:
        """What report.toml says in a section; UsageError where it is missing or of another type."""
        value = self.selection.get(section, {}).get(name)
        if not isinstance(value, kind) or not value:
            raise UsageError(f"{self.folder / 'report.toml'}: [{section}] needs {name} = {_example(name, kind)}")
        return value

    def run(self, run_id: str) -> Record:
        """A finished run; UsageError where there is none."""
        if not is_finished(self.folder, run_id):
            runs = self.folder / "runs"
            raise UsageError(f"report.toml names run {run_id}, which is not finished in {runs}: make report")
        return Record.read(self.folder, run_id)

    def runs(self, section: str) -> list[Record]:
        """The runs of a section, which must be of one data set."""
        records = [self.run(run_id) for run_id in self.named(section, "runs", list)]
        if len({record.summary["data_fingerprint"] for record in records}) > 1:
            raise UsageError(f"report.toml: the runs of [{section}] come from different data sets")
        return records

    def image(self, path: str, alt: str) -> str:
        """Markdown of a figure; Fault where its file is missing."""
        if not (self.folder / path).is_file():
            raise Fault(f"{self.folder / path}: the report shows this figure, and it is missing: make report")
        self.linked.append(path)
        return f"![{alt}]({path})"

    def trained(self) -> dict[str, list[Record]]:
        """The runs of every section that trains, by the task's name."""
        everything = {
            title: self.runs(section)
            for title, section in (("Task 1", "task1"), ("Task 3", "task3"))
            if section in self.selection
        }
        if "task5" in self.selection:
            everything["Task 5"] = [self.run(run["run_id"]) for run in self.comparison()["runs"]["fine-tuned"]]
        if not everything:
            raise UsageError("report.toml: needs at least one of [task1], [task3] and [task5]")
        return everything

    def attribution(self) -> Mapping[str, Any]:
        """What Task 2 found out about its run; UsageError where it has not."""
        run_id = self.named("task2", "run", str)
        path = self.folder / "runs" / run_id / "attribution.json"
        if not path.exists():
            raise UsageError(
                f"report.toml names run {run_id} for Task 2, which is not explained yet: {path} is missing; "
                f"python task2.py --run_id {run_id} makes it"
            )
        content: Mapping[str, Any] = read_json(path)
        return content

    def comparison(self) -> Mapping[str, Any]:
        """Task 5's comparison; UsageError where it is missing."""
        name = self.named("task5", "comparison", str)
        path = self.folder / "runs" / name / "comparison.json"
        if not path.exists():
            raise UsageError(f"{path}: missing; python task5.py --run_id {name} makes it")
        content: Mapping[str, Any] = read_json(path)
        return content

    def sweep_table(self, name: str) -> list[dict[str, str]]:
        """The lines of one of the ablation's CSV files; UsageError where it is missing."""
        path = self.folder / "sweeps" / self.named("task4", "ablation", str) / name
        if not path.exists():
            raise UsageError(f"{path}: missing; python -m study.sweep ablation.yaml makes it")
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def ablation(self) -> dict[str, list[Record]]:
        """The ablation's runs by row, in its order; empty where the page shows none."""
        rows: dict[str, list[Record]] = {}
        for line in self.sweep_table("runs.csv") if "task4" in self.selection else []:
            rows.setdefault(line["ablation"], []).append(self.run(line["run_id"]))
        return rows


def link(record: Record) -> str:
    """Markdown: where the run's records are, and its W&B page if it was online."""
    url = record.summary.get("wandb")
    return f"[{record.run_id}](runs/{record.run_id}/)" + (f" ([W&B]({url}))" if url else "")


def figure(record: Record, name: str) -> str:
    """The path of one of the run's figures, from the study's folder."""
    return f"fig/{record.facts['task']}/{record.summary['figures'][name]}"


def _example(name: str, kind: type) -> str:
    return '["RUN_ID", …]' if kind is list else f'"{name.upper()}"'

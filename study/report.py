"""report.md, made from the records in runs/ and sweeps/ alone.

    python -m study.report                      # report.toml and runs/ here → report.md
    python -m study.report --check              # exit status 1, naming the first difference, if it is out of date
    python -m study.report --output_dir FOLDER  # the same for the study in FOLDER

report.toml names the runs that each section shows. `python -m study` makes all that is missing first.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.config import Keys, key, run_script
from common.errors import Fault
from common.files import atomic_path
from study import report_sections as sections
from study.report_selection import SECTIONS, Study


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Keys):
    """Where the study is, and whether to write or to check."""

    output_dir: Path = key(Path(), "folder of the study: has report.toml, runs/, sweeps/ and fig/, gets report.md")
    check: bool = key(False, "write nothing: exit with 1 if report.md is not what the records give")


def build(study: Study) -> str:
    """The page. Raises UsageError or Fault naming the first thing that is missing."""
    writers: dict[str, Callable[[Study], list[str]]] = {
        "task1": sections.task1,
        "task2": sections.task2,
        "task3": sections.task3,
        "task4": sections.task4,
        "task5": sections.task5,
    }
    lines = sections.opening(study)
    for name in SECTIONS:
        if name in study.selection:
            lines += ["", *writers[name](study)]
    lines += ["", *sections.beyond(study), "", *sections.closing(study)]
    return "\n".join(lines) + "\n"


def first_difference(page: str, made: str) -> str | None:
    """Where two pages differ first, in words; None where they don't."""
    there, here = page.splitlines(), made.splitlines()
    for number, (old, new) in enumerate(zip(there, here, strict=False), start=1):
        if old != new:
            return f"line {number} says {old[:80]!r}, the records give {new[:80]!r}"
    if len(there) != len(here):
        return f"it has {len(there)} lines, the records give {len(here)}"
    return None


def main(config: ReportConfig) -> None:
    """report.toml and the records → report.md, or a check of it."""
    study = Study(config.output_dir)
    path = config.output_dir / "report.md"
    if not config.check:
        from study import report_figures  # matplotlib

        report_figures.draw(study)
    page = build(study)
    if config.check:
        if not path.exists():
            raise Fault(f"{path}: missing; python -m study.report makes it")
        difference = first_difference(path.read_text(encoding="utf-8"), page)
        if difference:
            raise Fault(f"{path} is out of date: {difference}; python -m study.report makes it anew")
        print(f"{path} is what the records give")
        return
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"{path}: {len(study.linked)} figures")


if __name__ == "__main__":
    run_script(main, ReportConfig)

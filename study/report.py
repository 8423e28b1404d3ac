"""report.md, made from the records in runs/ and sweeps/ alone.

    python -m study.report                      # report.toml and runs/ here → report.md and report.html
    python -m study.report --collect            # first write report.toml from what is finished in runs/
    python -m study.report --check              # exit status 1, naming the first difference, if it is out of date
    python -m study.report --output_dir FOLDER  # the same for the study in FOLDER

report.html is the same page as one file, with the figures inside: to hand in, or to send by mail.
report.toml names the runs that each section shows. study/report.md.j2 is the page; a file findings.md.j2 beside
report.toml, if there is one, says what was learnt, for the end of each section. `python -m study` first makes
all that is missing.
"""

import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import FileSystemLoader, StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from common.cli import Fault, Keys, UsageError, first_line, key, run_script
from common.files import read_text, write_text
from common.markdown import filled
from study.report_check import check_study
from study.report_collect import collect
from study.report_facts import facts
from study.report_html import html_page
from study.report_selection import Study


class ReportConfig(Keys):
    """Where the study is, and whether to write or to check."""

    output_dir: Path = key(Path(), "folder of the study: has report.toml, runs/, sweeps/ and fig/, gets report.md")
    check: bool = key(False, "write nothing: exit with 1 if report.md is not what the records give")
    collect: bool = key(False, "first write report.toml, from the finished runs; it replaces an existing one")


def build(study: Study, content: Mapping[str, Any]) -> str:
    """The page; `content` holds the facts. Raises Fault where a figure is missing, or a template has an error."""
    environment = SandboxedEnvironment(
        loader=FileSystemLoader([Path(__file__).parent, study.folder]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    try:
        page = environment.get_template("report.md.j2").render(content)
    except (TemplateError, LookupError, TypeError, ValueError) as error:
        places = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(".j2")]
        where = f"{places[-1].filename}, line {places[-1].lineno}" if places else "report.md.j2"
        raise Fault(f"{where}: {first_line(error)}") from error
    return re.sub(r"\n{3,}", "\n\n", page).strip() + "\n"


def first_difference(page: str, made: str) -> str | None:
    """Where two pages differ first, in words; None where they don't."""
    there, here = page.splitlines(), made.splitlines()
    for number, (old, new) in enumerate(zip(there, here, strict=False), start=1):
        if old != new:
            return f"line {number} says {old[:80]!r}, the records give {new[:80]!r}"
    if len(there) != len(here):
        return f"it has {len(there)} lines, the records give {len(here)}"
    return None


def results(page: str) -> list[str]:
    """What README shows of the page's summary, in one line each: what was learnt, or else the scores."""
    summary = page.split("\n## Summary\n")[1].split("\n## ")[0]
    last_part = summary.split("\n### ")[-1]
    return [line for line in last_part.splitlines() if line.startswith("- ")]


def main(config: ReportConfig) -> None:
    """report.toml and the records → report.md, or a check of it."""
    if config.collect:
        if config.check:
            raise UsageError("--collect writes report.toml and --check writes nothing: use one of them")
        collect(config.output_dir)
    study = Study(config.output_dir)
    content = facts(study)
    ablation, compared = (
        {name: group.records for name, group in content[part].items()} for part in ("ablation", "compared")
    )
    check_study(study, ablation, compared)
    path = config.output_dir / "report.md"
    if not config.check:
        from study import report_figures  # matplotlib

        report_figures.draw(study.folder, content)
    page = build(study, content)
    made = {path: page}
    readme = config.output_dir / "README.md"
    if readme.exists() and "<!-- results: begin -->" in (text := read_text(readme)):
        made[readme] = filled(text, "results", results(page))
    if config.check:
        for file, content_made in made.items():
            if not file.exists():
                raise Fault(f"{file}: missing; python -m study.report makes it")
            difference = first_difference(read_text(file), content_made)
            if difference:
                raise Fault(f"{file} is out of date: {difference}; python -m study.report writes it again")
        print(f"{path} is what the records give")
        return
    for file, content_made in made.items():
        write_text(file, content_made)
    in_one_file = path.with_suffix(".html")
    write_text(in_one_file, html_page(page, study.folder))
    print(f"{path}: {len(study.linked)} figures; {in_one_file}: the same page as one file")


if __name__ == "__main__":
    run_script(main, ReportConfig)

"""The page of a study: its tables, numbers and figures are made from the records of its runs.

    python -m study.report                          # a page about your finished runs: my/report.md, my/report.html
    python -m study.report --output_dir .           # fills report.md, README.md and docs/sources.md
    python -m study.report --output_dir . --check   # exit status 1, naming the first difference, if out of date

The prose of report.md is written by hand. A comment says what stands behind it:

    <!-- results task1 task1_64: begin -->    a table of study/tables.py, with the names of rows, up to
    <!-- results task1 task1_64: end -->
    <!-- = task1 acc -->0.815<!-- -->         a number: see `Tables.number`
    ![text](fig/a.png)<!-- sha256 … -->       a figure, and the first digits of its file's SHA-256

The rows are those of study/groups.py. A folder without report.md gets one that shows its runs.
report.html is the same page as one file, with the figures inside. Before anything is shown, the scores of every
run are computed again from its outputs (common/training/verification.py).
"""

import re
from collections.abc import Sequence
from itertools import takewhile, zip_longest
from pathlib import Path

from common.cli import Fault, Keys, UsageError, key, run_script
from common.data import pathmnist
from common.data.dataset import load_dataset, resize
from common.files import digest, read_text, write_text
from common.markdown import text
from common.training.verification import check_scores
from study.check import check_runs
from study.groups import Runs
from study.html_page import html_page
from study.tables import MAPS, Tables

BLOCK = re.compile(r"<!-- ([^\n>]+): begin -->\n(.*?)<!-- ([^\n>]+): end -->", re.DOTALL)
NUMBER = re.compile(r"<!-- = ([^\n>]+) -->(.*?)<!-- -->", re.DOTALL)
FIGURE = re.compile(r"(!\[[^\]]*\]\((?!https?:)([^)\s]+)\))(<!-- sha256 \w+ -->)?")
FIGURES = Path("fig") / "report"
LADDER, CURVES, LEARNING, AUGMENTATIONS = (
    FIGURES / f"{name}.png" for name in ("ladder", "curves", "learning_curve", "augmentations")
)
OWN_PAGE = "<!-- python -m study.report writes this page anew: keep your own text in another file -->"
COLOURS = "ACC on the validation tiles, and on three copies with changed colours; then test ACC."
FURTHER = ("README.md", "docs/sources.md")  # pages with blocks or numbers
SHOWN_TILE = 6099  # of the test tiles, in the figure of the augmentations: the first of the coursework's ten
IN_CURVES = ("task1_64", "combined_64", "chosen", "scaled", "best_scratch", "tuned", "tuned_scratch")


class ReportConfig(Keys):
    """Where the study is, and whether to write or to check."""

    output_dir: Path = key(Path("my"), "folder of the study: has runs/ and gets report.md")
    check: bool = key(False, "write nothing: exit with 1 if a page is not what the records give")
    data_root: Path | None = key(None, "folder of PathMNIST's 28 px file: also draw fig/report/augmentations.png")


def main(config: ReportConfig) -> None:
    """The records → the tables, numbers and figures of report.md, or a check of them."""
    folder, page = config.output_dir, config.output_dir / "report.md"
    runs = Runs(folder, check_scores)
    if config.check and not page.exists():
        raise UsageError(f"{page}: there is no page yet; without --check this command writes it")
    before = read_text(page) if page.exists() else OWN_PAGE
    by_hand = BLOCK.search(before) is not None
    if not by_hand and not before.startswith(OWN_PAGE):
        raise UsageError(f"{page}: not a page of this command, which would replace it; give it another name")
    rows = runs.groups() if by_hand else runs.recipes()
    tables = Tables(runs, rows, runs.ablation(), runs.curves())
    if not runs.read and not any((folder / "sweeps").glob("*/table.md")):
        raise UsageError(f"{folder / 'runs'}: no finished run with test scores; python task1.py makes one")
    if by_hand:  # a user may well train the same network twice
        check_runs(runs.read.values())
    pages = {page: before if by_hand else own_page(tables)}
    further = (folder / name for name in FURTHER) if by_hand else ()
    pages |= {path: read_text(path) for path in further if path.exists()}
    made = {path: fill(content, tables) for path, content in pages.items()}
    if not config.check:
        draw(tables, by_hand, config.data_root)
    for path, content in made.items():
        made[path] = FIGURE.sub(lambda one: f"{one[1]}<!-- sha256 {digest(folder / one[2])[:16]} -->", content)
    if config.check:
        for path, content in made.items():
            if difference := first_difference(read_text(path), content):
                raise Fault(f"{path} is out of date: {difference}; without --check this command writes it again")
        print(f"{page} is what the records of {len(runs.read)} runs give")
        return
    for path, content in made.items():
        write_text(path, content)
    write_text(page.with_suffix(".html"), html_page(made[page], folder))
    print(f"{page} and {page.with_suffix('.html')}: {len(tables.rows)} rows, {len(runs.read)} runs")


def fill(content: str, tables: Tables) -> str:
    """A page with the blocks and numbers that the records give; Fault for one that is not closed or not known."""

    def block(found: re.Match[str]) -> str:
        name, _, end = found.groups()
        if name != end:
            raise Fault(f"the page's block {name!r} ends as {end!r}")
        lines = "".join(f"{line}\n" for line in tables.block(name))
        return f"<!-- {name}: begin -->\n{lines}<!-- {name}: end -->"

    def number(found: re.Match[str]) -> str:
        return f"<!-- = {found[1]} -->{tables.number(found[1])}<!-- -->"

    filled, blocks = BLOCK.subn(block, content)
    filled, numbers = NUMBER.subn(number, filled)
    if content.count(": begin -->") != blocks or content.count("<!-- = ") != numbers:
        raise Fault("the page has a block or a number that is not closed")
    return filled


def first_difference(page: str, made: str) -> str | None:
    """Where two pages differ first, in words; None where they don't."""
    lines = zip_longest(page.splitlines(), made.splitlines(), fillvalue="")
    for number, (old, new) in enumerate(lines, start=1):
        if old != new:
            equal = takewhile(lambda pair: pair[0] == pair[1], zip(old, new, strict=False))
            start = max(0, len(list(equal)) - 30)
            return f"line {number} says {old[start : start + 80]!r}, the records give {new[start : start + 80]!r}"
    return None


def draw(tables: Tables, by_hand: bool, data_root: Path | None) -> None:
    """Draw the figures of the page, and with `data_root` the augmentations; `by_hand` is the study's own page."""
    from study import figures  # matplotlib

    folder, rows = tables.runs.folder, tables.rows
    if rows:
        figures.draw_ladder(folder / LADDER, rows, figures.AIM if by_hand else None)
    chosen = tables.chosen(IN_CURVES) if by_hand else rows.values()
    trained = {group.name: group.records for group in chosen if group.first.history}
    if trained:
        data = "; ".join(sorted({str(records[0].summary["dataset"]) for records in trained.values()}))
        figures.draw_curves(folder / CURVES, trained, data)
    if tables.curves:
        figures.draw_learning_curve(folder / LEARNING, tables.curves)
    if data_root:
        tiles = load_dataset(pathmnist.NAME, 28, data_root).test.images[SHOWN_TILE : SHOWN_TILE + 1]
        figures.draw_augmentations(folder / AUGMENTATIONS, resize(tiles, 64)[0])


def own_page(tables: Tables) -> str:
    """A page about the runs of a folder."""
    folder, rows = tables.runs.folder, tables.rows
    summaries = [record.summary for record in tables.runs.read.values()]
    data = "; ".join(sorted({one["dataset"] for one in summaries})) or "Sweeps"
    lines = [OWN_PAGE, "", "# Report", "", text(data)]
    if any(one["synthetic"] for one in summaries):
        lines += ["", "> Phantom tiles are generated. They are not tissue: such results are not of PathMNIST."]
    trained = [name for name, group in rows.items() if group.first.history]

    def section(title: str, *parts: Sequence[str]) -> None:
        lines.extend(["", f"## {title}"])
        for part in parts:
            lines.extend(["", *part])

    if rows:
        section("Scores", [f"![Test ACC of each row]({LADDER})"], tables.results(*rows))
    if trained:
        section("Training", tables.recipes(*trained), [f"![Losses and scores by epoch]({CURVES})"])
        section("Classes and colours", tables.classes(*trained), [COLOURS], tables.colours(*trained))
    for path in sorted((folder / "runs").glob("*/attribution.json")):
        run_id = path.parent.name
        names = {MAPS[name]: f"fig/task2/{run_id}-{name}.png" for name in ("means", "randomisation", "removal")}
        shown = ([f"![{words}]({name})"] for words, name in names.items() if (folder / name).exists())
        section(f"Saliency maps of {text(run_id)}", tables.maps(run_id), *shown)
    if trials := tables.trials():
        section("Trials", trials)
    if tables.ablation:
        section("Ablation", tables.techniques())
    if tables.curves:
        section("Fewer training tiles", [f"![Test ACC and validation ACC]({LEARNING})"])
    for path in sorted((folder / "sweeps").glob("*/table.md")):
        section(f"Sweep {text(path.parent.name)}", [read_text(path).strip()])
    if tables.runs.read:
        section("Records", tables.records())
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_script(main, ReportConfig)

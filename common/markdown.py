"""Tables in Markdown, and parts of a page that a program writes."""

import html
from collections.abc import Iterable, Sequence
from typing import Any

from common.cli import Fault


def filled(page: str, name: str, lines: Iterable[str]) -> str:
    """`page` with `lines` between its comments `<!-- name: begin -->` and `<!-- name: end -->`.

    Raises Fault where the page does not have both.
    """
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    before, *rest = page.split(begin)
    after = rest[0].split(end)[1:] if len(rest) == 1 else []
    if len(after) != 1:
        raise Fault(f"the page needs one comment {begin.strip()} and after it, on another line, one {end}")
    return before + begin + "".join(f"{line}\n" for line in lines) + end + after[0]


def markdown_table(columns: Sequence[str], alignment: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; `alignment` has a letter for each column, l for text and r for numbers."""
    rule = ["---:" if letter == "r" else "---" for letter in alignment]
    return [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)]


def text(value: Any) -> str:
    """A text of the records as a cell: it cannot become HTML, a link, or another column."""
    words = html.escape(" ".join(str(value).split()), quote=False)
    return words.replace("|", "\\|").replace("[", "\\[").replace("*", "\\*").replace("_", "\\_")

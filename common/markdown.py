"""Tables in Markdown."""

import html
from collections.abc import Iterable, Sequence
from typing import Any


def markdown_table(columns: Sequence[str], alignment: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; `alignment` has a letter for each column, l for text and r for numbers."""
    rule = ["---:" if letter == "r" else "---" for letter in alignment]
    return [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)]


def text(value: Any) -> str:
    """A text of the records as a cell: it cannot become HTML, a link, or another column."""
    words = html.escape(" ".join(str(value).split()), quote=False)
    return words.replace("|", "\\|").replace("[", "\\[").replace("*", "\\*").replace("_", "\\_")

"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown_line(*cells: str) -> list[str]:
    """One line of a table, as a list that can be added to other lines."""
    return [f"| {' | '.join(cells)} |"]


def markdown_table(columns: Sequence[str], alignment: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; `alignment` has a letter for each column, l for text and r for numbers."""
    rule = ["---:" if letter == "r" else "---" for letter in alignment]
    return [line for cells in (columns, rule, *rows) for line in markdown_line(*cells)]

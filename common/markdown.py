"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown_table(columns: Sequence[str], alignment: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; `alignment` has a letter for each column, l for text and r for numbers."""
    rule = ["---:" if letter == "r" else "---" for letter in alignment]
    return [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)]

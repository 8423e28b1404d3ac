"""The tables of docs/speed.md are those of bench/results."""

from bench.summary import NAME, PAGE, lines
from common.markdown import filled


def test_the_tables_of_speed_are_those_of_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page, NAME, lines()) == page, "python -m bench.summary"

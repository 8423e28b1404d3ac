"""The table of docs/speed.md is that of bench/results, and stands between its comments."""

from bench.throughput import BLOCK, PAGE, filled


def test_the_table_of_speed_is_that_of_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert BLOCK.search(page)
    assert filled(page) == page, "python -m bench.throughput"

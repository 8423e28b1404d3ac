"""The tables of docs/speed.md are those of bench/results, and stand between its comments."""

import pytest

from bench.summary import NAME, PAGE, lines
from common.errors import Fault
from common.markdown import filled


def test_the_tables_of_speed_are_those_of_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert filled(page, NAME, lines()) == page, "python -m bench.summary"


@pytest.mark.parametrize(
    "page", ["", "<!-- x: begin -->\n", "<!-- x: end -->", "<!-- x: begin --> <!-- x: end -->"]
)
def test_a_page_without_both_comments_is_refused(page: str) -> None:
    with pytest.raises(Fault, match="needs one comment <!-- x: begin --> and"):
        filled(page, "x", [])
    assert filled("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb", "x", ["new"]).splitlines()[2] == "new"

"""README's tables of speed are those of bench/results."""

from bench.summary import README, filled


def test_the_tables_of_speed_in_readme_are_those_of_the_results() -> None:
    readme = README.read_text(encoding="utf-8")
    assert filled(readme) == readme, "python -m bench.summary"

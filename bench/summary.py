"""Writes the tables of docs/speed.md from bench/results/, between its two `bench/summary` comments.

python -m bench.summary
"""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.scaling import predicted
from bench.shared import saved
from common.markdown import filled, markdown_table

PAGE, NAME = Path(__file__).parents[1] / "docs" / "speed.md", "bench/summary"


def table(titles: list[str], rows: Iterable[list[str]]) -> list[str]:
    """The lines of a Markdown table and an empty line; its first column is aligned left, the others right."""
    return [*markdown_table(titles, "l" + "r" * (len(titles) - 1), rows), ""]


def medians(row: dict[str, Any], names: Iterable[str], digits: int = 0) -> list[str]:
    return [f"{row[name]['median']:,.{digits}f}" for name in names]


def throughput() -> list[str]:
    ways, ratios = ("plain", "ours", "ceiling"), ("ours/plain", "ours/ceiling")
    titles = ["tiles/s while training", "size", "device", "plain loop", "ours", "ceiling"]
    rows = []
    for record in saved("throughput"):
        for row in record["rows"]:
            network = f"{row['model']}, batch {row['batch_size']}"
            numbers = [*medians(row, ways), *medians(row, ratios, 2)]
            rows.append([network, str(row["size"]), record["device"], *numbers])
    return table([*titles, "ours / plain", "ours / ceiling"], rows)


def pace() -> list[str]:
    lines = []
    for record in saved("pace"):
        titles = [f"tiles/s while training, {record['device']}", "size"]
        commits = [f"commit {record[name][:7]}" for name in ("before", "commit")]
        rows = [
            [row["network"], str(row["size"]), *medians(row, ("before", "after")), *medians(row, ("ratio",), 2)]
            for row in record["rows"]
        ]
        lines += table([*titles, *commits, "ratio"], rows)
    return lines


def startup() -> list[str]:
    lines = []
    for record in saved("startup"):
        title = f"until the end of the first training step, 28 px, {record['device']}"
        rows = [[row["start"], *medians(row, ["seconds"], 1)] for row in record["rows"]]
        lines += table([title, "seconds"], rows)
    return lines


def scaling() -> list[str]:
    titles = ["Task 1's epoch", "size", "device", "seconds", "ms per tile", "peak memory, GB", "predicted, GB"]
    rows = []
    for record in saved("scaling"):
        for row in record["rows"]:
            device = record["device"] + (", tiles on the host" if row["tiles_on"] == "host" else "")
            seconds = f"{statistics.median(row['epoch_seconds']):,.1f}"
            memory = [f"{value / 1e9:.2f}" for value in (row["peak_bytes"], predicted(row))]
            tiles, per_tile = f"{row['tiles']:,} tiles", f"{row['milliseconds_per_tile']:.2f}"
            rows.append([tiles, str(row["size"]), device, seconds, per_tile, *memory])
    return table(titles, rows)


def lines() -> list[str]:
    """The tables that bench/results/ gives now."""
    return [*throughput(), *pace(), *startup(), *scaling()]


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), NAME, lines()), encoding="utf-8")

"""Writes README's tables of speed from bench/results: what stands between its two `bench/summary` comments.

python -m bench.summary
"""

import json
import statistics
from pathlib import Path
from typing import Any

from bench.scaling import predicted
from common.markdown import markdown_line

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- bench/summary: begin -->\n", "<!-- bench/summary: end -->\n"


def read(stem: str) -> list[Any]:
    """The rows of one measurement on every device that has been measured."""
    return [row for path in sorted(RESULTS.glob(f"{stem}-*.json")) for row in json.loads(path.read_text())]


def throughput() -> list[str]:
    lines = [
        "| tiles/s while training | size | device | plain loop | ours | ceiling | ours / plain | ours / ceiling |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in read("throughput"):
        numbers = [f"{row[way]:,.0f}" for way in ("plain", "ours", "ceiling")]
        numbers += [f"{row[ratio]:.2f}" for ratio in ("ours/plain", "ours/ceiling")]
        network = f"{row['model']}, batch {row['batch_size']}"
        lines += markdown_line(network, str(row["size"]), row["device"], *numbers)
    return lines


def pace() -> list[str]:
    content = json.loads((RESULTS / "pace.json").read_text())
    title = f"tiles/s while training, {content['device']}, 1 thread"
    lines = [
        f"| {title} | size | commit {content['before'][:7]} | commit {content['after'][:7]} | ratio |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in content["rows"]:
        numbers = [f"{row['before']:,.0f}", f"{row['after']:,.0f}", f"{row['ratio']:.2f}"]
        lines += markdown_line(row["network"], str(row["size"]), *numbers)
    return lines


def startup() -> list[str]:
    content = json.loads((RESULTS / "startup.json").read_text())
    lines = [f"| until the end of the first training step, 28 px, {content['device']} | seconds |", "|---|---:|"]
    return lines + [f"| {row['start']} | {row['seconds']:.1f} |" for row in content["rows"]]


def scaling() -> list[str]:
    lines = [
        "| Task 1's epoch | size | device | seconds | ms a tile | peak memory, GB | predicted, GB |",
        "|---:|---:|---|---:|---:|---:|---:|",
    ]
    for row in read("scaling"):
        seconds = f"{statistics.median(row['epoch_seconds']):,.1f}"
        memory = [f"{value / 1e9:.2f}" for value in (row["peak_bytes"], predicted(row))]
        device = row["device"] + (", tiles on the host" if row["tiles_on"] == "host" else "")
        per_tile = f"{row['milliseconds_per_tile']:.2f}"
        lines += markdown_line(f"{row['tiles']:,} tiles", str(row["size"]), device, seconds, per_tile, *memory)
    return lines


def filled(readme: str) -> str:
    """README with the tables as bench/results has them now."""
    before, rest = readme.split(START)
    after = rest.split(END)[1]
    tables = [*throughput(), "", *pace(), "", *startup(), "", *scaling(), ""]
    return before + START + "\n".join(tables) + END + after


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")

"""How many phantom tiles a second are generated.

    python -m bench.phantom    # a minute

Prints a Markdown table of median (min to max) over 5 repeats, each of as many tiles as the table says, and writes
bench/results/phantom.json.
"""

import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np

from common import phantom
from common.files import write_json

TILES = {28: 8192, 64: 2048}
REPEATS = 5


def tiles_per_second(size: int) -> float:
    """One timed run over the training centre."""
    started = time.perf_counter()
    for _ in phantom.generate("train", TILES[size], size):
        pass
    return TILES[size] / (time.perf_counter() - started)


def main() -> None:
    """Time every size after one warm-up run."""
    results = {}
    print(f"{os.cpu_count()} cores, {platform.machine()}, numpy {np.__version__}\n")
    print("| size, px | tiles a run | tiles/s: median (min to max), n = 5 |")
    print("|---|---|---|")
    for size, tiles in TILES.items():
        tiles_per_second(size)
        rates = [tiles_per_second(size) for _ in range(REPEATS)]
        results[size] = rates
        print(f"| {size} | {tiles:,} | {statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) |")
    write_json(
        Path(__file__).parent / "results" / "phantom.json",
        {
            "cores": os.cpu_count(),
            "platform": platform.platform(),
            "numpy": np.__version__,
            "tiles_per_second": results,
        },
    )


if __name__ == "__main__":
    main()

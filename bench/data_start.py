"""How long the data take to start with, on a file of the official 64-pixel layout and counts.

    python -m bench.data_start    # about three minutes; needs 4 GB in the temporary folder

Measured in fresh processes: importing alone, the first start (decompress, check, map) and later starts (verify,
map). The tiles are 2,000 phantom ones, repeated: they compress much like real ones, tile by tile.
Prints a Markdown table and writes bench/results/data_start.json.
"""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from bench.tiles import official_arrays
from common import data
from common.files import write_json

ROOT = Path(__file__).resolve().parent.parent
SIZE = 64
POOL = 2000
REPEATS = 5
START = """
import json, sys, time
started = time.perf_counter()
import torch
from pathlib import Path
from common import data
imported = time.perf_counter()
md5 = sys.argv[2]
data._official_address = lambda size: ("nowhere", md5)
dataset = data.load_dataset("pathmnist", 64, Path(sys.argv[1]))
loaded = time.perf_counter()
data.DeviceTiles(dataset.train, torch.device("cpu")).batch(torch.arange(0, 89_996, 703))
print(json.dumps({"imports": imported - started, "load": loaded - imported,
                  "first batch": time.perf_counter() - loaded}))
"""


def write_file(root: Path) -> Path:
    """A pathmnist_64.npz of the official layout and counts."""
    pool = official_arrays({"train": POOL}, SIZE)
    arrays = {}
    for split, count in data.OFFICIAL_COUNTS.items():
        for kind in ("images", "labels"):
            arrays[f"{split}_{kind}"] = pool[f"train_{kind}"][np.arange(count) % POOL]
    path = root / data.official_name(SIZE)
    np.savez_compressed(path, **arrays)
    return path


def start(root: Path, md5: str) -> dict[str, float]:
    """Seconds of one start in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", START, str(root), md5], cwd=ROOT, capture_output=True, text=True, check=True
    )
    times: dict[str, float] = json.loads(done.stdout)
    return times


def main() -> None:
    """Write the file, start once, start again."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        path = write_file(root)
        md5 = data._md5(path)
        first = start(root, md5)
        later = [start(root, md5) for _ in range(REPEATS)]
        megabytes = path.stat().st_size / 1e6
    rows = [("first", [first]), ("later", later)]
    print(
        f"file of {megabytes:,.0f} MB, {platform.processor() or platform.machine()}, torch {torch.__version__}\n"
    )
    print("| start | n | imports, s | load above imports, s: median (min to max) | first batch of 129 tiles, s |")
    print("|---|---|---|---|---|")
    for name, times in rows:
        load = [each["load"] for each in times]
        imports, batch = (statistics.median(each[part] for each in times) for part in ("imports", "first batch"))
        spread = f"{statistics.median(load):.2f} ({min(load):.2f} to {max(load):.2f})"
        print(f"| {name} | {len(times)} | {imports:.2f} | {spread} | {batch:.3f} |")
    write_json(
        ROOT / "bench" / "results" / "data_start.json",
        {
            "file_megabytes": megabytes,
            "tiles": data.OFFICIAL_COUNTS,
            "size": SIZE,
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "seconds": dict(rows),
        },
    )


if __name__ == "__main__":
    main()

"""How fast one core trains: this checkout against another one of the same repository, in turns.

    git worktree add /tmp/before d099721
    python -m bench.pace /tmp/before             # 28 and 64 pixels: 40 minutes
    python -m bench.pace /tmp/before --size=28   # nine minutes

Each measurement is one real run of task1.py or train.py on 9,000 phantom tiles, in a process with one thread; its
tiles/s are those of the second epoch in history.csv, so augmentation, optimiser and data work are counted, and
start-up is not. The two checkouts take turns, so that whatever else the machine does falls on both alike.

Writes bench/results/pace.json (a list of rows) and pace.md (a table).
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common.compute import Compute
from common.tracking import provenance

RESULTS = Path(__file__).parent / "results"
HERE = Path(__file__).resolve().parent.parent
TURNS = 3
NETWORKS = {"task1.py": "resnet18, batch 64", "train.py": "mobilenet_v3_large, batch 512"}


def tiles_per_second(checkout: Path, script: str, size: int, data_root: Path) -> float:
    """The pace of one run's second epoch, on one thread."""
    with tempfile.TemporaryDirectory() as folder:
        keys = [f"--size={size}", f"--data_root={data_root}", f"--output_dir={folder}", "--run_id=pace"]
        fixed = ["--dataset=phantom", "--n_epochs=2", "--device=cpu", "--wandb=disabled"]
        subprocess.run(
            [sys.executable, script, *fixed, *keys],
            cwd=checkout,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        with open(Path(folder, "runs/pace/history.csv"), newline="", encoding="utf-8") as file:
            return float(list(csv.DictReader(file))[1]["tiles_per_second"])


def measured(other: Path, script: str, size: int, data_root: Path) -> dict[str, Any]:
    """A row: medians and ranges of tiles/s, and of the ratio within a turn."""
    turns = []
    for _ in range(TURNS):
        turns.append([tiles_per_second(checkout, script, size, data_root) for checkout in (other, HERE)])
        print(f"{script} {size} px: {turns[-1][0]:.0f} and {turns[-1][1]:.0f} tiles/s", flush=True)
    before, after = zip(*turns, strict=True)
    ratios = sorted(second / first for first, second in turns)
    return {
        "script": script,
        "network": NETWORKS[script],
        "size": size,
        "turns": turns,
        "before": statistics.median(before),
        "after": statistics.median(after),
        "ratio": statistics.median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
    }


def table(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        f"Tiles/s while one core trains, {record['device']}, one thread; {versions}. Medians of {TURNS} turns, "
        f"the range of the ratio in brackets. Before: commit {record['before']}; after: {record['after']}.",
        "",
        "| network | size | before | after | after / before |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in record["rows"]:
        low, high = row["ratio_range"]
        lines.append(
            f"| {row['network']} | {row['size']} | {row['before']:,.0f} | {row['after']:,.0f} | "
            f"{row['ratio']:.2f} ({low:.2f} to {high:.2f}) |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="the other checkout")
    parser.add_argument("--size", type=int, action="append", help="tile side in pixels (default: 28 and 64)")
    arguments = parser.parse_args()
    facts = provenance(("torch", "torchvision", "numpy"))
    commit = subprocess.run(
        ["git", "-C", arguments.checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    with tempfile.TemporaryDirectory() as data_root:
        rows = [
            measured(arguments.checkout.resolve(), script, size, Path(data_root))
            for size in arguments.size or (28, 64)
            for script in NETWORKS
        ]
    record = {
        "device": Compute.of("cpu", "fp32").name.split(",")[0],
        "versions": facts["versions"],
        "before": commit.stdout.strip(),
        "after": facts["commit"],
        "rows": rows,
    }
    (RESULTS / "pace.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (RESULTS / "pace.md").write_text(table(record), encoding="utf-8")
    print(table(record))


if __name__ == "__main__":
    main()

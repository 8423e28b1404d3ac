"""Where the time of task2.py goes.

    python -m bench.saliency OUTPUT_DIR     # a folder with a finished Task 1 run

Runs task2.py there, prints its parts' seconds as a Markdown table and writes bench/results/saliency.md.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    output_dir = Path(sys.argv[1])
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, ROOT / "task2.py", "--output_dir", output_dir, "--wandb", "disabled"], check=True
    )
    wall = time.perf_counter() - started
    newest = max(output_dir.glob("runs/*/attribution.json"), key=lambda path: path.stat().st_mtime)
    record = json.loads(newest.read_text(encoding="utf-8"))
    n = record["n"]
    lines = [
        f"task2.py on {record['dataset']}, {record['device']}, commit {record['commit']}, torch "
        f"{record['versions']['torch']}, n = 1: {wall:.0f} s in all. Maps and removal: {n['removal']} test tiles; "
        f"randomisation {n['randomisation']}, infidelity {n['infidelity']}, sensitivity {n['max_sensitivity']}.",
        "",
        "| part | seconds |",
        "|---|---|",
        *(f"| {name} | {seconds:.1f} |" for name, seconds in record["seconds"].items()),
        f"| the rest: start, the shown tiles' maps, figures | {wall - sum(record['seconds'].values()):.1f} |",
    ]
    print("\n".join(lines))
    Path(__file__).parent.joinpath("results", "saliency.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

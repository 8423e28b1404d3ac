"""How fast one core trains: this checkout against another checkout of the repository.

    git worktree add /tmp/before d099721
    python -m bench.pace /tmp/before    # 40 minutes

Each measurement is one real run of task1.py or train.py on 9,000 phantom tiles, in a process with one thread. Its
tiles/s are those of the second epoch in history.csv: they include augmentation, optimiser and data work, but not
the start. The two checkouts take turns, so that other work on the machine slows both alike.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.shared import save, spread
from common.records.read import read_history
from common.training.device import Compute

HERE = Path(__file__).resolve().parent.parent
TURNS = 3
SIZES = (28, 64)
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
        return read_history(Path(folder, "runs/pace/history.csv"))[1]["tiles_per_second"]


def measured(other: Path, script: str, size: int, data_root: Path) -> dict[str, Any]:
    """A row: tiles/s of the other checkout (before) and of this one (after), and their ratio within a turn."""
    turns = []
    for _ in range(TURNS):
        turns.append([tiles_per_second(checkout, script, size, data_root) for checkout in (other, HERE)])
        print(f"{script} {size} px: {turns[-1][0]:.0f} and {turns[-1][1]:.0f} tiles/s", flush=True)
    before, after = zip(*turns, strict=True)
    return {
        "script": script,
        "network": NETWORKS[script],
        "size": size,
        "before": spread(before),
        "after": spread(after),
        "ratio": spread([second / first for first, second in turns]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.pace",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkout", type=Path, help="the other checkout")
    other = parser.parse_args().checkout.resolve()
    commit = subprocess.run(["git", "-C", other, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    with tempfile.TemporaryDirectory() as data_root:
        rows = [measured(other, script, size, Path(data_root)) for size in SIZES for script in NETWORKS]
    torch.set_num_threads(1)  # the record's device names the number of threads
    save("pace", Compute.of("cpu", "fp32"), rows, before=commit.stdout.strip())


if __name__ == "__main__":
    main()

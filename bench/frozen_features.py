"""What caching a frozen network's features saves, over the coursework's 20 epochs of Task 5.

    python -m bench.frozen_features    # some minutes on one core

Two runs of task5.py in one process, alike but for `cache_features`: MobileNetV3-Large with a frozen backbone, the
coursework's batch of 512, phantom tiles of 28 pixels resized to 112 (the weights' own 224 would cost four times as
much, and gain more). A run's time is its summary's `wall_seconds`: computing the features, training and validating
every epoch, writing checkpoints, scoring the test tiles. The weights are random ones in a file of the official
layout: time does not depend on their values. Pairs are interleaved; the ratio is their median.
Prints the result and writes bench/results/frozen_features.json.
"""

import contextlib
import io
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

import task5
from common.compute import Compute
from common.config import parse
from common.files import write_json
from common.models import build_model

REPEATS = 2
TILES = 900
RESIZE_TO = 112


def seconds(folder: Path, number: int, cached: bool) -> tuple[float, np.ndarray]:
    """The wall time of one run and its test logits."""
    run_id = f"{'cached' if cached else 'plain'}{number}"
    keys = {
        "dataset": "phantom",
        "size": 28,
        "train_tiles": TILES,
        "weights": folder / "w.pth",
        "resize_to": RESIZE_TO,
        "augmentation": "none",
        "cache_features": cached,
        "scratch": False,
        "wandb": "disabled",
        "run_id": run_id,
        "data_root": folder,
        "output_dir": folder,
    }
    config = parse(task5.Task5Config, [f"--{name}={value}" for name, value in keys.items()], "")
    with contextlib.redirect_stdout(io.StringIO()):
        task5.main(config)
    summary = json.loads((folder / "runs" / run_id / "summary.json").read_text())
    with np.load(folder / "runs" / run_id / "scores.npz", allow_pickle=False) as scores:
        return summary["wall_seconds"], scores["last_logits"]


def main() -> None:
    times: dict[str, list[float]] = {"whole network": [], "cached features": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        torch.save(build_model("mobilenet_v3_large", 1000, RESIZE_TO).state_dict(), folder / "w.pth")
        difference = 0.0
        for number in range(REPEATS):
            plain, expected = seconds(folder, number, cached=False)
            cached, found = seconds(folder, number, cached=True)
            times["whole network"].append(plain)
            times["cached features"].append(cached)
            difference = max(difference, float(np.abs(expected - found).max()))
            print(
                f"whole network {plain:.1f} s, cached features {cached:.1f} s: {plain / cached:.1f} times",
                flush=True,
            )
    ratios = [plain / cached for plain, cached in zip(*times.values(), strict=True)]
    result = {
        "network": f"mobilenet_v3_large, frozen but for its classifier, inputs of {RESIZE_TO} pixels",
        "epochs": task5.Task5Config().n_epochs,
        "tiles": {"train": TILES, "val": TILES // 9, "test": TILES // 5},
        "device": Compute.of("auto", "auto").name,
        "torch": torch.__version__,
        "seconds": times,
        "ratio": {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)},
        "largest difference of test logits": difference,
    }
    write_json(Path(__file__).parent / "results" / "frozen_features.json", result)
    print(f"median ratio {statistics.median(ratios):.1f}; largest difference of test logits {difference:.1e}")


if __name__ == "__main__":
    main()

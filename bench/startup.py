"""Seconds from the start of a process to the end of its first training step: a plain loop, and task1.py.

    python -m bench.startup

Both read the same file of the official layout, with PathMNIST's tile counts at 28 pixels (its tiles are phantom
ones): medmnist decompresses it at every start; task1.py unpacks it once and maps it ever after, so its first and
its later starts are told apart. Starts take turns; the file is in the page cache.
Writes bench/results/startup.json and .md.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.tiles import official_arrays
from common import data
from common.compute import Compute
from common.tracking import provenance

RESULTS = Path(__file__).parent / "results"
REPEATS = 5
SIZE = 28
# What both processes begin with: the end of the first step is told, and ends the process.
FIRST_STEP = """
import os, sys, time
def tell(*_):
    print("first step", time.time(), flush=True)
    os._exit(0)
"""
# The loop of a tutorial, and nothing of this project that its imports would have to wait for.
PLAIN = """
import medmnist
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.models import resnet18
register_optimizer_step_post_hook(tell)
steps = [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
tiles = medmnist.PathMNIST("train", transform=transforms.Compose(steps), root=os.environ["ROOT"])
model = resnet18(num_classes=9).to(os.environ["DEVICE"])
optimizer = torch.optim.Adam(model.parameters())
for images, labels in DataLoader(tiles, batch_size=64, shuffle=True):
    outputs = model(images.to(os.environ["DEVICE"]))
    loss = torch.nn.functional.cross_entropy(outputs, labels.squeeze(1).long().to(os.environ["DEVICE"]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""
OURS = """
import task1
from common import data
from common.config import run_script
data._official_address = lambda size: ("http://127.0.0.1:9", os.environ["MD5"])
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(tell)
keys = ["--dataset=pathmnist", "--size=28", "--wandb=disabled"]
keys += [f"--data_root={os.environ['ROOT']}", f"--output_dir={os.environ['ROOT']}/output"]
run_script(task1.main, task1.Task1Config, keys)
"""


def seconds(program: str, environment: dict[str, str]) -> float:
    """From the start of the process to the end of its first step."""
    started = time.time()
    command = [sys.executable, "-c", FIRST_STEP + program]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("first step"))
    return float(line.split()[-1]) - started


def write_file(root: Path) -> str:
    """A file of the official layout; returns its MD5."""
    path = root / data.official_name(SIZE)
    np.savez_compressed(path, **official_arrays(data.OFFICIAL_COUNTS, SIZE))
    return data._md5(path)


def main() -> None:
    compute = Compute.of("auto", "auto")
    facts = provenance(("torch", "torchvision", "medmnist", "numpy"))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        environment = {"ROOT": folder, "MD5": write_file(root), "DEVICE": compute.device.type}
        turns = []
        for _ in range(REPEATS):
            shutil.rmtree(root / "pathmnist.arrays", ignore_errors=True)
            turns.append([seconds(program, environment) for program in (PLAIN, OURS, OURS)])
            print("plain {:.1f} s, ours first {:.1f} s, later {:.1f} s".format(*turns[-1]), flush=True)
    names = ("plain loop, every start", "task1.py, first start", "task1.py, later starts")
    rows = []
    for name, values in zip(names, zip(*turns, strict=True), strict=True):
        rows.append({"start": name, "seconds": statistics.median(values), "range": [min(values), max(values)]})
    content = {
        "device": compute.name,
        "repeats": REPEATS,
        "commit": facts["commit"],
        "versions": facts["versions"],
    }
    (RESULTS / "startup.json").write_text(json.dumps({**content, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    lines = [
        f"Process start to the end of the first training step, PathMNIST's counts at 28 px, {compute.name}; "
        f"commit {facts['commit']}; medians of {REPEATS} turns, ranges in brackets.",
        "",
        "| start | seconds |",
        "|---|---:|",
        *(
            f"| {row['start']} | {row['seconds']:.1f} ({row['range'][0]:.1f} to {row['range'][1]:.1f}) |"
            for row in rows
        ),
    ]
    (RESULTS / "startup.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""Seconds from the start of a process to the end of its first training step: a plain loop, and task1.py.

    python -m bench.startup

Both train on PathMNIST at 28 pixels, which is downloaded into ~/.medmnist if it is not there. medmnist
decompresses the file at every start. task1.py unpacks it at its first start and maps the arrays at later starts.
The three kinds of start take turns; the file is in the page cache.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.shared import save, spread
from common.data.dataset import load_dataset
from common.data.pathmnist import official_file
from common.training.device import Compute
from task1 import Task1Config

REPEATS = 5
SIZE = 28
# Both processes begin with this: the end of the first step ends the process.
FIRST_STEP = """
import os, sys, time
from torch.optim.optimizer import register_optimizer_step_post_hook
def stop(*_):
    print("first step", time.time(), flush=True)
    os._exit(0)
register_optimizer_step_post_hook(stop)
"""
# The loop of a tutorial. It imports nothing of this project, so that it need not wait for that.
PLAIN = """
import medmnist
import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.models import resnet18
root, device = sys.argv[1:]
steps = [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
tiles = medmnist.PathMNIST("train", transform=transforms.Compose(steps), root=root)
model = resnet18(num_classes=9).to(device)
optimizer = torch.optim.Adam(model.parameters())
for images, labels in DataLoader(tiles, batch_size=64, shuffle=True):
    loss = torch.nn.functional.cross_entropy(model(images.to(device)), labels.squeeze(1).long().to(device))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""
OURS = """
import task1
from common.config import run_script
root, device = sys.argv[1:]
keys = ["--dataset=pathmnist", "--size=28", "--wandb=disabled", f"--device={device}"]
run_script(task1.main, task1.Task1Config, [*keys, f"--data_root={root}", f"--output_dir={root}/output"])
"""


def seconds(program: str, root: Path, device: str) -> float:
    """Seconds from the start of the process to the end of its first step."""
    started = time.time()
    command = [sys.executable, "-c", FIRST_STEP + program, root, device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("first step"))
    return float(line.split()[-1]) - started


def main() -> None:
    compute = Compute.of("auto", "auto")
    data_root = Task1Config().data_root
    load_dataset("pathmnist", SIZE, data_root)  # downloads the file, if it is missing
    names = ("plain loop, every start", "task1.py, first start", "task1.py, later starts")
    turns = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        name = official_file(SIZE).name
        (root / name).symlink_to(data_root.resolve() / name)
        for _ in range(REPEATS):
            shutil.rmtree(root / "pathmnist.arrays", ignore_errors=True)
            turns.append([seconds(program, root, compute.device.type) for program in (PLAIN, OURS, OURS)])
            print("plain {:.1f} s, ours first {:.1f} s, later {:.1f} s".format(*turns[-1]), flush=True)
    columns = zip(*turns, strict=True)
    rows = [{"start": name, "seconds": spread(column)} for name, column in zip(names, columns, strict=True)]
    save("startup", compute, rows)


if __name__ == "__main__":
    main()

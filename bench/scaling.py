"""Time per epoch and peak memory of Task 1 as tiles become more, and as they become larger.

    python -m bench.scaling

Each case is a separate process, which trains task1.py's ResNet-18 (batch 64) for an epoch or three on phantom
tiles; its first steps are not timed. Peak memory is the process's largest resident set (Linux) or, on a
GPU, PyTorch's largest allocation. What it should be:

    base + 3 S² N + 16 P + 2.2 B A(S)   bytes

for N training tiles of S pixels (uint8), P parameters (weight, gradient, Adam's two moments; float32), a batch of
B, and A(S), what one tile leaves for the backward pass. `base` is what the process has before it builds the
network, libraries and one step of a tiny network included (0 on a GPU); A(S) is the size of the tensors that
autograd saves, counted. The factor 2.2, for gradients on their way back and what the allocator keeps, is a fit
on a CPU.

On a GPU every case is also run with its tiles kept on the host, the fallback for tiles that do not fit.
Writes bench/results/scaling-<device>.json (a list of rows) and .md (a table).
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.tiles import trainer_of
from common import data
from common.compute import Compute
from common.tracking import provenance
from task1 import Task1Config

RESULTS = Path(__file__).parent / "results"
COUNTS = (1_000, 4_000, 16_000, 89_996)  # at 28 pixels
SIZES = (28, 64, 128, 224)  # of 1,000 tiles
LARGE = 50_000  # tiles from which one epoch is enough to time
EPOCHS = 3


def peak(compute: Compute) -> int:
    """Bytes that the process, or the GPU's part of it, has needed at most so far."""
    if compute.device.type == "cuda":
        return torch.cuda.max_memory_allocated(compute.device)
    # Linux's own count: getrusage's is the parent's where that has needed more before it started this process.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def saved_bytes(model: torch.nn.Module, inputs: torch.Tensor, compute: Compute) -> int:
    """The size of all tensors that the forward pass leaves for the backward pass, weights not counted."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), compute.autocast():
        logits = model(inputs)
        logits.sum()
    return sum(found.values())


def case(n_tiles: int, size: int, root: Path, on_host: bool) -> dict[str, Any]:
    """One row, measured in this process; the phantom's arrays must be there already."""
    compute = Compute.of("auto", "auto")
    config = Task1Config(dataset="phantom", size=size, train_tiles=generated(n_tiles, size), data_root=root)
    dataset = data.load_dataset("phantom", size, root, config.train_tiles)
    tiny = torch.nn.Conv2d(3, 3, 3).to(compute.device)
    tiny(torch.rand(2, 3, 8, 8, device=compute.device)).sum().backward()
    torch.optim.Adam(tiny.parameters(), fused=True).step()
    cuda = compute.device.type == "cuda"
    if not cuda:  # forget what checking the data's files has mapped for a moment
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    base = 0 if cuda else peak(compute)

    if on_host:
        data.RESIDENT_SHARE = 0.0
    split = data.Split(dataset.train.images[:n_tiles], dataset.train.labels[:n_tiles])
    with tempfile.TemporaryDirectory() as folder:
        trainer_of(config, data.Split(split.images[:256], split.labels[:256]), Path(folder)).train_epoch(1)
        trainer = trainer_of(config, split, Path(folder))
    model, tiles = trainer.model, trainer.splits.train
    seconds = []
    for epoch in range(1, (EPOCHS if n_tiles < LARGE else 1) + 1):
        started = time.perf_counter()
        trainer.train_epoch(epoch)  # reads the loss: it waits for a GPU
        seconds.append(time.perf_counter() - started)
    measured = peak(compute)
    inputs, _ = tiles.inputs(torch.arange(config.batch_size, device=tiles.index_device))
    activations = saved_bytes(model, inputs, compute)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    resident = 0 if cuda and tiles.index_device != compute.device else split.images.nbytes
    return {
        "task": "task1",
        "model": config.model_name,
        "batch_size": config.batch_size,
        "tiles": n_tiles,
        "size": size,
        "device": compute.name,
        "tiles_on": "host" if on_host else "device",
        "epoch_seconds": seconds,
        "milliseconds_per_tile": 1000 * statistics.median(seconds) / n_tiles,
        "base_bytes": base,
        "tile_bytes": resident,
        "parameters": n_parameters,
        "saved_bytes_per_tile": activations // config.batch_size,
        "peak_bytes": measured,
    }


def predicted(row: dict[str, Any]) -> float:
    """The bytes that the formula gives for a row."""
    activations = row["batch_size"] * row["saved_bytes_per_tile"]
    return row["base_bytes"] + row["tile_bytes"] + 16 * row["parameters"] + 2.2 * activations


def generated(n_tiles: int, size: int) -> int:
    """How many tiles the phantom has of which these are the first: one file a size."""
    return max(COUNTS) if size == 28 else n_tiles


def table(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    first = rows[0]
    lines = [
        f"One epoch of {first['model']}, batch {first['batch_size']}, phantom tiles, {first['device']}; torch "
        f"{facts['versions']['torch']}; commit {facts['commit']}. Medians of {EPOCHS} epochs, ranges in brackets; "
        f"from {LARGE:,} tiles on, one epoch. Predicted by the formula in bench/scaling.py.",
        "",
        "| tiles | size | tiles on | epoch, s | ms a tile | peak memory, GB | predicted, GB | ratio |",
        "|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        seconds = row["epoch_seconds"]
        spread = f" ({min(seconds):.2f} to {max(seconds):.2f})" if len(seconds) > 1 else ""
        lines.append(
            f"| {row['tiles']:,} | {row['size']} | {row['tiles_on']} | {statistics.median(seconds):.2f}{spread} | "
            f"{row['milliseconds_per_tile']:.3f} | {row['peak_bytes'] / 1e9:.2f} | "
            f"{predicted(row) / 1e9:.2f} | {row['peak_bytes'] / predicted(row):.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    facts = provenance(("torch", "torchvision", "numpy"))
    compute = Compute.of("auto", "auto")
    cases = [(count, 28) for count in COUNTS] + [(1_000, size) for size in SIZES if size != 28]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for n_tiles, size in cases:
            data.load_dataset("phantom", size, Path(folder), generated(n_tiles, size))
            for where in ("device", "host") if compute.device.type == "cuda" else ("device",):
                command = [sys.executable, "-m", "bench.scaling", str(n_tiles), str(size), folder, where]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                rows[-1] |= {"versions": facts["versions"], "commit": facts["commit"]}
                print(table(rows, facts).splitlines()[-1], flush=True)
    stem = f"scaling-{compute.device.type}"
    (RESULTS / f"{stem}.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    (RESULTS / f"{stem}.md").write_text(table(rows, facts), encoding="utf-8")
    print(table(rows, facts))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        count, side, folder_name, place = sys.argv[1:]
        print(json.dumps(case(int(count), int(side), Path(folder_name), place == "host")))
    else:
        main()

"""Time per epoch and peak memory of Task 1 for more tiles, and for larger tiles.

    python -m bench.scaling

Each case is a separate process, which trains task1.py's ResNet-18 (batch 64) on phantom tiles for one epoch or
three, after some steps that are not timed. Peak memory is the largest resident set of the process (Linux) or, on a
GPU, PyTorch's largest allocation. It should be

    base + 3 S² N + 16 P + 2.2 B A(S)   bytes

for N training tiles of S pixels (uint8), P parameters (weight, gradient, Adam's two moments; float32), and batches
of B tiles. `base` is the memory of the process before it builds the network: libraries, and one step of a tiny
network (0 on a GPU). A(S) is the size of the tensors that autograd saves for one tile; they are counted. The
factor 2.2 is a fit on a CPU: gradients, and memory that the allocator keeps.

On a GPU every case is also run with its tiles kept on the host, the fallback for tiles that do not fit.
"""

import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.shared import save, separate_process, trainer_of
from common.data import batches as tiles_on_device
from common.data import dataset
from common.training.device import Compute
from task1 import Task1Config

CASES = ((1_000, 28), (4_000, 28), (16_000, 28), (89_996, 28), (1_000, 64), (1_000, 128), (1_000, 224))
LARGE = 50_000  # tiles from which one epoch is enough to time
EPOCHS = 3


def case(n_tiles: int, size: int, root: Path, on_host: bool) -> dict[str, Any]:
    """One row, measured in this process. The arrays of the phantom must be in `root` already."""
    compute = Compute.of("auto", "auto")
    config = Task1Config(dataset="phantom", size=size, train_tiles=n_tiles, data_root=root, run_id="bench")
    split = dataset.load_dataset("phantom", size, root, n_tiles).train
    tiny = torch.nn.Conv2d(3, 3, 3).to(compute.device)
    tiny(torch.rand(2, 3, 8, 8, device=compute.device)).sum().backward()
    torch.optim.Adam(tiny.parameters(), fused=True).step()
    cuda = compute.device.type == "cuda"
    if not cuda:  # reset the peak: to check the data's files, all of them were mapped for a moment
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    base = 0 if cuda else peak(compute)

    if on_host:
        tiles_on_device.RESIDENT_SHARE = 0.0
    with tempfile.TemporaryDirectory() as folder:
        first_tiles = dataset.Split(split.images[:256], split.labels[:256])
        trainer_of(config, first_tiles, Path(folder, "warm-up")).train_epoch(1)
        trainer = trainer_of(config, split, Path(folder))
    model, tiles = trainer.model, trainer.splits.train
    seconds = []
    for epoch in range(1, (EPOCHS if n_tiles < LARGE else 1) + 1):
        started = time.perf_counter()
        trainer.train_epoch(epoch)  # reads the loss, and so waits for a GPU
        seconds.append(time.perf_counter() - started)
    measured = peak(compute)
    inputs, _ = tiles.inputs(torch.arange(config.batch_size, device=tiles.index_device))
    return {
        "task": "task1",
        "model": config.model_name,
        "batch_size": config.batch_size,
        "tiles": n_tiles,
        "size": size,
        "tiles_on": "host" if on_host else "device",
        "epoch_seconds": seconds,
        "milliseconds_per_tile": 1000 * statistics.median(seconds) / n_tiles,
        "base_bytes": base,
        "tile_bytes": 0 if cuda and on_host else split.images.nbytes,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "saved_bytes_per_tile": saved_bytes(model, inputs, compute) // config.batch_size,
        "peak_bytes": measured,
    }


def peak(compute: Compute) -> int:
    """The most bytes that the process, or its part on the GPU, has needed so far; 0 where it is not known."""
    if compute.device.type == "cuda":
        return torch.cuda.max_memory_allocated(compute.device)
    # getrusage would give the parent's peak where that is larger.
    status = Path("/proc/self/status")  # only Linux has it
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii")) if status.exists() else None
    return 1024 * int(found[1]) if found else 0


def saved_bytes(model: torch.nn.Module, inputs: torch.Tensor, compute: Compute) -> int:
    """The size of all tensors that autograd saves in the forward pass, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), compute.autocast():
        model(inputs)
    return sum(found.values())


def predicted(row: dict[str, Any]) -> float:
    """The bytes that the formula gives for a row."""
    activations = row["batch_size"] * row["saved_bytes_per_tile"]
    return row["base_bytes"] + row["tile_bytes"] + 16 * row["parameters"] + 2.2 * activations


def main() -> None:
    compute = Compute.of("auto", "auto")
    places = ("device", "host") if compute.device.type == "cuda" else ("device",)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for n_tiles, size in CASES:
            dataset.load_dataset("phantom", size, Path(folder), n_tiles)
            for place in places:
                with separate_process() as process:
                    row = process.submit(case, n_tiles, size, Path(folder), place == "host").result()
                print(
                    f"{n_tiles:,} tiles of {size} px on the {place}: {row['milliseconds_per_tile']:.2f} ms per "
                    f"tile, {row['peak_bytes'] / 1e9:.2f} GB, predicted {predicted(row) / 1e9:.2f} GB",
                    flush=True,
                )
                rows.append(row)
    save("scaling", compute, rows)


if __name__ == "__main__":
    main()

"""Measures what augmentation costs beside a training step, and against the tile-by-tile PIL path.

    python -m bench.augment

prints a Markdown table and writes its rows to bench/results/augment.json. Training steps, our augmentation and
the peer take turns, so that whatever else the machine does falls on all three alike.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

from common.augment import build_augmentation

RESULTS = Path(__file__).parent / "results" / "augment.json"
BATCH_SIZES = {"resnet18": 64, "mobilenet_v3_large": 128}
SIZES = (28, 64)
NAMES = ("ta_wide", "auto", "stain")
REPEATS = 7
THREADS = 2
# Tiles a repeat of the peer: it needs no more for a stable rate.
PEER_TILES = 64


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def random_images(count: int, size: int) -> torch.Tensor:
    """Smooth tiles with some noise, uint8 (count, 3, size, size) in channels_last memory."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=generator) * 220
    smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
    noise = torch.rand(smooth.shape, generator=generator) * 35
    return (smooth + noise).to(torch.uint8).contiguous(memory_format=torch.channels_last)


def training_step(model_name: str, images: torch.Tensor) -> Callable[[], None]:
    """One step: forward, backward and AdamW on the normalised images."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(model_name, num_classes=9).to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(model.parameters())
    targets = torch.randint(9, (len(images),))

    def step() -> None:
        optimiser.zero_grad()
        logits = model(images.float().div_(127.5).sub_(1.0))
        torch.nn.functional.cross_entropy(logits, targets).backward()
        optimiser.step()

    return step


def peer(name: str) -> v2.Compose | None:
    """The same on one PIL image by torchvision; None for stain, which it does not have."""
    policies = {"ta_wide": v2.TrivialAugmentWide, "auto": v2.AutoAugment}
    if name not in policies:
        return None
    flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
    return v2.Compose([*flips, policies[name](), v2.PILToTensor(), v2.RandomErasing(p=0.1, value=128)])


def measure(model_name: str, size: int) -> list[dict[str, object]]:
    """One row an augmentation: the seconds of every repeat of the step, of ours and of the peer."""
    count = BATCH_SIZES[model_name]
    images = random_images(count, size)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images[:PEER_TILES]]
    step, generator = training_step(model_name, images), torch.Generator().manual_seed(0)
    works: dict[str, Callable[[], object]] = {"step": step}
    for name in NAMES:
        works[name] = partial(build_augmentation(name), images, generator)
        if transform := peer(name):
            works[f"peer {name}"] = partial(lambda run: [run(picture) for picture in pictures], transform)
    times: dict[str, list[float]] = {work: [] for work in works}
    for _ in range(2):
        step()
    # Ours makes a table for every shear, shift and angle when it first meets it.
    for _ in range(20):
        for name in NAMES:
            works[name]()
    for _ in range(REPEATS):
        for label, work in works.items():
            times[label].append(seconds(work))
    return [
        {
            "model": model_name,
            "size": size,
            "batch": count,
            "augmentation": name,
            "step_seconds": times["step"],
            "augmentation_seconds": times[name],
            "peer_tiles": PEER_TILES,
            "peer_seconds": times.get(f"peer {name}"),
        }
        for name in NAMES
    ]


def spread(values: list[float], digits: int) -> str:
    """Median and, in brackets, least and greatest."""
    low, middle, high = (f"{f(values):,.{digits}f}" for f in (min, statistics.median, max))
    return f"{middle} ({low}–{high})"


def table_line(row: dict) -> str:
    ours, step = row["augmentation_seconds"], row["step_seconds"]
    share = 100 * statistics.median(ours) / statistics.median(step)
    theirs = row["peer_seconds"]
    cells = [
        row["model"],
        row["size"],
        row["augmentation"],
        spread([1e3 * t for t in step], 0),
        spread([1e3 * t for t in ours], 1),
        f"{share:.1f}",
        spread([row["batch"] / t for t in ours], 0),
        spread([row["peer_tiles"] / t for t in theirs], 0) if theirs else "–",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(": ", 1)[1]
    return platform.processor()


def main() -> None:
    torch.set_num_threads(THREADS)
    rows = [row for model_name in BATCH_SIZES for size in SIZES for row in measure(model_name, size)]
    print(
        f"Median (least–greatest) of {REPEATS} interleaved repeats, {THREADS} threads, channels_last float32.\n\n"
        "| Model | Pixels | Augmentation | Step, ms | Ours, ms a batch | Share, % | Ours, tiles/s "
        "| PIL + torchvision, tiles/s |\n| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |"
    )
    print("\n".join(map(table_line, rows)))
    packages = ("torch", "torchvision", "pillow", "numpy")
    setting = {
        "processor": processor(),
        "logical_processors": os.cpu_count(),
        "threads": THREADS,
        "repeats": REPEATS,
        "load_average_at_end": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

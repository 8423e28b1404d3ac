"""What PointConv2d saves of a training step, against nn.Conv2d in the same network.

    python -m bench.point_conv

Prints a Markdown table: median step time of both in milliseconds and the median and range of their ratio over
interleaved pairs. Writes bench/results/point_conv.md.
"""

import statistics
import time
from pathlib import Path

import torch
from torch import nn

from common.compute import Compute
from common.models import build_model

BATCH, REPEATS, STEPS = 64, 9, 4


def stepper(model_name: str, size: int, plain: bool) -> nn.Module:
    """The network in training mode, channels_last; `plain` puts nn.Conv2d back."""
    torch.manual_seed(0)
    model = build_model(model_name, 9, size).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in model.modules():
        if plain and isinstance(module, nn.Conv2d):
            module.__class__ = nn.Conv2d
    return model


def milliseconds(model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> float:
    """Mean time of a forward and backward pass over `STEPS` of them."""
    started = time.perf_counter()
    for _ in range(STEPS):
        model.zero_grad()
        nn.functional.cross_entropy(model(images), targets).backward()
    return (time.perf_counter() - started) / STEPS * 1e3


def main() -> None:
    lines = [
        f"PointConv2d against nn.Conv2d: a training step without the optimiser, batch {BATCH}, "
        f"{Compute.of('cpu', 'fp32').name}, "
        f"torch {torch.__version__}; medians of {REPEATS} interleaved pairs, range of the ratio in brackets.",
        "",
        "| network | size | nn.Conv2d, ms | PointConv2d, ms | ratio |",
        "|---|---|---|---|---|",
    ]
    for model_name in ("resnet18", "mobilenet_v3_large"):
        for size in (28, 64):
            images = torch.randn(BATCH, 3, size, size).contiguous(memory_format=torch.channels_last)
            targets = torch.randint(0, 9, (BATCH,))
            both = [stepper(model_name, size, plain) for plain in (True, False)]
            for model in both:
                milliseconds(model, images, targets)
            pairs = [[milliseconds(model, images, targets) for model in both] for _ in range(REPEATS)]
            plain, point = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratios = sorted(first / second for first, second in pairs)
            lines.append(
                f"| {model_name} | {size} | {plain:.0f} | {point:.0f} | "
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |"
            )
            print(lines[-1], flush=True)
    Path(__file__).parent.joinpath("results", "point_conv.md").write_text(
        "\n".join(lines) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()

"""What the page knows without records: published scores, and the size and cost of a network."""

from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from common.data.pathmnist import CLASS_NAMES
from common.training.models import build_model

# Network, side of the tiles and of the inputs, test ACC and AUC.
PUBLISHED = {
    "published_task1": [
        ("coursework, one seed: ResNet-18 from scratch", "64 px", 0.8951, 0.9803),
        ("Yang et al. 2023: ResNet-18 with a first layer for small images", "28 px", 0.907, 0.983),
    ],
    "published_task3": [
        ("coursework, one seed: MobileNetV3-Large from scratch", "64 px", 0.9132, 0.9876),
        ("Yang et al. 2023: ResNet-50 with a first layer for small images", "28 px", 0.911, 0.990),
    ],
    "published_task5": [
        (
            "coursework, one seed: MobileNetV3-Large, ImageNet weights, frozen convolutions",
            "64 px",
            0.9123,
            0.9889,
        ),
        ("Doerrich et al. 2025, 3 seeds: VGG16 fine-tuned, padded tiles", "28 → 224 px", 0.889, 0.986),
        ("Doerrich et al. 2025, 3 seeds: VGG16 fine-tuned, padded tiles", "64 → 224 px", 0.938, 0.993),
    ],
}


@cache
def cost(model_name: str, side: int) -> tuple[int, int]:
    """The parameters of a network with nine outputs, and its multiply-adds for one input of `side` pixels."""
    # On "meta" there are shapes alone. SmallMapConv2d does less work than is counted, but only on a CPU.
    model = build_model(model_name, len(CLASS_NAMES), side).eval().to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, side, side, device="meta"))
    return sum(one.numel() for one in model.parameters()), counter.get_total_flops() // 2

"""The networks: torchvision's classification models by name, timm's as `timm:NAME`, for tiles of any size."""

import importlib.util
from functools import cache

import torch
from torch import nn
from torchvision import models

from common.cli import UsageError, closest, first_line, is_out_of_memory
from common.training.convolutions import use_small_map_convolutions

TIMM = "timm:"  # the names of timm's networks begin with it
LITE = tuple(f"tf_efficientnet_lite{number}" for number in range(3))  # these are also known without it


@cache
def model_names() -> list[str]:
    """Torchvision's classification models without the quantised ones."""
    return list(models.list_models(module=models))


def check_model_name(name: str) -> None:
    """Raise UsageError for a name that `build_model` does not know, and for one of timm where it is missing."""
    lacks, names = "torchvision has no classification model of this name; timm's are timm:NAME", model_names()
    name = f"{TIMM}{name}" if name in LITE else name
    if name.startswith(TIMM):
        if importlib.util.find_spec("timm") is None:
            raise UsageError(f"--model_name {name}: needs the package timm; python -m pip install timm")
        import timm  # takes seconds, and torchvision's networks do not need it

        lacks, names = "timm has no model of this name", [f"{TIMM}{known}" for known in timm.list_models()]
    if name not in names:
        raise UsageError(f"--model_name {name}: {lacks}{closest(name, names)}")


def build_model(model_name: str, num_classes: int, size: int) -> nn.Module:
    """A network for inputs of `size` pixels; its random weights come from torch's global generator.

    It takes (N, 3, size, size) float32 and returns logits (N, num_classes). Raises UsageError for an unknown name,
    and where the network cannot take inputs of this size.
    """
    check_model_name(model_name)
    options: dict[str, object] = {}
    if model_name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}  # auxiliary heads need tiles of 224 or 299 pixels
    elif model_name.startswith("vit_"):
        options = {"image_size": size}  # position embeddings have one size
    model: nn.Module
    try:
        if model_name.startswith(TIMM) or model_name in LITE:
            import timm

            model = timm.create_model(model_name.removeprefix(TIMM), num_classes=num_classes)
        else:
            model = models.get_model(model_name, weights=None, num_classes=num_classes, **options)
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise UsageError(
            f"--model_name {model_name} cannot take inputs of {size} pixels ({first_line(error)}): "
            "choose a larger --input_size, or another model"
        ) from error
    return use_small_map_convolutions(model).train()

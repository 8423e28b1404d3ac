"""The stages of a network: its layers in groups, by the size of the maps that they compute.

Maps are outputs (N, C, H, W) with H = W. The functions run the network once on `image`, (1, 3, size, size).
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from common.cli import UsageError
from common.finetune.network import FineTunedNetwork

HEAD = "head"  # the stage of all layers after the last map
COARSEST = 8  # Grad-CAM takes a block whose map has at least an eighth of the tile's side


def map_sides(model: nn.Module, image: torch.Tensor) -> dict[str, int]:
    """The side in pixels of each module's map, by name, in the order in which the modules end their work.

    It is 0 where the output is not a map. Modules without parameters are left out.
    """
    sides: dict[str, int] = {}

    def note(_module: nn.Module, _inputs: Any, output: Any, name: str) -> None:
        is_map = isinstance(output, torch.Tensor) and output.dim() == 4 and output.shape[2] == output.shape[3]
        sides[name] = output.shape[3] if is_map else 0

    hooks = [
        module.register_forward_hook(partial(note, name=name))
        for name, module in model.named_modules()
        if next(module.parameters(), None) is not None
    ]
    with torch.no_grad():
        model(image)
    for hook in hooks:
        hook.remove()
    return sides


def stages(model: nn.Module, image: torch.Tensor) -> dict[str, list[str]]:
    """The names in `state_dict` of each stage, from the last stage to the first.

    A stage is called by the side of its maps, in pixels, or `HEAD`. A layer belongs to the largest map that is
    computed at or after it: the 1x1 maps within a squeeze-and-excitation block belong to the block.
    """
    stage_of, largest = {}, 0
    for name, side in reversed(map_sides(model, image).items()):
        largest = max(largest, side)
        stage_of[name] = largest
    found: dict[int, list[str]] = {}
    for name in model.state_dict():
        owner = name.rpartition(".")[0]
        while owner not in stage_of:  # its parameters are used without a call of the module
            owner = owner.rpartition(".")[0]
        found.setdefault(stage_of[owner], []).append(name)
    return {str(side) if side else HEAD: found[side] for side in sorted(found)}


def grad_cam_layer(model: nn.Module, image: torch.Tensor) -> nn.Module:
    """The last block whose map has at least an eighth of the tile's side: ResNet's layer2.

    Blocks are modules at most two levels deep. Later maps are too coarse for small tiles: that of ResNet's layer4
    has one pixel for a tile of 28. Raises UsageError where there is no such block.
    """
    network = model.network if isinstance(model, FineTunedNetwork) else model
    sides = map_sides(network, image)
    fine = [name for name, side in sides.items() if name.count(".") < 2 and side * COARSEST >= image.shape[-1]]
    if not fine:
        raise UsageError(
            f"{type(network).__name__} has no maps of an eighth of the tile's side: Task 2 needs some"
        )
    return network.get_submodule(fine[-1])

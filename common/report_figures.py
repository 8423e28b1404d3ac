"""The report's own figures: the learning rate of a run, and what each augmentation does to a tile."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib import style
from matplotlib.figure import Figure

from common import phantom
from common.augment import build_augmentation
from common.figures import STYLE, curve, save

if TYPE_CHECKING:
    from common.report import Record

SHOWN = ("none", "ta_wide", "auto", "dihedral", "stain")
TILES, SIZE = 9, 64


def draw(folder: Path, records: Sequence["Record"]) -> None:
    """Draw the augmentations, and the learning rate of the first record, if there is one."""
    augmentations(folder / "augmentations.png")
    if records:
        first = records[0]
        curve(
            folder / "learning_rate.png",
            [row["lr"] for row in first.history],
            ylabel="Learning rate at the epoch's end",
            title=f"{first.run_id} · {first.summary['dataset']}",
        )


def augmentations(path: Path) -> None:
    """Draw a row an augmentation over the same generated tiles, one of each class; nothing needs to be on disk."""
    tiles, _ = next(iter(phantom.generate("train", TILES, SIZE)))
    images = torch.from_numpy(tiles).permute(0, 3, 1, 2)
    with style.context(["default", STYLE, {"axes.grid": False}]):
        figure = Figure(figsize=(8, 0.95 * len(SHOWN) + 0.5))
        grid = figure.subplots(len(SHOWN), TILES, squeeze=False)
        for line, name in zip(grid, SHOWN, strict=True):
            changed = build_augmentation(name)(images, torch.Generator().manual_seed(0))
            for axes, tile in zip(line, changed, strict=True):
                axes.imshow(tile.permute(1, 2, 0).numpy(), interpolation="nearest")
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
            line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        figure.suptitle(f"phantom tiles (generated, {SIZE} px), and one draw of each augmentation", fontsize=9)
        save(figure, path)

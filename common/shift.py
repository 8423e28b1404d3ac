"""Shifted validation: the validation tiles as another laboratory and another scanner might have made them.

PathMNIST's validation tiles come from the slides of its training tiles, its test tiles from another clinical
centre. A shift changes the validation tiles' colours in a way that no training augmentation here uses, so that a
network can be judged by tiles that look foreign without a look at the test split. Each tile gets its own change,
the same one in every run.

The strengths below were fixed before any network had been scored on shifted tiles.
"""

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from common.data import Split

SEED = 0
CHUNK = 2048  # tiles that are changed at once: bounds the memory that the float copies take
Tiles = NDArray[np.float32]


def lab_statistics(tiles: Tiles, draws: np.random.Generator) -> Tiles:
    """Move each tile's mean and spread in CIELAB, as RandStainNA does (Shen et al. 2022); another staining.

    Standard deviations of the moved means: 6 for lightness, 5 for both colour axes. Spreads are multiplied by
    0.7 to 1.4.
    """
    from skimage.color import lab2rgb, rgb2lab

    lab = rgb2lab(tiles)
    means = lab.mean((1, 2), keepdims=True)
    moved = means + draws.normal(0.0, (6.0, 5.0, 5.0), means.shape)
    factors = np.exp(draws.uniform(np.log(0.7), np.log(1.4), means.shape))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some colours lie outside sRGB; they are clipped
        changed: Tiles = lab2rgb((lab - means) * factors + moved).astype(np.float32)
    return changed


def gamma(tiles: Tiles, draws: np.random.Generator) -> Tiles:
    """Raise each tile to a power from 0.7 to 1.4, and its colour channels to powers that differ by up to 10 %.

    This is what another scanner's response curve does.
    """
    powers = np.exp(draws.uniform(np.log(0.7), np.log(1.4), (len(tiles), 1, 1, 1)))
    powers = powers * np.exp(draws.uniform(np.log(0.9), np.log(1.1), (len(tiles), 1, 1, 3)))
    return tiles ** powers.astype(np.float32)


def chromatic_noise(tiles: Tiles, draws: np.random.Generator) -> Tiles:
    """Add noise that changes the colour of each pixel but not its brightness: another camera at low light.

    The noise's standard deviation is 0.02 to 0.08 of the full range, drawn for each tile.
    """
    noise = draws.standard_normal(tiles.shape, np.float32)
    noise -= noise.mean(3, keepdims=True)
    return tiles + noise * draws.uniform(0.02, 0.08, (len(tiles), 1, 1, 1)).astype(np.float32)


SHIFTS: dict[str, Callable[[Tiles, np.random.Generator], Tiles]] = {
    "lab_statistics": lab_statistics,
    "gamma": gamma,
    "chromatic_noise": chromatic_noise,
}


def shifted(split: Split) -> Iterator[tuple[str, Split]]:
    """Each shift's name and the split under it, images (N, 3, H, W) uint8 as in `split`, one after the other."""
    for name, change in SHIFTS.items():
        images = torch.empty_like(split.images)
        for start in range(0, len(split), CHUNK):
            tiles = (split.images[start : start + CHUNK].permute(0, 2, 3, 1) / 255).numpy()
            draws = np.random.default_rng([SEED, start, *name.encode()])
            changed = np.rint(change(tiles, draws).clip(0, 1) * 255).astype(np.uint8)
            images[start : start + CHUNK] = torch.from_numpy(changed).permute(0, 3, 1, 2)
        yield name, Split(images, split.labels)

"""Shifted validation tiles: their colours change as in another laboratory or with another scanner.

So a network can be scored on foreign-looking tiles without the test split. Stain augmentation has effects like the
first two; no augmentation adds noise. Each tile gets a different change, the same in all runs whose inputs have
the same side. The strengths were fixed before any network was scored on shifted tiles.
"""

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from common.data.dataset import Split, resize

SEED = 0
CHUNK = 2048  # tiles of 64 pixels that are changed at the same time: limits the memory of their float copies
LAB_CHUNK = 128  # the same for CIELAB, which takes seven copies in float64
Tiles = NDArray[np.float32]  # (N, side, side, 3) in 0..1; a result may lie outside


def lab_statistics(tiles: Tiles, rng: np.random.Generator) -> Tiles:
    """Change each tile's mean and spread in CIELAB, as RandStainNA does (Shen et al. 2022): another staining."""
    from skimage.color import lab2rgb, rgb2lab

    moves = rng.normal(0.0, (6.0, 5.0, 5.0), (len(tiles), 1, 1, 3))
    factors = np.exp(rng.uniform(np.log(0.7), np.log(1.4), moves.shape))
    changed = np.empty_like(tiles)
    for start in range(0, len(tiles), LAB_CHUNK):
        part = slice(start, start + LAB_CHUNK)
        lab = rgb2lab(tiles[part])
        means = lab.mean((1, 2), keepdims=True)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # colours outside sRGB are clipped
            changed[part] = lab2rgb((lab - means) * factors[part] + (means + moves[part]))
    return changed


def gamma(tiles: Tiles, rng: np.random.Generator) -> Tiles:
    """Raise each tile and each of its colour channels to a power: another scanner's response curve."""
    powers = np.exp(rng.uniform(np.log(0.7), np.log(1.4), (len(tiles), 1, 1, 1)))
    powers = powers * np.exp(rng.uniform(np.log(0.9), np.log(1.1), (len(tiles), 1, 1, 3)))
    return tiles ** powers.astype(np.float32)


def chromatic_noise(tiles: Tiles, rng: np.random.Generator) -> Tiles:
    """Add noise that changes the colour of each pixel but not its brightness: another camera at low light."""
    noise = rng.standard_normal(tiles.shape, np.float32)
    noise -= noise.mean(3, keepdims=True)
    return tiles + noise * rng.uniform(0.02, 0.08, (len(tiles), 1, 1, 1)).astype(np.float32)


# By the names in the records, which are those of the functions.
SHIFTS = {change.__name__: change for change in (lab_statistics, gamma, chromatic_noise)}


def shifted(split: Split, side: int) -> Iterator[tuple[str, Split]]:
    """Yield the name of each shift and the split, first resized and then shifted: (N, 3, side, side) uint8."""
    chunk = max(1, CHUNK * 64**2 // max(64, side) ** 2)
    for name, change in SHIFTS.items():
        images = torch.empty(len(split), side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        for start in range(0, len(split), chunk):
            tiles = (resize(split.images[start : start + chunk], side).permute(0, 2, 3, 1) / 255).numpy()
            rng = np.random.default_rng([SEED, start, *name.encode()])
            changed = np.rint(change(tiles, rng).clip(0, 1) * 255).astype(np.uint8)
            images[start : start + chunk] = torch.from_numpy(changed).permute(0, 3, 1, 2)
        yield name, Split(images, split.labels)

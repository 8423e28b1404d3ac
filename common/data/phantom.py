"""Draws PathMNIST's nine kinds of tissue as synthetic H&E tiles, for tests and for work without the real data set.

The scene of a class gives the amounts of haematoxylin and eosin, and the stain vectors turn them into light.
Training and validation tiles are stained alike, test tiles differently, as in PathMNIST.
"""

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from common.cli import progress

VERSION = 3  # a change of any pixel needs a new number
FIELD = 112.0  # side of a tile in µm: 224 pixels of 0.5 µm in NCT-CRC-HE-100K
BLOCK = 256  # tiles that are drawn at the same time; their random numbers depend on it
WAVES = 8  # of one noise

Array = npt.NDArray[Any]  # float32, unless a comment gives another type
Stains = tuple[Array, Array]  # haematoxylin and eosin, each (B, size, size); 1 is a strong stain

# How haematoxylin (first) and eosin absorb red, green and blue.
RUIFROK = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])  # Ruifrok & Johnston 2001
MACENKO = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])  # reference of Macenko et al. 2009
# By split: the range of the way from Ruifrok's vectors to Macenko's, and the strength of both stains.
STAINING = {"train": ((0.0, 0.5), (0.8, 0.6)), "val": ((0.0, 0.5), (0.8, 0.6)), "test": ((0.5, 1.0), (0.65, 0.75))}


class Canvas:
    """The places of B tiles' pixels, `x` and `y` (B, size, size) in µm, and random numbers per tile."""

    def __init__(self, random: np.random.Generator, n_tiles: int, size: int) -> None:
        self.random, self.n_tiles, self.pixel = random, n_tiles, FIELD / size
        angle, scale = self.draw(0, 2 * np.pi), self.draw(0.85, 1.15)
        across = scale * ((np.arange(size, dtype=np.float32) + 0.5) / size - 0.5) * FIELD
        down = across.swapaxes(1, 2)
        self.x = np.cos(angle) * across - np.sin(angle) * down
        self.y = np.sin(angle) * across + np.cos(angle) * down

    def draw(self, low: float, high: float) -> Array:
        """One uniform number per tile, (B, 1, 1)."""
        return self.random.uniform(low, high, (self.n_tiles, 1, 1)).astype(np.float32)

    def noise(self, wavelength: float, stretch: float = 1.0) -> Array:
        """Smooth noise with standard deviation 1, a sum of plane waves; `stretch` times as long along x."""
        total: Array = np.zeros_like(self.x)
        for _ in range(WAVES):
            angle, frequency = self.draw(0, 2 * np.pi), self.draw(0.7, 1.3) * (2 * np.pi / wavelength)
            u, v = np.cos(angle) * frequency / stretch, np.sin(angle) * frequency
            total += np.cos(u * self.x + v * self.y + self.draw(0, 2 * np.pi))
        return np.float32((2 / WAVES) ** 0.5) * total

    def spots(self, spacing: float, disorder: float = 0.25, aspect: float = 1.0) -> Array:
        """The distance in µm to the nearest point of a bent lattice, which is `aspect` times as wide along x."""
        bend = disorder * spacing
        x = self.x / aspect + bend * self.noise(3 * spacing) + self.draw(0, spacing)
        y = self.y + bend * self.noise(3 * spacing) + self.draw(0, spacing)
        # Near a point 2 - cos - cos is the squared distance, up to a factor.
        height = np.cos(x * (2 * np.pi / spacing)) + np.cos(y * (2 * np.pi / spacing))
        return np.asarray(np.sqrt(np.maximum(2 - height, 0)) * np.float32(spacing / (2**0.5 * np.pi)))

    def inside(self, distance: Array) -> Array:
        """The share of each pixel, in [0, 1], where the signed distance in µm is negative."""
        return np.asarray(np.clip(0.5 - distance / max(self.pixel, 1.0), 0, 1))


def adipose(canvas: Canvas) -> Stains:
    """Large empty cells between thin walls."""
    wall = canvas.inside(np.abs(canvas.noise(90)) * 10 - canvas.draw(0.3, 1.6))
    return canvas.draw(0.0, 0.12) + 0.25 * wall, canvas.draw(0.0, 0.12) + 0.6 * wall


def background(canvas: Canvas) -> Stains:
    """Empty glass with uneven light; some tiles are tinted."""
    tint = canvas.draw(0, 1) ** 3 * 0.5 + 0.02 * canvas.noise(150)
    return tint * canvas.draw(0.2, 0.8), tint * canvas.draw(0.2, 0.8)


def debris(canvas: Canvas) -> Stains:
    """Grains without structure, and faded nuclei."""
    ghosts = canvas.draw(0.05, 0.4) * canvas.inside(canvas.spots(13, disorder=0.5) - canvas.draw(1.5, 3.5))
    patches = 0.2 * canvas.noise(45)
    return canvas.draw(0.05, 0.4) + ghosts, canvas.draw(0.4, 0.9) * (1 + patches + 0.25 * canvas.noise(6))


def lymphocytes(canvas: Canvas) -> Stains:
    """Small round dark nuclei, close together, with almost no cytoplasm."""
    nuclei = canvas.inside(canvas.spots(8.5) - canvas.draw(2.8, 3.8))
    return 0.15 + nuclei * (0.9 + 0.1 * canvas.noise(20)), canvas.draw(0.1, 0.4)


def mucus(canvas: Canvas) -> Stains:
    """Pale streaks of mucin, and a few floating cells."""
    mucin = canvas.draw(0.1, 0.4) * (1 + 0.4 * canvas.noise(9, stretch=6) + 0.3 * canvas.noise(40))
    cells = canvas.inside(canvas.spots(26, disorder=0.6) - canvas.draw(0.0, 3.0))
    return mucin + 0.7 * cells, 0.6 * mucin


def fibres(canvas: Canvas, waviness: float, looseness: tuple[float, float], aspect: float) -> Stains:
    """Fibres along x: eosin with gaps between bundles, and nuclei that are long in x."""
    canvas.y = canvas.y + waviness * canvas.noise(45)
    strands, bundles = canvas.noise(6, stretch=10), canvas.noise(16, stretch=5)
    gaps = canvas.inside(4 * (bundles + 0.5 * strands) + 6 - 6 * canvas.draw(*looseness))
    present = canvas.inside(5 * canvas.noise(30, stretch=2) + canvas.draw(0, 5))
    nuclei = present * canvas.inside(canvas.spots(12, disorder=0.4, aspect=aspect) - canvas.draw(1.0, 1.8))
    eosin = canvas.draw(0.5, 0.95) * (1 + 0.15 * strands + 0.15 * bundles) * (1 - 0.8 * gaps)
    return canvas.draw(0.05, 0.3) * (1 - gaps) + 0.8 * nuclei, eosin


def mucosa(canvas: Canvas) -> Stains:
    """Round glands: a pale lumen in a ring of nuclei; small nuclei between the glands."""
    radius, distance = canvas.draw(24, 31), canvas.spots(75, disorder=0.06)
    gland, lumen = canvas.inside(distance - radius), canvas.inside(distance - radius * canvas.draw(0.3, 0.6))
    ring = canvas.inside(np.abs(distance - radius + 5) - canvas.draw(2, 3.5)) * (0.8 + 0.2 * canvas.noise(5))
    between = canvas.inside(canvas.spots(9) - canvas.draw(1.5, 2.8)) * (1 - gland)
    cytoplasm = gland * (1 - lumen)
    return 0.08 + 0.25 * cytoplasm + 0.8 * ring + 0.7 * between, 0.45 * cytoplasm + 0.3 * (1 - gland)


def tumour(canvas: Canvas) -> Stains:
    """Crowded large nuclei of every size and shade around misshapen lumens."""
    tissue = 1 - canvas.inside(9 * canvas.noise(55) + canvas.draw(4, 16))
    crowd = canvas.inside(canvas.spots(11, disorder=0.4, aspect=1.4) - 3.6 - 0.9 * canvas.noise(14))
    nuclei = canvas.draw(0.5, 0.9) * crowd * (0.8 + 0.2 * canvas.noise(4))
    return 0.05 + tissue * (canvas.draw(0.15, 0.35) + nuclei), canvas.draw(0.35, 0.7) * (0.1 + 0.9 * tissue)


MUSCLE = partial(fibres, waviness=1.5, looseness=(-0.9, 0.3), aspect=5)  # straight, with long thin nuclei
STROMA = partial(fibres, waviness=6, looseness=(-0.3, 0.9), aspect=2.5)  # loose and wavy
SCENES = (adipose, background, debris, lymphocytes, mucus, MUSCLE, mucosa, STROMA, tumour)  # by label


def generate(split: str, n_tiles: int, size: int) -> tuple[Array, Array]:
    """Tiles (n_tiles, size, size, 3) uint8, and labels (n_tiles,) int64; the classes are about equally large."""
    key = [VERSION, list(STAINING).index(split)]
    labels = np.random.default_rng(key).permutation(np.arange(n_tiles) % len(SCENES))
    images = np.empty((n_tiles, size, size, 3), np.uint8)
    for start in progress(range(0, n_tiles, BLOCK), desc=f"phantom {split}", unit=" blocks", leave=False):
        part = slice(start, start + BLOCK)
        images[part] = _draw_block(np.random.default_rng([*key, start]), labels[part], size, split)
    return images, labels


def _draw_block(random: np.random.Generator, labels: Array, size: int, split: str) -> Array:
    stains = np.empty((2, len(labels), size, size), np.float32)
    for label in np.unique(labels):
        chosen = labels == label
        stains[:, chosen] = np.broadcast_arrays(*SCENES[label](Canvas(random, int(chosen.sum()), size)))
    # A fifth of the tiles has another tissue at a side, as at the real borders between tissues.
    border = Canvas(random, len(labels), size)
    share = border.inside(border.x + 4 * border.noise(40) + border.draw(10, 40)) * (border.draw(0, 1) < 0.2)
    stains += share * (np.roll(stains, 1, axis=1) - stains)
    between, strength = STAINING[split]
    way = random.uniform(*between, (len(labels), 1, 1))
    vectors = (RUIFROK * (1 - way) + MACENKO * way) * np.array(strength)[:, None]
    vectors *= np.exp(random.normal(0, 0.25, (len(labels), 2, 1)))  # each tile is stained more or less strongly
    light = 250 * np.exp(-np.einsum("sbyx,bsc->byxc", stains, vectors.astype(np.float32)))
    light += 2 * random.standard_normal(light.shape, np.float32)  # the camera's noise
    return np.asarray(np.clip(light + 0.5, 0, 255).astype(np.uint8))

"""Draws PathMNIST's nine kinds of tissue as synthetic H&E tiles, for work without the real data set.

A tile shows 112 µm at every size. The scene of its class gives the amounts of haematoxylin and eosin; the stain
vectors and the scanner of a centre turn them into light. Training and validation tiles come from one centre, test
tiles from another, as in PathMNIST.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from common.data import pathmnist

VERSION = 2  # a change of any pixel needs a new number
FIELD = 112.0  # side of a tile in µm: 224 pixels of 0.5 µm in NCT-CRC-HE-100K
# Tiles that share a random stream. A fixed number, so that the number of threads does not change a tile; a large
# number, because threads run numpy at the same time only on large arrays.
BLOCK = 512
SCANNED = 64  # tiles that are scanned at the same time: limits the memory at 224 pixels
LATTICE = 32  # random values along each side of a table, a power of two; beyond it, the table repeats
THREADS = min(4, os.cpu_count() or 1)  # each draws a block and needs up to 700 MB at 224 pixels
ADIPOSE, BACKGROUND, DEBRIS, LYMPHOCYTES, MUCUS, MUSCLE, MUCOSA, STROMA, TUMOUR = range(9)
# PathMNIST's tiles per class (Yang et al. 2023, MedMNIST v2).
TRAIN_COUNTS = (9366, 9509, 10360, 10401, 8006, 12182, 7886, 9401, 12885)
TEST_COUNTS = (1338, 847, 339, 634, 1035, 592, 741, 421, 1233)
# By label: tissues that lie beside it or look like it. A tissue that is named twice is drawn twice as often.
NEIGHBOURS = (
    (STROMA, MUCUS),
    (ADIPOSE, MUCUS),
    (MUCUS, STROMA, TUMOUR),
    (MUCOSA, TUMOUR, STROMA),
    (DEBRIS, STROMA, MUCOSA),
    (STROMA, STROMA, ADIPOSE),
    (TUMOUR, STROMA, LYMPHOCYTES),
    (MUSCLE, MUSCLE, DEBRIS),
    (MUCOSA, STROMA, DEBRIS),
)

Array = npt.NDArray[Any]  # float32, unless a comment gives another type
Number = Array | float
Range = tuple[float, float]
Stains = tuple[Array, Array]  # haematoxylin and eosin, each (B, size, size); 1 is a strong stain


@dataclass(frozen=True)
class Centre:
    """A laboratory and its scanner."""

    redness: Range  # range of the way from Ruifrok's stain vectors to Macenko's
    strength: tuple[float, float]  # median concentration of each stain
    magnification: float
    blur: float  # standard deviation of the scanner's focus in µm
    noise: Range  # range of a pixel's standard deviation in grey levels


# How haematoxylin (first) and eosin absorb red, green and blue.
RUIFROK = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])  # Ruifrok & Johnston 2001
MACENKO = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])  # reference of Macenko et al. 2009
TRAIN_CENTRE = Centre(redness=(0.0, 0.7), strength=(0.8, 0.6), magnification=1.0, blur=0.6, noise=(0.0, 3.0))
TEST_CENTRE = Centre(redness=(0.5, 1.0), strength=(0.68, 0.72), magnification=1.05, blur=1.1, noise=(1.5, 4.0))


class Cells(NamedTuple):
    """The cell that each pixel lies in; arrays (B, size, size)."""

    dx: Array  # µm from the cell's centre
    dy: Array
    distance: Array  # µm to the centre
    border: Array  # about µm to the nearest border
    place: Array  # int64: the cell's index in every table of the canvas


@dataclass(frozen=True)
class Canvas:
    """The places of B tiles' pixels in the section, and the tiles' random numbers.

    Random numbers are drawn per tile or per table, never per pixel, so a scene is the same at every size.
    """

    random: np.random.Generator
    x: Array  # (B, size, size) in µm
    y: Array
    pixel: float  # side of a pixel in µm

    def draw(self, low: float, high: float) -> Array:
        """One uniform number per tile, (B, 1, 1)."""
        return self.random.uniform(low, high, (len(self.x), 1, 1)).astype(np.float32)

    def table(self, low: float = 0.0, high: float = 1.0) -> Array:
        """Uniform numbers, LATTICE² per tile, as a flat array."""
        values = self.random.random(len(self.x) * LATTICE * LATTICE, dtype=np.float32)
        return values * np.float32(high - low) + np.float32(low)

    def at_column(self, column: Array) -> Array:
        """The index of a column in a table, to be added to `at_row`."""
        return column & (LATTICE - 1)

    def at_row(self, row: Array) -> Array:
        """The index of a row of each tile in a table."""
        tile = np.arange(len(self.x))[:, None, None]
        return (row & (LATTICE - 1)) * LATTICE + tile * LATTICE**2

    def noise(self, x: Array, y: Array, wavelength: Number) -> Array:
        """Smooth noise in [-1, 1]."""
        table = self.table(-1.0, 1.0)
        column, u = split_floor(x / wavelength)
        row, v = split_floor(y / wavelength)
        u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
        left, right = self.at_column(column), self.at_column(column + 1)
        upper, lower = self.at_row(row), self.at_row(row + 1)
        top, bottom = table[upper + left], table[lower + left]
        top += (table[upper + right] - top) * u
        bottom += (table[lower + right] - bottom) * u
        between: Array = top + (bottom - top) * v
        return between

    def warped(self, amplitude: Number, wavelength: Number) -> tuple[Array, Array]:
        """The pixels' x and y, bent by `amplitude` µm."""
        across, along = (self.noise(self.x, self.y, wavelength) for _ in range(2))
        return self.x + amplitude * across, self.y + amplitude * along

    def cells(self, x: Array, y: Array, spacing: Number, jitter: float, borders: bool = True) -> Cells:
        """Worley's cells: one centre per square of `spacing` µm, moved by up to `jitter`/2 of it.

        Without `borders`, only squares within half a `spacing` are searched: this is faster, and exact near a
        centre.
        """
        margin = (1 - jitter) / 2
        centre_x, centre_y = self.table(margin, 1 - margin), self.table(margin, 1 - margin)
        shift, steps = (0.0, (-1, 0, 1)) if borders else (0.5, (0, 1))
        column, u = split_floor(x / spacing - shift)
        row, v = split_floor(y / spacing - shift)
        u, v = u + np.float32(shift), v + np.float32(shift)
        columns = [self.at_column(column + step) for step in steps]
        rows = [self.at_row(row + step) for step in steps]
        packed_nearest = np.full(u.shape, np.float32(9).view(np.int32))  # farther than any
        packed_second = packed_nearest
        squares = list(product(range(len(steps)), repeat=2))
        for number, (down, right) in enumerate(squares):
            here = rows[down] + columns[right]
            dx, dy = u - centre_x[here] - steps[right], v - centre_y[here] - steps[down]
            # The bits of positive floats sort as integers. With the square's number in the last four bits of its
            # distance, one minimum finds both, in half the time of a mask.
            packed = (dx * dx + dy * dy).view(np.int32) & ~15 | number
            packed_second = np.minimum(packed_second, np.maximum(packed, packed_nearest))
            packed_nearest = np.minimum(packed_nearest, packed)
        down, right = np.array(squares, np.int8).T.take(packed_nearest & 15, axis=1) + np.int8(steps[0])
        index = self.at_row(row + down) + self.at_column(column + right)
        dx, dy = u - centre_x[index] - right, v - centre_y[index] - down
        nearest, second = packed_nearest.view(np.float32), packed_second.view(np.float32)
        distance = np.sqrt(nearest)
        border = (np.sqrt(second) - distance) / 2
        return Cells(dx * spacing, dy * spacing, distance * spacing, border * spacing, index)

    def inside(self, distance: Array) -> Array:
        """The share of each pixel, in [0, 1], where the signed distance in µm is negative."""
        coverage: Array = np.clip(0.5 - distance / max(self.pixel, 1.0), 0, 1)
        return coverage

    def nuclei(
        self, x: Array, y: Array, spacing: Number, radius: Range, share: Number, aspect: float = 1.0
    ) -> Array:
        """Haematoxylin (B, size, size) of nuclei with radii in `radius` µm, in a `share` of cells."""
        cells = self.cells(x, y, spacing, jitter=0.8, borders=False)
        angle = self.table(0, np.pi)
        cosine, sine = np.cos(angle)[cells.place], np.sin(angle)[cells.place]
        long = (cells.dx * cosine + cells.dy * sine) / np.float32(np.sqrt(aspect))
        short = (cells.dy * cosine - cells.dx * sine) * np.float32(np.sqrt(aspect))
        reach = np.sqrt(long * long + short * short) - self.table(*radius)[cells.place]
        present = self.table()[cells.place] < share
        shade = self.table(0.7, 1.3)[cells.place] * (1 + 0.06 * reach)  # more chromatin at the envelope
        stain: Array = self.inside(reach) * present * shade
        return stain


def split_floor(values: Array) -> tuple[Array, Array]:
    """Whole part and remainder."""
    whole = np.floor(values)
    return whole.astype(np.int64), values - whole


def adipose(canvas: Canvas) -> Stains:
    """Large empty cells between thin walls, with a few flat nuclei."""
    x, y = canvas.warped(5, 30)
    cells = canvas.cells(x, y, canvas.draw(35, 80), jitter=0.8)
    wall = canvas.inside(cells.border - canvas.draw(0.4, 2.0))
    flesh = canvas.inside(12 * canvas.noise(x, y, 30) + cells.border - canvas.draw(-12, 4))
    nuclei = canvas.nuclei(x, y, 16, (1.5, 2.5), share=0.5) * canvas.inside(cells.border - 3)
    haze = canvas.draw(0.0, 0.12)
    return haze + 0.2 * wall + 0.9 * nuclei + 0.15 * flesh, haze + 0.6 * wall + 0.4 * flesh


def background(canvas: Canvas) -> Stains:
    """Empty glass with uneven light and dust; colour normalisation tints it, as in the real tiles."""
    gradient = canvas.noise(canvas.x, canvas.y, 150) * canvas.draw(0, 0.06)
    dust = canvas.nuclei(canvas.x, canvas.y, 20, (0.3, 1.5), share=canvas.draw(-0.1, 0.1))
    tint = canvas.draw(0, 1) ** 2
    tone = canvas.draw(0.3, 0.7)
    return tint * tone + gradient + 0.4 * dust, tint * (1 - tone) + gradient + 0.2 * dust


def debris(canvas: Canvas) -> Stains:
    """Grains without structure: eosin, faded nuclei and their dark dust, and cracks."""
    x, y = canvas.warped(4, 12)
    granules = canvas.noise(x, y, canvas.draw(3.5, 6)) + 0.5 * canvas.noise(x, y, 12)
    patches = canvas.noise(x, y, 35)
    ghosts = canvas.nuclei(x, y, 11, (2, 4), share=canvas.draw(0, 0.6)) * canvas.draw(0.1, 0.5)
    dust = canvas.nuclei(x, y, 7, (0.5, 1.3), share=canvas.draw(0, 0.4))
    cracks = canvas.inside(np.abs(canvas.noise(x, y, 40)) * 40 - canvas.draw(-6, 2))
    haematoxylin = canvas.draw(0.05, 0.4) * (1 + 0.6 * patches) + ghosts + 0.7 * dust + 0.06 * granules
    eosin = canvas.draw(0.5, 0.9) * (1 + 0.4 * granules)
    return haematoxylin * (1 - cracks), eosin * (1 - cracks)


def lymphocytes(canvas: Canvas) -> Stains:
    """Small round dark nuclei, close together, with almost no cytoplasm."""
    x, y = canvas.warped(3, 25)
    nuclei = canvas.nuclei(x, y, canvas.draw(7, 10), (2.8, 4.0), share=canvas.draw(0.75, 1.05))
    gaps = canvas.inside(canvas.noise(x, y, 14) * 14 + canvas.draw(5, 16))
    return nuclei + 0.15, (0.2 + 0.3 * canvas.draw(0, 1)) * (1 - 0.8 * gaps)


def mucus(canvas: Canvas) -> Stains:
    """Pale streaks of mucin with threads and a few floating cells."""
    x, y = canvas.warped(canvas.draw(6, 20), 45)
    streaks = canvas.noise(x / 6, y, canvas.draw(3.5, 8))
    clouds = canvas.noise(x, y, 40)
    threads = canvas.inside(np.abs(canvas.noise(x / 3, y, 22)) * 22 - canvas.draw(-1, 1.5))
    nuclei = canvas.nuclei(x, y, 15, (1.8, 3.2), share=canvas.draw(-0.05, 0.15))
    mucin = np.clip(canvas.draw(0.15, 0.45) + 0.15 * streaks + 0.12 * clouds, 0, None)
    return mucin + 0.2 * threads + 0.8 * nuclei, 0.6 * mucin + 0.35 * threads


def fibres(canvas: Canvas, waviness: Array, looseness: Array, share: Array, aspect: Array) -> Stains:
    """Fibres along x: eosin with gaps between bundles, and nuclei that are long in x."""
    bend = canvas.noise(canvas.x, canvas.y, 32) + 0.3 * canvas.noise(canvas.x, canvas.y, 14)
    x, y = canvas.x, canvas.y + waviness * bend
    strands = canvas.noise(x / 10, y, canvas.draw(3.5, 6))
    bundles = canvas.noise(x / 5, y, 14)
    clefts = canvas.inside(6 * (bundles + 0.5 * strands) + 6 - 6 * looseness)
    nuclei = canvas.nuclei(x / aspect, y, 8, (1.3, 2.3), share)
    eosin = canvas.draw(0.55, 0.95) * (1 + 0.2 * strands + 0.15 * bundles) * (1 - 0.8 * clefts)
    return canvas.draw(0.05, 0.3) * (1 - clefts) + 0.9 * nuclei, eosin


def muscle(canvas: Canvas) -> Stains:
    """Parallel fibres with long thin nuclei."""
    waviness, looseness = canvas.draw(0, 4), canvas.draw(-0.9, 0.2)
    return fibres(canvas, waviness, looseness, share=canvas.draw(0.1, 0.3), aspect=canvas.draw(4, 7))


def stroma(canvas: Canvas) -> Stains:
    """Loose wavy fibres with sparse spindle nuclei."""
    waviness, looseness = canvas.draw(6, 18), canvas.draw(-0.1, 0.9)
    return fibres(canvas, waviness, looseness, share=canvas.draw(0.1, 0.35), aspect=canvas.draw(1.5, 3.5))


def mucosa(canvas: Canvas) -> Stains:
    """Round glands: a lumen, goblet cells, and a regular row of basal nuclei; small nuclei between glands."""
    x, y = canvas.warped(canvas.draw(3, 9), 35)
    spacing = canvas.draw(55, 100)
    gland = canvas.cells(x, y, spacing, jitter=0.4)
    radius = spacing * canvas.draw(0.38, 0.46)
    depth = np.minimum(radius - gland.distance, gland.border - 3)
    slots = np.round(2 * np.pi * radius / 5.5)
    turn = np.arctan2(gland.dy, gland.dx) * slots / np.float32(2 * np.pi)
    beside = (turn - np.round(turn)) * 5.5
    row = canvas.inside(2.2 * (np.hypot(beside / 2.2, (depth - 5) / canvas.draw(3, 5)) - 1))
    epithelium = canvas.inside(-depth)
    lumen = canvas.inside(gland.distance - radius * canvas.draw(0.1, 0.5))
    goblet = canvas.cells(x, y, 11, jitter=0.5, borders=False)
    vacuoles = canvas.inside(goblet.distance - 4.5) * canvas.inside(10 - depth) * canvas.draw(0.4, 1)
    between = canvas.nuclei(x, y, 9, (2, 3.2), share=canvas.draw(0.2, 0.8)) * (1 - epithelium)
    cytoplasm = epithelium * (1 - lumen) * (1 - 0.7 * vacuoles)
    haematoxylin = 0.3 * cytoplasm + row + 0.95 * between + 0.08
    return haematoxylin, 0.5 * cytoplasm + canvas.draw(0.1, 0.5) * (1 - epithelium) + 0.05


def tumour(canvas: Canvas) -> Stains:
    """Crowded misshapen glands full of large nuclei of every size and shade."""
    x, y = canvas.warped(canvas.draw(6, 16), 35)
    spacing = canvas.draw(45, 110)
    gland = canvas.cells(x, y, spacing, jitter=0.9)
    epithelium = canvas.inside(canvas.draw(0, 6) - gland.border)
    lumen = canvas.inside(gland.distance + 8 * canvas.noise(x, y, 18) - spacing * canvas.draw(-0.1, 0.3))
    crowd = canvas.nuclei(x, y, canvas.draw(8.5, 12), (2.8, 5.5), share=canvas.draw(0.8, 1.0), aspect=1.6)
    chromatin = 1 + 0.25 * canvas.noise(x, y, 3.5)
    cytoplasm = epithelium * (1 - lumen)
    between = canvas.nuclei(x / 2, y, 8, (1.3, 2.3), share=0.3) * (1 - epithelium)
    haematoxylin = cytoplasm * (0.25 + canvas.draw(0.5, 0.9) * crowd * chromatin) + 0.8 * between + 0.05
    return haematoxylin, canvas.draw(0.4, 0.7) * (1 - 0.9 * lumen)


SCENES = (adipose, background, debris, lymphocytes, mucus, muscle, mucosa, stroma, tumour)


def cut(random: np.random.Generator, n_tiles: int, size: int, magnification: float) -> Canvas:
    """Tiles at random places and angles in the section, at about the centre's magnification."""
    angle = random.uniform(0, 2 * np.pi, (n_tiles, 1, 1)).astype(np.float32)
    left, top = random.uniform(0, 1000, (2, n_tiles, 1, 1)).astype(np.float32)
    scale = np.exp(random.normal(0, 0.12, (n_tiles, 1, 1))).astype(np.float32) / magnification
    across = scale * ((np.arange(size, dtype=np.float32) + 0.5) / size - 0.5) * FIELD
    down = across.swapaxes(1, 2)
    x = np.cos(angle) * across - np.sin(angle) * down + left
    y = np.sin(angle) * across + np.cos(angle) * down + top
    return Canvas(random, x, y, FIELD / size)


def paint(random: np.random.Generator, labels: Array, size: int, magnification: float) -> Array:
    """Both stains of one scene per label, (2, B, size, size)."""
    stains = np.zeros((2, len(labels), size, size), np.float32)
    for label in np.unique(labels):
        chosen = labels == label
        canvas = cut(random, int(chosen.sum()), size, magnification)
        grain = 1 + 0.12 * canvas.noise(canvas.x, canvas.y, 2.5)
        stains[:, chosen] = np.stack(SCENES[label](canvas)) * grain
    return stains


def mix(random: np.random.Generator, stains: Array, labels: Array, magnification: float) -> None:
    """Add a neighbouring tissue to a side of some tiles, as at the real borders between tissues."""
    chosen = np.flatnonzero(random.random(len(labels)) < 0.2)
    others = np.array([random.choice(NEIGHBOURS[label]) for label in labels[chosen]], np.int64)
    size = stains.shape[-1]
    intruder = paint(random, others, size, magnification)
    canvas = cut(random, len(chosen), size, magnification)
    middle = canvas.x.mean(axis=(1, 2), keepdims=True)
    edge = canvas.x - middle + 12 * canvas.noise(canvas.x, canvas.y, 40) + canvas.draw(5, 50)
    share = np.clip(0.5 - edge / 8, 0, 1)  # the border is 8 µm wide
    stains[:, chosen] += (intruder - stains[:, chosen]) * share


def scan(random: np.random.Generator, stains: Array, centre: Centre) -> npt.NDArray[np.uint8]:
    """Stain, transmit light by Beer and Lambert's law, blur, add noise: (B, size, size, 3)."""
    _, count, size, _ = stains.shape
    strength = np.array(centre.strength)[:, None] * np.exp(random.normal(0, 0.2, (2, count)))
    redness = random.uniform(*centre.redness, (count, 1))
    vectors = RUIFROK[:, None] * (1 - redness) + MACENKO[:, None] * redness
    vectors *= random.uniform(0.95, 1.05, vectors.shape)
    absorbed = (strength[:, :, None] * vectors).astype(np.float32)
    noise = random.uniform(*centre.noise, (count, 1, 1, 1)).astype(np.float32)
    brightness = random.uniform(0.92, 1.0, (count, 1, 1, 1)).astype(np.float32) * 255
    tiles = np.empty((count, size, size, 3), np.uint8)
    for start in range(0, count, SCANNED):
        part = slice(start, start + SCANNED)
        density = np.einsum("sbyx,sbc->bcyx", stains[:, part], absorbed[:, part])
        light = blurred(np.exp(-density), centre.blur * size / FIELD)
        light *= brightness[part]
        light += random.standard_normal(light.shape, dtype=np.float32) * noise[part]
        tiles[part] = np.clip(light + 0.5, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return tiles


def blurred(light: Array, deviation: float) -> Array:
    """Gaussian blur of the last two axes by `deviation` pixels."""
    reach = max(1, round(2.5 * deviation))
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / deviation) ** 2).astype(np.float32)
    weights /= weights.sum()
    size = light.shape[-1]
    padded = np.pad(light, [(0, 0), (0, 0), (reach, reach), (reach, reach)], mode="edge")
    down = sum(weight * padded[:, :, start : start + size] for start, weight in enumerate(weights))
    both: Array = sum(weight * down[..., start : start + size] for start, weight in enumerate(weights))
    return both


def apportioned(n_tiles: int, counts: tuple[int, ...]) -> Array:
    """`n_tiles` sorted int64 labels in the proportions of `counts`; from nine tiles on, every class occurs."""
    sure = 1 if n_tiles >= len(counts) else 0
    quota = np.array(counts) / sum(counts) * (n_tiles - sure * len(counts))
    share = np.floor(quota).astype(np.int64) + sure
    largest_remainders = np.argsort(np.floor(quota) - quota, kind="stable")[: n_tiles - share.sum()]
    share[largest_remainders] += 1
    return np.repeat(np.arange(len(counts)), share)


def split_sizes(train_tiles: int) -> dict[str, int]:
    """Tiles of each split for `train_tiles` training tiles; PathMNIST's number gives PathMNIST's splits."""
    if train_tiles == pathmnist.COUNTS["train"]:
        return dict(pathmnist.COUNTS)
    return {"train": train_tiles, "val": train_tiles // 9, "test": train_tiles // 5}


def generate(split: str, n_tiles: int, size: int, seed: int = 0) -> Iterator[tuple[Array, Array]]:
    """Yield `n_tiles` tiles in blocks: images (B, size, size, 3) uint8 and labels (B,) int64."""
    counts, centre = (TEST_COUNTS, TEST_CENTRE) if split == "test" else (TRAIN_COUNTS, TRAIN_CENTRE)
    key = [VERSION, seed, list(pathmnist.COUNTS).index(split)]
    labels = apportioned(n_tiles, counts)
    np.random.default_rng(key).shuffle(labels)

    def block(start: int) -> tuple[Array, Array]:
        random = np.random.default_rng([*key, start])
        chosen = labels[start : start + BLOCK]
        stains = paint(random, chosen, size, centre.magnification)
        mix(random, stains, chosen, centre.magnification)
        return scan(random, stains, centre), chosen

    starts = range(0, n_tiles, BLOCK)
    with ThreadPoolExecutor(THREADS) as pool:
        for wave in range(0, len(starts), THREADS):
            yield from pool.map(block, starts[wave : wave + THREADS])

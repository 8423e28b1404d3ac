"""Phantom tiles: always the same, of nine classes, and the test tiles with another staining."""

import numpy as np
import pytest
from numpy.typing import NDArray

from common.data import phantom

Tiles = tuple[NDArray[np.uint8], NDArray[np.int64]]
BACKGROUND, MUSCLE, STROMA = 1, 5, 7


@pytest.fixture(scope="module")
def sets() -> dict[str, Tiles]:
    return {split: phantom.generate(split, n_tiles, 28) for split, n_tiles in (("train", 1800), ("test", 900))}


def test_tiles_are_always_the_same_and_every_one_differs(sets: dict[str, Tiles]) -> None:
    images, labels = sets["train"]
    assert images.dtype == np.uint8
    assert images.shape == (1800, 28, 28, 3)
    assert labels.dtype == np.int64
    again, _ = phantom.generate("train", 1800, 28)
    assert np.array_equal(images, again)
    everything = np.concatenate([images, sets["test"][0], phantom.generate("val", 200, 28)[0]])
    assert len(np.unique(everything.reshape(len(everything), -1), axis=0)) == 2900
    # Other pixels need another VERSION. Cosines may differ in the last bit on another processor: so only a mean.
    assert phantom.VERSION == 3
    assert images.mean((0, 1, 2)) == pytest.approx([210.359, 174.088, 219.905], abs=0.01)
    assert sets["test"][0].mean((0, 1, 2)) == pytest.approx([211.115, 172.999, 204.101], abs=0.01)


def test_classes_are_equally_large_and_in_random_order() -> None:
    for split, n_tiles in (("train", 45), ("test", 9), ("val", 500)):
        labels = phantom.generate(split, n_tiles, 28)[1]
        counts = np.bincount(labels, minlength=9)
        assert counts.min() >= n_tiles // 9
        assert counts.max() <= n_tiles // 9 + 1
    assert (np.diff(labels) != 0).mean() > 0.7


def test_a_tile_shows_the_same_scene_at_every_size() -> None:
    small, labels = phantom.generate("train", 64, 28)
    large, large_labels = phantom.generate("train", 64, 112)
    assert np.array_equal(labels, large_labels)
    reduced = large.reshape(64, 28, 4, 28, 4, 3).mean((2, 4))
    similar = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(small, reduced, strict=True)]
    assert np.array(similar)[labels != BACKGROUND].min() > 0.7


def test_validation_tiles_are_stained_like_training_tiles_and_test_tiles_are_not(sets: dict[str, Tiles]) -> None:
    def blue_to_red(tiles: Tiles) -> float:
        """Mean ratio of blue to red absorption in stroma and muscle: the eosin's hue."""
        fibrous = tiles[0][np.isin(tiles[1], (MUSCLE, STROMA))]
        red, _, blue = (-np.log((fibrous.astype(float) + 1) / 256)).mean((1, 2)).T
        return float((blue / red).mean())

    ratio = blue_to_red(sets["train"])
    assert blue_to_red(phantom.generate("val", 900, 28)) == pytest.approx(ratio, rel=0.1)
    assert blue_to_red(sets["test"]) > 1.15 * ratio

"""Phantom tiles: same seed, same bytes; nine scenes that can be learnt, but not by colour alone; two centres."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from common.data import pathmnist, phantom

Tiles = tuple[NDArray[np.uint8], NDArray[np.int64]]


def whole(split: str, n_tiles: int, size: int = 28, seed: int = 0) -> Tiles:
    images, labels = zip(*phantom.generate(split, n_tiles, size, seed), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def score(train: NDArray[np.float64], test: NDArray[np.float64], labels: tuple[NDArray[np.int64], ...]) -> float:
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return float(model.fit(train, labels[0]).score(test, labels[1]))


@pytest.fixture(scope="module")
def train() -> Tiles:
    return whole("train", 3000)


@pytest.fixture(scope="module")
def test() -> Tiles:
    return whole("test", 900)


@pytest.mark.parametrize("size", [28, 64])
def test_tiles_have_the_layout_of_pathmnist(size: int) -> None:
    images, labels = whole("val", 70, size)
    assert images.shape == (70, size, size, 3)
    assert images.dtype == np.uint8
    assert images.flags.c_contiguous
    assert labels.shape == (70,)
    assert labels.dtype == np.int64


def test_same_seed_gives_same_bytes_with_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    torch_threads = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            monkeypatch.setattr(phantom, "THREADS", threads)
            torch.set_num_threads(min(threads, 2))
            images, labels = whole("train", 200)
            runs.append(images.tobytes() + labels.tobytes())
    finally:
        torch.set_num_threads(torch_threads)
    assert runs[0] == runs[1] == runs[2]


def test_two_readers_that_take_turns_get_the_same_tiles() -> None:
    images, labels = whole("test", 200)
    first, other = phantom.generate("test", 200, 28), phantom.generate("train", 200, 28)
    seen = 0
    for block, block_labels in first:
        next(other)
        assert np.array_equal(block, images[seen : seen + len(block)])
        assert np.array_equal(block_labels, labels[seen : seen + len(block)])
        seen += len(block)
    assert seen == 200


def test_seeds_and_splits_differ() -> None:
    images, labels = whole("train", 128)
    other_images, other_labels = whole("train", 128, seed=1)
    val_images, val_labels = whole("val", 128)
    assert not np.array_equal(labels, other_labels)
    assert not np.array_equal(labels, val_labels)
    everything = np.concatenate([images, other_images, val_images])
    assert len(np.unique(everything.reshape(len(everything), -1), axis=0)) == 3 * 128


def test_blocks_of_the_same_labels_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phantom, "apportioned", lambda n_tiles, _counts: np.full(n_tiles, phantom.STROMA))
    images, _ = whole("train", 2 * phantom.BLOCK)
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == 2 * phantom.BLOCK


def test_a_tile_shows_the_same_scene_at_every_size() -> None:
    small, labels = whole("train", 64, 28)
    large, large_labels = whole("train", 64, 112)
    assert np.array_equal(labels, large_labels)
    reduced = large.reshape(64, 28, 4, 28, 4, 3).mean((2, 4))
    for tile, same in zip(small[labels != phantom.BACKGROUND], reduced[labels != phantom.BACKGROUND], strict=True):
        assert np.corrcoef(tile.ravel(), same.ravel())[0, 1] > 0.7


def test_split_sizes() -> None:
    assert phantom.split_sizes(9000) == {"train": 9000, "val": 1000, "test": 1800}
    assert phantom.split_sizes(89_996) == {"train": 89_996, "val": 10_004, "test": 7180}
    assert phantom.split_sizes(45) == {"train": 45, "val": 5, "test": 9}


@pytest.mark.parametrize(("split", "counts"), [("train", phantom.TRAIN_COUNTS), ("test", phantom.TEST_COUNTS)])
def test_labels_keep_the_official_class_mix_in_random_order(split: str, counts: tuple[int, ...]) -> None:
    assert sum(counts) == pathmnist.COUNTS[split]
    _, labels = whole(split, 500)
    assert np.bincount(labels, minlength=9) == pytest.approx(500 * np.array(counts) / sum(counts), abs=2)
    assert (np.diff(labels) != 0).mean() > 0.7


def test_every_class_appears_in_the_smallest_sets() -> None:
    for split, n_tiles in (("train", 45), ("test", 9)):
        assert set(whole(split, n_tiles)[1]) == set(range(9))
    assert len(whole("val", 5)[1]) == 5


def test_validation_shares_the_training_centre_and_test_does_not(train: Tiles, test: Tiles) -> None:
    def blue_to_red(tiles: Tiles) -> float:
        """Mean ratio of blue to red absorption in stroma and muscle: the eosin's hue."""
        fibrous = tiles[0][np.isin(tiles[1], (phantom.MUSCLE, phantom.STROMA))]
        red, _, blue = (-np.log((fibrous.astype(float) + 1) / 256)).mean((1, 2)).T
        return float((blue / red).mean())

    ratio = blue_to_red(train)
    assert blue_to_red(whole("val", 600)) == pytest.approx(ratio, rel=0.1)
    assert blue_to_red(test) > 1.15 * ratio


def test_the_mean_colour_does_not_separate_the_classes(train: Tiles, test: Tiles) -> None:
    accuracy = score(train[0].mean((1, 2)), test[0].mean((1, 2)), (train[1], test[1]))
    assert 1 / 9 < accuracy < 0.60


def test_texture_separates_the_classes(train: Tiles) -> None:
    """Contrast and roughness alone do far better than the mean colour."""

    def pattern(images: NDArray[np.uint8]) -> NDArray[np.float64]:
        absorbed = -np.log((images[..., :2].astype(float) + 1) / 256)
        right, down = np.abs(np.diff(absorbed, axis=2)), np.abs(np.diff(absorbed, axis=1))
        spread = absorbed.std((1, 2))
        percentiles = np.percentile(absorbed, (5, 50, 95), axis=(1, 2)).transpose(1, 0, 2).reshape(len(images), -1)
        return np.log(
            np.hstack([right.mean((1, 2)), down.mean((1, 2)), spread, percentiles.clip(0) + 0.01]) + 0.01
        )

    val_images, val_labels = whole("val", 600)
    assert score(pattern(train[0]), pattern(val_images), (train[1], val_labels)) > 0.6

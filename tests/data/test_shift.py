"""The shifts of colours: as strong as their docstrings say, and the same in every run."""

import numpy as np
import pytest
import torch
from skimage.color import rgb2lab

from common.data import shift
from common.data.dataset import Dataset, Split
from common.data.shift import SHIFTS, shifted


@pytest.fixture(scope="module")
def one_colour() -> Split:
    """Tiles of one reddish colour: every difference in a shifted tile comes from the shift."""
    colour = torch.tensor([150, 110, 130], dtype=torch.uint8)
    return Split(colour.expand(300, 28, 28, 3).clone().permute(0, 3, 1, 2), torch.arange(300) % 9)


def test_a_shift_is_the_same_in_every_run_and_changes_neither_labels_nor_source(tiny: Dataset) -> None:
    before = tiny.val.images.clone()
    first, again = dict(shifted(tiny.val, 28)), dict(shifted(tiny.val, 28))
    assert list(first) == list(SHIFTS)
    for name, split in first.items():
        assert torch.equal(split.images, again[name].images)
        assert torch.equal(split.labels, tiny.val.labels)
        assert split.images.dtype == torch.uint8
        assert not torch.equal(split.images, before)
    means = [split.images.float().mean().item() for split in first.values()]
    assert means == pytest.approx([123.52, 130.22, 130.44], abs=0.05)
    assert torch.equal(tiny.val.images, before)


def test_each_tile_gets_another_change_in_every_chunk(one_colour: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shift, "CHUNK", 100)
    monkeypatch.setattr(shift, "LAB_CHUNK", 40)
    for _, split in shifted(one_colour, 28):
        tiles = split.images.flatten(1)
        assert len(tiles.unique(dim=0)) > 250


def test_another_staining_moves_means_and_spreads_as_far_as_documented() -> None:
    noise = torch.randint(-20, 21, (500, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    images = (torch.tensor([150, 110, 130]).view(3, 1, 1) + noise).to(torch.uint8)
    split = dict(shifted(Split(images, torch.zeros(500, dtype=torch.int64)), 8))["lab_statistics"]
    before, after = (rgb2lab(tiles.permute(0, 2, 3, 1).numpy()) for tiles in (images, split.images))
    moves = after.mean((1, 2)) - before.mean((1, 2))
    np.testing.assert_allclose(moves.std(0), [6, 5, 5], rtol=0.1)
    factors = after.std((1, 2)) / before.std((1, 2))
    np.testing.assert_allclose(np.quantile(factors, 0.02, axis=0), 0.71, atol=0.03)
    np.testing.assert_allclose(np.quantile(factors, 0.98, axis=0), 1.38, atol=0.05)


def test_a_response_curve_differs_between_tiles_and_channels_as_far_as_documented() -> None:
    grey = torch.full((2000, 3, 4, 4), 100, dtype=torch.uint8)
    split = dict(shifted(Split(grey, torch.zeros(2000, dtype=torch.int64)), 4))["gamma"]
    powers = torch.log(split.images[:, :, 0, 0] / 255) / torch.log(torch.tensor(100 / 255))
    # 0.7 to 1.4 for the tile, times 0.9 to 1.1 for the channel.
    quantiles = np.quantile(powers.log().mean(1).exp(), [0.02, 0.98])
    np.testing.assert_allclose(quantiles, [0.70, 1.38], atol=0.02)
    ratios = np.quantile(powers[:, 0] / powers[:, 1], [0.02, 0.98])
    np.testing.assert_allclose(ratios, [0.845, 1.18], atol=0.01)


def test_noise_changes_colours_and_keeps_brightness(one_colour: Split) -> None:
    split = dict(shifted(one_colour, 28))["chromatic_noise"]
    change = split.images.float() - one_colour.images.float()
    assert change.mean(1).abs().max() <= 1  # rounding
    assert change.mean().abs() < 0.05
    strengths = change.std((1, 2, 3)) / 255
    # 0.02 to 0.08, less the part that would change the brightness: a factor of sqrt(2 / 3)
    assert 0.015 < strengths.min() < 0.02
    assert 0.06 < strengths.max() < 0.07


def test_colours_stay_between_0_and_255() -> None:
    extremes = torch.cat([torch.zeros(20, 3, 8, 8), torch.full((20, 3, 8, 8), 255)]).to(torch.uint8)
    for _, split in shifted(Split(extremes, torch.zeros(40, dtype=torch.int64)), 8):
        change = (split.images.int() - extremes.int()).abs()
        assert np.quantile(change.numpy(), 0.99) < 100  # a value outside 0 to 255 would wrap around


def test_large_inputs_are_changed_in_smaller_parts(tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(shift, "CHUNK", 80)
    monkeypatch.setattr(shift, "SHIFTS", {"none": lambda tiles, _: sizes.append(len(tiles)) or tiles})
    assert [len(list(shifted(tiny.val, side))) for side in (64, 128)] == [1, 1]
    assert sizes == [45, 20, 20, 5]

import numpy as np
import pytest
import torch

from common import shift
from common.data import Dataset, Split
from common.shift import SHIFTS, shifted


@pytest.fixture(scope="module")
def grey() -> Split:
    """Tiles of one reddish colour, so that every change is the shift's."""
    colour = torch.tensor([150, 110, 130], dtype=torch.uint8)
    return Split(colour.expand(300, 28, 28, 3).clone().permute(0, 3, 1, 2), torch.arange(300) % 9)


def test_a_shift_is_the_same_in_every_run_and_leaves_labels_and_source_alone(tiny: Dataset) -> None:
    before = tiny.val.images.clone()
    first, again = dict(shifted(tiny.val)), dict(shifted(tiny.val))
    assert list(first) == list(SHIFTS)
    for name, split in first.items():
        assert torch.equal(split.images, again[name].images)
        assert torch.equal(split.labels, tiny.val.labels)
        assert split.images.dtype == torch.uint8
        assert not torch.equal(split.images, before)
    assert torch.equal(tiny.val.images, before)


def test_each_tile_gets_its_own_change_also_beyond_a_chunk(grey: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shift, "CHUNK", 100)
    for _, split in shifted(grey):
        tiles = split.images.flatten(1)
        assert len(tiles.unique(dim=0)) > 250


def test_another_staining_moves_a_tiles_mean_colour_and_keeps_its_structure(grey: Split) -> None:
    split = dict(shifted(grey))["lab_statistics"]
    assert (split.images.amax((2, 3)) == split.images.amin((2, 3))).all()  # a tile of one colour stays one
    spread = split.images[:, :, 0, 0].float().std(0)
    assert ((spread > 5) & (spread < 40)).all()


def test_a_response_curve_keeps_the_order_of_grey_levels() -> None:
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(50, 3, 16, 16)
    split = dict(shifted(Split(ramp.contiguous(), torch.zeros(50, dtype=torch.int64))))["gamma"]
    levels = split.images.flatten(2).int()
    assert (levels.diff(dim=2) >= 0).all()
    assert (levels[..., 0] == 0).all()
    assert (levels[..., -1] == 255).all()
    middle = levels[..., 128]
    assert middle.min() < 110 < 150 < middle.max()


def test_noise_changes_colours_but_not_brightness(grey: Split) -> None:
    split = dict(shifted(grey))["chromatic_noise"]
    change = split.images.float() - grey.images.float()
    assert change.mean(1).abs().max() <= 1  # rounding
    assert 0.015 < change.std((1, 2, 3)).min() / 255 < change.std((1, 2, 3)).max() / 255 < 0.08


def test_colours_stay_within_the_range_of_a_byte() -> None:
    extremes = torch.cat([torch.zeros(20, 3, 8, 8), torch.full((20, 3, 8, 8), 255)]).to(torch.uint8)
    for _, split in shifted(Split(extremes, torch.zeros(40, dtype=torch.int64))):
        change = (split.images.int() - extremes.int()).abs()
        assert np.quantile(change.numpy(), 0.99) < 100  # a value beyond the range would wrap to the other end

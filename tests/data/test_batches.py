"""Batches of indices, and the network's inputs."""

import pytest
import torch
from conftest import CPU
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional

from common.config import TrainingConfig
from common.data.batches import DeviceTiles, at_once, batches, device_splits, normalise
from common.data.dataset import Dataset, Split


@settings(deadline=None)  # a slow machine must not fail a test
@given(n_tiles=st.integers(1, 3000), batch_size=st.integers(3, 600), seed=st.integers(0, 2**31))
def test_an_epoch_has_every_tile_in_batches_of_one_size(n_tiles: int, batch_size: int, seed: int) -> None:
    parts = batches(n_tiles, batch_size, torch.Generator().manual_seed(seed))
    order = torch.cat(parts).tolist()
    assert sorted(order[:n_tiles]) == list(range(n_tiles))
    assert order[n_tiles:] == order[: len(order) - n_tiles]
    assert len(order) - n_tiles < len(parts)
    (size,) = {len(part) for part in parts}
    assert 1 < size <= batch_size or n_tiles == 1
    in_order = batches(n_tiles, batch_size)  # to score a split: every tile once
    assert torch.cat(in_order).tolist() == list(range(n_tiles))
    assert {len(part) for part in in_order} <= {size - 1, size}
    again = batches(n_tiles, batch_size, torch.Generator().manual_seed(seed))
    assert all(map(torch.equal, parts, again))


def test_fewer_large_inputs_are_scored_at_once() -> None:
    assert [at_once(side) for side in (28, 64, 128, 224, 9999)] == [512, 512, 128, 41, 1]


@pytest.mark.parametrize("side", [64, 14])
@pytest.mark.parametrize("augmentation", ["none", "ta_wide", "stain"])
def test_inputs_are_those_of_tiles_that_were_resized_in_the_file(
    tiny: Dataset, side: int, augmentation: str
) -> None:
    in_file = functional.resize(tiny.train.images.float(), [side, side], antialias=True)  # torchvision's
    beforehand = Split(in_file.round().to(torch.uint8), tiny.train.labels)
    expected, found = (DeviceTiles(split, CPU.device, side, augmentation) for split in (beforehand, tiny.train))
    indices, rngs = torch.arange(9), [torch.Generator().manual_seed(0) for _ in range(2)]
    assert torch.equal(found.inputs(indices, rngs[0])[0], expected.inputs(indices, rngs[1])[0])
    assert torch.equal(torch.stack(list(found.views(indices)[0])), torch.stack(list(expected.views(indices)[0])))
    assert found.inputs(indices)[0].shape == (9, 3, side, side)
    splits = device_splits(tiny, TrainingConfig(input_size=side), CPU.device)
    assert [len(shifted.tiles[0]) for _, shifted in splits.shifted()] == [side] * 3


def test_normalise_maps_bytes_to_minus_one_to_one_and_keeps_the_memory_format() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    images = images.contiguous(memory_format=torch.channels_last)
    before = images.clone()
    inputs = normalise(images)
    assert inputs.dtype == torch.float32
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(inputs, (images / 255 - 0.5) / 0.5)
    assert torch.equal(images, before)

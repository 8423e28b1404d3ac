"""Augmentations equal torchvision's or their formula, and their parameters are distributed as defined."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torchvision.transforms import v2

from common.config import AUGMENTATIONS
from common.data import augment
from common.data.augment import OPERATIONS, build_augmentation

SIZES = (28, 64)
MANY = 60_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiles(count: int, side: int = 28) -> torch.Tensor:
    """Half noise, half smooth pink and violet blobs on near-white as of stained tissue; the last tile is flat."""
    generator = seeded()
    noise = torch.randint(0, 256, (count // 2, 3, side, side), generator=generator, dtype=torch.uint8)
    blobs = torch.rand(count - count // 2, 2, 5, 5, generator=generator)
    blobs = F.interpolate(blobs, size=side, mode="bicubic").clamp(0, 1).pow(2)
    dyes = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]]) * torch.tensor([[1.5], [0.8]])
    tissue = 244 * torch.exp(-torch.einsum("ndhw,dc->nchw", blobs, dyes))
    batch = torch.cat([noise, tissue.round().to(torch.uint8)])
    batch[-1] = 201
    return batch.contiguous(memory_format=torch.channels_last)


def check_frequencies(counts: torch.Tensor, probabilities: torch.Tensor) -> None:
    assert not counts[probabilities == 0].any()
    counts, probabilities = counts[probabilities > 0].double(), probabilities[probabilities > 0].double()
    assert stats.chisquare(counts, counts.sum() * probabilities / probabilities.sum()).pvalue > 1e-6


def check_proportion(happened: torch.Tensor, probability: float) -> None:
    assert stats.binomtest(int(happened.sum()), happened.numel(), probability).pvalue > 1e-6


def check_uniform(values: torch.Tensor, low: float, high: float) -> None:
    assert low <= float(values.min()) <= float(values.max()) <= high
    assert stats.kstest(values.flatten(), "uniform", (low, high - low)).pvalue > 1e-6


# Equality with torchvision

# Blends add a product; whether the processor rounds between the two can turn a tie into the next level.
BLENDS = {"Color", "Contrast", "Sharpness"}


@pytest.mark.parametrize(
    ("transform", "column", "bins"), [(v2.TrivialAugmentWide(), 0, 31), (v2.AutoAugment(), 1, 10)]
)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_torchvision(transform, column, bins, name):
    if name not in transform._AUGMENTATION_SPACE or (column == 1 and name.startswith("Translate")):
        pytest.skip("not an operation of this transform, or of its ImageNet policy")
    magnitudes_of, signed = transform._AUGMENTATION_SPACE[name]
    ours = (augment.WIDE_MAGNITUDES, augment.AUTO_MAGNITUDES)[column][OPERATIONS.index(name)].tolist()
    for side in SIZES:
        images = tiles(7, side)
        theirs = magnitudes_of(bins, side, side)
        strengths = [0.0] if theirs is None else [float(m) for m in theirs]
        assert ours == (strengths * bins if theirs is None else strengths)
        assert bool(augment.SIGNED[OPERATIONS.index(name)]) == signed
        for magnitude in strengths + [-m for m in strengths] * signed:
            expected = torch.stack(
                [
                    transform._apply_image_or_video_transform(
                        image, name, magnitude, interpolation="nearest", fill=transform._fill
                    )
                    for image in images
                ]
            )
            kind = torch.full((1, len(images)), OPERATIONS.index(name))
            strength = torch.full((1, len(images)), magnitude, dtype=torch.float64)
            result = augment.apply_operations(images, kind, strength)
            difference = (result.int() - expected.int()).abs().max().item()
            assert difference <= (1 if name in BLENDS else 0), (side, magnitude)


# Views


def test_dihedral_views_are_the_eight_symmetries_of_the_square():
    images = tiles(3)
    views = [augment.dihedral_view(images, view) for view in range(8)]
    turns = [images.rot90(k, (2, 3)) for k in range(4)]
    expected = turns + [turn.flip(3) for turn in turns]
    for one in expected:
        assert sum(torch.equal(one, view) for view in views) == 1
    assert torch.equal(views[4], images.transpose(2, 3))
    assert torch.equal(views[1], images.flip(3))
    assert torch.equal(views[2], images.flip(2))
    # Bit 4 acts first: swap, then flip left and right.
    assert torch.equal(views[5], images.transpose(2, 3).flip(3))
    many, view = tiles(32), torch.randint(8, (32,), generator=seeded())
    for one, number, found in zip(many, view, augment.dihedral(many, view), strict=True):
        assert torch.equal(found, augment.dihedral_view(one[None], int(number))[0])


# Random parameters


def test_trivial_augment_samples_operation_bin_and_sign_uniformly():
    operation, magnitude = (sampled[0] for sampled in augment.sample_trivial_augment(MANY, seeded()))
    check_frequencies(operation.bincount(minlength=14), torch.full((14,), 1 / 14))
    for name in ("ShearX", "TranslateY", "Rotate", "Sharpness", "Solarize"):
        number = OPERATIONS.index(name)
        chosen = magnitude[operation == number]
        table = augment.WIDE_MAGNITUDES[number]
        counts = (chosen.abs().unsqueeze(1) == table).sum(0)
        assert counts.sum() == len(chosen)
        check_frequencies(counts, torch.full((31,), 1 / 31))
        check_proportion(chosen[chosen != 0] < 0, 0.5 if augment.WIDE[name][1] else 0.0)


def test_auto_augment_samples_policies_with_their_probabilities():
    operation, magnitude = augment.sample_auto_augment(MANY, seeded())
    identity = OPERATIONS.index("Identity")
    expected = torch.zeros(len(OPERATIONS), len(OPERATIONS), dtype=torch.float64)
    strengths = {(0, "Identity", 0.0), (1, "Identity", 0.0)}
    for pair in v2.AutoAugment()._policies:
        (i, p), (j, q) = ((OPERATIONS.index(name), probability) for name, probability, _ in pair)
        for row, row_chance in ((i, p), (identity, 1 - p)):
            for column, column_chance in ((j, q), (identity, 1 - q)):
                expected[row, column] += row_chance * column_chance / 25
        for step, (name, probability, magnitude_bin) in enumerate(pair):
            if probability:
                strength = float(augment.AUTO_MAGNITUDES[OPERATIONS.index(name), magnitude_bin or 0])
                strengths.add((step, name, strength))
    pairs = (operation[0] * len(OPERATIONS) + operation[1]).bincount(minlength=expected.numel())
    check_frequencies(pairs, expected.flatten())
    check_proportion(magnitude[operation == OPERATIONS.index("Rotate")] < 0, 0.5)
    for step in (0, 1):
        used = set(zip(operation[step].tolist(), magnitude[step].abs().tolist(), strict=True))
        assert {(step, OPERATIONS[k], m) for k, m in used} == {one for one in strengths if one[0] == step}


def test_erasing_geometry_follows_torchvisions_definition():
    boxes = augment.sample_erasing(64, MANY, seeded())
    happened = boxes[:, 2] > 0
    check_proportion(happened, 0.1)
    assert not boxes[~happened].any()
    top, left, height, width = boxes[happened].double().T
    assert bool(((top + height <= 64) & (left + width <= 64) & (height < 64) & (width < 64)).all())
    # Rounding moves either side by at most half a pixel.
    assert float(((height - 0.5) * (width - 0.5)).max()) < 0.33 * 64 * 64
    assert float(((height + 0.5) * (width + 0.5)).min()) > 0.02 * 64 * 64
    assert float(((height - 0.5) / (width + 0.5)).max()) < 3.3
    assert float(((height + 0.5) / (width - 0.5)).min()) > 0.3
    # Every position is equally likely, and an upright rectangle is as likely as a lying one.
    check_uniform((top + torch.rand(len(top), generator=seeded())) / (64 - height + 1), 0.0, 1.0)
    check_uniform((left + torch.rand(len(left), generator=seeded())) / (64 - width + 1), 0.0, 1.0)
    check_proportion((height > width)[height != width], math.log(3.3) / math.log(3.3 / 0.3))


def test_erase_fills_its_box_with_grey_and_nothing_else():
    images = tiles(3)
    boxes = torch.tensor([[0, 0, 0, 0], [3, 5, 7, 11], [20, 0, 8, 27]])
    result = augment.erase(images, boxes)
    expected = images.clone()
    expected[1, :, 3:10, 5:16] = 128
    expected[2, :, 20:28, 0:27] = 128
    assert torch.equal(result, expected)


# Stain, zoom


def test_dyes_change_by_a_fifth_and_hue_by_ten_degrees_at_most():
    scale, shift, hue = augment.sample_stain(MANY // 3, seeded())
    check_uniform(scale, 0.8, 1.2)
    check_uniform(shift, -0.05, 0.05)
    check_uniform(hue, -math.tau / 36, math.tau / 36)
    correlation = torch.corrcoef(torch.cat([scale, shift, hue.unsqueeze(1)], dim=1).T)
    assert (correlation - torch.eye(7)).abs().max() < 4.9 / math.sqrt(MANY // 3)


def test_stain_follows_its_formula_tile_by_tile():
    images = tiles(6)
    # Far stronger than in training, so that every term matters.
    scale, shift, hue = augment.sample_stain(6, seeded())
    parameters = (scale, 4 * shift, 6 * hue)
    dyes = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]]).double()  # Ruifrok's
    generator_of_turns = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]).double() / math.sqrt(3)
    for image, alpha, beta, angle, stained in zip(
        images, *parameters, augment.stain(images, *parameters), strict=True
    ):
        density = -torch.log((image.double() + 1) / 256).flatten(1).T
        concentration = density @ torch.linalg.inv(dyes)
        density = (concentration * alpha + beta) @ dyes
        turned = density @ torch.matrix_exp(angle * generator_of_turns).T
        expected = (256 * torch.exp(-turned) - 1).round().clamp(0, 255).T.view(image.shape)
        assert (stained - expected).abs().max() <= 1


def test_zoom_equals_grid_sample():
    for side in SIZES:
        images = tiles(16, side)
        factor = augment.sample_zoom(16, seeded())
        theta = torch.zeros(16, 2, 3, dtype=torch.float64)
        theta[:, 0, 0] = theta[:, 1, 1] = 1 / factor
        grid = F.affine_grid(theta, [16, 3, side, side], align_corners=False)
        expected = F.grid_sample(images.double(), grid, padding_mode="reflection", align_corners=False)
        result = augment.zoom(images, factor)
        assert (result - expected).abs().max() < 0.501
        assert torch.equal(augment.zoom(images, torch.ones(16, dtype=torch.float64)), images)
    check_uniform(augment.sample_zoom(MANY, seeded()).log(), math.log(0.8), math.log(1.25))


# The whole


CHAINS = [name for name in AUGMENTATIONS if name != "none"] + ["ta_wide,stain"]


@pytest.mark.parametrize("names", CHAINS)
def test_an_augmentation_changes_copies_as_its_generator_says_and_nothing_else(names):
    run, images = build_augmentation(names), tiles(40)
    before, state = images.clone(), torch.get_rng_state()
    result = run(images, seeded(5))
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert (result.dtype, result.shape) == (torch.uint8, images.shape)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(result, images)
    assert torch.equal(run(images, seeded(5)), result)
    assert not torch.equal(run(images, seeded(6)), result)


def test_parts_are_their_steps_from_left_to_right():
    def flip(x, g, views=4):
        return augment.dihedral(x, torch.randint(views, (40,), generator=g))

    def erase(x, g):
        return augment.erase(x, augment.sample_erasing(28, 40, g))

    def zoom(x, g):
        return augment.zoom(x, augment.sample_zoom(40, g))

    images = tiles(40)
    apply = augment.apply_operations
    for names, steps in {
        "ta_wide": [flip, lambda x, g: apply(x, *augment.sample_trivial_augment(40, g)), erase],
        "auto": [flip, lambda x, g: apply(x, *augment.sample_auto_augment(40, g)), erase],
        "stain": [lambda x, g: flip(x, g, 8), lambda x, g: augment.stain(x, *augment.sample_stain(40, g)), zoom],
        "dihedral,ta_wide": [
            lambda x, g: flip(x, g, 8),
            flip,
            lambda x, g: apply(x, *augment.sample_trivial_augment(40, g)),
            erase,
        ],
        "none": [],
    }.items():
        generator, expected = seeded(7), images
        for step in steps:
            expected = step(expected, generator)
        assert torch.equal(build_augmentation(names)(images, seeded(7)), expected), names


def test_operations_do_not_depend_on_the_neighbours_of_a_tile():
    images = tiles(60)
    operations = augment.sample_trivial_augment(60, seeded())
    operated = augment.apply_operations(images, *operations)
    for i in range(60):
        one = slice(i, i + 1)
        alone = augment.apply_operations(images[one], *(parameter[:, one] for parameter in operations))
        assert torch.equal(alone, operated[one])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("names", CHAINS)
def test_cuda_agrees_with_cpu(names):
    run, images = build_augmentation(names), tiles(256)
    result = run(images.cuda(), seeded())
    assert result.is_cuda
    difference = (result.cpu().int() - run(images, seeded()).int()).abs()
    # Rounding differs between devices, and an equalised or solarised tie is then carried further.
    assert (difference > 1).double().mean() < 1e-3

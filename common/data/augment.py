"""Augments a batch of uint8 tiles (N, 3, side, side) where it lies; every tile gets other random parameters.

torchvision's v2 transforms use one set of parameters for a whole batch. Here each augmentation is a pair of
functions. `sample_…` draws the parameters of every tile on the CPU, from the caller's generator; the other one
applies them, on any device. So CPU and CUDA runs use the same parameters, and the host never waits for a GPU.
Results have channels_last memory; inputs are not changed.
"""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, v2
from torchvision.transforms.v2 import functional

from common.config import AUGMENTATIONS

Augmentation = Callable[[torch.Tensor, torch.Generator], torch.Tensor]

# torchvision's tables: by operation, a function that gives its magnitudes, and whether half of them are negative.
# TrivialAugmentWide (Müller & Hutter 2021, arXiv:2103.10158) has 31 bins, AutoAugment (Cubuk et al. 2019,
# arXiv:1805.09501) 10.
WIDE, AUTO = v2.TrivialAugmentWide._AUGMENTATION_SPACE, v2.AutoAugment._AUGMENTATION_SPACE
WIDE_BINS, AUTO_BINS = 31, 10
OPERATIONS = (*WIDE, "Invert")  # Invert is of AutoAugment alone
SIGNED = torch.tensor([name in WIDE and WIDE[name][1] for name in OPERATIONS])
MOVE, LAST_MOVE = OPERATIONS.index("ShearX"), OPERATIONS.index("Rotate")  # these and all between move pixels

# Optical density of each dye in red, green and blue: haematoxylin, eosin and the remainder, DAB
# (Ruifrok & Johnston 2001, "Quantification of histochemical staining by color deconvolution").
STAIN_VECTORS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]]).double()


def _uniform(size: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(size, generator=generator, dtype=torch.float64) * (high - low) + low


def to_device(parameters: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy the parameters of a step to the device; the host does not wait, because they lie in pinned memory."""
    if device.type == "cuda":
        parameters = parameters.pin_memory()
    return parameters.to(device, non_blocking=True)


def _take(images: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """A copy of the images of these numbers, in channels_last memory."""
    return images.permute(0, 2, 3, 1).contiguous().index_select(0, index).permute(0, 3, 1, 2)


def _by_kind(
    images: torch.Tensor,
    kind: torch.Tensor,
    order: torch.Tensor,
    apply: Callable[[int, torch.Tensor, slice], torch.Tensor],
) -> torch.Tensor:
    """Replace the images of each kind by `apply(kind, those images, their slice of the sorted batch)`.

    `kind` is int64 (N,) on the CPU, so that the host knows the sizes of the groups; `order` (N,) sorts it.
    """
    sort, unsort = to_device(torch.stack([order, order.argsort()]), images.device)
    grouped = _take(images, sort)
    start = 0
    for number, count in enumerate(kind.bincount().tolist()):
        if count:
            these = slice(start, start + count)
            grouped[these].copy_(apply(number, grouped[these], these))
        start += count
    return _take(grouped, unsort)


def dihedral_view(images: torch.Tensor, view: int) -> torch.Tensor:
    """One of the 8 symmetries of the square, of images (N, 3, H, W) of any dtype.

    `view` is a number of three bits: bit 4 swaps rows and columns first, then bit 1 flips left and right, and
    bit 2 flips top and bottom. View 0 changes nothing; the first 4 are flips alone.
    """
    if view & 4:
        images = images.transpose(2, 3)
    return images.flip([axis for bit, axis in ((1, 3), (2, 2)) if view & bit])


def dihedral(images: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    """Image i in its view `view[i]` (int64 (N,) on the CPU); see `dihedral_view`."""
    return _by_kind(images, view, view.argsort(), lambda number, part, _: dihedral_view(part, number))


@lru_cache(maxsize=4096)
def _sources(name: str, magnitude: float, height: int, width: int, device: torch.device) -> torch.Tensor:
    """The number of the pixel that comes to each pixel of the moved tile, int64 (H · W,); 0 means outside.

    torchvision itself moves a tile of pixel numbers: so ties are rounded as it rounds them, on CUDA as on the CPU.
    """
    numbers = torch.arange(1.0, height * width + 1).view(1, height, width)
    moved: torch.Tensor
    if name == "Rotate":
        moved = functional.rotate(numbers, angle=magnitude)
    elif name.startswith("Shear"):
        degrees = math.degrees(math.atan(magnitude))
        shear = [degrees, 0.0] if name == "ShearX" else [0.0, degrees]
        moved = functional.affine(numbers, angle=0.0, translate=[0, 0], scale=1.0, shear=shear, center=[0, 0])
    else:
        shift = [int(magnitude), 0] if name == "TranslateX" else [0, int(magnitude)]
        moved = functional.affine(numbers, angle=0.0, translate=shift, scale=1.0, shear=[0.0, 0.0])
    return to_device(moved.flatten().long(), device)


def _move(images: torch.Tensor, operation: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Shear, shift or rotate, nearest pixel, black outside; operation and magnitude (N,) on the CPU."""
    count, _, height, width = images.shape
    # Pixel 0 of each tile is the black one that `_sources` points to from outside.
    pixels = F.pad(images.permute(0, 2, 3, 1).flatten(1, 2), (0, 0, 1, 0))
    moves = zip(operation.tolist(), magnitude.tolist(), strict=True)
    sources = torch.stack([_sources(OPERATIONS[o], m, height, width, images.device) for o, m in moves])
    sources += torch.arange(count, device=images.device).unsqueeze(1) * pixels.shape[1]
    moved = pixels.flatten(0, 1).index_select(0, sources.flatten())
    return moved.view(count, height, width, 3).permute(0, 3, 1, 2)


def _grey(images: torch.Tensor) -> torch.Tensor:
    """Luma (ITU-R 601) of float images in whole grey levels, (N, 1, H, W)."""
    red, green, blue = images.unbind(1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_().unsqueeze(1)


def _sharpness(images: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Go `rest` of the way to the 3 × 3 mean whose centre counts five times; the outermost pixels stay."""
    rows = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    inner = images[:, :, 1:-1, 1:-1]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    blurred = box.add_(inner, alpha=4.0).div_(13.0).round_()
    inner.copy_(inner.addcmul(blurred.sub_(inner), rest).clamp_(0, 255))
    return images


def _recolour(name: str, images: torch.Tensor, settings: torch.Tensor) -> torch.Tensor:
    """An operation on colours; the result is uint8, or float 0 … 255 to truncate.

    `settings` (n, 4) has for each image the blend's ratio, 1 − ratio, and the threshold and mask of grey levels.
    """
    ratio, rest, threshold, mask = settings.view(-1, 4, 1, 1, 1).unbind(1)
    match name:
        case "Brightness":
            return images.float().mul_(ratio).clamp_(0, 255)
        case "Color" | "Contrast":
            colours = images.float()
            grey = _grey(colours) if name == "Color" else _grey(colours).mean((2, 3), keepdim=True)
            return colours.mul_(ratio).addcmul_(grey, rest).clamp_(0, 255)
        case "Sharpness":
            return _sharpness(images.float(), rest)
        case "Posterize":
            return images & mask.to(torch.uint8)
        case "Solarize":
            return torch.where(images >= threshold, ~images, images)
        case "AutoContrast" | "Equalize" | "Invert":  # no magnitude: torchvision's functions take whole batches
            changed: torch.Tensor = getattr(functional, name.lower())(images)
            return changed
        case _:
            return images


def _operate(images: torch.Tensor, operation: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    order = operation.argsort()
    ordered, strengths = operation[order], magnitude[order]
    ratio = 1.0 + strengths
    # Posterize's magnitude is the number of highest bits, of 8, that stay.
    mask = (255 << (8 - strengths.long().clamp(0, 8))) & 255
    settings = torch.stack([ratio, 1.0 - ratio, 255 * strengths, mask], dim=1)
    settings = to_device(settings.float(), images.device)

    def apply(number: int, part: torch.Tensor, these: slice) -> torch.Tensor:
        if number == MOVE:
            return _move(part, ordered[these], strengths[these])
        return _recolour(OPERATIONS[number], part, settings[these])

    # The operations that move pixels are one group: on a GPU the launches take the time, not the pixels.
    group = torch.where((operation >= MOVE) & (operation <= LAST_MOVE), MOVE, operation)
    return _by_kind(images, group, order, apply)


def apply_operations(images: torch.Tensor, operation: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Apply `OPERATIONS[operation[s, i]]` with `magnitude[s, i]` to image i, for each step s in order.

    `operation` is int64 (steps, N), `magnitude` float64 (steps, N), both on the CPU. Results equal torchvision's.
    """
    for operations, magnitudes in zip(operation, magnitude, strict=True):
        images = _operate(images, operations, magnitudes)
    return images


def _magnitudes(space: Mapping[str, Any], bins: int) -> torch.Tensor:
    """The magnitude of each operation at each bin, float64 (operations, bins); 0 where it has none."""
    table = torch.zeros(len(OPERATIONS), bins, dtype=torch.float64)
    for number, name in enumerate(OPERATIONS):
        # AutoAugment's shifts depend on the tile's side; its ImageNet policy has no shifts, so any number will do.
        magnitudes = space[name][0](bins, 0, 0) if name in space else None
        if magnitudes is not None:
            table[number] = magnitudes
    return table


WIDE_MAGNITUDES, AUTO_MAGNITUDES = _magnitudes(WIDE, WIDE_BINS), _magnitudes(AUTO, AUTO_BINS)
# Operation, probability and bin of both operations of AutoAugment's 25 sub-policies for ImageNet, (2, 25) each.
PAIRS = AutoAugment(AutoAugmentPolicy.IMAGENET).policies
POLICY_OPERATIONS = torch.tensor([[OPERATIONS.index(name) for name, _, _ in pair] for pair in PAIRS]).T
POLICY_PROBABILITIES = torch.tensor([[p for _, p, _ in pair] for pair in PAIRS], dtype=torch.float64).T
POLICY_BINS = torch.tensor([[number or 0 for _, _, number in pair] for pair in PAIRS]).T


def _with_signs(
    operation: torch.Tensor, magnitude: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    negative = SIGNED[operation] & (torch.rand(operation.shape, generator=generator) < 0.5)
    return operation, torch.where(negative, -magnitude, magnitude)


def sample_trivial_augment(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Operation and magnitude of TrivialAugmentWide, int64 and float64 (1, count), uniform over their values."""
    operation = torch.randint(len(WIDE), (1, count), generator=generator)
    magnitude_bin = torch.randint(WIDE_BINS, (1, count), generator=generator)
    return _with_signs(operation, WIDE_MAGNITUDES[operation, magnitude_bin], generator)


def sample_auto_augment(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Operation and magnitude of AutoAugment, int64 and float64 (2, count): two steps.

    The sub-policy is uniform over the 25 for ImageNet. An operation that is not applied becomes Identity.
    """
    policy = torch.randint(len(PAIRS), (count,), generator=generator)
    happens = torch.rand(2, count, generator=generator, dtype=torch.float64) < POLICY_PROBABILITIES[:, policy]
    operation = torch.where(happens, POLICY_OPERATIONS[:, policy], OPERATIONS.index("Identity"))
    return _with_signs(operation, AUTO_MAGNITUDES[operation, POLICY_BINS[:, policy]], generator)


def sample_erasing(side: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Top, left, height and width of each tile's erased rectangle, int64 (count, 4); all 0 for none.

    As torchvision's RandomErasing (Zhong et al. 2017, arXiv:1708.04896): the area is uniform, the ratio of height
    to width log-uniform. Of ten attempts the first one counts whose rectangle is lower and narrower than the tile.
    """
    area = side * side * _uniform((count, 10), 0.02, 0.33, generator)
    ratio = _uniform((count, 10), math.log(0.3), math.log(3.3), generator).exp()
    sizes = torch.stack([(area * ratio).sqrt().round(), (area / ratio).sqrt().round()], dim=2)
    fits = (sizes < side).all(2)
    # argmax gives the first maximum: the first attempt that fits.
    size = sizes[torch.arange(count), fits.int().argmax(1)].long()
    corner = (_uniform((count, 2), 0.0, 1.0, generator) * (side - size + 1)).long()
    happens = fits.any(1) & (torch.rand(count, generator=generator) < 0.1)
    return torch.cat([corner, size], dim=1) * happens.unsqueeze(1)


def erase(images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Fill rectangle `boxes[i]` (top, left, height, width; CPU) of image i with mid-grey, 128.

    torchvision erases to 0 after normalisation; with mean .5 and std .5 that is mid-grey.
    """
    box = to_device(boxes, images.device)[..., None]
    start, extent = box[:, :2], box[:, 2:]
    pixel = torch.arange(images.shape[2], device=images.device)
    inside = (pixel >= start) & (pixel < start + extent)
    return images.clone().masked_fill_(inside[:, :1, :, None] & inside[:, 1:, None, :], 128)


def sample_stain(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale and shift of the dyes, (count, 3) each, and turn of the hue in radians (count,): uniform float64."""
    scale, shift = _uniform((count, 3), 0.8, 1.2, generator), _uniform((count, 3), -0.05, 0.05, generator)
    return scale, shift, _uniform((count,), -math.radians(10), math.radians(10), generator)


def _turn_about_grey(angle: torch.Tensor) -> torch.Tensor:
    """Rotations of colour space about its grey axis, (N, 3, 3) for angles (N,): Rodrigues' formula."""
    axis = 1.0 / math.sqrt(3.0)
    cross = torch.tensor([[0.0, -axis, axis], [axis, 0.0, -axis], [-axis, axis, 0.0]], dtype=angle.dtype)
    sine, cosine = angle.sin().view(-1, 1, 1), angle.cos().view(-1, 1, 1)
    return torch.eye(3, dtype=angle.dtype) + sine * cross + (1.0 - cosine) * (cross @ cross)


def stain(images: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, hue: torch.Tensor) -> torch.Tensor:
    """Change the staining of uint8 (N, 3, H, W) tiles; equal to the formula within one grey level.

    Optical density −ln((v + 1) / 256) is split into haematoxylin, eosin and a remainder; each concentration
    is multiplied by `scale` (N, 3) and increased by `shift` (N, 3) (Tellez et al. 2019, arXiv:1902.06543;
    colour deconvolution by Ruifrok & Johnston 2001). Then the density turns by `hue` (N,) radians about the
    grey axis, which is the hue of the HSD model (van der Laak et al. 2000). All three are float64 on the CPU.
    """
    turn = _turn_about_grey(hue)
    # Splitting, scaling, mixing and turning are linear: together one 3 × 3 matrix and one offset for each tile.
    mix = turn @ STAIN_VECTORS.T
    matrix = (mix * scale.unsqueeze(1)) @ STAIN_VECTORS.T.inverse()
    offset = mix @ shift.unsqueeze(2)
    density = images.flatten(2).float().add_(1.0).div_(256.0).log_()
    parameters = to_device(torch.cat([matrix, offset], dim=2).float(), images.device)
    # `density` is minus the density, and so is the result.
    stained = torch.baddbmm(-parameters[..., 3:], parameters[..., :3], density).exp_().mul_(256.0).sub_(1.0)
    return _to_uint8(stained.view(images.shape))


def _to_uint8(values: torch.Tensor) -> torch.Tensor:
    levels = values.round_().clamp_(0, 255).to(torch.uint8)
    return levels.contiguous(memory_format=torch.channels_last)


def sample_zoom(count: int, generator: torch.Generator) -> torch.Tensor:
    """Zoom factors 0.8 … 1.25, float64 (count,); log-uniform, so that both directions are equally likely."""
    limit = math.log(1.25)
    return _uniform((count,), -limit, limit, generator).exp()


def zoom(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Magnify image i about its centre by `factor[i]`, bilinearly, mirrored beyond the edges.

    Equals `F.grid_sample(…, padding_mode="reflection", align_corners=False)` within one grey level. `factor`
    is float64 (N,) on the CPU.
    """
    count, side = len(images), images.shape[2]
    # Where each new row comes from, (N, side): a row number that may lie between two rows. Beyond an edge the tile
    # continues as its mirror image.
    new = torch.arange(side, dtype=torch.float64)
    source = ((new + 0.5 - side / 2) / factor.unsqueeze(1) + side / 2).abs()
    source = (side - (side - source).abs() - 0.5).clamp(0, side - 1).float()
    source = to_device(source, images.device).unsqueeze(2)
    # Bilinear interpolation on an upright grid is two matrix products, faster than four gathers a pixel. The
    # weights (N, side, side) say how much of each old row goes into each new row.
    old = torch.arange(side, dtype=source.dtype, device=source.device)
    weights = (1.0 - (source - old).abs()).clamp_(min=0.0)
    pixels = images.permute(0, 2, 3, 1).float()
    planes = weights.bmm(pixels.reshape(count, side, 3 * side)).view(pixels.shape).permute(0, 3, 1, 2)
    return _to_uint8(planes.reshape(count, 3 * side, side).bmm(weights.mT).view(images.shape))


STEPS: dict[str, Augmentation] = {
    "flip": lambda images, rng: dihedral(images, torch.randint(4, (len(images),), generator=rng)),
    "dihedral": lambda images, rng: dihedral(images, torch.randint(8, (len(images),), generator=rng)),
    "stain": lambda images, rng: stain(images, *sample_stain(len(images), rng)),
    "zoom": lambda images, rng: zoom(images, sample_zoom(len(images), rng)),
    "ta_wide": lambda images, rng: apply_operations(images, *sample_trivial_augment(len(images), rng)),
    "auto": lambda images, rng: apply_operations(images, *sample_auto_augment(len(images), rng)),
    "erase": lambda images, rng: erase(images, sample_erasing(images.shape[2], len(images), rng)),
}


def build_augmentation(names: str) -> Augmentation:
    """The augmentation of a comma-joined list such as "ta_wide,stain", applied left to right.

    It takes uint8 (N, 3, side, side) images on any device and a CPU `torch.Generator`, the source of all its
    random numbers. "none" returns the input itself.
    """
    steps = [STEPS[step] for name in names.split(",") for step in AUGMENTATIONS[name]]

    def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        for step in steps:
            images = step(images, generator)
        return images

    return augment

"""Mixup and cutmix: each training tile is blended with, or patched from, another tile of its batch."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Mixed:
    """Mixed inputs (N, 3, H, W) float32, and what they were mixed from.

    A share of `shares[i]`, (N,) float32, of input i is tile i; the rest is tile `partners[i]`, (N,) int64.
    Both are None where nothing was mixed.
    """

    inputs: torch.Tensor
    partners: torch.Tensor | None = None
    shares: torch.Tensor | None = None


def mix(inputs: torch.Tensor, generator: torch.Generator, mixup_alpha: float, cutmix_alpha: float) -> Mixed:
    """Mix each tile of a batch with a random partner; each tile has its own random share.

    Mixup (Zhang et al. 2018) blends the two; the tile's share follows Beta(alpha, alpha). Cutmix (Yun et al. 2019)
    puts a rectangle of the partner into the tile; the rest of the area follows Beta(alpha, alpha). An alpha of 0
    switches a method off; with both on, each tile gets one of the two with probability one half. torchvision's
    MixUp and CutMix choose one share for the whole batch instead.
    """
    if not mixup_alpha and not cutmix_alpha:  # inputs may be cached features, which are no images
        return Mixed(inputs)
    n, _, height, width = inputs.shape
    # PyTorch's Beta distribution takes no generator, numpy's does; our generator gives the seed for numpy's.
    random = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    partners = torch.randperm(n, generator=generator)
    cut = np.full(n, cutmix_alpha > 0)
    if mixup_alpha and cutmix_alpha:
        cut = random.random(n) < 0.5
    shares = np.where(
        cut,
        random.beta(cutmix_alpha or 1, cutmix_alpha or 1, n),
        random.beta(mixup_alpha or 1, mixup_alpha or 1, n),
    )
    # One copy to the device, which then makes the masks: (N, H, W) numbers take long on the host.
    numbers = torch.from_numpy(np.stack([partners.numpy(), cut, shares, random.random(n), random.random(n)]))
    if inputs.is_cuda:
        numbers = numbers.pin_memory()
    numbers = numbers.to(inputs.device, non_blocking=True)
    partners, is_cut, (share, row, column) = numbers[0].long(), numbers[1].bool(), numbers[2:]
    # A cut tile is its partner inside the rectangle and itself outside; its pixels give the true share.
    side = (1 - share).sqrt()
    inside = _spans(side, row, height)[:, :, None] & _spans(side, column, width)[:, None, :]
    weights = torch.where(is_cut[:, None, None], ~inside, share[:, None, None]).float()
    blended = torch.lerp(inputs[partners], inputs, weights[:, None])
    return Mixed(blended, partners, weights.mean(dim=(1, 2)))


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, mixed: Mixed, label_smoothing: float
) -> torch.Tensor:
    """The mean loss () of logits (N, C) for mixed tiles with labels (N,) int64.

    A mixed tile's loss is its share times the loss by its label, plus the rest times the loss by its partner's.
    """
    if mixed.partners is None or mixed.shares is None:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    own, partners = (
        F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
        for targets in (labels, labels[mixed.partners])
    )
    return (mixed.shares * own + (1 - mixed.shares) * partners).mean()


def _spans(fraction: torch.Tensor, position: torch.Tensor, length: int) -> torch.Tensor:
    """(N, length) bool: a stretch of `fraction` of the side around `position`, both (N,) in 0..1, clipped."""
    pixels = torch.arange(length, device=position.device) + 0.5
    centre, half = position * length, fraction * length / 2
    return (pixels - centre[:, None]).abs() < half[:, None]

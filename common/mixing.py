"""Mixup and cutmix: training tiles blended with, or patched from, another tile of their batch."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Mixed:
    """Inputs (N, 3, H, W) float32 and what the loss must know of them.

    Tile i is `shares[i]` (N,) float32 itself and the rest tile `partners[i]` (N,) int64; `partners` is None
    where nothing was mixed.
    """

    inputs: torch.Tensor
    partners: torch.Tensor | None
    shares: torch.Tensor


def mix(inputs: torch.Tensor, generator: torch.Generator, mixup_alpha: float, cutmix_alpha: float) -> Mixed:
    """Mix each tile of a batch with a random partner, in a share that is drawn for each tile.

    Mixup (Zhang et al. 2018) blends the two by Beta(alpha, alpha); cutmix (Yun et al. 2019) cuts a rectangle
    whose area is such a draw out of the partner. An alpha of 0 switches a method off; with both on, each tile
    takes either with probability one half. torchvision's MixUp and CutMix draw once a batch instead.
    """
    if not mixup_alpha and not cutmix_alpha:  # whatever the inputs are: cached features are no images
        return Mixed(inputs, None, torch.ones(len(inputs), device=inputs.device))
    n, _, height, width = inputs.shape
    # PyTorch's Beta distribution takes no generator, numpy's does; our generator draws the seed for numpy's.
    draws = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    partners = torch.randperm(n, generator=generator).to(inputs.device)
    cut = np.full(n, cutmix_alpha > 0)
    if mixup_alpha and cutmix_alpha:
        cut = draws.random(n) < 0.5
    shares = np.where(
        cut,
        draws.beta(cutmix_alpha or 1, cutmix_alpha or 1, n),
        draws.beta(mixup_alpha or 1, mixup_alpha or 1, n),
    )
    # A cut tile takes its partner inside the rectangle and itself outside; the pixels decide the true share.
    rows = _spans(np.sqrt(1 - shares), draws.random(n), height)
    columns = _spans(np.sqrt(1 - shares), draws.random(n), width)
    inside = rows[:, :, None] & columns[:, None, :]
    own = np.where(cut[:, None, None], ~inside, shares[:, None, None]).astype(np.float32)
    weights = torch.from_numpy(own).to(inputs.device)
    blended = torch.lerp(inputs[partners], inputs, weights[:, None])
    return Mixed(blended, partners, weights.mean(dim=(1, 2)))


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, mixed: Mixed, label_smoothing: float
) -> torch.Tensor:
    """The mean loss () of logits (N, C) for mixed tiles with labels (N,) int64.

    A mixed tile's loss is its share times the loss by its label, plus the rest times the loss by its partner's.
    """
    if mixed.partners is None:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    own, partners = (
        F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
        for targets in (labels, labels[mixed.partners])
    )
    return (mixed.shares * own + (1 - mixed.shares) * partners).mean()


def _spans(fraction: np.ndarray, position: np.ndarray, length: int) -> np.ndarray:
    """(N, length) bool: a stretch of `fraction` of the side around `position`, both (N,) in 0..1, clipped."""
    pixels = np.arange(length) + 0.5
    centre, half = position * length, fraction * length / 2
    return np.asarray(np.abs(pixels - centre[:, None]) < half[:, None])

"""Phantom tiles in the layout of PathMNIST's official file, for the measurements that read such a file."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from common import phantom


def official_arrays(counts: Mapping[str, int], size: int) -> dict[str, NDArray[np.uint8]]:
    """For each split its `<split>_images`, (n, size, size, 3), and `<split>_labels`, (n, 1)."""
    arrays = {}
    for split, count in counts.items():
        images, labels = zip(*phantom.generate(split, count, size), strict=True)
        arrays[f"{split}_images"] = np.concatenate(images)
        arrays[f"{split}_labels"] = np.concatenate(labels).astype(np.uint8)[:, None]
    return arrays

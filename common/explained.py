"""What Task 2 explains: a trained network, and the test tiles that it shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.data import Dataset

MODEL_NAME = "resnet18"
TARGETS = {"predicted": "the predicted one", "label": "the true one"}  # the class explained, for keys and titles


@dataclass(frozen=True)
class Explained:
    """A test tile, (H, W, 3) uint8, with the names of its classes and its maps by method, (H, W) float32.

    `run_id` is the run whose network is explained.
    """

    run_id: str
    index: int
    tile: NDArray[np.uint8]
    label: str
    predicted: str
    probability: float  # of the predicted class
    maps: Mapping[str, NDArray[Any]]

    @property
    def correct(self) -> bool:
        """Whether the prediction is the label."""
        return self.label == self.predicted

    @property
    def row(self) -> dict[str, Any]:
        """The tile's row of the table; `input` and `saliency` are the figures, relative to the output folder."""
        return {
            "index": self.index,
            "label": self.label,
            "predicted": self.predicted,
            "probability": self.probability,
            **{part: f"fig/task2/{self.run_id}/{self.index:05d}-{part}.png" for part in ("input", "saliency")},
        }


def choose_tiles(n_tiles: int, count: int, seed: int) -> list[int]:
    """`count` different tiles in random order, or all if there are fewer. Seed 0, ten tiles: the coursework's."""
    chosen: list[int] = np.random.default_rng(seed).choice(n_tiles, min(count, n_tiles), replace=False).tolist()
    return chosen


def one_of_each_class(labels: NDArray[Any], candidates: NDArray[np.bool_], seed: int) -> list[int]:
    """A random tile of each class among the candidates, by class; none of a class without a candidate.

    `labels` are (N,) integers, `candidates` (N,) bool.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[candidates[order]]
    _, first_places = np.unique(labels[order], return_index=True)
    chosen: list[int] = order[first_places].tolist()
    return chosen


def explained_tiles(
    run_id: str,
    dataset: Dataset,
    probabilities: NDArray[np.float64],
    indices: Sequence[int],
    maps: Mapping[str, NDArray[np.float32]],
) -> dict[int, Explained]:
    """The test tiles `indices` by index; `maps` (len(indices), H, W) are theirs by method.

    `probabilities` are (N, C), of the whole test split.
    """
    names, labels = dataset.class_names, dataset.test.labels
    return {
        index: Explained(
            run_id,
            index,
            dataset.test.images[index].permute(1, 2, 0).numpy(),
            names[labels[index]],
            names[probabilities[index].argmax()],
            float(probabilities[index].max()),
            {name: values[place] for name, values in maps.items()},
        )
        for place, index in enumerate(indices)
    }

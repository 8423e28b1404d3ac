"""What Task 2 explains: a trained network, and the test tiles that it shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from common import checkpoint
from common.compute import Compute
from common.data import Dataset
from common.errors import Fault, UsageError
from common.models import build_model
from common.pathmnist import CLASS_NAMES

MODEL_NAME = "resnet18"
TARGETS = {"predicted": "the predicted one", "label": "the true one"}  # the class explained, for keys and titles


@dataclass(frozen=True)
class Explained:
    """A test tile, (H, W, 3) uint8, with the names of its classes and its maps by method, (H, W) float32."""

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
            **{part: f"fig/task2/{self.index:05d}-{part}.png" for part in ("input", "saliency")},
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
            index,
            dataset.test.images[index].permute(1, 2, 0).numpy(),
            names[labels[index]],
            names[probabilities[index].argmax()],
            float(probabilities[index].max()),
            {name: values[place] for name, values in maps.items()},
        )
        for place, index in enumerate(indices)
    }


def load_network(path: Path, size: int, compute: Compute) -> nn.Module:
    """The trained ResNet-18 of a checkpoint, frozen, in eval mode, on the device.

    Raises UsageError for another architecture or number of classes, Fault for a checkpoint that cannot be read.
    """
    saved = checkpoint.load(path)
    name, classes = saved.get("model_name"), saved.get("class_names")
    if name != MODEL_NAME or classes != list(CLASS_NAMES):
        count = len(classes) if isinstance(classes, list) else "unknown"
        expected = f"{MODEL_NAME} with {len(CLASS_NAMES)}, those of PathMNIST"
        raise UsageError(f"{path}: {name} with {count} classes; Task 2 explains a {expected}")
    model = build_model(MODEL_NAME, len(CLASS_NAMES), size)
    if problem := checkpoint.state_problem(saved.get("state_dict"), model.state_dict()):
        raise Fault(f"{path}: its weights do not fit a {MODEL_NAME} ({problem}); train again")
    model.load_state_dict(saved["state_dict"])
    model.to(compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval().requires_grad_(False)

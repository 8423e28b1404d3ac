"""A trained network from its checkpoint, with all that it needs to label pictures.

from common.finetune.trained import load_trained

trained = load_trained("checkpoints/RUN_ID/best.pt")
probabilities = trained(images)    # uint8 (N, 3, H, W), H = W = trained.size; float32 (N, 9)
names = [trained.class_names[label] for label in probabilities.argmax(1)]
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.cli import Fault, UsageError, first_line
from common.data.batches import normalise
from common.data.dataset import resize
from common.finetune.network import FineTunedNetwork, build_fine_tuned
from common.finetune.weights import Preset, Weights, best_of_run
from common.records import checkpoint
from common.records.read import checkpoint_folder, input_size_of, run_folder
from common.training.models import build_model


class Trained(nn.Module):
    """A trained network: tiles (N, 3, size, size) uint8 in, probabilities of the classes (N, C) float32 out.

    `network` takes what `inputs` returns and returns logits. `size` is the side in pixels of the tiles on which it
    was trained, `input_size` their side after resizing.
    """

    def __init__(
        self, network: nn.Module, model_name: str, class_names: tuple[str, ...], size: int, input_size: int
    ) -> None:
        super().__init__()
        self.network, self.model_name, self.class_names = network, model_name, class_names
        self.size, self.input_size = size, input_size

    def untrained(self) -> nn.Module:
        """The same network with random weights from torch's global generator, frozen, in eval mode, on the CPU."""
        network = self.network
        preset = None
        if isinstance(network, FineTunedNetwork):
            preset = Preset(self.input_size, *(tuple(x.flatten().tolist()) for x in (network.mean, network.std)))
        fresh = _build(self.model_name, len(self.class_names), self.input_size, preset)
        return fresh.eval().requires_grad_(False)

    def inputs(self, images: torch.Tensor) -> torch.Tensor:
        """The network's inputs (N, 3, input_size, input_size) float32, normalised to -1..1."""
        return normalise(resize(images, self.input_size))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Probabilities (N, C) float32 of tiles (N, 3, size, size) uint8."""
        return self.network(self.inputs(images)).softmax(1)  # type: ignore[no-any-return]


def load_trained(path: Path | str, device: torch.device | str = "cpu") -> Trained:
    """The network of a best.pt of Tasks 1, 3 or 5: frozen, in eval mode, on the device.

    Raises Fault where the file cannot be read, or is no such checkpoint.
    """
    return _trained(Path(path), checkpoint.load(Path(path)), device)


def load_run(output_dir: Path, run_id: str, device: torch.device | str = "cpu") -> Trained:
    """The network of a run's best.pt. Raises UsageError where there is none, Fault where it is another run's."""
    path = checkpoint_folder(output_dir, run_id) / "best.pt"
    if not path.exists():
        is_run = (run_folder(output_dir, run_id) / "config.json").exists()
        problem = "only its records are here: train first, python task1.py" if is_run else "no such file or run"
        raise UsageError(f"{run_id}: {path} is missing, {problem}")
    return _trained(path, best_of_run(output_dir, run_id), device)


def _trained(path: Path, saved: Mapping[str, Any], device: torch.device | str) -> Trained:
    try:
        name, class_names, config = saved["model_name"], tuple(saved["class_names"]), saved["config"]
        size, side, state_dict = config["size"], input_size_of(config), saved["state_dict"]
        # Of a FineTunedNetwork: the mean and std to which it changes its inputs are loaded with the weights.
        preset = Preset(side, (0.5,) * 3, (0.5,) * 3) if "mean" in state_dict else None
        network = _build(name, len(class_names), side, preset)
    except (AttributeError, KeyError, TypeError, UsageError) as error:
        raise Fault(f"{path}: not a best.pt of this project ({first_line(error)})") from None
    checkpoint.load_weights(network, state_dict, path)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Trained(network, name, class_names, size, side).eval().requires_grad_(False)


def _build(model_name: str, num_classes: int, size: int, preset: Preset | None) -> nn.Module:
    """A network with random weights; with a preset, a FineTunedNetwork whose weights expect such inputs."""
    if preset is None:
        return build_model(model_name, num_classes, size)
    start = Weights("none", "random initialisation", None, None, preset)
    return build_fine_tuned(model_name, num_classes, start, size)

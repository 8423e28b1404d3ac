"""A trained network from its checkpoint, with all that it needs to label pictures; README has an example."""

from pathlib import Path

import torch
from torch import nn

from common.cli import Fault, first_line
from common.data.batches import normalise
from common.data.dataset import resize
from common.data.pathmnist import CLASS_NAMES
from common.finetune.network import build_fine_tuned
from common.finetune.weights import Weights
from common.records import checkpoint
from common.records.read import input_size_of
from common.training.models import build_model


class Trained(nn.Module):
    """A trained network: tiles (N, 3, size, size) uint8 in, probabilities of the classes (N, C) float32 out.

    `network` takes inputs (N, 3, input_size, input_size) in -1..1 and returns logits. `size` is the side in pixels
    of the tiles of its training, `input_size` their side after resizing; `synthetic`: they were the phantom's.
    """

    def __init__(self, network: nn.Module, model_name: str, size: int, input_size: int, synthetic: bool) -> None:
        super().__init__()
        self.network, self.model_name, self.class_names = network, model_name, CLASS_NAMES
        self.size, self.input_size, self.synthetic = size, input_size, synthetic

    def untrained(self) -> nn.Module:
        """The same network with random weights from torch's global generator, on the CPU."""
        preprocessing = {name: value for name, value in self.network.named_buffers() if name in ("mean", "std")}
        fresh = _build(self.model_name, self.input_size, fine_tuned=bool(preprocessing))
        fresh.load_state_dict(preprocessing, strict=False)
        return fresh

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Probabilities (N, C) float32 of tiles (N, 3, size, size) uint8."""
        logits: torch.Tensor = self.network(normalise(resize(images, self.input_size)))
        return logits.softmax(1)


def load_trained(path: Path | str, device: torch.device | str = "cpu") -> Trained:
    """The network of a best.pt of Tasks 1, 3 or 5, frozen, in eval mode.

    Raises OSError, Fault for another file, UsageError where its network needs timm, which is not installed.
    """
    path = Path(path)
    saved = checkpoint.load(path)
    try:
        config, state_dict = saved["config"], saved["state_dict"]
        name, size, side = config["model_name"], config["size"], input_size_of(config)
        network = _build(name, side, fine_tuned="mean" in state_dict)
        checkpoint.load_state_dict(network, state_dict, path)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Fault(f"{path}: not a best.pt of this project ({first_line(error)})") from None
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Trained(network, name, size, side, config.get("dataset") == "phantom").eval().requires_grad_(False)


def _build(model_name: str, size: int, fine_tuned: bool) -> nn.Module:
    """A network with random weights; a fine-tuned one has its mean and std still to be loaded."""
    if not fine_tuned:
        return build_model(model_name, len(CLASS_NAMES), size)
    start = Weights("none", "", None, None, (0.5,) * 3, (0.5,) * 3)
    return build_fine_tuned(model_name, start, size)

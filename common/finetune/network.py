"""Networks that start from weights trained elsewhere: their inputs, and which part of them is trained."""

import re
import textwrap
from collections import OrderedDict

import torch
from torch import nn

from common.cli import UsageError
from common.data.pathmnist import CLASS_NAMES
from common.finetune.weights import Weights
from common.training.models import build_model

TRAIN_PARTS = ("head", "classifier", "all")
# The names of torchvision's DenseNet files: its networks have no dot here.
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=[12]\.)")


def last_layer(network: nn.Module) -> tuple[str, nn.Linear]:
    """The name of the last linear layer, which gives the logits, and the layer. UsageError for none."""
    layers = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise UsageError(f"--model_name: {type(network).__name__} has no linear last layer; choose another")
    return layers[-1]


class FineTunedNetwork(nn.Module):
    """A pretrained network, frozen in part, that takes this project's inputs.

    Inputs are (N, 3, size, size) float32 in -1..1; they are changed to the mean and std that the weights expect.
    Where `takes_features` is set, `forward` takes the results of `features` instead of images.

    The trained part is `head` (the last linear layer), `classifier` (the outermost module around it, which is all
    that is not convolutional) or `all`. The rest is frozen: it has no gradients and stays in eval mode, without
    dropout and with constant BatchNorm statistics.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: nn.Module, weights: Weights, size: int, train_part: str) -> None:
        super().__init__()
        self.network, self.takes_features, self.frozen = network, False, train_part != "all"
        self.register_buffer("mean", torch.tensor(weights.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(weights.std).view(3, 1, 1))
        last, _ = last_layer(network)
        self.head_name = last if train_part == "head" else last.partition(".")[0]
        with torch.no_grad():
            self.feature_shape = self.eval().features(torch.zeros(1, 3, size, size)).shape[1:]
        network.requires_grad_(not self.frozen)
        self.head.requires_grad_(True)
        self.train()

    @property
    def head(self) -> nn.Module:
        """The part after the frozen one."""
        return self.network.get_submodule(self.head_name)

    def train(self, mode: bool = True) -> "FineTunedNetwork":
        """As nn.Module.train, except that the frozen part stays in eval mode."""
        super().train(mode)
        if mode and self.frozen:
            self.network.eval()
            self.head.train()
        return self

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits (N, C) of images (N, 3, size, size) in -1..1, or of their features (N, *feature_shape)."""
        if self.takes_features:
            return self.head(inputs)  # type: ignore[no-any-return]
        return self.network(self._prepared(inputs))  # type: ignore[no-any-return]

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """The inputs of the head for `images` (N, 3, size, size) in -1..1: (N, *feature_shape)."""
        seen: list[torch.Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        self.network(self._prepared(images))
        hook.remove()
        return seen[0]

    def _prepared(self, images: torch.Tensor) -> torch.Tensor:
        return (images * 0.5 + 0.5 - self.mean) / self.std


def build_fine_tuned(
    model_name: str, weights: Weights, size: int, train_part: str = "classifier"
) -> FineTunedNetwork:
    """The network with its weights and a new last layer for the classes, from torch's global generator.

    Raises UsageError, with the first tensor that differs, where the weights belong to another network.
    """
    network = build_model(model_name, len(CLASS_NAMES), size)
    last, layer = last_layer(network)
    # PyTorch's initialisation: timm's is twelve times as wide, and undoing it takes hundreds of steps.
    layer.reset_parameters()
    if weights.state_dict is not None:
        _load_into(network, weights, last)
    return FineTunedNetwork(network, weights, size, train_part)


def _load_into(network: nn.Module, weights: Weights, last: str) -> None:
    """Load all but the layer `last`; a prefix of the names, such as `module.` of DataParallel, is left out."""
    own, state = network.state_dict(), weights.state_dict or {}
    first = next(iter(own))
    prefix = min((name for name in state if name.endswith(first)), key=len, default=first).removesuffix(first)
    if prefix:
        print(f"--weights {weights.name}: the prefix {prefix!r} of its names is left out")
    given = OrderedDict((OLD_DENSENET.sub(r"\1", name.removeprefix(prefix)), state[name]) for name in state)
    given |= {name: value for name, value in own.items() if name.startswith(f"{last}.")}
    # Without version numbers, PyTorch takes each layer for its oldest version. For MNASNet this would be wrong.
    given._metadata = {"": {"version": network._version}}  # type: ignore[attr-defined]
    try:
        network.load_state_dict(given)
    except RuntimeError as error:  # its second line names the first tensors that do not fit
        problem = textwrap.shorten(str(error).splitlines()[1], 200)
        remedy = "save this network's state_dict alone, or name the network of the weights with --model_name"
        if "pos_embedding" in problem:  # a transformer has one for each part of its inputs
            remedy = "use the --input_size that the weights were trained with"
        raise UsageError(f"--weights {weights.name}: {problem}: {remedy}") from None
    if not all(value.isfinite().all() for value in own.values()):  # these are the network's own tensors
        raise UsageError(f"--weights {weights.name}: it holds numbers that are not finite")


def lr_factors(model: FineTunedNetwork, first: float) -> dict[str, float]:
    """The factor of each parameter's learning rate, by name: `first` in the first block, 1 in the head.

    In between it grows geometrically from block to block, which is layer-wise decay (Howard & Ruder 2018,
    "Universal Language Model Fine-tuning", arXiv:1801.06146). Blocks are the network's modules two levels deep.
    """
    names = [name for name, _ in model.network.named_parameters() if not name.startswith(f"{model.head_name}.")]
    block = {f"network.{name}": ".".join(name.split(".")[:-1][:2]) for name in names}
    order = list(dict.fromkeys(block.values()))
    return {name: float(first ** (1 - order.index(place) / len(order))) for name, place in block.items()}

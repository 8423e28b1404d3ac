"""The networks: torchvision's classification models, by name, for tiles of any size."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UsageError, first_line


class PointConv2d(nn.Conv2d):
    """A convolution that knows a map shrunk to one point: there it is a linear layer, and runs as one.

    Same parameters, same function up to rounding. A tile of 28 pixels is a single point in the deepest layers
    (in squeeze-and-excitation at any size), where a padded kernel multiplies mostly padding, and where
    PyTorch's CPU kernels for convolution are slow: bench/point_conv.py has the gain.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, C_in, H, W) to (N, C_out, H', W'), as nn.Conv2d."""
        depthwise = self.groups == self.in_channels == self.out_channels
        if not (self._sees_one_point(input) and (depthwise or self.groups == 1)):
            return super().forward(input)
        top, left = (int(padding) for padding in self.padding)
        height, width = input.shape[2:]
        weight = self.weight[:, :, top : top + height, left : left + width]  # the taps that meet the map
        if depthwise:
            output = (input * weight.transpose(0, 1)).sum((2, 3))
            output = output if self.bias is None else output + self.bias
        else:
            output = F.linear(input.flatten(1), weight.flatten(1), self.bias)
        return output[:, :, None, None]

    def _sees_one_point(self, input: torch.Tensor) -> bool:
        """Whether the output is 1x1 and the kernel at that one place covers the whole map."""
        if self.padding_mode != "zeros" or isinstance(self.padding, str) or self.dilation != (1, 1):
            return False
        axes = zip(input.shape[2:], self.kernel_size, self.padding, self.stride, strict=True)
        return all(
            0 <= size + 2 * padding - kernel < stride and size <= kernel - padding
            for size, kernel, padding, stride in axes
        )


@cache
def model_names() -> list[str]:
    """The names that `build_model` takes: torchvision's classification models, quantised ones left out."""
    from torchvision import models

    return list(models.list_models(module=models))


def build_model(model_name: str, num_classes: int, size: int) -> nn.Module:
    """A freshly initialised network for `size`-pixel tiles; its weights come from torch's global generator.

    The caller seeds (`torch.manual_seed`). Takes (N, 3, size, size) float32, returns logits (N, num_classes).

    Raises UsageError where the network cannot take tiles of this size.
    """
    from torchvision import models

    options: dict[str, object] = {}
    if model_name in ("googlenet", "inception_v3"):
        # Their auxiliary heads need tiles of 224 and 299 pixels.
        options = {"aux_logits": False, "init_weights": True}
    elif model_name.startswith("vit_"):
        # Its position embeddings are made for one size.
        options = {"image_size": size}
    try:
        model: nn.Module = models.get_model(model_name, weights=None, num_classes=num_classes, **options)
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"--model_name {model_name} cannot take tiles of {size} pixels ({first_line(error)}): "
            "choose a larger --size or another model"
        ) from error
    return use_point_convolutions(model).train()


def use_point_convolutions(model: nn.Module) -> nn.Module:
    """Make each plain nn.Conv2d of the model a PointConv2d with the same parameters; returns the model."""
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = PointConv2d
    return model


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) in 0..255 to float32 in -1..1, the coursework's mean .5 and std .5."""
    return images.float().div_(127.5).sub_(1.0)

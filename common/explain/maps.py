"""Attribution maps: which pixels of a tile a network's logit for one class depends on.

Every method takes a network in eval mode, inputs (N, 3, H, W) float32 in -1..1, targets (N,) int64 and a seed for
its random numbers; it returns maps (N, H, W) float32. A tile's map does not depend on the other tiles. In training
mode it would, by BatchNorm: such maps correlated only 0.18 with the right ones.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from captum.attr import IntegratedGradients, LayerAttribution, LayerGradCam, Occlusion, Saliency
from torch import nn

from common.data.batches import at_once
from common.explain.stages import grad_cam_layer

WHITE = 1.0  # the colour of an empty slide: the baseline of Integrated Gradients and Occlusion
MAP_BATCH = 64  # tiles, of up to 64 pixels, whose maps are computed at once; a method needs many copies of each
SMOOTHGRAD_SAMPLES = 16
SMOOTHGRAD_NOISE = 0.15 * 2  # inputs lie in -1..1; of this range Smilkov et al. find 0.1 to 0.2 best
INTEGRATION_STEPS = 48


@dataclass(frozen=True)
class Method:
    """A way to make maps: its name for figures, and the function.

    `signed` maps are positive where a pixel speaks for the class and negative where it speaks against it; the
    others only show how much the logit depends on a pixel.
    """

    title: str
    signed: bool
    function: Callable[[nn.Module, torch.Tensor, torch.Tensor, int], torch.Tensor]

    def maps(self, model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, seed: int) -> torch.Tensor:
        """The maps of any number of tiles."""
        count = at_once(inputs.shape[-1], MAP_BATCH)
        parts = zip(torch.split(inputs, count), torch.split(targets, count), strict=True)
        return torch.cat([self.function(model, *part, seed) for part in parts])


def saliency(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, seed: int) -> torch.Tensor:
    """The absolute gradient of the target's logit, its maximum over the channels (Simonyan et al. 2014)."""
    gradients: torch.Tensor = Saliency(model).attribute(_leaf(inputs), target=targets)
    return gradients.detach().amax(1)


def smoothgrad_noise(inputs: torch.Tensor, seed: int) -> torch.Tensor:
    """The noise of each noisy copy, (SMOOTHGRAD_SAMPLES, 3, H, W)."""
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(SMOOTHGRAD_SAMPLES, *inputs.shape[1:], generator=random) * SMOOTHGRAD_NOISE
    return noise.to(inputs.device)


def smoothgrad(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, seed: int) -> torch.Tensor:
    """The mean absolute gradient over noisy copies of the tile, maximum over the channels (Smilkov et al. 2017).

    All tiles get the same noise, which depends on the seed alone. Captum's NoiseTunnel takes noise for the whole
    batch from the global generator: a tile's map would depend on its place and on the other tiles.
    """
    total = torch.zeros_like(inputs)
    for sample in smoothgrad_noise(inputs, seed):
        total += Saliency(model).attribute(_leaf(inputs + sample), target=targets).detach()
    return (total / SMOOTHGRAD_SAMPLES).amax(1)


def integrated_gradients(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, seed: int) -> torch.Tensor:
    """Integrated Gradients from a white tile, summed over the channels (Sundararajan et al. 2017)."""
    white = torch.full_like(inputs[:1], WHITE)
    options = {"target": targets, "n_steps": INTEGRATION_STEPS, "internal_batch_size": at_once(inputs.shape[-1])}
    attributions: torch.Tensor = IntegratedGradients(model).attribute(inputs, white, **options)
    return attributions.detach().sum(1).float()


def grad_cam(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, seed: int) -> torch.Tensor:
    """Grad-CAM at `grad_cam_layer`, rectified, resized bilinearly to the tile (Selvaraju et al. 2017)."""
    layer = grad_cam_layer(model, inputs[:1])
    maps = LayerGradCam(model, layer).attribute(_leaf(inputs), target=targets, relu_attributions=True).detach()
    enlarged: torch.Tensor = LayerAttribution.interpolate(maps, tuple(inputs.shape[2:]), "bilinear")
    return enlarged[:, 0]


def occlusion(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, seed: int) -> torch.Tensor:
    """How far the logit falls when a white square a quarter of the tile wide hides a pixel (Zeiler & Fergus 2014).

    The square moves by a seventh of the tile; a pixel gets the mean over the squares that hide it.
    """
    window, stride = inputs.shape[-1] // 4, inputs.shape[-1] // 7
    attributions: torch.Tensor = Occlusion(model).attribute(
        inputs,
        sliding_window_shapes=(inputs.shape[1], window, window),
        strides=(inputs.shape[1], stride, stride),
        baselines=WHITE,
        target=targets,
        perturbations_per_eval=max(1, at_once(inputs.shape[-1]) // len(inputs)),
    )
    return attributions.detach().mean(1).float()


METHODS = {
    "saliency": Method("Saliency", False, saliency),
    "smoothgrad": Method("SmoothGrad", False, smoothgrad),
    "integrated_gradients": Method("Integrated Gradients", True, integrated_gradients),
    "grad_cam": Method("Grad-CAM", False, grad_cam),
    "occlusion": Method("Occlusion", True, occlusion),
}


def edge_map(inputs: torch.Tensor) -> torch.Tensor:
    """The magnitude of the Sobel gradient of the tile's grey values, (N, H, W): a control without a network."""
    grey = inputs.mean(1, keepdim=True)
    slope = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=inputs.device)
    kernels = torch.stack([slope, slope.T])[:, None]
    padded = nn.functional.pad(grey, (1, 1, 1, 1), mode="replicate")
    return nn.functional.conv2d(padded, kernels).square().sum(1).sqrt()


def _leaf(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.detach().requires_grad_()

"""Convolutions on maps of a few pixels, where PyTorch's CPU kernels waste most of their time.

In the deeper layers of a network a tile of 28 pixels has become a map of 4 × 4, 2 × 2 or 1 × 1 pixels. There the
CPU library behind nn.Conv2d (oneDNN) multiplies mostly padding, and the weight gradient of a depthwise convolution
takes up to a hundred times as long as its forward pass. docs/speed.md says what this module saves.

In this module a map is (N, H, W, C) and a kernel (C_out, kH, kW, C_in). They are views of PyTorch's (N, C, H, W)
tensors in channels_last order.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_input

FEW_OUTPUTS = 4  # up to so many output pixels one matrix product per pixel is faster than nn.Conv2d

Axes = tuple[int, ...]  # one value for rows, one for columns


class SmallMapConv2d(nn.Conv2d):
    """nn.Conv2d that is faster on a CPU. Results are equal up to rounding; there are only first derivatives.

    All other cases run as nn.Conv2d: a GPU, autocast, other groups than depthwise, dilation, padding by name.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, C_in, H, W) to (N, C_out, H', W'), as nn.Conv2d."""
        if not self._is_plain(input):
            return super().forward(input)
        kernel, stride, padding, size = self.kernel_size, self.stride, self.padding, tuple(input.shape[2:])
        assert isinstance(padding, tuple)
        axes = list(zip(size, kernel, stride, padding, strict=True))
        out = [(pixels + 2 * pad - taps) // step + 1 for pixels, taps, step, pad in axes]
        if self.groups == 1:
            if kernel == (1, 1) and padding == (0, 0):
                rows = input[:, :, :: stride[0], :: stride[1]].permute(0, 2, 3, 1)
                return _to_nchw(F.linear(rows, self.weight.flatten(1), self.bias))
            if math.prod(out) > FEW_OUTPUTS:
                return super().forward(input)
            output = _FewOutputs.apply(input, self.weight, stride, padding)
        elif size == tuple(out) == (1, 1) and all(pad < taps for _, taps, _, pad in axes):  # the rest is padding
            output = (input.flatten(1) * self.weight[:, 0, padding[0], padding[1]])[:, :, None, None]
        elif any(pixels < taps and before <= taps for pixels, taps, before in zip(out, kernel, size, strict=True)):
            output = _Depthwise.apply(input, self.weight, stride, padding)
        else:
            return super().forward(input)
        biased: torch.Tensor = output if self.bias is None else output + self.bias[:, None, None]
        return biased

    def _is_plain(self, input: torch.Tensor) -> bool:
        """Whether this is an ordinary or a depthwise convolution, on a CPU and without autocast."""
        return (
            input.device.type == "cpu"
            and not torch.is_autocast_enabled("cpu")
            and (self.groups == 1 or self.groups == self.in_channels == self.out_channels)
            and self.padding_mode == "zeros"
            and not isinstance(self.padding, str)
            and self.dilation == (1, 1)
        )


class _FewOutputs(torch.autograd.Function):
    """An ordinary convolution as one matrix product per output pixel, over the taps that are not on padding."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, stride: Axes, padding: Axes) -> torch.Tensor:
        maps, kernel = _to_nhwc(input), _to_nhwc(weight)
        windows = list(_windows(input, weight, stride, padding))
        height, width = windows[-1][0] + 1, windows[-1][1] + 1
        output = maps.new_empty(len(maps), height, width, len(kernel))
        for row, column, pixels, taps in windows:
            output[:, row, column] = F.linear(maps[:, *pixels].flatten(1), kernel[:, *taps].flatten(1))
        ctx.save_for_backward(input, weight)
        ctx.windows = windows
        return _to_nchw(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        maps, kernel, grad = _to_nhwc(input), _to_nhwc(weight), _to_nhwc(grad_output)
        grad_maps = maps.new_zeros(maps.shape) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for row, column, pixels, taps in ctx.windows:
            pixel = grad[:, row, column]
            if grad_maps is not None:
                part = grad_maps[:, *pixels]
                part += (pixel @ kernel[:, *taps].flatten(1)).view_as(part)
            if grad_weight is not None:
                part = _to_nhwc(grad_weight)[:, *taps]
                part += (pixel.T @ maps[:, *pixels].flatten(1)).view_as(part)
        return None if grad_maps is None else _to_nchw(grad_maps), grad_weight, None, None


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution whose weight gradient is summed output pixel by output pixel."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor, weight: torch.Tensor, stride: Axes, padding: Axes) -> torch.Tensor:
        ctx.save_for_backward(input, weight)
        ctx.stride, ctx.padding = stride, padding
        output = F.conv2d(input, weight, None, stride, padding, groups=len(weight))
        return _to_nchw(_to_nhwc(output))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        grad_input = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_input = conv2d_input(  # type: ignore[no-untyped-call]
                input.shape, weight, grad_output, ctx.stride, ctx.padding, groups=len(weight)
            )
        if ctx.needs_input_grad[1]:
            maps, grad = _to_nhwc(input), _to_nhwc(grad_output)
            grad_weight = torch.zeros_like(weight)
            kernel = grad_weight[:, 0].permute(1, 2, 0)
            for row, column, pixels, taps in _windows(input, weight, ctx.stride, ctx.padding):
                kernel[taps] += (maps[:, *pixels] * grad[:, row, column, None, None]).sum(0)
        return grad_input, grad_weight, None, None


def use_small_map_convolutions(model: nn.Module) -> nn.Module:
    """Make each plain nn.Conv2d of the model a SmallMapConv2d with the same parameters; returns the model."""
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = SmallMapConv2d
    return model


def _windows(
    input: torch.Tensor, weight: torch.Tensor, stride: Axes, padding: Axes
) -> Iterator[tuple[int, int, tuple[slice, slice], tuple[slice, slice]]]:
    """For each output pixel: its row and column, the pixels of the map under the kernel, and the taps on them."""
    axes: list[list[tuple[slice, slice]]] = []
    for size, taps, step, pad in zip(input.shape[2:], weight.shape[2:], stride, padding, strict=True):
        axes.append([])
        for first in range(-pad, size + pad - taps + 1, step):
            low, high = (min(max(end, 0), size) for end in (first, first + taps))
            axes[-1].append((slice(low, high), slice(low - first, high - first)))
    for row, (pixel_rows, tap_rows) in enumerate(axes[0]):
        for column, (pixel_columns, tap_columns) in enumerate(axes[1]):
            yield row, column, (pixel_rows, pixel_columns), (tap_rows, tap_columns)


def _to_nhwc(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 2, 3, 1)


def _to_nchw(maps: torch.Tensor) -> torch.Tensor:
    """(N, H, W, C) as (N, C, H, W).

    A map of one pixel can have two kinds of strides, and BatchNorm is ten times slower where the strides of its
    input and its gradient differ: so they are always those of (N, C, 1, 1).
    """
    if maps.shape[1:3] == (1, 1):
        return maps.flatten(1)[:, :, None, None]
    return maps.permute(0, 3, 1, 2)

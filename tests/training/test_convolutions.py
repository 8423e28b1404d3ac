"""SmallMapConv2d computes the same as nn.Conv2d, in each of its ways."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

from common.training import convolutions
from common.training.convolutions import SmallMapConv2d, use_small_map_convolutions
from common.training.models import build_model

# Kernel, stride, padding.
KERNELS = [(1, 1, 0), (1, 2, 0), (1, 3, 1), (3, 1, 1), (3, 2, 1), (5, 2, 2), (3, 1, 0), (2, 2, 0), (3, 4, 1)]
MAPS = [(1, 1), (2, 2), (1, 2), (3, 3), (3, 1), (4, 4), (5, 4), (7, 7), (2, 9)]


def pair(*arguments: int, **options: object) -> tuple[nn.Conv2d, nn.Conv2d]:
    """nn.Conv2d and SmallMapConv2d with the same parameters, in float64."""
    plain = nn.Conv2d(*arguments, **options).double()  # type: ignore[arg-type]
    small = copy.deepcopy(plain)
    small.__class__ = SmallMapConv2d
    return plain, small


def results(conv: nn.Conv2d, images: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of images, weight and, where there is one, bias."""
    images = images.clone(memory_format=torch.preserve_format).requires_grad_()
    output = conv(images)
    parameters = list(conv.parameters())
    cotangent = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(1))
    return [output.detach(), *torch.autograd.grad(output, [images, *parameters], cotangent)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 6, 12])
def test_outputs_and_gradients_equal_those_of_the_plain_convolution(
    groups: int, bias: bool, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    for (kernel, stride, padding), (height, width) in product(KERNELS, MAPS):
        if min(height, width) + 2 * padding < kernel:
            continue
        plain, small = pair(12, 24 if groups == 1 else 12, kernel, stride, padding, groups=groups, bias=bias)
        for conv in (plain, small):
            conv.to(memory_format=layout)  # type: ignore[call-overload]
        images = torch.randn(5, 12, height, width, dtype=torch.double).contiguous(memory_format=layout)
        for got, expected in zip(results(small, images), results(plain, images), strict=True):
            torch.testing.assert_close(got, expected, check_stride=False)


@pytest.mark.parametrize(
    ("channels", "kernel", "size", "options"),
    [
        (4, 2, 3, {"dilation": 2}),
        (4, 3, 2, {"padding_mode": "reflect", "padding": 1}),
        (4, 3, 2, {"padding": "same"}),
        (8, 3, 2, {"groups": 4, "padding": 1}),
    ],
)
def test_a_convolution_without_a_special_way_runs_as_the_plain_one(
    channels: int, kernel: int, size: int, options: dict[str, object]
) -> None:
    plain, small = pair(4, channels, kernel, **options)
    images = torch.randn(2, 4, size, size, dtype=torch.double)
    for got, expected in zip(results(small, images), results(plain, images), strict=True):
        assert torch.equal(got, expected)


def test_backward_works_for_frozen_weights_and_for_plain_inputs() -> None:
    for groups in (1, 4):
        _, small = pair(4, 4, 3, padding=1, groups=groups, bias=False)
        images = torch.randn(2, 4, 2, 2, dtype=torch.double)
        small(images).sum().backward()
        assert small.weight.grad is not None
        small.requires_grad_(False)
        small(images.requires_grad_()).sum().backward()
        assert images.grad is not None


def test_the_plain_convolution_runs_in_autocast() -> None:
    conv = use_small_map_convolutions(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)))
    with torch.autocast("cpu", torch.bfloat16):
        assert conv(torch.randn(2, 4, 2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "plain", "few_outputs", "depthwise"), [("resnet18", 9, 8, 0), ("mobilenet_v3_large", 6, 0, 8)]
)
def test_the_deep_layers_take_the_fast_ways_on_a_small_tile(
    name: str, plain: int, few_outputs: int, depthwise: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(name, 9, 28)
    taken: list[str] = []

    def count(name: str, forward: object) -> object:
        def counted(*arguments: object) -> object:
            taken.append(name)
            return forward(*arguments)  # type: ignore[operator]

        return counted

    monkeypatch.setattr(nn.Conv2d, "forward", count("plain", nn.Conv2d.forward))
    for way in ("_FewOutputs", "_Depthwise"):
        function = getattr(convolutions, way)
        monkeypatch.setattr(function, "forward", staticmethod(count(way, function.forward)))
    model(torch.randn(2, 3, 28, 28))
    counts = [taken.count(way) for way in ("plain", "_FewOutputs", "_Depthwise")]
    assert counts == [plain, few_outputs, depthwise]


def test_a_map_of_one_pixel_always_has_the_same_strides() -> None:
    for groups, kernel in ((1, 1), (1, 3), (1, 5), (8, 3), (8, 5)):
        for size in (1, 2):
            conv = nn.Conv2d(8, 8, kernel, stride=2, padding=kernel // 2, groups=groups)
            conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            images = torch.randn(4, 8, size, size).contiguous(memory_format=torch.channels_last)
            output = use_small_map_convolutions(nn.Sequential(conv))(images)
            assert output.shape[2:] == (1, 1)
            assert output.stride() == (8, 1, 1, 1)

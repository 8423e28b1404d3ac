import copy

import pytest
import torch
from torch import nn

from common.errors import UsageError
from common.models import PointConv2d, build_model, model_names, normalise


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_large", "googlenet", "vit_b_32"])
def test_models_take_small_tiles_and_give_one_logit_a_class(name: str) -> None:
    model = build_model(name, 9, 64)
    assert model.training
    assert model.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 9)


@pytest.mark.parametrize("groups", [1, 2, 12])
@pytest.mark.parametrize("bias", [True, False])
def test_a_point_convolution_computes_what_the_plain_one_does(groups: int, bias: bool) -> None:
    torch.manual_seed(0)
    for kernel, stride, padding in [
        (1, 1, 0),
        (1, 2, 0),
        (3, 1, 1),
        (3, 2, 1),
        (5, 2, 2),
        (3, 1, 0),
        (2, 2, 0),
        (3, 4, 1),
    ]:
        plain = nn.Conv2d(12, 12, kernel, stride, padding, groups=groups, bias=bias).double()
        point = copy.deepcopy(plain)
        point.__class__ = PointConv2d
        for height, width in [(1, 1), (2, 2), (1, 2), (3, 3), (3, 1), (5, 4), (8, 8)]:
            if min(height, width) + 2 * padding < kernel:
                continue
            images = torch.randn(5, 12, height, width, dtype=torch.double)
            expected, got = plain(images), point(images)
            torch.testing.assert_close(got, expected)
            expected.square().sum().backward()
            got.square().sum().backward()
            torch.testing.assert_close(point.weight.grad, plain.weight.grad)


def test_the_deepest_maps_of_a_small_tile_take_the_short_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("resnet18", 9, 28).eval()
    images = torch.randn(2, 3, 28, 28)
    fast = model(images)
    shapes: list[torch.Size] = []

    def plain(conv: nn.Conv2d, images: torch.Tensor) -> torch.Tensor:
        shapes.append(images.shape[2:])
        return nn.functional.conv2d(images, conv.weight, conv.bias, conv.stride, conv.padding)

    monkeypatch.setattr(nn.Conv2d, "forward", plain)
    torch.testing.assert_close(model(images), fast)
    assert len(shapes) == 16  # of 20: in layer4 one convolution of 2x2 to a point, three of a point
    monkeypatch.setattr(PointConv2d, "_sees_one_point", lambda *_: False)
    torch.testing.assert_close(model(images), fast, rtol=1e-4, atol=1e-5)
    assert len(shapes) == 16 + 20


def test_the_global_seed_decides_the_weights() -> None:
    def first_weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return next(build_model("resnet18", 9, 28).parameters()).detach()

    assert torch.equal(first_weights(1), first_weights(1))
    assert not torch.equal(first_weights(1), first_weights(2))


@pytest.mark.parametrize(("name", "size"), [("alexnet", 28), ("vit_b_16", 28), ("inception_v3", 64)])
def test_a_model_that_cannot_take_the_tiles_is_refused_in_one_line(name: str, size: int) -> None:
    with pytest.raises(UsageError, match=rf"--model_name {name} cannot take tiles of {size} pixels") as refused:
        build_model(name, 9, size)
    assert "\n" not in str(refused.value)


def test_only_classification_models_are_listed() -> None:
    assert {"resnet18", "mobilenet_v3_large", "efficientnet_b0"} <= set(model_names())
    assert not any("fcn" in name or "rcnn" in name or "r3d" in name for name in model_names())


def test_normalise_maps_bytes_to_minus_one_to_one_and_keeps_the_memory_format() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    images = images.contiguous(memory_format=torch.channels_last)
    before = images.clone()
    inputs = normalise(images)
    assert inputs.dtype == torch.float32
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(inputs, (images / 255 - 0.5) / 0.5)
    assert torch.equal(images, before)

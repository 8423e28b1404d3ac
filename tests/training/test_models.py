import sys

import pytest
import torch

from common.cli import UsageError
from common.training.convolutions import SmallMapConv2d
from common.training.models import build_model, check_model_name


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_large", "googlenet", "vit_b_32"])
def test_models_take_small_tiles_and_return_one_logit_per_class(name: str) -> None:
    model = build_model(name, 9, 64)
    assert model.training
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 9)  # one tensor: no auxiliary heads
    assert model.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 9)


def test_googlenet_has_torchvisions_initial_weights() -> None:
    first = next(build_model("googlenet", 9, 64).parameters())
    assert first.std().item() == pytest.approx(0.01, rel=0.05)  # PyTorch's default would be 0.048


def test_a_network_of_timm_is_built_by_name_and_without_timm_its_package_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("timm")
    model = build_model("timm:resnet10t", 9, 28)
    assert model.training
    assert any(isinstance(module, SmallMapConv2d) for module in model.modules())
    assert model.eval()(torch.zeros(2, 3, 28, 28)).shape == (2, 9)
    with pytest.raises(UsageError, match=r"timm:resnet10: timm has .*; did you mean timm:resnet10t\?"):
        check_model_name("timm:resnet10")
    with pytest.raises(UsageError, match="timm:vit_tiny_patch16_224 cannot take inputs of 28 pixels"):
        build_model("timm:vit_tiny_patch16_224", 9, 28)
    monkeypatch.setitem(sys.modules, "timm", None)
    words = "^--model_name timm:resnet10t: needs the package timm; python -m pip install timm$"
    with pytest.raises(UsageError, match=words):
        check_model_name("timm:resnet10t")


@pytest.mark.parametrize(("name", "size"), [("alexnet", 28), ("vit_b_16", 28), ("inception_v3", 64)])
def test_a_model_that_cannot_take_the_tiles_is_refused_with_one_line(name: str, size: int) -> None:
    with pytest.raises(UsageError, match=rf"--model_name {name} cannot take inputs of {size} pixels") as refused:
        build_model(name, 9, size)
    assert str(refused.value).endswith(": choose a larger --input_size, or another model")
    assert "\n" not in str(refused.value)

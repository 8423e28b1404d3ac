"""The stages of networks whose structure is known."""

import pytest
import torch
from torch import nn

from common.cli import UsageError
from common.explain.stages import grad_cam_layer, map_sides, stages
from common.training.models import build_model


def network(name: str, size: int) -> nn.Module:
    return build_model(name, 9, size).eval().requires_grad_(False)


def parts(names: list[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize(("size", "sides"), [(28, [1, 2, 4, 7, 14]), (64, [2, 4, 8, 16, 32])])
def test_the_stages_of_resnet_are_its_layers(size: int, sides: list[int]) -> None:
    model = network("resnet18", size)
    found = stages(model, torch.zeros(1, 3, size, size))
    assert list(found) == ["head", *map(str, sides)]
    expected = [{"fc"}, {"layer4"}, {"layer3"}, {"layer2"}, {"layer1"}, {"conv1", "bn1"}]
    assert [parts(names) for names in found.values()] == expected
    assert sorted(name for names in found.values() for name in names) == sorted(model.state_dict())
    assert grad_cam_layer(model, torch.zeros(1, 3, size, size)) is model.layer2


def test_squeeze_and_excitation_belongs_to_its_block() -> None:
    model = network("mobilenet_v3_large", 64)
    found = stages(model, torch.zeros(1, 3, 64, 64))
    stage_of = {name: stage for stage, names in found.items() for name in names}
    assert list(found) == ["head", "2", "4", "8", "16", "32"]
    assert stage_of["features.4.block.2.fc1.weight"] == "8"  # its map is 1x1, that of its block 8x8
    assert {stage_of[name] for name in stage_of if name.startswith("classifier")} == {"head"}
    assert map_sides(model, torch.zeros(1, 3, 64, 64))["features.4.block.2.fc1"] == 1


def test_a_network_without_maps_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 9))
    assert list(stages(model, torch.zeros(1, 3, 28, 28))) == ["head"]
    with pytest.raises(UsageError, match="Sequential has no maps of an eighth"):
        grad_cam_layer(model, torch.zeros(1, 3, 28, 28))


def test_parameters_of_a_module_that_is_not_called_belong_to_the_module_around_it() -> None:
    model = network("vit_b_16", 32)
    found = stages(model, torch.zeros(1, 3, 32, 32))
    attention = "encoder.layers.encoder_layer_0.self_attention.out_proj.weight"  # used as a tensor
    assert attention in found["head"]
    assert "conv_proj.weight" in found["2"]

"""A network that starts from given weights: what is trained, its inputs, and the cache of its features."""

import re
from pathlib import Path

import pytest
import torch
from conftest import CPU, trainer_of
from torch import nn

from common.cli import UsageError
from common.data.augment import build_augmentation
from common.data.batches import DeviceTiles, normalise
from common.data.dataset import Dataset
from common.finetune.features import cache_features
from common.finetune.network import FineTunedNetwork, build_fine_tuned, lr_factors
from common.finetune.weights import Weights
from common.training.loop import generator

SIZE, MEAN, STD = 32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
START = Weights("w", "test", None, None, MEAN, STD)
SMALL = "mobilenet_v3_small"  # small and quick; has BatchNorm, dropout and a classifier of two layers


def network(train_part: str = "classifier", name: str = SMALL) -> FineTunedNetwork:
    """A network of random weights, frozen in part; its BatchNorm statistics are not the fresh 0 and 1."""
    torch.manual_seed(0)
    model = build_fine_tuned(name, START, SIZE, train_part)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(0.5)  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize(
    ("train_part", "moving"),
    [("head", r"network\.classifier\.3\."), ("classifier", r"network\.classifier\.[03]\."), ("all", r"network\.")],
)
def test_training_moves_its_part_and_leaves_the_rest_the_same_to_the_bit(
    tiny: Dataset, tmp_path: Path, train_part: str, moving: str
) -> None:
    model = network(train_part)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_of(tiny, tmp_path, model, n_epochs=5, lr=0.01, weight_decay=0.1)
    trainer.train_epoch(1)
    trainer.train_epoch(2)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
    assert changed == {name for name in before if re.match(moving, name)}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in changed)
        assert (parameter.grad is not None) == (name in changed)
    model.train()
    assert model.head.training
    if train_part == "head":  # there is no dropout in it
        assert not any(part.training for part in model.modules() if isinstance(part, nn.BatchNorm2d | nn.Dropout))


def test_the_first_block_learns_slowest_and_the_head_at_the_full_rate(tiny: Dataset, tmp_path: Path) -> None:
    model = network("all")
    factors = lr_factors(model, 0.01)
    # Thirteen blocks: geometric from 0.01 to the head's 1.
    for block, name in ((0, "0.weight"), (5, "block.0.0.weight"), (12, "0.weight")):
        assert factors[f"network.features.{block}.{name}"] == pytest.approx(0.01 ** (1 - block / 13))
    assert not any("classifier" in name for name in factors)
    trainer = trainer_of(tiny, tmp_path, model, lr_factors=factors, lr=0.5, lr_min=1.0)
    assert trainer.train_and_validate(1)["lr"] == 0.5
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(0.5 * factors.get(name, 1.0))


def test_inputs_get_the_weights_mean_and_std() -> None:
    model = network().eval()
    seen: list[torch.Tensor] = []
    model.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    model(normalise(images))
    expected = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("name", [SMALL, "resnet18", "shufflenet_v2_x0_5", "densenet121", "vit_b_16"])
def test_features_through_the_head_are_the_whole_network(name: str) -> None:
    model = network(name=name).eval()
    images = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    with torch.no_grad():
        whole, features = model(images), model.features(images)
        assert features.shape[1:] == model.feature_shape
        model.takes_features = True
        torch.testing.assert_close(model(features), whole)


def test_as_many_tiles_as_fit_in_memory_pass_at_once_and_each_once(
    tiny: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = network(), []
    original = model.features
    monkeypatch.setattr(model, "features", lambda images: seen.append(len(images)) or original(images))
    tiles = DeviceTiles(tiny.val, CPU.device, input_size=40)
    tiles.at_once = 9
    assert cache_features(model, tiles, [lambda images: images]).features.dtype == torch.float32
    assert seen == [9] * 5


def test_each_tile_of_a_batch_gets_a_random_view(tiny: Dataset) -> None:
    model, tiles = network().eval(), DeviceTiles(tiny.val, CPU.device, 28)
    random = generator(0, 1, "views")
    stain = build_augmentation("stain")
    cached = cache_features(model, tiles, [lambda images: images, lambda images: stain(images, random)])
    indices = torch.arange(len(tiles))
    inputs, labels = cached.inputs(indices, generator(0, 2, "augment"))
    assert torch.equal(labels, tiny.val.labels)
    from_view = [(inputs == view).all(1) for view in cached.features]
    assert (from_view[0] ^ from_view[1]).all()
    assert all(10 < int(part.sum()) < len(tiles) - 10 for part in from_view)
    assert torch.equal(cached.inputs(indices)[0], cached.features[0])
    assert cached.views(torch.tensor([7, 12]))[1].tolist() == [7, 3]  # tile i is of class i modulo 9


def test_a_network_without_a_linear_last_layer_is_refused() -> None:
    with pytest.raises(UsageError, match="SqueezeNet has no linear last layer"):
        build_fine_tuned("squeezenet1_0", START, 64)

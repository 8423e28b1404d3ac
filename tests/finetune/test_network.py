from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, trainer_of
from torch import nn

from common.cli import UsageError
from common.data.augment import build_augmentation, dihedral_view
from common.data.batches import DeviceTiles, normalise
from common.data.dataset import Dataset
from common.finetune.features import cache_features
from common.finetune.network import FineTunedNetwork, build_fine_tuned, lr_factors
from common.finetune.weights import Preset, Weights
from common.training.device import Compute
from common.training.evaluation import evaluate
from common.training.loop import generator

PRESET = Preset(40, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
SMALL = "mobilenet_v3_small"  # small and quick; has BatchNorm, dropout and a classifier of two layers


def network(train_part: str = "classifier", adapt_batchnorm: bool = False, name: str = SMALL) -> FineTunedNetwork:
    """A network of random weights, frozen in part; its BatchNorm statistics are not the fresh 0 and 1."""
    torch.manual_seed(0)
    model = build_fine_tuned(name, 9, Weights("w", "test", None, None, PRESET), 40, train_part, adapt_batchnorm)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(0.5)  # type: ignore[union-attr]
    return model


def trained(model: FineTunedNetwork, tiny: Dataset, folder: Path, epochs: int = 2, **keys: Any) -> nn.Module:
    trainer = trainer_of(tiny, folder, model, **{"n_epochs": 5, "lr": 0.01, **keys})
    for epoch in range(1, epochs + 1):
        trainer.train_epoch(epoch)
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}


# Freezing


@pytest.mark.parametrize(
    ("train_part", "moving"),
    [
        ("head", {"network.classifier.3.weight", "network.classifier.3.bias"}),
        ("classifier", {f"network.classifier.{i}.{kind}" for i in (0, 3) for kind in ("weight", "bias")}),
    ],
)
def test_a_frozen_part_is_the_same_to_the_bit_after_training(
    tiny: Dataset, tmp_path: Path, train_part: str, moving: set[str]
) -> None:
    model = network(train_part)
    before = state(model)
    trained(model, tiny, tmp_path, weight_decay=0.1)
    assert changed(before, model) == moving
    model.train()
    for name, module in model.network.named_modules():
        if isinstance(module, nn.BatchNorm2d | nn.Dropout):
            assert module.training == (train_part == "classifier" and name == "classifier.2"), name
    frozen = [parameter for name, parameter in model.named_parameters() if name not in moving]
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in frozen)


def test_adapting_batchnorm_moves_its_statistics_and_no_frozen_weight(tiny: Dataset, tmp_path: Path) -> None:
    model = network(adapt_batchnorm=True)
    before = state(model)
    trained(model, tiny, tmp_path)
    moved = {name for name in changed(before, model) if "classifier" not in name}
    statistics = {name for name in before if "running_" in name or "num_batches" in name}
    assert moved == statistics
    assert statistics


def test_training_all_moves_every_layer(tiny: Dataset, tmp_path: Path) -> None:
    model = network("all")
    before = state(model)
    trained(model, tiny, tmp_path, epochs=1)
    assert changed(before, model) == set(before) - {"mean", "std"}


def test_the_first_block_learns_slowest_and_the_head_at_the_full_rate(tiny: Dataset, tmp_path: Path) -> None:
    model = network("all")
    factors = lr_factors(model, 0.01)
    blocks = [factors[f"network.features.{i}.{rest}"] for i, rest in ((0, "0.weight"), (12, "0.weight"))]
    assert blocks[0] == pytest.approx(0.01)
    assert blocks[0] < factors["network.features.5.block.0.0.weight"] < blocks[1] < 1
    ratios = {
        round(
            factors[f"network.features.{i + 1}.block.0.0.weight"]
            / factors[f"network.features.{i}.block.0.0.weight"],
            6,
        )
        for i in range(1, 10)
    }
    assert len(ratios) == 1  # geometric
    assert not any("classifier" in name for name in factors)
    trainer = trainer_of(tiny, tmp_path, model, lr_factors=factors, lr=0.5, lr_min=1.0)
    trainer.train_epoch(1)
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(0.5 * factors.get(name, 1.0))


# The wrapper


def test_inputs_get_the_weights_mean_and_std() -> None:
    model = network().eval()
    seen: list[torch.Tensor] = []
    model.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    model(normalise(images))
    expected = (images / 255 - torch.tensor(PRESET.mean).view(3, 1, 1)) / torch.tensor(PRESET.std).view(3, 1, 1)
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("name", [SMALL, "resnet18", "shufflenet_v2_x0_5", "densenet121", "vit_b_16"])
def test_features_through_the_head_are_the_whole_network(name: str) -> None:
    model = network(name=name) if name != "vit_b_16" else vit()
    model.eval()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        whole, features = model(images), model.features(images)
        assert features.shape[1:] == model.feature_shape
        model.takes_features = True
        torch.testing.assert_close(model(features), whole)


def vit() -> FineTunedNetwork:
    torch.manual_seed(0)
    return build_fine_tuned("vit_b_16", 9, Weights("w", "test", None, None, PRESET), 32)


# The cache


@pytest.mark.parametrize(("augmentation", "n_views"), [("none", 1), ("dihedral", 8)])
def test_cached_features_train_the_same_network_as_the_plain_path(
    tiny: Dataset, tmp_path: Path, augmentation: str, n_views: int
) -> None:
    tiles = DeviceTiles(tiny.train, CPU.device, 28)
    val = DeviceTiles(tiny.val, CPU.device, 28)
    views = [partial(dihedral_view, view=number) for number in range(n_views)]
    keys = {"augmentation": augmentation, "lr": 0.01, "lr_min": 1.0, "label_smoothing": 0.1}
    plain = trained(network(), tiny, tmp_path / "plain", epochs=3, **keys)
    model = network()
    untrained = evaluate(model, val, CPU).logits
    train = cache_features(model, tiles, views, CPU)
    model.takes_features = True
    trained(model, tiny, tmp_path / "cached", epochs=3, train=train, **keys)
    model.takes_features = False
    one, other = evaluate(plain, val, CPU).logits, evaluate(model, val, CPU).logits
    np.testing.assert_allclose(one, other, atol=1e-4)
    assert np.abs(one - untrained).max() > 0.05  # training did something
    features = cache_features(model, val, [lambda images: images], CPU)
    assert features.features.shape == (1, len(val), *model.feature_shape)
    model.takes_features = True
    np.testing.assert_allclose(evaluate(model, features, CPU).logits, other, atol=1e-4)


def test_tiles_are_augmented_and_resized_in_float32_before_a_bf16_network(
    tiny: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[torch.dtype, list[torch.Tensor]] = {torch.float32: [], torch.bfloat16: []}
    stain = build_augmentation("stain")
    for dtype, inputs in seen.items():
        model, random = network(), generator(0, 1, "views")
        original = model.features
        monkeypatch.setattr(model, "features", lambda images, o=original, i=inputs: i.append(images) or o(images))
        tiles = DeviceTiles(tiny.val, CPU.device, input_size=40)
        cached = cache_features(
            model, tiles, [lambda images, r=random: stain(images, r)], Compute(CPU.device, dtype)
        )
        assert cached.features.dtype == torch.float32
    assert all(map(torch.equal, *seen.values()))
    assert len(seen[torch.float32]) == 1


def test_test_time_augmentation_on_cached_views_is_that_on_tiles(tiny: Dataset) -> None:
    model, val = network().eval(), DeviceTiles(tiny.val, CPU.device, 28)
    views = [partial(dihedral_view, view=number) for number in range(8)]
    cached = cache_features(model, val, views, CPU)
    expected = evaluate(model, val, CPU, tta=True).logits
    model.takes_features = True
    np.testing.assert_allclose(evaluate(model, cached, CPU, tta=True).logits, expected, atol=1e-4)


def test_each_tile_of_a_batch_gets_a_random_view(tiny: Dataset) -> None:
    model, tiles = network().eval(), DeviceTiles(tiny.val, CPU.device, 28)
    random = generator(0, 1, "views")
    stain = build_augmentation("stain")
    cached = cache_features(model, tiles, [lambda images: images, lambda images: stain(images, random)], CPU)
    indices = torch.arange(len(tiles))
    inputs, labels = cached.inputs(indices, generator(0, 2, "augment"))
    assert torch.equal(labels, tiny.val.labels)
    from_view = [(inputs == view).all(1) for view in cached.features]
    assert (from_view[0] ^ from_view[1]).all()
    assert all(10 < int(part.sum()) < len(tiles) - 10 for part in from_view)
    assert torch.equal(cached.inputs(indices)[0], cached.features[0])


def test_a_network_without_a_linear_last_layer_is_refused() -> None:
    with pytest.raises(UsageError, match="SqueezeNet has no linear last layer"):
        build_fine_tuned("squeezenet1_0", 9, Weights("w", "test", None, None, PRESET), 64)

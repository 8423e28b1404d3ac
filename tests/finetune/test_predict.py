"""Labels of pictures from a checkpoint: the table, the contact sheet, the warnings and the ONNX file."""

import csv
import io
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MODEL
from matplotlib.image import imread
from PIL import Image

from common.config import run_script
from common.data import phantom
from common.data.batches import normalise
from common.data.pathmnist import CLASS_NAMES
from common.finetune import predict
from common.finetune.network import Preset, Weights, build_fine_tuned
from common.finetune.trained import load_trained
from common.records import checkpoint
from common.training.models import build_model

PRESET = Preset(40, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def save(path: Path, model_name: str, network: torch.nn.Module, **keys: Any) -> None:
    config = {"size": 28, "input_size": None, **keys}
    content = {"model_name": model_name, "class_names": list(CLASS_NAMES), "config": config}
    checkpoint.save(path, {"state_dict": network.state_dict(), **content})


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two untrained networks: `plain`, and `tuned`, which takes 40 pixels and other colours."""
    folder = tmp_path_factory.mktemp("output")
    torch.manual_seed(0)
    save(folder / "checkpoints/plain/best.pt", MODEL, build_model(MODEL, 9, 28))
    tuned = build_fine_tuned("resnet18", 9, Weights("none", "", None, None, PRESET), 40, "all")
    save(folder / "checkpoints/tuned/best.pt", "resnet18", tuned, input_size=40, train_part="all")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three tiles of 28 pixels, in three formats and one of them in a subfolder."""
    folder = tmp_path_factory.mktemp("pictures")
    tiles, _ = phantom.generate("test", 9, 28)
    (folder / "inner").mkdir()
    for name, tile in zip(("a.png", "b.TIF", "inner/c.png"), tiles, strict=False):
        Image.fromarray(tile).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def run(output: Path, *arguments: str | Path) -> None:
    run_script(predict.main, predict.PredictConfig, [*map(str, arguments), f"--output_dir={output}"])


def tiles_of(folder: Path) -> torch.Tensor:
    paths = [folder / name for name in ("a.png", "b.TIF", "inner/c.png")]
    return torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in paths]).permute(0, 3, 1, 2)


def test_a_loaded_network_is_frozen_in_eval_mode_and_gives_the_probabilities_of_the_saved_one(
    output: Path, pictures: Path
) -> None:
    images = tiles_of(pictures)
    plain = load_trained(output / "checkpoints/plain/best.pt")
    assert not any(module.training for module in plain.modules())
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    expected = plain.network(normalise(images)).softmax(1)
    assert torch.equal(plain(images), expected)
    tuned = load_trained(str(output / "checkpoints/tuned/best.pt"))
    assert (tuned.size, tuned.input_size, tuned.class_names) == (28, 40, CLASS_NAMES)
    inputs = torch.nn.functional.interpolate(images / 255, size=(40, 40), mode="bilinear")
    inputs = (inputs - torch.tensor(PRESET.mean).view(3, 1, 1)) / torch.tensor(PRESET.std).view(3, 1, 1)
    assert torch.allclose(tuned(images), tuned.network.network(inputs).softmax(1), atol=1e-5)


def test_the_untrained_network_differs_in_its_weights_alone(output: Path) -> None:
    for name in ("plain", "tuned"):
        trained = load_trained(output / f"checkpoints/{name}/best.pt")
        torch.manual_seed(1)
        fresh = trained.untrained()
        assert not fresh.training
        torch.manual_seed(1)
        again = trained.untrained()
        assert not any(parameter.requires_grad for parameter in fresh.parameters())
        for key, value in trained.network.state_dict().items():
            assert torch.equal(fresh.state_dict()[key], again.state_dict()[key]), key
            if key in ("mean", "std"):
                assert torch.equal(fresh.state_dict()[key], value)
            elif value.dim() == 4:
                assert not torch.equal(fresh.state_dict()[key], value), key


def test_the_table_has_a_line_for_each_picture_of_a_folder(
    output: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(output, "plain", pictures)
    printed = capsys.readouterr().out
    lines = list(csv.DictReader(io.StringIO(printed)))
    assert [Path(line["file"]).name for line in lines] == ["a.png", "b.TIF", "c.png"]
    expected = load_trained(output / "checkpoints/plain/best.pt")(tiles_of(pictures))
    for line, row in zip(lines, expected, strict=True):
        values = [float(line[name]) for name in CLASS_NAMES]
        assert values == pytest.approx(row.tolist(), rel=1e-5)
        assert line["class"] == CLASS_NAMES[row.argmax()]
        assert float(line["probability"]) == max(values)
    weights = output / "checkpoints/plain/best.pt"
    run(output, weights, "--csv", tmp_path / "t.csv", pictures / "a.png", pictures / "b.TIF", pictures / "inner")
    assert (tmp_path / "t.csv").read_text() == printed
    assert not capsys.readouterr().out


def test_a_picture_may_be_called_none(
    output: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copy(pictures / "a.png", tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    run(output, "plain", "none")
    assert capsys.readouterr().out.splitlines()[1].startswith("none,")


@pytest.mark.slow
def test_the_contact_sheet_shows_every_picture(output: Path, pictures: Path, tmp_path: Path) -> None:
    run(output, "tuned", pictures, f"--figure={tmp_path / 'sheet.png'}", f"--csv={tmp_path / 't.csv'}")
    sheet = imread(tmp_path / "sheet.png")
    assert min(sheet.shape[:2]) > 300
    assert sheet.std() > 0.05


@pytest.mark.parametrize(
    ("size", "colour", "warning"),
    [
        ((224, 224), (190, 130, 180), ""),
        ((28, 28), (240, 240, 240), ""),  # an empty slide
        ((2000, 2000), (190, 130, 180), "2000 × 2000 pixels, a tile has 224 × 224"),
        ((20, 20), (190, 130, 180), "20 × 20 pixels"),
        ((400, 300), (190, 130, 180), "400 × 300 pixels"),
        ((224, 224), (60, 140, 60), "its mean colour is not that of tissue"),
        ((224, 224), (128, 128, 128), "its mean colour"),
        ((224, 224), (20, 5, 20), "its mean colour"),
    ],
)
def test_a_picture_that_is_far_from_a_tile_is_recognised(
    size: tuple[int, int], colour: Any, warning: str, tmp_path: Path
) -> None:
    Image.new("RGB", size, colour).save(tmp_path / "p.png")
    tile, said = predict.read_picture(tmp_path / "p.png", 28)
    assert tile.shape == (3, 28, 28)
    assert (warning in said) if warning else not said


def test_a_warning_is_on_stderr_and_in_the_table(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (28, 28), (190, 130, 180)).save(tmp_path / "tissue.png")
    Image.new("RGB", (28, 28), (60, 140, 60)).save(tmp_path / "grass.png")
    run(output, "plain", tmp_path)
    printed = capsys.readouterr()
    grass, tissue = csv.DictReader(io.StringIO(printed.out))
    assert "its mean colour is not that of tissue" in grass["warning"]
    assert tissue["warning"] == ""
    assert printed.err == f"warning: {grass['file']} is far from the tiles of PathMNIST: {grass['warning']}\n"


def test_any_side_and_kind_of_8_bit_picture_is_read_as_a_square_tile(tmp_path: Path) -> None:
    halves = np.zeros((40, 80, 3), np.uint8)
    halves[:, 20:60] = (190, 130, 180)  # the central square
    for name, mode in (("p.png", "RGB"), ("p.jpg", "RGB"), ("p.tiff", "RGB"), ("alpha.png", "RGBA")):
        Image.fromarray(halves).convert(mode).save(tmp_path / name)
        tile = predict.read_picture(tmp_path / name, 28)[0].float()
        assert tile.mean((1, 2)).tolist() == pytest.approx([190, 130, 180], abs=3)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "needs a network and pictures"),
        (["plain"], 2, "needs a network and pictures"),
        (["gone", "{}/a.png"], 2, "gone: neither a file nor a run with weights, .*; python -m study.runs lists"),
        (
            ["~nobody-has-this-name/b.pt", "{}/a.png"],
            2,
            r"~nobody-has-this-name/b\.pt: begins with an unknown home",
        ),
        (["plain", "{}/gone.png"], 2, r"gone\.png: no such file or folder"),
        (["plain", "{}/empty"], 2, "empty: no pictures here"),
        (["plain", "{}/torn.png"], 1, r"torn\.png: not a readable picture"),
        (["plain", "{}/deep.png"], 1, r"deep\.png: has more than 8 bits per channel"),
        (["{}/other.pt", "{}/a.png"], 1, r"other\.pt: has no 'model_name': not a best\.pt of this project"),
        (["plain", "{}/a.png", "--figure=sheet.jpg"], 2, "--figure sheet.jpg: the name must end in .png"),
        (["plain", "{}/a.png", "--csvv=x"], 2, "unknown key --csvv; did you mean --csv"),
    ],
)
def test_a_mistake_is_refused_in_one_line(
    arguments: list[str],
    status: int,
    message: str,
    output: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    Image.new("RGB", (28, 28), (190, 130, 180)).save(tmp_path / "a.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    Image.fromarray(np.zeros((28, 28), np.uint16)).save(tmp_path / "deep.png")
    checkpoint.save(tmp_path / "other.pt", {"weight": torch.zeros(1)})
    with pytest.raises(SystemExit) as ended:
        run(output, *(argument.replace("{}", str(tmp_path)) for argument in arguments))
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == status
    assert len(said) == 1
    assert re.search(message, said[0]), said[0]


@pytest.mark.slow
def test_the_onnx_file_gives_the_same_probabilities_for_any_number_of_tiles(
    output: Path, pictures: Path, tmp_path: Path
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    run(output, "tuned", f"--onnx={tmp_path / 'net.onnx'}")
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    images = tiles_of(pictures)
    expected = load_trained(output / "checkpoints/tuned/best.pt")(images)
    for n_tiles in (1, 3):
        (found,) = session.run(["probabilities"], {"tiles": images[:n_tiles].numpy()})
        np.testing.assert_allclose(found, expected[:n_tiles], atol=1e-5)


def test_onnx_without_its_packages_names_them(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(SystemExit) as ended:
        run(output, "plain", f"--onnx={tmp_path / 'net.onnx'}")
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip().endswith("python -m pip install onnxscript")
    assert not list(tmp_path.iterdir())

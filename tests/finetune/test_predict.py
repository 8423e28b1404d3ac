"""Labels of pictures from a checkpoint: the table, what is said of each picture, and what is refused."""

import csv
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile  # of scikit-image
import torch
from conftest import MODEL
from PIL import Image

from common.cli import Fault, run_script
from common.data import phantom
from common.data.batches import normalise
from common.data.pathmnist import CLASS_NAMES
from common.files import write_json
from common.finetune import predict
from common.finetune.network import build_fine_tuned
from common.finetune.trained import load_trained
from common.finetune.weights import Weights
from common.records import checkpoint
from common.training.models import build_model

START = Weights("none", "", None, None, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
TISSUE = (190, 130, 180)


def save(path: Path, model_name: str, network: torch.nn.Module, **keys: Any) -> None:
    config = {"model_name": model_name, "size": 28, **keys}
    checkpoint.save(path, {"state_dict": network.state_dict(), "config": config})


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two untrained networks: `plain`, and `tuned`, which takes 40 pixels and other colours."""
    folder = tmp_path_factory.mktemp("output")
    torch.manual_seed(0)
    save(folder / "checkpoints/plain/best.pt", MODEL, build_model(MODEL, 9, 28), resize_to=None)
    tuned = build_fine_tuned("resnet18", START, 40, "all")
    save(folder / "checkpoints/tuned/best.pt", "resnet18", tuned, input_size=40)
    write_json(folder / "runs/plain/summary.json", {})  # it has finished
    return folder


def run(output: Path, *arguments: str | Path) -> None:
    run_script(predict.main, predict.PredictConfig, [*map(str, arguments), f"--output_dir={output}"])


def test_a_loaded_network_gives_the_probabilities_of_the_saved_one(output: Path) -> None:
    images = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8)
    plain = load_trained(output / "checkpoints/plain/best.pt")
    assert not any(module.training for module in plain.modules())
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    assert torch.equal(plain(images), plain.network(normalise(images)).softmax(1))
    tuned = load_trained(str(output / "checkpoints/tuned/best.pt"))
    assert (tuned.size, tuned.input_size, tuned.class_names) == (28, 40, CLASS_NAMES)
    resized = torch.nn.functional.interpolate(images.float(), size=(40, 40), mode="bilinear").round() / 255
    inputs = (resized - torch.tensor(START.mean).view(3, 1, 1)) / torch.tensor(START.std).view(3, 1, 1)
    assert torch.allclose(tuned(images), tuned.network.network(inputs).softmax(1), atol=1e-5)


def test_the_untrained_network_differs_in_its_weights_alone(output: Path) -> None:
    trained = load_trained(output / "checkpoints/tuned/best.pt")
    torch.manual_seed(1)
    fresh, given = trained.untrained().state_dict(), trained.network.state_dict()
    torch.manual_seed(1)
    again = trained.untrained().state_dict()
    assert all(torch.equal(fresh[key], again[key]) for key in given)
    assert all(torch.equal(fresh[key], given[key]) for key in ("mean", "std"))
    assert not any(torch.equal(fresh[key], given[key]) for key, value in given.items() if value.dim() == 4)


def test_a_folder_gives_a_table_of_its_pictures_and_one_bad_picture_is_a_row(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiles, _ = phantom.generate("test", 9, 28)
    images = tmp_path / "images"
    for folder in ("inner", ".ipynb_checkpoints", "folder.png"):
        (images / folder).mkdir(parents=True)
    names = ("a.png", "b.TIF", "c.gif", "d.bmp", "inner/e.webp")
    for name, tile in zip((*names, "._a.png", ".ipynb_checkpoints/a.png"), tiles, strict=False):
        Image.fromarray(tile).save(images / name)
    (images / "notes.txt").write_text("no picture")
    (images / "torn.png").write_bytes((images / "a.png").read_bytes()[:200])
    (images / "page\n.png").write_text("<html>")
    Image.fromarray(tiles[0]).save(images / os.fsdecode(b"x\xff.png"))
    run(output, "plain", images)
    printed = capsys.readouterr()
    lines = list(csv.DictReader(io.StringIO(printed.out)))
    found = [line["file"].removeprefix(f"{images}/") for line in lines]
    assert found == [*names, "page\n.png", "torn.png", "x?.png"]
    expected = load_trained(output / "checkpoints/plain/best.pt")
    for line, tile in zip(lines[:2], tiles, strict=False):
        row = expected(torch.from_numpy(tile)[None].permute(0, 3, 1, 2))[0]
        values = [float(line[name]) for name in CLASS_NAMES]
        assert values == pytest.approx(row.tolist(), rel=1e-5)
        assert line["class"] == CLASS_NAMES[row.argmax()]
        assert float(line["probability"]) == max(values)
    for line in lines[5:7]:
        assert line["class"] == line["probability"] == line["adipose"] == ""
        assert line["warning"].startswith("cannot be read (")
        name = line["file"].replace("\n", " ")
        assert f"warning: {name}: {line['warning']}\n" in printed.err
    run(output, output / "checkpoints/plain/best.pt", "--csv", tmp_path / "t.csv", images)
    assert (tmp_path / "t.csv").read_text() == printed.out
    assert not capsys.readouterr().out
    save(output / "other.pt", "resnet18", build_model("resnet18", 9, 28), dataset="phantom")
    run(output, output / "other.pt", images / "a.png", images / "torn.png")
    for line in csv.DictReader(io.StringIO(capsys.readouterr().out)):
        assert line["warning"].startswith("the network was trained on the phantom, not on tissue")


@pytest.mark.parametrize(
    ("size", "colour", "remark"),
    [
        ((224, 224), TISSUE, ""),
        ((28, 28), (240, 240, 240), ""),  # an empty slide
        ((2000, 2000), TISSUE, "far from PathMNIST's tiles: 2000 × 2000 pixels, a tile has 224 × 224"),
        ((20, 20), TISSUE, "20 × 20 pixels"),
        ((500, 500), TISSUE, "500 × 500 pixels"),
        ((224, 224), (150, 150, 150), "its mean colour"),
        ((400, 300), TISSUE, "400 × 300 pixels"),
        ((224, 224), (60, 140, 60), "far from PathMNIST's tiles: its mean colour is not that of tissue"),
        ((224, 224), (20, 5, 20), "its mean colour"),
        ((224, 224), (150, 100, 40), "its mean colour"),  # brown
    ],
)
def test_a_picture_that_is_far_from_a_tile_is_recognised(
    size: tuple[int, int], colour: Any, remark: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3_000_000)  # Pillow warns of the largest one
    Image.new("RGB", size, colour).save(tmp_path / "p.png")
    tile, said = predict.read_picture(tmp_path / "p.png", 28)
    assert tile.shape == (3, 28, 28)
    assert (remark in said) if remark else not said


def test_colours_come_out_right_whatever_the_kind_of_picture(tmp_path: Path) -> None:
    halves = np.zeros((40, 80, 3), np.uint8)
    halves[:, 20:60] = TISSUE  # the central square
    for name, mode in (("p.png", "RGB"), ("p.jpg", "RGB"), ("p.tiff", "CMYK"), ("alpha.png", "RGBA")):
        Image.fromarray(halves).convert(mode).save(tmp_path / name)
        tile = predict.read_picture(tmp_path / name, 28)[0].float()
        assert tile.mean((1, 2)).tolist() == pytest.approx(TISSUE, abs=3)
    clear = Image.new("RGBA", (28, 28), (0, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert predict.read_picture(tmp_path / "clear.png", 28)[0].unique().tolist() == [255]


def test_a_camera_s_rotation_is_applied_and_of_several_frames_the_first_is_taken(tmp_path: Path) -> None:
    upright = Image.new("RGB", (28, 28), TISSUE)
    upright.paste((255, 255, 255), (0, 0, 28, 7))  # the upper quarter is white
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to see it upright
    upright.rotate(90).save(tmp_path / "turned.png", exif=exif)
    tile, _ = predict.read_picture(tmp_path / "turned.png", 28)
    assert tile[:, :7].float().mean() == 255
    green = Image.new("RGB", (28, 28), (60, 140, 60))
    Image.new("RGB", (28, 28), TISSUE).save(tmp_path / "two.tif", save_all=True, append_images=[green])
    tile, said = predict.read_picture(tmp_path / "two.tif", 28)
    assert tile[:, 0, 0].tolist() == list(TISSUE)
    assert said == "only the first of its 2 frames is used"


@pytest.mark.parametrize("kind", ["grey.png", "grey.tif", "float.tif", "colour.tif"])
def test_more_than_8_bits_per_channel_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / kind
    if kind == "colour.tif":
        tifffile.imwrite(path, np.zeros((3, 28, 28), np.uint16), photometric="rgb", planarconfig="separate")
    else:
        Image.fromarray(np.zeros((28, 28), np.float32 if kind == "float.tif" else np.uint16)).save(path)
    with pytest.raises(Fault, match="more than 8 bits per channel: save it as an 8-bit RGB picture"):
        predict.read_picture(path, 28)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["plain"], 2, "needs a network and pictures"),
        (["gone", "{}/a.png"], 1, r"checkpoints/gone/best\.pt: no checkpoint of a finished run; train first"),
        (["plain", "{}/gone.png"], 2, r"gone\.png: no picture or folder of pictures"),
        (["gone.pt", "{}/a.png"], 2, r"gone\.pt: no such file"),
        (["plain", "{}/empty"], 2, "empty: no picture or folder of pictures"),
        (["plain", "{}/page.png"], 1, "none of the pictures can be read"),
        (["{}/other.pt", "{}/a.png"], 1, r"other\.pt: not a best\.pt of this project \('config'"),
        (["{}/config.pt", "{}/a.png"], 1, r"config\.pt: not a best\.pt of this project \(string ind"),
        (["{}/state.pt", "{}/a.png"], 1, r"state\.pt: not a best\.pt of this project"),
        (["plain", "{}/a.png", "--csv={}/b.png"], 2, r"--csv .*b\.png: the name must end in \.csv"),
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
    Image.new("RGB", (28, 28), TISSUE).save(tmp_path / "a.png")
    (tmp_path / "page.png").write_text("<html>")
    checkpoint.save(tmp_path / "other.pt", {"weight": torch.zeros(1)})
    network: dict[str, Any] = {"state_dict": [], "config": "lr=1"}
    checkpoint.save(tmp_path / "config.pt", network)
    checkpoint.save(tmp_path / "state.pt", {**network, "config": {"model_name": "resnet18", "size": 28}})
    with pytest.raises(SystemExit) as ended:
        run(output, *(argument.replace("{}", str(tmp_path)) for argument in arguments))
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == status
    assert len([line for line in said if not line.startswith("warning: ")]) == 1
    assert re.search(message, said[-1]), said

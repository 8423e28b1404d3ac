"""Label pictures with a trained network: a table of classes and probabilities, a contact sheet, an ONNX file.

    python -m common.finetune.predict RUN_ID PICTURES…                     # the best weights; a CSV on stdout
    python -m common.finetune.predict best.pt FOLDER --csv classes.csv     # every PNG, JPEG and TIFF in the folder
    python -m common.finetune.predict RUN_ID PICTURES… --figure sheet.png  # with saliency maps
    python -m common.finetune.predict RUN_ID --onnx net.onnx               # uint8 (N, 3, S, S) → probabilities

A picture is cropped to its central square and resized to the size of the tiles that the network was trained on. If
its size or colour is far from that of PathMNIST's tiles, a warning says so, on stderr and in the table: do not
trust its class.
"""

import copy
import csv
import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import field_validator
from torch import nn

from common.cli import Fault, Keys, UsageError, expanded, first_line, key, run_script
from common.config import device_key
from common.data.pathmnist import TITLE, has_stained_colours
from common.files import atomic_path, write_csv
from common.finetune.trained import Trained, load_trained
from common.records import read
from common.records.read import checkpoint_folder
from common.training.convolutions import SmallMapConv2d
from common.training.device import Compute
from common.training.evaluation import EVALUATION_BATCH

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
LARGEST_SIDE = 448  # pixels; an original tile has 224
ON_A_SHEET = 48  # pictures


class PredictConfig(Keys):
    """The network, the pictures, and what to write."""

    network: str | None = key(None, "id of a run, or its best.pt", positional=True)
    pictures: tuple[Path, ...] = key((), "pictures, and folders of pictures", positional=True)
    csv: Path | None = key(None, "the table's file (default: stdout)")
    figure: Path | None = key(
        None,
        f"PNG file with the first {ON_A_SHEET} pictures, their classes and saliency maps",
    )
    onnx: Path | None = key(
        None, "file for the network in the ONNX format; needs the packages of the extra `export`"
    )
    output_dir: Path = key(Path(), "folder that has the run's checkpoints/")
    device: str = device_key()

    @field_validator("figure")
    @classmethod
    def _is_png(cls, figure: Path | None) -> Path | None:
        if figure and figure.suffix.lower() != ".png":
            raise ValueError("the name must end in .png")
        return figure


def main(config: PredictConfig) -> None:
    """Network → ONNX file; network and pictures → table and contact sheet."""
    if config.network is None or not (config.pictures or config.onnx):
        raise UsageError(
            "needs a network and pictures: python -m common.finetune.predict RUN_ID_OR_BEST.PT PICTURE_OR_FOLDER…"
        )
    device = Compute.of(config.device, "fp32").device
    trained = load_trained(best_weights(config.network, config.output_dir), device)
    if config.onnx:
        export_onnx(trained, config.onnx)
    paths = [path for name in config.pictures for path in picture_files(name)]
    if not paths:
        return
    tiles, warnings = zip(*(read_picture(path, trained.size) for path in paths), strict=True)
    for path, warning in zip(paths, warnings, strict=True):
        if warning:
            print(f"warning: {path} is far from the tiles of {TITLE}: {warning}", file=sys.stderr)
    images = torch.stack(tiles)
    probabilities = torch.cat([trained(part.to(device)) for part in torch.split(images, EVALUATION_BATCH)]).cpu()
    best = probabilities.argmax(1)
    names = trained.class_names
    lines = [
        {
            "file": str(path),
            "class": names[label],
            "probability": row[label],
            "warning": warning,
            **dict(zip(names, row, strict=True)),
        }
        for path, label, warning, row in zip(paths, best.tolist(), warnings, probabilities.tolist(), strict=True)
    ]
    if config.csv:
        write_csv(config.csv, lines)
    else:
        writer = csv.DictWriter(sys.stdout, lines[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    if config.figure:
        from common.explain.figures import contact_sheet
        from common.explain.maps import METHODS  # Captum and matplotlib take seconds to import

        shown = slice(0, ON_A_SHEET)
        inputs = trained.inputs(images[shown].to(device))
        maps = METHODS["saliency"].maps(trained.network, inputs, best[shown].to(device), seed=0).cpu().numpy()
        words = [
            f"{Path(line['file']).name}\n{line['class']} ({line['probability']:.2f})" for line in lines[shown]
        ]
        shown_tiles = images[shown].permute(0, 2, 3, 1).numpy()
        title = f"{trained.model_name}, {config.network}: class (probability) and saliency map"
        contact_sheet(config.figure, shown_tiles, maps, words, title=title)


def best_weights(network: str, output_dir: Path) -> Path:
    """The best.pt that the name of a file or the id of a run means; UsageError where there is none."""
    path = checkpoint_folder(output_dir, network) / "best.pt"
    if expanded(network).is_file():
        return expanded(network)
    if path.is_file():
        return read.best_weights(output_dir, network)
    raise UsageError(
        f"{network}: neither a file nor a run with weights, {path}; python -m study.runs lists the runs"
    )


def picture_files(path: Path) -> list[Path]:
    """The picture itself, or all pictures in a folder and its subfolders; UsageError where there is none."""
    path = path.expanduser()
    found = (
        sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
    )
    if not found or not path.exists():
        raise UsageError(f"{path}: no pictures here" if path.exists() else f"{path}: no such file or folder")
    return found


def read_picture(path: Path, size: int) -> tuple[torch.Tensor, str]:
    """A picture as a tile (3, size, size) uint8, and how it differs from PathMNIST's tiles; "" if it does not.

    Raises Fault where the file cannot be read as a picture of 8 bits per channel.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith(("I", "F")):
                raise Fault(f"{path}: has more than 8 bits per channel; save it as an 8-bit RGB picture")
            sides, image = picture.size, picture.convert("RGB")
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise Fault(f"{path}: not a readable picture ({first_line(error)})") from error
    tile = np.array(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))
    far = []
    if min(sides) < size or max(sides) > LARGEST_SIDE or max(sides) > 1.2 * min(sides):
        far.append(f"{sides[0]} × {sides[1]} pixels, a tile has 224 × 224 at 0.5 µm per pixel")
    if not has_stained_colours(*tile.mean((0, 1)).tolist()):
        far.append("its mean colour is not that of tissue stained with haematoxylin and eosin")
    return torch.from_numpy(tile).permute(2, 0, 1), "; ".join(far)


def export_onnx(trained: Trained, path: Path) -> None:
    """Write the network as ONNX: `tiles` uint8 (N, 3, size, size) in, `probabilities` float32 (N, C) out.

    Raises UsageError where the packages for it are missing.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"--onnx: needs {' and '.join(missing)}; python -m pip install {' '.join(missing)}")
    network = copy.deepcopy(trained).cpu()
    for module in network.modules():
        if isinstance(module, SmallMapConv2d):
            module.__class__ = nn.Conv2d  # type: ignore[assignment]  # ours would fix the number of tiles
    tiles = torch.zeros(2, 3, trained.size, trained.size, dtype=torch.uint8)
    with atomic_path(path) as temporary:
        torch.onnx.export(
            network,
            (tiles,),
            temporary,
            input_names=["tiles"],
            output_names=["probabilities"],
            dynamic_shapes=[{0: torch.export.Dim("n")}],
            external_data=False,
            verbose=False,
        )


if __name__ == "__main__":
    run_script(main, PredictConfig)

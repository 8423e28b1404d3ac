"""Label pictures with a trained network: a table of classes and probabilities.

    python -m common.finetune.predict RUN_ID PICTURES…                  # a run's best weights; a table on stdout
    python -m common.finetune.predict RUN_ID FOLDER --csv classes.csv   # every picture in the folder, into a file

Pictures are PNG, JPEG, TIFF, GIF, BMP or WEBP files of 8 bits per channel. Each is cropped to its central square
and resized to the side of the tiles that the network was trained on. A warning, on stderr and in the table, says
which pictures cannot be read, and which have a size or a colour far from that of PathMNIST's tiles: do not trust
their class.
"""

import csv
import io
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from common.cli import Fault, Keys, UsageError, first_line, key, one_line, run_script
from common.config import DEVICES
from common.data.pathmnist import CLASS_NAMES, TITLE, has_stained_colours
from common.files import write_text
from common.finetune.trained import load_trained
from common.records.read import best_weights
from common.training.device import Compute

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".gif", ".bmp", ".webp")  # of the pictures in a folder
FORMATS = ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP")  # Pillow's names for them
LARGEST_SIDE = 448  # pixels; an original tile has 224


class PredictConfig(Keys):
    """The network, the pictures, and where the table goes."""

    network: str | None = key(None, "id of a run, or its best.pt", positional=True)
    pictures: tuple[Path, ...] = key((), "pictures, and folders of pictures", positional=True)
    csv: Path | None = key(None, "the table's file (default: stdout)")
    output_dir: Path = key(Path("my"), "folder that has the run's checkpoints/ and runs/")
    device: str = key("auto", "computing device; auto is CUDA if there is one", choices=DEVICES)


def main(config: PredictConfig) -> None:
    """Network and pictures → tiles → probabilities → table."""
    if config.network is None or not config.pictures:
        raise UsageError("needs a network and pictures; --help shows how")
    if config.csv and config.csv.suffix.lower() != ".csv":  # else a slip would replace a picture
        raise UsageError(f"--csv {config.csv}: the name must end in .csv")
    device = Compute.of(config.device, "fp32").prepare_process().device
    file = Path(config.network).expanduser()
    if file.suffix == ".pt" and not file.exists():
        raise UsageError(f"{file}: no such file")
    paths = [path for name in config.pictures for path in picture_files(name)]
    trained = load_trained(file if file.is_file() else best_weights(config.output_dir, config.network), device)
    origin = ["the network was trained on the phantom, not on tissue"] if trained.synthetic else []

    rows = []
    for path in paths:
        shown = str(path).encode(errors="replace").decode()  # a name may have bytes that are no text
        best, row = "", [""] * len(CLASS_NAMES)  # of a picture that cannot be read
        try:
            tile, remark = read_picture(path, trained.size)
            row = trained(tile[None].to(device))[0].tolist()
            best = CLASS_NAMES[row.index(max(row))]
        except Fault as fault:
            remark = str(fault)
        remark = "; ".join([*origin, remark] if remark else origin)
        if remark:
            print(one_line(f"warning: {shown}: {remark}"), file=sys.stderr)
        rows.append([shown, best, max(row), remark, *row])
    if not any(best for _, best, *_ in rows):
        raise Fault("none of the pictures can be read")
    table, head = io.StringIO(), ["file", "class", "probability", "warning", *CLASS_NAMES]
    csv.writer(table, lineterminator="\n").writerows([head, *rows])
    if config.csv:
        write_text(config.csv, table.getvalue())
    else:
        print(table.getvalue(), end="")


def picture_files(path: Path) -> list[Path]:
    """The picture itself, or all pictures in a folder and its subfolders; UsageError where there is none.

    In a folder, hidden files and folders are left out, such as `._tile.png` of a Mac and `.ipynb_checkpoints`.
    """
    if path.is_file():
        return [path]
    found = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES and file.is_file()]
    shown = [file for file in found if not any(name.startswith(".") for name in file.relative_to(path).parts)]
    if not shown:
        raise UsageError(f"{path}: no picture or folder of pictures ({', '.join(SUFFIXES)})")
    return shown


def read_picture(path: Path, size: int) -> tuple[torch.Tensor, str]:
    """A picture as a tile (3, size, size) uint8, and a remark on what is not as in PathMNIST's tiles, or "".

    The camera's rotation (EXIF) is applied, transparent parts become white as an empty slide, and of several
    frames or pages the first one is taken. Raises Fault where the file is no picture of 8 bits per channel.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as picture:
            bits = max(getattr(picture, "tag_v2", {}).get(258, (8,)))  # of a TIFF; Pillow misreads some of 16
            if bits > 8 or picture.mode.startswith(("I", "F")):
                raise ValueError("more than 8 bits per channel: save it as an 8-bit RGB picture")
            n_frames = getattr(picture, "n_frames", 1)
            layer = ImageOps.exif_transpose(picture).convert("RGBA")
    except Exception as error:  # a damaged file makes Pillow raise many types
        raise Fault(f"cannot be read ({first_line(error)})") from error
    image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    tile = np.array(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))
    remarks = [f"only the first of its {n_frames} frames is used"] if n_frames > 1 else []
    far, sides = f"far from {TITLE}'s tiles:", f"{image.width} × {image.height} pixels"
    if min(image.size) < size or max(image.size) > LARGEST_SIDE or max(image.size) > 1.2 * min(image.size):
        remarks.append(f"{far} {sides}, a tile has 224 × 224 at 0.5 µm per pixel")
    if not has_stained_colours(*tile.mean((0, 1)).tolist()):
        remarks.append(f"{far} its mean colour is not that of tissue stained with haematoxylin and eosin")
    return torch.from_numpy(tile).permute(2, 0, 1), "; ".join(remarks)


if __name__ == "__main__":
    run_script(main, PredictConfig)

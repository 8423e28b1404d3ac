"""The two data sets: each is found or built as a folder of memory-mapped arrays.

A folder NAME.arrays in the data root holds six .npy files. NAME has 8 digits of the official file's MD5, or the
phantom's version, side and number of tiles. The first start builds the folder; later starts only map it.
"""

import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock

from common.cli import Fault, UsageError, first_line, is_out_of_memory
from common.data import pathmnist, phantom

SPLITS = tuple(pathmnist.COUNTS)
ORDER_VERSION = 1  # of stratified_part: a change of any chosen tile needs a new number


@dataclass(frozen=True)
class Split:
    """Tiles and labels of one split.

    `images` is (N, 3, H, W) uint8, a view of the file's (N, H, W, 3) and so in channels_last order; `labels`
    is (N,) int64.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A data set at one resolution; `fingerprint` identifies its bytes, `size` is the tiles' side in pixels."""

    name: str
    size: int
    train: Split
    val: Split
    test: Split
    fingerprint: str

    @property
    def title(self) -> str:
        """The name, number of training tiles and tile size: `phantom (9,000 training tiles, 28 px)`."""
        title, whole = ("phantom", 0) if self.name == "phantom" else (pathmnist.TITLE, pathmnist.COUNTS["train"])
        part = f" of {whole:,}" if len(self.train) < whole else ""
        return f"{title} ({len(self.train):,}{part} training tiles, {self.size} px)"

    def title_at(self, input_size: int) -> str:
        """The title with the inputs' side: `phantom (9,000 training tiles, 28 px tiles, 64 px inputs)`."""
        return f"{self.title.removesuffix(')')} tiles, {input_size} px inputs)"


def resize(images: torch.Tensor, side: int) -> torch.Tensor:
    """Tiles (N, 3, H, W) uint8 with `side` pixels a side: bilinear, rounded to whole grey levels.

    The memory order (channels_last or contiguous) stays. Equals torchvision's antialiased `resize` of float tiles.
    """
    if images.shape[2] == side:
        return images
    resized = F.interpolate(images.float(), size=(side, side), mode="bilinear", antialias=side < images.shape[2])
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def load_dataset(name: str, size: int, data_root: Path, train_tiles: int | None = None) -> Dataset:
    """Map the arrays of a data set. Where there are none, build them first.

    PathMNIST is downloaded if its file is missing; `stratified_part` takes `train_tiles` of its training tiles
    (None: all). The phantom is generated with `train_tiles` training tiles. Raises UsageError for more tiles
    than there are, Fault where the arrays cannot be read or built.
    """
    if name == "phantom":
        n_tiles = train_tiles or pathmnist.PHANTOM_TRAIN_TILES
        fingerprint = f"phantom-v{phantom.VERSION}-{n_tiles}x{size}px"
        folder = data_root / f"phantom-v{phantom.VERSION}_{size}_{n_tiles}.arrays"
        splits = _arrays(folder, partial(_draw_phantom, n_tiles, size))
    else:
        (file, url, md5), whole = pathmnist.official_file(size), pathmnist.COUNTS["train"]
        fingerprint, folder = md5, data_root / f"{Path(file).stem}-{md5[:8]}.arrays"
        if train_tiles and train_tiles > whole:
            raise UsageError(f"--train_tiles {train_tiles}: {pathmnist.TITLE} has {whole}")
        splits = _arrays(folder, partial(_unpack, file, url, md5, data_root))
        if train_tiles is not None and train_tiles < whole:
            images, labels = splits["train"].images, splits["train"].labels
            chosen = torch.from_numpy(stratified_part(labels.numpy(), train_tiles))
            images = images.permute(0, 2, 3, 1).index_select(0, chosen).permute(0, 3, 1, 2)  # same memory layout
            splits["train"] = Split(images, labels[chosen])
            fingerprint += f"-{train_tiles}-of-{whole}-order{ORDER_VERSION}"
    return Dataset(name, size, **splits, fingerprint=fingerprint)


def stratified_part(labels: np.ndarray, n_tiles: int) -> np.ndarray:
    """Sorted indices of `n_tiles` tiles; each class keeps about the share that it has in `labels` (N,).

    All tiles have one fixed order, and a part is its beginning: the same labels and number always give the same
    part, and each part contains every smaller one. In this order, tile j of the n tiles of its class has the place
    (j + 0.5) / n; within a class the order is random.
    """
    places = np.empty(len(labels))
    for label in np.unique(labels):
        tiles = np.flatnonzero(labels == label)
        # Later versions of numpy may shuffle differently, but the raw output of PCG64 never changes.
        shuffled = tiles[np.random.PCG64([ORDER_VERSION, label]).random_raw(len(tiles)).argsort()]
        places[shuffled] = (np.arange(len(tiles)) + 0.5) / len(tiles)
    return np.sort(np.lexsort((labels, places))[:n_tiles])


def _arrays(folder: Path, build: Callable[[Path], None]) -> dict[str, Split]:
    """The splits in `folder`. If it is missing, one process builds it, and others wait."""
    temporary = folder.with_name(f".{folder.name}.part")
    try:
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            print(f"building {folder}, or waiting for another program that does", flush=True)
            with FileLock(folder.with_name(f".{folder.name}.lock")):
                if not folder.exists():
                    shutil.rmtree(temporary, ignore_errors=True)  # what an earlier process may have left
                    temporary.mkdir()
                    build(temporary)
                    temporary.rename(folder)
        splits = {}
        for split in SPLITS:
            # Read-only: of a writable file, even one that is copied on write, the system reserves the whole size.
            images = np.load(folder / f"{split}_images.npy", mmap_mode="r", allow_pickle=False)
            labels = np.load(folder / f"{split}_labels.npy", allow_pickle=False)
            labels = torch.from_numpy(labels.reshape(-1).astype(np.int64))
            if labels.max() >= len(pathmnist.CLASS_NAMES):
                raise UsageError(f"{folder}: label {labels.max()} has no name in common/data/pathmnist.py")
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # nothing is written here
                splits[split] = Split(torch.from_numpy(images).permute(0, 3, 1, 2), labels)
        return splits
    except (OSError, EOFError, ValueError) as error:
        shutil.rmtree(temporary, ignore_errors=True)  # the disk may be full
        if is_out_of_memory(error):
            raise
        raise Fault(
            f"{folder}: cannot be read or built ({first_line(error)}); if this folder exists, delete it and "
            "start again; if not, choose another one with --data_root"
        ) from error


def _unpack(name: str, url: str, md5: str, data_root: Path, folder: Path) -> None:
    """Unpack the official file: images (N, H, W, 3) and labels (N, 1), uint8.

    It is downloaded where it is missing or damaged; Fault where that fails.
    """
    import pooch

    path = data_root / name
    print(f"unpacking {path}; if it is missing or damaged, {url} is downloaded first", flush=True)
    pooch.get_logger().setLevel("ERROR")  # it says the same on stderr
    # In its largest file a progress bar and a flush for every KiB, the default, would cost minutes.
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=1 << 20, timeout=20)
    try:
        pooch.retrieve(url, f"md5:{md5}", name, data_root, downloader=downloader)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; another MD5 is a ValueError
        raise Fault(
            f"{path}: missing or damaged, and its download failed ({first_line(error)}): try again, or fetch "
            f"{url} (MD5 {md5}) by hand into --data_root {data_root}, or use --dataset phantom"
        ) from error
    shutil.unpack_archive(path, folder, "zip")  # block by block: it is larger than memory at 224 pixels


def _draw_phantom(n_tiles: int, size: int, folder: Path) -> None:
    for split, count in {"train": n_tiles, "val": n_tiles // 9, "test": n_tiles // 5}.items():
        images, labels = phantom.generate(split, count, size)
        np.save(folder / f"{split}_images.npy", images)
        np.save(folder / f"{split}_labels.npy", labels)

"""The two data sets: each is found or built as a folder of memory-mapped arrays.

The folder `<name>.arrays` in the data root holds six .npy files and a meta.json. The first start builds it, from
the official file or by drawing the phantom; later starts only check and map it.
"""

import json
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock

from common.cli import Fault, UsageError, first_line
from common.data import pathmnist, phantom
from common.data.pathmnist import OfficialFile
from common.files import digest, write_json

SPLITS = tuple(pathmnist.COUNTS)
CACHE_VERSION = 2  # of the folder's layout
ORDER_VERSION = 1  # of stratified_part: a change of any chosen tile needs a new number
RETRIES = 3  # of a failed download
PATIENCE = 20  # seconds to wait for an answer of the server

Build = Callable[[Path], None]  # writes the arrays into a folder


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
    class_names: tuple[str, ...]
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


@dataclass(frozen=True)
class Layout:
    """What a folder of arrays must hold: its fingerprint, the tiles' side in pixels, and how many per split."""

    fingerprint: str
    size: int
    counts: Mapping[str, int]

    def images(self, split: str) -> tuple[int, ...]:
        """The shape (N, H, W, 3) of a split's images."""
        return self.counts[split], self.size, self.size, 3


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
    (None: all). The phantom is generated with `train_tiles` training tiles. Raises Fault where a file is missing,
    damaged or cannot be written, and UsageError for too few tiles or a data root that is no folder.
    """
    if data_root.exists() and not data_root.is_dir():
        raise UsageError(f"--data_root {data_root}: not a folder")
    if name == "phantom":
        n_tiles = train_tiles or pathmnist.PHANTOM_TRAIN_TILES
        layout = Layout(f"phantom-v{phantom.VERSION}-{n_tiles}x{size}px", size, phantom.split_sizes(n_tiles))
        folder = data_root / f"phantom-v{phantom.VERSION}_{size}_{n_tiles}.arrays"
        splits = _arrays(folder, layout, partial(_draw_phantom, layout))
        return Dataset(name, size, pathmnist.CLASS_NAMES, **splits, fingerprint=layout.fingerprint)
    file, whole = pathmnist.official_file(size), pathmnist.COUNTS["train"]
    folder = data_root / f"{Path(file.name).stem}.arrays"
    splits = _arrays(folder, Layout(file.md5, size, pathmnist.COUNTS), partial(_unpack, file, data_root))
    fingerprint = file.md5
    if train_tiles is not None and train_tiles < whole:
        splits["train"] = _part(splits["train"], train_tiles)
        fingerprint += f"-{train_tiles}-of-{whole}-order{ORDER_VERSION}"
    return Dataset(name, size, pathmnist.CLASS_NAMES, **splits, fingerprint=fingerprint)


def stratified_part(labels: np.ndarray, n_tiles: int) -> np.ndarray:
    """Sorted indices of `n_tiles` tiles; each class keeps about the share that it has in `labels` (N,).

    All tiles have one fixed order, and a part is its beginning: the same labels and number always give the same
    part, and each part contains every smaller one. In this order, tile j of the n tiles of its class has the place
    (j + 0.5) / n; within a class the order is random. Raises UsageError where a class would have no tile.
    """
    places = np.empty(len(labels))
    for label in np.unique(labels):
        tiles = np.flatnonzero(labels == label)
        # Later versions of numpy may shuffle differently, but the raw output of PCG64 never changes.
        shuffled = tiles[np.random.PCG64([ORDER_VERSION, label]).random_raw(len(tiles)).argsort()]
        places[shuffled] = (np.arange(len(tiles)) + 0.5) / len(tiles)
    order = np.lexsort((labels, places))
    least = np.unique(labels[order], return_index=True)[1].max() + 1  # the first part that has every class
    if n_tiles < least:
        raise UsageError(f"--train_tiles {n_tiles}: must be at least {least}, so that every class has a tile")
    return np.sort(order[:n_tiles])


def _part(split: Split, n_tiles: int) -> Split:
    """A copy of a part of the split, with the same memory layout as the whole split."""
    chosen = torch.from_numpy(stratified_part(split.labels.numpy(), n_tiles))
    images = split.images.permute(0, 2, 3, 1).index_select(0, chosen)
    return Split(images.permute(0, 3, 1, 2), split.labels[chosen])


def _arrays(folder: Path, layout: Layout, build: Build) -> dict[str, Split]:
    """The splits in `folder`. Where they are not there, one process builds them, and others wait for it."""
    try:
        if splits := _map_splits(folder, layout):
            return splits
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            return _map_splits(folder, layout) or _build_splits(folder, layout, build)
    except OSError as error:
        raise Fault(
            f"{folder}: cannot be read or built ({error.strerror or first_line(error)}); "
            "fix this, or name a folder with room that you may write by --data_root"
        ) from error


def _map_splits(folder: Path, layout: Layout) -> dict[str, Split] | None:
    """The splits in a folder of arrays; None where they are missing, damaged, or of other data."""
    try:
        if json.loads((folder / "meta.json").read_text()) != _meta(folder, layout):
            return None
    except (FileNotFoundError, ValueError):
        return None
    return {split: _map_split(folder, split, layout) for split in SPLITS}


def _map_split(folder: Path, split: str, layout: Layout) -> Split:
    """Map a split's images and read its labels. Raises ValueError for wrong shapes, dtypes or labels."""
    # 'c' (copy on write): torch warns of read-only arrays. Nothing is ever written here.
    images = np.load(folder / f"{split}_images.npy", mmap_mode="c", allow_pickle=False)
    labels = np.load(folder / f"{split}_labels.npy", allow_pickle=False)
    for array, shape, dtype in ((images, layout.images(split), np.uint8), (labels, images.shape[:1], np.int64)):
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{split}: an array is {array.shape} {array.dtype}, not {shape} {np.dtype(dtype)}")
    if labels.min() < 0 or labels.max() >= len(pathmnist.CLASS_NAMES):
        raise ValueError(f"labels of {split} from {labels.min()} to {labels.max()}")
    return Split(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels))


def _build_splits(folder: Path, layout: Layout, build: Build) -> dict[str, Split]:
    """Build the arrays in a temporary folder, and rename it to `folder`. The caller holds the lock."""
    if folder.exists():
        print(f"{folder} is damaged or of other data; building it again", file=sys.stderr)
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # a killed process may have left it
    temporary.mkdir()
    try:
        build(temporary)
        splits = {split: _map_split(temporary, split, layout) for split in SPLITS}
        write_json(temporary / "meta.json", _meta(temporary, layout))
        if folder.exists():  # until here: they are the only ones if these cannot be built
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return splits


def _meta(folder: Path, layout: Layout) -> dict[str, Any]:
    """What meta.json says of the arrays in a folder. Raises FileNotFoundError where one is missing."""
    names = [f"{split}_{kind}.npy" for split in SPLITS for kind in ("images", "labels")]
    checksums = {name: _checksum(folder / name) for name in names}
    return {"version": CACHE_VERSION, "fingerprint": layout.fingerprint, "checksums": checksums}


def _checksum(path: Path) -> int:
    """CRC-32 of the sums over the 64-bit words of each MiB, as fast as memory.

    It changes if blocks are missing, zeroed, changed or misplaced, but not if two words within a MiB are swapped.
    """
    data = np.memmap(path, np.uint8, "r")  # ValueError for an empty file
    words = data[: len(data) // 8 * 8].view(np.uint64)
    sums = np.add.reduceat(words, np.arange(0, len(words), 1 << 17))
    return zlib.crc32(data[len(words) * 8 :].tobytes(), zlib.crc32(sums.tobytes()))


def _unpack(file: OfficialFile, data_root: Path, folder: Path) -> None:
    """Unpack the official file: images (N, H, W, 3) uint8 as they are, labels (N, 1) uint8 as (N,) int64."""
    path = _official(file, data_root)
    print(f"unpacking {path}", flush=True)
    with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as arrays:
        for split in SPLITS:
            archive.extract(f"{split}_images.npy", folder)  # block by block: larger than memory at 224 pixels
            np.save(folder / f"{split}_labels.npy", arrays[f"{split}_labels"][:, 0].astype(np.int64))


def _official(file: OfficialFile, data_root: Path) -> Path:
    """The official file in the data root, downloaded where it is missing. Raises Fault with the remedy."""
    path = data_root / file.name
    remedy = (
        f"or fetch {file.url} (MD5 {file.md5}) by hand into {data_root}, name another folder by --data_root, "
        "or use --dataset phantom, which needs no file"
    )
    if path.exists():
        try:
            found = digest(path, "md5")
        except OSError as error:
            raise Fault(f"{path}: {error.strerror}; make it readable, {remedy}") from error
        if found != file.md5:
            raise Fault(f"{path}: its MD5 is {found}, not {file.md5}: delete it and start again, {remedy}")
        return path
    import pooch

    print(f"downloading {file.url} to {path}", flush=True)
    pooch.get_logger().setLevel("ERROR")  # it says the same on stderr
    # In its largest file a progress bar and a flush for every KiB, the default, would cost minutes.
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=1 << 20, timeout=PATIENCE)
    source = pooch.create(
        data_root, "", registry={file.name: f"md5:{file.md5}"}, urls={file.name: file.url}, retry_if_failed=RETRIES
    )
    try:
        source.fetch(file.name, downloader=downloader)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; another MD5 is a ValueError
        problem = f"no such file, and its download failed ({first_line(error)})"
        raise Fault(f"{path}: {problem}: try again, {remedy}") from error
    return path


def _draw_phantom(layout: Layout, folder: Path) -> None:
    for split, n_tiles in layout.counts.items():
        images, labels = phantom.generate(split, n_tiles, layout.size)
        np.save(folder / f"{split}_images.npy", images)
        np.save(folder / f"{split}_labels.npy", labels)

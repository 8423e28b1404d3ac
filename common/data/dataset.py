"""The two data sets: each is found or built as a folder of memory-mapped arrays.

The folder `<name>.arrays` holds six .npy files and a meta.json. It is in the data root or, where the data root is
read-only, in the user's cache folder. The first start builds it; later starts only check and map it.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.config import PHANTOM_TRAIN_TILES
from common.data import pathmnist, phantom
from common.data.archives import open_npz, read_array
from common.data.download import download
from common.data.pathmnist import OfficialFile
from common.errors import Fault, UsageError
from common.files import digest, flush, is_of_disk, locked, open_regular, read_text, write_json

SPLITS = tuple(pathmnist.COUNTS)
CACHE_VERSION = 2  # of the folder's layout
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
ORDER_VERSION = 1  # of stratified_part: a change of any chosen tile needs a new number

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
    whole = pathmnist.COUNTS["train"]
    if name == "phantom":
        n_tiles = train_tiles or PHANTOM_TRAIN_TILES
        layout = Layout(f"phantom-v{phantom.VERSION}-seed0-{n_tiles}x{size}px", size, phantom.split_sizes(n_tiles))
        build = partial(_generate_phantom, size, n_tiles)
        splits = _arrays(data_root, f"phantom-v{phantom.VERSION}_{size}_{n_tiles}", layout, build)
    else:
        file = pathmnist.official_file(size)
        layout = Layout(file.md5, size, pathmnist.COUNTS)
        build = partial(_unpack, data_root / file.name, layout)
        splits = _arrays(data_root, Path(file.name).stem, layout, build, file)
    fingerprint = layout.fingerprint
    if name != "phantom" and train_tiles is not None and train_tiles < whole:
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


def _arrays(
    data_root: Path, name: str, layout: Layout, build: Build, source: OfficialFile | None = None
) -> dict[str, Split]:
    """The splits in the folder with the arrays of this layout. Where there is none, `build` writes it."""
    beside = data_root / f"{name}.arrays"
    folders = [beside]
    try:
        user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pathmnist-study"
        root = hashlib.sha256(str(data_root.resolve()).encode()).hexdigest()[:12]
        folders.append(user_cache / f"{name}-{root}.arrays")
    except RuntimeError:  # a user without a home folder has no cache
        pass
    for folder in folders:
        if splits := _map_splits(folder, layout):
            return splits
    folder = beside if _writable(data_root) else folders[-1]
    try:
        if source is not None:  # before any folder is created: the user may have mistyped data_root
            _check_source(source, data_root / source.name)
        with locked(folder.with_name(f".{folder.name}.lock"), wait=True):
            splits = _map_splits(folder, layout)  # another process may have built it in the meantime
            if splits is None:
                _build_folder(folder, layout, build)
                splits = _map_splits(folder, layout)
    except OSError as error:  # its text names the file: one of the folder, or the source
        remedy = "make room there" if error.errno in NO_ROOM else "fix this"
        raise Fault(f"{folder}: cannot be built ({error}); {remedy}, or name another --data_root") from error
    if splits is None:
        raise Fault(f"{folder}: its files change or cannot be read back; name another --data_root")
    return splits


def _build_folder(folder: Path, layout: Layout, build: Build) -> None:
    """Build the arrays in a temporary folder, and rename it to `folder`. The caller holds a lock."""
    if folder.exists():
        print(f"{folder} is damaged or outdated; building it again", file=sys.stderr)
        shutil.rmtree(folder)
    for left in folder.parent.glob(".*.arrays.part"):  # killed processes may have left some
        with locked(left.with_suffix(".lock")) as lock:
            if lock is not None:
                shutil.rmtree(left, ignore_errors=True)
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        build(temporary)
        meta = {"version": CACHE_VERSION, "fingerprint": layout.fingerprint, "checksums": _checksums(temporary)}
        write_json(temporary / "meta.json", meta)
        temporary.rename(folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_source(source: OfficialFile, path: Path) -> None:
    """Download the official file where it is missing, and check its MD5. Raises Fault with the remedy."""
    by_hand = f"or fetch {source.url} (MD5 {source.md5}) by hand into {path.parent}, or use --dataset phantom"
    try:
        if not path.exists():
            download(source.url, path, source.md5)
    except Fault as fault:
        raise Fault(f"{fault}: try again, {by_hand}, which needs no download") from fault
    try:
        found, size = digest(path, "md5"), path.stat().st_size
        problem = f"its MD5 is {found}, not {source.md5}; it is damaged or another file ({size:,} bytes)"
    except PermissionError as error:
        raise Fault(f"{path}: {error.strerror}; make it readable, or name another --data_root") from error
    except OSError as error:
        found, problem = "", str(error.strerror)
    if found != source.md5:
        raise Fault(f"{path}: {problem}: delete it, and the same command fetches it again, {by_hand}")


def _map_splits(folder: Path, layout: Layout) -> dict[str, Split] | None:
    """The splits in a folder of arrays; None where it is missing, damaged or has another layout.

    Raises OSError where it cannot be read now: the arrays may be intact, so they are not built again.
    """
    try:
        meta = json.loads(read_text(folder / "meta.json"))
        if (meta["version"], meta["fingerprint"]) != (CACHE_VERSION, layout.fingerprint):
            return None
        if meta["checksums"] != _checksums(folder):
            return None
        return {split: _map_split(folder, split, layout) for split in SPLITS}
    except Exception as error:  # numpy raises many types for a damaged header
        if is_of_disk(error) and not isinstance(error, FileNotFoundError):
            raise
        return None


def _map_split(folder: Path, split: str, layout: Layout) -> Split:
    n_tiles = layout.counts[split]
    with open_regular(folder / f"{split}_labels.npy") as file:
        labels = read_array(file, "i", (n_tiles,))
    _check_labels(labels)
    # 'c' (copy on write): torch warns of read-only arrays. Nothing is ever written here.
    images = np.load(folder / f"{split}_images.npy", mmap_mode="c", allow_pickle=False)
    if images.shape != layout.images(split) or images.dtype != np.uint8:
        raise ValueError(f"{split}_images has another layout")
    return Split(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels.astype(np.int64)))


def _check_labels(labels: np.ndarray) -> None:
    if labels.min() < 0 or labels.max() >= len(pathmnist.CLASS_NAMES):
        raise ValueError(f"labels from {labels.min()} to {labels.max()}")


def _checksums(folder: Path) -> dict[str, int]:
    """The checksum of each array file. Raises FileNotFoundError where one is missing."""
    names = [f"{split}_{kind}.npy" for split in SPLITS for kind in ("images", "labels")]
    return {name: _checksum(folder / name) for name in names}


def _checksum(path: Path) -> int:
    """CRC-32 of the sums over the 64-bit words of each MiB, as fast as memory.

    It changes if blocks are missing, zeroed, changed or misplaced, but not if two words within a MiB are swapped.
    """
    with open_regular(path) as file:
        data = np.memmap(file, dtype=np.uint8, mode="r")
    words = data[: len(data) // 8 * 8].view(np.uint64)
    sums = np.add.reduceat(words, np.arange(0, len(words), 1 << 17))
    return zlib.crc32(data[len(words) * 8 :].tobytes(), zlib.crc32(sums.tobytes()))


def _writable(folder: Path) -> bool:
    """Whether this process can write to `folder` or, where it does not exist, create it.

    A folder without any write permission counts as read-only even for root.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK) and bool(folder.stat().st_mode & 0o222)


def _unpack(path: Path, layout: Layout, folder: Path) -> None:
    """Unpack an official file: images (N, H, W, 3) uint8 as they are, labels (N, 1) uint8 as (N,) int64.

    Raises Fault where the file has another layout or is damaged.
    """
    print(f"unpacking {path}", flush=True)
    try:
        with open_npz(path) as archive:
            for split in SPLITS:
                labels = archive.read(f"{split}_labels", "u", (layout.counts[split], 1))
                _check_labels(labels)
                np.save(folder / f"{split}_labels.npy", labels[:, 0].astype(np.int64))
                archive.extract(f"{split}_images", layout.images(split), folder / f"{split}_images.npy")
                _map_split(folder, split, layout)
    except ValueError as error:
        raise Fault(
            f"{path}: not an official file ({error}); delete it, and the same command fetches it again"
        ) from error


def _generate_phantom(size: int, train_tiles: int, folder: Path) -> None:
    for split, n_tiles in phantom.split_sizes(train_tiles).items():
        blocks = tqdm(
            phantom.generate(split, n_tiles, size), f"phantom {split}", unit=" blocks", leave=False, disable=None
        )
        labels = []
        with open(folder / f"{split}_images.npy", "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (n_tiles, size, size, 3)}
            np.lib.format.write_array_header_1_0(file, header)
            for block, block_labels in blocks:
                file.write(block.tobytes())
                labels.append(block_labels)
        np.save(folder / f"{split}_labels.npy", np.concatenate(labels))

"""The two data sets: found or generated, and unpacked once into memory-mapped arrays.

Whatever the data set, it ends as a folder `<name>.arrays` of six .npy files and a meta.json, beside its source
or, where the data root cannot be written, in the user's cache folder. Later starts map that folder.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from tqdm import tqdm

from common.config import PHANTOM_TRAIN_TILES
from common.errors import Fault, UsageError
from common.files import atomic_folder, claimed, write_json

SPLITS = ("train", "val", "test")
OFFICIAL_COUNTS = {"train": 89_996, "val": 10_004, "test": 7_180}
TITLES = {"pathmnist": "PathMNIST", "phantom": "phantom"}
CACHE_VERSION = 2
ORDER_VERSION = 1  # of stratified_part: a change of any chosen tile needs a new number
CHUNK = 16 << 20  # bytes: what a read, a checksum or a progress step handles at once
DOWNLOAD_PATIENCE = 20  # seconds without an answer
DOWNLOAD_TRIES = 4

Builder = Callable[[Path], str]


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
        """The name with what a reader must know to judge a number: `phantom (9,000 training tiles, 28 px)`."""
        tiles, whole = len(self.train), OFFICIAL_COUNTS["train"]
        part = f" of {whole:,}" if self.name == "pathmnist" and tiles < whole else ""
        return f"{TITLES[self.name]} ({tiles:,}{part} training tiles, {self.size} px)"


def load_dataset(name: str, size: int, data_root: Path, train_tiles: int | None = None) -> Dataset:
    """Map a data set's arrays, building them first where they are not there yet.

    pathmnist is downloaded if its file is missing, and `train_tiles` of its training tiles are taken (None: all),
    which `stratified_part` chooses. The phantom is generated, with `train_tiles` training tiles. Raises Fault if
    a file cannot be had or is not what it should be, and UsageError for too many or too few tiles or a data root
    that is no folder.
    """
    if data_root.exists() and not data_root.is_dir():
        raise UsageError(f"--data_root {data_root}: not a folder")
    whole = OFFICIAL_COUNTS["train"]
    source: Path | None
    if name == "phantom":
        from common import phantom

        n_tiles = train_tiles or PHANTOM_TRAIN_TILES
        source, folder_name = None, f"phantom-v{phantom.VERSION}_{size}_{n_tiles}"
        build: Builder = lambda folder: _generate_phantom(folder, size, n_tiles)  # noqa: E731
    else:
        if train_tiles is not None and train_tiles > whole:  # before a download
            raise UsageError(f"--train_tiles {train_tiles}: PathMNIST has {whole:,} training tiles")
        source = data_root / official_name(size)
        folder_name = source.stem
        build = lambda folder: _unpack_official(folder, data_root / official_name(size), size)  # noqa: E731
    folder, fingerprint = _arrays_folder(data_root, folder_name, source, build)
    splits = {split: _map_split(folder, split) for split in SPLITS}
    if name == "pathmnist" and train_tiles is not None and train_tiles < whole:
        splits["train"] = _part(splits["train"], train_tiles)
        fingerprint += f"-{train_tiles}-of-{whole}-order{ORDER_VERSION}"
    return Dataset(name=name, size=size, class_names=class_names(), fingerprint=fingerprint, **splits)


def stratified_part(labels: np.ndarray, n_tiles: int) -> np.ndarray:
    """Sorted indices of `n_tiles` tiles, of each class about the share that it has in `labels` (N,).

    There is one fixed order of all tiles, and a part is its beginning: the same labels and number give the same
    part, and each part holds every smaller one. In this order, tile j of the n of its class stands at the place
    (j + 0.5) / n; within a class the order is random. Raises UsageError where a class would have no tile.
    """
    places = np.empty(len(labels))
    for label in np.unique(labels):
        tiles = np.flatnonzero(labels == label)
        # numpy may change what shuffle or permutation draw, but never the bits that they draw from.
        shuffled = tiles[np.random.PCG64([ORDER_VERSION, label]).random_raw(len(tiles)).argsort()]
        places[shuffled] = (np.arange(len(tiles)) + 0.5) / len(tiles)
    order = np.lexsort((labels, places))
    least = np.unique(labels[order], return_index=True)[1].max() + 1  # the last class to come has come
    if n_tiles < least:
        raise UsageError(f"--train_tiles {n_tiles}: must be at least {least}, so that every class has a tile")
    return np.sort(order[:n_tiles])


def _part(split: Split, n_tiles: int) -> Split:
    """A copy of a part of the split, in the file's (N, H, W, 3) layout as the whole is."""
    chosen = torch.from_numpy(stratified_part(split.labels.numpy(), n_tiles))
    images = split.images.permute(0, 2, 3, 1).index_select(0, chosen)
    return Split(images.permute(0, 3, 1, 2), split.labels[chosen])


@cache
def _pathmnist_info() -> dict[str, Any]:
    """MedMNIST's own description of PathMNIST.

    Its info.py is loaded by itself: `import medmnist` brings pandas and scikit-image, three seconds of start.
    """
    path = importlib.metadata.distribution("medmnist").locate_file("medmnist/info.py")
    spec = importlib.util.spec_from_file_location("medmnist_info", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    info: dict[str, Any] = module.INFO["pathmnist"]
    return info


def class_names() -> tuple[str, ...]:
    """PathMNIST's nine classes in label order."""
    labels = _pathmnist_info()["label"]
    return tuple(labels[str(label)] for label in range(len(labels)))


def official_name(size: int) -> str:
    """The name of PathMNIST's official file with tiles of `size` pixels."""
    return "pathmnist.npz" if size == 28 else f"pathmnist_{size}.npz"


def _official_address(size: int) -> tuple[str, str]:
    """The official file's URL and MD5."""
    suffix = "" if size == 28 else f"_{size}"
    return _pathmnist_info()[f"url{suffix}"], _pathmnist_info()[f"MD5{suffix}"]


# ----------------------------------------------------------------------- the folder of arrays, the same for both


def _arrays_folder(data_root: Path, name: str, source: Path | None, build: Builder) -> tuple[Path, str]:
    """A whole folder of arrays and the data's fingerprint; built by `build` where there is none."""
    beside = data_root / f"{name}.arrays"
    digest = hashlib.sha256(str(data_root.resolve()).encode()).hexdigest()[:12]
    cached = _user_cache() / f"{name}-{digest}.arrays"
    for folder in (beside, cached):
        if folder.is_dir() and (fingerprint := _verified(folder, source)):
            return folder, fingerprint
    folder = beside if _writable(data_root) else cached
    try:
        with claimed(folder.with_name(f".{folder.name}.lock"), wait=True):
            fingerprint = _verified(folder, source)
            if not fingerprint:  # another process may have built it while this one waited
                _discard(folder)
                with atomic_folder(folder) as temporary:
                    fingerprint = build(temporary)
                    _write_meta(temporary, source, fingerprint)
    except OSError as error:  # its text names the file: it may be the source as well as the folder
        raise Fault(f"{folder}: cannot be built ({error}); make room there or name another --data_root") from error
    return folder, fingerprint


def _verified(folder: Path, source: Path | None) -> str:
    """The fingerprint of a folder that is whole and of this source; an empty string if it is not."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["version"] != CACHE_VERSION:
            return ""
        # Without its source a whole folder is as good as ever.
        if source is not None and source.exists() and meta["source"] != _identity(source):
            return ""
        if meta["checksums"] != _checksums(folder):
            return ""
        return str(meta["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _write_meta(folder: Path, source: Path | None, fingerprint: str) -> None:
    meta = {
        "version": CACHE_VERSION,
        "source": _identity(source) if source is not None else None,
        "fingerprint": fingerprint,
        "checksums": _checksums(folder),
    }
    write_json(folder / "meta.json", meta)


def _identity(source: Path) -> list[Any]:
    status = source.stat()
    return [source.name, status.st_size, status.st_mtime_ns]


def _checksums(folder: Path) -> dict[str, int]:
    """Each array file's checksum; raises FileNotFoundError where one is missing."""
    names = [f"{split}_{kind}.npy" for split in SPLITS for kind in ("images", "labels")]
    return {name: _checksum(folder / name) for name in names}


def _checksum(path: Path) -> int:
    """CRC-32 of the sums over 64-bit words of each MiB, header included: as fast as memory.

    It tells torn, zeroed, flipped and misplaced blocks; two words swapped within a MiB would pass.
    """
    data = np.memmap(path, dtype=np.uint8, mode="r")
    words = data[: len(data) // 8 * 8].view(np.uint64)
    sums = np.add.reduceat(words, np.arange(0, len(words), 1 << 17))
    return zlib.crc32(data[len(words) * 8 :].tobytes(), zlib.crc32(sums.tobytes()))


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    length = max(1, CHUNK // max(1, array[:1].nbytes))
    return (array[start : start + length] for start in range(0, len(array), length))


def _discard(folder: Path) -> None:
    """Remove a folder that is damaged or of another source."""
    if folder.exists():
        print(f"{folder} is damaged or outdated; building it anew", file=sys.stderr)
        shutil.rmtree(folder)


def _writable(folder: Path) -> bool:
    """Whether files may be made in `folder`, which need not exist yet.

    A folder without any write permission is left alone even where root could write to it.
    """
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK | os.X_OK) and bool(folder.stat().st_mode & 0o222)


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pathmnist-study"


def _map_split(folder: Path, split: str) -> Split:
    # 'c' (copy on write): torch warns of arrays that it may not write to, and this one is never written.
    images = np.load(folder / f"{split}_images.npy", mmap_mode="c", allow_pickle=False)
    labels = np.load(folder / f"{split}_labels.npy", allow_pickle=False)
    return Split(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels))


# ------------------------------------------------------------------------------------- where the arrays come from


def _generate_phantom(folder: Path, size: int, train_tiles: int) -> str:
    from common import phantom

    for split, n_tiles in phantom.split_sizes(train_tiles).items():
        images = _new_array(folder / f"{split}_images.npy", np.uint8, (n_tiles, size, size, 3))
        labels = _new_array(folder / f"{split}_labels.npy", np.int64, (n_tiles,))
        start = 0
        with _bar(f"phantom {split}", n_tiles, unit=" tiles") as bar:
            for block, block_labels in phantom.generate(split, n_tiles, size):
                images[start : start + len(block)] = block
                labels[start : start + len(block)] = block_labels
                start += len(block)
                bar.update(len(block))
    return f"phantom-v{phantom.VERSION}-seed0-{train_tiles}x{size}px"


def _unpack_official(folder: Path, path: Path, size: int) -> str:
    url, md5 = _official_address(size)
    if not path.exists():
        _download(url, path, md5)
    remedy = _by_hand(url, path.parent, md5)
    with _opened(path, remedy) as archive:
        _check_layout(archive, path, size, remedy)
        found = _md5(path)
        if found != md5:
            raise Fault(f"{path}: its MD5 is {found}, not {md5}. {remedy}")
        for split in SPLITS:
            _unpack_split(archive, path, split, folder, remedy)
    return md5


@contextmanager
def _opened(path: Path, remedy: str) -> Iterator[zipfile.ZipFile]:
    """The archive at `path`; whatever is wrong with its bytes becomes a Fault."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # RuntimeError: encrypted
        size = path.stat().st_size
        raise Fault(f"{path}: not a whole npz file, {size:,} bytes ({error}). {remedy}") from error


def _check_layout(archive: zipfile.ZipFile, path: Path, size: int, remedy: str) -> None:
    """Fault unless the arrays have the official names, types and shapes; reads their headers alone."""
    for split, count in OFFICIAL_COUNTS.items():
        for kind, shape in (("images", (count, size, size, 3)), ("labels", (count, 1))):
            name = f"{split}_{kind}"
            if f"{name}.npy" not in archive.namelist():
                raise Fault(f"{path}: no array {name} in it. {remedy}")
            with archive.open(f"{name}.npy") as member:
                found_shape, found_type = _header(member, path, name, remedy)
            if found_type != np.uint8 or found_shape != shape:
                raise Fault(f"{path}: {name} is {found_type} {found_shape}, should be uint8 {shape}. {remedy}")


def _header(member: IO[bytes], path: Path, name: str, remedy: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an .npy member; the stream is left at its data, of which nothing is unpickled."""
    try:
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran_order, dtype = read[np.lib.format.read_magic(member)](member)
    except (ValueError, KeyError) as error:
        raise Fault(f"{path}: {name} is not a plain array ({error}). {remedy}") from error
    if fortran_order:
        raise Fault(f"{path}: {name} is stored column by column. {remedy}")
    return shape, dtype


def _unpack_split(archive: zipfile.ZipFile, path: Path, split: str, folder: Path, remedy: str) -> None:
    """Decompress one split's images and labels, a chunk at a time: the 224-pixel file is 16 GB unpacked."""
    with archive.open(f"{split}_images.npy") as member:
        shape, dtype = _header(member, path, f"{split}_images", remedy)
        images = _new_array(folder / f"{split}_images.npy", dtype, shape)
        with _bar(f"unpack {path.name} {split}", images.nbytes) as bar:
            for chunk in _chunks(images):
                data = member.read(chunk.nbytes)
                if len(data) != chunk.nbytes:
                    raise Fault(f"{path}: {split}_images ends too early. {remedy}")
                chunk[...] = np.frombuffer(data, np.uint8).reshape(chunk.shape)
                bar.update(len(data))
    with archive.open(f"{split}_labels.npy") as member:
        _header(member, path, f"{split}_labels", remedy)
        labels = np.frombuffer(member.read(), np.uint8).astype(np.int64)
    if len(labels) != len(images) or labels.max(initial=0) >= len(class_names()):
        raise Fault(
            f"{path}: {split}_labels has {len(labels)} labels up to {labels.max(initial=0)}, "
            f"should have {len(images)} from 0 to {len(class_names()) - 1}. {remedy}"
        )
    np.save(folder / f"{split}_labels.npy", labels)


def _new_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A new .npy file, mapped for writing."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        # Claim the space now, with an error if the disk is full: a write to the mapping would kill the process.
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


# --------------------------------------------------------------------------------------------- the official file


def _by_hand(url: str, folder: Path, md5: str) -> str:
    return f"Fetch {url} (MD5 {md5}) by hand into {folder}, or use --dataset phantom, which runs offline"


def _download(url: str, path: Path, md5: str) -> None:
    """Download `url` to `path`, going on where an earlier try stopped, and check its MD5."""
    remedy = _by_hand(url, path.parent, md5)
    if not _writable(path.parent):
        raise Fault(f"{path}: no such file, and {path.parent} cannot be written. {remedy}")
    part = path.with_name(f"{path.name}.part")
    with claimed(path.with_name(f".{path.name}.lock"), wait=True):
        if path.exists():  # another process has fetched it while this one waited
            return
        for attempt in range(1, DOWNLOAD_TRIES + 1):
            try:
                _fetch(url, part)
                break
            except (OSError, HTTPException) as error:  # URLError is an OSError
                reason = getattr(error, "reason", error)
                if attempt == DOWNLOAD_TRIES:
                    raise Fault(f"{path}: no such file, and the download failed ({reason}). {remedy}") from error
                time.sleep(2**attempt / 4)
        found = _md5(part)
        if found != md5:
            part.unlink()
            raise Fault(f"{path}: what {url} gave has the MD5 {found}, not {md5}. {remedy}")
        part.replace(path)


def _fetch(url: str, part: Path) -> None:
    """Append to `part` what is missing of it; a server that cannot resume sends everything again."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=DOWNLOAD_PATIENCE)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is missing, or the part is longer than the file; the MD5 tells
            return
        raise
    with answer, open(part, "ab" if answer.status == 206 else "wb") as file:
        length = answer.headers.get("Content-Length")
        resumed = have if answer.status == 206 else 0
        total = int(length) + resumed if length else None
        with _bar(part.stem, total) as bar:
            bar.update(resumed)
            while data := answer.read(1 << 20):
                file.write(data)
                bar.update(len(data))
    if total is not None and part.stat().st_size < total:
        raise OSError("the connection ended early")


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _bar(description: str, total: int | None, unit: str = "B") -> "tqdm[Any]":
    scaled = unit == "B"
    return tqdm(total=total, desc=description, unit=unit, unit_scale=scaled, leave=False, disable=None)

"""Reads arrays from .npz archives, and checks them: a damaged, foreign or malicious file gives a ValueError."""

import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common.errors import first_line
from common.files import is_of_disk, open_regular

HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
LONGEST_HEADER = 2**16  # bytes of a .npy file before its array


class Archive:
    """An open .npz archive."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive

    @property
    def names(self) -> list[str]:
        """The names of the arrays."""
        return [name.removesuffix(".npy") for name in self._archive.namelist()]

    def read(self, name: str, kinds: str, shape: tuple[int, ...]) -> np.ndarray:
        """The array of this name, which must have this shape and one of these kinds of dtype (numpy's letters)."""
        with self._open(name, shape) as member:
            return read_array(member, kinds, shape)

    def extract(self, name: str, shape: tuple[int, ...], path: Path) -> None:
        """Write the .npy file of this name, whose array must be uint8 of this shape, to `path`."""
        with self._open(name, shape) as member, open(path, "wb") as file:
            shutil.copyfileobj(member, file)

    @contextmanager
    def _open(self, name: str, shape: tuple[int, ...]) -> Iterator[BinaryIO]:
        info = self._archive.getinfo(f"{name}.npy")
        # Python's other decompressors return all of a member at once, however large it is.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} is compressed in an unknown way")
        if info.file_size > LONGEST_HEADER + 8 * int(np.prod(shape, dtype=object)):
            raise ValueError(f"{name} is longer than an array of the shape {shape}")
        with self._archive.open(info) as member:
            yield member  # type: ignore[misc]


@contextmanager
def open_npz(path: Path) -> Iterator[Archive]:
    """Open an archive for reading. Raises OSError where there is no such file, ValueError where it is damaged.

    The checksums (CRC-32) of the arrays that are read to their end are checked.
    """
    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                yield Archive(archive)
        except Exception as error:  # zipfile, zlib and numpy's reader of headers raise many types
            if is_of_disk(error):
                raise
            raise ValueError(first_line(error)) from error


def read_array(file: BinaryIO, kinds: str, shape: tuple[int, ...]) -> np.ndarray:
    """The array of a .npy file, which must have this shape and one of these kinds of dtype.

    Nothing of it is read before its header is known to be right. Raises ValueError and, for a header that cannot
    be parsed, many other types.
    """
    found, is_fortran, dtype = HEADERS[np.lib.format.read_magic(file)](file)
    if found != shape or is_fortran or dtype.kind not in kinds:
        raise ValueError(f"an array has the shape {found} and dtype {dtype}, not the shape {shape}")
    content = file.read(dtype.itemsize * int(np.prod(shape)))
    if len(content) != dtype.itemsize * int(np.prod(shape)) or file.read(1):
        raise ValueError("an array is shorter or longer than its header says")
    return np.frombuffer(content, dtype).reshape(shape)

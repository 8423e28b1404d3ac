"""Checkpoints: written whole or not at all, checked, and read without running code from them.

A checkpoint is the zip archive that torch.save writes. It has a checksum (CRC-32) of every tensor and of all the
rest; PyTorch does not look at these checksums, `read_plain` does.
"""

import errno
import io
import os
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from common.cli import Fault
from common.files import atomic_path


def save(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Write tensors, numbers, strings and containers of them to `path`, atomically.

    The file that was there before is kept as `previous`, if that is given.
    """
    # First into memory, because torch.save itself reports a full disk as an internal error of its zip writer.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
        if previous and path.exists():
            os.replace(path, previous)


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, tensors on the CPU.

    Raises Fault where the file is missing, damaged, or holds anything but plain data, OSError where it cannot be
    read.
    """
    try:
        with open(path, "rb") as file:
            content = read_plain(file)
    except FileNotFoundError:
        raise Fault(f"{path}: no such checkpoint; train first, or name another --run_id") from None
    except ValueError as error:
        raise Fault(f"{path}: not a readable checkpoint ({error}); train again with another --run_id") from error
    if not isinstance(content, dict):
        raise Fault(f"{path}: not a checkpoint of this project; name another --run_id")
    return content


def load_newest(*paths: Path) -> tuple[Path, dict[str, Any]] | None:
    """The first of these checkpoints that can be read, and its content; None if none of the files exists.

    Prints which cannot be read. Raises Fault if some of the files exist, and none can be read.
    """
    existing = [path for path in paths if path.exists()]
    for path in existing:
        try:
            return path, load(path)
        except Fault:
            if path == existing[-1]:
                raise
            print(f"{path} cannot be read: trying {existing[-1].name}, which is older", file=sys.stderr)
    return None


def read_plain(file: BinaryIO) -> Any:
    """The content of a file that torch.save wrote, tensors on the CPU, without running code from it.

    Raises ValueError where it is damaged or holds more than plain data. Files in PyTorch's format of before 2020
    are no zip archives and have no checksums.
    """
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                # Attributes are 0, and no checksum covers them: PyTorch reads nothing of a "folder".
                if archive.testzip() or any(member.external_attr for member in archive.infolist()):
                    raise ValueError
        file.seek(0)
        with warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes zipfile and the unpickler raise many types
        # A damaged file may refer to a place before its own beginning: that error of the disk (EINVAL) is damage.
        if isinstance(error, MemoryError) or getattr(error, "errno", errno.EINVAL) != errno.EINVAL:
            raise
        # PyTorch's own message would advise to switch weights_only off.
        raise ValueError("it is damaged, or holds more than tensors, numbers and text") from error


def state_problem(given: Mapping[str, Any], expected: Mapping[str, torch.Tensor]) -> str | None:
    """The first difference in names, shapes or dtypes of tensors from `expected`, in words; None without one."""
    for name in [*expected, *given]:
        value, own = given.get(name), expected.get(name)
        if own is None:
            return f"an unknown tensor {name}"
        if not isinstance(value, torch.Tensor):
            return f"no tensor {name}"
        if value.shape != own.shape:
            return f"{name} has the shape {tuple(value.shape)}, not {tuple(own.shape)}"
        if value.dtype != own.dtype:
            return f"{name} has the dtype {value.dtype}, not {own.dtype}"
    return None


def load_weights(network: nn.Module, state_dict: Mapping[str, Any], path: Path) -> None:
    """Load weights that were read from `path`. Fault, before anything is loaded, where they do not fit."""
    if problem := state_problem(state_dict, network.state_dict()):
        raise Fault(f"{path}: {problem}; train again with another --run_id")
    network.load_state_dict(state_dict)

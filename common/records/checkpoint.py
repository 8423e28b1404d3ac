"""Checkpoints: written whole or not at all, checked, and read without running code from them.

A checkpoint is the zip archive that torch.save writes. PyTorch does not look at its checksums; `read_plain` does.
"""

import io
import textwrap
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from common.cli import Fault, is_out_of_memory
from common.files import atomic_path


def save(path: Path, content: dict[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them to `path`, atomically."""
    # First into memory, because torch.save itself reports a full disk as an internal error of its zip writer.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load(path: Path, *names: str) -> dict[str, Any]:
    """Read what `save` wrote, tensors on the CPU.

    Raises OSError, and Fault where the file is damaged, holds anything but plain data, or lacks one of `names`.
    """
    try:
        with open(path, "rb") as file:
            content = read_plain(file)
    except ValueError as error:
        raise Fault(f"{path}: not a readable checkpoint ({error}); train again with another --run_id") from error
    if not isinstance(content, dict) or set(names) - content.keys():
        raise Fault(f"{path}: not a checkpoint of this project; name another --run_id")
    return content


def read_plain(file: BinaryIO) -> Any:
    """The content of a file that torch.save wrote, tensors on the CPU, without running code from it.

    Raises ValueError where it is damaged or holds more than plain data. Files in PyTorch's format of before 2020
    are no zip archives and have no checksums.
    """
    try:
        if zipfile.is_zipfile(file) and (damaged := zipfile.ZipFile(file).testzip()):
            raise ValueError(damaged)
        file.seek(0)
        with warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes zipfile and the unpickler raise many types
        if is_out_of_memory(error):
            raise
        # PyTorch's own message would advise to switch weights_only off.
        raise ValueError("it is damaged, or holds more than tensors, numbers and text") from error


def load_state_dict(network: nn.Module, state_dict: Mapping[str, Any], path: Path) -> None:
    """Load weights that were read from `path`. Fault where they are not those of this network."""
    try:
        network.load_state_dict(state_dict)
    except RuntimeError as error:  # its second line names the first tensors that do not fit
        problem = textwrap.shorten(str(error).splitlines()[1], 200)
        raise Fault(f"{path}: {problem}; train again with another --run_id") from error

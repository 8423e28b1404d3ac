"""Checkpoints: written whole or not at all, read without running code from them."""

import io
import os
import sys
from pathlib import Path
from typing import Any

import torch

from common.errors import Fault, first_line
from common.files import atomic_path


def save(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Write tensors, numbers, strings and containers of them to `path`, atomically.

    What stood there is kept as `previous`, if that is given.
    """
    # By way of memory: torch.save itself reports a full disk as an internal error of its zip writer.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
        if previous and path.exists():
            os.replace(path, previous)


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, tensors on the CPU.

    Raises Fault where the file is missing, torn, or holds anything but plain data (`weights_only`).
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Fault(f"{path}: no such checkpoint; train first, or name another --run_id") from None
    except OSError:
        raise
    except Exception as error:  # the unpickler stumbles over a damaged file in many ways, IndexError for one
        raise Fault(
            f"{path}: not a readable checkpoint ({first_line(error)}); train anew under another --run_id"
        ) from error
    if not isinstance(content, dict):
        raise Fault(f"{path}: not a checkpoint of this project; name another --run_id")
    return content


def load_newest(*paths: Path) -> dict[str, Any] | None:
    """The first of these checkpoints that can be read, saying which cannot; None where there is none at all.

    Raises Fault where there are some, and none can be read.
    """
    faults: dict[Path, Fault] = {}
    for path in paths:
        if path.exists():
            try:
                content = load(path)
            except Fault as fault:
                faults[path] = fault
                continue
            for damaged in faults:
                print(f"{damaged} cannot be read; going on from {path.name}, an earlier one", file=sys.stderr)
            return content
    if faults:
        raise next(iter(faults.values()))
    return None

"""Checkpoints: written whole or not at all, read without running code from them."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from common.errors import Fault, first_line
from common.files import atomic_path


def save(path: Path, content: dict[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them to `path`, atomically."""
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, tensors on the CPU.

    Raises Fault where the file is missing, torn, or holds anything but plain data (`weights_only`).
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Fault(f"{path}: no such checkpoint; train first, or name another --run_id") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError) as error:
        raise Fault(
            f"{path}: not a readable checkpoint ({first_line(error)}); delete it and train again"
        ) from error
    if not isinstance(content, dict):
        raise Fault(f"{path}: not a checkpoint of this project; name another --run_id")
    return content


def copy_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's state_dict as copies on the CPU: `state_dict()` itself is an alias of the live weights."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}

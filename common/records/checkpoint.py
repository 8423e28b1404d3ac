"""Checkpoints: written whole or not at all, checked, and read without running code from them.

A checkpoint is the zip archive that torch.save writes: it has a checksum (CRC-32) of every tensor and of all the
rest. PyTorch does not look at these checksums, `read_plain` does. The files of earlier versions of the project
have them too, so that they can still be read.
"""

import io
import math
import os
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from common.errors import Fault
from common.files import atomic_path, is_of_disk, open_regular

NOT_PLAIN = "it is damaged, or holds more than tensors, numbers and text"


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
        with open_regular(path) as file:
            if not _is_zip(file):
                raise ValueError(NOT_PLAIN)
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
    faults: dict[Path, Fault] = {}
    for path in paths:
        if path.exists():
            try:
                content = load(path)
            except Fault as fault:
                faults[path] = fault
                continue
            for damaged in faults:
                print(f"{damaged} cannot be read: continuing from {path.name}, which is older", file=sys.stderr)
            return path, content
    if faults:
        raise next(iter(faults.values()))
    return None


def read_plain(file: BinaryIO) -> Any:
    """The content of a file that torch.save wrote, tensors on the CPU, without running code from it.

    Raises ValueError where it is damaged or holds more than plain data. Files in PyTorch's format of before 2020
    are no zip archives and have no checksums.
    """
    try:
        file.seek(0)
        if _is_zip(file):
            with zipfile.ZipFile(file) as archive:
                # torch.save compresses nothing and sets no attributes: PyTorch reads nothing of a "folder".
                if (
                    any(info.file_size != info.compress_size or info.external_attr for info in archive.infolist())
                    or archive.testzip()
                ):
                    raise ValueError
        file.seek(0)
        with warnings.catch_warnings(action="ignore"):  # of what `state_problem` refuses, such as sparse tensors
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes zipfile and the unpickler raise many types
        if isinstance(error, MemoryError) or is_of_disk(error):
            raise
        # PyTorch's own message would advise to switch weights_only off.
        raise ValueError(NOT_PLAIN) from error


def _is_zip(file: BinaryIO) -> bool:
    return file.read(4) == b"PK\3\4"  # PyTorch decides in the same way how it reads the file


def is_dense(value: torch.Tensor) -> bool:
    """Whether a tensor that was read from a file is an ordinary one on the CPU."""
    return value.layout == torch.strided and not value.is_quantized and value.device.type == "cpu"


def state_problem(given: Any, expected: Mapping[str, torch.Tensor]) -> str | None:
    """The first difference of tensors by name from `expected`, in words; None where there is none.

    Names, shapes and dtypes must be the same. Tensors must be dense, on the CPU, and finite.
    """
    if not isinstance(given, Mapping):
        return "no tensors by name"
    for name in [*expected, *given]:
        value, own = given.get(name), expected.get(name)
        if own is None:
            return f"an unknown tensor {name}"
        if not isinstance(value, torch.Tensor):
            return f"no tensor {name}"
        if not is_dense(value):
            return f"{name} is no dense tensor"
        if value.shape != own.shape:
            return f"{name} has the shape {tuple(value.shape)}, not {tuple(own.shape)}"
        if value.dtype != own.dtype:
            return f"{name} has the dtype {value.dtype}, not {own.dtype}"
        if not value.isfinite().all():
            return f"{name} has values that are not finite"
    return None


def optimizer_problem(given: Any, optimizer: torch.optim.Optimizer) -> str | None:
    """As `state_problem` for the state of an optimiser of the Adam family: PyTorch checks no shape of it.

    The fused step would write beyond the memory of a moment that is smaller than its parameter.
    """
    own = optimizer.state_dict()["param_groups"]
    groups = given.get("param_groups") if isinstance(given, Mapping) else None
    if not isinstance(groups, list) or len(groups) != len(own) or not isinstance(given.get("state"), Mapping):
        return "no state of this optimiser"
    for group, expected in zip(groups, own, strict=True):
        if (
            not isinstance(group, Mapping)
            or not isinstance(group.get("lr"), float)
            or not math.isfinite(group["lr"])
        ):
            return "no state of this optimiser"
        for name in expected.keys() - {"lr"}:  # set again before each step
            if group.get(name) != expected[name]:
                return f"{name} of the optimiser is {group.get(name)}, not {expected[name]}"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, state in given["state"].items():
        if not isinstance(number, int) or not 0 <= number < len(parameters):
            return f"a state of an unknown parameter {number}"
        moments = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if own[0]["amsgrad"] else [])]
        expected = {"step": torch.zeros(()), **dict.fromkeys(moments, parameters[number])}
        if problem := state_problem(state, expected):
            return f"in the optimiser's state of parameter {number}: {problem}"
    return None


def begun_problem(begun: Any, steps_per_epoch: int) -> str | None:
    """As `state_problem` for the `epoch_state` of an epoch in progress, which may be None."""
    if begun is None:
        return None
    if not isinstance(begun, Mapping) or not isinstance(begun.get("processes"), list) or not begun["processes"]:
        return "no state of an epoch in progress"
    steps, seconds = begun.get("steps"), begun.get("seconds")
    if type(steps) is not int or not 0 < steps <= steps_per_epoch:
        return f"the number of finished steps is {steps}, an epoch has {steps_per_epoch}"
    if not isinstance(seconds, float) or not 0 <= seconds < math.inf:
        return f"the epoch's time is {seconds} seconds"
    random = torch.Generator().get_state()
    for process in begun["processes"]:
        expected = {"total": torch.zeros(()), "augment": random, "cpu": random}
        if isinstance(process, Mapping) and "cuda" in process:
            expected["cuda"] = torch.zeros(16, dtype=torch.uint8)
        if problem := state_problem(process, expected):
            return problem
        try:
            for name in ("augment", "cpu"):
                torch.Generator().set_state(process[name])
        except RuntimeError:
            return f"{name} is no state of a random generator"
    return None

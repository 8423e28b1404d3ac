"""The device that computes, and the precision of its matrix products."""

import ctypes
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from common.cli import UsageError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@dataclass(frozen=True)
class Compute:
    """The device that the network computes on, and the precision of its matrix products."""

    device: torch.device
    dtype: torch.dtype  # float32, or bfloat16 under autocast

    @classmethod
    def of(cls, device: str, precision: str) -> "Compute":
        """What the keys `device` and `precision` mean here; UsageError for `cuda` where there is no GPU."""
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device cuda: PyTorch sees no CUDA device here; use --device cpu or auto")
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        bf16 = precision == "bf16" or (
            precision == "auto" and cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        )
        where = torch.device("cuda", 0) if cuda else torch.device("cpu")
        return cls(where, torch.bfloat16 if bf16 else torch.float32)

    def prepare_process(self) -> None:
        """On a CPU, let malloc keep freed memory; a script calls this before it builds its network.

        glibc returns blocks above 32 MB as soon as they are freed, and at the next step the system clears every
        page of them again: about an eighth of the time of MobileNetV3-Large at 64 pixels and batch 512.
        """
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if self.device.type == "cpu" and mallopt:  # only glibc has it
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)

    @property
    def name(self) -> str:
        """The device in words, for records."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        cpuinfo = Path("/proc/cpuinfo")  # on Linux, where platform.processor() is empty
        found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
        cpu, n_threads = found[1] if found else platform.processor() or "CPU", torch.get_num_threads()
        return f"{cpu}, {n_threads} thread{'' if n_threads == 1 else 's'}"

    def autocast(self) -> torch.autocast:
        """The context manager for a forward pass; it does nothing in float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
